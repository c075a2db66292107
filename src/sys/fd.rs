//! Takes over a descriptor that was inherited under a known number.
//!
//! # Safety contract
//! A number given on the command line by the process that started us names a descriptor that was
//! left open for us and that nothing else in this process owns. [`take`] checks that it is open; it
//! is called once a number, before any thread is started.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Owns the descriptor from now on, closed on exec. `EBADF` where nothing is open there.
pub fn take(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 3 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "descriptors 0 to 2 are the standard streams"));
    }
    // SAFETY: only used for one fcntl, which reports a closed number as EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: open (checked above) and owned by nobody else (the contract at the top).
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
