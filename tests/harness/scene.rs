//! What the tests of a whole daemon over the simulated engine have in common.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::client::{Answer, Client, get, post, post_with};
use super::daemon::{Daemon, Setup};

/// For what takes a second or two on an idle machine; the tests' machine is never idle.
pub const SOON: Duration = Duration::from_secs(25);

pub const CHAT: &str = "/v1/chat/completions";

/// The simulated engine with these faults: it loads in no time, and drains and crashes without the real
/// one's pauses.
pub fn quick(faults: &str) -> Setup {
    quick_engine(Setup::simulated(), faults)
}

/// The same for a set-up that brings its own model.
pub fn quick_engine(setup: Setup, faults: &str) -> Setup {
    setup
        .env("SGLANG_SIM_START_SECONDS", "0.4")
        .env("SGLANG_SIM_DRAIN_POLL_SECONDS", "0.05")
        .env("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "0")
        .env("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0")
        .env("SGLANG_SIM_FAULT", faults)
        .set("restart.backoff", "50ms")
}

/// An engine that is a shell script; it gets the engine's arguments.
pub fn script(setup: Setup, text: &str) -> Setup {
    let file = setup.folder().join("engine.sh");
    write_script(&file, text);
    setup.set("engine.command", &format!("[{}]", file.display()))
}

pub fn write_script(file: &Path, text: &str) {
    std::fs::write(file, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// What asks for a stream of so many tokens.
pub fn stream_body(tokens: u32) -> String {
    let body = json!({"model": "small", "stream": true, "max_tokens": tokens, "ignore_eos": true,
        "messages": [{"role": "user", "content": "Tell me about the sea."}]});
    body.to_string()
}

/// A stream of so many tokens, as a request.
pub fn stream_of(tokens: u32) -> String {
    post(CHAT, &stream_body(tokens))
}

/// Opens a stream and reads its first token.
pub fn open_stream(addr: SocketAddr, tokens: u32) -> Client {
    open_stream_with(addr, "", tokens)
}

/// The same with more header lines, each ended by CRLF.
pub fn open_stream_with(addr: SocketAddr, fields: &str, tokens: u32) -> Client {
    let mut client = Client::connect(addr);
    client.send(post_with(CHAT, fields, &stream_body(tokens))).until("\"content\"");
    client
}

/// Asks for a stream and reads it to its end.
pub fn streamed(addr: SocketAddr, tokens: u32) -> Answer {
    Client::ask(addr, stream_of(tokens))
}

pub fn got(addr: SocketAddr, path: &str) -> Answer {
    Client::ask(addr, get(path))
}

pub fn is_whole(answer: &Answer) -> bool {
    answer.status == 200 && answer.end == super::client::End::Complete && answer.text().ends_with("data: [DONE]\n\n")
}

pub fn text_at(status: &Value, pointer: &str) -> String {
    status.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

pub fn number_at(status: &Value, pointer: &str) -> i64 {
    status.pointer(pointer).and_then(Value::as_i64).unwrap_or_else(|| panic!("no number at {pointer}: {status}"))
}

pub fn engine_pid(status: &Value) -> i32 {
    i32::try_from(number_at(status, "/engine/pid")).unwrap()
}

pub fn proxy_pid(status: &Value) -> i32 {
    i32::try_from(number_at(status, "/proxy/pid")).unwrap()
}

pub fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// Ready again, with another engine than this one.
pub async fn replaces(daemon: &mut Daemon, engine: i32) -> Value {
    daemon
        .until("another engine is ready", SOON, async |daemon| {
            let status = daemon.status().await?;
            let ready = text_at(&status, "/state") == "ready" && engine_pid(&status) != engine;
            (ready && !daemon.refuses_clients().await).then_some(status)
        })
        .await
}

/// The only process of the daemon whose title or command line has this text.
pub fn the_one(daemon: &Daemon, text: &str) -> i32 {
    let found = daemon.processes_named(text);
    assert_eq!(found.len(), 1, "{text}: {found:?}");
    found[0].pid
}

/// Where the daemon keeps what its flags leave to it.
pub fn state_dir(daemon: &Daemon) -> PathBuf {
    daemon.folder().join("state")
}

/// The remark of this kind in status and metrics, once in the log.
pub async fn is_remarked(daemon: &mut Daemon, kind: &str, said: &str) {
    let status = daemon
        .until("the remark", SOON, async |daemon| {
            let status = daemon.status().await?;
            (text_at(&status, "/engine/remarks/0/kind") == kind).then_some(status)
        })
        .await;
    assert!(status["warnings"].to_string().contains(said), "{status}");
    // The log is written by a thread of its own.
    daemon.until("the log says it", SOON, async |daemon| daemon.log().contains(said).then_some(())).await;
    assert_eq!(daemon.log().matches(said).count(), 1, "once: {}", daemon.log());
    let page = got(daemon.admin(), "/metrics").text();
    assert!(page.contains(&format!("sglangd_engine_remark{{kind=\"{kind}\"}} 1")), "{page}");
}

/// The public port answers this with 503 and this code: the proxy hears of a state a moment after the status has it.
pub async fn refuses_with(daemon: &mut Daemon, request: &str, code: &str) {
    let addr = daemon.public();
    daemon
        .until(&format!("503 {code}"), SOON, async |_| {
            let refused = Client::ask(addr, request);
            ((refused.status, refused.code().as_str()) == (503, code)).then_some(())
        })
        .await;
}
