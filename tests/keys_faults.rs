//! Group F, keys and routes: who may ask, and for what.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use sglangd::admission::Terms;
use sglangd::keys::{Role, edit, hashed};
use sglangd::link::{Down, EngineState, ProxySettings, Reader, Up, Writer, pair, split};
use sglangd::proxy::linked;

use crate::harness::client::{Client, get, post, post_with};
use crate::harness::engine::{Engine, json};
use crate::harness::front::{Front, eventually, keys_file, settings, view};

const CHAT: &str = "/v1/chat/completions";

#[test]
fn f06_only_a_good_key_passes() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let keys = keys_file(&[("one", "secret-1", ""), ("two", "secret-2", "")]);
    let front = Front::tuned(&engine, |settings| settings.keys_file = Some(keys.path().to_owned()));
    let long = "k".repeat(60_000);
    for fields in [
        "",
        "Authorization: Bearer wrong\r\n",
        "Authorization: Bearer\r\n",
        "Authorization: Basic secret-1\r\n",
        "Authorization: Bearer secret-1 x\r\n",
        "Authorization: Bearer secret-1\r\nAuthorization: Bearer secret-2\r\n",
        "Authorization: Bearer secret-1\r\nX-Api-Key: wrong\r\n",
        "Authorization: Bearer secret-1\r\nX-Api-Key: secret-2\r\n",
        "Connection: authorization\r\nX-Api-Key: \r\n",
        &format!("Authorization: Bearer {long}\r\n"),
    ] {
        let answer = Client::ask(front.addr, post_with(CHAT, fields, "{}"));
        let shown = &fields[..fields.len().min(60)];
        assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("bearer")), "{shown:?}");
        assert_eq!(answer.code(), "invalid_api_key");
    }
    assert_eq!(engine.connections(), 0);
    for fields in [
        "Authorization: Bearer secret-1\r\n",
        "authorization: bearer secret-2 \r\n",
        "X-Api-Key: secret-2\r\n",
        "Authorization: Bearer secret-2\r\nX-Api-Key: secret-2\r\n",
    ] {
        assert_eq!(Client::ask(front.addr, post_with(CHAT, fields, "{}")).status, 200, "{fields:?}");
    }
    assert!(!engine.text(0).contains("secret"), "a client's key reached the engine");
    let page = front.proxy.metrics();
    let counted = |line: &str| front.metric(&format!("sglangd_requests_total{{route=\"{CHAT}\",status={line}}}"));
    assert_eq!((counted("\"2xx\",key=\"one\""), counted("\"2xx\",key=\"two\"")), (Some(1.0), Some(3.0)), "{page}");
    assert_eq!(counted("\"4xx\""), Some(10.0), "{page}");
    assert!(!page.contains("secret"), "a key is on the metrics page");
    // Probes need no key.
    assert_eq!(Client::ask(front.addr, get("/live")).status, 200);
}

#[test]
fn f06_the_engine_gets_its_own_key_and_never_the_clients() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let mut view = view(EngineState::Ready, Some(engine.addr));
    view.upstream.as_mut().unwrap().api_key = Some("engine-key".into());
    front.proxy.engine(view);
    let fields = "Authorization: Bearer mine\r\nX-Api-Key: mine\r\n";
    assert_eq!(Client::ask(front.addr, post_with(CHAT, fields, "{}")).status, 200);
    let text = engine.text(0);
    assert!(text.contains("authorization: Bearer engine-key\r\n") && !text.contains("mine"), "{text}");
}

#[test]
fn f07_a_broken_keys_file_changes_nothing() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let keys = keys_file(&[("one", "secret-1", "")]);
    let mut front = Front::tuned(&engine, |settings| settings.keys_file = Some(keys.path().to_owned()));
    let good = post_with(CHAT, "X-Api-Key: secret-1\r\n", "{}");
    let settings = || ProxySettings { keys_file: Some(keys.path().to_owned()), ..settings() };
    for broken in ["", "# nothing\n", "name sha256:00\n", "name sha256:5fc3dd9f9cd0\n"] {
        std::fs::write(keys.path(), broken).unwrap();
        assert!(front.proxy.settings(settings()).is_err(), "{broken:?}");
        assert_eq!(Client::ask(front.addr, &good).status, 200);
        assert_eq!(Client::ask(front.addr, post(CHAT, "{}")).status, 401);
    }
    let rotated = keys_file(&[("two", "secret-2", "")]);
    std::fs::set_permissions(rotated.path(), std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::copy(rotated.path(), keys.path()).unwrap();
    front.proxy.settings(settings()).unwrap();
    assert_eq!(Client::ask(front.addr, &good).status, 401);
    assert_eq!(Client::ask(front.addr, post_with(CHAT, "X-Api-Key: secret-2\r\n", "{}")).status, 200);
}

/// Talks to a linked proxy as its supervisor does; gives what it says of its keys.
struct Supervisor {
    addr: SocketAddr,
    runtime: tokio::runtime::Runtime,
    up: Reader,
    down: Writer,
}

impl Supervisor {
    fn of(engine: &Engine, keys: &Path) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (ours, theirs) = pair().unwrap();
        std::thread::spawn(move || linked(vec![listener.into()], theirs));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (up, down) = runtime.block_on(async {
            let (up, mut down) = split(ours).unwrap();
            let settings = ProxySettings { keys_file: Some(keys.to_owned()), ..settings() };
            down.send(&Down::Settings(settings)).await.unwrap();
            down.send(&Down::Engine(view(EngineState::Ready, Some(engine.addr)))).await.unwrap();
            (up, down)
        });
        Self { addr, runtime, up, down }
    }

    /// What is wrong with the keys, or none once they are in order again.
    fn hears(&mut self) -> Option<String> {
        self.runtime.block_on(async {
            loop {
                match self.up.next::<Up>().await.unwrap().expect("the link ended") {
                    Up::Refused { reason } => return Some(reason),
                    Up::Recovered => return None,
                    _ => {}
                }
            }
        })
    }

    fn metric(&mut self, line: &str) -> String {
        self.runtime.block_on(async {
            self.down.send(&Down::Scrape { id: 1 }).await.unwrap();
            loop {
                if let Up::Scraped { text, .. } = self.up.next::<Up>().await.unwrap().expect("the link ended") {
                    let found = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
                    return found.unwrap_or_default().to_owned();
                }
            }
        })
    }

    fn status(&self, key: &str) -> u16 {
        Client::ask(self.addr, post_with(CHAT, &format!("X-Api-Key: {key}\r\n"), "{}")).status
    }
}

#[test]
fn f07_a_keys_file_that_changes_is_read_anew_and_one_that_breaks_is_told_of() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    edit::add(&path, "first", "k1", &Terms::DEFAULT, Role::Client).unwrap();
    let mut supervisor = Supervisor::of(&engine, &path);
    eventually("the first key passes", || supervisor.status("k1") == 200);
    // As `keys add` does it: another file in its place.
    edit::add(&path, "second", "k2", &Terms::DEFAULT, Role::Client).unwrap();
    eventually("a new key is live", || supervisor.status("k2") == 200);
    edit::remove(&path, "first").unwrap();
    eventually("a removed key is dead", || supervisor.status("k1") == 401);
    assert_eq!(supervisor.metric("sglangd_keys_stale"), "0");
    // Broken in each way: what passed goes on passing, and the supervisor hears of it.
    let good = std::fs::read_to_string(&path).unwrap();
    for (broken, said) in [("", "holds no client's key"), ("second\n", ":1:7: `second` has no hash")] {
        std::fs::write(&path, broken).unwrap();
        assert!(supervisor.hears().expect("a complaint").contains(said), "{said}");
        assert_eq!((supervisor.status("k2"), supervisor.status("k1")), (200, 401));
        assert_eq!(supervisor.metric("sglangd_keys_stale"), "1");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(supervisor.hears().expect("a complaint").contains("cannot be read"));
    assert_eq!(supervisor.status("k2"), 200);
    std::fs::write(&path, &good).unwrap();
    assert_eq!(supervisor.hears(), None);
    assert_eq!((supervisor.status("k2"), supervisor.metric("sglangd_keys_stale").as_str()), (200, "0"));
}

#[test]
fn a_proxy_that_begins_with_a_broken_keys_file_lets_nobody_in_until_it_is_mended() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    std::fs::write(&path, "nonsense\n").unwrap();
    let mut supervisor = Supervisor::of(&engine, &path);
    assert!(supervisor.hears().is_some());
    assert_eq!(supervisor.status("k1"), 503);
    std::fs::remove_file(&path).unwrap();
    edit::add(&path, "first", "k1", &Terms::DEFAULT, Role::Client).unwrap();
    eventually("the key passes", || supervisor.status("k1") == 200);
    assert_eq!(supervisor.status("other"), 401);
}

fn sglangd(args: &[&str]) -> std::process::Output {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_sglangd"));
    command.args(args).env_clear().env("HOME", "/nonexistent").current_dir("/").output().unwrap()
}

#[test]
fn keys_are_added_listed_and_removed_by_name_and_shown_once() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    let file = path.to_str().unwrap();
    let added = sglangd(&["keys", "add", "ci", "--concurrency", "8", "--priority", "low", "--file", file]);
    assert!(added.status.success(), "{added:?}");
    let key = String::from_utf8(added.stdout).unwrap().trim_end().to_owned();
    assert!(key.starts_with("sgld-") && key.len() == 48, "{key}");
    assert!(!String::from_utf8_lossy(&added.stderr).contains(&key));
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, format!("ci {} concurrency=8 priority=low\n", hashed(&key)));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

    let front = Front::tuned(&engine, |settings| settings.keys_file = Some(path.clone()));
    let passes = |key: &str| Client::ask(front.addr, post_with(CHAT, &format!("X-Api-Key: {key}\r\n"), "{}")).status;
    assert_eq!(passes(&key), 200);

    // The file may come from the configuration.
    let setting = format!("auth.keys_file={file}");
    let configured = ["--set", &setting, "--set", "model.repo=a/b"];
    assert!(sglangd(&[&["keys", "add", "oncall", "--operator"][..], &configured].concat()).status.success());
    let listed = sglangd(&[&["keys", "list"][..], &configured].concat());
    let table = String::from_utf8(listed.stdout).unwrap();
    let words: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["name", "hash", "for", "concurrency", "queue", "priority", "weight"]);
    assert_eq!(words[1][2..], ["client", "8", "-", "low", "1"]);
    assert_eq!((words[2][0], words[2][2]), ("oncall", "operator"));
    assert!(!table.contains(&key));

    for (args, code, said) in [
        (&["keys", "add", "ci"][..], 64, "already"),
        (&["keys", "add", "a b"], 64, "cannot name a key"),
        (&["keys", "add", "x", "--weight", "0"], 64, "--weight"),
        (&["keys", "remove", "cj"], 64, "did you mean `ci`"),
        (&["keys", "remove", "ci"], 65, "last client's key"),
    ] {
        let output = sglangd(&[args, &["--file", file]].concat());
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }
    assert!(sglangd(&["keys", "remove", "oncall", "--file", file]).status.success());
    let nowhere = sglangd(&["keys", "list", "--set", "model.repo=a/b"]);
    assert_eq!(nowhere.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("--file"));
}

#[test]
fn a_key_that_cannot_be_shown_is_not_added() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_sglangd"));
    let output = command.args(["keys", "add", "ci", "--file"]).arg(&path).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(70));
    assert!(!path.exists());
}

#[test]
fn f07_a_start_with_a_broken_keys_file_says_where_and_starts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    std::fs::write(&path, "# ours\nci sha256:00 weight=2\n").unwrap();
    let setting = format!("auth.keys_file={}", path.display());
    let (runtime, state) = (folder.path().join("run"), folder.path().join("state"));
    let folders = ["--runtime-dir", runtime.to_str().unwrap(), "--state-dir", state.to_str().unwrap()];
    let model = ["--set", "model.path=/", "--set", "model.name=m", "--set", "engine.command=[/bin/true]"];
    for command in ["serve", "plan"] {
        let output = sglangd(&[&[command, "--set", &setting][..], &model, &folders].concat());
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(65), "{stderr}");
        assert!(stderr.contains(&format!("{}:2:4: ", path.display())), "{stderr}");
    }
    assert!(!runtime.exists());
}

#[test]
fn f08_operator_routes_are_refused() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    for path in [
        "/flush_cache",
        "/update_weights_from_disk",
        "/load_lora_adapter",
        "/server_info",
        "/get_server_info",
        "/abort_request",
        "/start_profile",
        "/metrics",
        "/v1/loads",
        "/dumper/x",
        "/configure_logging",
        "/server_info?x=/v1/models",
    ] {
        assert_eq!(Client::ask(front.addr, get(path)).status, 403, "{path}");
        assert_eq!(Client::ask(front.addr, post(path, "{}")).status, 403, "{path}");
    }
    for path in ["/", "/new_route_of_tomorrow", "/v1", "/V1/models", "/v1/models/"] {
        assert_eq!(Client::ask(front.addr, get(path)).status, 404, "{path}");
    }
    assert_eq!(engine.connections(), 0);
}
