//! Mixed load through `sglangd serve` for half an hour, the simulated engine killed each minute: clients
//! that finish, leave, stall and flood. `tests/long soak MINUTES` runs it.

mod clients;
mod judge;
mod taken;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::time::Instant;

use clients::{FLOOD, Field, STALL, STEADY};
use judge::Outcome;
use taken::{Samples, Taken};

use crate::harness::client::{Client, post_with};
use crate::harness::daemon::Daemon;
use crate::harness::front::keys_lines;
use crate::harness::scene::{
    CHAT, SOON, engine_pid, is_whole, number_at, proxy_pid, quick, send, state_dir, stream_body,
};

const MAX: usize = 16;
/// From a death to an engine that serves again, on a busy machine.
const RESTORED: Duration = Duration::from_secs(45);
/// From then to the last client that notices: one of them looks after eight seconds only.
const NOTICED: Duration = Duration::from_secs(12);
const MIB: u64 = 1 << 20;

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// One engine's death.
#[derive(Debug)]
struct Death {
    at: Instant,
    served_again: Duration,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "half an hour: tests/long soak"]
async fn half_an_hour_of_everything_loses_nothing_and_hides_nothing() {
    let minutes = from_environment("SGLANGD_SOAK_MINUTES", 30);
    let seed = from_environment("SEED", 1);
    let length = Duration::from_mins(minutes);

    let setup = quick("");
    let keys = setup.folder().join("keys");
    let granted = [("steady", STEADY, "weight=4"), ("flood", FLOOD, "concurrency=4 queue=20")];
    std::fs::write(&keys, keys_lines(&granted)).unwrap();
    let mut daemon = setup
        .set("auth.keys_file", keys.to_str().unwrap())
        .set("limits.max", &MAX.to_string())
        .set("restart.max", "1000")
        // A death each minute is a crash loop, whose pauses would double up to a minute.
        .set("restart.backoff_max", "1s")
        .set("engine.tp", "2")
        .start();
    let first = daemon.is_ready(SOON).await;
    let (supervisor, proxy) = (daemon.pid(), proxy_pid(&first));
    let field = Arc::new(Field::new(daemon.public()));
    let at_rest = (Taken::by(supervisor), Taken::by(proxy));

    let begun = Instant::now();
    let crowd = clients::start(&field, seed);
    let mut samples = Samples::default();
    let mut deaths: Vec<Death> = Vec::new();
    let mut next_death = begun + Duration::from_mins(1);
    while begun.elapsed() < length {
        tokio::time::sleep(Duration::from_secs(5)).await;
        samples.add(begun.elapsed(), Taken::by(supervisor), Taken::by(proxy));
        assert_eq!(*field.wrong.lock().unwrap(), Vec::<String>::new());
        assert!(!crowd.iter().any(std::thread::JoinHandle::is_finished), "a client gave up");
        if Instant::now() >= next_death && begun.elapsed() + RESTORED < length {
            next_death += Duration::from_mins(1);
            deaths.push(kill_the_engine(&mut daemon, deaths.len()).await);
        }
    }
    field.over.store(true, Relaxed);
    for client in crowd {
        let name = client.thread().name().unwrap_or_default().to_owned();
        assert!(client.join().is_ok(), "a client of {name} failed");
    }

    println!("{minutes} minutes, seed {seed}");
    println!("{}", samples.shown(at_rest));
    judge_all(&field, &deaths, begun, length);

    no_place_is_lost(&mut daemon).await;
    let status = daemon.status().await.unwrap();
    assert_eq!((number_at(&status, "/proxy/restarts"), proxy_pid(&status)), (0, proxy), "{status}");
    samples.are_bounded(length);
    let bundles = std::fs::read_dir(state_dir(&daemon).join("bundles")).map_or(0, Iterator::count);
    println!("  {bundles} bundles kept");
    assert!(bundles <= 32, "{bundles} bundles: they are not cleared away");
    daemon
        .until("descriptors are as they were before the first client", SOON, async |_| {
            let (now, before) = ((Taken::by(supervisor), Taken::by(proxy)), &at_rest);
            // The proxy keeps an idle connection to the engine for a moment, and its first look at the load.
            let many = now.0.descriptors > before.0.descriptors + 4 || now.1.descriptors > before.1.descriptors + 6;
            (!many).then_some(())
        })
        .await;
    daemon.stops_clean(SOON).await;
}

/// What is said of the clients now is all that will be said.
fn judge_all(field: &Field, deaths: &[Death], begun: Instant, length: Duration) {
    let tally = field.tally.lock().unwrap();
    println!("  {} engines killed\n{}", deaths.len(), tally.shown());
    if let Some(longest) = deaths.iter().map(|death| death.served_again).max() {
        println!("  served again after {longest:?} at most");
    }
    assert_eq!(*field.wrong.lock().unwrap(), Vec::<String>::new());

    // Nobody who did nothing wrong was harmed but by a death.
    let harm = field.harm.lock().unwrap();
    let groundless: Vec<_> = harm
        .iter()
        .filter(|(at, ..)| !deaths.iter().any(|death| (death.at..death.at + death.served_again + NOTICED).contains(at)))
        .map(|(at, kind, outcome)| format!("{kind}: {outcome:?} after {:?}", *at - begun))
        .collect();
    assert!(groundless.is_empty(), "harmed without a cause: {groundless:#?}");
    for kind in ["stream", "whole", "messages", "http2", "leaver", "short stall", "flood", "half request"] {
        assert!(tally.of(kind) > 0, "no {kind} at all");
    }
    if length > 2 * STALL {
        assert!(tally.of("long stall") > 0, "nobody stalled for long");
    }
    if !deaths.is_empty() {
        assert!(tally.of_outcome(Outcome::Told) > 0, "no stream was told of any death");
    }
}

/// SIGKILL to its main process or one of its others, in turn; waits until another serves.
async fn kill_the_engine(daemon: &mut Daemon, nth: usize) -> Death {
    let status = daemon.status().await.expect("the supervisor answers");
    let engine = engine_pid(&status);
    let ranks = status["engine"]["ranks"].as_array().cloned().unwrap_or_default();
    let victim = match nth % 2 {
        0 => engine,
        _ => ranks.first().map_or(engine, |rank| i32::try_from(number_at(rank, "/pid")).unwrap()),
    };
    let at = Instant::now();
    send(victim, Signal::SIGKILL);
    daemon
        .until("another engine serves", RESTORED, async |daemon| {
            let status = daemon.status().await?;
            (status["state"] == "ready" && engine_pid(&status) != engine).then_some(())
        })
        .await;
    Death { at, served_again: at.elapsed() }
}

/// Nothing is open, and as many as may be are let through at once.
async fn no_place_is_lost(daemon: &mut Daemon) {
    let open = async |daemon: &Daemon| {
        let status = daemon.status().await?;
        Some((number_at(&status, "/requests/in_flight"), number_at(&status, "/requests/queued")))
    };
    daemon.until("nothing is open", SOON, async |daemon| (open(daemon).await? == (0, 0)).then_some(())).await;
    let asked = |tokens| post_with(CHAT, &format!("Authorization: Bearer {STEADY}\r\n"), &stream_body(tokens));
    let mut all: Vec<Client> = (0..MAX).map(|_| Client::connect(daemon.public())).collect();
    for client in &mut all {
        client.send(asked(3000)).until("\"content\":\"This");
    }
    daemon
        .until("every place is taken", SOON, async |daemon| {
            (open(daemon).await? == (i64::try_from(MAX).unwrap(), 0)).then_some(())
        })
        .await;
    drop(all);
    daemon.until("every place is free", SOON, async |daemon| (open(daemon).await? == (0, 0)).then_some(())).await;
    assert!(is_whole(&Client::ask(daemon.public(), asked(3))));
}
