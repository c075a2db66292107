//! curl, in the ways that it is used against such servers.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::{KEY, answered, counted, is_idle, serving, started};
use crate::harness::daemon::Daemon;
use crate::harness::scene::{CHAT, SOON, number_at};

/// What curl prints behind the body: version, status, bytes sent, the time until its end.
const TOLD: &str = "\\n%{http_version} %{http_code} %{size_upload}";

fn curl(daemon: &Daemon, words: &[&str]) -> Command {
    let mut command = Command::new("curl");
    // -q: no ~/.curlrc; at most a minute.
    command.args(["-q", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60"]);
    command.args(["-H", "content-type: application/json", "-H"]).arg(format!("Authorization: Bearer {KEY}"));
    command.args(words).arg(daemon.url(CHAT)).stdin(Stdio::null());
    command
}

/// What it printed, by lines, and what it said of the exchange.
fn run(command: &mut Command) -> (String, String) {
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}{said}", String::from_utf8_lossy(&output.stderr));
    (said, String::from_utf8(output.stderr).unwrap())
}

fn asked(tokens: u32, content: &str) -> String {
    json!({"model": "small", "max_tokens": tokens, "ignore_eos": true, "messages": [{"role": "user", "content": content}]})
        .to_string()
}

fn stream(tokens: u32) -> String {
    json!({"model": "small", "max_tokens": tokens, "ignore_eos": true, "stream": true,
        "messages": [{"role": "user", "content": "hi"}]})
    .to_string()
}

/// The body, which is JSON, and the line behind it.
fn parted(said: &str) -> (Value, String) {
    let (body, told) = said.rsplit_once('\n').unwrap();
    (serde_json::from_str(body).unwrap(), told.to_owned())
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn curl_streams_uploads_and_leaves_over_both_versions() {
    let mut daemon = started(serving("", "")).await;

    for (version, how) in [("1.1", "--http1.1"), ("2", "--http2-prior-knowledge")] {
        // -N: each event as it comes.
        let (said, _) = run(&mut curl(&daemon, &["-N", how, "-w", TOLD, "-d", &stream(30)]));
        assert_eq!(
            said.matches("\"content\":\"").count(),
            31,
            "thirty tokens and the opening one, HTTP/{version}: {said}"
        );
        assert!(said.contains(&format!("data: [DONE]\n\n\n{version} 200 ")), "{said}");
    }

    // Two megabytes: curl asks first whether they are wanted, and sends them when it is told so.
    let text = "x".repeat(2_000_000);
    let body = asked(3, &text);
    let file = daemon.folder().join("body.json");
    std::fs::write(&file, &body).unwrap();
    let data = format!("@{}", file.display());
    let with_length = ["-v", "--http1.1", "-w", TOLD, "--data-binary", &data];
    let (said, heard) = run(&mut curl(&daemon, &with_length));
    let (answer, told) = parted(&said);
    assert!(heard.contains("> Expect: 100-continue") && heard.contains("< HTTP/1.1 100 Continue"), "{heard}");
    assert_eq!(told, format!("1.1 200 {}", body.len()));
    // A token is four letters there.
    assert_eq!(answer["usage"]["prompt_tokens"], 500_000);

    // In chunks, over both: a body whose end is not told before it comes.
    for (version, more) in [
        ("1.1", &["--http1.1", "-H", "Transfer-Encoding: chunked"][..]),
        ("2", &["--http2-prior-knowledge", "-H", "Content-Length:"]),
    ] {
        let words = [more, &["-w", TOLD, "-X", "POST", "-T", "-"]].concat();
        let mut child = curl(&daemon, &words).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let (answer, told) = parted(&String::from_utf8(output.stdout).unwrap());
        assert!(told.starts_with(&format!("{version} 200 ")), "{told}: {answer}");
        assert_eq!(answer["usage"]["prompt_tokens"], 500_000, "HTTP/{version}");
    }

    // Too large: told so before it is sent.
    let refused =
        curl(&daemon, &["--http1.1", "-v", "-w", TOLD, "-H", "Content-Length: 99999999999", "--data-binary", &data])
            .output()
            .unwrap();
    let said = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(said.contains("1.1 413 0"), "{said}");

    // Who leaves in the middle is let go by the engine too, whatever the version.
    for how in ["--http1.1", "--http2-prior-knowledge"] {
        let mut child = curl(&daemon, &["-N", how, "-d", &stream(3000)]).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("\"content\":\"This")), "no token came");
        daemon
            .until("it is counted", SOON, async |daemon| {
                (number_at(&daemon.status().await?, "/requests/in_flight") == 1).then_some(())
            })
            .await;
        child.kill().unwrap();
        child.wait().unwrap();
        is_idle(&mut daemon).await;
    }
    daemon
        .until("the engine has nothing to do", SOON, async |daemon| {
            let loads = Command::new("curl")
                .args(["-q", "-sS", "--noproxy", "*", "-H"])
                .arg(format!("x-api-key: {KEY}"))
                .arg(daemon.url("/v1/loads"))
                .output()
                .unwrap();
            let loads: Value = serde_json::from_slice(&loads.stdout).unwrap();
            (loads["loads"][0]["num_running_reqs"] == 0 && loads["loads"][0]["num_waiting_reqs"] == 0).then_some(())
        })
        .await;
    assert_eq!(counted(&daemon, "sglangd_client_aborts_total"), 2);
    assert_eq!((answered(&daemon, CHAT, "2xx"), answered(&daemon, CHAT, "4xx")), (7, 1));
    daemon.stops_clean(SOON).await;
}
