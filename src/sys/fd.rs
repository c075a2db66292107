//! Takes file descriptors that this process inherited by number.
//!
//! Safety contract: a descriptor named on the command line by the process that started this one is
//! nobody else's here. [`take`] checks that the number is open and not one of the standard streams;
//! that it is taken once is the caller's duty, and holds because the command line is parsed once, in
//! `main`, before anything else opens a descriptor.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};

/// Owns descriptor `fd`, and has it closed on exec from now on.
pub fn take(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= 2 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "standard streams are not handed over"));
    }
    // SAFETY: F_GETFD touches no memory; a number that is not open is an error, not undefined.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: open (just checked), and by the contract above owned by nobody else in this process.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: as for F_GETFD.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_not_open_are_refused() {
        assert!(take(1).is_err());
        assert!(take(987_654).is_err());
    }
}
