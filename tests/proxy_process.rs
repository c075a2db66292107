//! The data plane as a process of its own: under a supervisor, and alone.

use sglangd::link::{Down, EngineState, ProxySettings, Traffic, Up, pair, split};
use sglangd::proxy::linked;

use crate::harness::alone::Process;
use crate::harness::client::{Client, End, get, post, post_with};
use crate::harness::engine::{Engine, json};
use crate::harness::front::{eventually, keys_file, settings, view};

const CHAT: &str = "/v1/chat/completions";

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
fn the_data_plane_alone_drains_at_sigterm() {
    let (engine, release) = Engine::held();
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

/// A table that grows under traffic holds up every stream of the worker that opens the next connection.
#[test]
fn the_table_of_descriptors_has_its_size_before_there_are_connections() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let (process, addr) = Process::alone(engine.addr, &[]);
    assert_eq!(Client::ask(addr, post(CHAT, "{}")).status, 200);
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.0.id())).unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap().trim().parse::<u64>().unwrap();
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    assert!(size >= hard.min(65_536), "room for {size} descriptors of {hard}");
}

#[test]
fn f07_the_data_plane_alone_takes_new_keys_and_limits_at_sighup_and_nothing_that_is_wrong() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let keys = keys_file(&[("one", "k1", "")]);
    let config = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    let write = |rest: &str| {
        let text = format!("model:\n  repo: a/b\nauth:\n  keys_file: {}\n{rest}", keys.path().display());
        std::fs::write(config.path(), text).unwrap();
    };
    write("");
    let (process, addr) = Process::alone(engine.addr, &["--config", config.path().to_str().unwrap()]);
    let asked =
        |key: &str, body: &str| Client::ask(addr, post_with(CHAT, &format!("X-Api-Key: {key}\r\n"), body)).status;
    assert_eq!(asked("k1", "{}"), 200);
    write("limits:\n  max_body: 1KiB\n");
    process.signal(nix::sys::signal::Signal::SIGHUP);
    eventually("the new limit is live", || asked("k1", &"x".repeat(2000)) == 413);
    write("limits:\n  max_body: a lot\n");
    std::fs::copy(keys_file(&[("two", "k2", "")]).path(), keys.path()).unwrap();
    process.signal(nix::sys::signal::Signal::SIGHUP);
    // The keys file alone is watched: it is live though the settings are wrong.
    eventually("the new key is live", || asked("k2", "{}") == 200);
    assert_eq!((asked("k1", "{}"), asked("k2", &"x".repeat(2000))), (401, 413));
}

#[test]
fn a_second_signal_ends_the_data_plane_at_once() {
    let (engine, _release) = Engine::held();
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
