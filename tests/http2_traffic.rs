//! HTTP/2 on the public port as ordinary clients use it: what it has in common with HTTP/1.1, and its
//! clocks.

use std::time::Duration;

use sglangd::link::{Http2, ListenSettings, ProxySettings};
use sglangd::proxy::Timings;

use crate::harness::client::{self, get as get1, post as post1};
use crate::harness::engine::{Connection, EVENTS, Engine, LAST, chunk, json, stepped, thinking};
use crate::harness::front::{Front, eventually, patience, settings};
use crate::harness::hpack;
use crate::harness::http2::{
    self as h2, CANCEL, CONTINUATION, Client, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, End, Goodbye, HEADERS,
    INTERNAL_ERROR, NO_ERROR, PING, PREFACE, fields, frame, get, headers, post, reset,
};
use crate::harness::pki::{self, Folder, Pair};

const CHAT: &str = "/v1/chat/completions";
const INITIAL_WINDOW_SIZE: u16 = 4;

// ------------------------------------------------------------------ what works

#[test]
fn a_request_of_http2_is_one_of_http1_for_the_engine() {
    let engine = Engine::answering(json("200 OK", "{\"ok\":1}"));
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    let more = [("te", "trailers"), ("cookie", "a=1"), ("cookie", "b=2"), ("x-kept", "yes")];
    client.send(headers(1, 0, &fields(CHAT, &more))).send(frame(DATA, 0, 1, "{\"a\":")).send(frame(DATA, 0, 1, "1}"));
    // Trailers are dropped.
    client.send(headers(1, END_STREAM, &[("authorization", "Bearer forged"), ("x-trailer", "t")]));
    let answer = client.answer(1);
    assert_eq!((answer.status, answer.text().as_str(), answer.end), (200, "{\"ok\":1}", End::Complete));
    assert_eq!(answer.field("content-length"), Some("8"));
    assert!(answer.field("date").unwrap().ends_with(" GMT"));
    assert_eq!(answer.field("x-request-id").unwrap().len(), 32);
    let text = engine.text(0);
    let head = text.split("\r\n\r\n").next().unwrap();
    let mut lines: Vec<&str> = head.lines().collect();
    let id = format!("x-request-id: {}", answer.field("x-request-id").unwrap());
    lines.sort_unstable();
    let mut expected = vec![
        "POST /v1/chat/completions HTTP/1.1",
        "content-type: application/json",
        "cookie: a=1; b=2",
        "transfer-encoding: chunked",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-proto: http",
        "x-kept: yes",
    ];
    let host = format!("host: {}", engine.addr);
    expected.extend([host.as_str(), id.as_str()]);
    expected.sort_unstable();
    assert_eq!(lines, expected);
    assert!(text.ends_with("5\r\n{\"a\":\r\n2\r\n1}\r\n0\r\n\r\n"), "{text}");
}

#[test]
fn a_length_that_was_said_is_said_to_the_engine() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(headers(1, 0, &fields(CHAT, &[("content-length", "5")]))).send(frame(DATA, END_STREAM, 1, "12345"));
    assert_eq!(client.answer(1).status, 200);
    // A body that ends with its head, and one that ends with an empty frame.
    client.send(get(3, "/v1/models"));
    assert_eq!(client.answer(3).status, 200);
    client.send(headers(5, 0, &fields(CHAT, &[("content-length", "0")]))).send(frame(DATA, END_STREAM, 5, ""));
    assert_eq!(client.answer(5).status, 200);
    let text = engine.text(0);
    assert!(
        text.contains("content-length: 5\r\n") && text.contains("\r\n\r\n12345GET /v1/models HTTP/1.1\r\n"),
        "{text}"
    );
    assert!(!text.contains("transfer-encoding"), "{text}");
}

#[test]
fn streams_share_a_connection_and_end_in_any_order() {
    let (engine, release) = stepped(|connection, gate| {
        let head = connection.request().unwrap();
        connection.send(EVENTS);
        connection.send(chunk("data: one\n\n"));
        if head.contains("/v1/completions") {
            gate.pass();
        }
        connection.send(chunk("data: [DONE]\n\n"));
        connection.send(LAST);
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(1, "/v1/completions", "{}"));
    client.until_text(1, "data: one");
    client.send(post(3, CHAT, "{}"));
    let second = client.answer(3);
    assert_eq!((second.end, second.text().as_str()), (End::Complete, "data: one\n\ndata: [DONE]\n\n"));
    assert_eq!(second.field("x-accel-buffering"), Some("no"));
    release.send(()).unwrap();
    let first = client.answer(1);
    assert_eq!((first.end, first.text().as_str()), (End::Complete, "data: [DONE]\n\n"));
    assert_eq!(front.metric("sglangd_connections"), Some(1.0));
    assert_eq!(front.metric("sglangd_http2_connections"), Some(1.0));
    assert_eq!(front.metric("sglangd_http2_connections_total"), Some(1.0));
}

#[test]
fn large_bodies_are_streamed_through_both_ways() {
    let (engine, release) = stepped(|connection, gate| {
        let head = connection.head().unwrap();
        assert!(head.contains("content-length: 8000000"), "{head}");
        gate.pass();
        connection.take(8_000_000);
        connection.send("HTTP/1.1 200 OK\r\nContent-Length: 8000000\r\n\r\n");
        connection.send(vec![b'a'; 4_000_000]);
        gate.pass();
        connection.send(vec![b'b'; 4_000_000]);
        connection.until_closed();
    });
    let front = Front::with(&engine, ProxySettings { max_body: 64 << 20, ..settings() }, Timings::default());
    let mut client = Client::connect(front.addr);
    client.send(headers(1, 0, &fields(CHAT, &[("content-length", "8000000")])));
    let mut upload = Upload::new(1, 8_000_000);
    // The engine reads nothing yet: after what the sockets and the window hold, no more is asked for.
    while !upload.is_held(&mut client) {}
    let held = upload.sent;
    assert!(held < 7_500_000, "{held} bytes were taken for an engine that takes none");
    release.send(()).unwrap();
    upload.finish(&mut client);
    client.until_bytes(1, 4_000_000);
    release.send(()).unwrap();
    let answer = client.answer(1);
    assert_eq!((answer.end, answer.body.len()), (End::Complete, 4_000_000));
    assert!(answer.body.iter().all(|&byte| byte == b'b'));
    assert!(engine.text(0).ends_with(&"x".repeat(8_000_000)));
}

/// A body on its way, within the windows.
struct Upload {
    stream: u32,
    left: usize,
    sent: usize,
    window: usize,
}

impl Upload {
    const PIECE: usize = 16_000;

    fn new(stream: u32, left: usize) -> Self {
        Self { stream, left, sent: 0, window: 256 * 1024 }
    }

    fn send(&mut self, client: &mut Client) {
        while self.left > 0 && self.window >= Self::PIECE {
            let piece = vec![b'x'; self.left.min(Self::PIECE)];
            self.left -= piece.len();
            self.window -= piece.len();
            self.sent += piece.len();
            client.send(frame(DATA, if self.left == 0 { END_STREAM } else { 0 }, self.stream, &piece));
        }
    }

    fn widen(&mut self, client: &mut Client) {
        let update = client.until(|frame| frame.kind == h2::WINDOW_UPDATE && frame.stream == self.stream).unwrap();
        self.window += u32::from_be_bytes(update.payload.try_into().unwrap()) as usize;
    }

    /// Sends what may be sent. Whether nothing more may be for a while.
    fn is_held(&mut self, client: &mut Client) -> bool {
        self.send(client);
        if self.left == 0 || client.is_quiet(Duration::from_millis(300)) {
            return true;
        }
        self.widen(client);
        false
    }

    fn finish(&mut self, client: &mut Client) {
        while self.left > 0 {
            self.send(client);
            if self.left > 0 {
                self.widen(client);
            }
        }
    }
}

#[test]
fn a_head_has_no_body_and_refusals_are_those_of_http1() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    let head = [(":method", "HEAD"), (":scheme", "http"), (":path", "/health"), (":authority", "a")];
    client.send(headers(1, END_STREAM, &head));
    let answer = client.answer(1);
    assert_eq!((answer.status, answer.body.len(), answer.end), (200, 0, End::Complete));
    assert_eq!(answer.field("content-length"), Some("17"));
    for (stream, path, status, code) in [
        (3, "/nowhere", 404, "unknown_route"),
        (5, "/server_info", 403, "closed_route"),
        (7, "/v1/../admin", 400, "ambiguous_path"),
    ] {
        client.send(get(stream, path));
        let answer = client.answer(stream);
        assert_eq!((answer.status, answer.code().as_str(), answer.end), (status, code, End::Complete), "{path}");
        assert_eq!(answer.field("connection"), None);
    }
    for (stream, method) in [(9, "TRACE"), (11, "get"), (13, "FOO")] {
        client.send(headers(
            stream,
            END_STREAM,
            &[(":method", method), (":scheme", "http"), (":path", "/health"), (":authority", "a")],
        ));
        assert_eq!(client.answer(stream).status, 405, "{method}");
    }
    client.send(headers(15, END_STREAM, &[(":method", "CONNECT"), (":authority", "a:80")]));
    assert_eq!(client.answer(15).status, 405);
    let long = format!("/v1/{}", "x".repeat(8 * 1024));
    client.send(headers(
        17,
        END_STREAM,
        &[(":method", "GET"), (":scheme", "http"), (":path", &long), (":authority", "a")],
    ));
    assert_eq!(client.answer(17).status, 414);
    let many: Vec<(&str, &str)> = fields(CHAT, &[]).into_iter().chain([("x-many", "y"); 101]).collect();
    client.send(headers(19, END_STREAM, &many));
    assert_eq!(client.answer(19).status, 431);
    assert_eq!(engine.connections(), 0);
}

#[test]
fn a_body_over_the_limit_is_413_by_its_length_and_by_its_growth() {
    let engine = thinking();
    let front = Front::with(&engine, ProxySettings { max_body: 1000, ..settings() }, Timings::default());
    let mut client = Client::connect(front.addr);
    client.send(headers(1, 0, &fields(CHAT, &[("content-length", "1001")])));
    let answer = client.answer(1);
    assert_eq!((answer.status, answer.code().as_str()), (413, "body_too_large"));
    client.send(headers(3, 0, &fields(CHAT, &[]))).send(frame(DATA, 0, 3, vec![b'x'; 1001]));
    assert_eq!(client.answer(3).status, 413);
    front.holds(0, 0);
    // What else was on its way belongs to nobody; the connection goes on.
    client.send(frame(DATA, 0, 3, "more")).send(get(5, "/health"));
    assert_eq!(client.answer(5).status, 200);
}

#[test]
fn who_expects_a_100_gets_it_only_with_a_place() {
    let engine = Engine::start(|connection| {
        let head = connection.request().unwrap();
        if head.contains("x-first") {
            connection.until_closed();
        } else {
            connection.send(json("200 OK", "{}"));
        }
    });
    let limits = ProxySettings { max: 1, queue_timeout_ms: 600_000, ..settings() };
    let front = Front::with(&engine, limits, Timings::default());
    let mut client = Client::connect(front.addr);
    client.send(headers(1, END_STREAM, &fields(CHAT, &[("x-first", "1")])));
    eventually("the first is with the engine", || engine.requests() == 1);
    client.send(headers(3, 0, &fields(CHAT, &[("expect", "100-continue"), ("content-length", "2")])));
    front.holds(1, 1);
    assert!(client.is_alive());
    client.send(reset(1, CANCEL));
    let interim = client.of_stream(3).unwrap();
    assert_eq!((interim.kind, interim.flags & END_STREAM), (HEADERS, 0));
    client.send(frame(DATA, END_STREAM, 3, "{}"));
    assert_eq!(client.answer(3).status, 200);
    client.send(headers(5, 0, &fields(CHAT, &[("expect", "200-maybe")])));
    assert_eq!(client.answer(5).status, 417);
}

// ------------------------------------------------------------------ which protocol is spoken

#[test]
fn the_preface_is_known_however_it_is_cut_and_http1_is_as_before() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    for cut in [1, 3, 14, 18, 23] {
        let mut client = Client::bare(front.addr);
        client.send(&PREFACE[..cut]);
        assert!(client.is_quiet(Duration::from_millis(10)));
        client.send(&PREFACE[cut..]).send(h2::settings(&[])).send(get(1, "/health"));
        assert_eq!(client.answer(1).status, 200, "{cut}");
    }
    let mut client = client::Client::connect(front.addr);
    let request = post1(CHAT, "{}");
    client.send(&request[..1]);
    assert!(client.is_quiet(Duration::from_millis(10)));
    client.send(&request[1..]);
    assert_eq!(client.answer().status, 200);
    // Only a connection's first bytes are a preface.
    client.send(PREFACE);
    assert_eq!(client.answer().status, 400);
    for almost in ["PRI * HTTP/2.0\r\n\r\nSM\r\n\r!", "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", "PRI * HTTP/2.1\r\n\r\n"] {
        let answer = client::Client::ask(front.addr, almost);
        assert_eq!(answer.status, 400, "{almost:?}");
    }
    assert_eq!(client::Client::ask(front.addr, "PRI /x HTTP/1.1\r\nHost: a\r\n\r\n").status, 405);
}

#[test]
fn over_tls_the_client_chooses_by_alpn() {
    let engine = Engine::start(|connection| {
        while let Some(head) = connection.request() {
            assert!(head.contains("x-forwarded-proto: https\r\n"), "{head}");
            connection.send(json("200 OK", &"y".repeat(1 << 20)));
        }
    });
    let files = Folder::with(&Pair::new());
    let listen = |http2| ListenSettings { tls: Some(files.files()), http2, ..ListenSettings::default() };
    let with = |http2| Front::with(&engine, ProxySettings { listen: listen(http2), ..settings() }, Timings::default());
    let front = with(Http2::On);
    let connect =
        |front: &Front, named: &[&str]| client::Client::connect(front.addr).encrypt(pki::client(named)).unwrap();
    let spoken = connect(&front, &["http/1.1", "h2"]);
    assert_eq!(spoken.protocol(), Some(&b"h2"[..]), "the server's wish goes first");
    let mut spoken = Client::on(spoken).greet(&[]);
    for stream in [1, 3] {
        spoken.send(post(stream, CHAT, "{}"));
        let answer = spoken.answer(stream);
        assert_eq!((answer.status, answer.end, answer.body.len()), (200, End::Complete, 1 << 20));
    }
    assert_eq!(connect(&front, &["http/1.1"]).send(get1("/health")).answer().status, 200);
    // Who names nothing may still begin with the preface.
    let mut unnamed = Client::on(connect(&front, &[])).greet(&[]);
    assert_eq!(unnamed.send(get(1, "/health")).answer(1).status, 200);
    // Who agreed on HTTP/2 and says something else is let go.
    let mut confused = connect(&front, &["h2"]);
    confused.send(get1("/health"));
    assert!(!matches!(confused.closes(), client::End::Complete));
    let front = with(Http2::Off);
    assert_eq!(connect(&front, &["h2", "http/1.1"]).protocol(), Some(&b"http/1.1"[..]));
    assert!(client::Client::connect(front.addr).encrypt(pki::client(&["h2"])).is_err(), "nothing in common");
}

#[test]
fn http2_can_be_switched_off() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let listen = ListenSettings { http2: Http2::Off, ..ListenSettings::default() };
    let front = Front::with(&engine, ProxySettings { listen, ..settings() }, Timings::default());
    assert_eq!(client::Client::ask(front.addr, [PREFACE, &h2::settings(&[])].concat()).status, 400);
    assert_eq!(client::Client::ask(front.addr, get1("/health")).status, 200);
}

// ------------------------------------------------------------------ clients that leave

#[test]
fn d04_a_stream_that_is_reset_frees_its_place_wherever_it_is() {
    let engine = Engine::start(|connection| {
        let head = connection.request().unwrap_or_default();
        if head.contains("x-stream") {
            connection.send(EVENTS);
            connection.send(chunk("data: one\n\n"));
        }
        connection.until_closed();
    });
    let limits = ProxySettings { max: 2, queue_timeout_ms: 600_000, ..settings() };
    let front = Front::with(&engine, limits, Timings::default());
    let mut client = Client::connect(front.addr);
    client.send(headers(1, 0, &fields(CHAT, &[("x-stream", "1")]))).send(frame(DATA, END_STREAM, 1, "{}"));
    client.until_text(1, "data: one");
    client.send(post(3, "/v1/embeddings", "{}"));
    eventually("both are with the engine", || engine.requests() == 2);
    client.send(post(5, CHAT, &"x".repeat(100_000)));
    front.holds(2, 1);
    // In the queue, in prefill, in mid-stream.
    for (stream, in_flight, closed) in [(5, 2, 0), (3, 1, 1), (1, 0, 2)] {
        client.send(reset(stream, CANCEL));
        front.holds(in_flight, 0);
        eventually("the engine's connection is closed", || engine.closed() == closed);
    }
    assert_eq!(engine.requests(), 2, "a request that was given up in the queue reached the engine");
    assert_eq!(front.metric("sglangd_client_aborts_total"), Some(3.0));
    assert_eq!(front.proxy.traffic().open_answers, 0);
    assert!(client.is_alive());
}

#[test]
fn d04_a_connection_that_goes_takes_all_its_streams_with_it() {
    for how in ["fin", "rst", "drop"] {
        let engine = thinking();
        let front = Front::with(&engine, ProxySettings { max: 2, ..settings() }, Timings::default());
        let mut client = Client::connect(front.addr);
        for stream in [1, 3, 5] {
            client.send(post(stream, CHAT, "{}"));
        }
        front.holds(2, 1);
        let half_open = match how {
            "fin" => {
                client.fin();
                Some(client)
            }
            "rst" => {
                client.rst();
                None
            }
            _ => {
                drop(client);
                None
            }
        };
        front.holds(0, 0);
        eventually("the engine's connections are closed", || engine.closed() == 2);
        assert_eq!(engine.connections(), 2, "a place that became free was taken by one who had left");
        assert_eq!(front.metric("sglangd_client_aborts_total"), Some(3.0), "{how}");
        eventually("the connection is gone", || front.metric("sglangd_http2_connections") == Some(0.0));
        drop(half_open);
    }
}

// ------------------------------------------------------------------ answers that break off

#[test]
fn d02_a_stream_whose_engine_dies_ends_in_its_event_and_a_reset() {
    let engine = Engine::start(|connection| {
        let head = connection.request().unwrap();
        connection.send(if head.contains("embeddings") {
            "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\ndata: one\n\n"
        } else {
            EVENTS
        });
        connection.send(chunk("data: one\n\n"));
        connection.close();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(1, CHAT, "{}"));
    let answer = client.answer(1);
    assert_eq!(answer.end, End::Reset(INTERNAL_ERROR));
    let text = answer.text();
    assert!(text.starts_with("data: one\n\n\n\ndata: {\"error\":") && !text.contains("[DONE]"), "{text}");
    client.send(post(3, "/v1/embeddings", "{}"));
    let answer = client.answer(3);
    assert!(answer.text().starts_with("data: one\n\n"), "what had come is not lost");
    assert_eq!(answer.end, End::Reset(INTERNAL_ERROR));
    // The connection is not to blame.
    client.send(get(5, "/health"));
    assert_eq!(client.answer(5).status, 200);
    assert!(client.goaways.is_empty());
}

#[test]
fn d02_a_cut_reaches_a_reader_that_gives_no_window_too() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(EVENTS);
        connection.send(chunk(vec![b'x'; 200_000]));
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let mut client = Client::with(front.addr, &[(INITIAL_WINDOW_SIZE, 10)]).starved();
    client.send(post(1, CHAT, "{}"));
    client.until(|frame| frame.kind == DATA && frame.payload.len() == 10).unwrap();
    front.proxy.cut_streams("the node is going down".into());
    front.holds(0, 0);
    assert_eq!(client.answer(1).end, End::Reset(INTERNAL_ERROR));
}

#[test]
fn d02_a_cut_by_us_is_told_to_each_stream_of_a_connection() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(EVENTS);
        connection.send(chunk("data: one\n\n"));
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    for stream in [1, 3] {
        client.send(post(stream, CHAT, "{}"));
    }
    for stream in [1, 3] {
        client.until_text(stream, "data: one");
    }
    front.proxy.cut_streams("the node is going down".into());
    for stream in [1, 3] {
        let answer = client.answer(stream);
        assert!(answer.text().contains("the node is going down") && !answer.text().contains("[DONE]"));
        assert_eq!(answer.end, End::Reset(INTERNAL_ERROR));
    }
    eventually("the engine's connections are closed", || engine.closed() == 2);
}

#[test]
fn d05_a_stream_that_waits_is_kept_alive_and_a_late_refusal_is_an_event() {
    let (engine, release) = stepped(|connection, gate| {
        connection.request();
        gate.pass();
        connection.send(json("400 Bad Request", "{\"message\":\"too long\"}"));
    });
    let timings = Timings { keep_alive: Duration::from_millis(50), ..Timings::default() };
    let front = Front::with(&engine, settings(), timings);
    let mut client = Client::connect(front.addr);
    client.send(post(1, CHAT, "{\"stream\":true}"));
    client.until_text(1, ": keep-alive\n\n: keep-alive");
    release.send(()).unwrap();
    let answer = client.answer(1);
    assert!(answer.text().contains("too long") && !answer.text().contains("[DONE]"), "{}", answer.text());
    assert_eq!(answer.end, End::Reset(INTERNAL_ERROR));
    front.holds(0, 0);
}

#[test]
fn e02_a_websocket_over_http2_is_refused_in_words() {
    let engine = thinking();
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(get(1, "/v1/realtime"));
    let answer = client.answer(1);
    assert_eq!((answer.status, answer.end), (400, End::Complete));
    assert!(answer.text().contains("WebSocket"), "{}", answer.text());
    assert_eq!(engine.connections(), 0);
}

// ------------------------------------------------------------------ clocks

#[test]
fn a_connection_without_streams_is_closed_in_time_and_one_with_a_stream_is_not() {
    let engine = thinking();
    let timings = patience(|patience| patience.idle = Duration::from_millis(200));
    let front = Front::with(&engine, settings(), timings);
    let mut busy = Client::connect(front.addr);
    busy.send(post(1, CHAT, "{}"));
    front.holds(1, 0);
    let mut idle = Client::connect(front.addr);
    assert_eq!(idle.goodbye(), Goodbye::Goaway(0, NO_ERROR));
    assert!(busy.is_quiet(Duration::from_millis(400)));
    assert!(busy.is_alive());
    assert!(busy.goaways.is_empty());
    front.holds(1, 0);
}

#[test]
fn a_client_that_answers_no_ping_is_gone() {
    let engine = thinking();
    let timings = patience(|patience| {
        patience.idle = Duration::from_millis(300);
        patience.write = Duration::from_millis(200);
    });
    let front = Front::with(&engine, settings(), timings);
    let mut alive = Client::connect(front.addr);
    alive.send(post(1, CHAT, "{}"));
    let mut dead = Client::connect(front.addr);
    dead.send(post(1, CHAT, "{}"));
    front.holds(2, 0);
    // Who answers pings is kept, however long the engine thinks.
    for _ in 0..5 {
        let ping = alive.until(|frame| frame.kind == PING && frame.flags & h2::ACK == 0);
        assert!(ping.is_some(), "a client that answers was let go");
    }
    front.holds(1, 0);
    eventually("the other's connection is gone", || front.metric("sglangd_http2_connections") == Some(1.0));
}

#[test]
fn a_head_that_does_not_come_whole_ends_the_connection() {
    let engine = thinking();
    let timings = patience(|patience| patience.head = Duration::from_millis(200));
    let front = Front::with(&engine, settings(), timings);
    let block = hpack::block(&fields(CHAT, &[]));
    let open = frame(HEADERS, END_STREAM, 1, &block);
    let cut = headers(1, END_STREAM, &fields(CHAT, &[]))[..20].to_vec();
    for (what, bytes) in [("no CONTINUATION", open), ("half a frame", cut)] {
        let mut client = Client::connect(front.addr);
        client.send(bytes);
        assert_eq!(client.goodbye_reason(), Some(ENHANCE_YOUR_CALM), "{what}");
    }
    // Who says heads in pieces but says them is not slow.
    let mut client = Client::connect(front.addr);
    for n in 0..8 {
        let stream = 2 * n + 1;
        client.send(frame(HEADERS, END_STREAM, stream, &block[..10]));
        assert!(client.is_quiet(Duration::from_millis(50)), "head {n}");
        client.send(frame(CONTINUATION, END_HEADERS, stream, &block[10..]));
    }
    assert!(client.is_alive());
    // Not even the preface: until it is whole it might be a slow head of HTTP/1.
    let mut client = client::Client::connect(front.addr);
    assert_eq!(client.send(&PREFACE[..10]).answer().status, 408);
}

#[test]
fn a_body_that_stops_coming_is_a_408_of_its_stream() {
    let engine = Engine::start(Connection::until_closed);
    let timings = patience(|patience| patience.body = Duration::from_millis(200));
    let front = Front::with(&engine, settings(), timings);
    let mut client = Client::connect(front.addr);
    client.send(headers(1, 0, &fields(CHAT, &[("content-length", "100")]))).send(frame(DATA, 0, 1, "{"));
    let answer = client.answer(1);
    assert_eq!((answer.status, answer.code().as_str()), (408, "body_timeout"));
    front.holds(0, 0);
    eventually("the engine's connection is closed", || engine.closed() == 1);
    assert!(client.is_alive());
}

#[test]
fn bodies_that_wait_for_a_place_do_not_stop_the_one_that_has_it() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(json("200 OK", "{}"));
        connection.until_closed();
    });
    let limits = ProxySettings { max: 1, queue: 64, queue_timeout_ms: 600_000, ..settings() };
    let front = Front::with(&engine, limits, Timings::default());
    let mut client = Client::connect(front.addr);
    // The first has the only place and says nothing yet; the others fill their windows.
    client.send(headers(1, 0, &fields(CHAT, &[])));
    front.holds(1, 0);
    for stream in (3..43).step_by(2) {
        client.send(headers(stream, 0, &fields(CHAT, &[])));
        for _ in 0..16 {
            client.send(frame(DATA, 0, stream, vec![b'x'; 16_384]));
        }
    }
    front.holds(1, 20);
    client.send(frame(DATA, END_STREAM, 1, vec![b'x'; 16_384]));
    assert_eq!(client.answer(1).status, 200);
}
