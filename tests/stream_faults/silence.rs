//! D05: a stream whose client waits for long is told that it is still there, and how it ends then.

use std::sync::mpsc::Sender;
use std::time::Duration;

use sglangd::link::ProxySettings;
use sglangd::proxy::Timings;

use super::{CHAT, stepped};
use crate::harness::client::{Answer, Client, End, post, post_with};
use crate::harness::engine::{EVENTS, Engine, LAST, chunk, json};
use crate::harness::front::{Front, eventually, settings};

const COMMENT: &str = ": keep-alive\n\n";
const PING: &str = "event: ping\ndata: {\"type\": \"ping\"}\n\n";
const STREAM: &str = "{\"stream\":true}";

/// What the proxy says in place of each 15 s here.
const INTERVAL: Duration = Duration::from_millis(60);

fn timings() -> Timings {
    Timings { keep_alive: INTERVAL, ..Timings::default() }
}

fn front(engine: &Engine) -> Front {
    Front::with(engine, settings(), timings())
}

/// An engine that answers each request with these bytes, once the test says so.
fn answering_late(answer: impl AsRef<[u8]> + Send + Sync + 'static) -> (Engine, Sender<()>) {
    stepped(move |connection, gate| {
        while connection.request().is_some() {
            if gate.recv().is_err() {
                return;
            }
            connection.send(&answer);
        }
    })
}

fn stream() -> Vec<u8> {
    [EVENTS.as_bytes(), &chunk("data: one\n\n"), &chunk("data: [DONE]\n\n"), LAST].concat()
}

/// The body without the words of waiting it must begin with, of which there are at least two.
fn behind<'a>(text: &'a str, word: &str) -> &'a str {
    let rest = text.trim_start_matches(word);
    assert!(text.len() - rest.len() >= 2 * word.len(), "too few words of waiting: {text:?}");
    rest
}

fn is_begun_early(answer: &Answer) {
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(answer.header("cache-control"), Some("no-cache"));
    assert_eq!(answer.header("x-accel-buffering"), Some("no"));
    assert!(answer.header("x-request-id").is_some());
}

#[test]
fn d05_a_stream_that_waits_in_the_queue_is_begun_and_kept_alive() {
    let (engine, release) = answering_late(stream());
    let front = Front::with(&engine, ProxySettings { max: 1, ..settings() }, timings());
    let mut first = Client::connect(front.addr);
    first.send(post(CHAT, "{}"));
    front.holds(1, 0);
    let mut waiting = Client::connect(front.addr);
    waiting.send(post(CHAT, STREAM)).until_times(COMMENT, 3);
    front.holds(1, 1);
    assert!(first.is_quiet(INTERVAL), "it asked for no stream");
    release.send(()).unwrap();
    assert_eq!(first.answer().end, End::Complete);
    release.send(()).unwrap();
    let answer = waiting.answer();
    is_begun_early(&answer);
    assert_eq!((answer.end, behind(&answer.text(), COMMENT)), (End::Complete, "data: one\n\ndata: [DONE]\n\n"));
    assert_eq!(front.metric("sglangd_streams_begun_early_total"), Some(1.0));
    assert_eq!(front.metric("sglangd_streams_interrupted_total"), Some(0.0));
    // The connection carries the next request.
    waiting.send(post(CHAT, STREAM));
    release.send(()).unwrap();
    assert_eq!(waiting.answer().end, End::Complete);
    front.holds(0, 0);
}

#[test]
fn d05_in_prefill_each_dialect_has_its_own_word_or_none() {
    for (path, word) in [(CHAT, COMMENT), ("/v1/messages", PING), ("/v1/responses", COMMENT), ("/generate", COMMENT)] {
        let (engine, release) = answering_late(stream());
        let front = front(&engine);
        let mut client = Client::connect(front.addr);
        client.send(post(path, STREAM)).until_times(word, 2);
        release.send(()).unwrap();
        let answer = client.answer();
        is_begun_early(&answer);
        assert_eq!(
            (answer.end, behind(&answer.text(), word)),
            (End::Complete, "data: one\n\ndata: [DONE]\n\n"),
            "{path}"
        );
    }
    let line = "{\"done\":true}\n";
    let lines = format!("HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ncontent-length: 14\r\n\r\n{line}");
    let (engine, release) = answering_late(lines);
    let front = front(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post("/api/chat", STREAM));
    eventually("the request is with the engine", || engine.requests() == 1);
    assert!(client.is_quiet(5 * INTERVAL), "lines of JSON have no comments");
    release.send(()).unwrap();
    let answer = client.answer();
    assert_eq!((answer.header("content-type"), answer.text().as_str()), (Some("application/x-ndjson"), line));
}

#[test]
fn d05_who_did_not_plainly_ask_for_a_stream_gets_the_engines_head_alone() {
    let (engine, release) = answering_late(json("429 Too Many Requests", "{}"));
    let front = front(&engine);
    for body in
        ["{}", "{\"stream\":false}", "{\"stream\":\"true\"}", "{\"stream\":true,\"stream\":false}", "no JSON", ""]
    {
        let mut client = Client::connect(front.addr);
        client.send(post(CHAT, body));
        front.holds(1, 0);
        assert!(client.is_quiet(4 * INTERVAL), "begun for {body:?}");
        release.send(()).unwrap();
        assert_eq!(client.answer().status, 429);
    }
    // A broken stream and a whole one look the same in HTTP/1.0.
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, STREAM).replace("HTTP/1.1", "HTTP/1.0"));
    front.holds(1, 0);
    assert!(client.is_quiet(4 * INTERVAL));
    release.send(()).unwrap();
    assert_eq!(client.answer().status, 429);
    assert_eq!(front.metric("sglangd_streams_begun_early_total"), Some(0.0));
}

#[test]
fn d05_a_stream_is_seen_behind_a_long_prompt_and_behind_100_continue() {
    let (engine, release) = answering_late(stream());
    let front = Front::with(&engine, ProxySettings { max_body: 8 << 20, ..settings() }, timings());
    let long = format!("{{\"prompt\":\"{}\",\"stream\":true}}", "x".repeat(900_000));
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, &long)).until_times(COMMENT, 2);
    release.send(()).unwrap();
    assert_eq!(client.answer().end, End::Complete);
    let mut client = Client::connect(front.addr);
    let request = post_with(CHAT, "Expect: 100-continue\r\n", STREAM);
    let (head, body) = request.split_at(request.len() - STREAM.len());
    client.send(head).until("100 Continue\r\n\r\n").forget();
    client.send(body).until_times(COMMENT, 2);
    release.send(()).unwrap();
    assert_eq!(client.answer().end, End::Complete);
}

/// Asks for a stream, waits until it is begun early, lets `then` happen and reads the rest.
fn begun_then(front: &Front, path: &str, word: &str, then: impl FnOnce()) -> Answer {
    let mut client = Client::connect(front.addr);
    client.send(post(path, STREAM)).until_times(word, 2);
    then();
    let answer = client.answer();
    is_begun_early(&answer);
    assert_eq!(answer.end, End::Broken, "a refused stream looks complete, or was reset: {:?}", answer.text());
    assert!(!answer.text().contains("[DONE]"));
    answer
}

#[test]
fn d05_what_a_begun_stream_is_refused_for_is_an_event_in_its_dialect() {
    let refused = "{\"object\":\"error\",\"message\":\"too long\",\"type\":\"BadRequestError\",\"code\":400}";
    for (path, word, mark) in [
        (
            CHAT,
            COMMENT,
            "data: {\"error\":{\"message\":\"too long\",\"type\":\"BadRequestError\",\"param\":null,\"code\":400}}\n\n",
        ),
        (
            "/v1/messages",
            PING,
            "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"BadRequestError\",\"message\":\"too long\"}}\n\n",
        ),
        (
            "/v1/responses",
            COMMENT,
            "event: error\ndata: {\"type\":\"error\",\"code\":400,\"message\":\"too long\",\"param\":null}\n\n",
        ),
    ] {
        let (engine, release) = answering_late(json("400 Bad Request", refused));
        let front = front(&engine);
        let answer = begun_then(&front, path, word, || release.send(()).unwrap());
        assert!(behind(&answer.text(), word).trim_start().ends_with(mark), "{path}: {:?}", answer.text());
        front.holds(0, 0);
        assert_eq!(front.metric("sglangd_streams_interrupted_total"), Some(1.0));
        assert_eq!(front.proxy.traffic().open_answers, 0);
    }
}

#[test]
fn d05_an_engine_that_dies_or_says_no_stream_ends_a_begun_one() {
    let gzip = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n\x1f\x08";
    for (bytes, mark) in [
        ("", "\"code\":\"engine_broken\""),
        ("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\n\r\noops", "500 Internal Server Error: oops"),
        ("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 400\r\n\r\nhalf", "503 Service Unavailable: half"),
        (
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
            "something else than a stream",
        ),
        (gzip, "something else than a stream"),
    ] {
        let (engine, release) = stepped(move |connection, gate| {
            connection.request();
            gate.recv().unwrap();
            connection.send(bytes);
            connection.close();
        });
        let front = front(&engine);
        let answer = begun_then(&front, CHAT, COMMENT, || release.send(()).unwrap());
        assert!(answer.text().contains(mark), "{:?}", answer.text());
        front.holds(0, 0);
    }
}

#[test]
fn d05_a_begun_stream_that_gets_no_place_is_told_so() {
    let (engine, _release) = answering_late(stream());
    let limits = ProxySettings { max: 1, queue_timeout_ms: 400, ..settings() };
    let front = Front::with(&engine, limits, timings());
    let mut first = Client::connect(front.addr);
    first.send(post(CHAT, "{}"));
    front.holds(1, 0);
    let answer = begun_then(&front, CHAT, COMMENT, || {});
    assert!(answer.text().contains("\"code\":\"queue_timeout\""), "{:?}", answer.text());
    let answer = begun_then(&front, CHAT, COMMENT, || front.proxy.cut_streams("the node is going down".into()));
    assert!(answer.text().contains("\"code\":\"draining\""), "{:?}", answer.text());
    front.holds(0, 0);
}

#[test]
fn d05_a_client_that_leaves_a_begun_stream_frees_its_place() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.until_closed();
    });
    let front = Front::with(&engine, ProxySettings { max: 1, ..settings() }, timings());
    let mut first = Client::connect(front.addr);
    first.send(post(CHAT, STREAM)).until_times(COMMENT, 1);
    let mut queued = Client::connect(front.addr);
    queued.send(post(CHAT, STREAM)).until_times(COMMENT, 1);
    front.holds(1, 1);
    drop(queued);
    front.holds(1, 0);
    drop(first);
    eventually("the engine's connection is closed", || engine.closed() == 1);
    front.holds(0, 0);
    eventually("both are counted", || front.metric("sglangd_client_aborts_total") == Some(2.0));
    assert_eq!(front.proxy.traffic().open_answers, 0);
}

#[test]
fn d05_a_silence_in_mid_stream_is_filled_between_two_events_only() {
    for (path, word) in [(CHAT, COMMENT), ("/v1/messages", PING)] {
        let (engine, release) = stepped(|connection, gate| {
            connection.request();
            connection.send(EVENTS);
            // A native stream's head comes before its prefill.
            gate.recv().unwrap();
            connection.send(chunk("data: one\n\n"));
            gate.recv().unwrap();
            connection.send(chunk("data: tw"));
            gate.recv().unwrap();
            connection.send(chunk("o\n"));
            gate.recv().unwrap();
            connection.send(chunk("\n"));
            connection.send(LAST);
        });
        let front = front(&engine);
        let mut client = Client::connect(front.addr);
        client.send(post(path, STREAM)).until_times(word, 2);
        release.send(()).unwrap();
        client.until("data: one\n\n").until_times(word, 4);
        release.send(()).unwrap();
        client.until("data: tw");
        let (seen, quiet) = (client.seen(), client.is_quiet(4 * INTERVAL));
        assert!(quiet, "said in the middle of an event: {seen:?}");
        release.send(()).unwrap();
        assert!(client.until("o\n").is_quiet(4 * INTERVAL), "said in the middle of an event");
        release.send(()).unwrap();
        let answer = client.answer();
        assert_eq!(answer.end, End::Complete);
        assert_eq!(answer.text().replace(word, ""), "data: one\n\ndata: two\n\n");
    }
}

#[test]
fn d05_nothing_is_said_within_lines_lengths_or_encodings() {
    let lines = "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n";
    let length = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 22\r\n\r\n";
    let encoded = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n";
    for (path, head) in [("/api/chat", lines), (CHAT, length), (CHAT, encoded)] {
        let (engine, release) = stepped(move |connection, gate| {
            connection.request();
            connection.send(head);
            let piece = |text: &str| if head == length { text.into() } else { chunk(text) };
            connection.send(piece("data: one\n\n"));
            gate.recv().unwrap();
            connection.send(piece("data: two\n\n"));
            if head != length {
                connection.send(LAST);
            }
            connection.until_closed();
        });
        let front = front(&engine);
        let mut client = Client::connect(front.addr);
        client.send(post(path, STREAM)).until("data: one\n\n");
        assert!(client.is_quiet(5 * INTERVAL), "{path}");
        release.send(()).unwrap();
        let answer = client.answer();
        assert_eq!((answer.end, answer.text().as_str()), (End::Complete, "data: one\n\ndata: two\n\n"));
    }
}
