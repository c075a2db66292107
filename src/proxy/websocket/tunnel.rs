//! A WebSocket that is open: bytes both ways, until one side ends it or the proxy must.
//!
//! Each side's bytes are handed on in the poll in which they are read; what the other does not take at
//! once is kept, and nothing more is read before it is gone. So a tunnel holds one piece each way at
//! most, and nothing while it is quiet.

use std::fmt;
use std::future::{Future as _, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Response;
use tokio::time::{Instant, Sleep, sleep_until};

use super::frames::{Frames, Goodbye, Kind};
use crate::admission::Ticket;
use crate::proxy::answer::Answer;
use crate::proxy::call::Call;
use crate::proxy::direct;
use crate::proxy::transport::socket::Socket;
use crate::proxy::wire::{Wire, with_buffer};

/// How long a client may take to answer a goodbye that nobody waits for but the proxy.
const PARTING: Duration = Duration::from_secs(5);

/// What a 101 leaves behind for whoever drives the client's connection.
pub struct Tunnel {
    call: Rc<Call>,
    engine: Rc<Socket>,
    /// Bytes that came with the engine's head.
    rest: Vec<u8>,
    /// One place for all its life.
    ticket: Option<Ticket>,
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("call", &self.call).finish_non_exhaustive()
    }
}

impl Tunnel {
    pub fn new(call: Rc<Call>, engine: Rc<Socket>, rest: Vec<u8>, ticket: Ticket) -> Self {
        call.begin();
        let counters = &call.worker().counters;
        counters.websockets.fetch_add(1, Relaxed);
        counters.websockets_total.fetch_add(1, Relaxed);
        Self { call, engine, rest, ticket: Some(ticket) }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.call.worker().counters.websockets.fetch_sub(1, Relaxed);
        if let Some(ticket) = self.ticket.take() {
            // How long a session lasts says nothing about how fast requests are served.
            ticket.was_not_served();
        }
    }
}

/// How a tunnel ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Both sides said goodbye, or the one that was asked to.
    Closed,
    ClientLeft,
    EngineLost,
    /// One side has taken nothing for too long.
    Stalled,
    /// The proxy waits no longer.
    Cut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// To be said as soon as a frame ends.
    Due(Goodbye),
    /// What the engine still says is not passed on; the client's answer is.
    Said,
    /// Nothing is read any more; what is kept for the client still goes out.
    Leaving(End),
}

/// One direction.
#[derive(Debug, Default)]
struct Flow {
    frames: Frames,
    /// Read, and not taken by the other side.
    kept: Vec<u8>,
    written: usize,
    /// Since when nothing of it was taken.
    stalled: Option<Instant>,
    /// A closing frame has passed.
    closed: bool,
}

impl Flow {
    /// Ready once nothing is kept, here or by the socket.
    fn poll_out(
        &mut self,
        cx: &mut Context<'_>,
        mut write: impl FnMut(&mut Context<'_>, &[u8]) -> Poll<io::Result<usize>>,
        flush: impl FnOnce(&mut Context<'_>) -> Poll<io::Result<()>>,
    ) -> Poll<io::Result<()>> {
        while self.written < self.kept.len() {
            match write(cx, &self.kept[self.written..]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => {
                    self.written += written;
                    self.stalled = None;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    self.stalled.get_or_insert_with(Instant::now);
                    return Poll::Pending;
                }
            }
        }
        let flushed = flush(cx);
        if flushed.is_pending() {
            self.stalled.get_or_insert_with(Instant::now);
            return Poll::Pending;
        }
        (self.kept, self.written, self.stalled) = (Vec::new(), 0, None);
        flushed
    }

    /// Follows `bytes` to the end of the frame that passes if `to` says so, or to their own. Returns how
    /// many they are, and whether they belong to messages.
    fn follow(&mut self, bytes: &[u8], to: To) -> (usize, Heard) {
        let (mut at, mut heard) = (0, Heard::Heartbeat);
        while at < bytes.len() {
            at += self.frames.pass(&bytes[at..]);
            match self.frames.kind() {
                Kind::Data => heard = Heard::Message,
                Kind::Close if self.frames.is_between() => self.closed = true,
                Kind::Close | Kind::Ping => {}
            }
            if to == To::FrameEnd && self.frames.is_between() {
                break;
            }
        }
        (at, heard)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum To {
    FrameEnd,
    BytesEnd,
}

/// What passed: libraries exchange pings for ever, and they say nothing of who uses them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Message,
    Heartbeat,
}

/// Carries a WebSocket to its end. `response` is the 101; `unread` is what the client said behind its
/// request.
pub async fn carry(wire: &Wire, response: Response<Answer>, unread: Vec<u8>) {
    let (head, answer) = response.into_parts();
    let Answer::Tunnel(tunnel) = answer else { return };
    let mut head = direct::head(&head);
    head.extend_from_slice(b"\r\n");
    let mut carrying = Carrying::new(wire, &head, unread, *tunnel);
    let end = poll_fn(|cx| carrying.poll(cx)).await;
    carrying.count(end);
    // The engine's connection first: its work ends with it.
    drop(carrying);
    // As far as it goes at once: the connection ends either way.
    poll_fn(|cx| {
        let _ = wire.poll_shutdown(cx);
        Poll::Ready(())
    })
    .await;
}

struct Carrying<'a> {
    wire: &'a Wire,
    tunnel: Tunnel,
    /// To the client.
    down: Flow,
    /// To the engine.
    up: Flow,
    /// The engine takes nothing any more: what it says is still read.
    engine_deaf: bool,
    phase: Phase,
    /// When it is over, whoever still has something to say.
    limit: Option<Instant>,
    /// When a message, or a part of one, last passed.
    active: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<'a> Carrying<'a> {
    fn new(wire: &'a Wire, head: &[u8], unread: Vec<u8>, mut tunnel: Tunnel) -> Self {
        let rest = std::mem::take(&mut tunnel.rest);
        let (mut down, mut up) = (Flow::default(), Flow::default());
        down.follow(&rest, To::BytesEnd);
        up.follow(&unread, To::BytesEnd);
        down.kept = [head, &rest].concat();
        up.kept = unread;
        let active = Instant::now();
        Self { wire, tunnel, down, up, engine_deaf: false, phase: Phase::Open, limit: None, active, timer: None }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let worker = Rc::clone(self.tunnel.call.worker());
        loop {
            if worker.cut().is_some() {
                return Poll::Ready(End::Cut);
            }
            if self.phase == Phase::Open && !worker.is_serving() {
                // A client that ignores it has until the drain's end.
                self.phase = Phase::Due(Goodbye::Restart);
            }
            let (down, up) = (self.poll_down(cx), self.poll_up(cx));
            match (down, up) {
                (Poll::Ready(Err(end)), _) | (_, Poll::Ready(Err(end))) => return Poll::Ready(end),
                (Poll::Pending, Poll::Pending) => {}
                _ => continue,
            }
            match self.poll_clock(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(end)) => return Poll::Ready(end),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Something towards the client. Ready: there may be more.
    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let wire = self.wire;
        if !self.down.kept.is_empty() || !wire.is_written() {
            let out = self.down.poll_out(cx, |cx, bytes| wire.poll_write(cx, bytes), |cx| wire.poll_flush(cx));
            return out.map_err(|_| End::ClientLeft);
        }
        match self.phase {
            Phase::Leaving(end) => return Poll::Ready(Err(end)),
            Phase::Due(goodbye) if self.down.frames.is_between() => {
                self.down.kept = goodbye.frame();
                self.phase = Phase::Said;
                return Poll::Ready(Ok(()));
            }
            Phase::Open | Phase::Due(_) | Phase::Said => {}
        }
        let read = with_buffer(|buffer| {
            let read = match self.tunnel.engine.poll_read(cx, buffer) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(read) => read.unwrap_or(0),
            };
            let passed = match self.phase {
                Phase::Open => self.down.follow(&buffer[..read], To::BytesEnd),
                Phase::Due(_) => self.down.follow(&buffer[..read], To::FrameEnd),
                Phase::Said | Phase::Leaving(_) => (0, Heard::Heartbeat),
            };
            let out = match wire.poll_write(cx, &buffer[..passed.0]) {
                Poll::Ready(Ok(out)) => out,
                Poll::Ready(Err(_)) if passed.0 > 0 => return Poll::Ready(Err(End::ClientLeft)),
                Poll::Ready(Err(_)) | Poll::Pending => 0,
            };
            self.down.kept.extend_from_slice(&buffer[out..passed.0]);
            Poll::Ready(Ok((read, passed)))
        });
        let (read, (passed, heard)) = match read {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(read) => read?,
        };
        if read == 0 {
            return Poll::Ready(self.engine_ended());
        }
        let worker = self.tunnel.call.worker();
        worker.counters.bytes_out.fetch_add(passed as u64, Relaxed);
        if heard == Heard::Message {
            self.active = Instant::now();
            worker.counters.last_byte.store(worker.stamp(self.active), Relaxed);
        }
        Poll::Ready(Ok(()))
    }

    fn engine_ended(&mut self) -> Result<(), End> {
        if self.phase == Phase::Said || self.down.closed {
            return Err(End::Closed);
        }
        if self.down.frames.is_between() {
            self.down.kept = Goodbye::EngineLost.frame();
        }
        self.phase = Phase::Leaving(End::EngineLost);
        Ok(())
    }

    /// Something towards the engine. Ready: there may be more.
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        if matches!(self.phase, Phase::Leaving(_)) {
            return Poll::Pending;
        }
        let engine = &self.tunnel.engine;
        let waits = !self.up.kept.is_empty() || !engine.is_written();
        if waits && !self.engine_deaf {
            match self.up.poll_out(cx, |cx, bytes| engine.poll_write(cx, bytes), |cx| engine.poll_unwritten(cx)) {
                Poll::Ready(Ok(())) => return Poll::Ready(Ok(())),
                // What it said before it closed is still to be read.
                Poll::Ready(Err(_)) => self.engine_deaf = true,
                Poll::Pending => {}
            }
        }
        if waits || self.engine_deaf {
            // Nothing is read, so the client's end has to be watched for.
            return self.wire.poll_left(cx).map(|()| Err(End::ClientLeft));
        }
        if self.phase == Phase::Said && self.up.closed {
            return Poll::Ready(Err(End::Closed));
        }
        let read = with_buffer(|buffer| {
            let read = match self.wire.poll_read(cx, buffer) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(read) => read.unwrap_or(0),
            };
            let (_, heard) = self.up.follow(&buffer[..read], To::BytesEnd);
            let out = match engine.poll_write(cx, &buffer[..read]) {
                Poll::Ready(Ok(out)) => out,
                Poll::Ready(Err(_)) | Poll::Pending => 0,
            };
            self.up.kept.extend_from_slice(&buffer[out..read]);
            Poll::Ready((read, heard))
        });
        let (read, heard) = match read {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(read) => read,
        };
        if read == 0 {
            self.wire.end();
            return Poll::Ready(Err(if self.up.closed { End::Closed } else { End::ClientLeft }));
        }
        self.tunnel.call.worker().counters.bytes_in.fetch_add(read as u64, Relaxed);
        if heard == Heard::Message {
            self.active = Instant::now();
        }
        Poll::Ready(Ok(()))
    }

    /// Ready when something is to be done about the time that has passed.
    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let timings = &self.tunnel.call.worker().shared.timings;
        let idle = (self.phase == Phase::Open).then(|| self.active + timings.websocket_idle);
        let stalled = [self.down.stalled, self.up.stalled].into_iter().flatten().min();
        let stalled = stalled.map(|since| since + timings.client.write);
        let Some(next) = [idle, stalled, self.limit].into_iter().flatten().min() else { return Poll::Pending };
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(next)));
        if timer.deadline() > next {
            timer.as_mut().reset(next);
        }
        loop {
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            let due = |deadline: Option<Instant>| deadline.is_some_and(|deadline| now >= deadline);
            if due(stalled) {
                return Poll::Ready(Err(End::Stalled));
            }
            if due(self.limit) {
                return Poll::Ready(Err(End::Closed));
            }
            if due(idle) {
                self.phase = Phase::Due(Goodbye::Idle);
                self.limit = Some(now + PARTING);
                return Poll::Ready(Ok(()));
            }
            timer.as_mut().reset(next);
        }
    }

    fn count(&self, end: End) {
        let counters = &self.tunnel.call.worker().counters;
        match end {
            End::Closed => counters.served.fetch_add(1, Relaxed),
            End::ClientLeft => counters.client_aborts.fetch_add(1, Relaxed),
            End::EngineLost => {
                counters.upstream_errors.fetch_add(1, Relaxed);
                counters.interrupted.fetch_add(1, Relaxed)
            }
            End::Stalled | End::Cut => counters.interrupted.fetch_add(1, Relaxed),
        };
        tracing::debug!(?end, "a WebSocket is over");
    }
}
