//! D06–D09 and D11: what the engine says passes byte for byte, when it is said, and ends where it ends.

use proptest::prelude::*;
use sglangd::link::ProxySettings;
use sglangd::proxy::Timings;

use super::{CHAT, stepped};
use crate::harness::client::{Client, End, post};
use crate::harness::engine::{EVENTS, Engine, LAST, chunk, json};
use crate::harness::front::{Front, eventually, settings};

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
fn d07_what_comes_behind_done_passes_too() {
    let late = [EVENTS.as_bytes(), &chunk("data: [DONE]\n\n"), &chunk("data: late\n\n"), LAST].concat();
    let engine = Engine::answering(late);
    let front = Front::of(&engine);
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.end, answer.text().as_str()), (End::Complete, "data: [DONE]\n\ndata: late\n\n"));
    front.holds(0, 0);
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
fn d08_an_event_stream_with_a_length_keeps_it() {
    let engine =
        Engine::answering("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\ndata: x\n\n");
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    for _ in 0..2 {
        let answer = client.send(post(CHAT, "{}")).answer();
        assert_eq!((answer.end, answer.text().as_str()), (End::Complete, "data: x\n\n"));
        assert_eq!((answer.header("content-length"), answer.header("transfer-encoding")), (Some("9"), None));
    }
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
fn d12_what_has_one_value_is_said_once_and_lists_stay_lists() {
    let head = "HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nDate: Fri, 02 Jan 1970 00:00:00 GMT\r\nServer: uvicorn\r\n\
                Server: other\r\nAccess-Control-Allow-Origin: *\r\nAccess-Control-Allow-Origin: https://a\r\n\
                Access-Control-Allow-Credentials: true\r\nAccess-Control-Allow-Credentials: true\r\nVary: a\r\nVary: b\r\n\
                Set-Cookie: x=1\r\nSet-Cookie: y=2\r\n";
    let whole =
        format!("{head}Content-Type: application/json\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\n{{}}");
    let stream = format!(
        "{head}Content-Type: text/event-stream\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n"
    );
    let stream = [stream.as_bytes(), &chunk("data: x\n\n"), LAST].concat();
    for (answer, kind) in [(whole.into_bytes(), "application/json"), (stream, "text/event-stream")] {
        let engine = Engine::answering(answer);
        let front = Front::of(&engine);
        let answer = Client::ask(front.addr, post(CHAT, "{}"));
        assert_eq!((answer.status, answer.end), (200, End::Complete));
        for (field, value) in [
            ("date", "thu, 01 jan 1970 00:00:00 gmt"),
            ("server", "uvicorn"),
            ("access-control-allow-origin", "*"),
            ("access-control-allow-credentials", "true"),
            ("content-type", kind),
        ] {
            let lines = answer.head.lines().filter(|line| line.starts_with(&format!("{field}:"))).count();
            assert_eq!((lines, answer.header(field)), (1, Some(value)), "{field} in {}", answer.head);
        }
        for list in ["vary: a", "vary: b", "set-cookie: x=1", "set-cookie: y=2"] {
            assert!(answer.head.contains(&format!("{list}\r\n")), "{list} is gone: {}", answer.head);
        }
    }
}
