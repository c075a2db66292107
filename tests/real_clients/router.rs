//! sglang-router in front of sglangd: what it asks of a worker is opened for it, as `docs/security.md` says.

use std::fs::File;
use std::net::SocketAddr;
use std::process::Child;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::{KEY, answered, is_idle, python, serving, started};
use crate::harness::client::{Client, End, post, post_with};
use crate::harness::daemon::{Daemon, free_address, get_json};
use crate::harness::scene::{CHAT, SOON, engine_pid, got, is_whole, replaces, send, stream_body};

/// `sglang-router` with one worker; ended with the test.
struct Router {
    child: Child,
    addr: SocketAddr,
}

impl Router {
    fn before(daemon: &Daemon) -> Self {
        let (addr, metrics) = (free_address(), free_address());
        let log = File::create(daemon.folder().join("router.log")).unwrap();
        let mut command = python();
        command.args(["-m", "sglang_router.launch_router", "--worker-urls", &daemon.url("")]);
        command.args(["--host", "127.0.0.1", "--port", &addr.port().to_string()]);
        command.args(["--prometheus-host", "127.0.0.1", "--prometheus-port", &metrics.port().to_string()]);
        command.args(["--health-check-interval-secs", "1", "--health-success-threshold", "1"]);
        command.args(["--worker-startup-check-interval", "1", "--disable-retries"]);
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        Self { child, addr }
    }

    async fn workers(&self) -> Option<Value> {
        get_json(&format!("http://{}/workers", self.addr)).await
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn asking(tokens: u32) -> String {
    post_with(CHAT, &format!("Authorization: Bearer {KEY}\r\n"), &stream_body(tokens))
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn sglang_router_registers_sglangd_as_a_worker_and_streams_through_it() {
    let open = serving("", "")
        .set("limits.routes", "[/server_info, /get_server_info, /model_info, /get_model_info, /v1/loads]")
        .set(
            "auth.routes",
            "[-/server_info, -/get_server_info, -/model_info, -/get_model_info, -/v1/loads, -/v1/models]",
        );
    let mut daemon = started(open).await;
    let router = Router::before(&daemon);
    let log = daemon.folder().join("router.log");
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let worker = daemon
        .until("the router has its worker", Duration::from_mins(1), async |_| {
            let workers = router.workers().await?;
            let worker = workers["workers"].get(0)?.clone();
            (worker["is_healthy"] == true).then_some(worker)
        })
        .await;
    // What it knows of the model came from the copies.
    assert_eq!(worker["model_id"], "small", "{worker}\n{}", said());
    assert_eq!(got(router.addr, "/readiness").status, 200, "{}", said());

    let answer = Client::ask(router.addr, asking(30));
    assert!(is_whole(&answer), "{answer:?}\n{}", said());
    assert_eq!(answer.text().matches("\"content\":\"").count(), 31, "thirty tokens and the opening one");
    assert_eq!(answered(&daemon, CHAT, "2xx"), 1);
    let refused = Client::ask(router.addr, post(CHAT, &stream_body(3)));
    assert_eq!(refused.status, 401, "without the client's key: {refused:?}");

    // Who leaves the router leaves the engine: it takes the router until its next write.
    let mut leaver = Client::connect(router.addr);
    leaver.send(asking(3000)).until("\"content\":\"This");
    drop(leaver);
    is_idle(&mut daemon).await;

    // An engine that dies in mid-stream does not look like an end behind the router either.
    let mut client = Client::connect(router.addr);
    client.send(asking(3000)).until("\"content\":\"This");
    let engine = engine_pid(&daemon.status().await.unwrap());
    send(engine, Signal::SIGKILL);
    let answer = client.answer();
    assert!(!answer.text().contains("[DONE]"), "{answer:?}");
    assert!(answer.text().contains("\"error\"") || answer.end != End::Complete, "a silent short answer: {answer:?}");
    replaces(&mut daemon, engine).await;
    daemon
        .until("the router serves again", Duration::from_mins(1), async |_| {
            is_whole(&Client::ask(router.addr, asking(3))).then_some(())
        })
        .await;
    drop(router);
    is_idle(&mut daemon).await;
    daemon.stops_clean(SOON).await;
}
