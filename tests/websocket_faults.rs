//! Group E: WebSockets. A tunnel is the engine's 101 and nothing else, and it is a request like others.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use proptest::prelude::*;
use sglangd::link::ProxySettings;
use sglangd::proxy::{Patience, Timings};

use crate::harness::client::{Client, End, get, head, post};
use crate::harness::engine::{Connection, Engine, json};
use crate::harness::front::{Front, eventually, keys_file, settings};

/// The RFC's example, so that its answer is known.
const KEY: &str = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
const UPGRADE: &str = "Host: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n";
const VERSION: &str = "Sec-WebSocket-Version: 13\r\n";
const ACCEPTED: &str = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
    sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nsec-websocket-protocol: realtime\r\n\r\n";
const TEXT: u8 = 0x81;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;

fn asking(more: &str) -> String {
    head("GET /v1/realtime?model=m HTTP/1.1", &format!("{UPGRADE}{VERSION}{KEY}{more}"))
}

/// A frame as a server sends it.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match payload.len() {
        length @ 0..126 => frame.push(length as u8),
        length @ 126..65536 => frame.extend([&[126][..], &(length as u16).to_be_bytes()].concat()),
        length => frame.extend([&[127][..], &(length as u64).to_be_bytes()].concat()),
    }
    frame.extend_from_slice(payload);
    frame
}

/// A frame as a client sends it: with a mask, here of zeros.
fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = frame(first, payload);
    let header = frame.len() - payload.len();
    frame[1] |= 0x80;
    frame.splice(header..header, [0; 4]);
    frame
}

fn goodbye(code: u16) -> [u8; 2] {
    code.to_be_bytes()
}

/// An engine that opens each WebSocket and then does as it is told.
fn opening(then: impl Fn(&mut Connection) + Send + Sync + 'static) -> Engine {
    Engine::start(move |connection| {
        if connection.request().is_some() {
            connection.send(ACCEPTED);
            then(connection);
        }
    })
}

/// The same, step by step as the test releases them.
fn stepped(then: impl Fn(&mut Connection, &Receiver<()>) + Send + Sync + 'static) -> (Engine, Sender<()>) {
    let (release, gate) = channel();
    let gate = Mutex::new(gate);
    (opening(move |connection| then(connection, &gate.lock().unwrap())), release)
}

/// Sends back what comes, byte for byte.
fn echo(connection: &mut Connection) {
    loop {
        let byte = connection.take(1);
        if byte.is_empty() {
            return;
        }
        connection.send(byte);
    }
}

/// A client whose WebSocket is open.
fn opened(front: &Front) -> Client {
    let mut client = Client::connect(front.addr);
    client.send(asking("")).until("\r\n\r\n");
    let answer = client.answer();
    assert_eq!(answer.status, 101, "{}", answer.head);
    client
}

/// The closing frame that comes next: its code.
fn closing(client: &mut Client) -> u16 {
    let header = client.take(2);
    assert_eq!(header[0], CLOSE, "no closing frame but {header:?}");
    let payload = client.take(usize::from(header[1]));
    u16::from_be_bytes([payload[0], payload[1]])
}

fn with(engine: &Engine, timings: Timings) -> Front {
    Front::with(engine, ProxySettings { max: 1, ..settings() }, timings)
}

#[test]
fn a_websocket_is_asked_for_and_answered_in_the_engines_words() {
    let engine = opening(echo);
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    // What a client says behind its request is not lost, and neither is a large message.
    let message = masked(TEXT, &vec![b'x'; 100_000]);
    client.send([asking("Sec-WebSocket-Protocol: realtime\r\n").as_bytes(), &masked(TEXT, b"early")].concat());
    let answer = client.answer();
    assert_eq!((answer.status, answer.header("sec-websocket-accept")), (101, Some("s3pplmbitxaq9kygzzhzrbk+xoo=")));
    assert_eq!((answer.header("upgrade"), answer.header("connection")), (Some("websocket"), Some("upgrade")));
    assert_eq!(answer.header("sec-websocket-protocol"), Some("realtime"));
    assert!(answer.header("x-request-id").is_some() && answer.header("transfer-encoding").is_none());
    assert_eq!(client.take(11), masked(TEXT, b"early"));
    assert!(client.send(&message).take(message.len()) == message);
    let asked = engine.text(0).to_lowercase();
    assert!(asked.starts_with("get /v1/realtime?model=m http/1.1\r\n"), "{asked}");
    for field in
        ["\r\nconnection: upgrade\r\n", "\r\nupgrade: websocket\r\n", "\r\nsec-websocket-protocol: realtime\r\n"]
    {
        assert_eq!(asked.matches(field).count(), 1, "{field}: {asked}");
    }
    assert_eq!(front.metric("sglangd_requests_total{route=\"/v1/realtime\",status=\"1xx\"}"), Some(1.0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
    #[test]
    fn any_bytes_pass_both_ways_however_they_are_cut(
        pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..3000), 1..6),
    ) {
        let engine = opening(echo);
        let front = Front::of(&engine);
        let mut client = opened(&front);
        for piece in &pieces {
            client.send(piece);
        }
        let sent = pieces.concat();
        prop_assert_eq!(client.take(sent.len()), sent);
    }
}

#[test]
fn e01_an_engine_that_refuses_leaves_the_connection_to_http() {
    for status in ["403 Forbidden", "404 Not Found", "200 OK"] {
        let engine = Engine::answering(json(status, "{\"detail\":\"no\"}"));
        let front = with(&engine, Timings::default());
        let mut client = Client::connect(front.addr);
        for _ in 0..2 {
            let answer = client.send(asking("")).answer_to("GET");
            assert_eq!(
                (answer.status.to_string().as_str(), answer.text().as_str()),
                (&status[..3], "{\"detail\":\"no\"}")
            );
        }
        front.holds(0, 0);
        assert_eq!(client.send(get("/health")).answer().status, 200);
        assert_eq!(client.send(post("/v1/embeddings", "{}")).answer().status.to_string(), status[..3]);
        assert_eq!(engine.connections(), 1, "the connection to the engine was not used again");
    }
}

#[test]
fn e01_a_101_that_answers_no_question_of_this_client_is_no_tunnel() {
    let accepted = ACCEPTED.to_owned();
    for answer in [
        accepted.replace("s3pP", "s3pQ"),
        accepted.replace("sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n", ""),
        accepted.replace("upgrade: websocket\r\n", ""),
        accepted.replace("upgrade: websocket", "upgrade: h2c"),
    ] {
        let engine = Engine::start(move |connection| {
            connection.request();
            connection.send(&answer);
            connection.send(frame(TEXT, b"secret"));
            connection.until_closed();
        });
        let front = with(&engine, Timings::default());
        let mut client = Client::connect(front.addr);
        let answer = client.send(asking("")).answer_to("GET");
        assert_eq!((answer.status, answer.code().as_str()), (502, "engine_broken"));
        assert!(!answer.text().contains("secret"));
        eventually("the engine's connection is closed", || engine.closed() == 1);
        front.holds(0, 0);
        assert_eq!(client.send(get("/health")).answer().status, 200);
    }
}

#[test]
fn e02_what_is_no_opening_handshake_never_reaches_the_engine() {
    let engine = opening(echo);
    let front = Front::of(&engine);
    let line = "GET /v1/realtime HTTP/1.1";
    let long = KEY.replace("==", "===");
    for (line, fields, status) in [
        (line, "Host: a\r\n".to_owned(), 426),
        (line, format!("Host: a\r\nConnection: upgrade\r\n{VERSION}{KEY}"), 426),
        (line, format!("Host: a\r\nUpgrade: websocket\r\n{VERSION}{KEY}"), 426),
        (line, format!("Host: a\r\nConnection: upgrade\r\nUpgrade: h2c\r\n{VERSION}{KEY}"), 426),
        (line, format!("{UPGRADE}{KEY}"), 426),
        (line, format!("{UPGRADE}{KEY}Sec-WebSocket-Version: 8\r\n"), 426),
        (line, format!("{UPGRADE}{KEY}{VERSION}{VERSION}"), 426),
        (line, format!("{UPGRADE}{VERSION}"), 400),
        (line, format!("{UPGRADE}{VERSION}{KEY}{KEY}"), 400),
        (line, format!("{UPGRADE}{VERSION}{long}"), 400),
        (line, format!("{UPGRADE}{VERSION}Sec-WebSocket-Key: short\r\n"), 400),
        (line, format!("{UPGRADE}{VERSION}{KEY}Content-Length: 3\r\n"), 400),
        (line, format!("{UPGRADE}{VERSION}{KEY}Transfer-Encoding: chunked\r\n"), 400),
        ("GET /v1/realtime HTTP/1.0", format!("{UPGRADE}{VERSION}{KEY}"), 400),
        ("POST /v1/realtime HTTP/1.1", format!("{UPGRADE}{VERSION}{KEY}"), 405),
    ] {
        let answer = Client::connect(front.addr).send(head(line, &fields)).answer_to("GET");
        assert_eq!(answer.status, status, "{line} {fields:?}: {}", answer.head);
        if status == 426 {
            assert_eq!(
                (answer.header("upgrade"), answer.header("sec-websocket-version")),
                (Some("websocket"), Some("13"))
            );
        }
    }
    assert_eq!(engine.connections(), 0);
    front.holds(0, 0);
}

#[test]
fn a_websocket_asks_for_a_key_like_any_request() {
    let engine = opening(echo);
    let keys = keys_file(&[("ci", "secret", "")]);
    let front = Front::with(
        &engine,
        ProxySettings { keys_file: Some(keys.path().to_owned()), ..settings() },
        Timings::default(),
    );
    for fields in ["", "Authorization: Bearer wrong\r\n"] {
        assert_eq!(Client::connect(front.addr).send(asking(fields)).answer_to("GET").status, 401);
    }
    assert_eq!(engine.connections(), 0);
    let answer = Client::connect(front.addr).send(asking("Authorization: Bearer secret\r\n")).answer();
    assert_eq!(answer.status, 101);
    assert!(!engine.text(0).contains("secret"));
}

#[test]
fn e03_a_drain_says_1012_between_two_frames_and_passes_the_clients_answer() {
    let half = frame(TEXT, b"half and half");
    let (engine, release) = stepped(move |connection, gate| {
        connection.send(&half[..9]);
        gate.recv().unwrap();
        connection.send(&half[9..]);
        connection.send(frame(TEXT, b"too late"));
        let answer = connection.take(8);
        assert_eq!(answer, masked(CLOSE, &goodbye(1012)));
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let mut client = opened(&front);
    client.bytes(9);
    front.proxy.drain();
    assert!(client.is_quiet(Duration::from_millis(100)), "said in the middle of a frame");
    release.send(()).unwrap();
    assert_eq!(client.take(15), frame(TEXT, b"half and half"));
    assert_eq!(closing(&mut client), 1012);
    client.send(masked(CLOSE, &goodbye(1012)));
    assert_eq!(client.closes(), End::Broken);
    eventually("the engine's connection is closed", || engine.closed() == 1);
    front.holds(0, 0);
    assert_eq!(front.metric("sglangd_websockets"), Some(0.0));
    assert_eq!(front.proxy.traffic().open_answers, 0);
}

#[test]
fn e03_who_ignores_a_drain_is_closed_at_its_end() {
    let engine = opening(Connection::until_closed);
    let front = Front::of(&engine);
    let mut client = opened(&front);
    front.proxy.drain();
    assert_eq!(closing(&mut client), 1012);
    client.send(masked(TEXT, b"I stay"));
    assert!(client.is_quiet(Duration::from_millis(100)));
    assert_eq!(front.proxy.traffic().websockets, 1);
    front.proxy.cut_streams("the node is going down".into());
    assert_eq!(client.closes(), End::Broken);
    eventually("the engine's connection is closed", || engine.closed() == 1);
    front.holds(0, 0);
}

#[test]
fn e04_an_engine_that_dies_ends_the_clients_side() {
    for (bytes, code) in [(frame(TEXT, b"last"), Some(1011)), (frame(TEXT, b"last")[..4].to_vec(), None)] {
        for abruptly in [false, true] {
            let sent = bytes.clone();
            let (engine, release) = stepped(move |connection, gate| {
                connection.send(&sent);
                gate.recv().unwrap();
                if abruptly {
                    connection.reset();
                }
            });
            let front = Front::of(&engine);
            let mut client = opened(&front);
            assert_eq!(client.take(bytes.len()), bytes);
            release.send(()).unwrap();
            if let Some(code) = code {
                assert_eq!(closing(&mut client), code);
            }
            assert_eq!(client.closes(), End::Broken);
            front.holds(0, 0);
            assert_eq!(front.metric("sglangd_streams_interrupted_total"), Some(1.0));
        }
    }
}

#[test]
fn e04_an_engine_that_says_goodbye_is_not_corrected() {
    let engine = opening(|connection| {
        connection.send(frame(CLOSE, &goodbye(1000)));
        connection.take(8);
        connection.close();
    });
    let front = Front::of(&engine);
    let mut client = opened(&front);
    assert_eq!(closing(&mut client), 1000);
    client.send(masked(CLOSE, &goodbye(1000)));
    assert_eq!(client.closes(), End::Broken);
    assert!(client.seen().is_empty(), "something was said behind the goodbye");
    front.holds(0, 0);
    assert_eq!(front.metric("sglangd_streams_interrupted_total"), Some(0.0));
    assert_eq!(front.metric("sglangd_requests_served_total"), Some(1.0));
}

#[test]
fn e04_a_client_that_dies_ends_the_engines_side() {
    for abruptly in [false, true] {
        let engine = opening(Connection::until_closed);
        let front = Front::of(&engine);
        let client = opened(&front);
        front.holds(1, 0);
        if abruptly {
            client.rst();
        } else {
            drop(client);
        }
        eventually("the engine's connection is closed", || engine.closed() == 1);
        front.holds(0, 0);
        assert_eq!(front.metric("sglangd_client_aborts_total"), Some(1.0));
    }
}

fn impatient() -> Timings {
    let client = Patience { write: Duration::from_millis(300), ..Patience::default() };
    Timings { client, ..Timings::default() }
}

#[test]
fn e04_a_client_that_stops_reading_holds_the_engine_back_and_is_cut() {
    let engine = opening(|connection| {
        let message = frame(TEXT, &vec![b'x'; 1 << 20]);
        for _ in 0..64 {
            connection.send(&message);
            if connection.is_broken() {
                return;
            }
        }
    });
    let front = with(&engine, impatient());
    let _deaf = opened(&front);
    eventually("both sides are closed", || engine.broken() == 1);
    front.holds(0, 0);
    let passed = front.metric("sglangd_response_bytes_total").unwrap();
    assert!(passed < 32e6, "{passed} bytes were taken for a client that reads nothing");
    assert_eq!(front.metric("sglangd_streams_interrupted_total"), Some(1.0));
}

#[test]
fn e04_an_engine_that_stops_reading_holds_the_client_back_and_is_cut() {
    let (engine, release) = stepped(|connection, gate| {
        gate.recv().unwrap();
        connection.until_closed();
    });
    let front = with(&engine, impatient());
    let mut client = opened(&front);
    client.send_what_fits();
    front.holds(0, 0);
    let passed = front.metric("sglangd_request_bytes_total").unwrap();
    assert!(passed < 32e6, "{passed} bytes were taken for an engine that reads nothing");
    assert!(matches!(client.closes(), End::Broken | End::Reset));
    release.send(()).unwrap();
}

#[test]
fn e05_an_open_websocket_is_one_request_in_flight_for_all_its_life() {
    let engine = opening(echo);
    let front = with(&engine, Timings::default());
    let mut client = opened(&front);
    let mut queued = Client::connect(front.addr);
    queued.send(asking(""));
    front.holds(1, 1);
    assert_eq!(front.proxy.traffic().websockets, 1);
    for _ in 0..3 {
        client.send(masked(TEXT, b"hello")).take(11);
    }
    front.holds(1, 1);
    assert_eq!(front.metric("sglangd_websockets"), Some(1.0));
    assert_eq!(front.metric("sglangd_requests_in_flight"), Some(1.0));
    assert_eq!(front.metric("sglangd_open_answers"), Some(1.0));
    drop(client);
    assert_eq!(queued.until("\r\n\r\n").answer().status, 101);
    front.holds(1, 0);
    drop(queued);
    front.holds(0, 0);
    assert_eq!(front.metric("sglangd_websockets"), Some(0.0));
    assert_eq!(front.metric("sglangd_websockets_total"), Some(2.0));
    assert_eq!(front.metric("sglangd_open_answers"), Some(0.0));
}

#[test]
fn e05_a_websocket_in_which_only_heartbeats_pass_is_closed() {
    let (engine, release) = stepped(|connection, gate| {
        while gate.recv().is_ok() {
            connection.send(frame(PING, b""));
        }
        connection.until_closed();
    });
    let front = with(&engine, Timings { websocket_idle: Duration::from_millis(400), ..Timings::default() });
    let mut client = opened(&front);
    // Messages keep it open for longer than that.
    for _ in 0..8 {
        assert!(client.is_quiet(Duration::from_millis(80)), "closed in mid-conversation");
        client.send(masked(TEXT, b"x"));
    }
    let mut pings = 0;
    let code = loop {
        release.send(()).unwrap();
        client.send(masked(PING, b""));
        let header = client.take(2);
        if header[0] == CLOSE {
            let payload = client.take(usize::from(header[1]));
            break u16::from_be_bytes([payload[0], payload[1]]);
        }
        pings += 1;
        client.is_quiet(Duration::from_millis(20));
    };
    assert!(code == 1001 && pings > 2, "{code} after {pings} heartbeats");
    client.send(masked(CLOSE, &goodbye(1001)));
    assert_eq!(client.closes(), End::Broken);
    drop(release);
    eventually("the engine's connection is closed", || engine.closed() == 1);
    front.holds(0, 0);
}
