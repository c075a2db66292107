//! What an engine that is not ready, or a server that stops, means to a client.

use std::time::Duration;

use sglangd::link::{EngineState, EngineView, ProxySettings};
use sglangd::proxy::{Proxy, Supervision, Timings};

use crate::harness::client::{Client, End, get, head, post, post_with};
use crate::harness::engine::{Engine, json};
use crate::harness::front::{Front, eventually, metric, settings, view};

const CHAT: &str = "/v1/chat/completions";

fn loading() -> EngineView {
    EngineView {
        phase: "loading weights 3/64".into(),
        percent: Some(12.5),
        eta_seconds: Some(42),
        ..view(EngineState::Loading, None)
    }
}

#[test]
fn an_engine_that_is_not_ready_is_a_truthful_503() {
    let mut front = Front::unaware(Timings::default());
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (503, "engine_starting"));
    front.proxy.settings(settings()).unwrap();
    front.proxy.engine(EngineView { eta_seconds: None, eta_range_seconds: Some([10, 900]), ..loading() });
    assert_eq!(Client::ask(front.addr, get("/ready")).json()["eta_range_seconds"], serde_json::json!([10, 900]));
    front.proxy.engine(loading());
    for request in [post(CHAT, "{}"), get("/health"), get("/ready")] {
        let answer = Client::ask(front.addr, request);
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("42")));
        let body = answer.json();
        assert_eq!(body["error"]["code"], "engine_loading");
        assert_eq!((&body["state"], &body["percent"]), (&"loading".into(), &12.5.into()));
        assert_eq!((&body["phase"], &body["eta_seconds"]), (&"loading weights 3/64".into(), &42.into()));
    }
    assert_eq!(Client::ask(front.addr, get("/live")).status, 200);
}

#[test]
fn a_proxy_whose_supervisor_is_silent_is_not_live() {
    let timings = Timings { supervisor_silence: Duration::from_millis(200), ..Timings::default() };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let mut proxy = Proxy::new(timings, Supervision::Linked);
    proxy.listen(vec![listener.into()]).unwrap();
    eventually("silence is seen", || Client::ask(addr, get("/live")).status == 503);
    proxy.hear();
    assert_eq!(Client::ask(addr, get("/live")).status, 200);
}

#[test]
fn health_and_readiness_tell_busy_from_suspected_and_draining() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let asked = |path: &str| Client::ask(front.addr, get(path)).status;
    for state in [EngineState::Ready, EngineState::Busy] {
        front.proxy.engine(view(state, Some(engine.addr)));
        assert_eq!((asked("/health"), asked("/ready")), (200, 200));
    }
    front.proxy.engine(EngineView { suspected: true, ..view(EngineState::Busy, Some(engine.addr)) });
    assert_eq!((asked("/health"), asked("/ready")), (200, 503));
    assert_eq!(Client::ask(front.addr, post(CHAT, "{}")).status, 200, "traffic goes on under suspicion");
    front.proxy.drain();
    assert_eq!((asked("/live"), asked("/health"), asked("/ready")), (200, 200, 503));
    let mut client = Client::connect(front.addr);
    client.send(head("HEAD /health HTTP/1.1", "Host: a\r\n"));
    assert_eq!(client.answer_to("HEAD").status, 200);
    assert_eq!(Client::ask(front.addr, post("/health", "{}")).status, 405);
}

#[test]
fn held_requests_pass_in_order_when_the_engine_becomes_ready() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let mut front = Front::unaware(Timings::default());
    front.proxy.settings(ProxySettings { max: 1, queue: 2, ..settings() }).unwrap();
    front.proxy.engine(EngineView { hold_ms: 10_000, ..loading() });
    let mut clients = Vec::new();
    for n in 0..2 {
        let mut client = Client::connect(front.addr);
        client.send(post_with(CHAT, &format!("X-Request-Id: n{n}\r\n"), "{}"));
        front.holds(0, n + 1);
        clients.push(client);
    }
    // Who is held counts in the queue's bound.
    assert_eq!(Client::ask(front.addr, post(CHAT, "{}")).code(), "queue_full");
    front.proxy.engine(view(EngineState::Ready, Some(engine.addr)));
    assert!(clients.iter_mut().all(|client| client.answer().status == 200));
    let text = engine.text(0);
    assert!(text.find("n0") < text.find("n1"), "{text}");
}

#[test]
fn held_requests_are_told_when_the_engine_will_not_return() {
    let mut front = Front::unaware(Timings::default());
    front.proxy.settings(settings()).unwrap();
    front.proxy.engine(EngineView { hold_ms: 10_000, ..loading() });
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}"));
    front.holds(0, 1);
    let reason = "no CUDA device was found";
    front.proxy.engine(EngineView { will_return: false, reason: reason.into(), ..view(EngineState::GaveUp, None) });
    let answer = client.answer();
    assert_eq!((answer.status, answer.code().as_str()), (503, "engine_gave_up"));
    assert!(answer.text().contains(reason));
    front.holds(0, 0);
}

/// A proxy whose supervisor takes an engine for ready that no longer listens, and a request on its way to it.
fn sent_to_a_dead_engine(timings: Timings) -> (Proxy, Client) {
    let [dead, public] = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let (nobody, addr) = (dead.local_addr().unwrap(), public.local_addr().unwrap());
    drop(dead);
    let mut proxy = Proxy::new(timings, Supervision::Linked);
    proxy.hear();
    proxy.settings(settings()).unwrap();
    proxy.engine(view(EngineState::Ready, Some(nobody)));
    proxy.listen(vec![public.into()]).unwrap();
    let mut client = Client::connect(addr);
    client.send(post_with(CHAT, "", "{\"held\": 1}"));
    eventually("it was tried", || metric(&proxy.metrics(), "sglangd_upstream_connects_total").is_some_and(|n| n > 0.0));
    (proxy, client)
}

#[test]
fn d01_g20_a_request_that_a_dead_engine_did_not_take_waits_for_the_next_one() {
    let (proxy, mut client) = sent_to_a_dead_engine(Timings::default());
    proxy.engine(EngineView { hold_ms: 10_000, ..view(EngineState::Failing, None) });
    eventually("it is held", || proxy.traffic().queued == 1);
    let engine = Engine::answering(json("200 OK", "{}"));
    proxy.engine(view(EngineState::Ready, Some(engine.addr)));
    assert_eq!(client.answer().status, 200);
    assert!(engine.text(0).ends_with("{\"held\": 1}"), "{}", engine.text(0));
    assert_eq!(metric(&proxy.metrics(), "sglangd_upstream_retries_total"), Some(1.0));
}

#[test]
fn d01_a_request_that_no_engine_took_is_not_kept_where_nobody_says_that_it_died() {
    let timings = Timings { engine_news: Duration::from_millis(50), ..Timings::default() };
    let (proxy, mut client) = sent_to_a_dead_engine(timings);
    let answer = client.answer();
    assert_eq!((answer.status, answer.code().as_str()), (503, "engine_unreachable"));
    assert_eq!((proxy.traffic().in_flight, proxy.traffic().queued), (0, 0));
}

#[test]
fn a_hold_has_an_end() {
    let mut front = Front::unaware(Timings::default());
    front.proxy.settings(settings()).unwrap();
    front.proxy.engine(EngineView { hold_ms: 100, ..loading() });
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (503, "engine_loading"));
}

#[test]
fn a_drain_finishes_what_is_open_and_admits_nothing() {
    let (engine, release) = Engine::held();
    let front = Front::of(&engine);
    let mut open = Client::connect(front.addr);
    open.send(post(CHAT, "{}"));
    front.holds(1, 0);
    let mut idle = Client::connect(front.addr);
    assert_eq!(idle.send(get("/health")).answer().status, 200);
    front.proxy.drain();
    assert_eq!(idle.closes(), End::Broken);
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (503, "draining"));
    assert_eq!((answer.header("connection"), answer.header("retry-after")), (Some("close"), Some("5")));
    release.send(()).unwrap();
    let answer = open.answer();
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    assert_eq!(open.closes(), End::Broken);
}
