//! A stream leaves hyper once its head is known, and the connection comes back to it: what a client sees
//! on either side of that is one HTTP/1 conversation.

use std::time::Duration;

use crate::harness::client::{Client, End, get, post, post_with};
use crate::harness::engine::{EVENTS, Engine, LAST, chunk, json, stepped};
use crate::harness::front::Front;

const CHAT: &str = "/v1/chat/completions";

/// An engine that answers each request with the same short stream.
fn streaming() -> Engine {
    Engine::start(|connection| {
        while connection.request().is_some() {
            connection.send(EVENTS);
            connection.send(chunk("data: one\n\n"));
            connection.send(chunk("data: [DONE]\n\n"));
            connection.send(LAST);
        }
    })
}

#[test]
fn after_a_stream_the_connection_takes_other_requests_and_streams() {
    let engine = streaming();
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    for _ in 0..3 {
        let answer = client.send(post(CHAT, "{}")).answer();
        assert_eq!((answer.status, answer.end), (200, End::Complete));
        assert_eq!(answer.text(), "data: one\n\ndata: [DONE]\n\n");
        assert_eq!(client.send(get("/health")).answer().status, 200);
    }
    front.holds(0, 0);
}

#[test]
fn a_request_that_comes_during_a_stream_is_answered_after_it() {
    let engine = streaming();
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}") + &get("/live") + &post(CHAT, "{}"));
    assert!(client.answer().text().ends_with("[DONE]\n\n"));
    assert_eq!(client.answer().text(), r#"{"live":true}"#);
    assert!(client.answer().text().ends_with("[DONE]\n\n"));
}

#[test]
fn a_streams_head_says_when_and_who_and_how_it_ends() {
    let front_engine = streaming();
    let front = Front::of(&front_engine);
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!(answer.header("transfer-encoding"), Some("chunked"));
    assert!(answer.header("content-length").is_none(), "{}", answer.head);
    assert!(answer.header("x-request-id").is_some(), "{}", answer.head);
    let date = answer.header("date").unwrap();
    assert!(date.to_lowercase().ends_with(" gmt") && date.len() == 29, "no IMF-fixdate of RFC 9110: {date}");
    assert!(answer.head.to_lowercase().starts_with("http/1.1 200 ok"), "{}", answer.head);
}

#[test]
fn a_client_that_wants_the_connection_closed_gets_its_stream_and_the_end() {
    let engine = streaming();
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    let answer = client.send(post_with(CHAT, "Connection: close\r\n", "{}")).answer();
    assert_eq!(answer.end, End::Complete);
    assert_eq!(client.closes(), End::Broken, "a FIN, without an answer before it");
}

#[test]
fn what_follows_a_stream_is_checked_as_before() {
    let engine = streaming();
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}")).answer();
    client.send(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    );
    assert_eq!(client.answer().status, 400);
    assert_eq!(engine.requests(), 1, "nothing of it reached the engine");
}

/// It saves copying, framing and three of four pieces of a write. What says more than its size is framed anew.
#[test]
fn an_event_that_comes_as_one_chunk_goes_on_as_it_came() {
    let came: [&str; 4] =
        ["000b\r\ndata: one\n\n\r\n", "b;x=y\r\ndata: two\n\n\r\n", "B\r\ndata: 3rd\n", "\n\r\nb\r\ndata: 4th\n\n\r\n"];
    let goes = [came[0], "B\r\ndata: two\n\n\r\n", "A\r\ndata: 3rd\n\r\n", "C\r\n\ndata: 4th\n\n\r\n"];
    let (engine, release) = stepped(move |connection, gate| {
        connection.request();
        connection.send(EVENTS);
        for piece in came {
            gate.pass();
            connection.send(piece);
        }
        gate.pass();
        connection.send(LAST);
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}")).until("\r\n\r\n").forget();
    for goes in goes {
        release.send(()).unwrap();
        assert_eq!(String::from_utf8(client.take(goes.len())).unwrap(), goes);
    }
    release.send(()).unwrap();
    assert_eq!(client.take(LAST.len()), LAST);
    front.holds(0, 0);
}

/// The kernel takes a part of one, nothing of the next: what is left waits, in its order, and nothing comes twice.
#[allow(clippy::disallowed_methods)] // sets the pace of engine and reader; what the reader gets does not depend on it
fn a_reader_that_pauses_gets_every_byte(size: usize, count: usize) {
    let event = move |n: usize| {
        let mut event = format!("data: {n:06}").into_bytes();
        event.resize(size - 2, b'a' + (n % 26) as u8);
        event.extend_from_slice(b"\n\n");
        event
    };
    let engine = Engine::start(move |connection| {
        connection.request();
        connection.send(EVENTS);
        for n in 0..count {
            connection.send(chunk(event(n)));
            // So that each is read alone, until the client's and the kernel's buffers are full.
            std::thread::sleep(Duration::from_micros(size as u64 / 40));
        }
        connection.send(LAST);
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}"));
    std::thread::sleep(Duration::from_millis(500));
    let answer = client.answer();
    assert_eq!((answer.status, answer.end), (200, End::Complete));
    assert!(answer.body == (0..count).flat_map(event).collect::<Vec<u8>>(), "{} bytes", answer.body.len());
}

#[test]
fn a_reader_that_pauses_gets_every_byte_of_large_events_that_come_one_by_one() {
    a_reader_that_pauses_gets_every_byte(40 * 1024, 200);
}

/// Each is the first of its turn here and goes out at once; those that wait for others are `proxy::outbox`'s tests'.
#[test]
fn a_reader_that_pauses_gets_every_byte_of_small_events_that_come_one_by_one() {
    a_reader_that_pauses_gets_every_byte(1500, 6000);
}

#[test]
fn an_answer_in_one_piece_stays_where_it_was() {
    let engine = Engine::start(|connection| {
        while connection.request().is_some() {
            connection.send(json("200 OK", "{}"));
        }
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    for _ in 0..2 {
        let answer = client.send(post(CHAT, "{}")).answer();
        assert_eq!((answer.header("content-length"), answer.text().as_str()), (Some("2"), "{}"));
    }
}
