//! D04: clients that leave, in every way and at every moment.

use std::time::Duration;

use sglangd::link::ProxySettings;
use sglangd::proxy::Timings;
use tokio::time::Instant;

use super::{CHAT, stepped};
use crate::harness::client::{Client, post};
use crate::harness::engine::{EVENTS, Engine, chunk};
use crate::harness::front::{Front, eventually, settings};

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

/// A place is free within 100 ms of a leaving. The best of five: a timer that looked each 100 ms would be late in
/// all of them, a busy machine in some.
#[test]
fn d04_a_place_is_free_within_a_tenth_of_a_second() {
    const AT_ONCE: Duration = Duration::from_millis(100);
    let engine = Engine::start(|connection| {
        if connection.request().is_some_and(|head| head.starts_with("post /v1/chat/")) {
            connection.send(EVENTS);
            connection.send(chunk("data: one\n\n"));
        }
        connection.until_closed();
    });
    let front = Front::with(&engine, ProxySettings { max: 1, ..settings() }, Timings::default());
    let freed = |client: Client, how: Leaving, open: usize| {
        let left = Instant::now();
        let _rest = leave(client, how);
        while (front.proxy.traffic().in_flight, front.proxy.traffic().queued) != (open, 0) {
            assert!(left.elapsed() < Duration::from_secs(10), "its place is never free");
            std::thread::yield_now();
        }
        left.elapsed()
    };
    let best = |what: &str, how: Leaving, mut once: Box<dyn FnMut() -> Duration + '_>| {
        let best = (0..5).map(|_| once()).find(|took| *took < AT_ONCE);
        assert!(best.is_some(), "{what}, {how:?}: later than {AT_ONCE:?}, five times");
    };
    for how in LEAVINGS {
        best(
            "in mid-stream",
            how,
            Box::new(|| {
                let mut client = Client::connect(front.addr);
                client.send(post(CHAT, "{}")).until("data: one");
                freed(client, how, 0)
            }),
        );
        best(
            "in prefill",
            how,
            Box::new(|| {
                let mut client = Client::connect(front.addr);
                client.send(post("/v1/embeddings", "{}"));
                front.holds(1, 0);
                freed(client, how, 0)
            }),
        );
        best(
            "in the queue",
            how,
            Box::new(|| {
                let mut first = Client::connect(front.addr);
                first.send(post(CHAT, "{}")).until("data: one");
                let mut client = Client::connect(front.addr);
                client.send(post(CHAT, "{}"));
                front.holds(1, 1);
                let took = freed(client, how, 1);
                drop(first);
                front.holds(0, 0);
                took
            }),
        );
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
