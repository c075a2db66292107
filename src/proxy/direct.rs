//! A stream's answer on its way to a client of HTTP/1, without hyper.
//!
//! hyper holds 16 KiB of buffers a connection and an event passes through three of its layers; a stream
//! that lasts for minutes needs none of that. So when the head of a stream is known, its connection
//! leaves hyper ([`Leave`]), this file writes head and chunks, and hyper gets the connection back for the
//! next request. What the answer says is [`super::answer`]'s, here as there.

use std::future::poll_fn;
use std::io::{self, IoSlice, Write as _};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{CONNECTION, DATE};
use http::request::Parts;
use http::{Method, Response, Version};
use http_body::Body as _;
use hyper::rt::Write;

use super::answer::{Answer, Door, Interrupted};
use super::date;
use super::line::Line;
use super::tap::Tap;
use super::wire::Wire;

/// Whether an answer is written here or by hyper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    Yes,
    No,
}

impl Leave {
    /// Whether a stream may leave after this request: only where the connection goes on afterwards.
    pub fn after(request: &Parts) -> Self {
        let plain = request.version == Version::HTTP_11
            && request.method != Method::HEAD
            && !request.headers.contains_key(CONNECTION);
        if plain { Self::Yes } else { Self::No }
    }

    /// Only a stream is worth it, and only behind a request that is read to its end.
    pub fn with(self, response: &Response<Answer>) -> Self {
        if matches!(response.body(), Answer::Tunnel(_)) {
            return Self::Yes;
        }
        let goes_on = !response.headers().contains_key(CONNECTION);
        if goes_on && response.body().is_endless() { self } else { Self::No }
    }
}

/// Leaves the answer to whoever drives the connection. Never returns: the connection takes this future
/// out of hyper's hands, and with it hyper's buffers.
pub async fn leave(line: &Line, response: Response<Answer>) -> Response<Answer> {
    match line {
        Line::Http1(wire) => {
            wire.hand_over(response);
            std::future::pending().await
        }
        // Never is in hyper's hands.
        Line::Http2(_) => response,
    }
}

/// Why a stream did not come to its proper end.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    #[error(transparent)]
    Answer(#[from] Interrupted),
    #[error("the client does not take its answer: {0}")]
    Client(#[from] io::Error),
}

/// Writes the whole answer. After an error the connection must be closed: what the client has is no
/// complete answer, and must not look like one.
pub async fn write(tap: &mut Tap, wire: &Wire, response: Response<Answer>) -> Result<(), Broken> {
    let (head, mut answer) = begin(response);
    let mut out = Out { head, ..Out::default() };
    poll_fn(|cx| {
        wire.wakes(cx);
        loop {
            if out.takes_event() {
                // Nothing may overtake what is before it.
                let door = if out.head.is_empty() && wire.is_written() { Door::of(wire) } else { None };
                match answer.poll_piece(cx, door) {
                    Poll::Pending if out.is_out() && wire.is_written() => return Poll::Pending,
                    // The head goes alone, before an event that may be long in coming.
                    Poll::Pending => {}
                    Poll::Ready(None) => out.end(),
                    Poll::Ready(Some(piece)) => {
                        out.event(piece?, &answer);
                        if out.is_out() {
                            // Through the door.
                            continue;
                        }
                    }
                }
            }
            if out.poll(tap, cx)?.is_pending() || Pin::new(&mut *tap).poll_flush(cx)?.is_pending() {
                // A client that reads nothing may still have left, which no write would tell for long.
                ready!(wire.poll_left(cx));
                return Poll::Ready(Err(Interrupted::Left.into()));
            }
            if out.ends {
                return Poll::Ready(Ok(()));
            }
            out = Out::default();
        }
    })
    .await
}

fn begin(response: Response<Answer>) -> (Vec<u8>, Answer) {
    let (parts, answer) = response.into_parts();
    let mut head = head(&parts);
    head.extend_from_slice(b"transfer-encoding: chunked\r\n\r\n");
    (head, answer)
}

/// Status line and fields, without the empty line behind them.
pub fn head(parts: &http::response::Parts) -> Vec<u8> {
    let mut head = Vec::with_capacity(512);
    let status = parts.status;
    // Writing to a vector cannot fail.
    let _ = write!(head, "HTTP/1.1 {} {}\r\n", status.as_str(), status.canonical_reason().unwrap_or_default());
    for (name, value) in &parts.headers {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    if !parts.headers.contains_key(DATE) {
        head.extend_from_slice(b"date: ");
        head.extend_from_slice(date::now().as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    head
}

const LAST_CHUNK: &[u8] = b"0\r\n\r\n";
const CHUNK_END: &[u8] = b"\r\n";
const CHUNK_END_AND_LAST: &[u8] = b"\r\n0\r\n\r\n";

/// What is being written: at most the head, one chunk and the end. Kept only where the socket did not
/// take all of it.
#[derive(Debug, Default)]
struct Out {
    head: Vec<u8>,
    /// The chunk's size in hexadecimal, with its line end.
    size: SizeLine,
    data: Bytes,
    tail: &'static [u8],
    written: usize,
    ends: bool,
}

#[derive(Debug, Default)]
struct SizeLine {
    text: [u8; SIZE_LINE],
    /// Sixteen digits and the line end fit; what is used stands at the end.
    length: u8,
}

const SIZE_LINE: usize = 18;

impl SizeLine {
    /// By hand: one is written for each event.
    fn of(size: usize) -> Self {
        let mut text = [0; SIZE_LINE];
        text[SIZE_LINE - 2..].copy_from_slice(CHUNK_END);
        let (mut at, mut left) = (SIZE_LINE - 2, size);
        loop {
            at -= 1;
            text[at] = b"0123456789ABCDEF"[left % 16];
            left /= 16;
            if left == 0 {
                return Self { text, length: (SIZE_LINE - at) as u8 };
            }
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.text[SIZE_LINE - usize::from(self.length)..]
    }
}

impl Out {
    /// Nothing is on its way but maybe a head, which waits for its first event.
    fn takes_event(&self) -> bool {
        self.written == 0 && self.data.is_empty() && self.tail.is_empty()
    }

    fn event(&mut self, data: Bytes, answer: &Answer) {
        // An empty chunk would be the last one.
        if data.is_empty() {
            return;
        }
        self.size = SizeLine::of(data.len());
        self.data = data;
        self.tail = CHUNK_END;
        if answer.is_end_stream() {
            self.end();
        }
    }

    fn end(&mut self) {
        self.ends = true;
        self.tail = if self.data.is_empty() { LAST_CHUNK } else { CHUNK_END_AND_LAST };
    }

    fn parts(&self) -> [&[u8]; 4] {
        [&self.head, self.size.bytes(), &self.data, self.tail]
    }

    fn is_out(&self) -> bool {
        self.written == self.parts().iter().map(|part| part.len()).sum::<usize>()
    }

    /// Writes until all is out.
    fn poll(&mut self, tap: &mut Tap, cx: &mut Context<'_>) -> io::Result<Poll<()>> {
        while !self.is_out() {
            let mut skip = self.written;
            let slices = self.parts().map(|part| {
                let skipped = skip.min(part.len());
                skip -= skipped;
                IoSlice::new(&part[skipped..])
            });
            match Pin::new(&mut *tap).poll_write_vectored(cx, &slices) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => self.written += written?,
            }
        }
        Ok(Poll::Ready(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunks_size_is_written_as_http_wants_it() {
        for (size, line) in
            [(0, "0\r\n"), (1, "1\r\n"), (16, "10\r\n"), (255, "FF\r\n"), (usize::MAX, "FFFFFFFFFFFFFFFF\r\n")]
        {
            assert_eq!(SizeLine::of(size).bytes(), line.as_bytes());
        }
    }
}
