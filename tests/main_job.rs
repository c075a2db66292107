//! The main job, end to end over the simulated engine, as its users do it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use crate::harness::client::{Client, End, post};
use crate::harness::daemon::{Daemon, Setup, get_json};
use crate::harness::processes::is_listening;
use crate::harness::scene::{CHAT, SOON, got, is_whole, quick, refuses_with, stream_of, streamed, text_at};

/// In the order of a start that meets no trouble; what is too short to be seen may be missing.
const ORDER: [&str; 5] = ["fetching", "preparing", "launching", "loading", "ready"];

/// Watches a start through this status page: no state and no percentage ever goes back.
#[derive(Debug, Default)]
struct Watched {
    states: Vec<String>,
    phases: Vec<String>,
    percent: BTreeMap<String, f64>,
}

impl Watched {
    fn look(&mut self, status: &Value) -> bool {
        let (state, phase) = (text_at(status, "/state"), text_at(status, "/phase"));
        let place = |state: &str| ORDER.iter().position(|s| *s == state).unwrap_or_else(|| panic!("{state}: {status}"));
        if let Some(last) = self.states.last() {
            assert!(place(last) <= place(&state), "{state} after {last}");
        }
        if self.states.last() != Some(&state) {
            self.states.push(state.clone());
        }
        if self.phases.last() != Some(&phase) {
            self.phases.push(phase);
        }
        if let Some(now) = status["percent"].as_f64() {
            let before = self.percent.insert(state.clone(), now).unwrap_or(0.0);
            assert!((before..=100.0).contains(&now), "{state}: from {before} % to {now} %");
        }
        state == "ready"
    }
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn out(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The address behind the first of these words in the log.
fn address(log: &str, before: &str, after: &str) -> Option<SocketAddr> {
    log.split_once(before)?.1.split_once(after)?.0.parse().ok()
}

#[tokio::test]
async fn the_demo_does_the_whole_job_and_ctrl_c_leaves_nothing() {
    let mut daemon = Setup::demo()
        .env("SGLANG_SIM_START_SECONDS", "2")
        .env("SGLANG_SIM_DRAIN_POLL_SECONDS", "0.1")
        .set("engine.tp", "2")
        .start();
    let (public, admin) = daemon
        .until("the greeting", SOON, async |daemon| {
            let log = daemon.log();
            Some((address(&log, " on http://", "\n")?, address(&log, "status   http://", "/status")?))
        })
        .await;
    let log = daemon.log();
    assert!(log.contains(&format!("curl -N http://{public}/v1/chat/completions")), "{log}");
    assert!(log.contains(&format!("metrics  http://{admin}/metrics")), "{log}");
    let mut watched = Watched::default();
    let ready = daemon
        .until("ready", SOON, async |_| {
            let status = get_json(&format!("http://{admin}/status")).await?;
            watched.look(&status).then_some(status)
        })
        .await;
    assert_eq!(watched.states.last().map(String::as_str), Some("ready"));
    for state in ["fetching", "loading"] {
        assert!(watched.states.iter().any(|s| s == state), "{state} was not seen: {watched:?}");
    }
    assert!(watched.phases.iter().any(|phase| phase.contains("fetching")), "{watched:?}");
    assert!(watched.phases.len() >= 5, "hardly any phase was seen: {watched:?}");
    assert!(watched.percent["fetching"] > 0.0 && watched.percent["loading"] > 0.0, "{watched:?}");
    assert_eq!(text_at(&ready, "/model/repo"), "deepseek-ai/DeepSeek-V4-Pro");
    assert_eq!(text_at(&ready, "/model/commit").len(), 40, "{ready}");
    assert_eq!(ready["engine"]["ranks"].as_array().map(Vec::len), Some(3), "two schedulers, a detokenizer: {ready}");
    let snapshot = text_at(&ready, "/model/path");
    let temporary = daemon.folder().join("tmp");
    assert!(Path::new(&snapshot).starts_with(&temporary), "a demo writes in its temporary folder only: {snapshot}");

    // The line that was printed, as it would be pasted.
    let curl = log.split_once("  curl -N").map(|(_, rest)| rest.split_once("\n\n").unwrap().0).unwrap();
    let answer = output(Command::new("sh").arg("-c").arg(format!("curl -sSN{curl}")));
    assert!(out(&answer).ends_with("data: [DONE]\n\n"), "{}", out(&answer));

    daemon.note_processes();
    daemon.signal(Signal::SIGINT);
    assert_eq!(daemon.exit(SOON).await, 0, "{}", daemon.log());
    daemon.leaves_nothing(Duration::ZERO).await;
    assert!(!is_listening(public.port()) && !is_listening(admin.port()), "a port is still open");
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0, "not even an empty folder");
    assert_eq!(fs::read_dir(daemon.folder().join("home")).unwrap().count(), 0, "nothing in the user's home");
}

#[tokio::test]
async fn from_the_first_moment_the_public_port_tells_how_far_it_is() {
    let mut daemon = quick("").env("SGLANG_SIM_START_SECONDS", "2").start();
    let begun = Instant::now();
    let addr = daemon.public();
    daemon.until("any answer", SOON, async |_| Some(std::net::TcpStream::connect(addr).is_ok()).filter(|ok| *ok)).await;
    let live = got(addr, "/live");
    println!("figure: start of serve to first answered byte on the public port: {:?}", begun.elapsed());
    assert_eq!(live.status, 200);
    assert!(live.header("x-request-id").is_some(), "{}", live.head);
    daemon
        .until("some per cent", SOON, async |daemon| {
            let status = daemon.status().await?;
            (text_at(&status, "/state") == "loading" && status["percent"].is_number()).then_some(())
        })
        .await;
    for path in ["/health", "/ready"] {
        assert_eq!(got(addr, path).status, 503, "{path}");
    }
    assert_eq!(got(addr, "/live").status, 200, "a load is no death");
    // The proxy hears of it a moment after the status page does.
    let refused = daemon
        .until("a refusal that says loading", SOON, async |_| {
            let refused = Client::ask(addr, stream_of(4));
            assert_eq!(refused.status, 503);
            (refused.code() == "engine_loading").then_some(refused)
        })
        .await;
    assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert!(refused.header("x-request-id").is_some());
    let told = refused.json();
    assert_eq!(told["state"], "loading");
    assert!(!text_at(&told, "/phase").is_empty() && told["percent"].is_number(), "{told}");
    assert!(told.get("eta_seconds").is_some(), "{told}");

    let mut watched = Watched::default();
    daemon.until("ready", SOON, async |daemon| watched.look(&daemon.status().await?).then_some(())).await;
    // The proxy hears of it a moment after the status page does.
    daemon.until("the gate opens", SOON, async |_| (got(addr, "/health").status == 200).then_some(())).await;
    for path in ["/ready", "/live"] {
        assert_eq!(got(addr, path).status, 200, "{path}");
    }
    let answer = streamed(addr, 20);
    assert!(is_whole(&answer), "{answer:?}");
    assert!(answer.text().matches("data: ").count() > 15, "event by event: {}", answer.text());
    assert_eq!(got(addr, "/server_info").status, 403, "an operator's route");

    let begun = Instant::now();
    daemon.terminate();
    assert_eq!(daemon.exit(SOON).await, 0);
    println!("figure: SIGTERM to all gone, idle: {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    daemon.leaves_nothing(Duration::ZERO).await;
}

#[tokio::test]
async fn status_metrics_and_probe_find_a_running_one() {
    let setup =
        quick("").env("SGLANG_SIM_TOKENS_PER_SECOND", "5000").config("engine:\n  flags: {enable-metrics: true}\n");
    let plan = output(setup.full_command("plan").arg("--json"));
    assert!(plan.status.success(), "{}", out(&plan));
    let mut daemon = setup.start();
    let status = daemon.is_ready(SOON).await;
    for field in [
        "/version",
        "/state",
        "/phase",
        "/percent",
        "/eta_seconds",
        "/model/name",
        "/engine/pid",
        "/engine/version",
        "/engine/started_at",
        "/engine/restarts",
        "/engine/last_exit",
        "/requests/in_flight",
        "/requests/queued",
        "/requests/max",
        "/requests/target",
        "/proxy/pid",
    ] {
        assert!(status.pointer(field).is_some(), "{field} is missing: {status}");
    }
    assert_eq!((status["requests"]["max"].as_u64(), status["requests"]["target"].as_u64()), (Some(32), Some(10)));
    assert_eq!(text_at(&status, "/model/name"), "small");

    let metrics = got(daemon.admin(), "/metrics");
    assert!(metrics.header("content-type").unwrap().starts_with("text/plain"));
    for name in ["sglangd_engine_state{state=\"ready\"} 1", "sglangd_requests_in_flight", "\nsglang:"] {
        assert!(metrics.text().contains(name), "{name} is missing:\n{}", metrics.text());
    }

    // The same on a socket that needs no port.
    let mut socket = tokio::net::UnixStream::connect(daemon.runtime_dir().join("admin.sock")).await.unwrap();
    socket.write_all(b"GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut page = String::new();
    socket.read_to_string(&mut page).await.unwrap();
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("\"state\":\"ready\""), "{page}");

    let runtime = daemon.runtime_dir();
    let told = output(daemon.command("status").arg("--json").arg("--runtime-dir").arg(&runtime));
    let parsed: Value = serde_json::from_slice(&told.stdout).unwrap_or_else(|_| panic!("{}", out(&told)));
    assert_eq!(text_at(&parsed, "/state"), "ready");
    let probe = output(daemon.command("probe").arg("--once").arg("--runtime-dir").arg(&runtime));
    assert!(probe.status.success() && probe.stdout.len() > 100, "{}", out(&probe));

    // This start's keys: in a file that only we read, and nowhere else.
    let yaml = runtime.join("engine.yaml");
    assert_eq!(fs::metadata(&yaml).unwrap().permissions().mode() & 0o777, 0o600);
    let keys: Vec<String> = fs::read_to_string(&yaml)
        .unwrap()
        .lines()
        .filter_map(|line| Some(line.split_once("api-key")?.1.trim_matches(|c: char| !c.is_alphanumeric()).to_owned()))
        .collect();
    assert!(keys.len() == 2 && keys.iter().all(|key| key.len() >= 32) && keys[0] != keys[1], "{keys:?}");
    let mut seen = daemon.log();
    let human = output(daemon.command("status").arg("--runtime-dir").arg(&runtime));
    let _ = write!(seen, "{parsed}{}{}{}{}", out(&human), out(&plan), metrics.text(), out(&probe));
    for process in daemon.processes() {
        let _ = write!(seen, "{}", process.command);
    }
    assert!(seen.contains("server_args="), "the engine prints its arguments: the search is not in vain");
    for key in &keys {
        assert!(!seen.contains(key.as_str()), "a key of the engine is shown");
    }
    daemon.stops_clean(SOON).await;
}

fn refuses(setup: &Setup, words: &[&str]) {
    let answer = output(&mut setup.full_command("serve"));
    assert_eq!(answer.status.code(), Some(65), "{}", out(&answer));
    let said = out(&answer);
    for word in words {
        assert!(said.contains(word), "{word} is missing: {said}");
    }
    assert_eq!(said.trim().lines().count(), 1, "one message: {said}");
}

#[tokio::test]
async fn j13_what_is_taken_or_missing_is_said_before_anything_starts() {
    let mut daemon = quick("").env("SGLANG_SIM_START_SECONDS", "60").start();
    daemon.reaches(&["loading"], SOON).await;
    let first = format!("pid {}", daemon.pid());
    refuses(daemon.setup(), &[&first, "another sglangd", "--runtime-dir"]);

    let other = quick("");
    let holder = TcpListener::bind(other.public()).unwrap();
    refuses(&other, &["listen.public", &format!("pid {}", std::process::id()), "--listen"]);
    drop(holder);
    let _holder = TcpListener::bind(other.admin()).unwrap();
    refuses(&other, &["listen.admin", &format!("pid {}", std::process::id()), "--admin"]);

    let missing = quick("").set("engine.command", "[/nowhere/python3, -m, sglang.launch_server]");
    refuses(&missing, &["/nowhere/python3", "engine.command"]);
    let plain = quick("");
    let not_executable = plain.folder().join("model/config.json").display().to_string();
    refuses(&plain.set("engine.command", &format!("[{not_executable}]")), &[&not_executable, "xecut"]);

    assert_eq!(daemon.state().await.as_deref(), Some("loading"), "the first one did not mind");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn sighup_takes_the_limits_and_names_what_must_wait() {
    let mut daemon = quick("").config("limits:\n  max: 32\n").start();
    daemon.is_ready(SOON).await;
    let file = daemon.folder().join("config-1.yaml");
    let reload = async |daemon: &mut Daemon, text: &str, said: &str| {
        fs::write(&file, text).unwrap();
        daemon.signal(Signal::SIGHUP);
        daemon.until(said, SOON, async |daemon| daemon.log().contains(said).then_some(())).await;
        daemon.status().await.unwrap()
    };
    let status = reload(&mut daemon, "limits:\n  max: 5\n", "configuration reloaded").await;
    assert_eq!(status["requests"]["max"], 5);
    let addr = daemon.admin();
    daemon
        .until("the proxy lives by it", SOON, async |_| {
            got(addr, "/metrics").text().contains("sglangd_requests_max 5").then_some(())
        })
        .await;
    let engine = status["engine"]["pid"].clone();

    let status =
        reload(&mut daemon, "limits:\n  max: 6\nengine:\n  tp: 4\n", "live only after a restart: engine.tp").await;
    assert_eq!(status["requests"]["max"], 6);
    assert!(status["warnings"].to_string().contains("engine.tp"), "{status}");

    let log = daemon.log().len();
    fs::write(&file, "limits:\n  max: 6\n").unwrap();
    daemon.signal(Signal::SIGHUP);
    daemon
        .until("the second reload", SOON, async |daemon| daemon.log()[log..].contains("reloaded").then_some(()))
        .await;
    let status = daemon.status().await.unwrap();
    assert!(!status["warnings"].to_string().contains("engine.tp"), "nothing waits any more: {status}");

    let status = reload(&mut daemon, "limits:\n  max: many\n", "was not reloaded").await;
    assert_eq!(status["requests"]["max"], 6, "a bad file changes nothing");
    assert_eq!(status["engine"]["pid"], engine, "nothing was restarted");
    assert!(is_whole(&streamed(daemon.public(), 3)));
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn j01_a_drain_lets_a_stream_finish_and_admits_nothing_new() {
    let mut daemon = quick("").env("SGLANG_SIM_TOKENS_PER_SECOND", "20").start();
    daemon.is_ready(SOON).await;
    let addr = daemon.public();
    let mut stream = Client::connect(addr);
    stream.send(stream_of(30)).until("\"content\"");
    daemon.terminate();
    daemon.reaches(&["draining"], SOON).await;
    refuses_with(&mut daemon, &post(CHAT, "{}"), "draining").await;
    let answer = stream.answer();
    assert!(answer.end == End::Complete && is_whole(&answer), "{answer:?}");
    assert_eq!(daemon.exit(SOON).await, 0);
    daemon.leaves_nothing(Duration::ZERO).await;
}
