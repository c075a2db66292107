//! What the fuzz targets of `fuzz/` call: each takes any bytes and panics where a promise is broken.
//!
//! Built for them alone (`cfg(fuzzing)`). The promises are also kept by property tests beside the code;
//! here they meet inputs that nobody thought of.
#![allow(clippy::expect_used)]

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::Future as _;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::server::conn::http1;
use hyper::service::service_fn;

use super::framing::{Checker, MAX_HEAD, Step};
use super::peek::{Peek, Stream, peek, stream_at_end};
use super::routes::{Decision, Table};
use super::sse::{Grammar, Scanner, Words};
use super::upstream::decode::{Decoder, Framing, Malformed};
use super::upstream::head as engine_head;
use super::websocket::frames::{Frames, Kind};

/// What the checker lets through, hyper takes for the same requests, or refuses: never for more of
/// them, and never with a longer body, which is how a request hides behind another.
pub fn framing(bytes: &[u8]) {
    let (passed, allowed) = passes(bytes);
    let seen = hyper_sees(&bytes[..passed]);
    assert!(seen.len() <= allowed.len(), "hyper sees {} requests, the checker {}", seen.len(), allowed.len());
    for (nth, (body, raw)) in seen.iter().zip(&allowed).enumerate() {
        assert!(body <= raw, "request {nth}: hyper reads {body} bytes of body where the checker passed {raw}");
    }
}

/// How many bytes pass, and how many raw bytes follow each head among them.
fn passes(bytes: &[u8]) -> (usize, Vec<usize>) {
    let mut checker = Checker::default();
    let (mut at, mut bodies) = (0, Vec::new());
    while at < bytes.len() {
        let new = checker.between_requests();
        match checker.step(&bytes[at..], usize::MAX) {
            Step::More | Step::Pass(0) | Step::Stop(_) => break,
            Step::Pass(n) => {
                assert!(at + n <= bytes.len(), "more passes than there is");
                match bodies.last_mut() {
                    Some(body) if !new => *body += n,
                    _ => bodies.push(0),
                }
                at += n;
            }
        }
    }
    (at, bodies)
}

/// The bodies' lengths of the requests that hyper takes out of these bytes.
fn hyper_sees(bytes: &[u8]) -> Vec<usize> {
    let seen: Rc<RefCell<Vec<usize>>> = Rc::default();
    let service = service_fn(|request: Request<Incoming>| {
        let seen = Rc::clone(&seen);
        async move {
            let nth = seen.borrow().len();
            seen.borrow_mut().push(0);
            let mut body = request.into_body();
            while let Some(Ok(frame)) = body.frame().await {
                seen.borrow_mut()[nth] += frame.data_ref().map_or(0, Bytes::len);
            }
            Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
        }
    });
    let mut builder = http1::Builder::new();
    builder.half_close(true).header_read_timeout(None).max_buf_size(MAX_HEAD + 1024);
    let mut connection = pin!(builder.serve_connection(Given(bytes), service));
    // Bytes are always there and writing always works: each poll gets on, or nothing ever will.
    for _ in 0..=bytes.len() + 16 {
        if connection.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
            break;
        }
    }
    seen.take()
}

/// A client that has said all this, has closed its side, and reads everything.
struct Given<'a>(&'a [u8]);

impl Read for Given<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, mut out: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let (now, later) = self.0.split_at(self.0.len().min(out.remaining()));
        out.put_slice(now);
        self.0 = later;
        Poll::Ready(Ok(()))
    }
}

impl Write for Given<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// An engine's head that is whole stays the same whatever follows it, and one that is not whole is not
/// taken for one.
pub fn head(bytes: &[u8]) {
    for method in [Method::POST, Method::HEAD] {
        let Ok(Some(head)) = engine_head::parse(bytes, &method) else { continue };
        assert!(head.length <= bytes.len(), "a head that is longer than the bytes");
        let alone = engine_head::parse(&bytes[..head.length], &method).expect("parsed before").expect("whole before");
        assert_eq!((alone.status, alone.framing, alone.reuse), (head.status, head.framing, head.reuse));
        assert_eq!(alone.headers, head.headers);
        let short = engine_head::parse(&bytes[..head.length - 1], &method);
        assert!(!matches!(short, Ok(Some(_))), "whole without its last byte");
    }
}

/// An engine's chunked body has one payload, however the bytes are cut; the first two bytes say where.
pub fn chunks(bytes: &[u8]) {
    let Some((&[first, second], bytes)) = bytes.split_first_chunk::<2>() else { return };
    let step = 1 + usize::from(first) % 64;
    let whole = decoded(bytes, bytes.len().max(1));
    assert_eq!(whole, decoded(bytes, step), "cut each {step} bytes");
    assert_eq!(whole, decoded(bytes, 1 + usize::from(second)), "cut each {} bytes", 1 + usize::from(second));
}

/// Payload, whether the body is complete, bytes behind it; or that it is no chunked body.
fn decoded(bytes: &[u8], step: usize) -> Result<(Vec<u8>, bool, usize), Malformed> {
    let mut decoder = Decoder::new(Framing::Chunked);
    let (mut payload, mut surplus) = (Vec::new(), 0);
    for piece in bytes.chunks(step) {
        let one = decoder.one_chunk(piece).map(|payload| &piece[payload]);
        let mut decoded = piece.to_vec();
        let found = decoder.decode(&mut decoded)?;
        if let Some(one) = one {
            assert_eq!((one, 0), (&decoded[..found.payload], found.surplus), "said to be one chunk");
            assert!(!decoder.is_done(), "a last chunk passed for one of many");
        }
        payload.extend_from_slice(&decoded[..found.payload]);
        surplus += found.surplus;
    }
    Ok((payload, decoder.is_done(), surplus))
}

/// What is known of a body before it is whole, a whole parser reads there too; no part of it says otherwise.
pub fn body(bytes: &[u8]) {
    let (whole, end) = (peek(bytes), stream_at_end(bytes));
    assert!(whole.sequences >= 1, "a request that computes nothing");
    let Ok(serde_json::Value::Object(read)) = serde_json::from_slice(bytes) else { return };
    let truth = match read.get("stream") {
        None | Some(serde_json::Value::Bool(false)) => Stream::No,
        Some(serde_json::Value::Bool(true)) => Stream::Yes,
        Some(_) => Stream::Unknown,
    };
    let agrees = |said: Stream| said == Stream::Unknown || said == truth;
    assert!(agrees(whole.stream) && agrees(end), "{whole:?} and {end:?} where it says {truth:?}");
    // A name that is said twice is seen in the whole, and not in a part.
    if whole != Peek::NOTHING {
        for cut in (0..bytes.len()).step_by(1 + bytes.len() / 256) {
            let (before, behind) = bytes.split_at(cut);
            assert!(agrees(peek(before).stream), "its first {cut} bytes say otherwise than {truth:?}");
            assert!(agrees(stream_at_end(behind)), "behind {cut} bytes it says otherwise than {truth:?}");
        }
    }
}

/// A path that reaches the engine means the same to every reader of it.
pub fn routes(bytes: &[u8]) {
    let Ok(path) = std::str::from_utf8(bytes) else { return };
    let (Decision::Engine(_), _) = Table::default().decide(path) else { return };
    assert!(path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic()), "{path:?}");
    assert!(!path.contains("//") && !path.contains(['\\', ';', '?', '#']), "{path:?}");
    let decoded = path.to_ascii_lowercase().replace("%2e", ".").replace("%2f", "/").replace("%5c", "\\");
    assert!(!decoded.split(['/', '\\']).any(|segment| segment == "." || segment == ".."), "{path:?}");
    assert_eq!(decoded, path.to_ascii_lowercase(), "something was hidden: {path:?}");
}

/// A stream's events are the same, however its bytes are cut; the first two bytes say where.
pub fn events(bytes: &[u8]) {
    let Some((&[first, second], bytes)) = bytes.split_first_chunk::<2>() else { return };
    for grammar in [Grammar::Events, Grammar::Lines] {
        let whole = scanned(grammar, bytes, bytes.len().max(1));
        for step in [1, 1 + usize::from(first) % 64, 1 + usize::from(second)] {
            assert_eq!(whole, scanned(grammar, bytes, step), "cut each {step} bytes");
        }
    }
    for words in [Words::Common, Words::Ollama] {
        Scanner::new(Grammar::Document, words).scan(bytes);
    }
}

/// How many events, whether one of ours may follow, and whether the stream said that it is done.
fn scanned(grammar: Grammar, bytes: &[u8], step: usize) -> (u64, bool, bool) {
    let mut scanner = Scanner::new(grammar, Words::Common);
    let events = bytes.chunks(step).map(|piece| scanner.scan(piece)).sum();
    assert_eq!(events, scanner.events());
    (events, scanner.is_between_events(), scanner.is_done())
}

/// A WebSocket's frames end at the same bytes, however they are cut; the first byte says where.
pub fn frames(bytes: &[u8]) {
    let Some((&first, bytes)) = bytes.split_first() else { return };
    let whole = frame_ends(bytes, bytes.len().max(1));
    assert_eq!(whole, frame_ends(bytes, 1), "cut at each byte");
    assert_eq!(whole, frame_ends(bytes, 1 + usize::from(first)), "cut each {} bytes", 1 + usize::from(first));
}

fn frame_ends(bytes: &[u8], step: usize) -> Vec<(usize, Kind)> {
    let (mut frames, mut found, mut at) = (Frames::default(), Vec::new(), 0);
    for piece in bytes.chunks(step) {
        let end = at + piece.len();
        while at < end {
            let passed = frames.pass(&bytes[at..end]);
            assert!(passed > 0, "no progress");
            at += passed;
            if frames.is_between() {
                found.push((at, frames.kind()));
            }
        }
    }
    found
}
