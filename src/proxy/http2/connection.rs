//! One connection of HTTP/2 from its preface to its end: its streams, its clocks, its farewell.
//!
//! It is one task, which owns all its streams; each is polled only when it has something to do. What
//! a request is answered is [`super::super::service`]'s, which bytes may pass [`super::watch`]'s.

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use h2::{Ping, PingPong, Reason};
use tokio::time::{Instant, Sleep, sleep_until, timeout};

use super::super::tap::Patience;
use super::super::wire::Wire;
use super::Client;
use super::flow::{Piece, STILL};
use super::io::{Io, Seen};
use super::stream::Stream;

/// How long a last GOAWAY may take to be taken.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Speaks HTTP/2 until the connection's end. `early`: what was read of it already, preface and all.
pub async fn serve(client: Rc<Client>, wire: Rc<Wire>, early: Vec<u8>) {
    let counters = &client.worker.counters;
    counters.http2_connections.fetch_add(1, Relaxed);
    counters.http2_connections_total.fetch_add(1, Relaxed);
    let patience = client.worker.shared.timings.client;
    let seen = Seen::new();
    let io = Io::new(Rc::clone(&wire), Rc::clone(&seen), early, patience.write);
    match timeout(patience.head, super::settings().handshake::<_, Piece>(io)).await {
        Ok(Ok(connection)) => {
            let mut connection = Connection::new(Rc::clone(&client), wire, connection, seen, patience);
            poll_fn(|cx| connection.poll(cx)).await;
        }
        Ok(Err(error)) => tracing::debug!(%error, "a connection of HTTP/2 did not begin"),
        Err(_) => tracing::debug!("a client did not say its preface in time"),
    }
    counters.http2_connections.fetch_sub(1, Relaxed);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// Told to open no more streams; those that are open go on to their end.
    Leaving,
    /// The last GOAWAY is on its way.
    Ended,
}

/// Whether a drain was answered with a farewell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Farewell {
    /// Was open when the drain began: to be told.
    Due,
    /// Came during a drain: its first request gets its refusal in words.
    AfterFirst,
    Said,
}

/// Whether the streams know that all answers are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Untold,
    Told,
}

/// Whether the client still answers.
#[derive(Debug, Default)]
struct Pulse {
    read: u64,
    /// Beats without a byte from it.
    quiet: u32,
}

struct Connection {
    client: Rc<Client>,
    wire: Rc<Wire>,
    h2: h2::server::Connection<Io, Piece>,
    pings: Option<PingPong>,
    streams: FuturesUnordered<Stream>,
    seen: Rc<Seen>,
    patience: Patience,
    phase: Phase,
    farewell: Farewell,
    cut: Cut,
    pulse: Pulse,
    clocks: Clocks,
}

impl Connection {
    fn new(
        client: Rc<Client>,
        wire: Rc<Wire>,
        mut h2: h2::server::Connection<Io, Piece>,
        seen: Rc<Seen>,
        patience: Patience,
    ) -> Self {
        let farewell = if client.worker.is_serving() { Farewell::Due } else { Farewell::AfterFirst };
        Self {
            client,
            wire,
            pings: h2.ping_pong(),
            h2,
            streams: FuturesUnordered::new(),
            seen,
            patience,
            phase: Phase::Open,
            farewell,
            cut: Cut::Untold,
            pulse: Pulse::default(),
            clocks: Clocks::default(),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.follow_mode();
        loop {
            while let Poll::Ready(Some(())) = self.streams.poll_next_unpin(cx) {}
            match self.h2.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, reply)))) => {
                    self.streams.push(Stream::new(&self.client, request, reply));
                    if self.farewell == Farewell::AfterFirst {
                        self.farewell = Farewell::Said;
                        self.leave();
                    }
                    continue;
                }
                Poll::Ready(Some(Err(error))) => {
                    if error.reason() == Some(Reason::ENHANCE_YOUR_CALM) && error.is_library() {
                        self.client.worker.counters.http2_floods.fetch_add(1, Relaxed);
                    }
                    tracing::debug!(%error, "a connection of HTTP/2 ended early");
                    return self.end(cx);
                }
                Poll::Ready(None) => return self.end(cx),
                Poll::Pending => {}
            }
            match self.seen.verdict() {
                Some(reason) if self.phase != Phase::Ended => self.stop(reason),
                _ => break,
            }
        }
        if self.wire.is_let_go() && self.phase != Phase::Ended {
            self.stop(Reason::NO_ERROR);
            cx.waker().wake_by_ref();
        }
        self.poll_clocks(cx)
    }

    /// Each stream that is open learns that its client is gone.
    fn end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Poll::Ready(Some(())) = self.streams.poll_next_unpin(cx) {}
        Poll::Ready(())
    }

    /// What a drain or a cut asks for.
    fn follow_mode(&mut self) {
        if self.client.worker.is_serving() {
            return;
        }
        if self.farewell == Farewell::Due {
            self.farewell = Farewell::Said;
            self.leave();
        }
        if self.cut == Cut::Untold && self.client.worker.cut().is_some() {
            self.cut = Cut::Told;
            self.streams.iter().for_each(Stream::wake);
        }
    }

    /// RFC 9113 §6.8: first GOAWAY with the highest id, and after a round trip with the real one.
    fn leave(&mut self) {
        if self.phase == Phase::Open {
            self.phase = Phase::Leaving;
            self.h2.graceful_shutdown();
        }
    }

    /// Ends all at once, saying why.
    fn stop(&mut self, reason: Reason) {
        if reason == Reason::ENHANCE_YOUR_CALM {
            self.client.worker.counters.http2_floods.fetch_add(1, Relaxed);
        }
        tracing::debug!(%reason, "a connection of HTTP/2 is ended");
        self.phase = Phase::Ended;
        self.h2.abrupt_shutdown(reason);
        self.clocks.farewell = Some(Instant::now() + LAST_WORDS);
    }

    fn poll_clocks(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            self.set_clocks();
            let Some(ring) = self.clocks.poll(cx) else { return Poll::Pending };
            match ring {
                Ring::Head => self.stop(Reason::ENHANCE_YOUR_CALM),
                Ring::Beat => {
                    if self.beat(cx) == Beat::Lost {
                        return Poll::Ready(());
                    }
                }
                Ring::Idle => self.leave(),
                // No pong, or a GOAWAY that is not taken.
                Ring::Farewell if self.phase == Phase::Ended => return Poll::Ready(()),
                Ring::Farewell => self.stop(Reason::NO_ERROR),
            }
            // What a clock began goes out with the next poll.
            cx.waker().wake_by_ref();
        }
    }

    /// Starts and ends the clocks that the present state asks for.
    fn set_clocks(&mut self) {
        let Self { clocks, patience, wire, .. } = self;
        let after = |patience: Duration| Instant::now() + patience;
        match (self.seen.watch.borrow().awaits_head(), &clocks.head) {
            (None, None) => {}
            (Some(head), Some((known, _))) if head == *known => {}
            (head, _) => clocks.head = head.map(|head| (head, after(patience.head))),
        }
        if self.streams.is_empty() {
            wire.rest(Instant::now());
            clocks.beat = None;
            match self.phase {
                Phase::Open => _ = clocks.idle.get_or_insert_with(|| after(patience.idle)),
                Phase::Leaving => _ = clocks.farewell.get_or_insert_with(|| after(patience.head)),
                Phase::Ended => {}
            }
        } else {
            wire.work();
            clocks.idle = None;
            if self.phase != Phase::Ended {
                clocks.farewell = None;
            }
            clocks.beat.get_or_insert_with(|| after(patience.write / STILL));
        }
    }

    /// Looks after readers that stall and clients that are gone without a word.
    fn beat(&mut self, cx: &mut Context<'_>) -> Beat {
        self.clocks.beat = None;
        self.streams.iter().for_each(Stream::look);
        let quiet_limit = (self.patience.idle.as_millis() / (self.patience.write / STILL).as_millis().max(1)) as u32;
        let read = self.seen.read();
        self.pulse.quiet = if read == self.pulse.read { self.pulse.quiet + 1 } else { 0 };
        self.pulse.read = read;
        if self.pulse.quiet >= quiet_limit + STILL {
            return Beat::Lost;
        }
        if self.pulse.quiet == quiet_limit
            && let Some(pings) = &mut self.pings
        {
            // The last answer has to be taken before another question.
            let _ = pings.poll_pong(cx);
            let _ = pings.send_ping(Ping::opaque());
        }
        Beat::Strong
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beat {
    Strong,
    /// Not even a ping was answered.
    Lost,
}

/// Which clock has run out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ring {
    Head,
    Beat,
    Idle,
    Farewell,
}

/// The deadlines of one connection, on one timer that is moved only when a nearer one comes.
#[derive(Debug, Default)]
struct Clocks {
    /// The head that is awaited, by its number, and until when.
    head: Option<(u64, Instant)>,
    beat: Option<Instant>,
    idle: Option<Instant>,
    farewell: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Clocks {
    fn nearest(&self) -> Option<(Instant, Ring)> {
        let head = self.head.map(|(_, at)| (at, Ring::Head));
        let beat = self.beat.map(|at| (at, Ring::Beat));
        let idle = self.idle.map(|at| (at, Ring::Idle));
        let farewell = self.farewell.map(|at| (at, Ring::Farewell));
        [head, beat, idle, farewell].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Option<Ring> {
        loop {
            let (at, ring) = self.nearest()?;
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
            if timer.deadline() > at {
                timer.as_mut().reset(at);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return None;
            }
            if timer.deadline() >= at {
                match ring {
                    Ring::Head => self.head = None,
                    Ring::Beat => self.beat = None,
                    Ring::Idle => self.idle = None,
                    Ring::Farewell => self.farewell = None,
                }
                self.timer = None;
                return Some(ring);
            }
            timer.as_mut().reset(at);
        }
    }
}
