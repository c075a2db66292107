//! The engine's side: light HTTP/1.1 connections of our own to one trusted peer.
//!
//! hyper's client is made for any server and keeps buffers for each stream; this one keeps none. It
//! passes no judgement on requests and knows no client.

pub mod ask;
pub mod decode;
pub mod exchange;
pub mod head;
mod sending;

use std::cell::RefCell;
use std::future::{Future as _, poll_fn};
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use nix::libc;
use socket2::{Domain, Protocol, Type};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};

use super::transport::socket::Socket;

/// No engine closes a connection that was idle for less: uvicorn, SGLang's server, waits 5 s.
const YOUNG: Duration = Duration::from_secs(3);
/// Idle connections are kept for this long, a second less than the engine keeps them: a request that meets the
/// close would have to be said again.
const IDLE: Duration = Duration::from_secs(4);
/// A loopback connect takes microseconds; one that does not is a full listen queue.
const CONNECT: Duration = Duration::from_secs(1);
/// Idle connections kept by a worker: more than any sane `limits.max` shares out to one.
const KEPT: usize = 256;

struct Idle {
    socket: Rc<Socket>,
    engine: SocketAddr,
    since: Instant,
}

/// A connection with nothing on it.
#[derive(Debug)]
pub struct Connection {
    pub socket: Rc<Socket>,
    pub history: History,
}

/// Whether the engine may be closing the connection just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum History {
    Fresh,
    Reused,
}

/// What becomes of a request whose connection the engine closes just as it is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// It can be said again on another one.
    Possible,
    /// It is lost: it is to have a connection that the engine does not close.
    No,
}

/// The idle connections of one worker, newest last. Each tells the task that lets them go when the engine
/// closes it, so none stays half closed, and none of those is ever taken.
pub struct Pool {
    idle: RefCell<Vec<Idle>>,
    sweeper: RefCell<Sweeper>,
}

/// The task that lets connections go.
enum Sweeper {
    /// There is nothing to let go.
    None,
    Begins,
    Waits(Waker),
}

impl Default for Pool {
    fn default() -> Self {
        Self { idle: RefCell::default(), sweeper: RefCell::new(Sweeper::None) }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("idle", &self.idle.borrow().len()).finish_non_exhaustive()
    }
}

impl Pool {
    /// The connection used last, if it is still good: the others then age and go.
    pub fn take(&self, engine: SocketAddr, repeat: Repeat) -> Option<Connection> {
        let mut idle = self.idle.borrow_mut();
        loop {
            let age = idle.last()?.since.elapsed();
            if repeat == Repeat::No && age >= YOUNG {
                // It is good for somebody else.
                return None;
            }
            let Idle { socket, engine: peer, .. } = idle.pop()?;
            if peer == engine && age < IDLE && is_quiet(&socket, age) {
                return Some(Connection { socket, history: History::Reused });
            }
        }
    }

    /// Keeps a connection whose answer was read to its end.
    pub fn keep(self: &Rc<Self>, socket: Rc<Socket>, engine: SocketAddr) {
        let mut idle = self.idle.borrow_mut();
        if idle.len() >= KEPT {
            return;
        }
        let mut sweeper = self.sweeper.borrow_mut();
        match &*sweeper {
            Sweeper::None => {
                tokio::task::spawn_local(Rc::clone(self).sweep());
                *sweeper = Sweeper::Begins;
            }
            // It will ask for this one's end as well.
            Sweeper::Begins => {}
            // Whether it is good is asked when it is taken.
            Sweeper::Waits(waker) => drop(socket.poll_read_ready(&mut Context::from_waker(waker))),
        }
        idle.push(Idle { socket, engine, since: Instant::now() });
    }

    /// Lets connections go when their time has come or the engine closes them. Ends with the last one, so that
    /// an idle proxy has no timer.
    async fn sweep(self: Rc<Self>) {
        let mut timer = pin!(sleep_until(Instant::now() + IDLE));
        poll_fn(|cx| {
            self.sweeper.replace(Sweeper::Waits(cx.waker().clone()));
            loop {
                let Some(oldest) = self.let_go(cx) else {
                    self.sweeper.replace(Sweeper::None);
                    return Poll::Ready(());
                };
                timer.as_mut().reset(oldest + IDLE);
                if timer.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
            }
        })
        .await;
    }

    /// Drops what is to go, and asks the rest to tell. Since when the oldest of them is idle.
    fn let_go(&self, cx: &mut Context<'_>) -> Option<Instant> {
        let mut idle = self.idle.borrow_mut();
        idle.retain(|kept| kept.since.elapsed() < IDLE && kept.socket.poll_read_ready(cx).is_pending());
        idle.first().map(|oldest| oldest.since)
    }

    /// Forgets all: another engine is coming.
    pub fn clear(&self) {
        self.idle.borrow_mut().clear();
        if let Sweeper::Waits(sweeper) = &*self.sweeper.borrow() {
            sweeper.wake_by_ref();
        }
    }
}

/// Nothing to read and not closed: bytes that nobody asked for make a connection unusable.
fn is_quiet(socket: &Socket, age: Duration) -> bool {
    if socket.poll_read_ready(&mut Context::from_waker(Waker::noop())).is_ready() {
        return false;
    }
    // Of one that the engine may be closing, the kernel knows more than it has told by now.
    let mut byte = [MaybeUninit::uninit()];
    age < YOUNG || socket.option().peek(&mut byte).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// A new connection: two attempts of [`CONNECT`] each.
pub async fn connect(engine: SocketAddr) -> io::Result<TcpStream> {
    Ok(match timeout(CONNECT, attempt(engine)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(_)) | Err(_) => timeout(CONNECT, attempt(engine)).await.map_err(|_| io::ErrorKind::TimedOut)??,
    })
}

/// Waits for the kernel's word only where it is needed: on loopback a connection stands when `connect` returns.
async fn attempt(engine: SocketAddr) -> io::Result<TcpStream> {
    let socket =
        socket2::Socket::new(Domain::for_address(engine), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&engine.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let stream = TcpStream::from_std(socket.into())?;
    if stream.peer_addr().is_err() {
        stream.writable().await?;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
    }
    Ok(stream)
}

#[cfg(test)]
mod tests;
