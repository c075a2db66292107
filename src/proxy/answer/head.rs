//! Where an answer begins: the engine's head as the client gets it, and how its body is to be read.

use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use http::header::{CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Response};

use super::{Answer, Relay, Shape, Source};
use crate::admission::Ticket;
use crate::link::Upstream;
use crate::proxy::call::Call;
use crate::proxy::routes::Dialect;
use crate::proxy::sse::{Grammar, Scanner, Words};
use crate::proxy::upstream::decode::Framing;
use crate::proxy::upstream::exchange::{Answered, Sent};
use crate::proxy::upstream::head::Reuse;

const EVENT_STREAM: &str = "text/event-stream";
const LINES: &str = "application/x-ndjson";
const DOCUMENT: &str = "application/json";

/// The engine's answer, for the client.
pub fn relay(call: &Rc<Call>, answered: Answered, ticket: Ticket, upstream: &Upstream) -> Response<Answer> {
    let Answered { engine, head, rest, sent } = answered;
    let worker = call.worker();
    let mut response = Response::new(Answer::Own(None));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    let headers = response.headers_mut();
    if let Some(ahead) = ticket.waited_behind() {
        headers.insert("x-sglangd-queue-position", HeaderValue::from(ahead as u64 + 1));
    }
    if sent == Sent::Partly {
        // What the client still sends belongs to a request that is over.
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let Some(framing) = head.framing else {
        worker.counters.served.fetch_add(1, Relaxed);
        if head.reuse == Reuse::Yes && rest.is_empty() {
            worker.pool.keep(engine, upstream.addr);
        }
        return response;
    };
    let grammar = grammar(headers);
    let streams = matches!(grammar, Some(Grammar::Events | Grammar::Lines));
    if streams {
        headers.entry("x-accel-buffering").or_insert(HeaderValue::from_static("no"));
        headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache"));
    }
    let encoded = is_encoded(headers);
    // Within a length there is no room for an event that the engine did not count, and within an
    // encoding no plain text.
    let shape =
        if streams && !encoded && !matches!(framing, Framing::Length(_)) { Shape::Stream } else { Shape::Whole };
    let words = if call.route.dialect == Dialect::Lines { Words::Ollama } else { Words::Common };
    let scanner = grammar.filter(|_| !encoded).map(|grammar| Scanner::new(grammar, words));
    let source = Source { engine, address: upstream.addr, framing, reuse: head.reuse, rest, shape, scanner };
    *response.body_mut() = Answer::Engine(Box::new(Relay::new(Rc::clone(call), source, ticket)));
    response
}

/// The head of a stream that is begun before the engine answers: 200, since nothing else can be said.
pub fn early() -> Response<()> {
    let mut response = Response::new(());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Whether a body reads the same under [`early`]'s head.
pub fn goes_on_in_events(headers: &HeaderMap) -> bool {
    grammar(headers) == Some(Grammar::Events) && !is_encoded(headers)
}

fn is_encoded(headers: &HeaderMap) -> bool {
    headers.contains_key(CONTENT_ENCODING)
}

fn grammar(headers: &HeaderMap) -> Option<Grammar> {
    let kind = headers.get(CONTENT_TYPE)?.as_bytes();
    let is = |name: &str| kind.get(..name.len()).is_some_and(|head| head.eq_ignore_ascii_case(name.as_bytes()));
    [(EVENT_STREAM, Grammar::Events), (LINES, Grammar::Lines), (DOCUMENT, Grammar::Document)]
        .into_iter()
        .find_map(|(name, grammar)| is(name).then_some(grammar))
}
