//! Group D: streams. A stream passes byte for byte, and one that is cut never looks complete.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use proptest::prelude::*;
use sglangd::link::{EngineState, ProxySettings};
use sglangd::proxy::Timings;

use crate::harness::client::{Client, End, get, post};
use crate::harness::engine::{EVENTS, Engine, LAST, chunk, json};
use crate::harness::front::{Front, eventually, settings, view};

const CHAT: &str = "/v1/chat/completions";

/// An engine whose every step the test releases.
fn stepped(
    steps: impl Fn(&mut crate::harness::engine::Connection, &Receiver<()>) + Send + Sync + 'static,
) -> (Engine, Sender<()>) {
    let (release, gate) = channel();
    let gate = Mutex::new(gate);
    let engine = Engine::start(move |connection| steps(connection, &gate.lock().unwrap()));
    (engine, release)
}

#[test]
fn d01_an_engine_that_dies_before_its_head_is_a_502() {
    for garbage in ["", "HTTP/1.1 200", "garbage\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"] {
        let engine = Engine::start(move |connection| {
            connection.request();
            connection.send(garbage);
            connection.close();
        });
        let front = Front::of(&engine);
        let mut client = Client::connect(front.addr);
        let answer = client.send(post(CHAT, "{}")).answer();
        assert_eq!((answer.status, answer.code().as_str()), (502, "engine_broken"), "{garbage:?}");
        assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
        assert_eq!(engine.requests(), 1, "said again although the engine may have worked on it");
        assert_eq!(front.metric("sglangd_upstream_errors_total"), Some(1.0));
        front.holds(0, 0);
        // The connection to the client is still good.
        assert_eq!(client.send(get("/health")).answer().status, 200);
    }
}

#[test]
fn d01_an_engine_that_takes_no_connections_is_a_503() {
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut front = Front::unaware(Timings::default());
    front.proxy.settings(settings()).unwrap();
    front.proxy.engine(view(EngineState::Ready, Some(gone)));
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (503, "engine_unreachable"));
    assert!(answer.header("retry-after").is_some());
}

#[test]
fn d02_an_engine_that_dies_in_mid_stream_never_looks_complete() {
    for (path, marks) in [
        (CHAT, ["data: {\"error\":{\"message\"", "\"code\":\"stream_interrupted\""]),
        ("/v1/messages", ["event: error\ndata: {\"type\":\"error\"", "\"error\":{\"type\":\"api_error\""]),
        ("/v1/responses", ["event: error\ndata: {\"type\":\"error\"", "\"code\":\"stream_interrupted\""]),
        ("/api/chat", ["{\"error\":", "broke off"]),
    ] {
        for abruptly in [false, true] {
            let (release, gate) = channel::<()>();
            let gate = Mutex::new(gate);
            let engine = Engine::start(move |connection| {
                connection.request();
                connection.send(EVENTS);
                connection.send(chunk("data: one\n\n"));
                connection.send(chunk("data: tw"));
                if abruptly {
                    // RST may overtake what was sent: only once the proxy has passed it on.
                    gate.lock().unwrap().recv().unwrap();
                    connection.reset();
                }
            });
            let front = Front::of(&engine);
            let mut client = Client::connect(front.addr);
            client.send(post(path, "{}")).until("data: tw");
            release.send(()).unwrap();
            let answer = client.answer();
            let text = answer.text();
            assert_eq!(answer.end, End::Broken, "{path}: a cut stream looks complete, or was reset: {text:?}");
            assert!(text.starts_with("data: one\n\ndata: tw\n"), "{text:?}");
            assert!(marks.iter().all(|mark| text.contains(mark)) && text.ends_with('\n'), "{path}: {text:?}");
            assert!(!text.contains("[DONE]"));
            assert_eq!(front.metric("sglangd_streams_interrupted_total"), Some(1.0));
            front.holds(0, 0);
        }
    }
}

#[test]
fn d02_a_stream_that_is_cut_ends_the_same_way() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(EVENTS);
        connection.send(chunk("data: one\n\n"));
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}")).until("data: one\n\n");
    let mut waiting = Client::connect(front.addr);
    waiting.send(post("/v1/embeddings", "{}")).until("data: one");
    front.proxy.drain();
    front.proxy.cut_streams("the node is going down".into());
    let answer = client.answer();
    assert_eq!(answer.end, End::Broken);
    assert!(answer.text().contains("the node is going down") && !answer.text().contains("[DONE]"));
    eventually("the engine's connections are closed", || engine.closed() == 2);
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (503, "draining"));
    assert_eq!(answer.header("connection"), Some("close"));
}

#[test]
fn d02_a_request_without_head_yet_is_told_that_it_was_cut() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}"));
    eventually("the request is with the engine", || engine.requests() == 1);
    front.proxy.cut_streams("the node is going down".into());
    let answer = client.answer();
    assert_eq!(answer.status, 503);
    assert!(answer.text().contains("the node is going down"));
    eventually("the engine's connection is closed", || engine.closed() == 1);
}

#[test]
fn d03_an_engine_that_hangs_in_mid_stream_is_given_up() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(EVENTS);
        connection.send(chunk("data: one\n\n"));
        connection.until_closed();
    });
    let timings = Timings { engine_silence: Duration::from_millis(150), ..Timings::default() };
    let front = Front::with(&engine, settings(), timings);
    let answer = Client::connect(front.addr).send(post(CHAT, "{}")).answer();
    assert_eq!(answer.end, End::Broken);
    assert!(answer.text().contains("\"error\"") && !answer.text().contains("[DONE]"));
    eventually("the engine's connection is closed", || engine.closed() == 1);
    front.holds(0, 0);
}

/// How a client can leave.
#[derive(Debug, Clone, Copy)]
enum Leaving {
    Fin,
    Rst,
    HalfClose,
    /// With a second request on its way that nobody has read.
    Pipelined,
}

const LEAVINGS: [Leaving; 4] = [Leaving::Fin, Leaving::Rst, Leaving::HalfClose, Leaving::Pipelined];

/// Leaves; what is returned must live on for the client to be half open.
fn leave(mut client: Client, how: Leaving) -> Option<Client> {
    match how {
        Leaving::Fin => None,
        Leaving::Rst => {
            client.rst();
            None
        }
        Leaving::HalfClose => {
            client.fin();
            Some(client)
        }
        Leaving::Pipelined => {
            client.send(post(CHAT, &"x".repeat(20_000))).fin();
            Some(client)
        }
    }
}

#[test]
fn d04_a_client_that_leaves_in_prefill_closes_the_engines_connection() {
    for how in LEAVINGS {
        let engine = Engine::start(|connection| {
            connection.request();
            connection.until_closed();
        });
        let front = Front::of(&engine);
        let mut client = Client::connect(front.addr);
        client.send(post("/v1/embeddings", "{}"));
        eventually("the request is with the engine", || engine.requests() == 1);
        let _rest = leave(client, how);
        eventually("the engine's connection is closed", || engine.closed() == 1);
        front.holds(0, 0);
        assert_eq!(front.metric("sglangd_client_aborts_total"), Some(1.0), "{how:?}");
    }
}

#[test]
fn d04_a_client_that_leaves_in_mid_stream_closes_the_engines_connection() {
    for how in LEAVINGS {
        let engine = Engine::start(|connection| {
            connection.request();
            connection.send(EVENTS);
            connection.send(chunk("data: one\n\n"));
            connection.until_closed();
        });
        let front = Front::of(&engine);
        let mut client = Client::connect(front.addr);
        client.send(post(CHAT, "{}")).until("data: one");
        let _rest = leave(client, how);
        eventually("the engine's connection is closed", || engine.closed() == 1);
        front.holds(0, 0);
        eventually("no answer is open", || front.proxy.traffic().open_answers == 0);
    }
}

#[test]
fn d04_a_client_that_leaves_the_queue_frees_its_place_and_never_reaches_the_engine() {
    for how in LEAVINGS {
        let engine = Engine::start(|connection| {
            connection.request();
            connection.until_closed();
        });
        let limits = ProxySettings { max: 1, queue_timeout_ms: 600_000, ..settings() };
        let front = Front::with(&engine, limits, Timings::default());
        let mut first = Client::connect(front.addr);
        first.send(post(CHAT, "{}"));
        eventually("the request is with the engine", || engine.requests() == 1);
        let mut queued = Client::connect(front.addr);
        // The FIN stands behind the body: one that stays unread would hide it.
        queued.send(post(CHAT, &"x".repeat(200_000)));
        front.holds(1, 1);
        let _rest = leave(queued, how);
        front.holds(1, 0);
        assert_eq!(engine.requests(), 1, "{how:?}");
    }
}

#[test]
fn d04_a_client_that_leaves_while_its_body_is_stuck_is_seen() {
    let (engine, release) = stepped(|connection, gate| {
        connection.head();
        gate.recv().unwrap();
        connection.until_closed();
    });
    let front = Front::with(&engine, ProxySettings { max_body: 64 << 20, ..settings() }, Timings::default());
    let mut client = Client::connect(front.addr);
    client.send(format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 60000000\r\n\r\n"));
    client.send_what_fits();
    front.holds(1, 0);
    client.rst();
    front.holds(0, 0);
    release.send(()).unwrap();
    eventually("the engine's connection is closed", || engine.closed() == 1);
}

fn event_stream(pieces: Vec<Vec<u8>>) -> Engine {
    Engine::start(move |connection| {
        while connection.request().is_some() {
            connection.send(EVENTS);
            for piece in &pieces {
                connection.send(piece);
            }
        }
    })
}

#[test]
fn d06_odd_events_pass_byte_for_byte() {
    let huge = format!("data: {}\n\n", "é🦀".repeat(900_000));
    for body in [
        "\u{feff}data: bom\r\n\r\ndata: crlf\r\rdata: cr\n\n: comment\n\nevent: x\ndata: no blank line".to_owned(),
        "data: 🦀\n\n".to_owned(),
        huge,
    ] {
        let engine = event_stream(vec![chunk(&body), LAST.to_vec()]);
        let front = Front::of(&engine);
        let answer = Client::ask(front.addr, post(CHAT, "{}"));
        assert_eq!((answer.end, answer.body == body.as_bytes()), (End::Complete, true), "{} bytes", body.len());
        assert_eq!(answer.header("x-accel-buffering"), Some("no"));
        assert_eq!(answer.header("cache-control"), Some("no-cache"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// The engine's bytes, cut anywhere between two writes, arrive as the same payload.
    #[test]
    fn d06_any_split_of_the_engines_bytes_gives_the_same_stream(
        events in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..60), 1..8),
        cuts in proptest::collection::vec(any::<usize>(), 0..12),
    ) {
        let mut wire: Vec<u8> = events.iter().flat_map(chunk).collect();
        wire.extend_from_slice(LAST);
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % wire.len()).chain([wire.len()]).collect();
        ends.sort_unstable();
        let mut from = 0;
        let pieces = ends.iter().map(|&end| { let piece = wire[from..end].to_vec(); from = end; piece }).collect();
        let engine = event_stream(pieces);
        let front = Front::of(&engine);
        let mut client = Client::connect(front.addr);
        for _ in 0..2 {
            let answer = client.send(post(CHAT, "{}")).answer();
            prop_assert_eq!((answer.end, answer.body), (End::Complete, events.concat()));
        }
        prop_assert_eq!(engine.connections(), 1, "the connection was not used again");
    }
}

#[test]
fn d06_each_event_arrives_when_it_is_said() {
    let (engine, release) = stepped(|connection, gate| {
        connection.request();
        connection.send(EVENTS);
        for n in 0..3 {
            connection.send(chunk(format!("data: {n}\n\n")));
            gate.recv().unwrap();
        }
        connection.send(LAST);
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}"));
    for n in 0..3 {
        // The engine says nothing more until this one has come through.
        client.until(&format!("data: {n}\n\n"));
        release.send(()).unwrap();
    }
    assert_eq!(client.answer().end, End::Complete);
}

#[test]
fn d07_done_with_an_open_socket_frees_the_place() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(EVENTS);
        connection.send(chunk("data: one\n\n"));
        connection.send(chunk("data: [DONE]\n\n"));
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.end, answer.text().as_str()), (End::Complete, "data: one\n\ndata: [DONE]\n\n"));
    front.holds(0, 0);
    eventually("the engine's connection is closed", || engine.closed() == 1);
}

#[test]
fn d07_bytes_behind_the_answer_make_the_connection_useless() {
    let engine = Engine::start(|connection| {
        while connection.request().is_some() {
            connection.send([EVENTS.as_bytes(), &chunk("data: [DONE]\n\n"), LAST, b"HTTP/1.1 200 OK\r\n"].concat());
        }
    });
    let front = Front::of(&engine);
    for _ in 0..2 {
        let answer = Client::ask(front.addr, post(CHAT, "{}"));
        assert_eq!((answer.end, answer.text().as_str()), (End::Complete, "data: [DONE]\n\n"));
    }
    assert_eq!(engine.connections(), 2);
}

#[test]
fn d08_compressed_and_close_delimited_answers_pass() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send("HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n\r\n\x1f\x08");
        connection.send("data: to the end");
    });
    let front = Front::of(&engine);
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.end, answer.text().as_str()), (End::Complete, "\x1f\x08data: to the end"));
    assert_eq!(answer.header("content-encoding"), Some("gzip"));
    assert_eq!(answer.header("transfer-encoding"), Some("chunked"));
}

#[test]
fn d08_an_answer_shorter_than_its_length_ends_abnormally() {
    for kind in ["text/event-stream", "application/json"] {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\ndata: x\n\n");
        let engine = Engine::start(move |connection| {
            connection.request();
            connection.send(&head);
        });
        let front = Front::of(&engine);
        let answer = Client::ask(front.addr, post(CHAT, "{}"));
        assert_eq!((answer.end, answer.text().as_str()), (End::Broken, "data: x\n\n"), "{kind}");
    }
}

#[test]
fn d09_an_error_in_place_of_a_stream_passes_unchanged() {
    let body = "{\"object\":\"error\",\"message\":\"no\"}";
    let engine = Engine::answering(json("400 Bad Request", body));
    let front = Front::of(&engine);
    let answer = Client::ask(front.addr, post(CHAT, "{\"stream\":true}"));
    assert_eq!((answer.status, answer.text().as_str()), (400, body));
    assert_eq!(answer.header("x-accel-buffering"), None);
}

#[test]
fn d11_a_large_answer_is_streamed_through() {
    let (engine, release) = stepped(|connection, gate| {
        connection.request();
        connection.send("HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n");
        connection.send(vec![b'a'; 25_000_000]);
        gate.recv().unwrap();
        connection.send(vec![b'b'; 25_000_000]);
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}"));
    // The first half is here before the second exists.
    client.bytes(25_000_000);
    release.send(()).unwrap();
    let answer = client.answer();
    assert_eq!((answer.end, answer.body.len()), (End::Complete, 50_000_000));
    assert!(answer.body[..25_000_000].iter().all(|&byte| byte == b'a'));
    assert!(answer.body[25_000_000..].iter().all(|&byte| byte == b'b'));
}

#[test]
fn a_large_request_is_streamed_through_and_arrives_whole() {
    let (engine, release) = stepped(|connection, gate| {
        connection.request();
        gate.recv().unwrap();
        connection.send(json("200 OK", "{}"));
    });
    let front = Front::with(&engine, ProxySettings { max_body: 64 << 20, ..settings() }, Timings::default());
    let body = "0123456789".repeat(800_000);
    let mut client = Client::connect(front.addr);
    let request = post(CHAT, &body);
    let (first, second) = request.split_at(request.len() / 2);
    client.send(first);
    eventually("half has arrived before the rest is sent", || engine.text(0).len() > first.len());
    client.send(second);
    release.send(()).unwrap();
    assert_eq!(client.answer().status, 200);
    assert!(engine.text(0).ends_with(&format!("\r\n\r\n{body}")), "the body arrived changed");
}

#[test]
fn a_request_that_meets_the_end_of_a_kept_connection_is_said_again() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(json("200 OK", "{}"));
        if connection.index == 0 {
            // Takes the next request's bytes and dies without a word.
            connection.request();
            return;
        }
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    assert_eq!(client.send(post(CHAT, "{\"n\":1}")).answer().status, 200);
    assert_eq!(client.send(post(CHAT, "{\"n\":2}")).answer().status, 200);
    assert!(engine.text(1).ends_with("{\"n\":2}"), "{}", engine.text(1));
    assert_eq!(front.metric("sglangd_upstream_retries_total"), Some(1.0));
    assert_eq!(front.metric("sglangd_upstream_errors_total"), Some(0.0));
}

#[test]
fn a_request_whose_body_is_gone_is_not_said_again() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(json("200 OK", "{}"));
        connection.request();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    assert_eq!(client.send(post(CHAT, "{}")).answer().status, 200);
    assert_eq!(client.send(post(CHAT, &"x".repeat(200_000))).answer().status, 502);
    assert_eq!(engine.connections(), 1);
}

#[test]
fn kept_connections_are_dropped_before_the_engine_drops_them() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(json("200 OK", "{}"));
        connection.until_closed();
    });
    let front = Front::of(&engine);
    assert_eq!(Client::ask(front.addr, post(CHAT, "{}")).status, 200);
    assert_eq!(engine.closed(), 0);
    eventually("the idle connection is dropped", || engine.closed() == 1);
}
