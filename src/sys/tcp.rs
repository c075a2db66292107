//! A TCP connection of this process whose socket a library holds and does not hand out.
//!
//! # Safety contract
//! A number read from `/proc/self/fd` is only given to one `fcntl` that makes another descriptor of it, which reports a
//! closed one; what is then looked at and changed is that other one, which is ours. `getsockopt` writes no more than the
//! length that it is given, into memory that is written to before.
#![allow(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use socket2::Socket;

/// Another descriptor of the connection between these two addresses; none: there is no such connection here.
pub fn connection(local: SocketAddr, peer: SocketAddr) -> Option<Socket> {
    let is_it = |socket: &Socket| {
        let of = |address: io::Result<socket2::SockAddr>| address.ok().and_then(|address| address.as_socket());
        of(socket.local_addr()) == Some(local) && of(socket.peer_addr()) == Some(peer)
    };
    let open = std::fs::read_dir("/proc/self/fd").ok()?.filter_map(Result::ok);
    let numbers = open.filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
    numbers.filter_map(another).map(Socket::from).find(is_it)
}

fn another(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: see the contract at the top.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let ours = fcntl(borrowed, FcntlArg::F_DUPFD_CLOEXEC(3)).ok()?;
    // SAFETY: made in the line above, and known to nobody else.
    Some(unsafe { OwnedFd::from_raw_fd(ours) })
}

/// How long a byte and its acknowledgement are on their way.
pub fn round_trip(connection: &Socket) -> io::Result<Duration> {
    // SAFETY: all of it is numbers, for which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    let into = (&raw mut info).cast();
    // SAFETY: see the contract at the top.
    let outcome =
        unsafe { libc::getsockopt(connection.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, into, &raw mut length) };
    Errno::result(outcome)?;
    Ok(Duration::from_micros(info.tcpi_rtt.into()))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_is_found_by_its_addresses_and_tells_its_round_trip() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let held = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
        let (local, peer) = (held.local_addr().expect("connected"), held.peer_addr().expect("connected"));
        let found = connection(local, peer).expect("it is open");
        found.set_recv_buffer_size(64 * 1024).expect("a socket");
        assert_eq!(socket2::SockRef::from(&held).recv_buffer_size().expect("a socket"), 128 * 1024, "another socket");
        assert!(round_trip(&found).expect("a TCP socket") < Duration::from_secs(1));
        drop((held, found));
        assert!(connection(local, peer).is_none());
    }
}
