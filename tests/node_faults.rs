//! The machine around the engine: its GPUs, what fled from it, what is written down of its death.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::client::Client;
use crate::harness::daemon::{Daemon, SGLANGD, Setup, eventually};
use crate::harness::processes;
use crate::harness::scene::{
    SOON, engine_pid, got, is_whole, number_at, quick, replaces, script, send, state_dir, stream_of, streamed, text_at,
    the_one, write_script,
};

const GIB: u64 = 1 << 30;

/// A machine of two GPUs, as files; see `src/node/written.rs`.
fn with_gpus(setup: Setup) -> (Setup, PathBuf) {
    let folder = setup.folder().join("gpus");
    fs::create_dir(&folder).unwrap();
    let gpus: Vec<Value> = (0..2)
        .map(|index| {
            json!({"index": index, "uuid": format!("GPU-{index}"), "name": "NVIDIA H100", "memory_total": 80 * GIB,
                   "memory_used": GIB / 2})
        })
        .collect();
    fs::write(folder.join("gpus.json"), json!({"driver": "580.95.05", "gpus": gpus}).to_string()).unwrap();
    (setup.env("SGLANGD_SIM_GPUS", folder.to_str().unwrap()).set("engine.flags.mem-fraction-static", "0.8"), folder)
}

/// This process holds so much on a GPU, for as long as it lives; 0: nobody who can be seen.
fn holds(node: &Path, gpu: u32, pid: u32, bytes: u64) -> PathBuf {
    let file = node.join(format!("{gpu}-{pid}"));
    fs::write(&file, bytes.to_string()).unwrap();
    file
}

fn somebody() -> Child {
    std::process::Command::new("sleep").arg("86399").spawn().unwrap()
}

/// In this state, and it says whose memory it waits for.
async fn waits_for_memory(daemon: &mut Daemon, state: &str) -> Value {
    daemon
        .until("it waits for memory", SOON, async |daemon| {
            let status = daemon.status().await?;
            let waits = text_at(&status, "/state") == state && text_at(&status, "/reason").contains("GiB");
            waits.then_some(status)
        })
        .await
}

#[tokio::test]
async fn g13_a_stranger_on_the_gpu_is_named_and_the_start_comes_when_it_has_gone() {
    let (setup, node) = with_gpus(quick(""));
    let mut stranger = somebody();
    holds(&node, 0, stranger.id(), 40 * GIB);
    let mut daemon = setup.start();
    let status = waits_for_memory(&mut daemon, "occupied").await;
    let reason = text_at(&status, "/reason");
    assert!(reason.contains("GPU 0 has 39.5 GiB free and the engine needs 64.0 GiB"), "{reason}");
    assert!(reason.contains(&format!("pid {} (sleep 86399", stranger.id())), "{reason}");
    assert!(text_at(&status, "/advice").contains("mem-fraction-static"), "{status}");
    assert!(status["engine"]["pid"].is_null(), "launched beside a stranger: {status}");
    let refused = Client::ask(daemon.public(), stream_of(1));
    assert_eq!(refused.status, 503);
    assert!(refused.text().contains("sleep 86399"), "clients are told the same: {}", refused.text());
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    let ready = daemon.is_ready(SOON).await;
    assert_eq!(number_at(&ready, "/engine/restarts"), 0, "it waited, it did not fail: {ready}");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g13_memory_that_a_dead_engine_still_holds_is_waited_for_and_a_stop_is_not_held_up() {
    let (setup, node) = with_gpus(quick(""));
    let mut daemon = setup.start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    // Somebody on the other GPU is none of the engine's business.
    holds(&node, 1, 0, 79 * GIB);
    let held = holds(&node, 0, 0, 50 * GIB);
    send(first, Signal::SIGKILL);
    let status = waits_for_memory(&mut daemon, "releasing").await;
    assert!(text_at(&status, "/reason").contains("GPU 0"), "{status}");
    assert!(status["engine"]["pid"].is_null(), "{status}");
    fs::remove_file(held).unwrap();
    let second = engine_pid(&replaces(&mut daemon, first).await);

    holds(&node, 0, 0, 50 * GIB);
    send(second, Signal::SIGKILL);
    waits_for_memory(&mut daemon, "releasing").await;
    daemon.terminate();
    assert_eq!(daemon.exit(Duration::from_secs(8)).await, 0, "{}", daemon.log());
    assert!(daemon.log().contains("the engine is gone, and yet GPU 0"), "{}", daemon.log());
    daemon.leaves_nothing(Duration::ZERO).await;
}

#[tokio::test]
async fn a_stop_ends_a_start_that_waits_for_a_gpu() {
    let (setup, node) = with_gpus(quick(""));
    holds(&node, 0, 0, 60 * GIB);
    let mut daemon = setup.start();
    let status = waits_for_memory(&mut daemon, "occupied").await;
    assert!(text_at(&status, "/reason").contains("not visible from here"), "{status}");
    daemon.stops_clean(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn the_gpus_are_told_in_status_metrics_and_plan() {
    let (setup, _node) = with_gpus(quick(""));
    let plan = setup.full_command("plan").output().unwrap();
    let plan = String::from_utf8(plan.stdout).unwrap();
    assert!(plan.contains("  GPU driver     580.95.05\n"), "{plan}");
    assert!(plan.contains("  GPU 0          NVIDIA H100 (GPU-0), 0.5 of 80.0 GiB used\n"), "{plan}");
    assert!(plan.contains("  GPU 1          NVIDIA H100 (GPU-1), 0.5 of 80.0 GiB used, not used\n"), "{plan}");
    let mut daemon = setup.env("CUDA_VISIBLE_DEVICES", "GPU-1,0").start();
    daemon.is_ready(SOON).await;
    let status = daemon
        .until("the GPUs are known", SOON, async |daemon| {
            let status = daemon.status().await?;
            (status["gpus"].as_array()?.len() == 2).then_some(status)
        })
        .await;
    assert_eq!(
        status["gpus"][1],
        json!({"index": 1, "uuid": "GPU-1", "name": "NVIDIA H100", "driver": "580.95.05", "memory_total": 80 * GIB,
               "memory_used": GIB / 2, "engine": true})
    );
    assert_eq!(status["gpus"][0]["engine"], false, "the first of CUDA_VISIBLE_DEVICES is GPU 1");
    let metrics = got(daemon.admin(), "/metrics").text();
    assert!(metrics.contains("sglangd_gpu_memory_used_bytes{gpu=\"1\",uuid=\"GPU-1\"}"), "{metrics}");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn without_a_driver_it_is_said_once_and_serves() {
    let setup = quick("");
    let none = setup.folder().join("nothing").display().to_string();
    let mut daemon = setup.env("SGLANGD_SIM_GPUS", &none).start();
    let status = daemon.is_ready(SOON).await;
    assert_eq!(status["gpus"], json!([]));
    assert_eq!(daemon.log().matches("no GPU facts").count(), 1, "{}", daemon.log());
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g12_what_fled_session_parent_and_environment_is_ended_with_its_engine() {
    // Nothing of the engine's is left in it but its cgroup, where there is one, and that it came to us.
    let flight = format!("env -i setsid sh -c 'sleep 86398 & exit'\nexec {SGLANGD} simulate \"$@\"");
    let mut daemon = script(quick(""), &flight).start();
    let mine = daemon.pid();
    let fled = || -> Vec<i32> {
        let all = processes::all().into_iter();
        all.filter(|p| p.is_alive() && p.command == "sleep 86398" && p.parent == mine).map(|p| p.pid).collect()
    };
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let old = fled();
    assert_eq!(old.len(), 1, "it came to us");
    send(first, Signal::SIGKILL);
    replaces(&mut daemon, first).await;
    let new = fled();
    assert!(new.len() == 1 && new != old, "the second engine came beside what fled from the first: {old:?} {new:?}");
    daemon.terminate();
    assert_eq!(daemon.exit(SOON).await, 0, "{}", daemon.log());
    assert_eq!(processes::all().iter().filter(|p| new.contains(&p.pid) && p.command == "sleep 86398").count(), 0);
    daemon.leaves_nothing(Duration::ZERO).await;
}

#[tokio::test]
async fn an_engine_in_a_cgroup_of_its_own_takes_it_along() {
    let mut daemon = quick("orphan_setsid").start();
    let status = daemon.is_ready(SOON).await;
    let Some(group) = status["engine"]["cgroup"].as_str().map(PathBuf::from) else {
        // Whoever runs this may not make one; `tests/systemd.rs` may.
        assert!(daemon.log().contains("gets no cgroup of its own"), "it must say so: {}", daemon.log());
        daemon.stops_clean(SOON).await;
        return;
    };
    let inside = fs::read_to_string(group.join("cgroup.procs")).unwrap();
    let inside: Vec<i32> = inside.lines().map(|pid| pid.parse().unwrap()).collect();
    for name in ["sglang::scheduler", "::stray"] {
        assert!(inside.contains(&the_one(&daemon, name)), "{name} is not in {inside:?}");
    }
    assert!(!inside.contains(&daemon.pid()), "sglangd stays where it was put");
    let first = engine_pid(&status);
    send(first, Signal::SIGKILL);
    let again = replaces(&mut daemon, first).await;
    assert!(!group.exists(), "the first one's is gone");
    let group = PathBuf::from(text_at(&again, "/engine/cgroup"));
    daemon.note_processes();
    daemon.signal(Signal::SIGKILL);
    daemon.exit(SOON).await;
    daemon.until_gone("the engine, and the guard behind it", SOON).await;
    eventually("the guard removes the group", SOON, async || (!group.exists()).then_some(())).await;
    daemon.start_again();
    daemon.is_ready(SOON).await;
    daemon.stops_clean(SOON).await;
}

fn page(bundle: &Path, name: &str) -> String {
    fs::read_to_string(bundle.join(name)).unwrap_or_else(|error| panic!("{}: {error}", bundle.join(name).display()))
}

async fn bundled(daemon: &mut Daemon, why: &str) -> PathBuf {
    daemon
        .until("the bundle", SOON, async |daemon| {
            let path = text_at(&daemon.status().await?, "/bundle");
            path.ends_with(why).then(|| PathBuf::from(path))
        })
        .await
}

#[tokio::test]
async fn a_death_leaves_a_bundle_without_a_secret_in_it() {
    let (setup, _node) = with_gpus(quick(""));
    let mut daemon = setup.env("SGLANG_SECRET_KEY", "hunter22").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let yaml = fs::read_to_string(daemon.runtime_dir().join("engine.yaml")).unwrap();
    let key = yaml.lines().find_map(|line| line.strip_prefix("\"api-key\": \"")?.strip_suffix('"')).unwrap();
    send(first, Signal::SIGKILL);
    let bundle = bundled(&mut daemon, "-signal").await;
    assert!(bundle.starts_with(state_dir(&daemon)), "{}", bundle.display());
    assert!(page(&bundle, "cause").starts_with("signal\nThe engine was ended from outside (by SIGKILL)."));
    assert!(page(&bundle, "engine.log").contains("fired up"), "its last lines");
    assert!(page(&bundle, "argv").contains("--served-model-name small"));
    assert!(page(&bundle, "engine.yaml").contains("\"api-key\": \"[redacted]\""), "{}", page(&bundle, "engine.yaml"));
    assert!(page(&bundle, "environment").contains("SGLANG_SECRET_KEY=[redacted]"));
    assert!(page(&bundle, "processes").contains("sglangd pid"));
    assert!(page(&bundle, "gpus.json").contains("NVIDIA H100"));
    assert!(page(&bundle, "meminfo").contains("MemTotal"));
    assert!(page(&bundle, "status.json").contains("\"state\""));
    for file in fs::read_dir(&bundle).unwrap().map(Result::unwrap) {
        let text = fs::read_to_string(file.path()).unwrap();
        assert!(!text.contains(key) && !text.contains("hunter22"), "{} holds a secret", file.path().display());
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o077, 0, "{}", file.path().display());
    }
    assert!(daemon.log().contains(&bundle.display().to_string()), "the log says where");
    replaces(&mut daemon, first).await;
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn a_suspected_hang_leaves_a_bundle_while_it_hangs() {
    let mut daemon = quick("").set("health.hang_after", "6s").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    send(the_one(&daemon, "sglang::scheduler"), Signal::SIGSTOP);
    let mut client = Client::connect(daemon.public());
    client.send(stream_of(5));
    let bundle = bundled(&mut daemon, "-suspected").await;
    let stopped = page(&bundle, "processes");
    assert!(stopped.lines().any(|line| line.starts_with("engine pid") && line.contains("state T")), "{stopped}");
    let hung = bundled(&mut daemon, "-hang").await;
    assert!(page(&hung, "cause").contains("hung"), "{}", page(&hung, "cause"));
    assert!(!page(&hung, "stacks").is_empty());
    replaces(&mut daemon, first).await;
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn a_bundle_is_made_on_demand_with_and_without_a_running_sglangd() {
    let mut daemon = quick("").start();
    daemon.is_ready(SOON).await;
    let state = state_dir(&daemon);
    let ask = |daemon: &Daemon| {
        let mut command = daemon.command("bundle");
        command.arg("--runtime-dir").arg(daemon.runtime_dir()).arg("--state-dir").arg(&state);
        let ended = command.output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        PathBuf::from(String::from_utf8(ended.stdout).unwrap().trim())
    };
    let bundle = ask(&daemon);
    assert!(page(&bundle, "processes").contains("engine pid") && page(&bundle, "engine.log").contains("fired up"));
    let refused = Client::ask(daemon.admin(), "POST /bundle HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n");
    assert_eq!(refused.status, 403, "whoever reaches the address may look, and nothing else");
    daemon.terminate();
    assert_eq!(daemon.exit(SOON).await, 0);
    let after = ask(&daemon);
    assert_eq!(page(&after, "bundle-before"), bundle.display().to_string());
    daemon.leaves_nothing(Duration::ZERO).await;
}

#[tokio::test]
async fn g21_no_core_is_written_unless_the_engine_asks_for_it() {
    let mut daemon = quick("").start();
    let engine = engine_pid(&daemon.is_ready(SOON).await);
    let limits = fs::read_to_string(format!("/proc/{engine}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn j19_the_engine_dies_with_sglangd_even_where_nobody_is_left_to_end_it() {
    let mut daemon = quick("").start();
    let engine = engine_pid(&daemon.is_ready(SOON).await);
    assert!(is_whole(&streamed(daemon.public(), 3)), "threads of the runtime have come and gone");
    daemon.note_processes();
    send(the_one(&daemon, "guard"), Signal::SIGKILL);
    daemon.until("it is gone", SOON, async |d| d.processes_named("guard").is_empty().then_some(())).await;
    daemon.signal(Signal::SIGKILL);
    assert_eq!(daemon.exit(SOON).await, -9);
    let alive = |pid: i32| processes::all().iter().any(|p| p.pid == pid && p.is_alive());
    eventually("the engine's main process goes with its parent", SOON, async || (!alive(engine)).then_some(())).await;
    daemon.start_again();
    daemon.is_ready(SOON).await;
    daemon.stops_clean(SOON).await;
}

/// A start of this script's on a GPU of the machine's, until it is given up: the reason.
async fn given_up_on_a_gpu(text: &str) -> String {
    let (setup, node) = with_gpus(quick(""));
    let text = text.replace("MEMORY", &format!("{}/0-$$", node.display()));
    let setup = script(setup, &text).set("start.stall", "4s").set("start.limit", "12s").set("restart.max", "1");
    let mut daemon = setup.start();
    let status = daemon.reaches(&["gave_up"], SOON).await;
    daemon.stops_clean(SOON).await;
    text_at(&status, "/reason")
}

#[tokio::test]
async fn g04_a_silent_start_that_fills_gpu_memory_goes_on_until_the_last_limit() {
    let reason = given_up_on_a_gpu("n=0; while :; do n=$((n+100000000)); echo $n >MEMORY; sleep 0.2; done").await;
    assert!(reason.contains("longer than start.limit (12 s)"), "{reason}");
}

#[tokio::test]
async fn g04_gpu_memory_that_is_held_and_does_not_grow_is_no_progress() {
    let reason = given_up_on_a_gpu("while :; do echo 3000000000 >MEMORY; sleep 0.2; done").await;
    assert!(reason.contains("no progress for start.stall (4 s)"), "{reason}");
}

/// Programs of these names are found before all others.
fn with_tools(setup: Setup, tools: &[(&str, &str)]) -> Setup {
    let folder = setup.folder().join("tools");
    fs::create_dir(&folder).unwrap();
    for (name, text) in tools {
        write_script(&folder.join(name), text);
    }
    let path = std::env::var("PATH").unwrap();
    setup.env("PATH", &format!("{}:{path}", folder.display()))
}

#[tokio::test]
async fn a_bundle_of_a_hang_has_the_last_requests_and_what_the_tools_say() {
    // The detokenizer's stack is one that is never to be had.
    let py_spy =
        "case $(tr '\\0' ' ' </proc/$4/cmdline) in sglang::detok*) exec sleep 600;; esac; echo \"Thread 1: $*\"";
    let tools = [("py-spy", py_spy), ("nvidia-smi", "echo 'NVIDIA-SMI: eight of them'")];
    let mut daemon = with_tools(quick("").set("health.hang_after", "6s"), &tools).start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let rank = the_one(&daemon, "sglang::scheduler");
    assert!(is_whole(&streamed(daemon.public(), 2)));
    send(rank, Signal::SIGSTOP);
    let mut client = Client::connect(daemon.public());
    client.send(stream_of(5).replacen("\r\n", "\r\nX-Request-Id: the-last-straw\r\n", 1));
    let bundle = bundled(&mut daemon, "-hang").await;
    let requests = page(&bundle, "requests");
    let lines: Vec<&str> = requests.lines().collect();
    assert_eq!(lines.len(), 2, "{requests}");
    assert!(
        lines[1].contains("s ago") && lines[1].contains("chat") && lines[1].ends_with("the-last-straw"),
        "{requests}"
    );
    let stacks = page(&bundle, "stacks");
    assert!(stacks.contains(&format!("--- pid {rank}\nThread 1: dump --nonblocking --pid {rank}\n")), "{stacks}");
    assert!(stacks.contains("did not end within 3 s"), "one that hangs holds nobody: {stacks}");
    assert_eq!(page(&bundle, "nvidia-smi"), "NVIDIA-SMI: eight of them\n");
    replaces(&mut daemon, first).await;
    daemon.stops_clean(SOON).await;
}

/// The first GPU is split in two; so much of the second part is used.
fn split(node: &Path, used: u64) {
    let file = node.join("gpus.json");
    let mut sight: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let part = |uuid: &str, used: u64| json!({"index": 0, "uuid": uuid, "name": "NVIDIA H100 MIG 1g.10gb", "memory_total": 10 * GIB, "memory_used": used});
    sight["gpus"][0]["parts"] = json!([part("MIG-aa-1", 0), part("MIG-bb-2", used)]);
    let new = node.join("new");
    fs::write(&new, sight.to_string()).unwrap();
    fs::rename(new, file).unwrap();
}

#[tokio::test]
async fn g13_of_a_gpu_that_is_split_only_the_engines_part_has_to_be_free() {
    let (setup, node) = with_gpus(quick(""));
    split(&node, 9 * GIB);
    let setup = setup.env("CUDA_VISIBLE_DEVICES", "MIG-bb-2");
    let plan = String::from_utf8(setup.full_command("plan").output().unwrap().stdout).unwrap();
    assert!(plan.contains("NVIDIA H100 MIG 1g.10gb (MIG-bb-2), 9.0 of 10.0 GiB used"), "{plan}");
    let mut daemon = setup.start();
    let status = waits_for_memory(&mut daemon, "occupied").await;
    let reason = text_at(&status, "/reason");
    assert!(reason.contains("GPU 0 has 1.0 GiB free and the engine needs 8.0 GiB"), "{reason}");
    // The other part is somebody else's, whatever is on it.
    split(&node, 0);
    let ready = daemon.is_ready(SOON).await;
    assert_eq!((&ready["gpus"][0]["engine"], &ready["gpus"][1]["engine"]), (&json!(true), &json!(false)), "{ready}");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn a_part_of_a_gpu_of_which_the_driver_tells_nothing_is_said_and_stops_nobody() {
    let (setup, node) = with_gpus(quick(""));
    holds(&node, 0, 0, 79 * GIB);
    let setup = setup.env("CUDA_VISIBLE_DEVICES", "MIG-GPU-0/1/0");
    let plan = setup.full_command("plan").output().unwrap();
    let plan = String::from_utf8_lossy(&[plan.stdout, plan.stderr].concat()).into_owned();
    assert!(plan.contains("the driver tells nothing of MIG-GPU-0/1/0"), "{plan}");
    let mut daemon = setup.start();
    daemon.is_ready(SOON).await;
    daemon.stops_clean(SOON).await;
}
