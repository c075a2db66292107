//! Puts this process behind all others, for processor and disk.
//!
//! # Safety contract
//! `ioprio_set` takes three integers and touches no memory of ours; libc has no wrapper for it, so it is called by
//! number. It concerns the calling thread and the threads that it starts afterwards.
#![allow(unsafe_code)]

use nix::libc;

/// `IOPRIO_CLASS_BE`: best effort, in which 7 is the last.
const BEST_EFFORT_LAST: libc::c_int = (2 << 13) | 7;
const WHO_PROCESS: libc::c_int = 1;
const NICE: i32 = 10;

/// Best effort: where the kernel refuses, we only disturb more.
pub fn give_way() {
    let _ = rustix::process::setpriority_process(None, NICE);
    // SAFETY: see the contract at the top.
    unsafe {
        libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, BEST_EFFORT_LAST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_gives_way_is_behind_the_others_and_so_are_its_own() {
        // In a thread: the test's process keeps its place.
        std::thread::spawn(|| {
            give_way();
            let of = || {
                // SAFETY: integers only.
                unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, 0) }
            };
            assert_eq!(of(), i64::from(BEST_EFFORT_LAST));
            assert_eq!(std::thread::spawn(of).join().unwrap(), i64::from(BEST_EFFORT_LAST));
        })
        .join()
        .unwrap();
    }
}
