//! The `openai` and `anthropic` SDKs for Python: whole answers, keys, cancels, time-outs, retries, deaths.

use nix::sys::signal::Signal;

use super::{KEY, Program, answered, counted, is_idle, serving, started};
use crate::harness::client::{Client, post_with};
use crate::harness::daemon::Daemon;
use crate::harness::scene::{CHAT, SOON, engine_pid, open_stream_with, replaces, send};

#[derive(Debug, Clone, Copy)]
struct Sdk {
    name: &'static str,
    route: &'static str,
    /// Its word for an answer that reached its limit.
    length: &'static str,
}

const OPENAI: Sdk = Sdk { name: "openai", route: CHAT, length: "length" };
const ANTHROPIC: Sdk = Sdk { name: "anthropic", route: "/v1/messages", length: "max_tokens" };

impl Sdk {
    fn start(self, daemon: &Daemon, what: &str) -> Program {
        Program::start("sdk.py", &[self.name, &daemon.url(""), KEY, "small", what])
    }
}

async fn talks(sdk: Sdk) {
    let mut daemon = started(serving("", "")).await;
    let mut program = sdk.start(&daemon, "talk");

    let stream = program.says_of("stream");
    assert_eq!((&stream["pieces"], &stream["tokens"], &stream["finish"]), (&40.into(), &40.into(), &sdk.length.into()));
    let whole = program.says_of("whole");
    assert_eq!(whole["text"], stream["text"], "a stream and a whole answer are not the same");
    assert_eq!((&whole["tokens"], &whole["finish"]), (&40.into(), &sdk.length.into()), "{whole}");
    assert_eq!(whole["request"], "of-the-client-1", "the client's own id of its request");

    for header in ["bearer", "x-api-key"] {
        let told = program.says_of(header);
        assert_eq!(told["good"]["error"], serde_json::Value::Null, "{told}");
        let wrong = (&told["wrong"]["error"], &told["wrong"]["status"]);
        assert_eq!(wrong, (&"AuthenticationError".into(), &401.into()), "{told}");
    }
    assert_eq!(counted(&daemon, "sglangd_client_aborts_total"), 0, "who read to the end has not left");

    assert_eq!(program.says_of("running")["running"], 1);
    let cancelled = program.says_of("cancelled");
    assert_eq!((&cancelled["running"], &cancelled["pieces"]), (&0.into(), &3.into()), "{cancelled}");
    let late = program.says_of("timed out");
    assert_eq!((&late["error"], &late["running"]), (&"APITimeoutError".into(), &0.into()), "{late}");
    assert!(late["seconds"].as_f64().unwrap() >= 1.4, "{late}");
    program.ends();

    is_idle(&mut daemon).await;
    assert_eq!(counted(&daemon, "sglangd_client_aborts_total"), 2, "the cancel and the time-out");
    // Two of the stream and its whole, two with good keys, the cancelled stream: its head had come.
    assert_eq!((answered(&daemon, sdk.route, "2xx"), answered(&daemon, sdk.route, "left")), (5, 1));
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn the_openai_sdk_streams_cancels_and_times_out() {
    talks(OPENAI).await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn the_anthropic_sdk_streams_cancels_and_times_out() {
    talks(ANTHROPIC).await;
}

/// No room, and then there is: the SDK waits as long as it was told to, and gets its answer.
async fn insists(sdk: Sdk, daemon: &mut Daemon, status: u64) {
    let holder = open_stream_with(daemon.public(), &format!("X-Api-Key: {KEY}\r\n"), 3000);
    let mut program = sdk.start(daemon, "insist");
    let before = answered(daemon, sdk.route, &format!("{}xx", status / 100));
    daemon
        .until("the SDK is refused", super::PATIENCE, async |daemon| {
            (answered(daemon, sdk.route, &format!("{}xx", status / 100)) > before).then_some(())
        })
        .await;
    drop(holder);
    let told = program.says();
    program.ends();
    assert_eq!(told["tokens"], 5, "{told}");
    let statuses = told["statuses"].as_array().unwrap();
    let (last, refused) = statuses.split_last().unwrap();
    assert!(*last == 200 && !refused.is_empty() && refused.iter().all(|said| *said == status), "{told}");
    let waits = told["told"].as_array().unwrap().iter().zip(told["waited"].as_array().unwrap());
    for (after, waited) in waits {
        let after: f64 = after.as_str().unwrap_or_else(|| panic!("no Retry-After: {told}")).parse().unwrap();
        let waited = waited.as_f64().unwrap();
        // Its own backoff, where it is told nothing, is half a second at first, and eight at most.
        assert!((1.0..=60.0).contains(&after) && waited >= after && waited < after + 5.0, "{told}");
    }
    is_idle(daemon).await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn f02_both_sdks_retry_when_they_are_told_to() {
    // The node is full: 503.
    let full = serving("", "").set("limits.max", "1").set("limits.queue", "0");
    let mut daemon = started(full).await;
    for sdk in [OPENAI, ANTHROPIC] {
        insists(sdk, &mut daemon, 503).await;
    }
    daemon.stops_clean(SOON).await;
    // The key's own limit: 429.
    let mut daemon = started(serving("", "concurrency=1 queue=0")).await;
    for sdk in [OPENAI, ANTHROPIC] {
        insists(sdk, &mut daemon, 429).await;
    }
    daemon.stops_clean(SOON).await;
}

/// An engine that dies in mid-stream is an exception in both, in no way an answer that ended.
#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn d02_both_sdks_raise_when_the_engine_dies_in_mid_stream() {
    let mut daemon = started(serving("", "")).await;
    for sdk in [OPENAI, ANTHROPIC] {
        let mut program = sdk.start(&daemon, "hold");
        assert_eq!(program.says()["begun"], true);
        let engine = engine_pid(&daemon.status().await.unwrap());
        send(engine, Signal::SIGKILL);
        let told = program.says();
        program.ends();
        let error = told["error"].as_str().unwrap_or_else(|| panic!("{sdk:?} took it for an answer: {told}"));
        assert!(error.starts_with("API") || error.ends_with("Error"), "{told}");
        assert!(told["message"].as_str().unwrap().contains("engine"), "it says nothing of the engine: {told}");
        replaces(&mut daemon, engine).await;
    }
    is_idle(&mut daemon).await;
    // The next engine serves as the first did.
    let body = r#"{"model":"small","max_tokens":2,"messages":[{"role":"user","content":"hi"}]}"#;
    let answer = Client::ask(daemon.public(), post_with(CHAT, &format!("X-Api-Key: {KEY}\r\n"), body));
    assert_eq!((answer.status, &answer.json()["usage"]["completion_tokens"]), (200, &2.into()));
    daemon.stops_clean(SOON).await;
}
