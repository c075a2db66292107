//! How the C library keeps freed memory.
//!
//! # Safety contract
//! `mallopt` takes two integers; glibc allows it at any time, and it touches no memory of ours.
#![allow(unsafe_code)]

/// Threads share two heaps, in place of one each that only its own threads fill again: for a process that hands
/// buffers from thread to thread. To be called before there are threads; elsewhere than with glibc it does nothing.
pub fn share_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: see the contract at the top.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, 2);
    }
}
