//! D01–D03: engines that die, hang or are cut. A stream that is not whole never looks so.

use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::Duration;

use sglangd::link::{EngineState, Traffic};
use sglangd::proxy::Timings;

use super::CHAT;
use crate::harness::client::{Client, End, get, post};
use crate::harness::engine::{EVENTS, Engine, chunk};
use crate::harness::front::{Front, eventually, settings, view};

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

/// A listener whose queue of connections is full: the kernel answers nobody any more.
fn stalled() -> (socket2::Socket, std::net::SocketAddr, Vec<socket2::Socket>) {
    use socket2::{Domain, Socket, Type};
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let addr = listener.local_addr().unwrap();
    let waiting = (0..4)
        .map(|_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            // In progress for ever, or until somebody accepts.
            let _ = socket.connect(&addr);
            socket
        })
        .collect();
    (listener, addr.as_socket().unwrap(), waiting)
}

#[test]
fn g18_an_engine_whose_queue_of_connections_is_full_is_tried_twice_and_not_given_up() {
    let (listener, addr, waiting) = stalled();
    let mut front = Front::unaware(Timings::default());
    front.proxy.settings(settings()).unwrap();
    front.proxy.engine(view(EngineState::Ready, Some(addr)));
    let since = tokio::time::Instant::now();
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (503, "engine_unreachable"));
    assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    // One attempt of a second, and another one.
    assert!((1900..15_000).contains(&since.elapsed().as_millis()), "{:?}", since.elapsed());
    front.holds(0, 0);
    // Not dead, only busy: once it accepts again, everything passes.
    assert_eq!(Client::ask(front.addr, get("/ready")).status, 200);
    drop(waiting);
    let listener = std::net::TcpListener::from(listener);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            use std::io::{Read as _, Write as _};
            let asked = stream.read(&mut [0; 4096]).unwrap_or(0);
            let _ = if asked > 0 {
                stream.write_all(crate::harness::engine::json("200 OK", "{}").as_bytes())
            } else {
                Ok(())
            };
        }
    });
    eventually("it serves again", || Client::ask(front.addr, post(CHAT, "{}")).status == 200);
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

/// The supervisor's verdict lives on the age of the last token and on who waits: what the proxy says itself
/// meanwhile is neither.
#[test]
fn d03_the_verdict_hears_of_a_silent_stream_whatever_the_proxy_tells_its_client() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(EVENTS);
        connection.send(chunk("data: one\n\n"));
        connection.until_closed();
    });
    let keep_alive = Duration::from_millis(40);
    let timings = Timings { engine_silence: Duration::from_secs(2), keep_alive, ..Timings::default() };
    let front = Front::with(&engine, settings(), timings);
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}")).until_times(": keep-alive", 2);
    let before = front.proxy.traffic();
    client.until_times(": keep-alive", 6);
    let now = front.proxy.traffic();
    assert_eq!((before.in_flight, now.in_flight), (1, 1), "a request waits");
    let age = |traffic: Traffic| Duration::from_millis(traffic.last_byte_ms.unwrap());
    assert!(age(now) >= age(before) + 3 * keep_alive, "a comment counted as a token: {before:?} then {now:?}");
    assert_eq!(client.answer().end, End::Broken);
    front.holds(0, 0);
    let given_up = front.proxy.traffic();
    assert!(age(given_up) >= Duration::from_secs(2), "the error event counted as a token: {given_up:?}");
    assert_eq!(given_up.upstream_errors, 1);
}
