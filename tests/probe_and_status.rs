//! `sglangd probe` and `sglangd status` as a user sees them, before a server that plays a script.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};

/// Answers each connection's one request with the next line of a script (the last one again and
/// again), and remembers what was asked.
struct Script {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
    playing: tokio::task::JoinHandle<()>,
}

impl Drop for Script {
    fn drop(&mut self) {
        self.playing.abort();
    }
}

impl Script {
    async fn play(answers: Vec<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&asked);
        let playing = tokio::spawn(async move {
            let mut answers = answers.into_iter();
            let mut answer = answers.next().unwrap();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let request = request(&mut stream).await;
                heard.lock().unwrap().push(request);
                let _ = stream.write_all(answer.as_bytes()).await;
                if let Some(next) = answers.next() {
                    answer = next;
                }
            }
        });
        Self { address, asked, playing }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

/// Head and body of one request.
async fn request(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> String {
    let mut text = Vec::new();
    let mut block = [0; 4096];
    loop {
        let read = stream.read(&mut block).await.unwrap_or(0);
        text.extend_from_slice(&block[..read]);
        let so_far = String::from_utf8_lossy(&text).into_owned();
        if let Some((head, body)) = so_far.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
                .map_or(0, |(_, value)| value.trim().parse::<usize>().unwrap());
            if body.len() >= length {
                return so_far;
            }
        }
        if read == 0 {
            return so_far;
        }
    }
}

fn answer(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len())
}

fn stream(events: &[Value], end: &str) -> String {
    let body = events.iter().map(|event| format!("data: {event}\n\n")).collect::<Vec<_>>().concat();
    answer("200 OK", "content-type: text/event-stream\r\n", &format!("{body}{end}"))
}

fn piece(delta: &Value) -> Value {
    json!({"choices": [{"index": 0, "delta": delta, "finish_reason": null}]})
}

const DONE: &str = "data: [DONE]\n\n";

async fn sglangd(words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sglangd"));
    command.args(words).env_remove("SGLANGD_API_KEY").env_remove("RUNTIME_DIRECTORY").env_remove("SGLANGD_RUNTIME_DIR");
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn the_two_questions_are_asked_and_reasoning_stands_before_the_answer() {
    let events = [
        piece(&json!({"role": "assistant", "content": "", "reasoning_content": null})),
        piece(&json!({"reasoning_content": "I think"})),
        piece(&json!({"reasoning_content": " so"})),
        piece(&json!({"reasoning_content": null, "content": "Yes"})),
        piece(&json!({"content": ", é."})),
        json!({"choices": [], "usage": {"completion_tokens": 9}}),
    ];
    let server = Script::play(vec![stream(&events, DONE)]).await;
    let got =
        sglangd(&["probe", "--url", &server.address, "--model", "m", "--key", "sekret", "--max-tokens", "64"]).await;
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));
    let out = text(&got.stdout);
    assert_eq!(
        out,
        "> Explain the transformer architecture in one paragraph.\n\n[reasoning]\nI think so\n\n[answer]\nYes, é.\n\n\
         > Write five different programs in Python and Rust.\n\n[reasoning]\nI think so\n\n[answer]\nYes, é.\n"
    );
    let figures = text(&got.stderr);
    assert_eq!(figures.lines().count(), 2, "{figures}");
    assert!(
        figures.lines().all(|line| line.contains("first token after ") && line.contains(", 9 tokens in ")),
        "{figures}"
    );
    let asked = server.asked();
    assert_eq!(asked.len(), 2);
    assert!(asked[0].contains("authorization: Bearer sekret") && asked[0].contains("You are a helpful AI assistant."));
    let body: Value = serde_json::from_str(asked[1].split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!((&body["model"], &body["max_tokens"], &body["stream"]), (&json!("m"), &json!(64), &json!(true)));
    assert_eq!(body["messages"][1]["content"], "Write five different programs in Python and Rust.");
}

#[tokio::test]
async fn a_503_is_asked_again_when_the_server_says_so() {
    let later =
        answer("503 Service Unavailable", "retry-after: 1\r\n", r#"{"error":{"message":"loading weights 12/64"}}"#);
    let server = Script::play(vec![later.clone(), later, stream(&[piece(&json!({"content": "hi"}))], DONE)]).await;
    let begun = tokio::time::Instant::now();
    let got = sglangd(&["probe", "--url", &server.address, "--model", "m", "--content", "hello"]).await;
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));
    assert!(begun.elapsed().as_secs_f64() >= 2.0, "Retry-After counts: {:?}", begun.elapsed());
    assert_eq!(text(&got.stdout), "> hello\n\n[answer]\nhi\n");
    let told = text(&got.stderr);
    assert_eq!(told.matches("loading weights 12/64").count(), 1, "the same reason is told once: {told}");
    assert_eq!(server.asked().len(), 3);
}

#[tokio::test]
async fn once_is_once_and_the_time_out_is_the_end_of_patience() {
    let later = answer("503 Service Unavailable", "", r#"{"error":{"message":"gave up"}}"#);
    let server = Script::play(vec![later]).await;
    let got = sglangd(&["probe", "--url", &server.address, "--model", "m", "--content", "x", "--once"]).await;
    assert_eq!(got.status.code(), Some(69));
    assert!(text(&got.stderr).contains("gave up"));
    assert_eq!(server.asked().len(), 1);
    let got =
        sglangd(&["probe", "--url", &server.address, "--model", "m", "--content", "x", "--timeout", "1500ms"]).await;
    assert_eq!(got.status.code(), Some(69));
    assert_eq!(server.asked().len(), 3, "now, and after a second");
}

#[tokio::test]
async fn a_server_that_is_not_there_yet_is_waited_for() {
    let place = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let words = ["probe", "--url", &place.to_string(), "--model", "m", "--content", "x", "--timeout", "1500ms"]
        .map(str::to_owned);
    let got = sglangd(&words.iter().map(String::as_str).collect::<Vec<_>>()).await;
    assert_eq!(got.status.code(), Some(69));
    assert!(text(&got.stderr).contains("trying again"), "{}", text(&got.stderr));
}

#[tokio::test]
async fn d02_a_cut_answer_is_an_error_in_each_of_its_shapes() {
    let some = [piece(&json!({"content": "Half an"}))];
    let error = json!({"error": {"message": "the engine died", "type": "server_error"}});
    for (script, words) in [
        (stream(&[some[0].clone(), error], ""), "the engine died"),
        (stream(&some, ""), "without [DONE]"),
        // A length that promises more: the connection broke.
        (stream(&some, "").replacen("content-length: ", "content-length: 9", 1), "broke off"),
        (stream(&some, "data: {no json\n\n"), "no JSON"),
    ] {
        let server = Script::play(vec![script]).await;
        let got = sglangd(&["probe", "--url", &server.address, "--model", "m", "--content", "x"]).await;
        assert_eq!(got.status.code(), Some(69), "{words}");
        assert!(text(&got.stderr).contains(words), "{words}: {}", text(&got.stderr));
        assert!(text(&got.stdout).contains("Half an"), "what came is shown");
        assert_eq!(server.asked().len(), 1, "half an answer is not asked for again");
    }
}

#[tokio::test]
async fn a_refused_question_and_a_wrong_command_line_are_told_apart() {
    let server = Script::play(vec![answer("401 Unauthorized", "", r#"{"error":"Unauthorized"}"#)]).await;
    let got = sglangd(&["probe", "--url", &server.address, "--model", "m", "--content", "x"]).await;
    assert_eq!(got.status.code(), Some(69));
    assert!(text(&got.stderr).contains("Unauthorized"));
    assert_eq!(server.asked().len(), 1);
    assert_eq!(sglangd(&["probe", "--timeout", "3 days"]).await.status.code(), Some(64));
    assert_eq!(sglangd(&["probe", "--url", "http://"]).await.status.code(), Some(64));
}

/// Answers every `GET /status` on a runtime folder's admin socket.
fn daemon(runtime_dir: &Path, status: &Value) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(runtime_dir.join("admin.sock")).unwrap();
    let answer = answer("200 OK", "content-type: application/json\r\n", &status.to_string());
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert!(request(&mut stream).await.starts_with("GET /status "));
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    })
}

fn status(public: &str) -> Value {
    json!({
        "version": "0.1.0", "state": "loading", "phase": "loading weights 12/64", "percent": 15.5, "eta_seconds": 240,
        "reason": "", "advice": "",
        "model": {"name": "tiny", "repo": null, "revision": null, "commit": null, "path": "/m"},
        "engine": {"pid": 41, "version": "0.5.23", "started_at": null, "restarts": 0, "last_exit": null, "command": [],
            "port": 20001, "ranks": [{"name": "sglang::scheduler_TP0", "pid": 42}], "suspected_seconds": null},
        "requests": {"in_flight": 0, "queued": 0, "max": 32, "target": 10, "served": 0, "websockets": 0},
        "proxy": {"pid": 40, "restarts": 0}, "weights": null,
        "listen": {"public": public, "admin": "127.0.0.1:8001", "admin_socket": null},
        "warnings": [], "uptime_seconds": 5, "config_files": [],
    })
}

#[tokio::test]
async fn probe_finds_the_daemon_by_its_runtime_folder() {
    let server = Script::play(vec![stream(&[piece(&json!({"content": "found"}))], DONE)]).await;
    let folder = tempfile::tempdir().unwrap();
    let port = server.address.rsplit_once(':').unwrap().1;
    let playing = daemon(folder.path(), &status(&format!("0.0.0.0:{port}")));
    let got = sglangd(&["probe", "--runtime-dir", folder.path().to_str().unwrap(), "--content", "x", "--once"]).await;
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));
    assert!(text(&got.stdout).ends_with("[answer]\nfound\n"));
    assert!(server.asked()[0].contains(r#""model":"tiny""#), "the daemon's name for the model: {:?}", server.asked());
    playing.abort();
}

#[tokio::test]
async fn status_is_for_people_or_as_it_was_answered() {
    let folder = tempfile::tempdir().unwrap();
    let playing = daemon(folder.path(), &status("0.0.0.0:8000"));
    let dir = folder.path().to_str().unwrap();
    let got = sglangd(&["status", "--runtime-dir", dir]).await;
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));
    let out = text(&got.stdout);
    assert!(out.contains("loading: loading weights 12/64") && out.contains("16 %  ready in about 4 min"), "{out}");
    let got = sglangd(&["status", "--runtime-dir", dir, "--json"]).await;
    assert_eq!(serde_json::from_slice::<Value>(&got.stdout).unwrap(), status("0.0.0.0:8000"));
    playing.abort();
}

#[tokio::test]
async fn status_of_nobody_is_69_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let got = sglangd(&["status", "--runtime-dir", folder.path().to_str().unwrap()]).await;
    assert_eq!(got.status.code(), Some(69));
    let told = text(&got.stderr);
    assert!(told.contains("no sglangd is running at") && told.contains("sglangd serve"), "{told}");
    assert_eq!(sglangd(&["status", "--url", "https://127.0.0.1:1"]).await.status.code(), Some(64));
}

#[tokio::test]
async fn status_over_tcp_asks_the_admin_listener() {
    let server = Script::play(vec![answer("200 OK", "", &status("0.0.0.0:8000").to_string())]).await;
    let got = sglangd(&["status", "--url", &format!("http://{}", server.address)]).await;
    assert_eq!(got.status.code(), Some(0), "{}", text(&got.stderr));
    assert!(server.asked()[0].starts_with("GET /status "));
}
