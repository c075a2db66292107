//! Programs that people have in front of an engine, through `sglangd serve` to the simulated one: what
//! they get is whole or an error that they understand, and the engine works for nobody who has left.

mod bench_serving;
mod curl;
mod http2;
mod router;
mod sdks;
mod websocket;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use serde_json::Value;

use crate::harness::daemon::{Daemon, Setup};
use crate::harness::front::{keys_lines, metric};
use crate::harness::scene::{SOON, got, number_at, quick};
use crate::real_engine::prepared;

pub const KEY: &str = "sk-of-a-real-client";

/// Python imports for seconds, and the machine has two cores.
const PATIENCE: Duration = Duration::from_mins(3);

/// A daemon that asks for [`KEY`], lets its engine's load be seen, and takes prompts of any length.
fn serving(faults: &str, granted: &str) -> Setup {
    let setup = quick(faults);
    let keys = setup.folder().join("keys");
    fs::write(&keys, keys_lines(&[("tester", KEY, granted)])).unwrap();
    setup
        .set("auth.keys_file", keys.to_str().unwrap())
        .set("limits.routes", "[/v1/loads]")
        .engine_flag("--context-length")
        .engine_flag("10000000")
}

/// The Python that has the clients.
fn python() -> Command {
    let mut command = Command::new(prepared("SGLANGD_TEST_VENV").join("bin/python"));
    command.env("PYTHONPATH", prepared("SGLANGD_TEST_CLIENTS"));
    // A checkout is not for writing, and a developer's keys and proxies are not for these tests.
    command.env("PYTHONDONTWRITEBYTECODE", "1").env("HF_HUB_OFFLINE", "1");
    for (name, _) in std::env::vars() {
        let upper = name.to_uppercase();
        if upper.starts_with("OPENAI_") || upper.starts_with("ANTHROPIC_") || upper.ends_with("_PROXY") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

fn script(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "clients", name].iter().collect()
}

/// A client in Python that says what it finds, a JSON object a line. Ended with the test.
struct Program {
    child: Child,
    lines: Receiver<String>,
}

impl Program {
    fn start(name: &str, arguments: &[&str]) -> Self {
        let mut command = python();
        command.arg(script(name)).args(arguments).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (say, lines) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if say.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    /// The next thing that it says.
    fn says(&mut self) -> Value {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => serde_json::from_str(&line).unwrap_or_else(|_| panic!("no JSON: {line}")),
            Err(RecvTimeoutError::Timeout) => panic!("the client says nothing"),
            Err(RecvTimeoutError::Disconnected) => panic!("the client ended: {:?}", self.child.wait()),
        }
    }

    /// The next thing, which must be of this scenario.
    fn says_of(&mut self, scenario: &str) -> Value {
        let said = self.says();
        assert_eq!(said["scenario"], scenario, "{said}");
        said
    }

    /// It has nothing more to say, and nothing went wrong.
    fn ends(mut self) {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => panic!("more than was asked: {line}"),
            Err(RecvTimeoutError::Timeout) => panic!("the client does not end"),
            Err(RecvTimeoutError::Disconnected) => assert!(self.child.wait().unwrap().success()),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn counted(daemon: &Daemon, line: &str) -> u64 {
    metric(&got(daemon.admin(), "/metrics").text(), line).unwrap_or(0.0) as u64
}

/// Requests of the tester's for this route with such an answer.
fn answered(daemon: &Daemon, route: &str, class: &str) -> u64 {
    counted(daemon, &format!("sglangd_requests_total{{route=\"{route}\",status=\"{class}\",key=\"tester\"}}"))
}

/// No request is open any more, towards the engine or in the queue.
async fn is_idle(daemon: &mut Daemon) {
    daemon
        .until("no request is open", SOON, async |daemon| {
            let status = daemon.status().await?;
            let open = (number_at(&status, "/requests/in_flight"), number_at(&status, "/requests/queued"));
            (open == (0, 0)).then_some(())
        })
        .await;
}

async fn started(setup: Setup) -> Daemon {
    let mut daemon = setup.start();
    daemon.is_ready(SOON).await;
    daemon
}
