//! Group C: TLS on the public side.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use nix::sys::signal::Signal;
use sglangd::link::{Expired, ListenSettings, ProxySettings, TlsFiles};
use sglangd::proxy::{Patience, Timings};

use crate::harness::client::{Client, End, get, post, post_with};
use crate::harness::daemon::Setup;
use crate::harness::engine::{EVENTS, Engine, chunk, json};
use crate::harness::front::{Front, eventually, settings};
use crate::harness::pki::{self, Folder, Pair, replace};
use crate::harness::scene::{SOON, quick, stream_of};

const CHAT: &str = "/v1/chat/completions";

fn with(files: TlsFiles) -> ProxySettings {
    ProxySettings { listen: ListenSettings { tls: Some(files), ..ListenSettings::default() }, ..settings() }
}

fn front(engine: &Engine, files: &Folder) -> Front {
    Front::with(engine, with(files.files()), Timings::default())
}

fn connect(addr: SocketAddr) -> Client {
    Client::connect(addr).encrypt(pki::client(&["http/1.1"])).unwrap()
}

fn reads(front: &Front, outcome: &str) -> usize {
    front.metric(&format!("sglangd_tls_certificate_reads_total{{outcome=\"{outcome}\"}}")).unwrap() as usize
}

fn turned_away(front: &Front, reason: &str) -> usize {
    front.metric(&format!("sglangd_connections_turned_away_total{{reason=\"{reason}\"}}")).unwrap() as usize
}

#[test]
fn requests_and_streams_pass_over_tls_as_they_do_without() {
    let engine = Engine::start(|connection| {
        while let Some(request) = connection.request() {
            if request.contains("/v1/completions") {
                connection.send(json("200 OK", &"y".repeat(3 << 20)));
                continue;
            }
            connection.send(EVENTS);
            connection.send(chunk("data: one\n\n"));
            connection.send(chunk("data: [DONE]\n\n"));
            connection.send("0\r\n\r\n");
        }
    });
    let front = front(&engine, &Folder::with(&Pair::new()));
    let mut client = connect(front.addr);
    for _ in 0..2 {
        let answer = client.send(post(CHAT, "{}")).answer();
        assert_eq!((answer.status, answer.end), (200, End::Complete));
        assert_eq!(answer.text(), "data: one\n\ndata: [DONE]\n\n");
    }
    // Larger than any record and any buffer, both ways.
    let answer = client.send(post("/v1/completions", &"x".repeat(700_000))).answer();
    assert_eq!((answer.body.len(), answer.end), (3 << 20, End::Complete));
    let text = engine.text(0);
    assert!(text.contains("x-forwarded-proto: https\r\n") && text.ends_with(&"x".repeat(1000)));
    // A connection that ends in order says so.
    let answer = client.send(post_with(CHAT, "Connection: close\r\n", "{}")).answer();
    assert_eq!(answer.status, 200);
    assert_eq!(client.closes(), End::Broken, "the connection ends without close_notify");
    assert_eq!(front.metric("sglangd_tls_handshakes_total"), Some(1.0));
}

#[test]
fn a_client_that_leaves_over_tls_is_seen_at_once() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(EVENTS);
        connection.send(chunk("data: one\n\n"));
        connection.until_closed();
    });
    let front = front(&engine, &Folder::with(&Pair::new()));
    let mut client = connect(front.addr);
    client.send(post(CHAT, "{}")).until("data: one");
    // A second request on its way hides nothing.
    client.send(post(CHAT, &"x".repeat(20_000))).fin();
    eventually("the engine's connection is closed", || engine.closed() == 1);
    front.holds(0, 0);
}

#[test]
fn a_reader_that_stalls_over_tls_is_cut() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(EVENTS);
        while !connection.is_broken() {
            connection.send(chunk("x".repeat(60_000)));
        }
    });
    let timings =
        Timings { client: Patience { write: Duration::from_millis(300), ..Patience::default() }, ..Timings::default() };
    let files = Folder::with(&Pair::new());
    let front = Front::with(&engine, with(files.files()), timings);
    let mut client = connect(front.addr);
    client.send(post(CHAT, "{}")).until("xxx");
    eventually("the engine's connection is closed", || engine.broken() + engine.closed() > 0);
    front.holds(0, 0);
}

#[test]
fn c01_a_good_certificate_is_used_from_the_next_handshake_on() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let (old, new) = (Pair::new(), Pair::new());
    let files = Folder::with(&old);
    let mut front = front(&engine, &files);
    let config = pki::client(&["http/1.1"]);
    let connect = |front: &Front| Client::connect(front.addr).encrypt(Arc::clone(&config)).unwrap();
    let mut open = connect(&front);
    assert_eq!(open.certificate(), old.der);
    assert_eq!(open.send(post(CHAT, "{}")).answer().status, 200);
    let mut again = connect(&front);
    assert!(again.was_known(), "a client that comes back makes a whole handshake");
    assert_eq!(again.send(post(CHAT, "{}")).answer().status, 200);
    files.put(&new);
    front.proxy.settings(with(files.files())).unwrap();
    assert_eq!(open.send(post(CHAT, "{}")).answer().status, 200, "an open connection does not care");
    let mut again = connect(&front);
    assert!(!again.was_known(), "a ticket of the old certificate still counts");
    assert_eq!(again.certificate(), new.der);
    assert_eq!(again.send(post(CHAT, "{}")).answer().status, 200);
    assert_eq!((reads(&front, "used"), reads(&front, "refused")), (2, 0));
}

#[test]
fn c01_bad_files_leave_the_old_certificate_where_it_is() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let (old, other) = (Pair::new(), Pair::new());
    let expired = Pair::ending(SignedDuration::from_hours(-1));
    let files = Folder::with(&old);
    let mut front = front(&engine, &files);
    let half = |text: &str| text[..text.len() / 2].to_owned();
    for (n, (what, cert, key)) in [
        ("garbage", "\0\u{1}certificate?".to_owned(), old.key.clone()),
        ("empty", String::new(), old.key.clone()),
        ("half a certificate", half(&other.cert), other.key.clone()),
        ("half a key", old.cert.clone(), half(&old.key)),
        ("no base64", old.cert.replace('M', "!"), old.key.clone()),
        ("another's key", old.cert.clone(), other.key.clone()),
        ("the key in the certificate's place", old.key.clone(), old.cert.clone()),
        ("past its end", expired.cert.clone(), expired.key.clone()),
    ]
    .into_iter()
    .enumerate()
    {
        replace(&files.cert(), &cert);
        replace(&files.key(), &key);
        front.proxy.settings(with(files.files())).unwrap();
        assert_eq!(reads(&front, "refused"), n + 1, "{what}");
        assert!(front.proxy.warnings().iter().any(|warning| warning.contains("not used")), "{what}");
        let mut client = connect(front.addr);
        assert_eq!(client.certificate(), old.der, "{what}");
        assert_eq!(client.send(post(CHAT, "{}")).answer().status, 200, "{what}");
    }
    fs::remove_file(files.cert()).unwrap();
    front.proxy.settings(with(files.files())).unwrap();
    assert_eq!(connect(front.addr).certificate(), old.der, "a removed file");
    files.put(&other);
    front.proxy.settings(with(files.files())).unwrap();
    assert_eq!(connect(front.addr).certificate(), other.der);
    assert_eq!(front.proxy.warnings(), <[String; 0]>::default());
}

#[test]
fn c01_changed_files_are_noticed_and_a_pair_is_not_read_in_halves() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let (old, new) = (Pair::new(), Pair::new());
    let files = Folder::with(&old);
    let mut front = front(&engine, &files);
    let mut look = |certificate: &Pair, what: &str| {
        front.proxy.look_at_certificate();
        assert_eq!(connect(front.addr).certificate(), certificate.der, "{what}");
        (reads(&front, "used"), reads(&front, "refused"))
    };
    assert_eq!(look(&old, "nothing changed"), (1, 0));
    replace(&files.cert(), &new.cert);
    assert_eq!(look(&old, "only just changed"), (1, 0));
    replace(&files.key(), &new.key);
    assert_eq!(look(&old, "changed again"), (1, 0));
    assert_eq!(look(&new, "at rest"), (2, 0));
    replace(&files.key(), &old.key);
    assert_eq!(look(&new, "only just changed"), (2, 0));
    assert_eq!(look(&new, "bad and at rest"), (2, 1));
    assert_eq!(look(&new, "said once"), (2, 1));
    // In place, as a careless operator does it: another time, the same file.
    fs::write(files.key(), &new.key).unwrap();
    look(&new, "only just changed");
    assert_eq!(look(&new, "mended"), (3, 1));
}

#[tokio::test]
async fn c01_sighup_makes_certificates_keys_and_limits_live() {
    let (old, new) = (Pair::new(), Pair::new());
    let files = Folder::with(&old);
    let setup = quick("");
    let (config, keys) = (setup.folder().join("changing.yaml"), setup.folder().join("keys"));
    let said = |max: u32, cert: &str| {
        let hash = {
            use sha2::Digest as _;
            use std::fmt::Write as _;
            let mut hex = String::new();
            sha2::Sha256::digest(format!("secret-{max}")).iter().for_each(|byte| write!(hex, "{byte:02x}").unwrap());
            hex
        };
        fs::write(&keys, format!("one sha256:{hash}\n")).unwrap();
        let text = format!(
            "limits:\n  max: {max}\nauth:\n  keys_file: {}\nlisten:\n  tls:\n    cert: {cert}\n    key: {}\n",
            keys.display(),
            files.key().display()
        );
        fs::write(&config, text).unwrap();
    };
    let cert = files.cert().display().to_string();
    said(3, &cert);
    let mut daemon = setup.config_file(&config).start();
    let status = daemon.is_ready(SOON).await;
    assert_eq!(status["listen"]["tls"], true);
    let addr = daemon.public();
    let ask = |key: &str| {
        let request = stream_of(2).replacen("Host:", &format!("Authorization: Bearer {key}\r\nHost:"), 1);
        let mut client = connect(addr);
        (client.certificate(), client.send(request).answer().status)
    };
    assert_eq!(ask("secret-3"), (old.der.clone(), 200));
    files.put(&new);
    said(5, &cert);
    daemon.signal(Signal::SIGHUP);
    daemon
        .until("all three are live", SOON, async |daemon| {
            (ask("secret-5") == (new.der.clone(), 200) && daemon.status().await?["requests"]["max"] == 5).then_some(())
        })
        .await;
    assert_eq!(ask("secret-3"), (new.der.clone(), 401));
    // A wrong file changes nothing, and is named.
    fs::write(files.cert(), "garbage").unwrap();
    said(7, &cert);
    daemon.signal(Signal::SIGHUP);
    let complaint = format!("the certificate {cert} holds no certificate");
    daemon.until("it is refused", SOON, async |daemon| daemon.log().contains(&complaint).then_some(())).await;
    assert_eq!(daemon.status().await.unwrap()["requests"]["max"], 5);
    // The proxy finds it too, without a signal, and says so where operators look.
    daemon
        .until("it is in the status and the metrics", SOON, async |daemon| {
            let status = daemon.status().await?["warnings"].to_string();
            let page = reqwest::get(format!("http://{}/metrics", daemon.admin())).await.ok()?.text().await.ok()?;
            let counted = page.contains("sglangd_tls_certificate_reads_total{outcome=\"refused\"} 1\n");
            (status.contains("not used") && counted).then_some(())
        })
        .await;
    assert_eq!(ask("secret-7").0, new.der);
    // Mended without a signal.
    files.put(&old);
    daemon.until("the next good one is used", SOON, async |_| (ask("x").0 == old.der).then_some(())).await;
    daemon.stops_clean(SOON).await;
}

/// Exit code and standard error of a command that ends by itself.
fn ended(mut command: std::process::Command) -> (i32, String) {
    let output = command.output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn c01_files_that_are_wrong_at_the_start_are_an_error_of_configuration() {
    let (good, other) = (Pair::new(), Pair::new());
    let files = Folder::with(&good);
    let setup = Setup::simulated()
        .set("listen.tls.cert", files.cert().to_str().unwrap())
        .set("listen.tls.key", files.key().to_str().unwrap());
    let refused = |wrong: &str| {
        for command in ["serve", "plan"] {
            let (code, error) = ended(setup.full_command(command));
            assert_eq!(code, 65, "{command}: {error}");
            assert!(error.contains(wrong), "{command}: {error}");
        }
        let mut proxy = setup.command("proxy");
        proxy.args(["--listen", "127.0.0.1:0", "--upstream", "http://127.0.0.1:1"]);
        for key in ["cert", "key"] {
            proxy.args([
                "--set",
                &format!(
                    "listen.tls.{key}={}",
                    files.cert().with_file_name(format!("tls.{}", &key.replace("cert", "crt"))).display()
                ),
            ]);
        }
        let (code, error) = ended(proxy);
        assert_eq!(code, 65, "proxy: {error}");
        assert!(error.contains(wrong), "proxy: {error}");
    };
    let (cert, key) = (files.cert().display().to_string(), files.key().display().to_string());
    replace(&files.key(), &other.key);
    refused(&format!("`listen.tls.key`: the key {key} does not belong to the first certificate of {cert}"));
    replace(&files.key(), &good.key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY"));
    refused(&format!("the key {key} holds a key under a pass phrase"));
    replace(&files.key(), &good.key[..100]);
    refused(&format!("the key {key} is no PEM file: it stops in the middle"));
    replace(&files.cert(), "nothing");
    refused(&format!("`listen.tls.cert`: the certificate {cert} holds no certificate"));
    fs::remove_file(files.cert()).unwrap();
    refused(&format!("the certificate {cert} cannot be read: No such file"));
    fs::create_dir(files.cert()).unwrap();
    refused(&format!("the certificate {cert} is no plain file"));
}

#[test]
fn c02_a_handshake_that_stalls_ends_and_costs_requests_nothing() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let files = Folder::with(&Pair::new());
    let timings = Timings {
        client: Patience { handshake: Duration::from_millis(400), ..Patience::default() },
        ..Timings::default()
    };
    let front = Front::with(&engine, with(files.files()), timings);
    let mut open = connect(front.addr);
    let mut silent = Client::connect(front.addr);
    let mut slow = Client::connect(front.addr);
    // The beginning of a record that never comes to its end.
    slow.send(b"\x16\x03\x01\x02\x00\x01\x00");
    for _ in 0..20 {
        assert_eq!(open.send(post(CHAT, "{}")).answer().status, 200);
    }
    assert_eq!(front.metric("sglangd_connections"), Some(1.0), "a handshake is no connection yet");
    assert_eq!((silent.closes(), slow.closes()), (End::Broken, End::Broken));
    assert_eq!(turned_away(&front, "handshake_timeout"), 2);
    assert_eq!(open.send(post(CHAT, "{}")).answer().status, 200);
}

#[test]
fn c02_of_too_many_handshakes_the_oldest_goes() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let files = Folder::with(&Pair::new());
    let front = Front::with(&engine, with(files.files()), Timings { handshakes: 10, ..Timings::default() });
    let mut open = connect(front.addr);
    let mut stalled: Vec<Client> = (0..60)
        .map(|_| {
            let mut client = Client::connect(front.addr);
            client.send(b"\x16\x03\x01\x02\x00\x01\x00");
            client
        })
        .collect();
    // Fifty have gone, and who is honest comes through in the crowd.
    eventually("the oldest are closed", || turned_away(&front, "handshake_crowded") == 50);
    for client in &mut stalled[..50] {
        assert_ne!(client.closes(), End::Complete);
    }
    assert!(stalled[59].is_quiet(Duration::from_millis(50)), "the youngest was closed");
    assert_eq!(connect(front.addr).send(post(CHAT, "{}")).answer().status, 200);
    assert_eq!(open.send(post(CHAT, "{}")).answer().status, 200);
}

#[test]
fn c03_plain_http_to_the_tls_port_is_told_so() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = front(&engine, &Folder::with(&Pair::new()));
    let mut client = Client::connect(front.addr);
    let answer = client.send(post(CHAT, &"x".repeat(100_000))).answer();
    assert_eq!((answer.status, answer.header("connection")), (400, Some("close")));
    assert!(answer.text().contains("https://"), "{:?}", answer.text());
    assert_eq!(client.closes(), End::Broken, "a reset takes the answer out of the client's hands");
    assert_eq!(turned_away(&front, "plain_to_tls"), 1);
    assert_eq!(engine.connections(), 0);
}

#[test]
fn c03_tls_to_the_plain_port_is_closed() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    assert!(Client::connect(front.addr).encrypt(pki::client(&[])).is_err());
    let mut client = Client::connect(front.addr);
    client.send(b"\x16\x03\x01\x00\x05hello");
    assert_eq!((client.closes(), client.seen().as_str()), (End::Broken, ""), "an answer that no TLS client reads");
    eventually("it is counted", || turned_away(&front, "tls_to_plain") == 2);
    // Only where a connection begins: later it is a request like any other that is none.
    let mut client = Client::connect(front.addr);
    assert_eq!(client.send(get("/live")).answer().status, 200);
    assert_eq!(client.send(b"\x16\x03\x01\r\n\r\n").answer().status, 400);
}

#[tokio::test]
async fn c03_either_mistake_has_its_line_in_the_log() {
    let files = Folder::with(&Pair::new());
    let (cert, key) = (files.cert(), files.key());
    let mut tls =
        quick("").set("listen.tls.cert", cert.to_str().unwrap()).set("listen.tls.key", key.to_str().unwrap()).start();
    let mut plain = quick("").start();
    tls.is_ready(SOON).await;
    plain.is_ready(SOON).await;
    for _ in 0..3 {
        assert_eq!(Client::connect(tls.public()).send(get("/live")).answer().status, 400);
        assert!(Client::connect(plain.public()).encrypt(pki::client(&[])).is_err());
    }
    let line = "a client speaks plain HTTP to the TLS port: it needs https://";
    tls.until("the line", SOON, async |daemon| daemon.log().contains(line).then_some(())).await;
    assert_eq!(tls.log().matches(line).count(), 1, "a client can fill the log");
    let line = "a client speaks TLS to the plain port: it needs http://";
    plain.until("the line", SOON, async |daemon| daemon.log().contains(line).then_some(())).await;
    assert_eq!(plain.log().matches(line).count(), 1, "a client can fill the log");
    tls.stops_clean(SOON).await;
    plain.stops_clean(SOON).await;
}

#[test]
fn c04_the_end_of_a_certificate_is_a_metric_and_a_warning() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let of = |hours: i64| {
        let pair = Pair::ending(SignedDuration::from_hours(hours));
        let files = Folder::with(&pair);
        let front = front(&engine, &files);
        assert_eq!(connect(front.addr).certificate(), pair.der, "it is used all the same");
        let left = front.metric("sglangd_tls_not_after_seconds").unwrap() - jiff::Timestamp::now().as_second() as f64;
        assert!((left / 3600.0 - hours as f64).abs() < 0.1, "{left} s for {hours} h");
        front.proxy.warnings().to_vec()
    };
    assert!(of(-2)[0].contains("ended at"));
    assert!(of(6 * 24)[0].contains("ends at"));
    assert!(of(8 * 24).is_empty());
}

#[test]
fn a_key_that_everybody_can_read_is_said() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let files = Folder::with(&Pair::new());
    fs::set_permissions(files.key(), fs::Permissions::from_mode(0o644)).unwrap();
    let front = front(&engine, &files);
    assert!(front.proxy.warnings()[0].contains("can read the key"), "{:?}", front.proxy.warnings());
    assert_eq!(connect(front.addr).send(post(CHAT, "{}")).answer().status, 200);
}

#[test]
fn c04_strict_refuses_what_has_ended() {
    let files = Folder::with(&Pair::ending(SignedDuration::from_hours(-2)));
    let setup = Setup::simulated()
        .set("listen.tls.cert", files.cert().to_str().unwrap())
        .set("listen.tls.key", files.key().to_str().unwrap());
    let output = setup.full_command("plan").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("clients refuse it"), "{text}");
    let setup = setup.set("listen.tls.strict", "true");
    for command in ["serve", "plan"] {
        let (code, error) = ended(setup.full_command(command));
        assert_eq!(code, 65, "{command}: {error}");
        assert!(error.contains(&format!("the certificate {} ended at", files.cert().display())), "{command}: {error}");
    }
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::with(&engine, with(TlsFiles { expired: Expired::Refused, ..files.files() }), Timings::default());
    assert!(Client::connect(front.addr).encrypt(pki::client(&[])).is_err(), "it is used");
    assert_eq!(turned_away(&front, "no_certificate"), 1);
    assert_eq!(front.metric("sglangd_tls_not_after_seconds"), None);
}

#[test]
fn c05_a_request_that_is_cut_without_a_goodbye_is_never_whole() {
    for head in ["Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "Content-Length: 10\r\n\r\nhello"] {
        let engine = Engine::start(|connection| {
            connection.head();
            connection.until_closed();
        });
        let front = front(&engine, &Folder::with(&Pair::new()));
        let mut client = connect(front.addr);
        client.send(format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\n{head}"));
        eventually("the first half is with the engine", || {
            engine.connections() == 1 && engine.text(0).contains("hello")
        });
        client.fin();
        eventually("the engine's connection is closed", || engine.closed() == 1);
        assert!(!engine.text(0).ends_with("0\r\n\r\n"), "the engine takes it for whole: {}", engine.text(0));
        front.holds(0, 0);
    }
}

#[test]
fn c05_an_answer_that_is_cut_ends_without_a_goodbye() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(EVENTS);
        connection.send(chunk("data: one\n\n"));
    });
    let front = front(&engine, &Folder::with(&Pair::new()));
    let answer = connect(front.addr).send(post(CHAT, "{}")).answer();
    assert_eq!(answer.end, End::Truncated, "over TLS too a cut must not look like an end");
    let text = answer.text();
    assert!(text.starts_with("data: one\n\n") && text.contains("\"error\""), "{text}");
    assert!(!text.contains("[DONE]"), "{text}");
}

#[test]
fn a_proxy_without_a_good_certificate_closes_tls_and_waits_for_a_better_one() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let good = Pair::new();
    let files = Folder::with(&good);
    replace(&files.cert(), "garbage");
    let mut front = front(&engine, &files);
    let mut stream = TcpStream::connect(front.addr).unwrap();
    let _ = stream.write_all(b"GET /live HTTP/1.1\r\nHost: a\r\n\r\n");
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    assert_eq!(bytes, b"", "what should be encrypted is answered in clear");
    files.put(&good);
    front.proxy.look_at_certificate();
    front.proxy.look_at_certificate();
    assert_eq!(connect(front.addr).send(post(CHAT, "{}")).answer().status, 200);
}
