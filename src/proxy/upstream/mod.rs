//! The engine's side: light HTTP/1.1 connections of our own to one trusted peer.
//!
//! hyper's client is made for any server and keeps buffers for each stream; this one keeps none. It
//! passes no judgement on requests and knows no client.

pub mod ask;
pub mod decode;
pub mod exchange;
pub mod head;

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

/// Idle connections are dropped this long after their last answer: the engine (uvicorn) closes them
/// after 5 s, and a request that meets the close has to be said again.
const IDLE: Duration = Duration::from_secs(3);
/// A loopback connect takes microseconds; one that does not is a full listen queue.
const CONNECT: Duration = Duration::from_secs(1);
/// Idle connections kept by a worker: more than any sane `limits.max` shares out to one.
const KEPT: usize = 256;

struct Idle {
    stream: TcpStream,
    engine: SocketAddr,
    since: Instant,
}

/// A connection with nothing on it.
#[derive(Debug)]
pub struct Connection {
    pub stream: TcpStream,
    pub history: History,
}

/// Whether the engine may be closing the connection just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum History {
    Fresh,
    Reused,
}

/// The idle connections of one worker, newest last.
#[derive(Default)]
pub struct Pool {
    idle: RefCell<Vec<Idle>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("idle", &self.idle.borrow().len()).finish()
    }
}

impl Pool {
    /// The connection used last, if it is still good: the others then age and go.
    pub fn take(&self, engine: SocketAddr) -> Option<Connection> {
        let mut idle = self.idle.borrow_mut();
        while let Some(Idle { stream, engine: peer, since }) = idle.pop() {
            if peer == engine && since.elapsed() < IDLE && is_quiet(&stream) {
                return Some(Connection { stream, history: History::Reused });
            }
        }
        None
    }

    /// Keeps a connection whose answer was read to its end.
    pub fn keep(self: &Rc<Self>, stream: TcpStream, engine: SocketAddr) {
        let mut idle = self.idle.borrow_mut();
        if idle.len() >= KEPT {
            return;
        }
        let first = idle.is_empty();
        idle.push(Idle { stream, engine, since: Instant::now() });
        if first {
            tokio::task::spawn_local(Rc::clone(self).sweep());
        }
    }

    /// Ends with the last idle connection, so that an idle proxy has no timer.
    async fn sweep(self: Rc<Self>) {
        loop {
            sleep(IDLE / 3).await;
            let mut idle = self.idle.borrow_mut();
            idle.retain(|kept| kept.since.elapsed() < IDLE);
            if idle.is_empty() {
                return;
            }
        }
    }

    /// Forgets all: another engine is coming.
    pub fn clear(&self) {
        self.idle.borrow_mut().clear();
    }
}

/// Nothing to read and not closed: bytes that nobody asked for make a connection unusable.
fn is_quiet(stream: &TcpStream) -> bool {
    stream.poll_read_ready(&mut Context::from_waker(Waker::noop())).is_pending()
}

/// A new connection: two attempts of [`CONNECT`] each.
pub async fn connect(engine: SocketAddr) -> io::Result<Connection> {
    let stream = match timeout(CONNECT, TcpStream::connect(engine)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(_)) | Err(_) => {
            timeout(CONNECT, TcpStream::connect(engine)).await.map_err(|_| io::ErrorKind::TimedOut)??
        }
    };
    stream.set_nodelay(true)?;
    Ok(Connection { stream, history: History::Fresh })
}
