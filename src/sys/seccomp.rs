//! Gives up the right to execute programs, for good: the proxy parses untrusted bytes and has no
//! business starting anything.
//!
//! # Safety contract
//! One `prctl` with a pointer to a filter that lives until the call returns; the kernel copies it.
#![allow(unsafe_code)]

use std::io;

use nix::libc;

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xC000_003E; // AUDIT_ARCH_X86_64
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xC000_00B7; // AUDIT_ARCH_AARCH64

const fn load(offset: u32) -> libc::sock_filter {
    libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: offset } // BPF_LD | BPF_W | BPF_ABS
}

const fn equal(k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: 0x15, jt, jf, k } // BPF_JMP | BPF_JEQ | BPF_K
}

const fn answer(k: u32) -> libc::sock_filter {
    libc::sock_filter { code: 0x06, jt: 0, jf: 0, k } // BPF_RET | BPF_K
}

/// From now on `execve` and `execveat` fail with `EPERM` in this thread and all it starts.
///
/// Errors: `EINVAL` where the kernel has no seccomp; the caller goes on without and says so.
pub fn forbid_exec() -> io::Result<()> {
    nix::sys::prctl::set_no_new_privs()?;
    let filter = [
        load(4), // seccomp_data.arch
        equal(ARCH, 0, 3),
        load(0), // seccomp_data.nr
        equal(u32::try_from(libc::SYS_execve).expect("a small number"), 2, 0),
        equal(u32::try_from(libc::SYS_execveat).expect("a small number"), 1, 0),
        answer(0x7fff_0000),                              // SECCOMP_RET_ALLOW
        answer(0x0005_0000 | libc::EPERM.unsigned_abs()), // SECCOMP_RET_ERRNO
    ];
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).expect("seven instructions"),
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: `program` points to a filter on this stack frame, alive during the call.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn after_it_nothing_can_be_executed() {
        // In a thread: the filter is the thread's own and ends with it.
        let ended = std::thread::spawn(|| {
            super::forbid_exec().expect("seccomp");
            std::process::Command::new("/bin/true").status()
        });
        let error = ended.join().expect("no panic").expect_err("execve is refused");
        assert_eq!(error.raw_os_error(), Some(nix::libc::EPERM));
    }
}
