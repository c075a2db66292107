//! E01, E02: how a WebSocket is opened, and what is none.

use proptest::prelude::*;
use sglangd::link::{ListenSettings, ProxySettings};
use sglangd::proxy::Timings;

use super::{ACCEPTED, KEY, TEXT, UPGRADE, VERSION, asking, echo, frame, masked, opened, opening, with};
use crate::harness::client::{Client, get, head, post};
use crate::harness::engine::{Engine, json};
use crate::harness::front::{Front, eventually, keys_file, settings};
use crate::harness::http2;
use crate::harness::pki::{self, Folder, Pair};

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
fn e02_over_http2_there_is_no_upgrade() {
    let engine = opening(echo);
    let front = Front::of(&engine);
    let mut client = http2::Client::connect(front.addr);
    let answer = client.send(http2::get(1, "/v1/realtime")).answer(1);
    assert_eq!((answer.status, answer.code().as_str()), (400, "malformed_request"));
    assert!(answer.field("upgrade").is_none() && answer.field("connection").is_none());
    assert_eq!(engine.connections(), 0);
}

#[test]
fn a_websocket_passes_over_tls() {
    let engine = opening(echo);
    let files = Folder::with(&Pair::new());
    let listen = ListenSettings { tls: Some(files.files()), ..ListenSettings::default() };
    let front = Front::with(&engine, ProxySettings { listen, ..settings() }, Timings::default());
    let mut client = Client::connect(front.addr).encrypt(pki::client(&["http/1.1"])).unwrap();
    client.send([asking("").as_bytes(), &masked(TEXT, b"early")].concat());
    assert_eq!(client.answer().status, 101);
    assert_eq!(client.take(11), masked(TEXT, b"early"));
    let message = masked(TEXT, &vec![b'x'; 300_000]);
    assert!(client.send(&message).take(message.len()) == message);
    drop(client);
    front.holds(0, 0);
}
