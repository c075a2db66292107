//! How much memory this process keeps: of what it freed, and of its own file.
//!
//! # Safety contract
//! `mallopt` takes two integers and `malloc_trim` one; glibc allows them at any time, and they touch no memory that is in use.
//! `dl_iterate_phdr` gives each callback the headers of a loaded file, valid while it runs. Only segments that the
//! file says are never written to are let go of: their pages are the file's own, and come again from it when they
//! are touched. What the loader wrote to (RELRO) lies in a segment that the file calls writable.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::time::Duration;

use nix::libc;

/// Threads share one heap, in place of one each that only its own threads fill again: for a process that hands large buffers
/// from thread to thread. What one freed is in the processor's caches yet when another takes it. To be called before there are
/// threads; elsewhere than with glibc it does nothing.
pub fn share_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: see the contract at the top.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Lets go of what was freed, and of what is in memory of program and libraries: most of it only the start needed, relocations, help texts
/// and the code that reads settings, and what is near to that. What is touched again is there again, a few pages
/// of it at a time, from the kernel's cache.
///
/// Once now, and once more when the threads that were started have begun to wait.
pub fn let_go_of_start() {
    let_go();
    #[allow(clippy::disallowed_methods)] // a thread of its own, for this alone
    let again = || {
        std::thread::sleep(SETTLED);
        let_go();
    };
    // Without it there is somewhat more memory in use.
    drop(std::thread::Builder::new().name("let-go".into()).stack_size(SMALL_STACK).spawn(again));
}

const SETTLED: Duration = Duration::from_millis(200);
const SMALL_STACK: usize = 64 * 1024;

fn let_go() {
    #[cfg(target_env = "gnu")]
    // SAFETY: see the contract at the top.
    unsafe {
        libc::malloc_trim(0);
    }
    // SAFETY: see the contract at the top; `each` does not unwind.
    unsafe { libc::dl_iterate_phdr(Some(each), std::ptr::null_mut()) };
}

unsafe extern "C" fn each(file: *mut libc::dl_phdr_info, _size: usize, _nothing: *mut c_void) -> c_int {
    // SAFETY: the loader's own description of a file, valid until this returns, as are its headers.
    let (file, headers) = unsafe {
        let file = &*file;
        (file, std::slice::from_raw_parts(file.dlpi_phdr, usize::from(file.dlpi_phnum)))
    };
    let unchanging = |header: &&libc::Elf64_Phdr| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0;
    for header in headers.iter().filter(unchanging) {
        let begin = file.dlpi_addr + header.p_vaddr;
        let (from, to) = (begin & !(PAGE - 1), (begin + header.p_memsz).next_multiple_of(PAGE));
        // SAFETY: pages of a segment that is never written to; a failure leaves them as they are.
        unsafe { libc::madvise(from as *mut c_void, (to - from) as usize, libc::MADV_DONTNEED) };
    }
    0
}

/// The least page: where pages are larger, what is not aligned to them is refused, and stays.
const PAGE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_and_constants_are_what_they_were() {
        static WORDS: [&str; 3] = ["one", "two", "three"];
        let before = WORDS.concat();
        let_go();
        assert_eq!(WORDS.concat(), before);
        assert_eq!(format!("{WORDS:?}"), r#"["one", "two", "three"]"#);
    }
}
