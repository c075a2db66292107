//! The client's socket as hyper sees it: every byte that comes in has passed the framing checker.
//!
//! Bytes are never changed; a request that must not pass is replaced, whole, by a marker that the
//! service answers with the refusal. It also keeps the clocks that hyper does not tell about: of a
//! head that does not come, and of a reader that has stopped reading. It does not parse HTTP:
//! [`super::framing`] and hyper do. A connection that begins with HTTP/2's preface ends here, for
//! hyper, and is handed over by [`Wire::begin_http2`].

use std::borrow::Cow;
use std::fmt;
use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::rt::{Read, ReadBufCursor, Write};
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::framing::{Checker, MAX_HEAD, MAX_LINE, Step, Violation};
use super::http2::{Opening, opening};
use super::transport::arrival::TLS_RECORD;
use super::transport::counts::Turned;
use super::wire::{READ_BUFFER, Wire, with_buffer};

/// What hyper gets in place of a request that must not pass; the service never takes it for one,
/// since [`Wire::refusal`] is set.
const MARKER: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";
/// Ends a chunked body with an error in every state of hyper's decoder.
const BREAK: &[u8] = b"\n\r\0";

/// How patient the proxy is with a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// From a connection's acceptance to its first byte of HTTP, where something comes before that.
    pub handshake: Duration,
    /// From a head's first byte to its last.
    pub head: Duration,
    /// Between two requests on one connection.
    pub idle: Duration,
    /// Between two pieces of a request's body.
    pub body: Duration,
    /// A reader that takes nothing for this long is cut.
    pub write: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            head: Duration::from_secs(10),
            idle: Duration::from_secs(75),
            body: Duration::from_mins(1),
            write: Duration::from_mins(1),
        }
    }
}

/// The I/O under hyper's server.
pub struct Tap {
    wire: Rc<Wire>,
    patience: Patience,
    checker: Checker,
    /// Read, but not yet hyper's: a head that is not whole, or the next request.
    held: Vec<u8>,
    /// Since when a head is awaited, or its rest.
    head_timer: Option<Pin<Box<Sleep>>>,
    waiting: Waiting,
    news: News,
    write_timer: Option<Pin<Box<Sleep>>>,
    preface: Preface,
    stopped: Stopped,
}

/// Whether the connection may turn out to be HTTP/2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preface {
    /// Its first bytes will tell.
    Possible,
    /// It is HTTP/1, or nothing else is spoken here.
    Excluded,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    No,
    ForFirstByte,
    ForHead,
}

/// Whether the bytes that came last can change what the checker says of a head that is not whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum News {
    None,
    Some,
}

/// A head is judged again when a line ends or a limit is passed, not for each byte of a client that
/// sends them one by one: that would cost the square of its length.
fn news(before: usize, bytes: &[u8]) -> News {
    let after = before + bytes.len();
    let passed = |limit: usize| before <= limit && limit < after;
    if bytes.contains(&b'\n') || passed(MAX_LINE) || passed(MAX_HEAD) { News::Some } else { News::None }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stopped {
    No,
    /// Nothing more passes: the connection ends with the refusal.
    Yes,
    /// Nothing more passes: the connection goes on as HTTP/2.
    Turned,
}

impl fmt::Debug for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tap").field("wire", &self.wire).field("checker", &self.checker).finish_non_exhaustive()
    }
}

impl Tap {
    pub fn new(wire: Rc<Wire>, patience: Patience, preface: Preface) -> Self {
        Self {
            wire,
            patience,
            checker: Checker::default(),
            held: Vec::new(),
            head_timer: None,
            waiting: Waiting::No,
            news: News::None,
            write_timer: None,
            preface,
            stopped: Stopped::No,
        }
    }

    /// Looks at the first bytes of the connection, which are held until it is known what they are.
    fn open(&mut self, bytes: &[u8]) -> Opening {
        let held = std::mem::take(&mut self.held);
        // Nearly always nothing is held: nothing is copied for HTTP/1.
        let whole = if held.is_empty() { Cow::Borrowed(bytes) } else { Cow::Owned([&held, bytes].concat()) };
        let opening = opening(&whole);
        match opening {
            Opening::Open => self.held = whole.into_owned(),
            Opening::Http2 => {
                self.wire.begin_http2(whole.into_owned());
                self.stopped = Stopped::Turned;
            }
            Opening::Other => {
                self.preface = Preface::Excluded;
                self.held = held;
            }
        }
        opening
    }

    /// Whether all that was read belongs to requests that are over.
    pub fn is_between_requests(&self) -> bool {
        self.checker.between_requests() && self.stopped == Stopped::No
    }

    /// What was read and is nobody's yet. Nothing is checked from here on.
    pub fn into_unread(self) -> Vec<u8> {
        self.held
    }

    /// Whether nothing has ever come.
    fn is_fresh(&self) -> bool {
        self.held.is_empty() && self.checker.between_requests() && !self.wire.was_asked()
    }

    /// Passes what may pass of `bytes`. Returns how many are dealt with and whether hyper got any.
    fn pass(&mut self, bytes: &[u8], out: &mut ReadBufCursor<'_>) -> (usize, Passed) {
        let mut done = 0;
        let mut passed = Passed::Nothing;
        while done < bytes.len() {
            // One request at a time: the next one's bytes wait here until hyper asks again.
            if passed == Passed::Some && self.checker.between_requests() {
                break;
            }
            match self.checker.step(&bytes[done..], out.remaining()) {
                Step::More | Step::Pass(0) => break,
                Step::Pass(n) => {
                    out.put_slice(&bytes[done..done + n]);
                    done += n;
                    passed = Passed::Some;
                }
                Step::Stop(violation) => {
                    // Behind a request that hyper is just getting: next time.
                    if passed == Passed::Some && !self.checker.in_body() {
                        break;
                    }
                    if self.refuse(violation, out) == Passed::Some {
                        passed = Passed::Some;
                        done = bytes.len();
                    }
                    break;
                }
            }
        }
        (done, passed)
    }

    /// Puts the marker in the request's place.
    fn refuse(&mut self, violation: Violation, out: &mut ReadBufCursor<'_>) -> Passed {
        let marker = if self.checker.in_body() { BREAK } else { MARKER };
        if out.remaining() < marker.len() {
            return Passed::Nothing;
        }
        self.wire.refuse(violation);
        self.stopped = Stopped::Yes;
        out.put_slice(marker);
        Passed::Some
    }

    /// Reads of a body with a length straight to where hyper wants it: nothing in it is judged, so its bytes need
    /// not pass through the worker's buffer. None: it is not the time for that.
    fn poll_body(&mut self, cx: &mut Context<'_>, out: &mut ReadBufCursor<'_>) -> Option<Poll<io::Result<()>>> {
        let left = self.checker.left_of_body()?;
        if !self.held.is_empty() || out.remaining() == 0 {
            return None;
        }
        // Never beyond the body's end: what stands there is judged.
        let most = usize::try_from(left).map_or(out.remaining(), |left| left.min(out.remaining()));
        let read = match self.wire.in_clear()?.poll_receive(cx, out, most) {
            Poll::Pending => return Some(Poll::Pending),
            Poll::Ready(Err(error)) => return Some(Poll::Ready(Err(error))),
            Poll::Ready(Ok(read)) => read,
        };
        if read == 0 {
            self.wire.end();
        }
        self.checker.passed_of_body(read);
        Some(Poll::Ready(Ok(())))
    }

    /// Starts, keeps or ends the clock of a head. Ready when it has run out.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<Waiting> {
        let now = match (self.checker.between_requests(), self.held.is_empty()) {
            (false, _) => Waiting::No,
            (true, true) => Waiting::ForFirstByte,
            (true, false) => Waiting::ForHead,
        };
        if now != self.waiting {
            self.waiting = now;
            let patience = match now {
                Waiting::No => return Poll::Pending,
                Waiting::ForFirstByte => self.patience.idle,
                Waiting::ForHead => self.patience.head,
            };
            let since = Instant::now();
            self.wire.rest(since);
            let deadline = since + patience;
            match &mut self.head_timer {
                Some(timer) => timer.as_mut().reset(deadline),
                None => self.head_timer = Some(Box::pin(sleep_until(deadline))),
            }
        }
        match &mut self.head_timer {
            Some(timer) if now != Waiting::No => {
                ready!(timer.as_mut().poll(cx));
                Poll::Ready(now)
            }
            _ => Poll::Pending,
        }
    }

    /// A write went through or not: keeps the clock of a reader that stalls.
    fn poll_stall<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.write_timer = None;
            return written;
        }
        let patience = self.patience.write;
        let timer = self.write_timer.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passed {
    Some,
    Nothing,
}

impl Read for Tap {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, mut out: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match this.stopped {
                Stopped::No => {}
                // What else comes is not read: the connection closes behind the refusal.
                Stopped::Yes => return Poll::Pending,
                Stopped::Turned => return Poll::Ready(Ok(())),
            }
            ready!(this.wire.poll_wanted(cx));
            let judged = this.preface == Preface::Excluded;
            if judged && !this.held.is_empty() && (this.news == News::Some || this.waiting != Waiting::ForHead) {
                this.news = News::None;
                let held = std::mem::take(&mut this.held);
                let (done, passed) = this.pass(&held, &mut out);
                this.held = held;
                this.held.drain(..done);
                if this.held.is_empty() {
                    this.held = Vec::new();
                }
                if passed == Passed::Some {
                    this.waiting = Waiting::No;
                    this.wire.work();
                    return Poll::Ready(Ok(()));
                }
            }
            if let Some(read) = this.poll_body(cx, &mut out) {
                return read;
            }
            let room = if this.checker.between_requests() { READ_BUFFER } else { out.remaining() };
            let read = with_buffer(|buffer| {
                let room = room.min(buffer.len());
                let buffer = &mut buffer[..room];
                let Poll::Ready(read) = this.wire.poll_read(cx, buffer)? else {
                    return Poll::Pending;
                };
                let bytes = &buffer[..read];
                let mut late = News::None;
                if this.preface == Preface::Possible && read > 0 {
                    match this.open(bytes) {
                        Opening::Open => return Poll::Ready(Ok(None)),
                        Opening::Http2 => return Poll::Ready(Ok(Some(()))),
                        Opening::Other => late = News::Some,
                    }
                }
                if read == 0 {
                    this.wire.end();
                } else if bytes[0] == TLS_RECORD && this.is_fresh() {
                    // A clear 400 would be noise to who expects TLS: closed, and said in the log.
                    this.wire.turn_away(Turned::TlsToPlain);
                    return Poll::Ready(Ok(Some(())));
                } else if this.held.is_empty() {
                    let (done, passed) = this.pass(bytes, &mut out);
                    this.held.extend_from_slice(&bytes[done..]);
                    if passed == Passed::Some {
                        return Poll::Ready(Ok::<_, io::Error>(Some(())));
                    }
                    this.news = News::None;
                } else {
                    let before = this.held.len();
                    this.held.extend_from_slice(bytes);
                    // What was held for the preface has not been judged at all.
                    this.news = if late == News::Some { late } else { news(before, bytes) };
                }
                Poll::Ready(Ok(if read == 0 { Some(()) } else { None }))
            });
            match read? {
                Poll::Ready(Some(())) => {
                    this.waiting = Waiting::No;
                    this.wire.work();
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(None) => {}
                Poll::Pending => {
                    return match ready!(this.poll_patience(cx)) {
                        // hyper takes the end of the stream between two requests for what it is.
                        Waiting::No | Waiting::ForFirstByte => Poll::Ready(Ok(())),
                        Waiting::ForHead => {
                            this.refuse(Violation::SLOW_HEAD, &mut out);
                            Poll::Ready(Ok(()))
                        }
                    };
                }
            }
        }
    }
}

impl Write for Tap {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = this.wire.poll_write(cx, bytes);
        this.poll_stall(cx, written)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper asks for this when its own buffer is empty.
        let this = self.get_mut();
        let flushed = this.wire.poll_flush(cx);
        this.poll_stall(cx, flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.stopped == Stopped::Turned {
            return Poll::Ready(Ok(()));
        }
        let shut = this.wire.poll_shutdown(cx);
        this.poll_stall(cx, shut)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = this.wire.poll_write_vectored(cx, slices);
        this.poll_stall(cx, written)
    }
}

#[cfg(test)]
mod tests;
