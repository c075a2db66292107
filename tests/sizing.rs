//! The admission sized by what the engine says of itself (`/v1/loads`).

use std::net::TcpListener;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sglangd::link::{EngineState, SizedBy};
use sglangd::proxy::Timings;
use socket2::SockRef;

use crate::harness::client::{Client, post};
use crate::harness::engine::{Engine, json};
use crate::harness::front::{Front, eventually, settings, view};
use crate::harness::scene::{SOON, got, number_at, quick, stream_of};

const CHAT: &str = "/v1/chat/completions";

/// What the fake engine says of its load.
#[derive(Debug, Clone, Copy)]
enum Says {
    Load { running: usize, waiting: usize },
    Nothing,
    NoSuchRoute,
}

/// An engine that answers each request when told to, and says of its load what it is told to.
struct Measured {
    engine: Engine,
    says: Arc<Mutex<Says>>,
    release: Sender<()>,
}

impl Measured {
    fn new(says: Says) -> Self {
        let (release, gate) = channel::<()>();
        let (gate, says) = (Mutex::new(gate), Arc::new(Mutex::new(says)));
        let shared = Arc::clone(&says);
        let engine = Engine::start(move |connection| {
            while let Some(head) = connection.request() {
                if !head.starts_with("get /v1/loads") {
                    if gate.lock().unwrap().recv().is_err() {
                        return;
                    }
                    connection.send(json("200 OK", "{}"));
                    continue;
                }
                let says = *shared.lock().unwrap();
                match says {
                    Says::Load { running, waiting } => connection.send(json("200 OK", &loads(running, waiting))),
                    Says::NoSuchRoute => connection.send(json("404 Not Found", "{}")),
                    Says::Nothing => {}
                }
                return connection.close();
            }
        });
        Self { engine, says, release }
    }

    fn says(&self, running: usize, waiting: usize) {
        *self.says.lock().unwrap() = Says::Load { running, waiting };
    }

    fn looks(&self) -> usize {
        (0..self.engine.connections())
            .filter(|n| self.engine.text(*n).starts_with("GET /v1/loads?include=core "))
            .count()
    }

    fn front(&self, max: usize) -> Front {
        let mut front = Front::unaware(Timings::default());
        let settings = settings();
        front.proxy.settings(sglangd::link::ProxySettings { max, sizing: SizedBy::Engine, ..settings }).unwrap();
        front.proxy.engine(view(EngineState::Ready, Some(self.engine.addr)));
        front
    }
}

fn loads(running: usize, waiting: usize) -> String {
    let now = sglangd::observe::clock::unix_time();
    format!(
        r#"{{"timestamp":"x","loads":[{{"dp_rank":0,"timestamp":{now},"num_running_reqs":{running},
        "num_waiting_reqs":{waiting},"max_running_requests":0,"token_usage":0.934}}]}}"#
    )
}

fn ask(front: &Front, clients: &mut Vec<Client>) {
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}"));
    clients.push(client);
}

#[test]
fn what_the_engine_would_queue_waits_here() {
    let engine = Measured::new(Says::Load { running: 0, waiting: 0 });
    let front = engine.front(12);
    let mut clients = Vec::new();
    for n in 1..=12 {
        ask(&front, &mut clients);
        front.holds(n, 0);
    }
    engine.says(4, 8);
    let room = |places: usize| {
        eventually("the room is right", || front.metric("sglangd_requests_room") == Some(places as f64));
    };
    room(6);
    assert_eq!(front.metric("sglangd_engine_requests_waiting"), Some(8.0));
    assert_eq!(front.metric("sglangd_engine_kv_percent"), Some(93.0));
    // Who was admitted stays; who comes now waits until the engine has room.
    ask(&front, &mut clients);
    front.holds(12, 1);
    for open in (8..12).rev() {
        engine.release.send(()).unwrap();
        front.holds(open, 1);
    }
    // A look that fails changes nothing.
    *engine.says.lock().unwrap() = Says::Nothing;
    let looks = engine.looks();
    eventually("the engine is asked in vain", || engine.looks() > looks + 1);
    front.holds(8, 1);
    engine.says(8, 0);
    front.holds(9, 0);
    room(12);
    for _ in 0..9 {
        engine.release.send(()).unwrap();
    }
    assert!(clients.iter_mut().all(|client| client.answer().status == 200));
    // Nobody looks at an idle engine: the figures are its own no more.
    eventually("nobody looks any more", || front.metric("sglangd_engine_requests_running") == Some(0.0));
    room(12);
    // And somebody does again.
    let looks = engine.looks();
    ask(&front, &mut clients);
    eventually("the engine is asked again", || engine.looks() > looks);
}

#[test]
fn a_proxy_that_follows_a_dead_one_subtracts_what_the_engine_still_runs() {
    let engine = Measured::new(Says::Load { running: 2, waiting: 1 });
    let front = engine.front(4);
    let mut clients = Vec::new();
    ask(&front, &mut clients);
    front.holds(1, 0);
    ask(&front, &mut clients);
    front.holds(1, 1);
    assert!(engine.looks() >= 1);
    engine.says(1, 0);
    front.holds(2, 0);
    assert_eq!(front.metric("sglangd_requests_room"), Some(4.0));
    for _ in 0..2 {
        engine.release.send(()).unwrap();
    }
    assert!(clients.iter_mut().all(|client| client.answer().status == 200));
}

#[test]
fn a_proxy_that_saw_its_engine_start_asks_nothing_before_the_first_request() {
    let engine = Measured::new(Says::Load { running: 3, waiting: 0 });
    let mut front = Front::unaware(Timings::default());
    front.proxy.settings(sglangd::link::ProxySettings { max: 1, sizing: SizedBy::Engine, ..settings() }).unwrap();
    front.proxy.engine(view(EngineState::Loading, None));
    front.proxy.engine(view(EngineState::Ready, Some(engine.engine.addr)));
    let mut clients = Vec::new();
    ask(&front, &mut clients);
    front.holds(1, 0);
    assert_eq!(engine.looks(), 0);
}

#[test]
fn an_engine_that_is_not_there_runs_nothing_of_a_dead_proxy_and_is_not_looked_for() {
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut front = Front::unaware(Timings::default());
    front.proxy.settings(sglangd::link::ProxySettings { sizing: SizedBy::Engine, ..settings() }).unwrap();
    front.proxy.engine(view(EngineState::Ready, Some(addr)));
    // The first look is before anything is let through.
    assert_eq!(Client::ask(front.addr, post(CHAT, "{}")).status, 503);
    // Nobody has a request open from here on.
    eventually("the looks end", || {
        let late = TcpListener::bind(addr).unwrap();
        // accept(2) goes by it too.
        SockRef::from(&late).set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        late.accept().is_err()
    });
}

#[test]
fn an_engine_that_does_not_tell_its_load_is_asked_once() {
    let engine = Measured::new(Says::NoSuchRoute);
    let front = engine.front(2);
    let mut clients = Vec::new();
    ask(&front, &mut clients);
    front.holds(1, 0);
    assert!(clients[0].is_quiet(Duration::from_millis(2500)), "answered early");
    assert_eq!(engine.looks(), 1);
    ask(&front, &mut clients);
    front.holds(2, 0);
}

#[test]
fn a_hung_engine_holds_nobody_back_for_long() {
    let engine = Engine::start(|connection| {
        let head = connection.head().unwrap_or_default();
        if !head.starts_with("get /v1/loads") {
            connection.send(json("200 OK", "{}"));
        }
        connection.until_closed();
    });
    let mut front = Front::unaware(Timings::default());
    front.proxy.settings(sglangd::link::ProxySettings { sizing: SizedBy::Engine, ..settings() }).unwrap();
    front.proxy.engine(view(EngineState::Ready, Some(engine.addr)));
    assert_eq!(Client::ask(front.addr, post(CHAT, "{}")).status, 200);
}

#[tokio::test]
async fn the_engines_own_figures_are_in_status_and_bound_what_it_gets() {
    let setup = quick("").set("limits.max", "8").engine_flag("--max-running-requests").engine_flag("2");
    let mut daemon = setup.start();
    daemon.is_ready(SOON).await;
    let ask = |_| {
        let mut client = Client::connect(daemon.public());
        client.send(stream_of(20_000));
        client
    };
    let streams: Vec<Client> = (0..8).map(ask).collect();
    // Two of eight are computed; two more may stand in the engine's own line, the next ones here.
    let requests = daemon
        .until("the room follows the engine", SOON, async |daemon| {
            let status = daemon.status().await?;
            (number_at(&status, "/requests/room") == 4).then(|| status["requests"].clone())
        })
        .await;
    assert_eq!((number_at(&requests, "/engine/running"), number_at(&requests, "/max")), (2, 8), "{requests}");
    assert!(number_at(&requests, "/engine/waiting") > 0, "{requests}");
    let page = got(daemon.admin(), "/metrics").text();
    assert!(page.contains("\nsglangd_requests_room 4\n") && page.contains("\nsglangd_engine_requests_running 2\n"));
    drop(streams);
    daemon.stops_clean(SOON).await;
}
