//! One thread of the data plane: its own runtime, its own accepts, its own connections.
//!
//! Nothing but the snapshot, the counters and the admission's door is shared with other workers. What
//! happens to a request is [`super::service`]'s; this file only keeps connections alive and lets them
//! go.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::{Future as _, poll_fn};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Poll, Waker};
use std::time::Duration;

use http::{Request, Response};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use tokio::runtime::{Builder, LocalOptions};
use tokio::task::{spawn_local, yield_now};
use tokio::time::{Instant, sleep};

use super::answer::Answer;
use super::direct;
use super::framing::MAX_HEAD;
use super::http2;
use super::line::{Line, Upload};
use super::loads;
use super::metrics::Counters;
use super::service::{self, Peer};
use super::state::{Mode, Shared, Snapshot};
use super::tap::{Preface, Tap};
use super::transport::arrival::{Arrived, Greeting, Handshakes};
use super::transport::identity::ALPN_HTTP2;
use super::transport::listener::{Accepting, Listener};
use super::transport::socket::Socket;
use super::upstream::Pool;
use super::websocket;
use super::wire::Wire;
use crate::link::Http2;

/// After a failed accept (no descriptors): long enough to let some connection end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the connections of one thread share.
pub struct Worker {
    pub shared: Arc<Shared>,
    pub counters: Arc<Counters>,
    pub pool: Rc<Pool>,
    pub engine_silence: Duration,
    http: http1::Builder,
    /// What TCP connections begin with.
    greeting: RefCell<Greeting>,
    handshakes: Handshakes,
    mode: RefCell<Mode>,
    /// The tasks to wake when the mode changes, so that no connection has to watch for it.
    connections: RefCell<HashMap<u64, Waker>>,
    next: Cell<u64>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("mode", &self.mode).finish_non_exhaustive()
    }
}

impl Worker {
    fn new(shared: Arc<Shared>, counters: Arc<Counters>) -> Rc<Self> {
        let mut http = http1::Builder::new();
        // The head's clock, its lines (100, as hyper's default) and its size are the tap's, which can
        // say why; hyper's own stand a little behind. Half-closed connections are `poll_left`'s.
        http.half_close(true).header_read_timeout(None).max_buf_size(MAX_HEAD + 1024).auto_date_header(true);
        Rc::new(Self {
            engine_silence: shared.timings.engine_silence,
            shared,
            counters,
            pool: Rc::default(),
            http,
            greeting: RefCell::new(Greeting::NONE),
            handshakes: Handshakes::default(),
            mode: RefCell::new(Mode::Serving),
            connections: RefCell::default(),
            next: Cell::new(0),
        })
    }

    /// Why open answers must end, if they must.
    pub fn cut(&self) -> Option<String> {
        match &*self.mode.borrow() {
            Mode::Cut(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    pub fn stamp(&self, at: Instant) -> u64 {
        self.shared.stamp(at)
    }

    pub fn is_serving(&self) -> bool {
        *self.mode.borrow() == Mode::Serving
    }

    fn change(&self, snapshot: &Snapshot) {
        let upstream = snapshot.engine.as_ref().and_then(|engine| engine.upstream.as_ref());
        if upstream.is_none() {
            self.pool.clear();
        }
        self.greeting.replace(Greeting::new(&snapshot.settings.listen, snapshot.identity.as_deref()));
        if *self.mode.borrow() != snapshot.mode {
            self.mode.borrow_mut().clone_from(&snapshot.mode);
            self.connections.borrow().values().for_each(Waker::wake_by_ref);
        }
    }
}

/// Runs a worker on this thread until the proxy is closed.
pub fn run(shared: Arc<Shared>, counters: Arc<Counters>, listeners: Vec<Listener>) -> io::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(async {
        let mut changes = shared.changes();
        let worker = Worker::new(shared, counters);
        for listener in listeners {
            spawn_local(accept(Rc::clone(&worker), listener.begin()?));
        }
        loop {
            let snapshot = changes.borrow_and_update().clone();
            worker.change(&snapshot);
            if worker.shared.loads.is_inheriting() {
                loads::keep_looking(&worker);
            }
            if snapshot.mode == Mode::Closed || changes.changed().await.is_err() {
                return Ok(());
            }
        }
    })
}

/// Accepts one connection at a time and lets the others have theirs in between. What comes before
/// HTTP (TLS, PROXY) begins here, before [`converse`].
async fn accept(worker: Rc<Worker>, listener: Accepting) {
    loop {
        match listener.accept().await {
            Ok((socket, address)) => {
                let worker = Rc::clone(&worker);
                let greeting = match &socket {
                    Socket::Tcp(_) => worker.greeting.borrow().clone(),
                    Socket::Unix(_) => Greeting::NONE,
                };
                if greeting.is_none() {
                    let wire = Wire::plain(Rc::new(socket));
                    spawn_local(converse(worker, Arrived { wire, address }));
                } else {
                    spawn_local(async move {
                        // Boxed: what only a greeting needs is not kept for the connection's life.
                        let greeted =
                            Box::pin(worker.handshakes.greet(&worker.shared, socket, address, greeting)).await;
                        if let Some(arrived) = greeted {
                            converse(worker, arrived).await;
                        }
                    });
                }
                yield_now().await;
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "no connection can be accepted for now");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A connection's entry in the worker's list, for as long as it lives.
struct Registered {
    worker: Rc<Worker>,
    id: u64,
}

impl Registered {
    fn new(worker: &Rc<Worker>, waker: &Waker) -> Self {
        let id = worker.next.get();
        worker.next.set(id + 1);
        worker.connections.borrow_mut().insert(id, waker.clone());
        worker.counters.connections.fetch_add(1, Relaxed);
        worker.counters.connections_total.fetch_add(1, Relaxed);
        Self { worker: Rc::clone(worker), id }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.worker.connections.borrow_mut().remove(&self.id);
        self.worker.counters.connections.fetch_sub(1, Relaxed);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Farewell {
    /// Was open when the drain began: to be told, once.
    Due,
    Said,
}

/// What a connection has come to under hyper.
enum Turn {
    Over(hyper::Result<()>),
    /// An answer is to be written by hand: see [`super::direct`].
    Direct(Box<Response<Answer>>),
}

async fn converse(worker: Rc<Worker>, arrived: Arrived) {
    let Arrived { wire: client, address } = arrived;
    {
        let waker = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
        let _registered = Registered::new(&worker, &waker);
        let early = match client.protocol() {
            Some(agreed) if agreed == ALPN_HTTP2 => Some(Vec::new()),
            _ => {
                speak_http1(&worker, &client, address).await;
                client.http2()
            }
        };
        if let Some(early) = early {
            let speaker = http2::Client { worker: Rc::clone(&worker), address, scheme: client.scheme() };
            // Boxed: most connections have no use for the room.
            Box::pin(http2::serve(Rc::new(speaker), Rc::clone(&client), early)).await;
        }
    }
    if let Some(why) = client.turned() {
        worker.shared.connections.turn_away(why, address);
    }
    if !client.has_ended() {
        client.close().await;
    }
}

/// Until the connection's end, or until it turns out to be HTTP/2.
async fn speak_http1(worker: &Rc<Worker>, client: &Rc<Wire>, address: Option<IpAddr>) {
    let preface = match worker.shared.snapshot().settings.listen.http2 {
        Http2::On => Preface::Possible,
        Http2::Off => Preface::Excluded,
    };
    let peer = Rc::new(Peer {
        worker: Rc::clone(worker),
        line: Line::Http1(Rc::clone(client)),
        address,
        scheme: client.scheme(),
    });
    let mut tap = Tap::new(Rc::clone(client), worker.shared.timings.client, preface);
    // Who connects during a drain is answered; only what was open before is let go.
    let mut farewell = if worker.is_serving() { Farewell::Due } else { Farewell::Said };
    loop {
        let peer = Rc::clone(&peer);
        let service =
            service_fn(move |request| service::answer(Rc::clone(&peer), Request::map(request, Upload::Http1)));
        let mut connection = worker.http.serve_connection(tap, service);
        let turn = poll_fn(|cx| {
            if farewell == Farewell::Due && !worker.is_serving() {
                farewell = Farewell::Said;
                // A client's first request may be on its way: it gets its refusal in words.
                if client.was_asked() {
                    Pin::new(&mut connection).graceful_shutdown();
                }
            }
            match Pin::new(&mut connection).poll(cx) {
                Poll::Ready(outcome) => Poll::Ready(Turn::Over(outcome)),
                Poll::Pending => client.handed_over().map_or(Poll::Pending, |answer| Poll::Ready(Turn::Direct(answer))),
            }
        })
        .await;
        let response = match turn {
            Turn::Over(Ok(())) => return,
            Turn::Over(Err(error)) => {
                tracing::debug!(%error, "a connection ended early");
                return;
            }
            Turn::Direct(response) => response,
        };
        let http1::Parts { io, read_buf, .. } = connection.into_parts();
        tap = io;
        if let Answer::Tunnel(_) = response.body() {
            let unread = [&read_buf[..], &tap.into_unread()].concat();
            Box::pin(websocket::carry(client, *response, unread)).await;
            return;
        }
        if let Err(error) = direct::write(&mut tap, client, *response).await {
            tracing::debug!(%error, "a stream ended early");
            return;
        }
        if !worker.is_serving() || !read_buf.is_empty() || !tap.is_between_requests() {
            return;
        }
    }
}
