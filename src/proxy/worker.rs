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
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout};

use super::accept::accept;
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
use super::transport::counts::Turned;
use super::transport::crowd::{self, Seat, Standing};
use super::transport::identity::ALPN_HTTP2;
use super::transport::listener::Listener;
use super::transport::outbox;
use super::transport::socket::Socket;
use super::upstream::Pool;
use super::websocket;
use super::wire::Wire;
use crate::link::Http2;

/// What a connection that is one too many may take to ask and to be answered.
pub const ONE_TOO_MANY: Duration = Duration::from_secs(1);
/// Of which its client may take so long to close.
pub const ONE_TOO_MANY_CLOSE: Duration = Duration::from_millis(100);
/// What hyper may read at once of a body, and keep of an answer in one piece.
const BODY_READ: usize = 256 * 1024;
// Heads are the tap's to judge.
const _: () = assert!(BODY_READ > MAX_HEAD + 1024);
/// Connections of one worker that are told so at once. Any more are closed without a word.
const TOO_MANY: usize = 32;
/// What another worker may take to let an idle connection go for a newcomer here: a turn of its own, on a busy machine.
const OTHERS_ANSWER: Duration = Duration::from_millis(100);

/// What the connections of one thread share.
pub struct Worker {
    pub shared: Arc<Shared>,
    pub counters: Arc<Counters>,
    pub pool: Rc<Pool>,
    pub engine_silence: Duration,
    http: http1::Builder,
    /// What TCP connections begin with.
    greeting: RefCell<Greeting>,
    pub handshakes: Handshakes,
    mode: RefCell<Mode>,
    /// The tasks to wake when the mode changes, so that no connection has to watch for it.
    connections: RefCell<HashMap<u64, (Waker, Rc<Wire>)>>,
    next: Cell<u64>,
    /// Connections that may be open, of all workers.
    room: Cell<usize>,
    /// Connections that are one too many.
    turned: Cell<usize>,
    /// Until then no other worker is waited for: they had nobody to let go.
    nobody_is_idle: Cell<Instant>,
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
        http.half_close(true).header_read_timeout(None).max_buf_size(BODY_READ).auto_date_header(true);
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
            room: Cell::new(usize::MAX),
            turned: Cell::new(0),
            nobody_is_idle: Cell::new(Instant::now()),
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

    /// What comes before HTTP on this socket.
    pub fn greeting_of(&self, socket: &Socket) -> Greeting {
        if socket.is_tcp() { self.greeting.borrow().clone() } else { Greeting::NONE }
    }

    pub fn is_serving(&self) -> bool {
        *self.mode.borrow() == Mode::Serving
    }

    fn change(&self, snapshot: &Snapshot) {
        let upstream = snapshot.engine.as_ref().and_then(|engine| engine.upstream.as_ref());
        if upstream.is_none() {
            self.pool.clear();
        }
        self.room.set(crowd::room(&snapshot.settings));
        self.greeting.replace(Greeting::new(&snapshot.settings.listen, snapshot.identity.as_deref()));
        if *self.mode.borrow() != snapshot.mode {
            self.mode.borrow_mut().clone_from(&snapshot.mode);
            self.connections.borrow().values().for_each(|(waker, _)| waker.wake_by_ref());
        }
    }
}

impl Worker {
    /// Lets the connections go that have been idle for the longest, to make room for new ones; how many.
    fn let_go(&self) -> usize {
        let connections = self.connections.borrow();
        let mut idle: Vec<_> = connections.values().filter_map(|open| Some((open.1.idle_since()?, open))).collect();
        // Some at a time: to look through all of them for each new one would cost the square of their number.
        let enough = (connections.len() / 16).max(1);
        if idle.len() > enough {
            idle.select_nth_unstable_by_key(enough - 1, |(since, _)| *since);
            idle.truncate(enough);
        }
        for (_, (waker, wire)) in &idle {
            wire.let_go();
            waker.wake_by_ref();
        }
        self.shared.connections.let_go.fetch_add(idle.len() as u64, Relaxed);
        idle.len()
    }

    /// The same on all workers. How many go here is known at once.
    pub fn press(&self) -> usize {
        let here = self.let_go();
        if here == 0 {
            self.shared.pressure.send_modify(|times| *times += 1);
        }
        here
    }

    /// A place in the crowd for one more connection, and how it is to be received.
    async fn seat(&self, address: Option<IpAddr>) -> (Seat, Standing) {
        let per_peer = self.shared.snapshot().settings.connections_per_peer;
        let (seat, standing) = Seat::take(&self.shared, address, per_peer);
        let full = standing == Standing::Welcome && self.shared.crowd.open() > self.room.get();
        // Boxed: seldom needed.
        if full && self.press() == 0 && !Box::pin(self.others_make_room()).await {
            return (seat, Standing::Turned(Turned::Crowded));
        }
        (seat, standing)
    }

    /// Whether another worker, which was asked to, lets idle connections go.
    async fn others_make_room(&self) -> bool {
        let now = Instant::now();
        if self.shared.snapshot().settings.workers == 1 || now < self.nobody_is_idle.get() {
            return false;
        }
        let made = timeout(OTHERS_ANSWER, self.shared.crowd.is_within(self.room.get())).await.is_ok();
        if !made {
            // Else each of a flood would wait as long.
            self.nobody_is_idle.set(Instant::now() + OTHERS_ANSWER);
        }
        made
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
        spawn_local(make_room(Rc::clone(&worker)));
        spawn_local(outbox::carry());
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

/// Lets idle connections go when another worker has none.
async fn make_room(worker: Rc<Worker>) {
    let mut pressure = worker.shared.pressure.subscribe();
    while pressure.changed().await.is_ok() {
        worker.let_go();
    }
}

/// A connection's entry in the worker's list, for as long as it lives.
struct Registered {
    worker: Rc<Worker>,
    id: u64,
}

impl Registered {
    fn new(worker: &Rc<Worker>, waker: &Waker, wire: &Rc<Wire>) -> Self {
        let id = worker.next.get();
        worker.next.set(id + 1);
        worker.connections.borrow_mut().insert(id, (waker.clone(), Rc::clone(wire)));
        worker.counters.connections.fetch_add(1, Relaxed);
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

/// A connection on which HTTP may begin, until its end.
pub async fn converse(worker: Rc<Worker>, arrived: Arrived) {
    let (seat, standing) = worker.seat(arrived.address).await;
    match standing {
        Standing::Welcome => speak(&worker, &arrived, standing).await,
        Standing::Turned(why) => {
            worker.shared.connections.turn_away(why, arrived.address);
            // Else the room that others are asked to make for it would be its own: closed without a word.
            arrived.wire.goes_anyway();
            if worker.turned.get() < TOO_MANY {
                worker.turned.set(worker.turned.get() + 1);
                let _ = timeout(ONE_TOO_MANY, Box::pin(speak(&worker, &arrived, standing))).await;
                let _ = timeout(ONE_TOO_MANY_CLOSE, arrived.wire.close()).await;
                worker.turned.set(worker.turned.get() - 1);
            }
            return;
        }
    }
    let Arrived { wire: client, address } = arrived;
    if let Some(why) = client.turned() {
        worker.shared.connections.turn_away(why, address);
    }
    drop(seat);
    if !client.has_ended() && !client.is_let_go() {
        client.close().await;
    }
}

/// Speaks with the client until the connection's end.
pub async fn speak(worker: &Rc<Worker>, arrived: &Arrived, standing: Standing) {
    let Arrived { wire: client, address } = arrived;
    let waker = poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
    let _registered = Registered::new(worker, &waker, client);
    let early = match client.protocol() {
        Some(agreed) if agreed == ALPN_HTTP2 => Some(Vec::new()),
        _ => {
            speak_http1(worker, client, *address, standing).await;
            client.http2()
        }
    };
    if let Some(early) = early {
        let speaker = http2::Client { worker: Rc::clone(worker), address: *address, scheme: client.scheme(), standing };
        // Boxed: most connections have no use for the room.
        Box::pin(http2::serve(Rc::new(speaker), Rc::clone(client), early)).await;
    }
}

/// Until the connection's end, or until it turns out to be HTTP/2.
async fn speak_http1(worker: &Rc<Worker>, client: &Rc<Wire>, address: Option<IpAddr>, standing: Standing) {
    let preface = match worker.shared.snapshot().settings.listen.http2 {
        Http2::On => Preface::Possible,
        Http2::Off => Preface::Excluded,
    };
    let peer = Rc::new(Peer {
        worker: Rc::clone(worker),
        line: Line::Http1(Rc::clone(client)),
        address,
        scheme: client.scheme(),
        standing,
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
                Poll::Pending => match client.handed_over() {
                    Some(answer) => Poll::Ready(Turn::Direct(answer)),
                    // Not before what has come meanwhile was looked at: it may be a request.
                    None if client.is_let_go() => Poll::Ready(Turn::Over(Ok(()))),
                    None => Poll::Pending,
                },
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
