//! E03–E05: an open WebSocket, and how it ends.

use std::time::Duration;

use sglangd::proxy::{Patience, Timings};

use super::{CLOSE, PING, TEXT, asking, closing, echo, frame, goodbye, masked, opened, opening, stepped, with};
use crate::harness::client::{Client, End};
use crate::harness::engine::Connection;
use crate::harness::front::{Front, eventually};

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
