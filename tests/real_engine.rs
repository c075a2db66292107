//! The unmodified SGLang 0.5.23 on the CPU, run through `sglangd serve`: real imports, real process
//! tree, real signals. `tests/run` installs it and names its folders in the environment.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::harness::daemon::{Daemon, SGLANGD, Setup, eventually, free_address};
use crate::hub_cache;

/// Imports alone take 40 s on two free cores, and these tests may share them.
const START: Duration = Duration::from_mins(7);
/// Eight ranks import side by side on two cores.
const START_TP8: Duration = Duration::from_mins(15);
/// Long enough that no grace below lets it end by itself.
const LONG_ANSWER: u32 = 2900;

const REPO: &str = "sglangd-test/tiny";

/// What `tests/run` prepared; a test that cannot run must fail, not pass by doing nothing.
pub fn prepared(variable: &str) -> PathBuf {
    let value = std::env::var_os(variable);
    let path = PathBuf::from(value.unwrap_or_else(|| panic!("{variable} is not set: use `tests/run heavy`")));
    assert!(path.exists(), "{variable} names {}, which is not there: use `tests/run heavy`", path.display());
    path
}

fn python() -> PathBuf {
    prepared("SGLANGD_TEST_VENV").join("bin/python")
}

/// What the unmodified engine needs to run without a GPU.
fn on_the_cpu(setup: Setup) -> Setup {
    setup.env("SGLANG_USE_CPU_ENGINE", "1").env("TRANSFORMERS_VERBOSITY", "error").config(&format!(
        "engine:
  command: [{}, -m, sglang.launch_server]
  flags:
    device: cpu
    attention-backend: torch_native
    sampling-backend: pytorch
    # SGLang refuses this one in its YAML: sglangd has to put it on the command line.
    disable-cuda-graph: true
    disable-overlap-schedule: true
    mem-fraction-static: 0.3
    max-total-tokens: 65536
    enable-metrics: true
    # An idle scheduler spins otherwise, on one of two cores.
    sleep-on-idle: true
",
        python().display()
    ))
}

fn one_rank(setup: Setup) -> Setup {
    on_the_cpu(setup).config("engine:\n  tp: 1\n  flags:\n    max-running-requests: 8\n    context-length: 3072\n")
}

fn from_folder() -> Setup {
    let model = prepared("SGLANGD_TEST_MODEL");
    Setup::bare().config(&format!("model:\n  path: {}\n  name: tiny\n", model.display()))
}

fn chat(max_tokens: u32) -> Value {
    json!({
        "model": "tiny",
        "messages": [{"role": "user", "content": "Tell me about the sea."}],
        "temperature": 0, "max_tokens": max_tokens,
        "stream": true,
    })
}

fn http() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

/// What a stream had brought when it ended, one way or the other.
#[derive(Debug, Default)]
struct Streamed {
    text: String,
    /// The end of the body was missing: how HTTP/1.1 says that something is not complete.
    broken: bool,
}

impl Streamed {
    fn events(&self) -> impl Iterator<Item = &str> {
        self.text.split("\n\n").filter_map(|event| event.trim().strip_prefix("data: "))
    }

    fn is_done(&self) -> bool {
        self.events().any(|event| event == "[DONE]")
    }

    fn error(&self) -> Option<Value> {
        self.events().filter_map(|event| serde_json::from_str::<Value>(event).ok()).find(|e| e.get("error").is_some())
    }

    /// Reads until there are this many events, or the end.
    async fn read(&mut self, answer: &mut reqwest::Response, events: usize) {
        while self.events().count() < events {
            match answer.chunk().await {
                Ok(Some(bytes)) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                Ok(None) => return,
                Err(_) => {
                    self.broken = true;
                    return;
                }
            }
        }
    }
}

async fn open_stream(daemon: &Daemon, max_tokens: u32) -> reqwest::Response {
    let answer = http().post(daemon.url("/v1/chat/completions")).json(&chat(max_tokens)).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    answer
}

async fn streams(daemon: &Daemon) {
    let mut streamed = Streamed::default();
    // The text is noise, and a token without visible text sends no event: many more tokens than events asked.
    streamed.read(&mut open_stream(daemon, 48).await, usize::MAX).await;
    assert!(streamed.is_done() && !streamed.broken, "{streamed:?}");
    assert!(streamed.events().count() > 10, "{streamed:?}");
}

/// A client in Python; ended with the test, whatever becomes of it.
struct Client(Child);

impl Client {
    fn start(script: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(python());
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/").to_owned() + script).args(arguments);
        // Both say little: the pipes never fill.
        Self(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// What it found out.
    async fn result(mut self, within: Duration) -> Value {
        let client = &mut self.0;
        let status = eventually("the client's end", within, async || client.try_wait().unwrap()).await;
        let (mut said, mut complained) = (String::new(), String::new());
        client.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        client.stderr.take().unwrap().read_to_string(&mut complained).unwrap();
        assert!(status.success(), "{status}: {said}{complained}");
        serde_json::from_str(&said).unwrap()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text_at(status: &Value, key: &str) -> String {
    status.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn engine_pid(status: &Value) -> i64 {
    status.pointer("/engine/pid").and_then(Value::as_i64).expect("status has engine.pid")
}

/// Two children of the engine that are still importing: the window in which no parent-death signal is armed.
async fn children_import(daemon: &mut Daemon) {
    daemon
        .until("two children of the engine that import", START, async |daemon| {
            (daemon.processes_named("multiprocessing.spawn").len() >= 2).then_some(())
        })
        .await;
    assert!(daemon.processes_named("sglang::").is_empty(), "too late: a child has its title already");
}

/// A request over a restart is held for 30 s, its stream begun after 15: it is answered by the next engine if
/// that is up by then, and told the truth if not, which in a stream is an error event and an abnormal end. It is
/// never dropped.
async fn holds_or_tells_meanwhile(daemon: &Daemon) {
    let mut answer = http().post(daemon.url("/v1/chat/completions")).json(&chat(4)).send().await.unwrap();
    if answer.status() == 200 {
        let mut streamed = Streamed::default();
        streamed.read(&mut answer, usize::MAX).await;
        let whole = streamed.is_done() && !streamed.broken && streamed.error().is_none();
        let told = !streamed.is_done() && streamed.broken && streamed.error().is_some();
        assert!(whole || told, "a held stream is whole, or says that it is not: {streamed:?}");
        return;
    }
    assert_eq!(answer.status(), 503);
    assert!(answer.headers().contains_key("retry-after"), "{:?}", answer.headers());
    let body: Value = answer.json().await.unwrap();
    assert!(body.pointer("/error/message").is_some(), "{body}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "heavy: tests/run prepares it"]
async fn it_serves_streams_survives_a_dead_scheduler_and_stops_in_mid_stream() {
    let setup = one_rank(from_folder()).set("shutdown.grace", "14s");
    let base = format!("http://{}/v1", setup.public());
    let patient = Client::start("patient.py", &[&base, "tiny", &START.as_secs().to_string()]);
    let begun = Instant::now();
    let mut daemon = setup.start();

    let url = daemon.url("/live");
    let first_answer = daemon
        .until("any answer on the public port", Duration::from_secs(10), async |_| http().get(&url).send().await.ok());
    assert_eq!(first_answer.await.status(), 200, "/live while the engine starts");
    let to_first_answer = begun.elapsed();

    let mut states = BTreeSet::new();
    let mut phases = BTreeSet::new();
    let mut percent = 0.0;
    daemon
        .until("ready", START, async |daemon| {
            let status = daemon.status().await?;
            states.insert(text_at(&status, "state"));
            phases.insert(text_at(&status, "phase"));
            let now = status.get("percent").and_then(Value::as_f64).unwrap_or(percent);
            assert!(now >= percent, "the start went back from {percent} % to {now} %");
            percent = now;
            (text_at(&status, "state") == "ready").then_some(())
        })
        .await;
    let to_ready = begun.elapsed();
    // `launching` and `preparing` may be too short to be seen.
    for state in ["loading", "ready"] {
        assert!(states.contains(state), "{state} was never seen, but {states:?}");
    }
    assert!(phases.len() >= 3, "hardly any phase was seen: {phases:?}");

    let told = daemon.command("status").arg("--json").arg("--runtime-dir").arg(daemon.runtime_dir()).output().unwrap();
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(text_at(&told, "state"), "ready");
    assert_eq!(told.pointer("/model/name").and_then(Value::as_str), Some("tiny"));
    assert_eq!(told.pointer("/engine/version").and_then(Value::as_str), Some("0.5.23"));

    let waited = patient.result(Duration::from_mins(1)).await;
    assert!(waited["unavailable"].as_u64().unwrap() >= 1, "{waited}");
    assert_eq!((&waited["malformed_503"], &waited["other"]), (&json!([]), &json!([])), "{waited}");
    assert_eq!(waited["stream"]["done"], true, "{waited}");

    let sdk = Client::start("openai_stream.py", &[&base, "tiny", "32"]).result(Duration::from_mins(2)).await;
    assert_eq!((&sdk["completion_tokens"], &sdk["finish"]), (&json!(32), &json!("length")), "{sdk}");
    assert!(sdk["chunks"].as_u64().unwrap() > 20, "one by one, not in a heap: {sdk}");

    let probe =
        daemon.command("probe").args(["--url", &daemon.url(""), "--once", "--timeout", "120"]).output().unwrap();
    assert!(
        probe.status.success(),
        "{}{}",
        String::from_utf8_lossy(&probe.stdout),
        String::from_utf8_lossy(&probe.stderr)
    );
    // It samples, and noise may end at any token; only that it asks both and shows what comes can be told.
    let shown = String::from_utf8_lossy(&probe.stdout);
    assert!(shown.contains("transformer architecture") && shown.contains("Python and Rust"), "{shown}");
    assert!(shown.contains("[answer]"), "{shown}");

    // A dead scheduler: the launcher goes with it, and a new engine takes its place.
    let before = engine_pid(&daemon.status().await.unwrap());
    daemon.note_processes();
    let schedulers = daemon.processes_named("sglang::scheduler");
    assert_eq!(schedulers.len(), 1, "{schedulers:?}");
    let killed = Instant::now();
    kill(Pid::from_raw(schedulers[0].pid), Signal::SIGKILL).unwrap();
    daemon
        .until("the dead scheduler is noticed", Duration::from_secs(15), async |daemon| {
            daemon.state().await.filter(|s| s != "ready" && s != "busy")
        })
        .await;
    let to_notice = killed.elapsed();
    holds_or_tells_meanwhile(&daemon).await;
    let status = daemon.is_ready(START).await;
    assert_ne!(engine_pid(&status), before);
    assert_eq!(status.pointer("/engine/restarts").and_then(Value::as_u64), Some(1), "{status}");
    streams(&daemon).await;

    // A stop in mid-stream.
    let mut answer = open_stream(&daemon, LONG_ANSWER).await;
    let mut streamed = Streamed::default();
    streamed.read(&mut answer, 5).await;
    assert!(!streamed.broken, "{streamed:?}");
    daemon.terminate();
    let stopping = Instant::now();
    streamed.read(&mut answer, usize::MAX).await;
    let error = streamed.error();
    assert!(
        streamed.is_done() != error.is_some(),
        "a stream ends complete or with an error event, never both or neither: done {}, error {error:?}",
        streamed.is_done()
    );
    assert!(streamed.broken || streamed.is_done(), "a cut stream must not look complete: {streamed:?}");
    assert_eq!(daemon.exit(Duration::from_secs(16)).await, 0, "{}", daemon.log());
    daemon.leaves_nothing(Duration::ZERO).await;
    eprintln!(
        "real engine, tp 1: first answer {to_first_answer:.1?}, ready {to_ready:.1?}, dead scheduler noticed {to_notice:.1?}, \
         stop in mid-stream {:.1?}; phases {phases:?}",
        stopping.elapsed()
    );
}

/// A scheduler can be told to spin by SIGUSR1.
fn may_spin(setup: Setup) -> Setup {
    setup.env("PYTHONPATH", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/spin"))
}

fn the_pid(daemon: &Daemon, title: &str) -> Pid {
    let found = daemon.processes_named(title);
    assert_eq!(found.len(), 1, "{title}: {found:?}");
    Pid::from_raw(found[0].pid)
}

/// The first suspicion of a hang: why, and after how long.
async fn suspects(daemon: &mut Daemon, within: Duration) -> (String, Duration) {
    let begun = Instant::now();
    daemon
        .until("a hang is suspected", within, async |daemon| {
            let status = daemon.status().await?;
            let why = status.pointer("/engine/suspicion")?.as_str()?.to_owned();
            (!why.is_empty()).then(|| (why, begun.elapsed()))
        })
        .await
}

/// The cause is told once it was examined, some time after the state.
async fn blames(daemon: &mut Daemon, words: &[&str]) {
    let log = async |daemon: &Daemon| words.iter().all(|word| daemon.log().contains(word)).then_some(());
    daemon.until("the cause in the log", Duration::from_secs(30), log).await;
}

async fn serves_no_more(daemon: &mut Daemon, within: Duration) -> Duration {
    let begun = Instant::now();
    daemon
        .until("it is acted upon", within, async |daemon| {
            daemon.state().await.filter(|state| state != "ready" && state != "busy").map(|_| begun.elapsed())
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "heavy: tests/run prepares it"]
async fn g10_a_stopped_a_spinning_and_a_dead_process_are_each_found_in_their_own_time() {
    let setup = may_spin(one_rank(from_folder())).set("health.hang_after", "60s").set("shutdown.grace", "14s");
    let mut daemon = setup.start();
    let first = engine_pid(&daemon.is_ready(START).await);
    streams(&daemon).await;

    // Stopped: by its state alone, nobody waiting. What goes on again is trusted again.
    let scheduler = the_pid(&daemon, "sglang::scheduler");
    kill(scheduler, Signal::SIGSTOP).unwrap();
    let (why, stopped) = suspects(&mut daemon, Duration::from_secs(15)).await;
    assert!(why.contains(&format!("sglang::scheduler (pid {scheduler}) is stopped")), "{why}");
    kill(scheduler, Signal::SIGCONT).unwrap();
    daemon
        .until("trusted again", Duration::from_secs(30), async |daemon| {
            (daemon.status().await?.pointer("/engine/suspected_seconds")?.is_null()).then_some(())
        })
        .await;
    streams(&daemon).await;

    // It spins, with a stream on it: CPU time is no sign of life.
    let mut answer = open_stream(&daemon, LONG_ANSWER).await;
    let mut streamed = Streamed::default();
    streamed.read(&mut answer, 5).await;
    kill(scheduler, Signal::SIGUSR1).unwrap();
    let (why, spinning) = suspects(&mut daemon, Duration::from_mins(1)).await;
    assert!(why.starts_with("no token, no batch, no figure that moves") && why.contains("waits"), "{why}");
    assert!(spinning > Duration::from_secs(20), "before any silence: {spinning:?}");
    let acted = spinning + serves_no_more(&mut daemon, Duration::from_secs(90)).await;
    blames(&mut daemon, &["The engine hung: no token"]).await;
    streamed.read(&mut answer, usize::MAX).await;
    assert!(streamed.error().is_some() && !streamed.is_done(), "{streamed:?}");
    let second = engine_pid(&daemon.is_ready(START).await);
    assert_ne!(second, first);

    // The detokenizer dies: with the engine's defaults 66 s of silence, here nothing is waited for.
    kill(the_pid(&daemon, "sglang::detokenizer"), Signal::SIGKILL).unwrap();
    let died = serves_no_more(&mut daemon, Duration::from_secs(10)).await;
    daemon.stops_clean(Duration::from_secs(16)).await;
    eprintln!(
        "real engine: SIGSTOP suspected after {stopped:.1?}; spinning suspected after {spinning:.1?}, acted upon after \
         {acted:.1?} (hang_after 60 s); dead detokenizer noticed after {died:.2?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "heavy: tests/run prepares it"]
async fn g06_a_health_of_200_with_a_dead_scheduler_is_not_believed() {
    // So switched, the engine answers 200 to every `/health`, whatever its scheduler does.
    let setup = may_spin(one_rank(from_folder()))
        .env("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "0")
        .set("health.hang_after", "24s")
        .set("health.probe_interval", "5s");
    let mut daemon = setup.start();
    daemon.is_ready(START).await;
    let mut answer = open_stream(&daemon, LONG_ANSWER).await;
    Streamed::default().read(&mut answer, 5).await;
    kill(the_pid(&daemon, "sglang::scheduler"), Signal::SIGUSR1).unwrap();
    let (_, suspected) = suspects(&mut daemon, Duration::from_secs(40)).await;
    let acted = suspected + serves_no_more(&mut daemon, Duration::from_mins(1)).await;
    blames(&mut daemon, &["The engine hung: no token", "its /health says 200 all the while"]).await;
    daemon.stops_clean(Duration::from_secs(27)).await;
    eprintln!("real engine: /health 200 all the while, suspected after {suspected:.1?}, acted upon after {acted:.1?}");
}

/// The embedded hub as a process of its own, ended with the test.
struct Hub {
    process: Child,
    url: String,
}

impl Hub {
    /// Serves the model's files under any repository's name.
    async fn start(model: &Path) -> Self {
        let address = free_address();
        let process = Command::new(SGLANGD)
            .args(["simulate", "hub", "--listen", &address.to_string(), "--folder"])
            .arg(model)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let hub = Self { process, url: format!("http://{address}") };
        let listing = format!("{}/api/models/{REPO}/revision/main", hub.url);
        eventually("the hub answers", Duration::from_secs(10), async || {
            http().get(&listing).send().await.ok().filter(|answer| answer.status() == 200)
        })
        .await;
        hub
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn from_hub(hub: &Hub) -> Setup {
    Setup::bare()
        .config(&format!("model:\n  repo: {REPO}\n  revision: main\n  name: tiny\nweights:\n  endpoint: {}\n", hub.url))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "heavy: tests/run prepares it"]
async fn it_fetches_from_the_hub_stops_while_children_import_and_then_serves() {
    let hub = Hub::start(&prepared("SGLANGD_TEST_MODEL")).await;
    let mut daemon = one_rank(from_hub(&hub)).start();
    children_import(&mut daemon).await;
    let snapshots = daemon.folder().join("home/.cache/huggingface/hub/models--sglangd-test--tiny/snapshots");
    assert_eq!(fs::read_dir(&snapshots).unwrap().count(), 1, "the snapshot in the standard cache");
    let found = hub_cache::found_offline(&daemon.folder().join("home/.cache/huggingface/hub"), REPO);
    assert!(text_at(&found, "folder").starts_with(&*snapshots.to_string_lossy()), "{found}");

    // The engine's main process dies of SIGTERM at once here; its children would live on for minutes.
    daemon.terminate();
    let stopping = Instant::now();
    assert_eq!(daemon.exit(Duration::from_secs(10)).await, 0, "{}", daemon.log());
    daemon.leaves_nothing(Duration::ZERO).await;
    eprintln!("real engine: stop while children import {:.1?}", stopping.elapsed());

    // Without the hub: what was fetched is complete.
    drop(hub);
    daemon.start_again();
    daemon.is_ready(START).await;
    streams(&daemon).await;
    let stopping = Instant::now();
    daemon.terminate();
    assert_eq!(daemon.exit(Duration::from_secs(25)).await, 0, "{}", daemon.log());
    daemon.leaves_nothing(Duration::ZERO).await;
    eprintln!("real engine: SIGTERM when idle to all gone {:.1?}", stopping.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "heavy: tests/run prepares it"]
async fn g25_a_supervisor_killed_while_the_ranks_import_leaves_nothing() {
    let mut daemon = one_rank(from_folder()).start();
    children_import(&mut daemon).await;
    daemon.note_processes();
    daemon.signal(Signal::SIGKILL);
    assert_eq!(daemon.exit(Duration::from_secs(1)).await, -9);
    let killed = Instant::now();
    eventually("no process of it is left", Duration::from_secs(2), async || {
        daemon.processes().is_empty().then_some(())
    })
    .await;
    eprintln!("real engine: SIGKILL of the supervisor while children import, all gone {:.2?}", killed.elapsed());

    // Files cannot be cleaned by a killed process; the next start does it.
    daemon.start_again();
    daemon.reaches(&["launching", "loading"], Duration::from_mins(1)).await;
    daemon.stops_clean(Duration::from_secs(15)).await;
}

/// The shipped configuration with what a machine without GPUs cannot have taken out.
fn eight_ranks() -> Setup {
    let model = prepared("SGLANGD_TEST_MODEL_TP8");
    let shipped = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/config.yaml"));
    on_the_cpu(Setup::bare().config_file(&shipped))
        .config(&format!(
            "model:
  path: {}
  name: tiny
engine:
  flags:
    # GPU kernels.
    moe-runner-backend: null
    speculative-algorithm: null
    speculative-num-steps: null
    speculative-eagle-topk: null
    speculative-num-draft-tokens: null
    # Needs a package of DeepSeek's own, which the image has and PyPI's sglang does not ask for.
    tool-call-parser: null
    # Eight ranks on two cores are slow, not dead.
    watchdog-timeout: 900
",
            model.display()
        ))
        // One group of cores a rank; and a NCCL that is not there, else the stub is found and refuses.
        .env("SGLANG_NCCL_SO_PATH", "/nonexistent")
        .env("SGLANG_CPU_OMP_THREADS_BIND", "0|1|0|1|0|1|0|1")
}

fn ranks(daemon: &Daemon) -> BTreeSet<String> {
    let titles = daemon.processes_named("sglang::scheduler_TP").into_iter();
    titles.map(|process| process.command).collect()
}

/// The one scenario of TP=8: at most three starts in it, whatever is added.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "heavy: tests/run prepares it"]
async fn tp8_the_shipped_configuration_starts_eight_ranks_loses_one_and_has_one_stopped() {
    let all: BTreeSet<String> = (0..8).map(|rank| format!("sglang::scheduler_TP{rank}")).collect();
    let begun = Instant::now();
    let mut daemon = eight_ranks().set("health.hang_after", "60s").start();
    daemon.is_ready(START_TP8).await;
    let to_ready = begun.elapsed();
    assert_eq!(ranks(&daemon), all);
    for rank in 0..8 {
        assert!(daemon.log().contains(&format!("TP{rank}")), "no line of rank {rank} in the log");
    }
    streams(&daemon).await;

    let before = engine_pid(&daemon.status().await.unwrap());
    daemon.note_processes();
    let victim = daemon.processes_named("sglang::scheduler_TP5");
    let killed = Instant::now();
    kill(Pid::from_raw(victim[0].pid), Signal::SIGKILL).unwrap();
    daemon
        .until("the dead rank is noticed", Duration::from_secs(20), async |daemon| {
            daemon.state().await.filter(|s| s != "ready" && s != "busy")
        })
        .await;
    let to_notice = killed.elapsed();
    holds_or_tells_meanwhile(&daemon).await;

    let status = daemon.is_ready(START_TP8).await;
    assert_ne!(engine_pid(&status), before);
    assert_eq!(ranks(&daemon), all, "whole again, and nothing of the first engine beside it");
    streams(&daemon).await;
    let back = killed.elapsed();

    // Somebody stops one of eight: known at once, nobody waiting, and acted upon after the limit.
    let before = engine_pid(&status);
    let stopped = Instant::now();
    kill(the_pid(&daemon, "sglang::scheduler_TP3"), Signal::SIGSTOP).unwrap();
    let (why, suspected) = suspects(&mut daemon, Duration::from_secs(20)).await;
    assert!(why.contains("sglang::scheduler_TP3") && why.contains("is stopped"), "{why}");
    let acted = suspected + serves_no_more(&mut daemon, Duration::from_mins(2)).await;
    assert!(acted >= Duration::from_secs(55), "not before the limit: {acted:?}");
    blames(&mut daemon, &["The engine hung: sglang::scheduler_TP3"]).await;
    let status = daemon.is_ready(START_TP8).await;
    assert_ne!(engine_pid(&status), before);
    assert_eq!(ranks(&daemon), all, "a stopped rank dies of SIGKILL too");
    eprintln!(
        "real engine, tp 8: ready {to_ready:.1?}, dead rank noticed {to_notice:.1?}, back {back:.1?}; stopped rank suspected \
         {suspected:.1?}, acted upon {acted:.1?} (hang_after 60 s), back {:.1?}",
        stopped.elapsed()
    );
    daemon.stops_clean(Duration::from_secs(27)).await;
}
