//! The engine's answer, byte for byte as it comes.
//!
//! It keeps the clock of an engine that is silent in mid-answer, and uses it to say keep-alive
//! comments between two events. It does not say how an answer ends that is not whole.

use std::fmt;
use std::future::Future as _;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::SizeHint;
use tokio::time::{Instant, Sleep, sleep_until};

use super::{Door, Interrupted, Next};
use crate::admission::Ticket;
use crate::proxy::call::Call;
use crate::proxy::error::{keep_alive, last_event};
use crate::proxy::sse::Scanner;
use crate::proxy::transport::socket::Socket;
use crate::proxy::upstream::decode::{Decoder, Framing};
use crate::proxy::upstream::head::Reuse;
use crate::proxy::wire::with_buffer;

/// After `data: [DONE]` nothing is owed; an engine that keeps the socket open longer than this keeps
/// no place.
const DONE_IDLE: Duration = Duration::from_secs(1);

/// How the answer is read by its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Events or lines, one by one, where one of our own may stand between them.
    Stream,
    Whole,
}

/// What a relay is made of.
#[derive(Debug)]
pub struct Source {
    pub engine: Rc<Socket>,
    pub address: SocketAddr,
    pub framing: Framing,
    pub reuse: Reuse,
    pub rest: Vec<u8>,
    pub shape: Shape,
    /// None: nothing is to be learnt from such a body.
    pub scanner: Option<Scanner>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Course {
    /// Bytes come, or will.
    Open,
    /// All was passed on.
    Complete,
    Broken,
}

pub struct Relay {
    call: Rc<Call>,
    /// Given back to the pool, or closed, as soon as nothing more is to be read from it.
    engine: Option<Rc<Socket>>,
    address: SocketAddr,
    framing: Framing,
    reuse: Reuse,
    rest: Vec<u8>,
    shape: Shape,
    decoder: Decoder,
    ticket: Option<Ticket>,
    course: Course,
    scanner: Option<Scanner>,
    /// When the engine last said something.
    heard: Instant,
    last_event: Option<Instant>,
    /// When the client was last told something.
    said: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("framing", &self.framing).field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// What a silence has come to.
enum Silence {
    /// The client should be told that it is still there.
    Long,
    TooLong,
}

impl Relay {
    pub fn new(call: Rc<Call>, source: Source, ticket: Ticket) -> Self {
        let Source { engine, address, framing, mut reuse, rest, shape, scanner } = source;
        let now = Instant::now();
        let decoder = Decoder::new(framing);
        if decoder.is_done() && !rest.is_empty() {
            // Bytes that nobody asked for.
            reuse = Reuse::No;
        }
        call.begin();
        let mut relay = Self {
            call,
            engine: Some(engine),
            address,
            framing,
            reuse,
            rest,
            shape,
            decoder,
            ticket: Some(ticket),
            course: Course::Open,
            scanner,
            heard: now,
            last_event: None,
            said: now,
            timer: None,
        };
        if relay.decoder.is_done() {
            relay.complete();
        }
        relay
    }

    pub fn call(&self) -> &Rc<Call> {
        &self.call
    }

    /// Whether it is read event by event.
    pub fn is_stream(&self) -> bool {
        self.shape == Shape::Stream
    }

    pub fn is_complete(&self) -> bool {
        self.course == Course::Complete
    }

    pub fn size_hint(&self) -> SizeHint {
        match self.framing {
            Framing::Length(length) => SizeHint::with_exact(length),
            Framing::Chunked | Framing::Close => SizeHint::default(),
        }
    }

    /// Its head is known to the client already, and does not bind it to a length.
    pub fn go_on_in_events(&mut self) {
        self.shape = Shape::Stream;
    }

    pub fn poll(&mut self, cx: &mut Context<'_>, door: Option<Door<'_>>) -> Poll<Next> {
        if self.course != Course::Open {
            return Poll::Ready(Next::End);
        }
        if let Some(reason) = self.call.worker().cut() {
            return Poll::Ready(self.break_off(Interrupted::Cut(reason)));
        }
        // Whether the client has left is asked where there is nothing to give it: a write tells as well.
        if let Poll::Ready(next) = self.poll_data(cx, door) {
            return Poll::Ready(next);
        }
        ready!(self.call.line().poll_left(cx));
        self.give_up();
        self.call.worker().counters.client_aborts.fetch_add(1, Relaxed);
        Poll::Ready(Next::Left)
    }

    fn poll_data(&mut self, cx: &mut Context<'_>, door: Option<Door<'_>>) -> Poll<Next> {
        if !self.rest.is_empty() {
            let mut rest = std::mem::take(&mut self.rest);
            match self.take(&mut rest, None) {
                Ok(Some(next)) => return Poll::Ready(next),
                Ok(None) => {}
                Err(why) => return Poll::Ready(self.break_off(why)),
            }
        }
        loop {
            if self.engine.is_none() {
                return Poll::Ready(Next::End);
            }
            let read = with_buffer(|buffer| {
                let Some(engine) = &self.engine else { return Poll::Pending };
                Poll::Ready(match ready!(engine.poll_read(cx, buffer)) {
                    Ok(0) => Ok(None),
                    Ok(read) => self.take(&mut buffer[..read], door).map(Some),
                    Err(error) => Err(Interrupted::Engine(error)),
                })
            });
            match read {
                Poll::Ready(Ok(Some(Some(next)))) => return Poll::Ready(next),
                Poll::Ready(Ok(Some(None))) => {}
                Poll::Ready(Ok(None)) if self.decoder.ends_with_connection() => {
                    self.reuse = Reuse::No;
                    self.complete();
                }
                Poll::Ready(Ok(None)) => {
                    let why = Interrupted::Engine(io::ErrorKind::UnexpectedEof.into());
                    return Poll::Ready(self.break_off(why));
                }
                Poll::Ready(Err(why)) => return Poll::Ready(self.break_off(why)),
                Poll::Pending => match ready!(self.poll_silence(cx)) {
                    Silence::Long => {
                        self.said = Instant::now();
                        return Poll::Ready(Next::Bytes(keep_alive(self.call.route.dialect).unwrap_or_default()));
                    }
                    Silence::TooLong if self.is_done() => {
                        self.reuse = Reuse::No;
                        self.complete();
                    }
                    Silence::TooLong => {
                        let why = Interrupted::Engine(io::ErrorKind::TimedOut.into());
                        return Poll::Ready(self.break_off(why));
                    }
                },
            }
        }
    }

    /// Bytes of a body, still framed, in `buffer`.
    fn take(&mut self, buffer: &mut [u8], door: Option<Door<'_>>) -> Result<Option<Next>, Interrupted> {
        if let Some(door) = door
            && let Some(payload) = self.decoder.one_chunk(buffer)
        {
            door.pass(buffer);
            self.observe(&buffer[payload]);
            return Ok(Some(Next::Passed));
        }
        let decoded = self
            .decoder
            .decode(buffer)
            .map_err(|malformed| Interrupted::Engine(io::Error::new(io::ErrorKind::InvalidData, malformed)))?;
        if decoded.surplus > 0 {
            self.reuse = Reuse::No;
        }
        let payload = &buffer[..decoded.payload];
        self.observe(payload);
        let next = (!payload.is_empty()).then(|| Next::Bytes(Bytes::copy_from_slice(payload)));
        if self.decoder.is_done() {
            self.complete();
        }
        Ok(next)
    }

    /// Counts what has come.
    fn observe(&mut self, payload: &[u8]) {
        let worker = self.call.worker();
        worker.counters.bytes_out.fetch_add(payload.len() as u64, Relaxed);
        self.heard = Instant::now();
        worker.counters.last_byte.store(worker.stamp(self.heard), Relaxed);
        if let Some(scanner) = &mut self.scanner {
            let events = scanner.scan(payload);
            if events > 0 {
                let series = worker.counters.told.series(self.call.label);
                match self.last_event.replace(self.heard) {
                    None => series.first(self.heard - self.call.arrived, events - 1),
                    Some(before) => series.later(self.heard - before, events - 1),
                }
            }
        }
    }

    /// The answer is whole: its place and its connection are free before the client has read it.
    fn complete(&mut self) {
        self.course = Course::Complete;
        self.tell();
        let worker = self.call.worker();
        worker.counters.served.fetch_add(1, Relaxed);
        self.ticket = None;
        if let Some(engine) = self.engine.take()
            && self.reuse == Reuse::Yes
        {
            worker.pool.keep(engine, self.address);
        }
    }

    /// Closes the engine's connection, which ends its work, and frees the place.
    fn give_up(&mut self) {
        self.course = Course::Broken;
        self.tell();
        self.ticket = None;
        self.engine = None;
    }

    /// Counts what the answer told until here.
    fn tell(&self) {
        let Some(scanner) = &self.scanner else { return };
        if scanner.events() > 0 || !scanner.facts().is_empty() {
            let series = self.call.worker().counters.told.series(self.call.label);
            series.over(scanner.facts(), scanner.events());
        }
    }

    /// What to do with an answer that will not be whole.
    fn break_off(&mut self, why: Interrupted) -> Next {
        self.give_up();
        let counters = &self.call.worker().counters;
        counters.interrupted.fetch_add(1, Relaxed);
        if matches!(why, Interrupted::Engine(_)) {
            counters.upstream_errors.fetch_add(1, Relaxed);
        }
        let event = match self.shape {
            Shape::Stream => last_event(self.call.route.dialect, &why.to_string()),
            Shape::Whole => Bytes::new(),
        };
        Next::Breaks(event, why)
    }

    /// Whether `data: [DONE]` was the last that came.
    fn is_done(&self) -> bool {
        self.scanner.as_ref().is_some_and(Scanner::is_done)
    }

    /// Whether a comment of our own may stand here: between two events, not behind the last one.
    fn takes_comments(&self) -> bool {
        self.shape == Shape::Stream
            && keep_alive(self.call.route.dialect).is_some()
            && self.scanner.as_ref().is_some_and(|scanner| scanner.is_between_events() && !scanner.is_done())
    }

    /// Ready when the engine has been silent for long. The timer is not moved for each event: it
    /// looks, when it fires, at when the last one came.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<Silence> {
        let worker = self.call.worker();
        let limit = if self.is_done() { DONE_IDLE } else { worker.engine_silence };
        let end = self.heard + limit;
        let comment = self.takes_comments().then(|| self.heard.max(self.said) + worker.shared.timings.keep_alive);
        let next = comment.map_or(end, |comment| comment.min(end));
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(next)));
        if timer.deadline() > next {
            timer.as_mut().reset(next);
        }
        loop {
            ready!(timer.as_mut().poll(cx));
            let now = Instant::now();
            if now >= end {
                return Poll::Ready(Silence::TooLong);
            }
            if comment.is_some_and(|comment| now >= comment) {
                return Poll::Ready(Silence::Long);
            }
            timer.as_mut().reset(next);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if self.course == Course::Open {
            self.tell();
            self.call.worker().counters.client_aborts.fetch_add(1, Relaxed);
        }
    }
}
