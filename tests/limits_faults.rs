//! Group F: limits and keys, and what an engine that is not ready means to a client.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use sglangd::link::{Down, EngineState, EngineView, ProxySettings, Traffic, Up, pair, split};
use sglangd::proxy::{Proxy, Supervision, Timings, linked};

use crate::harness::alone::Process;
use crate::harness::client::{Client, End, get, head, post, post_with};
use crate::harness::engine::{Engine, json};
use crate::harness::front::{Front, eventually, settings, view};

const CHAT: &str = "/v1/chat/completions";

/// Answers each request when the test says so, with the request's body.
fn held() -> (Engine, Sender<()>) {
    let (release, gate) = channel::<()>();
    let gate = Mutex::new(gate);
    let engine = Engine::start(move |connection| {
        while connection.request().is_some() {
            if gate.lock().unwrap().recv().is_err() {
                return;
            }
            connection.send(json("200 OK", "{}"));
        }
    });
    (engine, release)
}

fn with(engine: &Engine, change: impl FnOnce(&mut ProxySettings)) -> Front {
    let mut settings = settings();
    change(&mut settings);
    Front::with(engine, settings, Timings::default())
}

#[test]
fn f01_beyond_max_requests_wait_and_pass_in_order() {
    let (engine, release) = held();
    let front = with(&engine, |settings| settings.max = 1);
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
    let (engine, release) = held();
    let front = with(&engine, |settings| (settings.max, settings.queue) = (1, 1));
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
fn f02_a_wait_has_an_end() {
    let (engine, _release) = held();
    let front = with(&engine, |settings| (settings.max, settings.queue_timeout_ms) = (1, 100));
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
    let front = with(&engine, |settings| settings.max_body = 1000);
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
    let front = with(&engine, |settings| settings.max_body = 1000);
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

fn keys_file(keys: &[&str]) -> tempfile::NamedTempFile {
    use sha2::Digest as _;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "# keys").unwrap();
    for (n, key) in keys.iter().enumerate() {
        let digest = sha2::Sha256::digest(key.as_bytes());
        write!(file, "key{n} sha256:").unwrap();
        digest.iter().for_each(|byte| write!(file, "{byte:02x}").unwrap());
        writeln!(file, "  # {n}").unwrap();
    }
    file
}

#[test]
fn f06_only_a_good_key_passes() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let keys = keys_file(&["secret-1", "secret-2"]);
    let front = with(&engine, |settings| settings.keys_file = Some(keys.path().to_owned()));
    let long = "k".repeat(60_000);
    for fields in [
        "",
        "Authorization: Bearer wrong\r\n",
        "Authorization: Bearer\r\n",
        "Authorization: Basic secret-1\r\n",
        "Authorization: Bearer secret-1 x\r\n",
        "Authorization: Bearer secret-1\r\nAuthorization: Bearer secret-2\r\n",
        "Authorization: Bearer secret-1\r\nX-Api-Key: wrong\r\n",
        "Connection: authorization\r\nX-Api-Key: \r\n",
        &format!("Authorization: Bearer {long}\r\n"),
    ] {
        let answer = Client::ask(front.addr, post_with(CHAT, fields, "{}"));
        let shown = &fields[..fields.len().min(60)];
        assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("bearer")), "{shown:?}");
        assert_eq!(answer.code(), "invalid_api_key");
    }
    assert_eq!(engine.connections(), 0);
    for fields in
        ["Authorization: Bearer secret-1\r\n", "authorization: bearer secret-2 \r\n", "X-Api-Key: secret-2\r\n"]
    {
        assert_eq!(Client::ask(front.addr, post_with(CHAT, fields, "{}")).status, 200, "{fields:?}");
    }
    assert!(!engine.text(0).contains("secret"), "a client's key reached the engine");
    // Probes need no key.
    assert_eq!(Client::ask(front.addr, get("/live")).status, 200);
}

#[test]
fn f06_the_engine_gets_its_own_key_and_never_the_clients() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let mut view = view(EngineState::Ready, Some(engine.addr));
    view.upstream.as_mut().unwrap().api_key = Some("engine-key".into());
    front.proxy.engine(view);
    let fields = "Authorization: Bearer mine\r\nX-Api-Key: mine\r\n";
    assert_eq!(Client::ask(front.addr, post_with(CHAT, fields, "{}")).status, 200);
    let text = engine.text(0);
    assert!(text.contains("authorization: Bearer engine-key\r\n") && !text.contains("mine"), "{text}");
}

#[test]
fn f07_a_broken_keys_file_changes_nothing() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let keys = keys_file(&["secret-1"]);
    let mut front = with(&engine, |settings| settings.keys_file = Some(keys.path().to_owned()));
    let good = post_with(CHAT, "X-Api-Key: secret-1\r\n", "{}");
    let settings = || ProxySettings { keys_file: Some(keys.path().to_owned()), ..settings() };
    for broken in ["", "# nothing\n", "name sha256:00\n", "name sha256:5fc3dd9f9cd0\n"] {
        std::fs::write(keys.path(), broken).unwrap();
        assert!(front.proxy.settings(settings()).is_err(), "{broken:?}");
        assert_eq!(Client::ask(front.addr, &good).status, 200);
        assert_eq!(Client::ask(front.addr, post(CHAT, "{}")).status, 401);
    }
    let rotated = keys_file(&["secret-2"]);
    std::fs::set_permissions(rotated.path(), std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::copy(rotated.path(), keys.path()).unwrap();
    front.proxy.settings(settings()).unwrap();
    assert_eq!(Client::ask(front.addr, &good).status, 401);
    assert_eq!(Client::ask(front.addr, post_with(CHAT, "X-Api-Key: secret-2\r\n", "{}")).status, 200);
}

#[test]
fn f08_operator_routes_are_refused() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    for path in [
        "/flush_cache",
        "/update_weights_from_disk",
        "/load_lora_adapter",
        "/server_info",
        "/get_server_info",
        "/abort_request",
        "/start_profile",
        "/metrics",
        "/v1/loads",
        "/dumper/x",
        "/configure_logging",
        "/server_info?x=/v1/models",
    ] {
        assert_eq!(Client::ask(front.addr, get(path)).status, 403, "{path}");
        assert_eq!(Client::ask(front.addr, post(path, "{}")).status, 403, "{path}");
    }
    for path in ["/", "/new_route_of_tomorrow", "/v1", "/V1/models", "/v1/models/"] {
        assert_eq!(Client::ask(front.addr, get(path)).status, 404, "{path}");
    }
    assert_eq!(engine.connections(), 0);
}

#[test]
fn f12_a_deadline_that_passes_in_the_queue_is_a_504_and_never_reaches_the_engine() {
    let (engine, release) = held();
    let front = with(&engine, |settings| settings.max = 1);
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
    let (engine, release) = held();
    let mut front = with(&engine, |settings| settings.max = 1);
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
    let (engine, release) = held();
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

/// The supervisor's end of a proxy that runs on a thread of this process.
#[test]
fn a_linked_proxy_says_hello_reports_traffic_and_ends_with_the_link() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let (ours, theirs) = pair().unwrap();
    let proxy = std::thread::spawn(move || linked(vec![listener.into()], theirs));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (mut up, mut down) = split(ours).unwrap();
        let Some(Up::Hello { pid, .. }) = up.next().await.unwrap() else { panic!("no hello") };
        assert_eq!(pid, std::process::id());
        assert_eq!(Client::ask(addr, post(CHAT, "{}")).code(), "engine_starting");
        down.send(&Down::Settings(ProxySettings { workers: 2, ..settings() })).await.unwrap();
        down.send(&Down::Engine(view(EngineState::Ready, Some(engine.addr)))).await.unwrap();
        down.send(&Down::Scrape { id: 7 }).await.unwrap();
        let page = loop {
            match up.next().await.unwrap() {
                Some(Up::Scraped { id: 7, text }) => break text,
                Some(_) => {}
                None => panic!("the link ended"),
            }
        };
        assert!(page.contains("sglangd_proxy_workers 2\n") && page.contains("sglangd_requests_max 32\n"));
        assert_eq!(Client::ask(addr, post(CHAT, "{}")).status, 200);
        let mut last = Traffic::default();
        while last.served == 0 {
            if let Some(Up::Traffic(traffic)) = up.next().await.unwrap() {
                last = traffic;
            }
        }
        assert!(last.last_byte_ms.is_some() && last.in_flight == 0);
        let broken = ProxySettings { keys_file: Some("/nowhere/keys".into()), ..settings() };
        down.send(&Down::Settings(broken)).await.unwrap();
        loop {
            match up.next().await.unwrap() {
                Some(Up::Refused { reason }) => break assert!(reason.contains("/nowhere/keys"), "{reason}"),
                Some(_) => {}
                None => panic!("the link ended"),
            }
        }
    });
    drop(runtime);
    proxy.join().unwrap().unwrap();
    std::net::TcpListener::bind(addr).expect("the address is free for the next sglangd");
}

#[test]
fn many_clients_on_several_workers_lose_nothing() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = with(&engine, |settings| (settings.workers, settings.max, settings.queue) = (3, 4, 1000));
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

#[test]
fn the_data_plane_alone_drains_at_sigterm() {
    let (engine, release) = held();
    let (mut process, addr) = Process::alone(engine.addr, &["--set", "limits.max=2"]);
    let mut open = Client::connect(addr);
    open.send(post(CHAT, "{}"));
    eventually("the request is with the engine", || engine.requests() == 1);
    process.signal(nix::sys::signal::Signal::SIGTERM);
    eventually("nothing more is admitted", || Client::ask(addr, get("/ready")).status == 503);
    assert!(process.0.try_wait().unwrap().is_none(), "it did not wait for the open answer");
    release.send(()).unwrap();
    assert_eq!(open.answer().status, 200);
    assert_eq!(process.0.wait().unwrap().code(), Some(0));
}

#[test]
fn a_second_signal_ends_the_data_plane_at_once() {
    let (engine, _release) = held();
    let (mut process, addr) = Process::alone(engine.addr, &[]);
    let mut open = Client::connect(addr);
    open.send(post(CHAT, "{}"));
    eventually("the request is with the engine", || engine.requests() == 1);
    process.signal(nix::sys::signal::Signal::SIGINT);
    eventually("it drains", || Client::ask(addr, get("/ready")).status == 503);
    process.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(process.0.wait().unwrap().code(), Some(0));
}

#[test]
fn streams_that_outlast_the_grace_are_cut_with_an_error_event() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(crate::harness::engine::EVENTS);
        connection.send(crate::harness::engine::chunk("data: one\n\n"));
        connection.until_closed();
    });
    let (mut process, addr) = Process::alone(engine.addr, &["--grace", "1"]);
    let mut open = Client::connect(addr);
    open.send(post(CHAT, "{}")).until("data: one\n\n");
    process.signal(nix::sys::signal::Signal::SIGTERM);
    let answer = open.answer();
    assert_eq!(answer.end, End::Broken);
    let text = answer.text();
    assert!(text.contains("the server is stopping") && !text.contains("[DONE]"), "{text:?}");
    assert_eq!(process.0.wait().unwrap().code(), Some(0));
}

#[test]
fn a_proxy_process_ends_when_its_supervisor_is_gone() {
    use std::os::fd::AsRawFd as _;

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};

    let engine = Engine::answering(json("200 OK", "{}"));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let (ours, theirs) = pair().unwrap();
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let (link, listen) = (theirs.as_raw_fd().to_string(), listener.as_raw_fd().to_string());
    let mut process = Process::start(&["--link-fd", &link, "--listen-fd", &listen]);
    drop((listener, theirs));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (mut up, mut down) = split(ours).unwrap();
        let Some(Up::Hello { pid, .. }) = up.next().await.unwrap() else { panic!("no hello") };
        assert_eq!(pid, process.0.id());
        down.send(&Down::Settings(settings())).await.unwrap();
        down.send(&Down::Engine(view(EngineState::Ready, Some(engine.addr)))).await.unwrap();
        eventually("it serves", || Client::ask(addr, post(CHAT, "{}")).status == 200);
    });
    drop(runtime);
    assert_eq!(process.0.wait().unwrap().code(), Some(0));
    std::net::TcpListener::bind(addr).expect("the address is free for the next sglangd");
}
