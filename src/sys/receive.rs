//! Receives from a socket straight into memory that nobody has written to yet.
//!
//! # Safety contract
//! `recv` writes into no more than the length that it is given, and as many bytes as it returns; only these are
//! then said to be written. The memory is not read here, and nothing but `recv` touches it.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use hyper::rt::ReadBufCursor;
use nix::errno::Errno;
use nix::libc;

/// At most `most` bytes of what has come, behind what `out` holds; how many.
pub fn receive(socket: BorrowedFd<'_>, out: &mut ReadBufCursor<'_>, most: usize) -> io::Result<usize> {
    // SAFETY: see the contract at the top: no byte is made less written than it was.
    let room = unsafe { out.as_mut() };
    let most = most.min(room.len());
    // SAFETY: `room` is ours to write to, and `most` is no more than its length.
    let read = unsafe { libc::recv(socket.as_raw_fd(), room.as_mut_ptr().cast(), most, 0) };
    let read = usize::try_from(read).map_err(|_| Errno::last())?;
    // SAFETY: `recv` wrote so many bytes, at the beginning of `room`.
    unsafe { out.advance(read) };
    Ok(read)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::mem::MaybeUninit;
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use hyper::rt::ReadBuf;

    use super::*;

    #[test]
    fn what_comes_stands_behind_what_is_there_and_never_beyond_the_bound() {
        let (mut there, here) = UnixStream::pair().expect("a pair of sockets");
        here.set_nonblocking(true).expect("a socket that does not block");
        let mut memory = [const { MaybeUninit::uninit() }; 8];
        let mut buffer = ReadBuf::uninit(&mut memory);
        buffer.unfilled().put_slice(b"<");
        there.write_all(b"abcdefghij").expect("room in the socket");
        assert_eq!(receive(here.as_fd(), &mut buffer.unfilled(), 3).expect("bytes"), 3);
        assert_eq!(buffer.filled(), b"<abc");
        // More is asked for than there is room.
        assert_eq!(receive(here.as_fd(), &mut buffer.unfilled(), 100).expect("bytes"), 4);
        assert_eq!(buffer.filled(), b"<abcdefg");
        let mut rest = [const { MaybeUninit::uninit() }; 8];
        let mut rest = ReadBuf::uninit(&mut rest);
        assert_eq!(receive(here.as_fd(), &mut rest.unfilled(), 8).expect("bytes"), 3);
        let empty = receive(here.as_fd(), &mut rest.unfilled(), 8).expect_err("nothing there");
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        drop(there);
        assert_eq!(receive(here.as_fd(), &mut rest.unfilled(), 8).expect("the end"), 0);
        assert_eq!(rest.filled(), b"hij");
    }
}
