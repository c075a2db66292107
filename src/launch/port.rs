//! A private port for the engine, held until the engine binds it.
//!
//! SGLang binds its port only after the whole load, and finds a conflict only then: it stays at
//! "Waiting for application shutdown" with the GPUs full. So a socket is bound, but not listening,
//! for as long as the load lasts. Linux lets two sockets with `SO_REUSEADDR` (uvicorn sets it) share
//! a port as long as none of them listens before both are bound; any other program's plain `bind`
//! or listener fails, and the kernel gives the port to no outgoing connection.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use rand::Rng;
use socket2::{Domain, Socket, Type};

/// Below the usual ephemeral range, above the well-known services, and clear of 22000–29999, where
/// SGLang picks its own NCCL port.
const RANGE: std::ops::Range<u16> = 12_000..22_000;
/// SGLang derives up to +239 from its port for its workers' sockets.
const TRIES: usize = 200;

#[derive(Debug)]
pub struct HeldPort {
    port: u16,
    /// Bound, never listening; dropped, the port is anybody's.
    _socket: Socket,
}

impl HeldPort {
    /// Holds some free port of 127.0.0.1 outside the kernel's ephemeral range.
    pub fn take() -> io::Result<Self> {
        let ephemeral =
            ephemeral_range(&fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default());
        let mut last = io::Error::from(io::ErrorKind::AddrInUse);
        for _ in 0..TRIES {
            let port = rand::rng().random_range(RANGE);
            if ephemeral.contains(&port) {
                continue;
            }
            match hold(port) {
                Ok(held) => return Ok(held),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    pub fn addr(&self) -> SocketAddr {
        SocketAddrV4::new(Ipv4Addr::LOCALHOST, self.port).into()
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}

fn hold(port: u16) -> io::Result<HeldPort> {
    let addr: SocketAddr = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port).into();
    // Without SO_REUSEADDR first: another holder with it would let us share, and this is the look
    // for other holders.
    let probe = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    probe.bind(&addr.into())?;
    drop(probe);
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    Ok(HeldPort { port, _socket: socket })
}

fn ephemeral_range(text: &str) -> std::ops::RangeInclusive<u16> {
    let mut numbers = text.split_whitespace().filter_map(|word| word.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(low), Some(high)) => low..=high,
        _ => 32_768..=60_999,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_port_goes_to_nobody_but_one_who_reuses_addresses() {
        let held = HeldPort::take().expect("some port is free");
        let plain = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        assert!(plain.bind(&held.addr().into()).is_err(), "a plain bind must fail");
        // What uvicorn does (asyncio sets SO_REUSEADDR on POSIX).
        let engine = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        engine.set_reuse_address(true).expect("set");
        engine.bind(&held.addr().into()).expect("the engine may bind it");
        engine.listen(16).expect("and listen");
    }

    #[test]
    fn the_kernels_range_is_read() {
        assert_eq!(ephemeral_range("32768\t60999\n"), 32_768..=60_999);
        assert_eq!(ephemeral_range(""), 32_768..=60_999);
        assert_eq!(ephemeral_range("10000 65535"), 10_000..=65_535);
    }
}
