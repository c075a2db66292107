//! Groups G and J: what is taken for a hang and what is not, over the simulated engine.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::harness::client::{Client, get, post};
use crate::harness::daemon::{Daemon, Setup};
use crate::harness::scene::{
    CHAT, SOON, engine_pid, got, is_remarked, is_whole, number_at, open_stream, quick, refuses_with, replaces, script,
    send, stream_of, streamed, text_at, the_one,
};

fn is_suspected(status: &Value) -> bool {
    status["engine"]["suspected_seconds"].is_number()
}

async fn suspects(daemon: &mut Daemon) -> Value {
    daemon
        .until("a hang is suspected", SOON, async |daemon| {
            let status = daemon.status().await?;
            assert_ne!(text_at(&status, "/state"), "failing", "it was ended without a suspicion before: {status}");
            is_suspected(&status).then_some(status)
        })
        .await
}

#[tokio::test]
async fn g10_a_stopped_rank_is_suspected_at_once_by_name_and_trusted_again_when_it_goes_on() {
    let mut daemon = quick("").set("engine.tp", "3").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let rank = the_one(&daemon, "sglang::scheduler_TP1");
    let begun = Instant::now();
    send(rank, Signal::SIGSTOP);
    // Nobody waits, and the limit of two minutes is far: it is known by its state alone.
    let status = suspects(&mut daemon).await;
    println!("figure: SIGSTOP of a rank to its suspicion, nobody waiting: {:?}", begun.elapsed());
    let named = format!("sglang::scheduler_TP1 (pid {rank}) is stopped");
    assert!(text_at(&status, "/engine/suspicion").contains(&named), "{status}");
    refuses_with(&mut daemon, &get("/ready"), "engine_suspected").await;
    let page = got(daemon.admin(), "/metrics").text();
    assert!(page.contains("\nsglangd_engine_hang_suspected 1\n"), "{page}");
    assert!(page.contains("\nsglangd_engine_hangs_suspected_total 1\n"), "{page}");
    assert!(daemon.log().contains(&format!("a hang of the engine is suspected: {named}")), "{}", daemon.log());
    send(rank, Signal::SIGCONT);
    daemon.until("trusted again", SOON, async |daemon| (!is_suspected(&daemon.status().await?)).then_some(())).await;
    let status = daemon.status().await.unwrap();
    assert_eq!((engine_pid(&status), number_at(&status, "/engine/suspected_total")), (first, 1), "{status}");
    assert!(is_whole(&streamed(daemon.public(), 3)));
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g10_a_stopped_detokenizer_is_hung_after_the_limit_though_the_ranks_go_on() {
    let mut daemon = quick("").set("health.hang_after", "4s").env("SGLANG_SIM_TOKENS_PER_SECOND", "20").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    // The simulated scheduler needs no detokenizer: its tokens and batch lines flow on, as the real one's lines do.
    let stream = open_stream(daemon.public(), 2000);
    let begun = Instant::now();
    send(the_one(&daemon, "sglang::detokenizer"), Signal::SIGSTOP);
    suspects(&mut daemon).await;
    let again = replaces(&mut daemon, first).await;
    assert!(begun.elapsed() > Duration::from_secs(4), "not before the limit");
    assert_eq!(number_at(&again, "/engine/restarts"), 1);
    let log = daemon.log();
    assert!(log.contains("The engine hung: sglang::detokenizer (pid"), "{log}");
    drop(stream);
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g06_a_health_of_200_is_not_believed_when_the_scheduler_does_nothing() {
    // No rank is dead or stopped, and `/health` says 200 to every probe.
    let mut daemon = quick("health_lies,stall_after_tokens=20")
        .set("health.hang_after", "6s")
        .set("health.probe_interval", "1s")
        .start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let mut client = Client::connect(daemon.public());
    client.send(stream_of(50));
    suspects(&mut daemon).await;
    replaces(&mut daemon, first).await;
    let log = daemon.log();
    assert!(log.contains("The engine hung: no token, no batch") && log.contains("while a request waits"), "{log}");
    assert!(log.contains("its /health says 200 all the while"), "{log}");
    assert!(!is_whole(&client.answer()));
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g07_a_prefill_longer_than_the_limit_under_load_is_busy_and_not_hung() {
    let mut daemon = quick("busy_prefill=60")
        .set("health.hang_after", "7s")
        .set("shutdown.grace", "10s")
        .set("health.probe_interval", "1s")
        .env("SGLANG_HEALTH_CHECK_TIMEOUT", "1")
        .start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let clients: Vec<Client> = (0..4)
        .map(|_| {
            let mut client = Client::connect(daemon.public());
            client.send(stream_of(3));
            client
        })
        .collect();
    let mut busy = false;
    let begun = Instant::now();
    daemon
        .until("longer than the limit", SOON, async |daemon| {
            let status = daemon.status().await?;
            let state = text_at(&status, "/state");
            assert!(["ready", "busy"].contains(&state.as_str()), "it was called hung: {status}");
            busy |= state == "busy";
            (begun.elapsed() > Duration::from_secs(10)).then_some(())
        })
        .await;
    assert!(busy, "its probes failed all the time: {}", daemon.log());
    let status = daemon.status().await.unwrap();
    assert_eq!((engine_pid(&status), number_at(&status, "/requests/in_flight")), (first, 4), "{status}");
    drop(clients);
    daemon.stops_clean(SOON).await;
}

/// A start of a script that never becomes ready, until it is given up: the reason.
async fn given_up(setup: Setup, text: &str) -> String {
    let setup = script(setup, text).set("start.stall", "3s").set("start.limit", "9s").set("restart.max", "1");
    let mut daemon = setup.start();
    let status = daemon.reaches(&["gave_up"], SOON).await;
    daemon.stops_clean(SOON).await;
    text_at(&status, "/reason")
}

#[tokio::test]
async fn g04_a_silent_start_that_reads_goes_on_until_the_last_limit() {
    let reason = given_up(quick(""), "while :; do head -c 4000000 /dev/zero >/dev/null; sleep 0.1; done").await;
    assert!(reason.contains("longer than start.limit (9 s)"), "{reason}");
}

#[tokio::test]
async fn g04_a_silent_start_that_compiles_goes_on_until_the_last_limit() {
    let text = "cp /bin/sh \"$TMPDIR/cicc\"\nwhile :; do \"$TMPDIR/cicc\" -c 'sleep 0.5; :'; done";
    let reason = given_up(quick(""), text).await;
    assert!(reason.contains("longer than start.limit (9 s)"), "{reason}");
}

#[tokio::test]
async fn g04_a_silent_start_that_spins_makes_no_progress() {
    let reason = given_up(quick(""), "while :; do :; done").await;
    assert!(reason.contains("no progress for start.stall (3 s) while importing"), "{reason}");
}

#[tokio::test]
async fn g04_a_stopped_rank_is_named_as_what_a_start_hangs_at() {
    let mut daemon =
        quick("hang_at_load").set("engine.tp", "2").set("restart.max", "1").set("start.stall", "6s").start();
    daemon
        .until("the rank loads", SOON, async |daemon| {
            (daemon.processes_named("sglang::scheduler_TP1").len() == 1).then_some(())
        })
        .await;
    send(the_one(&daemon, "sglang::scheduler_TP1"), Signal::SIGSTOP);
    let status = suspects(&mut daemon).await;
    assert!(text_at(&status, "/engine/suspicion").starts_with("sglang::scheduler_TP1 (pid"), "{status}");
    let reason = text_at(&daemon.reaches(&["gave_up"], SOON).await, "/reason");
    assert!(reason.contains("start.stall (6 s) while") && reason.contains("sglang::scheduler_TP1"), "{reason}");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn speculative_decoding_that_does_nothing_is_said_in_log_status_and_metrics() {
    let flags = "engine:\n  flags:\n    speculative-algorithm: EAGLE\n";
    let mut daemon = quick("idle_speculation").config(flags).env("SGLANG_SIM_TOKENS_PER_SECOND", "2000").start();
    daemon.is_ready(SOON).await;
    assert!(!daemon.status().await.unwrap()["warnings"].to_string().contains("speculative"), "not before any load");
    let stream = open_stream(daemon.public(), 30_000);
    let status = daemon
        .until("the remark", SOON, async |daemon| {
            let status = daemon.status().await?;
            (text_at(&status, "/engine/remarks/0/kind") == "speculation_idle").then_some(status)
        })
        .await;
    let said = "speculative decoding (EAGLE) does nothing: its accept length is 1.00";
    assert!(status["warnings"].to_string().contains(said), "{status}");
    assert_eq!(daemon.log().matches(said).count(), 1, "once: {}", daemon.log());
    let page = got(daemon.admin(), "/metrics").text();
    assert!(page.contains("sglangd_engine_remark{kind=\"speculation_idle\"} 1"), "{page}");
    drop(stream);
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn a_kv_cache_without_room_is_said_in_log_status_and_metrics() {
    let mut daemon = quick("").env("SGLANG_SIM_KV_TOKENS", "9600").start();
    daemon.is_ready(SOON).await;
    is_remarked(&mut daemon, "kv_cache_small", "the KV cache holds only 9600 tokens, 300 for each of 32 requests")
        .await;
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn a_prefix_cache_that_never_hits_is_said_in_log_status_and_metrics() {
    let mut daemon = quick("").env("SGLANG_SIM_TOKENS_PER_SECOND", "100000").start();
    daemon.is_ready(SOON).await;
    let prompt = "word ".repeat(1_100);
    let body = json!({"model": "small", "max_tokens": 1, "messages": [{"role": "user", "content": prompt}]});
    let request = post(CHAT, &body.to_string());
    let mut client = Client::connect(daemon.public());
    for n in 0..256 {
        assert_eq!(client.send(&request).answer().status, 200, "request {n}");
    }
    is_remarked(&mut daemon, "prefix_cache_idle", "the prefix cache does nothing: none of the last 25").await;
    daemon.stops_clean(SOON).await;
}
