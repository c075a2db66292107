//! An answer's body on its way to the client: ours in one piece, or the engine's as it comes.
//!
//! Bytes are handed on in the poll in which they are read and kept nowhere. An answer whose engine
//! dies, or that is cut, ends in one error event where it is a stream, and always abnormally: hyper
//! sees an error after the event is out, so the last chunk and `[DONE]` never come and a cut answer
//! cannot look complete.

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
use http_body::{Body, Frame, SizeHint};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

use super::error::last_event;
use super::line::Line;
use super::routes::Dialect;
use super::upstream::decode::{Decoder, Framing};
use super::upstream::head::Reuse;
use super::wire::{poll_read_once, with_buffer};
use super::worker::Worker;
use crate::admission::Ticket;

/// After `data: [DONE]` nothing is owed; an engine that keeps the socket open longer than this keeps
/// no place.
const DONE_IDLE: Duration = Duration::from_secs(1);
const DONE: &[u8] = b"data: [DONE]";

/// Why hyper is told to break the connection.
#[derive(Debug, thiserror::Error)]
pub enum Interrupted {
    #[error("the client has left")]
    Left,
    #[error("the engine's answer broke off: {0}")]
    Engine(io::Error),
    #[error("the answer was cut: {0}")]
    Cut(String),
}

/// How the answer is read by its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Events or lines, one by one.
    Stream,
    Whole,
}

/// The body of any answer.
#[derive(Debug)]
pub enum Answer {
    Own(Option<Bytes>),
    Engine(Box<Relay>),
}

/// What a relay is made of.
#[derive(Debug)]
pub struct Source {
    pub engine: SocketAddr,
    pub framing: Framing,
    pub reuse: Reuse,
    pub rest: Vec<u8>,
    pub shape: Shape,
    pub dialect: Dialect,
}

enum Ending {
    /// Bytes come, or will.
    Open,
    /// The last event was handed to hyper; once it is out (or the client is too slow) the connection
    /// breaks.
    Saying {
        since_flush: u64,
        why: Interrupted,
    },
    /// All was passed on.
    Complete,
    Broken,
}

/// The engine's answer.
pub struct Relay {
    worker: Rc<Worker>,
    line: Line,
    source: Source,
    /// Given back to the pool, or closed, as soon as nothing more is to be read from it.
    stream: Option<TcpStream>,
    decoder: Decoder,
    ticket: Option<Ticket>,
    ending: Ending,
    tail: Tail,
    heard: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("source", &self.source).finish_non_exhaustive()
    }
}

impl Relay {
    pub fn new(worker: Rc<Worker>, line: Line, stream: TcpStream, source: Source, ticket: Ticket) -> Self {
        let decoder = Decoder::new(source.framing);
        let mut relay = Self {
            worker,
            line,
            source,
            stream: Some(stream),
            decoder,
            ticket: Some(ticket),
            ending: Ending::Open,
            tail: Tail::default(),
            heard: Instant::now(),
            timer: None,
        };
        relay.worker.counters.open_answers.fetch_add(1, Relaxed);
        if relay.decoder.is_done() {
            relay.complete();
        }
        relay
    }

    /// Bytes of a body, still framed, in `buffer`.
    fn take(&mut self, buffer: &mut [u8]) -> Result<Option<Bytes>, Interrupted> {
        let decoded = self
            .decoder
            .decode(buffer)
            .map_err(|malformed| Interrupted::Engine(io::Error::new(io::ErrorKind::InvalidData, malformed)))?;
        if decoded.surplus > 0 {
            self.source.reuse = Reuse::No;
        }
        let payload = &buffer[..decoded.payload];
        if self.source.shape == Shape::Stream {
            self.tail.push(payload);
        }
        let counters = &self.worker.counters;
        counters.bytes_out.fetch_add(payload.len() as u64, Relaxed);
        self.heard = Instant::now();
        counters.last_byte.store(self.worker.stamp(self.heard), Relaxed);
        let bytes = (!payload.is_empty()).then(|| Bytes::copy_from_slice(payload));
        if self.decoder.is_done() {
            self.complete();
        }
        Ok(bytes)
    }

    /// The answer is whole: its place and its connection are free before the client has read it.
    fn complete(&mut self) {
        self.ending = Ending::Complete;
        self.worker.counters.served.fetch_add(1, Relaxed);
        self.ticket = None;
        if let Some(stream) = self.stream.take()
            && self.source.reuse == Reuse::Yes
        {
            self.worker.pool.keep(stream, self.source.engine);
        }
    }

    /// What to do with an answer that will not be whole.
    fn break_off(&mut self, why: Interrupted) -> Poll<Option<Result<Frame<Bytes>, Interrupted>>> {
        self.ticket = None;
        self.stream = None;
        let counters = &self.worker.counters;
        counters.interrupted.fetch_add(1, Relaxed);
        if matches!(why, Interrupted::Engine(_)) {
            counters.upstream_errors.fetch_add(1, Relaxed);
        }
        let event = match self.source.shape {
            Shape::Stream => last_event(self.source.dialect, &why.to_string()),
            Shape::Whole => Bytes::new(),
        };
        self.ending = Ending::Saying { since_flush: self.line.flushes(), why };
        if event.is_empty() { Poll::Pending } else { Poll::Ready(Some(Ok(Frame::data(event)))) }
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Interrupted>>> {
        if !self.source.rest.is_empty() {
            let mut rest = std::mem::take(&mut self.source.rest);
            match self.take(&mut rest) {
                Ok(Some(bytes)) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Ok(None) => {}
                Err(why) => return self.break_off(why),
            }
        }
        loop {
            if self.stream.is_none() {
                return Poll::Ready(None);
            }
            let read = with_buffer(|buffer| {
                let Some(stream) = &self.stream else { return Poll::Pending };
                Poll::Ready(match ready!(poll_read_once(stream, cx, buffer)) {
                    Ok(0) => Ok(None),
                    Ok(read) => self.take(&mut buffer[..read]).map(Some),
                    Err(error) => Err(Interrupted::Engine(error)),
                })
            });
            match read {
                Poll::Ready(Ok(Some(Some(bytes)))) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Poll::Ready(Ok(Some(None))) => {}
                Poll::Ready(Ok(None)) if self.decoder.ends_with_connection() => {
                    self.source.reuse = Reuse::No;
                    self.complete();
                }
                Poll::Ready(Ok(None)) => {
                    return self.break_off(Interrupted::Engine(io::ErrorKind::UnexpectedEof.into()));
                }
                Poll::Ready(Err(why)) => return self.break_off(why),
                Poll::Pending => {
                    ready!(self.poll_silence(cx));
                    if self.tail.is_done() {
                        self.source.reuse = Reuse::No;
                        self.complete();
                        continue;
                    }
                    return self.break_off(Interrupted::Engine(io::ErrorKind::TimedOut.into()));
                }
            }
        }
    }

    /// Ready when the engine has been silent for too long. The timer is not moved for each event: it
    /// looks, when it fires, at when the last one came.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let limit = if self.tail.is_done() { DONE_IDLE } else { self.worker.engine_silence };
        loop {
            let deadline = self.heard + limit;
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
            if timer.deadline() > deadline {
                timer.as_mut().reset(deadline);
            }
            ready!(timer.as_mut().poll(cx));
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline);
        }
    }
}

/// How long the last event may take to reach a slow reader.
const LAST_WORDS: Duration = Duration::from_secs(5);

impl Answer {
    /// Whether it comes piece by piece, to an end that nobody knows.
    pub fn is_endless(&self) -> bool {
        matches!(self, Self::Engine(relay) if relay.source.shape == Shape::Stream)
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Interrupted;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Interrupted>>> {
        let relay = match self.get_mut() {
            Self::Own(body) => return Poll::Ready(body.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Engine(relay) => relay,
        };
        match &relay.ending {
            Ending::Complete | Ending::Broken => return Poll::Ready(None),
            Ending::Saying { since_flush, .. } => {
                let since_flush = *since_flush;
                if relay.line.poll_flushed(cx, since_flush).is_pending() {
                    let timer = relay.timer.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + LAST_WORDS)));
                    ready!(timer.as_mut().poll(cx));
                }
                return match std::mem::replace(&mut relay.ending, Ending::Broken) {
                    Ending::Saying { why, .. } => Poll::Ready(Some(Err(why))),
                    _ => Poll::Ready(None),
                };
            }
            Ending::Open => {}
        }
        if relay.line.poll_left(cx).is_ready() {
            relay.ending = Ending::Broken;
            relay.ticket = None;
            relay.stream = None;
            relay.worker.counters.client_aborts.fetch_add(1, Relaxed);
            return Poll::Ready(Some(Err(Interrupted::Left)));
        }
        let outcome = match relay.worker.cut() {
            Some(reason) => relay.break_off(Interrupted::Cut(reason)),
            None => relay.poll_data(cx),
        };
        if matches!(relay.ending, Ending::Saying { .. }) {
            relay.timer = Some(Box::pin(sleep_until(Instant::now() + LAST_WORDS)));
            if outcome.is_pending() {
                // Nothing to say, but what was said before must be out first.
                cx.waker().wake_by_ref();
            }
        }
        outcome
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(body) => body.is_none(),
            Self::Engine(relay) => matches!(relay.ending, Ending::Complete) && relay.source.rest.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(body) => SizeHint::with_exact(body.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Engine(relay) => match relay.source.framing {
                Framing::Length(length) => SizeHint::with_exact(length),
                Framing::Chunked | Framing::Close => SizeHint::default(),
            },
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Self::Engine(relay) = self {
            relay.worker.counters.open_answers.fetch_sub(1, Relaxed);
            if matches!(relay.ending, Ending::Open) {
                relay.worker.counters.client_aborts.fetch_add(1, Relaxed);
            }
        }
    }
}

/// The last bytes of a stream: enough to see `data: [DONE]` over any split.
#[derive(Debug, Default)]
struct Tail {
    bytes: Vec<u8>,
}

/// `data: [DONE]` and the line ends that may follow it.
const TAIL: usize = DONE.len() + 4;

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        if bytes.len() >= TAIL {
            self.bytes.clear();
            self.bytes.extend_from_slice(&bytes[bytes.len() - TAIL..]);
        } else {
            self.bytes.extend_from_slice(bytes);
            let surplus = self.bytes.len().saturating_sub(TAIL);
            self.bytes.drain(..surplus);
        }
    }

    fn is_done(&self) -> bool {
        self.bytes.trim_ascii_end().ends_with(DONE)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn done_is_seen_over_any_split(cuts in proptest::collection::vec(1usize..20, 0..12), crlf in any::<bool>()) {
            let text = if crlf { "data: {}\r\n\r\ndata: [DONE]\r\n\r\n" } else { "data: {}\n\ndata: [DONE]\n\n" };
            let mut tail = Tail::default();
            let mut rest = text.as_bytes();
            for cut in cuts {
                let (piece, behind) = rest.split_at(cut.min(rest.len()));
                tail.push(piece);
                rest = behind;
            }
            tail.push(rest);
            prop_assert!(tail.is_done());
            tail.push(b"data: more\n\n");
            prop_assert!(!tail.is_done());
        }
    }
}
