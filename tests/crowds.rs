//! F11 at its size: ten thousand connections, which a quick test has no descriptors for.

use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::time::Instant;

use crate::harness::alone::Process;
use crate::harness::client::{Client, End, get, post};
use crate::harness::engine::{Engine, json};
use crate::harness::front::eventually;
use crate::harness::scene::CHAT;

const CROWD: usize = 10_000;
const MORE: usize = 500;

/// Each process of this test needs some more than the crowd has connections.
fn descriptors_for_all() {
    let needed = (CROWD + MORE + 500) as u64;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if soft < needed {
        setrlimit(Resource::RLIMIT_NOFILE, needed, hard.max(needed)).expect("root may have that many descriptors");
    }
}

#[test]
#[ignore = "heavy: ten thousand descriptors of each process"]
fn f11_of_ten_thousand_idle_connections_the_oldest_make_room_and_nobody_waits() {
    descriptors_for_all();
    let engine = Engine::answering(json("200 OK", "{}"));
    let limit = format!("limits.connections={CROWD}");
    let (process, addr) = Process::alone(engine.addr, &["--set", &limit, "--set", "limits.workers=1"]);
    let memory = process.memory();
    let asked_once = || {
        let mut client = Client::connect(addr);
        assert_eq!(client.send(get("/live")).answer().status, 200);
        client
    };
    let begun = Instant::now();
    let mut crowd: Vec<Client> = (0..CROWD).map(|_| asked_once()).collect();
    let opened = begun.elapsed();
    let each = process.memory().saturating_sub(memory) / CROWD as u64;

    // Nobody wants anything: neither does the proxy.
    let (idle, cpu) = (Duration::from_secs(2), process.cpu());
    assert!(crowd[CROWD - 1].is_quiet(idle), "an idle connection was closed");
    let spent = process.cpu().saturating_sub(cpu);
    assert!(spent < idle / 4, "{spent:?} of {idle:?} for connections that do nothing");

    // Newcomers are served at once, and each costs the one that was idle for longest.
    let begun = Instant::now();
    let mut newcomers: Vec<Client> = (0..MORE).map(|_| asked_once()).collect();
    let taken = begun.elapsed();
    for (n, client) in crowd.iter_mut().enumerate().take(MORE / 2) {
        assert_eq!(client.closes(), End::Broken, "connection {n} was idle for longest");
    }
    for (n, client) in crowd.iter_mut().enumerate().skip(2 * MORE).step_by(97) {
        assert!(client.is_quiet(Duration::from_millis(1)), "connection {n} was closed before older ones");
        assert_eq!(client.send(post(CHAT, "{}")).answer().status, 200, "connection {n}");
    }
    assert!(newcomers.iter_mut().all(|client| client.send(post(CHAT, "{}")).answer().status == 200));
    println!(
        "{CROWD} idle connections: {each} bytes each, opened in {opened:?}; {MORE} more in {taken:?}; \
         idle they take {spent:?} of {idle:?}"
    );
    assert!(each <= 20 * 1024, "{each} bytes each");

    drop((crowd, newcomers));
    eventually("their descriptors are free", || process.descriptors() < 100);
    assert_eq!(Client::ask(addr, post(CHAT, "{}")).status, 200);
}
