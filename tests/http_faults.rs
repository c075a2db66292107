//! Group A: HTTP/1 parsing and smuggling, byte for byte against an engine that records what arrives.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sglangd::proxy::{Patience, Timings};

use crate::harness::client::{Client, End, get, head, post, post_with};
use crate::harness::engine::{Engine, json};
use crate::harness::front::{Front, eventually, settings};
use crate::harness::malformed::{self, chunked};

const CHAT: &str = "/v1/chat/completions";

/// The request is answered with `status` in JSON, the connection ends, nothing reaches the engine.
#[track_caller]
fn refused(request: impl AsRef<[u8]>, status: u16) {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let shown = String::from_utf8_lossy(request.as_ref()).chars().take(200).collect::<String>();
    let mut client = Client::connect(front.addr);
    let answer = client.send(request).answer();
    assert_eq!(answer.status, status, "{shown:?} → {}", answer.text());
    assert!(answer.json()["error"]["message"].is_string(), "{shown:?}");
    assert_eq!(answer.header("connection"), Some("close"), "{shown:?}");
    assert_eq!(client.closes(), End::Broken, "{shown:?}");
    assert_eq!(engine.connections(), 0, "{shown:?} reached the engine");
}

/// All requests of this row.
#[track_caller]
fn row_is_refused(row: &str) {
    for malformed in malformed::of(row) {
        refused(malformed.bytes, malformed.status);
    }
}

#[test]
fn a01_both_lengths_are_refused() {
    row_is_refused("A01");
}

#[test]
fn a02_a_length_that_two_could_read_differently_is_refused() {
    row_is_refused("A02");
}

#[test]
fn a03_an_unknown_or_malformed_coding_is_refused() {
    row_is_refused("A03");
}

#[test]
fn a04_a_coding_on_http_10_is_refused() {
    row_is_refused("A04");
}

#[test]
fn a05_an_http_10_body_without_length_is_refused() {
    row_is_refused("A05");
}

#[test]
fn a06_malformed_chunks_end_the_request() {
    let engine = Engine::start(|connection| {
        connection.head();
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let longer = format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(1025));
    for body in malformed::bodies().into_iter().chain([longer]) {
        let mut client = Client::connect(front.addr);
        let answer = client.send(chunked(&body)).answer();
        assert_eq!(answer.status, 400, "{:?}", &body[..body.len().min(40)]);
        assert_eq!(answer.header("connection"), Some("close"));
        assert_eq!(client.closes(), End::Broken);
    }
    front.holds(0, 0);
    eventually("the engine's connections are closed", || engine.closed() == engine.connections());
    for n in 0..engine.connections() {
        assert!(!engine.text(n).contains("\r\n0\r\n"), "a broken body looks complete: {:?}", engine.text(n));
    }
    // The budget of extensions is one KiB a body; what is within it is not passed on.
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let within = format!("2;{}\r\n{{}}\r\n0\r\n\r\n", "x".repeat(1024));
    assert_eq!(Client::ask(front.addr, chunked(&within)).status, 200);
    assert!(engine.text(0).ends_with("\r\n\r\n2\r\n{}\r\n0\r\n\r\n"), "{}", engine.text(0));
}

#[test]
fn a07_trailers_are_dropped() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let trailers = "Content-Length: 99\r\nAuthorization: Bearer x\r\nHost: evil\r\nConnection: close\r\n";
    assert_eq!(Client::ask(front.addr, chunked(&format!("2\r\n{{}}\r\n0\r\n{trailers}\r\n"))).status, 200);
    let text = engine.text(0).to_lowercase();
    assert!(!text.contains("evil") && !text.contains("bearer") && !text.contains("content-length"), "{text}");
    assert!(text.ends_with("2\r\n{}\r\n0\r\n\r\n"), "{text}");
}

#[test]
fn a08_odd_line_ends_and_control_characters_are_refused() {
    row_is_refused("A08");
}

#[test]
fn a09_an_upgrade_is_never_tunnelled_unasked() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let upgrade = post_with(CHAT, "Connection: upgrade\r\nUpgrade: foo\r\n", "{}");
    let mut client = Client::connect(front.addr);
    client.send(format!("{upgrade}{}", get("/server_info")));
    assert_eq!(client.answer().status, 200);
    assert_eq!(client.answer().status, 403, "the second request was tunnelled");
    assert!(!engine.text(0).to_lowercase().contains("upgrade"));

    let engine = Engine::answering("HTTP/1.1 101 Switching Protocols\r\nUpgrade: foo\r\nConnection: upgrade\r\n\r\n");
    let front = Front::of(&engine);
    assert_eq!(Client::ask(front.addr, &upgrade).status, 502);
}

#[test]
fn a10_continue_is_said_only_after_admission() {
    let (release, gate) = std::sync::mpsc::channel::<()>();
    let gate = std::sync::Mutex::new(gate);
    let engine = Engine::start(move |connection| {
        while connection.request().is_some() {
            gate.lock().unwrap().recv().unwrap();
            connection.send(json("200 OK", "{}"));
        }
    });
    let front = Front::with(&engine, sglangd::link::ProxySettings { max: 1, ..settings() }, Timings::default());
    let mut first = Client::connect(front.addr);
    first.send(post(CHAT, "{}"));
    front.holds(1, 0);
    let mut second = Client::connect(front.addr);
    second.send(format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"));
    front.holds(1, 1);
    assert!(second.is_quiet(Duration::from_millis(100)), "100 was said before there was a place");
    release.send(()).unwrap();
    assert_eq!(first.answer().status, 200);
    assert_eq!(second.answer().status, 100);
    release.send(()).unwrap();
    assert_eq!(second.send("{}").answer().status, 200);
    // Who sends its body at once need not be told to.
    second.send(format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{{}}"));
    release.send(()).unwrap();
    let mut answer = second.answer();
    if answer.status == 100 {
        answer = second.answer();
    }
    assert_eq!(answer.status, 200);
    assert!(engine.text(engine.connections() - 1).ends_with("\r\n\r\n{}"), "the body did not arrive");
    refused(format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nExpect: 200-maybe\r\nContent-Length: 2\r\n\r\n"), 417);
}

#[test]
fn a10_an_early_answer_closes_and_leaves_no_body_in_the_pipe() {
    let engine = Engine::start(|connection| {
        connection.head();
        connection.send(json("417 Expectation Failed", "{}"));
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1000\r\n\r\n"));
    let mut answer = client.answer();
    if answer.status == 100 {
        answer = client.answer();
    }
    assert_eq!((answer.status, answer.header("connection")), (417, Some("close")));
    assert_eq!(client.closes(), End::Broken);
}

#[test]
fn a11_a_connection_with_an_unread_body_carries_no_second_request() {
    let engine = Engine::start(|connection| {
        connection.head();
        connection.send(json("400 Bad Request", "{}"));
        connection.until_closed();
    });
    let front = Front::of(&engine);
    for n in 1..=2 {
        let mut client = Client::connect(front.addr);
        client.send(format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 500000\r\n\r\n{}", "x".repeat(1000)));
        let answer = client.answer();
        assert_eq!((answer.status, answer.header("connection")), (400, Some("close")));
        assert_eq!(client.send(get("/v1/models")).closes(), End::Broken);
        assert_eq!((engine.connections(), engine.requests()), (n, n), "a used connection was taken again");
    }
}

#[test]
fn a12_hosts_that_disagree_are_refused() {
    row_is_refused("A12");
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    assert_eq!(Client::ask(front.addr, head("GET http://a/v1/models HTTP/1.1", "Host: a\r\n")).status, 200);
    assert!(engine.text(0).starts_with("GET /v1/models HTTP/1.1\r\n"));
}

#[test]
fn a13_bodies_where_none_belong() {
    let engine = Engine::answering("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(head("HEAD /v1/models HTTP/1.1", "Host: a\r\n"));
    let answer = client.answer_to("HEAD");
    assert_eq!((answer.status, answer.header("content-length")), (200, Some("5")));
    // The body that HEAD must not have would be the next answer's beginning.
    assert_eq!(client.send(get("/v1/models")).answer().text(), "hello");
    assert_eq!(engine.connections(), 2, "a connection with a stray body was used again");

    for status in [204, 304] {
        let engine = Engine::answering(format!("HTTP/1.1 {status} No Body\r\nContent-Length: 5\r\n\r\nhello"));
        let front = Front::of(&engine);
        let mut client = Client::connect(front.addr);
        for n in 1..=2 {
            let answer = client.send(post(CHAT, "{}")).answer();
            assert_eq!((answer.status, answer.header("content-length"), answer.body.len()), (status, None, 0));
            assert_eq!(engine.connections(), n, "a connection with a stray body was used again");
        }
        eventually("both of the engine's connections are closed", || engine.closed() == 2);
    }

    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let request = "GET /v1/models HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody";
    assert_eq!(Client::ask(front.addr, request).status, 200);
    assert!(engine.text(0).ends_with("\r\n\r\nbody") && engine.text(0).contains("content-length: 4\r\n"));
}

#[test]
fn a14_an_ambiguous_path_is_refused() {
    row_is_refused("A14");
}

#[test]
fn a15_a_client_cannot_have_security_headers_stripped() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let fields = "Connection: authorization, x-api-key, x-kept, keep-alive\r\nAuthorization: Bearer k\r\nX-Api-Key: k\r\n\
                  X-Kept: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\nProxy-Connection: x\r\n";
    assert_eq!(Client::ask(front.addr, post_with(CHAT, fields, "{}")).status, 200);
    let text = engine.text(0);
    for kept in ["authorization: Bearer k\r\n", "x-api-key: k\r\n", "x-kept: 1\r\n"] {
        assert!(text.contains(kept), "{kept:?} was stripped: {text}");
    }
    for gone in ["keep-alive", "te:", "proxy-connection", "connection:"] {
        assert!(!text.contains(&format!("\r\n{gone}")), "{gone} was passed on: {text}");
    }
}

#[test]
fn a16_a_client_cannot_say_where_it_comes_from_or_who_it_is_to_the_log() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let long = "x".repeat(4000);
    let fields = format!("X-Forwarded-For: 1.2.3.4\r\nForwarded: for=1.2.3.4\r\nX-Request-Id: {long}\r\n");
    let answer = Client::ask(front.addr, post_with(CHAT, &fields, "{}"));
    let text = engine.text(0);
    assert!(!text.contains("1.2.3.4") && !text.contains(&long));
    assert!(text.contains("x-forwarded-for: 127.0.0.1\r\n"));
    let id = answer.header("x-request-id").unwrap();
    assert!(id.len() == 32 && text.contains(&format!("x-request-id: {id}\r\n")));
    let answer = Client::ask(front.addr, post_with(CHAT, "X-Request-Id: my-1.a_b\r\n", "{}"));
    assert_eq!(answer.header("x-request-id"), Some("my-1.a_b"));
    refused(post_with(CHAT, &format!("X-Request-Id: {}\r\n", "x".repeat(1 << 20)), "{}"), 431);

    let trace = |value: &str| {
        let engine = Engine::answering(json("200 OK", "{}"));
        let front = Front::of(&engine);
        assert_eq!(Client::ask(front.addr, post_with(CHAT, &format!("Traceparent: {value}\r\n"), "{}")).status, 200);
        engine.text(0).contains("traceparent:")
    };
    let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    assert!(trace(good), "a good one is the client's to say");
    for bad in [
        String::new(),
        good.to_uppercase(),
        good.replace('-', "_"),
        good.replace("00-", "ff-"),
        format!("00-{}-b7ad6b7169203331-01", "0".repeat(32)),
        format!("00-0af7651916cd43dd8448eb211c80319c-{}-01", "0".repeat(16)),
        format!("{good}-{}", "x".repeat(5000)),
        format!("{good}\r\nTraceparent: {good}"),
    ] {
        assert!(!trace(&bad), "{bad:?} was passed on");
    }
}

#[test]
fn a17_heads_that_are_too_large_are_refused() {
    row_is_refused("A17");
}

#[test]
fn a17_a_head_just_within_the_limits_passes() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let many = head("GET /v1/models HTTP/1.1", &format!("Host: a\r\n{}", "X: y\r\n".repeat(99)));
    assert_eq!(Client::ask(front.addr, many).status, 200);
    let large = head("GET /v1/models HTTP/1.1", &format!("Host: a\r\nX: {}\r\n", "y".repeat(60 * 1024)));
    assert_eq!(Client::ask(front.addr, large).status, 200);
}

#[test]
fn a18_pipelined_requests_are_answered_in_order_one_at_a_time() {
    const REQUESTS: usize = 1000;
    let most = Arc::new(AtomicUsize::new(0));
    let (peak, number, open) = (Arc::clone(&most), AtomicUsize::new(0), AtomicUsize::new(0));
    let (release, gate) = std::sync::mpsc::channel::<()>();
    let gate = std::sync::Mutex::new(gate);
    let engine = Engine::start(move |connection| {
        while connection.request().is_some() {
            peak.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let n = number.fetch_add(1, Ordering::SeqCst);
            if n == 0 {
                gate.lock().unwrap().recv().unwrap();
            }
            open.fetch_sub(1, Ordering::SeqCst);
            connection.send(json("200 OK", &n.to_string()));
        }
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}").repeat(REQUESTS));
    // The first one is slow: no other has begun, and what is read ahead is one buffer.
    eventually("the first is with the engine", || engine.requests() == 1);
    assert!(client.is_quiet(Duration::from_millis(50)));
    assert_eq!((engine.requests(), front.proxy.traffic().queued), (1, 0), "a second one was begun");
    release.send(()).unwrap();
    for n in 0..REQUESTS {
        assert_eq!(client.answer().text(), n.to_string());
    }
    assert_eq!(most.load(Ordering::SeqCst), 1);
}

fn impatient() -> Timings {
    let soon = Duration::from_millis(150);
    Timings {
        client: Patience { handshake: soon, head: soon, idle: soon, body: soon, write: soon },
        ..Timings::default()
    }
}

#[test]
fn a19_a_slow_head_is_answered_408() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::with(&engine, settings(), impatient());
    let mut client = Client::connect(front.addr);
    let answer = client.send("GET /v1/models HTTP/1.1\r\nHost: ").answer();
    assert_eq!(answer.status, 408);
    assert_eq!(client.closes(), End::Broken);
    // Idle between two requests is no fault: the connection just ends.
    assert_eq!(Client::connect(front.addr).closes(), End::Broken);
}

#[test]
fn a19_a_slow_body_is_answered_408_and_its_place_freed() {
    let engine = Engine::start(|connection| {
        connection.head();
        connection.until_closed();
    });
    let front = Front::with(&engine, settings(), impatient());
    let mut client = Client::connect(front.addr);
    client.send(format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhel"));
    assert_eq!(client.answer().status, 408);
    front.holds(0, 0);
    eventually("the engine's connection is closed", || engine.closed() == 1);
}

#[test]
fn a19_a_reader_that_stalls_is_cut_and_holds_little() {
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&sent);
    let engine = Engine::start(move |connection| {
        connection.request();
        connection.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n");
        let piece = vec![b'x'; 64 * 1024];
        while !connection.is_broken() {
            connection.send(&piece);
            counter.fetch_add(piece.len(), Ordering::SeqCst);
        }
    });
    let front = Front::with(&engine, settings(), impatient());
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}"));
    eventually("the reader is cut", || front.proxy.traffic().served == 0 && engine.broken() == 1);
    front.holds(0, 0);
    // Two pairs of socket buffers, and nothing that grows.
    assert!(sent.load(Ordering::SeqCst) < 64 << 20, "{} bytes were taken", sent.load(Ordering::SeqCst));
}

#[test]
fn a20_methods_that_do_not_belong_are_refused() {
    row_is_refused("A20");
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let answer = Client::ask(front.addr, head("DELETE /v1/models HTTP/1.1", "Host: a\r\n"));
    assert_eq!((answer.status, answer.header("allow")), (405, Some("get, head")));
    assert_eq!(engine.connections(), 0);
}

#[test]
fn requests_that_come_byte_by_byte_pass_like_whole_ones() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    let chunked = "3;e=1\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
    let both = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunked}{}",
        post("/v1/completions", "{}")
    );
    for byte in both.as_bytes() {
        client.send([*byte]);
    }
    assert_eq!((client.answer().status, client.answer().status), (200, 200));
    let text = engine.text(0);
    let (first, second) = text.split_at(text.find("POST /v1/completions").unwrap());
    let payload: String = first.split("\r\n\r\n").nth(1).unwrap().split("\r\n").skip(1).step_by(2).collect();
    assert_eq!(payload, "abcde", "{first}");
    assert!(second.ends_with("\r\n\r\n{}"), "{second}");

    let mut client = Client::connect(front.addr);
    for byte in b"GET /v1/models HTTP/1.1\nHost: a\r\n" {
        client.send([*byte]);
    }
    assert_eq!(client.answer().status, 400);
}
