//! The simulated engine behaves as the real one was measured to: what the other tests build on.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};
use sglangd::engine::death::{Class, Evidence, How, Reached, classify};
use sglangd::engine::log::{self, Fact, Splitter};
use sglangd::engine::progress::{Progress, Stage};
use sglangd::health::client::{self, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(20);

/// A running simulated engine in a process group of its own, which is ended with the test.
struct Engine {
    child: Child,
    folder: tempfile::TempDir,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Folder {
    Whole,
    NoShards,
    Garbled,
}

fn model(folder: &Path, what: Folder) {
    let header = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
    std::fs::write(folder.join("config.json"), r#"{"architectures":["TinyForCausalLM"]}"#).unwrap();
    let mut shard = (header.len() as u64).to_le_bytes().to_vec();
    shard.extend_from_slice(header.as_bytes());
    shard.extend_from_slice(&[0; 16]);
    if what == Folder::Garbled {
        shard.truncate(shard.len() - 1);
    }
    for n in 1..=3 {
        if what != Folder::NoShards {
            std::fs::write(folder.join(format!("model-0000{n}-of-00003.safetensors")), &shard).unwrap();
        }
    }
}

impl Engine {
    fn start(flags: &[&str], env: &[(&str, &str)]) -> Self {
        Self::start_in(Folder::Whole, flags, env)
    }

    fn start_in(what: Folder, flags: &[&str], env: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        model(folder.path(), what);
        let mut command = Command::new(env!("CARGO_BIN_EXE_sglangd"));
        command.args(["simulate", "--host", "127.0.0.1", "--port", "0", "--served-model-name", "tiny"]);
        command.arg("--model-path").arg(folder.path()).args(flags);
        command.env("SGLANG_SIM_START_SECONDS", "0.6").env("SGLANG_SIM_TOKENS_PER_SECOND", "200");
        command.env("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "0").env("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0");
        command.env("SGLANG_SIM_DRAIN_POLL_SECONDS", "0.2").env("TMPDIR", folder.path());
        command.envs(env.iter().copied());
        command.stdin(Stdio::null());
        command.stdout(File::create(folder.path().join("out.log")).unwrap());
        command.stderr(File::create(folder.path().join("err.log")).unwrap());
        command.process_group(0);
        Self { child: command.spawn().unwrap(), folder }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    fn log(&self) -> String {
        let mut text = Vec::new();
        File::open(self.folder.path().join("err.log")).unwrap().read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The address, once the port is bound.
    async fn address(&self) -> SocketAddr {
        eventually("the port is bound", || {
            let log = self.log();
            let at = log.find("Uvicorn running on http://")? + "Uvicorn running on http://".len();
            log[at..].split_whitespace().next()?.parse().ok()
        })
        .await
    }

    async fn ready(&self) -> SocketAddr {
        self.says("The server is fired up and ready to roll!").await;
        self.address().await
    }

    async fn says(&self, words: &str) {
        eventually(words, || self.log().contains(words).then_some(())).await;
    }

    async fn ended(&mut self) -> ExitStatus {
        let child = &mut self.child;
        eventually("the engine has ended", || child.try_wait().unwrap()).await
    }

    /// Titles of what lives in the engine's group beside its main process.
    fn children(&self) -> Vec<(Pid, String)> {
        processes()
            .into_iter()
            .filter(|p| p.group == self.pid() && p.pid != self.pid())
            .map(|p| (p.pid, p.title))
            .collect()
    }

    async fn nothing_is_left(&self) {
        eventually("the group is empty", || self.children().is_empty().then_some(())).await;
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// The engine's child of this title.
    async fn child_titled(&self, title: &str) -> Pid {
        eventually(title, || self.children().into_iter().find(|(_, name)| name.starts_with(title)).map(|(pid, _)| pid))
            .await
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = killpg(self.pid(), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

struct Process {
    pid: Pid,
    group: Pid,
    title: String,
}

fn processes() -> Vec<Process> {
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.ok()?.path();
        let pid = path.file_name()?.to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(path.join("stat")).ok()?;
        let mut rest = stat.rsplit_once(") ")?.1.split(' ');
        let (state, _parent, group) = (rest.next()?, rest.next()?, rest.next()?);
        let title = std::fs::read(path.join("cmdline")).ok()?;
        (state != "Z").then(|| Process {
            pid: Pid::from_raw(pid),
            group: Pid::from_raw(group.parse().unwrap_or(0)),
            title: String::from_utf8_lossy(&title).replace('\0', " "),
        })
    };
    std::fs::read_dir("/proc").unwrap().filter_map(read).collect()
}

async fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn get(addr: SocketAddr, path: &str) -> (u16, String) {
    get_with(addr, path, None).await
}

async fn get_with(addr: SocketAddr, path: &str, key: Option<&str>) -> (u16, String) {
    let answer = client::get(&Target::Tcp(addr), path, key, PATIENCE).await.unwrap();
    (answer.status.as_u16(), String::from_utf8_lossy(&answer.body).into_owned())
}

/// Begins a chat stream and returns the connection with nothing read yet.
async fn begin_chat(addr: SocketAddr, body: &Value) -> TcpStream {
    let body = body.to_string();
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    stream
}

async fn read_until(stream: &mut TcpStream, words: &str) -> String {
    let mut text = Vec::new();
    let mut block = [0; 4096];
    while !String::from_utf8_lossy(&text).contains(words) {
        let read = timeout(PATIENCE, stream.read(&mut block)).await.expect("bytes in time").unwrap_or(0);
        assert!(read > 0, "ended before {words:?}: {}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&block[..read]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut text)).await.expect("an end in time");
    String::from_utf8_lossy(&text).into_owned()
}

fn long_chat() -> Value {
    json!({"model": "tiny", "stream": true, "max_tokens": 20000, "ignore_eos": true, "messages": [{"role": "user", "content": "go"}]})
}

#[tokio::test]
async fn it_starts_with_the_words_that_the_grammar_knows() {
    let engine = Engine::start(&["--tp-size", "2"], &[]);
    engine.ready().await;
    let mut progress = Progress::new(2, None);
    let mut stages = Vec::new();
    let mut splitter = Splitter::new();
    splitter.push(engine.log().as_bytes(), |raw| {
        let line = log::parse(raw.bytes);
        let Some(fact) = line.fact else { return };
        assert!(!matches!(fact, Fact::Fatal(_)), "{}", String::from_utf8_lossy(raw.bytes));
        progress.observe(fact, line.rank, 0);
        if stages.last() != Some(&progress.stage()) {
            stages.push(progress.stage());
        }
    });
    assert_eq!(
        stages,
        [Stage::Ranks, Stage::Join, Stage::Load, Stage::Pool, Stage::Capture, Stage::Http, Stage::WarmUp, Stage::Ready]
            .into_iter()
            .filter(|stage| stages.contains(stage))
            .collect::<Vec<_>>(),
        "stages come in their order"
    );
    assert!(stages.contains(&Stage::Load) && stages.contains(&Stage::Capture), "{stages:?}");
}

#[tokio::test]
async fn its_children_have_titles_and_stay_in_its_group() {
    let engine = Engine::start(&["--tp-size", "2"], &[]);
    engine.ready().await;
    let mut titles: Vec<String> =
        engine.children().into_iter().map(|(_, title)| title.split(' ').next().unwrap().to_owned()).collect();
    titles.sort();
    assert_eq!(titles, ["sglang::detokenizer", "sglang::scheduler_TP0", "sglang::scheduler_TP1"]);
}

#[tokio::test]
async fn health_takes_a_second_and_ready_takes_none() {
    let engine = Engine::start(&[], &[]);
    let addr = engine.ready().await;
    let begun = Instant::now();
    assert_eq!(get(addr, "/health").await.0, 200);
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    let begun = Instant::now();
    assert_eq!(get(addr, "/ready").await.0, 200);
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    assert_eq!(get(addr, "/no-such-route").await, (404, r#"{"detail":"Not Found"}"#.to_owned()));
}

#[tokio::test]
async fn keys_come_from_the_yaml_and_three_routes_are_public() {
    let folder = tempfile::tempdir().unwrap();
    let yaml = folder.path().join("engine.yaml");
    std::fs::write(&yaml, "api-key: \"123\"\nadmin-api-key: \"456\"\nenable-metrics: true\n").unwrap();
    let engine = Engine::start(&["--config", yaml.to_str().unwrap()], &[]);
    let addr = engine.ready().await;
    assert_eq!(get(addr, "/v1/models").await, (401, r#"{"error":"Unauthorized"}"#.to_owned()));
    assert_eq!(get_with(addr, "/v1/models", Some("123")).await.0, 200);
    assert_eq!(get_with(addr, "/flush_cache", Some("123")).await.0, 401);
    assert_eq!(get_with(addr, "/flush_cache", Some("456")).await.0, 200);
    assert_eq!(get(addr, "/ready").await.0, 200);
    let (status, page) = get(addr, "/metrics").await;
    assert!(status == 200 && page.contains("sglang:num_running_reqs{"), "{page}");
    let (_, info) = get_with(addr, "/server_info", Some("123")).await;
    assert!(info.contains(r#""api_key":"123""#), "the real one lets its keys out here: {info}");
}

#[tokio::test]
async fn it_streams_reasoning_then_content_and_counts() {
    let engine = Engine::start(&["--reasoning-parser", "deepseek-v4"], &[]);
    let addr = engine.ready().await;
    let question = "Explain the transformer architecture in one paragraph.";
    let body = json!({"model": "any", "stream": true, "stream_options": {"include_usage": true},
        "messages": [{"role": "user", "content": question}]});
    let text = read_to_end(&mut begin_chat(addr, &body).await).await;
    let reasoning = text.find(r#""reasoning_content":"The"#).expect("reasoning");
    let content = text.find(r#""content":"The"#).expect("content");
    assert!(reasoning < content);
    let given = text.matches(r#""reasoning_content":"#).count() - 2;
    assert!(text.contains(&format!(r#""completion_tokens":{given}"#)), "{given} tokens: {text}");
    assert!(text.contains(r#""finish_reason":"stop""#) && text.contains("data: [DONE]\n\n"));
    let body = json!({"model": "any", "max_tokens": 5, "messages": [{"role": "user", "content": question}]});
    let text = read_to_end(&mut begin_chat(addr, &body).await).await;
    assert!(text.contains(r#""finish_reason":"length""#) && text.contains(r#""completion_tokens":5"#), "{text}");
}

#[tokio::test]
async fn bad_requests_have_the_real_ones_flat_errors() {
    let engine = Engine::start(&[], &[]);
    let addr = engine.ready().await;
    for (body, words) in [
        (json!({"model": "x"}), "Field required"),
        (json!({"model": "x", "stream": true, "max_tokens": 999_999, "messages": []}), "maximum context length"),
    ] {
        let text = read_to_end(&mut begin_chat(addr, &body).await).await;
        assert!(text.starts_with("HTTP/1.1 400 ") && text.contains(words) && text.contains(r#""code":400"#), "{text}");
    }
}

#[tokio::test]
async fn d04_a_client_that_leaves_frees_its_place() {
    let engine = Engine::start(&["--enable-metrics"], &[]);
    let addr = engine.ready().await;
    let mut stream = begin_chat(addr, &long_chat()).await;
    read_until(&mut stream, "data: ").await;
    assert!(get(addr, "/v1/loads").await.1.contains(r#""num_running_reqs":1"#));
    drop(stream);
    let deadline = Instant::now() + PATIENCE;
    while !get(addr, "/v1/loads").await.1.contains(r#""num_running_reqs":0"#) {
        assert!(Instant::now() < deadline, "the request is still running");
    }
    assert!(get(addr, "/metrics").await.1.contains("sglang:num_aborted_requests_total"));
}

#[tokio::test]
async fn requests_beyond_the_maximum_wait_inside() {
    let engine = Engine::start(&["--max-running-requests", "1"], &[]);
    let addr = engine.ready().await;
    let mut first = begin_chat(addr, &long_chat()).await;
    read_until(&mut first, "data: ").await;
    let _second = begin_chat(addr, &long_chat()).await;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, loads) = get(addr, "/v1/loads").await;
        if loads.contains(r#""num_running_reqs":1,"num_waiting_reqs":1"#) {
            break;
        }
        assert!(Instant::now() < deadline, "{loads}");
    }
}

#[tokio::test]
async fn sigterm_when_idle_ends_with_0_and_leaves_nothing() {
    let mut engine = Engine::start(&["--tp-size", "2"], &[]);
    engine.ready().await;
    engine.signal(Signal::SIGTERM);
    assert_eq!(engine.ended().await.code(), Some(0));
    engine.nothing_is_left().await;
    assert!(engine.log().contains("Gracefully exiting... Remaining number of requests 0."));
}

#[tokio::test]
async fn sigterm_in_a_stream_waits_for_its_end_and_goes_on_accepting() {
    let mut engine = Engine::start(&[], &[]);
    let addr = engine.ready().await;
    let body = json!({"stream": true, "max_tokens": 400, "ignore_eos": true, "messages": [{"content": "go"}]});
    let mut stream = begin_chat(addr, &body).await;
    read_until(&mut stream, "data: ").await;
    engine.signal(Signal::SIGTERM);
    engine.says("SIGTERM received.").await;
    assert_eq!(get(addr, "/health").await.0, 503);
    assert_eq!(get(addr, "/ready").await.0, 503);
    let short = json!({"max_tokens": 2, "messages": [{"content": "go"}]});
    assert!(read_to_end(&mut begin_chat(addr, &short).await).await.starts_with("HTTP/1.1 200"));
    assert!(read_to_end(&mut stream).await.contains("data: [DONE]"));
    assert_eq!(engine.ended().await.code(), Some(0));
}

#[tokio::test]
async fn sigterm_while_the_children_import_orphans_them() {
    let mut engine = Engine::start(&["--tp-size", "2"], &[("SGLANG_SIM_IMPORT_SECONDS", "600")]);
    engine.child_titled("python3 -B -c from multiprocessing.spawn").await;
    eventually("three children import", || (engine.children().len() == 3).then_some(())).await;
    engine.signal(Signal::SIGTERM);
    assert_eq!(engine.ended().await.signal(), Some(Signal::SIGTERM as i32));
    assert_eq!(engine.children().len(), 3, "they have no parent-death signal yet: {:?}", engine.children());
}

#[tokio::test]
async fn orphans_go_on_loading_and_the_detokenizer_never_leaves() {
    let mut engine = Engine::start(&[], &[("SGLANG_SIM_IMPORT_SECONDS", "0.5")]);
    eventually("two children import", || (engine.children().len() == 2).then_some(())).await;
    engine.signal(Signal::SIGTERM);
    engine.ended().await;
    engine.child_titled("sglang::scheduler").await;
    engine.says("Load weight end").await;
    let only = eventually("the scheduler cannot report to anybody and leaves", || {
        let left = engine.children();
        (left.len() == 1).then_some(left)
    });
    assert!(only.await[0].1.starts_with("sglang::detokenizer"));
}

#[tokio::test]
async fn sigkill_after_the_load_takes_the_children_along() {
    let mut engine = Engine::start(&["--tp-size", "2"], &[]);
    engine.ready().await;
    engine.signal(Signal::SIGKILL);
    assert_eq!(engine.ended().await.signal(), Some(Signal::SIGKILL as i32));
    engine.nothing_is_left().await;
}

#[tokio::test]
async fn sigint_when_idle_ends_by_sigint() {
    let mut engine = Engine::start(&[], &[]);
    engine.ready().await;
    engine.signal(Signal::SIGINT);
    assert_eq!(engine.ended().await.signal(), Some(Signal::SIGINT as i32));
    engine.nothing_is_left().await;
}

#[tokio::test]
async fn g08_a_killed_rank_ends_the_engine_by_sigkill_upon_itself() {
    let mut engine = Engine::start(&["--tp-size", "2"], &[]);
    let addr = engine.ready().await;
    let mut stream = begin_chat(addr, &long_chat()).await;
    read_until(&mut stream, "data: ").await;
    kill(engine.child_titled("sglang::scheduler_TP1").await, Signal::SIGKILL).unwrap();
    let text = read_to_end(&mut stream).await;
    assert!(!text.contains("[DONE]"), "a cut stream must not look complete");
    assert_eq!(engine.ended().await.signal(), Some(Signal::SIGKILL as i32));
    engine.nothing_is_left().await;
    assert!(engine.log().contains("Subprocess scheduler_1 (pid="));
    assert_eq!(cause(&engine, How::Signaled(9), Reached::Ready), Class::Crash);
}

#[tokio::test]
async fn a_killed_rank_while_it_loads_is_a_traceback_and_1() {
    let mut engine = Engine::start(&[], &[("SGLANG_SIM_FAULT", "hang_at_load")]);
    engine.says("Load weight begin").await;
    kill(engine.child_titled("sglang::scheduler").await, Signal::SIGKILL).unwrap();
    assert_eq!(engine.ended().await.code(), Some(1));
    assert!(engine.log().contains("Rank 0 scheduler died during initialization (exit code: -9)"));
    engine.nothing_is_left().await;
}

/// What the supervisor would make of this engine's log.
fn cause(engine: &Engine, how: How, reached: Reached) -> Class {
    let (mut signatures, mut tail) = (Vec::new(), Vec::new());
    let mut splitter = Splitter::new();
    splitter.push(engine.log().as_bytes(), |raw| {
        let line = log::parse(raw.bytes);
        if let Some(Fact::Fatal(signature)) = line.fact {
            signatures.push(signature);
        }
        tail.push(line.message.into_owned());
    });
    let (oom_kill, hardware, gpu_fault) = (None, None, None);
    classify(&Evidence { how, reached, tail: &tail, signatures: &signatures, oom_kill, hardware, gpu_fault }).class
}

#[tokio::test]
async fn g01_starts_that_cannot_succeed_fail_as_the_real_ones_do() {
    let mut engine = Engine::start(&["--tp_size", "8"], &[]);
    assert_eq!(engine.ended().await.code(), Some(2));
    assert_eq!(cause(&engine, How::Exited(2), Reached::Nothing), Class::BadConfig);
    let mut engine = Engine::start(&["--model-path", "/nonexistent"], &[]);
    assert_eq!(engine.ended().await.code(), Some(1));
    assert_eq!(cause(&engine, How::Exited(1), Reached::Nothing), Class::Weights);
    for (folder, class) in [(Folder::NoShards, Class::Weights), (Folder::Garbled, Class::CorruptWeights)] {
        let mut engine = Engine::start_in(folder, &[], &[]);
        assert_eq!(engine.ended().await.signal(), Some(Signal::SIGKILL as i32), "{}", engine.log());
        assert_eq!(cause(&engine, How::Signaled(9), Reached::Loading), class, "{}", engine.log());
        engine.nothing_is_left().await;
    }
}

#[tokio::test]
async fn dummy_weights_need_no_files() {
    let engine = Engine::start_in(Folder::NoShards, &["--load-format", "dummy"], &[]);
    engine.ready().await;
}

#[tokio::test]
async fn g02_g09_faults_on_request_end_the_start() {
    let mut engine = Engine::start(&[], &[("SGLANG_SIM_FAULT", "exit_at_start=7")]);
    assert_eq!(engine.ended().await.code(), Some(7));
    let mut engine = Engine::start(&["--tp-size", "2"], &[("SGLANG_SIM_FAULT", "cuda_oom")]);
    assert_eq!(engine.ended().await.signal(), Some(Signal::SIGKILL as i32));
    assert_eq!(cause(&engine, How::Signaled(9), Reached::Loading), Class::GpuOom);
    let mut engine = Engine::start(&[], &[("SGLANG_SIM_FAULT", "crash_after=0.1")]);
    assert_eq!(engine.ended().await.signal(), Some(Signal::SIGKILL as i32));
    assert_eq!(cause(&engine, How::Signaled(9), Reached::Ready), Class::CudaError);
}

#[tokio::test]
async fn g10_a_stopped_rank_fails_health_and_nothing_else() {
    let engine = Engine::start(&["--tp-size", "2"], &[("SGLANG_HEALTH_CHECK_TIMEOUT", "2")]);
    let addr = engine.ready().await;
    let rank = engine.child_titled("sglang::scheduler_TP1").await;
    kill(rank, Signal::SIGSTOP).unwrap();
    assert_eq!(get(addr, "/ready").await.0, 200, "it only repeats the last known state");
    assert_eq!(get(addr, "/health").await.0, 503);
    assert_eq!(get(addr, "/ready").await.0, 503);
    assert_eq!(get(addr, "/v1/loads").await.0, 200);
    kill(rank, Signal::SIGCONT).unwrap();
    assert_eq!(get(addr, "/health").await.0, 200);
}

#[tokio::test]
async fn d02_d03_streams_die_or_hang_after_as_many_tokens_as_asked() {
    let mut engine = Engine::start(&[], &[("SGLANG_SIM_FAULT", "die_after_tokens=30")]);
    let addr = engine.ready().await;
    let text = read_to_end(&mut begin_chat(addr, &long_chat()).await).await;
    assert!(text.matches("data: ").count() >= 5 && !text.contains("[DONE]"), "{text}");
    assert_eq!(engine.ended().await.signal(), Some(Signal::SIGKILL as i32));

    let engine = Engine::start(&[], &[("SGLANG_SIM_FAULT", "hang_after_tokens=30")]);
    let addr = engine.ready().await;
    let mut stream = begin_chat(addr, &long_chat()).await;
    read_until(&mut stream, "data: ").await;
    let mut block = [0; 4096];
    loop {
        match timeout(Duration::from_secs(2), stream.read(&mut block)).await {
            Ok(Ok(read)) => assert!(read > 0, "it must hang, not end"),
            Ok(Err(error)) => panic!("{error}"),
            Err(_) => break,
        }
    }
}

#[tokio::test]
async fn g05_a_taken_port_is_found_after_the_load_and_not_exited_over() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut engine = Engine::start(&["--port", &port], &[("SGLANG_SIM_BIND_WAIT_SECONDS", "1")]);
    engine.says("address already in use").await;
    engine.says("Waiting for application shutdown.").await;
    assert!(engine.child.try_wait().unwrap().is_none(), "it stays");
    assert_eq!(engine.ended().await.signal(), Some(Signal::SIGKILL as i32));
    assert_eq!(cause(&engine, How::Signaled(9), Reached::Loaded), Class::Port);
}

#[tokio::test]
async fn g11_sigterm_can_be_ignored() {
    let mut engine = Engine::start(&[], &[("SGLANG_SIM_FAULT", "ignore_sigterm")]);
    let addr = engine.ready().await;
    engine.signal(Signal::SIGTERM);
    assert_eq!(get(addr, "/health").await.0, 200, "a second later nothing has changed");
    assert!(engine.child.try_wait().unwrap().is_none());
}

#[tokio::test]
async fn g12_a_grandchild_can_flee_the_session() {
    let marker = format!("SGLANG_SIM_MARK={}", std::process::id());
    let (name, value) = marker.split_once('=').unwrap();
    let mut engine = Engine::start(&[], &[("SGLANG_SIM_FAULT", "orphan_setsid"), (name, value)]);
    engine.ready().await;
    let stray = || {
        processes().into_iter().find(|p| {
            p.title.contains("::stray second")
                && p.group != engine.pid()
                && std::fs::read(format!("/proc/{}/environ", p.pid))
                    .is_ok_and(|e| String::from_utf8_lossy(&e).contains(&marker))
        })
    };
    let pid = eventually("the stray lives elsewhere", stray).await.pid;
    engine.signal(Signal::SIGKILL);
    engine.ended().await;
    kill(pid, Signal::SIGTERM).unwrap();
    sleep(Duration::from_millis(300)).await;
    assert!(processes().iter().any(|p| p.pid == pid), "deaf to SIGTERM, and nobody's child");
    kill(pid, Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn g14_floods_and_endless_lines_do_not_stop_it() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sglangd"));
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), Folder::Whole);
    command.args(["simulate", "--port", "0", "--model-path"]).arg(folder.path());
    command.env("SGLANG_SIM_START_SECONDS", "0.3").env("SGLANG_SIM_FAULT", "flood_stdout,long_line=8");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().unwrap();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    // Both pipes are drained, as a supervisor must.
    let drain = std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()).unwrap());
    let (mut splitter, mut longest, mut dropped, mut ready) = (Splitter::new(), 0, 0, false);
    let mut block = vec![0; 1 << 16];
    while !ready {
        let read = err.read(&mut block).unwrap();
        assert!(read > 0, "it ended");
        splitter.push(&block[..read], |raw| {
            longest = longest.max(raw.bytes.len());
            dropped += raw.dropped;
            ready |= log::parse(raw.bytes).fact == Some(Fact::Ready);
        });
    }
    let _ = killpg(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGKILL);
    child.wait().unwrap();
    assert!(drain.join().unwrap() > 1 << 20, "it was a flood");
    assert_eq!(longest, log::MAX_LINE);
    assert!(dropped > 7 << 20, "{dropped}");
}

#[tokio::test]
async fn g17_garbage_and_g06_lies_are_on_request() {
    let engine = Engine::start(&[], &[("SGLANG_SIM_FAULT", "garbage_http")]);
    let addr = engine.ready().await;
    assert!(client::get(&Target::Tcp(addr), "/health", None, PATIENCE).await.is_err());

    let mut engine = Engine::start(&[], &[("SGLANG_SIM_FAULT", "health_lies")]);
    let addr = engine.ready().await;
    kill(engine.child_titled("sglang::scheduler").await, Signal::SIGKILL).unwrap();
    assert_eq!(get(addr, "/health").await.0, 200);
    assert!(engine.child.try_wait().unwrap().is_none());
}

#[tokio::test]
async fn g16_closed_output_is_not_the_end() {
    let engine = Engine::start(&[], &[("SGLANG_SIM_FAULT", "close_stdio")]);
    let addr = engine.ready().await;
    assert_eq!(get(addr, "/health").await.0, 200);
    let out = std::fs::read_to_string(engine.folder.path().join("out.log")).unwrap();
    assert!(out.contains("POST /generate") && !out.contains("GET /health"), "{out}");
}

#[tokio::test]
async fn g24_what_killed_engines_leave_is_left_on_request() {
    let mut engine = Engine::start(&[], &[("SGLANG_SIM_FAULT", "leak_shm")]);
    engine.ready().await;
    let pid = engine.child.id();
    engine.signal(Signal::SIGKILL);
    engine.ended().await;
    let left = [
        format!("sem.mp-sim{pid}"),
        format!("sgl_shm_mq_{pid}_sim"),
        format!("sglang_loads_{pid}_sim.shm"),
        format!("nccl-sim{pid}"),
    ];
    for name in left {
        let path = Path::new("/dev/shm").join(&name);
        assert!(path.exists(), "{name}");
        std::fs::remove_file(path).unwrap();
    }
}
