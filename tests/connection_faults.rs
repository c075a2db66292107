//! Where connections come from and how many there may be: Unix sockets, the PROXY protocol, and F10 and
//! F11 of the limits.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use sglangd::link::{ListenSettings, ProxyProtocol, ProxySettings};
use sglangd::proxy::{Listener, Patience, Timings};

use crate::harness::alone::Process;
use crate::harness::client::{Client, End, get, post};
use crate::harness::daemon::{SGLANGD, Setup};
use crate::harness::engine::{EVENTS, Engine, chunk, json};
use crate::harness::front::{Front, eventually, settings};
use crate::harness::http2;
use crate::harness::pki::{self, Folder, Pair};
use crate::harness::scene::{SOON, is_whole, proxy_pid, quick, send, stream_of, text_at};

const CHAT: &str = "/v1/chat/completions";

// ---------------------------------------------------------------------- Unix sockets

/// A proxy that listens on a Unix socket too.
fn with_socket(engine: &Engine) -> (Front, tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("public.sock");
    let listener = UnixListener::bind(&path).unwrap();
    (Front::on(engine, vec![Listener::from(listener)]), folder, path)
}

#[test]
fn a_unix_socket_serves_as_an_address_does() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let (_front, _folder, path) = with_socket(&engine);
    let mut client = Client::connect_unix(&path);
    for _ in 0..2 {
        let request = post(CHAT, "{}").replacen("Host:", "X-Forwarded-For: 6.6.6.6\r\nHost:", 1);
        assert_eq!(client.send(request).answer().status, 200);
    }
    let text = engine.text(0);
    assert!(!text.contains("x-forwarded-for"), "an address is made up: {text}");
    // The end of a connection is a FIN behind the answer here too.
    let mut refused = Client::connect_unix(&path);
    let answer = refused.send(post(CHAT, "{}").replacen("Host: sglangd", "Host: a b", 1)).answer();
    assert_eq!((answer.status, refused.closes()), (400, End::Broken));
}

#[test]
fn a_client_that_leaves_a_unix_socket_is_seen_at_once() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(EVENTS);
        connection.send(chunk("data: one\n\n"));
        connection.until_closed();
    });
    let (front, _folder, path) = with_socket(&engine);
    let mut client = Client::connect_unix(&path);
    client.send(post(CHAT, "{}")).until("data: one");
    client.send(post(CHAT, &"x".repeat(20_000))).fin();
    eventually("the engine's connection is closed", || engine.closed() == 1);
    front.holds(0, 0);
}

/// Exit code and standard error of a command that ends by itself.
fn ended(mut command: Command) -> (i32, String) {
    let output = command.output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test]
async fn a_public_socket_has_its_mode_survives_its_proxy_and_goes_with_its_owner() {
    let setup = quick("").listen("unix:public.sock").set("listen.unix_mode", "0640");
    let path = setup.folder().join("public.sock");
    let mut daemon = setup.start();
    let status = daemon.is_ready(SOON).await;
    assert_eq!(text_at(&status, "/listen/public"), format!("unix:{}", path.display()));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    assert!(is_whole(&Client::connect_unix(&path).send(stream_of(3)).answer()));
    // A proxy that dies takes no name with it: the next one accepts under the same.
    send(proxy_pid(&status), Signal::SIGKILL);
    assert!(is_whole(&Client::connect_unix(&path).send(stream_of(3)).answer()));
    let mut probe = daemon.command("probe");
    probe.arg("--runtime-dir").arg(daemon.runtime_dir());
    let output = probe.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // Another one on the same name is told who has it.
    let second = Setup::simulated().listen(&format!("unix:{}", path.display()));
    let (code, error) = ended(second.full_command("serve"));
    assert_eq!(code, 65);
    assert!(error.contains(&format!("{} is in use by pid {}", path.display(), daemon.pid())), "{error}");
    // What a killed one leaves is no obstacle to the next.
    daemon.signal(Signal::SIGKILL);
    daemon.exit(SOON).await;
    assert!(path.exists());
    daemon.start_again();
    daemon.is_ready(SOON).await;
    assert!(is_whole(&Client::connect_unix(&path).send(stream_of(3)).answer()));
    daemon.stops_clean(SOON).await;
    assert!(!path.exists(), "the name is left behind");
}

#[test]
fn a_set_up_without_any_listener_is_refused() {
    let (code, error) = ended(Setup::simulated().listen("off").full_command("plan"));
    assert_eq!(code, 65);
    assert!(error.contains("no client could connect"), "{error}");
    let (code, error) = ended(Setup::simulated().set("listen.unix_mode", "0888").full_command("plan"));
    assert_eq!(code, 65);
    assert!(error.contains("octal"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "precious").unwrap();
    for (path, what) in [("file", "is no socket"), ("none/public.sock", "must exist")] {
        let path = folder.path().join(path);
        let (code, error) = ended(Setup::simulated().set("listen.unix", path.to_str().unwrap()).full_command("serve"));
        assert_eq!(code, 65);
        assert!(error.contains(what) && error.contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn the_data_plane_alone_listens_on_several_places() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("public.sock");
    let addr = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut child = Command::new(SGLANGD)
        .args(["proxy", "--listen", &addr.to_string(), "--upstream", &format!("http://{}", engine.addr)])
        .args(["--listen", &format!("unix:{}", path.display())])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("it listens", || path.exists() && std::net::TcpStream::connect(addr).is_ok());
    eventually("it serves", || Client::connect_unix(&path).send(post(CHAT, "{}")).answer().status == 200);
    assert_eq!(Client::ask(addr, post(CHAT, "{}")).status, 200);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!path.exists(), "the name is left behind");
}

// ---------------------------------------------------------------------- who may come

#[tokio::test]
async fn listening_for_everybody_without_keys_is_said_in_plan_log_and_status() {
    let warning = "may use the engine: no API key is asked for";
    let setup = quick("");
    let everybody = SocketAddr::from(([0, 0, 0, 0], setup.public().port()));
    let setup = setup.listening_on(everybody);
    let shown = setup.full_command("plan").output().unwrap();
    assert!(String::from_utf8_lossy(&shown.stdout).contains(warning));
    let file = setup.folder().join("keys");
    fs::write(&file, format!("one sha256:{}\n", "0".repeat(64))).unwrap();
    let config = setup.folder().join("auth.yaml");
    fs::write(&config, "auth: {}\n").unwrap();
    let mut daemon = setup.config_file(&config).start();
    let status = daemon.is_ready(SOON).await;
    assert!(status["warnings"].to_string().contains(warning), "{status}");
    assert!(daemon.log().contains(warning));
    // Asking for keys ends it.
    fs::write(&config, format!("auth:\n  keys_file: {}\n", file.display())).unwrap();
    daemon.signal(Signal::SIGHUP);
    daemon
        .until("it is guarded", SOON, async |daemon| {
            (!daemon.status().await?["warnings"].to_string().contains(warning)).then_some(())
        })
        .await;
    daemon.stops_clean(SOON).await;
}

// ---------------------------------------------------------------------- the PROXY protocol

fn behind_a_balancer() -> ListenSettings {
    ListenSettings { proxy_protocol: ProxyProtocol::Require, ..ListenSettings::default() }
}

fn balanced(engine: &Engine, listen: ListenSettings) -> Front {
    let timings = Timings {
        client: Patience { handshake: Duration::from_millis(500), ..Patience::default() },
        ..Timings::default()
    };
    Front::with(engine, ProxySettings { listen, ..settings() }, timings)
}

/// Version 2, for a client at 203.0.113.7 or for the balancer itself.
fn header(command: u8) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    header.extend([command, 0x11, 0, 15, 203, 0, 113, 7, 10, 0, 0, 1, 0x30, 0x39, 0x01, 0xbb]);
    header.extend([0x04, 0, 0]); // a field that means nothing
    header
}

const CLIENT: u8 = 0x21;
const ITSELF: u8 = 0x20;

fn turned_away(front: &Front, reason: &str) -> usize {
    front.metric(&format!("sglangd_connections_turned_away_total{{reason=\"{reason}\"}}")).unwrap() as usize
}

#[test]
fn the_clients_address_comes_from_the_balancers_header() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = balanced(&engine, behind_a_balancer());
    let whole = [header(CLIENT), post(CHAT, "{}").into_bytes()].concat();
    let mut client = Client::connect(front.addr);
    assert_eq!(client.send(&whole).answer().status, 200);
    // Of the connection, not of each request.
    assert_eq!(client.send(post(CHAT, "{}")).answer().status, 200);
    assert_eq!(engine.text(0).matches("x-forwarded-for: 203.0.113.7\r\n").count(), 2);
    let mut slow = Client::connect(front.addr);
    for byte in &whole {
        slow.send([*byte]);
    }
    assert_eq!(slow.answer().status, 200);
    assert_eq!(engine.text(0).matches("x-forwarded-for: 203.0.113.7\r\n").count(), 3);
    // A balancer's health check speaks for itself.
    let mut check = Client::connect(front.addr);
    assert_eq!(check.send([header(ITSELF), post(CHAT, "{}").into_bytes()].concat()).answer().status, 200);
    assert!(engine.text(0).contains("x-forwarded-for: 127.0.0.1\r\n"));
}

#[test]
fn the_header_stands_before_tls() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let files = Folder::with(&Pair::new());
    let front = balanced(&engine, ListenSettings { tls: Some(files.files()), ..behind_a_balancer() });
    let mut client = Client::connect(front.addr);
    client.send(header(CLIENT));
    let mut client = client.encrypt(pki::client(&[])).unwrap();
    assert_eq!(client.send(post(CHAT, "{}")).answer().status, 200);
    assert!(engine.text(0).contains("x-forwarded-for: 203.0.113.7\r\nx-forwarded-proto: https\r\n"));
}

#[test]
fn without_a_good_header_nothing_passes() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = balanced(&engine, behind_a_balancer());
    let mut short = header(CLIENT);
    short[15] = 4;
    let mut version = header(CLIENT);
    version[12] = 0x31;
    let bad =
        [post(CHAT, "{}").into_bytes(), b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n".to_vec(), b"G".to_vec(), short, version];
    for (n, start) in bad.iter().enumerate() {
        let mut client = Client::connect(front.addr);
        client.send([start.as_slice(), post(CHAT, "{}").as_bytes()].concat());
        assert_ne!(client.closes(), End::Complete);
        assert_eq!(client.seen(), "", "an answer to nobody");
        assert_eq!(turned_away(&front, "proxy_header"), n + 1, "{start:?}");
    }
    let mut silent = Client::connect(front.addr);
    let mut half = Client::connect(front.addr);
    half.send(&header(CLIENT)[..20]);
    assert_eq!((silent.closes(), half.closes()), (End::Broken, End::Broken));
    assert_eq!(turned_away(&front, "handshake_timeout"), 2);
    assert_eq!(engine.connections(), 0);
}

#[test]
fn a_header_that_nobody_asked_for_is_no_request() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    let answer = client.send([header(CLIENT), post(CHAT, "{}").into_bytes()].concat()).answer();
    assert_eq!((answer.status, client.closes()), (400, End::Broken));
    assert_eq!(engine.connections(), 0);
}

// ---------------------------------------------------------------------- too many

/// A request that holds its connection: beyond the first it waits for its place.
fn hold(addr: SocketAddr) -> Client {
    let mut client = Client::connect(addr);
    client.send(post(CHAT, "{}"));
    client
}

#[test]
fn f10_without_descriptors_probes_are_answered_others_refused_and_it_recovers() {
    const DESCRIPTORS: usize = 64;
    let (engine, release) = Engine::held();
    let more = ["--set", "limits.connections=100000", "--set", "limits.workers=1", "--set", "limits.max=1"];
    let (process, addr) = Process::with_descriptors(DESCRIPTORS, engine.addr, &more);
    let mut held: Vec<Client> = (0..DESCRIPTORS).map(|_| hold(addr)).collect();
    eventually("the first is with the engine", || engine.requests() == 1);
    // More than there are descriptors for: who got none is told so, in the order of coming.
    let answer = held.last_mut().unwrap().answer();
    assert_eq!((answer.status, answer.code().as_str()), (503, "too_many_connections"));
    assert_eq!((answer.header("connection"), answer.header("retry-after")), (Some("close"), Some("1")));
    assert_eq!(held.last_mut().unwrap().closes(), End::Broken);
    // Again and again: the descriptor that is held back comes back each time.
    for _ in 0..3 {
        assert_eq!(Client::ask(addr, post(CHAT, "{}")).status, 503);
        for probe in ["/live", "/health", "/ready"] {
            assert_eq!(Client::ask(addr, get(probe)).status, 200, "{probe}");
        }
    }
    // While nobody comes it rests.
    let cpu = process.cpu();
    assert!(held[1].is_quiet(Duration::from_millis(600)), "a waiting request was cut");
    let spent = process.cpu().saturating_sub(cpu);
    assert!(spent < Duration::from_millis(300), "{spent:?} of 600 ms");
    // Clients that leave make room.
    let mut first = held.swap_remove(0);
    drop(held);
    for _ in 0..20 {
        release.send(()).unwrap();
    }
    assert_eq!(first.answer().status, 200);
    eventually("there is room again", || Client::ask(addr, post(CHAT, "{}")).status == 200);
}

#[test]
fn f11_under_pressure_the_connections_that_were_idle_for_longest_go_first() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::tuned(&engine, |settings| settings.connections = Some(20));
    let mut idle: Vec<Client> = (0..20)
        .map(|_| {
            let mut client = Client::connect(front.addr);
            assert_eq!(client.send(post(CHAT, "{}")).answer().status, 200);
            client
        })
        .collect();
    // The oldest is the youngest again once it asks something.
    assert_eq!(idle[0].send(post(CHAT, "{}")).answer().status, 200);
    let mut newcomer = Client::connect(front.addr);
    assert_eq!(newcomer.send(post(CHAT, "{}")).answer().status, 200);
    assert_eq!(idle[1].closes(), End::Broken, "it was idle for longest");
    for (n, client) in idle.iter_mut().enumerate().filter(|(n, _)| *n != 1) {
        assert!(client.is_quiet(Duration::from_millis(1)), "connection {n} was closed too");
        assert_eq!(client.send(post(CHAT, "{}")).answer().status, 200, "connection {n}");
    }
    assert_eq!(front.metric("sglangd_connections_let_go_total"), Some(1.0));
}

#[test]
fn f11_where_nobody_is_idle_the_newcomer_is_told_so() {
    let (engine, release) = Engine::held();
    let front = Front::tuned(&engine, |settings| (settings.connections, settings.max) = (Some(16), 1));
    let mut held: Vec<Client> = (0..16).map(|_| hold(front.addr)).collect();
    front.holds(1, 15);
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (503, "too_many_connections"));
    assert_eq!((answer.header("connection"), answer.header("retry-after")), (Some("close"), Some("1")));
    assert_eq!(Client::ask(front.addr, get("/live")).status, 200);
    assert_eq!(turned_away(&front, "crowded"), 2);
    // Of more than a worker tells so at once some are closed without a word, and counted all the same.
    let _crowd: Vec<Client> = (0..40).map(|_| Client::connect(front.addr)).collect();
    eventually("all are counted", || front.metric("sglangd_connections_total") == Some(16.0 + 2.0 + 40.0));
    eventually("all are turned away", || turned_away(&front, "crowded") == 42);
    for client in &mut held {
        release.send(()).unwrap();
        assert_eq!(client.answer().status, 200, "a request was cut for a newcomer");
    }
}

#[test]
fn f11_a_crowd_of_idle_connections_stays_within_its_limit_and_ends_by_itself() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let limits = ProxySettings { connections: Some(64), workers: 2, ..settings() };
    let patience = Patience { idle: Duration::from_secs(2), ..Patience::default() };
    let front = Front::with(&engine, limits, Timings { client: patience, ..Timings::default() });
    let mut idle: Vec<Client> = (0..300).map(|_| Client::connect(front.addr)).collect();
    let open = || front.metric("sglangd_connections").unwrap();
    eventually("the crowd is within its limit", || {
        front.metric("sglangd_connections_total") == Some(300.0) && open() <= 64.0
    });
    let mut client = Client::connect(front.addr);
    assert_eq!(client.send(post(CHAT, "{}")).answer().status, 200);
    eventually("idle connections end by themselves", || open() <= 1.0);
    assert!(idle.iter_mut().all(|client| client.closes() == End::Broken));
}

/// The kernel spreads newcomers over the workers: the one that is idle may be another one's.
#[test]
fn f11_a_worker_without_idle_connections_asks_the_others_before_it_turns_anybody_away() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let limits = ProxySettings { connections: Some(1), workers: 2, ..settings() };
    let front = Front::with(&engine, limits, Timings::default());
    // In 64 turns both workers have had to ask, or chance has missed one of them 63 times.
    let mut before = Client::connect(front.addr);
    for turn in 0..64 {
        assert_eq!(before.send(get("/live")).answer().status, 200);
        let mut newcomer = Client::connect(front.addr);
        assert_eq!(newcomer.send(post(CHAT, "{}")).answer().status, 200, "turn {turn}");
        assert_eq!(before.closes(), End::Broken, "turn {turn}");
        before = newcomer;
    }
    assert_eq!(turned_away(&front, "crowded"), 0);
}

#[test]
fn f11_an_idle_connection_of_http2_is_let_go_with_a_goodbye() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::tuned(&engine, |settings| settings.connections = Some(16));
    let mut http2 = http2::Client::connect(front.addr);
    assert!(http2.is_alive());
    let _idle: Vec<Client> = (0..16).map(|_| Client::connect(front.addr)).collect();
    assert_eq!(http2.goodbye_reason(), Some(0));
    eventually("it is counted", || front.metric("sglangd_connections_let_go_total") >= Some(1.0));
}

#[test]
fn connections_of_one_peer_are_limited() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::tuned(&engine, |settings| settings.connections_per_peer = Some(3));
    let mut open: Vec<Client> = (0..3).map(|_| Client::connect(front.addr)).collect();
    assert!(open.iter_mut().all(|client| client.send(post(CHAT, "{}")).answer().status == 200));
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (429, "too_many_connections"));
    assert_eq!(Client::ask(front.addr, get("/live")).status, 200);
    open.pop();
    eventually("there is room again", || Client::ask(front.addr, post(CHAT, "{}")).status == 200);
}
