//! How many connections may be open, in all and from one address, and what becomes of one too many.
//!
//! Who is one too many is still answered: probes as always, everything else with a refusal in words. Whom
//! to let go for a new one is the worker's choice, which knows who is idle.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use tokio::sync::Notify;

use super::counts::Turned;
use crate::link::ProxySettings;
use crate::proxy::error::Refusal;
use crate::proxy::state::Shared;

/// How a connection was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Welcome,
    /// One too many: only probes are answered as always.
    Turned(Turned),
}

impl Standing {
    /// What its requests are told.
    pub fn refusal(self) -> Option<Refusal> {
        match self {
            Self::Welcome => None,
            Self::Turned(Turned::PeerCrowded) => Some(Refusal::peer_crowded()),
            Self::Turned(_) => Some(Refusal::crowded()),
        }
    }
}

/// Descriptors that are not for clients beside those of the engine's side: log, epoll, timers, files that
/// are read anew.
const SPARE: usize = 64;

/// How many connections may be open: what is set, or what descriptors allow.
pub fn room(settings: &ProxySettings) -> usize {
    settings.connections.unwrap_or_else(|| {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        let spare = SPARE + settings.max + 8 * settings.workers;
        descriptors.saturating_sub(spare).max(descriptors / 2)
    })
}

/// The connections of all workers.
#[derive(Debug, Default)]
pub struct Crowd {
    open: AtomicUsize,
    /// Rings when one of them has gone.
    left: Notify,
    peers: Mutex<HashMap<IpAddr, usize>>,
}

impl Crowd {
    pub fn open(&self) -> usize {
        self.open.load(Relaxed)
    }

    /// Waits until at most so many are open.
    pub async fn is_within(&self, room: usize) {
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            // Before the look: one that goes between look and wait must not be missed.
            left.as_mut().enable();
            if self.open() <= room {
                return;
            }
            left.await;
        }
    }
}

/// A connection's place in the crowd, for as long as it lives.
pub struct Seat {
    shared: Arc<Shared>,
    peer: Option<IpAddr>,
}

impl Seat {
    /// One more; or why it is one too many of its peer.
    pub fn take(shared: &Arc<Shared>, address: Option<IpAddr>, per_peer: Option<usize>) -> (Self, Standing) {
        shared.crowd.open.fetch_add(1, Relaxed);
        let mut standing = Standing::Welcome;
        let peer = per_peer.and(address).map(network);
        if let (Some(peer), Some(most)) = (peer, per_peer) {
            let mut peers = shared.crowd.peers.lock().unwrap_or_else(PoisonError::into_inner);
            let open = peers.entry(peer).or_default();
            *open += 1;
            if *open > most {
                standing = Standing::Turned(Turned::PeerCrowded);
            }
        }
        (Self { shared: Arc::clone(shared), peer }, standing)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let crowd = &self.shared.crowd;
        crowd.open.fetch_sub(1, Relaxed);
        crowd.left.notify_waiters();
        if let Some(peer) = self.peer {
            let mut peers = crowd.peers.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(open) = peers.get_mut(&peer) {
                *open -= 1;
                if *open == 0 {
                    peers.remove(&peer);
                }
            }
        }
    }
}

/// Who is one peer: an address, of version 6 the network that one customer gets.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address @ IpAddr::V4(_) => address,
    }
}

/// A descriptor that is held back, so that there is one for a connection that is to be told that there is
/// none.
#[derive(Debug)]
pub struct Reserve(Option<File>);

impl Reserve {
    pub fn new() -> Self {
        Self(File::open("/dev/null").ok())
    }

    /// Gives it up; whether there was one.
    pub fn spend(&mut self) -> Option<()> {
        self.0.take().map(drop)
    }

    /// Holds one back again, if there is one.
    pub fn restore(&mut self) {
        if self.0.is_none() {
            *self = Self::new();
        }
    }
}

/// Whether a connection was not accepted because there is no descriptor or no memory for it.
pub fn is_shortage(error: &io::Error) -> bool {
    let short = [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM];
    error.raw_os_error().is_some_and(|code| short.contains(&Errno::from_raw(code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_an_address_or_a_network_of_version_6() {
        let of = |text: &str| network(text.parse().expect("an address"));
        assert_eq!(of("2001:db8:1:2::1"), of("2001:db8:1:2:ffff::7"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }

    #[test]
    fn the_engines_side_keeps_descriptors_of_its_own() {
        let shared = Shared::new(crate::proxy::Timings::default(), crate::proxy::Supervision::Alone);
        let settings = ProxySettings { max: 32, ..shared.snapshot().settings.clone() };
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).expect("every process has limits");
        assert!((room(&settings) as u64) < soft);
        assert_eq!(room(&ProxySettings { connections: Some(77), ..settings }), 77);
    }
}
