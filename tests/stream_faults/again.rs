//! Kept connections to the engine, and when a request is said again.

use super::CHAT;
use crate::harness::client::{Client, post};
use crate::harness::engine::{Engine, json};
use crate::harness::front::Front;

#[test]
fn a_request_that_meets_the_end_of_a_kept_connection_is_said_again() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(json("200 OK", "{}"));
        if connection.index == 0 {
            // Takes the next request's bytes and dies without a word.
            connection.request();
            return;
        }
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    assert_eq!(client.send(post(CHAT, "{\"n\":1}")).answer().status, 200);
    assert_eq!(client.send(post(CHAT, "{\"n\":2}")).answer().status, 200);
    assert!(engine.text(1).ends_with("{\"n\":2}"), "{}", engine.text(1));
    assert_eq!(front.metric("sglangd_upstream_retries_total"), Some(1.0));
    assert_eq!(front.metric("sglangd_upstream_errors_total"), Some(0.0));
}

#[test]
fn a_request_whose_body_is_gone_is_not_said_again() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(json("200 OK", "{}"));
        connection.request();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    assert_eq!(client.send(post(CHAT, "{}")).answer().status, 200);
    assert_eq!(client.send(post(CHAT, &"x".repeat(200_000))).answer().status, 502);
    assert_eq!(engine.connections(), 1);
}
