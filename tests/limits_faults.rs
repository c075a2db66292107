//! Group F, limits: how many pass, who waits how long, and what is too large.

use crate::harness::client::{Client, End, post, post_with};
use crate::harness::engine::{Engine, json};
use crate::harness::front::{Front, eventually, keys_file, settings};
use sglangd::link::ProxySettings;

const CHAT: &str = "/v1/chat/completions";

#[test]
fn f01_beyond_max_requests_wait_and_pass_in_order() {
    let (engine, release) = Engine::held();
    let front = Front::tuned(&engine, |settings| settings.max = 1);
    let mut clients = Vec::new();
    for n in 0..4 {
        let mut client = Client::connect(front.addr);
        client.send(post_with(CHAT, &format!("X-Request-Id: n{n}\r\n"), "{}"));
        front.holds(1, n);
        clients.push(client);
    }
    assert_eq!(engine.requests(), 1, "more than max reached the engine");
    for (n, client) in clients.iter_mut().enumerate() {
        release.send(()).unwrap();
        let answer = client.answer();
        assert_eq!((answer.status, answer.header("x-request-id")), (200, Some(format!("n{n}").as_str())));
        let position = answer.header("x-sglangd-queue-position").map(str::to_owned);
        assert_eq!(position, (n > 0).then(|| n.to_string()));
        eventually("the next one is admitted", || engine.requests() == (n + 2).min(4));
        let ids = engine.text(0);
        assert!(ids.rfind(&format!("n{}", (n + 1).min(3))).is_some(), "out of order: {ids}");
    }
    assert_eq!(front.metric("sglangd_queue_wait_seconds_count"), Some(4.0));
    front.holds(0, 0);
}

#[test]
fn f02_a_full_queue_is_refused_with_a_measured_retry_after() {
    let (engine, release) = Engine::held();
    let front = Front::tuned(&engine, |settings| (settings.max, settings.queue) = (1, 1));
    let mut first = Client::connect(front.addr);
    first.send(post(CHAT, "{}"));
    front.holds(1, 0);
    let mut second = Client::connect(front.addr);
    second.send(post(CHAT, "{}"));
    front.holds(1, 1);
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (503, "queue_full"));
    assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(answer.json()["error"]["type"], "overloaded_error");
    for client in [&mut first, &mut second] {
        release.send(()).unwrap();
        assert_eq!(client.answer().status, 200);
    }
}

#[test]
fn f02_a_deadline_shorter_than_the_measured_wait_is_refused_at_once() {
    let (engine, release) = Engine::held();
    let front = Front::tuned(&engine, |settings| settings.max = 1);
    let mut first = Client::connect(front.addr);
    first.send(post(CHAT, "{}"));
    front.holds(1, 0);
    // What the engine needs for one request is measured: a little more than this.
    assert_eq!(Client::ask(front.addr, post_with(CHAT, "X-Request-Deadline: 0.3\r\n", "{}")).status, 504);
    release.send(()).unwrap();
    assert_eq!(first.answer().status, 200);
    first.send(post(CHAT, "{}"));
    front.holds(1, 0);
    let answer = Client::ask(front.addr, post_with(CHAT, "X-Request-Deadline: 0.1\r\n", "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (503, "deadline_too_short"));
    assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    release.send(()).unwrap();
    assert_eq!(first.answer().status, 200);
    assert_eq!(engine.requests(), 2);
}

fn with_key(key: &str, id: &str) -> String {
    post_with(CHAT, &format!("X-Api-Key: {key}\r\nX-Request-Id: {id}\r\n"), "{}")
}

#[test]
fn f02_a_keys_own_limits_are_a_429_of_that_key_alone() {
    let (engine, release) = Engine::held();
    let keys = keys_file(&[
        ("small", "s", "concurrency=1 queue=1"),
        ("none", "n", "concurrency=1 queue=0"),
        ("free", "f", ""),
    ]);
    let front = Front::tuned(&engine, |settings| {
        (settings.keys_file, settings.queue_timeout_ms) = (Some(keys.path().to_owned()), 400);
    });
    let mut open: Vec<Client> = Vec::new();
    for key in ["s", "n"] {
        let mut client = Client::connect(front.addr);
        client.send(with_key(key, key));
        open.push(client);
        front.holds(open.len(), 0);
    }
    let mut waits = Client::connect(front.addr);
    waits.send(with_key("s", "waits"));
    front.holds(2, 1);
    for key in ["s", "n"] {
        let answer = Client::ask(front.addr, with_key(key, "refused"));
        assert_eq!((answer.status, answer.code().as_str()), (429, "key_queue_full"), "{key}");
        assert_eq!(answer.json()["error"]["type"], "rate_limit_error");
        assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    }
    assert_eq!(front.metric("sglangd_key_requests_waiting{key=\"small\"}"), Some(1.0));
    assert_eq!(front.metric("sglangd_key_places_open{key=\"none\"}"), Some(1.0));
    let mut free = Client::connect(front.addr);
    free.send(with_key("f", "free"));
    front.holds(3, 1);
    let answer = waits.answer();
    assert_eq!((answer.status, answer.code().as_str()), (429, "key_queue_timeout"));
    for client in open.iter_mut().chain([&mut free]) {
        release.send(()).unwrap();
        eventually("one is answered", || front.proxy.traffic().in_flight < 3);
        let _ = client;
    }
    assert!(open.iter_mut().chain([&mut free]).all(|client| client.answer().status == 200));
    assert_eq!(engine.requests(), 3);
}

#[test]
fn f03_a_flood_of_one_key_waits_while_anothers_single_call_passes_next() {
    let (engine, release) = Engine::held();
    let keys = keys_file(&[("flood", "f", ""), ("single", "s", "")]);
    let front = Front::tuned(&engine, |settings| {
        (settings.keys_file, settings.max, settings.queue) = (Some(keys.path().to_owned()), 1, 8);
    });
    let mut flood = Vec::new();
    for n in 0..9 {
        let mut client = Client::connect(front.addr);
        client.send(with_key("f", &format!("flood-{n}")));
        front.holds(1, n);
        flood.push(client);
    }
    assert_eq!(Client::ask(front.addr, with_key("f", "too-many")).code(), "queue_full");
    // The queue is full of the flood, and the other key still gets in: the flood's youngest makes room.
    let mut single = Client::connect(front.addr);
    single.send(with_key("s", "the-single-one"));
    let displaced = flood.pop().unwrap().answer();
    assert_eq!((displaced.status, displaced.code().as_str()), (429, "key_queue_full"));
    assert!(displaced.header("retry-after").is_some());
    release.send(()).unwrap();
    assert_eq!(flood.remove(0).answer().status, 200);
    eventually("the next is with the engine", || engine.requests() == 2);
    release.send(()).unwrap();
    let answer = single.answer();
    assert_eq!((answer.status, answer.header("x-sglangd-queue-position")), (200, Some("2")));
    for mut client in flood {
        release.send(()).unwrap();
        assert_eq!(client.answer().status, 200);
    }
}

#[test]
fn a_request_that_makes_several_answers_takes_as_many_places() {
    let (engine, release) = Engine::held();
    let front = Front::tuned(&engine, |settings| settings.max = 4);
    let mut large = Client::connect(front.addr);
    large.send(post("/v1/completions", r#"{"prompt": ["a", "b", "c"], "stream": true}"#));
    front.holds(3, 0);
    let mut small = Client::connect(front.addr);
    small.send(post(CHAT, r#"{"n": 1}"#));
    front.holds(4, 0);
    let mut all = Client::connect(front.addr);
    all.send(post(CHAT, r#"{"messages": [], "n": 64}"#));
    front.holds(4, 1);
    release.send(()).unwrap();
    release.send(()).unwrap();
    assert_eq!((large.answer().status, small.answer().status), (200, 200));
    front.holds(4, 0);
    release.send(()).unwrap();
    assert_eq!(all.answer().status, 200);
    front.holds(0, 0);
}

#[test]
fn f02_a_wait_has_an_end() {
    let (engine, _release) = Engine::held();
    let front = Front::tuned(&engine, |settings| (settings.max, settings.queue_timeout_ms) = (1, 100));
    let mut first = Client::connect(front.addr);
    first.send(post(CHAT, "{}"));
    front.holds(1, 0);
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (503, "queue_timeout"));
    assert!(answer.header("retry-after").is_some());
    assert_eq!(engine.requests(), 1);
}

#[test]
fn f04_a_body_that_is_too_large_is_refused_by_length_before_it_is_read() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::tuned(&engine, |settings| settings.max_body = 1000);
    let mut client = Client::connect(front.addr);
    let answer = client.send(format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n")).answer();
    assert_eq!((answer.status, answer.header("connection")), (413, Some("close")));
    assert_eq!(client.closes(), End::Broken);
    assert_eq!(engine.connections(), 0);
    assert_eq!(Client::ask(front.addr, post(CHAT, &"x".repeat(1000))).status, 200);
}

#[test]
fn f04_a_chunked_body_is_cut_where_it_grows_too_large() {
    let engine = Engine::start(|connection| {
        connection.head();
        connection.until_closed();
    });
    let front = Front::tuned(&engine, |settings| settings.max_body = 1000);
    let mut client = Client::connect(front.addr);
    client.send(format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"));
    for _ in 0..3 {
        client.send(format!("190\r\n{}\r\n", "x".repeat(400)));
    }
    let answer = client.answer();
    assert_eq!((answer.status, answer.header("connection")), (413, Some("close")));
    eventually("the engine's connection is closed", || engine.closed() == 1);
    assert!(engine.text(0).matches('x').count() < 1100 && !engine.text(0).ends_with("0\r\n\r\n"));
    front.holds(0, 0);
}

/// Whatever a body is, the engine gets it as it came, and its one place.
#[test]
fn f05_bodies_that_cannot_be_understood_pass_unchanged() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::tuned(&engine, |settings| (settings.max, settings.max_body) = (2, 16 << 20));
    let deep = |levels: usize| format!(r#"{{"n": 2, "a": {}1{}}}"#, "[".repeat(levels), "]".repeat(levels));
    let utf16: Vec<u8> = r#"{"n": 2, "stream": true}"#.encode_utf16().flat_map(u16::to_le_bytes).collect();
    for body in [
        deep(100_000).as_bytes(),
        format!(r#"{{"prompt": "{}", "n": 2}}"#, "x\\\"".repeat(3_500_000)).as_bytes(),
        br#"{"stream": true, "stream": false, "n": 2}"#,
        br#"{"stream": "true"}"#,
        b"\xef\xbb\xbf{\"n\": 2}",
        b"\xff\xfe\x00\x80 no text at all",
        br#"{"n": 2"#,
        br#"{"n": "2"}"#,
        &utf16,
    ] {
        let mut request =
            format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
        request.extend_from_slice(body);
        assert_eq!(Client::ask(front.addr, &request).status, 200);
        let arrived: Vec<u8> = engine.arrived().into_iter().flat_map(|connection| connection.bytes).collect();
        assert!(arrived.ends_with(body), "the engine got {} other bytes", arrived.len());
        front.holds(0, 0);
    }
}

#[test]
fn f12_a_deadline_that_passes_in_the_queue_is_a_504_and_never_reaches_the_engine() {
    let (engine, release) = Engine::held();
    let front = Front::tuned(&engine, |settings| settings.max = 1);
    let mut first = Client::connect(front.addr);
    first.send(post(CHAT, "{}"));
    front.holds(1, 0);
    let answer = Client::ask(front.addr, post_with(CHAT, "X-Request-Deadline: 0.1\r\n", "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (504, "deadline_exceeded"));
    release.send(()).unwrap();
    assert_eq!(first.answer().status, 200);
    front.holds(0, 0);
    assert_eq!(engine.requests(), 1);
}

#[test]
fn limits_change_while_requests_wait() {
    let (engine, release) = Engine::held();
    let mut front = Front::tuned(&engine, |settings| settings.max = 1);
    let mut clients: Vec<Client> = (0..3).map(|_| Client::connect(front.addr)).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client.send(post(CHAT, "{}"));
        front.holds(1, n);
    }
    front.proxy.settings(ProxySettings { max: 3, ..settings() }).unwrap();
    front.holds(3, 0);
    for _ in 0..3 {
        release.send(()).unwrap();
    }
    assert!(clients.iter_mut().all(|client| client.answer().status == 200));
}

#[test]
fn many_clients_on_several_workers_lose_nothing() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::tuned(&engine, |settings| (settings.workers, settings.max, settings.queue) = (3, 4, 1000));
    let addr = front.addr;
    let clients: Vec<_> = (0..12)
        .map(|_| {
            std::thread::spawn(move || {
                let mut client = Client::connect(addr);
                (0..50).filter(|_| client.send(post(CHAT, "{}")).answer().status == 200).count()
            })
        })
        .collect();
    let answered: usize = clients.into_iter().map(|client| client.join().unwrap()).sum();
    assert_eq!(answered, 600);
    assert!(engine.connections() <= 4 * 3 + 4, "{} connections for 4 places", engine.connections());
    front.holds(0, 0);
    assert_eq!(front.proxy.traffic().served, 600);
}
