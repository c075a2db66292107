//! The engine's operator routes: on the admin listener, with an operator's key, and nowhere else.

use std::fs;
use std::net::SocketAddr;

use sglangd::keys::hashed;

use crate::harness::client::{Client, get, post, post_with};
use crate::harness::scene::{SOON, open_stream, quick};

fn with_key(path: &str, key: &str, body: &str) -> String {
    post_with(path, &format!("Authorization: Bearer {key}\r\n"), body)
}

#[tokio::test]
async fn f08_operator_routes_are_on_the_admin_listener_for_an_operators_key() {
    let setup = quick("");
    let keys = setup.folder().join("keys");
    let client = format!("ci {}\n", hashed("client"));
    fs::write(&keys, format!("{client}oncall {} operator\n", hashed("sesame"))).unwrap();
    let admin: SocketAddr = setup.admin();
    let setup = setup.set("auth.keys_file", keys.to_str().unwrap());
    let mut daemon = setup.start();
    daemon.is_ready(SOON).await;
    let public = daemon.public();
    let ask = |request: String| Client::ask(admin, request);

    // Never on the public listener, whatever key is shown.
    for key in ["client", "sesame"] {
        let answer = Client::ask(public, with_key("/flush_cache", key, ""));
        assert_eq!((answer.status, answer.code().as_str()), (403, "operator_route"));
    }
    // On the admin listener for the operator alone: not for nobody, not for a client.
    for request in [post("/flush_cache", ""), with_key("/flush_cache", "client", ""), with_key("/flush_cache", "x", "")]
    {
        let answer = ask(request);
        assert_eq!((answer.status, answer.code().as_str()), (401, "invalid_operator_key"));
        assert_eq!(answer.header("www-authenticate"), Some("bearer"));
    }
    let answer = ask(with_key("/flush_cache?timeout=1", "sesame", ""));
    assert_eq!((answer.status, answer.text().as_str()), (200, "Cache flushed.\n"));
    assert_eq!(ask(post_with("/flush_cache", "X-Api-Key: sesame\r\n", "")).status, 200);
    assert_eq!(ask(with_key("/abort_request", "sesame", r#"{"abort_all":true}"#)).status, 200);
    // What is no operator's route is not passed on, keys or not.
    for path in ["/generate", "/v1/models", "/server_info", "/dumper/", "/flush_cache/", "/x"] {
        assert_eq!(ask(with_key(path, "sesame", "{}")).status, 404, "{path}");
    }
    let wrong = with_key("/abort_request", "sesame", "").replace("POST", "DELETE");
    assert_eq!((ask(wrong).status, ask(get("/metrics")).status), (405, 200));

    // What would kill an engine at work is refused while it works.
    let stream = open_stream_with(public, "client");
    let answer = ask(with_key("/release_memory_occupation", "sesame", "{}"));
    assert_eq!((answer.status, answer.code().as_str()), (409, "engine_busy"));
    drop(stream);

    // A key that is taken out opens nothing any more, at once.
    fs::write(&keys, &client).unwrap();
    let answer = ask(with_key("/flush_cache", "sesame", ""));
    assert_eq!((answer.status, answer.code().as_str()), (403, "no_operator_keys"));
    let asked = "an operator's request operator=\"oncall\"";
    daemon.until("who asked is told", SOON, async |daemon| daemon.log().contains(asked).then_some(())).await;
    let log = daemon.log();
    assert!(!log.contains("sesame"), "a key is in the log");
    daemon.stops_clean(SOON).await;
}

/// A stream for who shows a key, open until it is dropped.
fn open_stream_with(addr: SocketAddr, key: &str) -> Client {
    let mut client = Client::connect(addr);
    let request = crate::harness::scene::stream_of(4000);
    client.send(request.replacen("\r\n", &format!("\r\nX-Api-Key: {key}\r\n"), 1)).until("\"content\"");
    client
}

#[tokio::test]
async fn f09_metrics_and_status_are_on_the_admin_listener_alone() {
    let setup = quick("");
    let admin = setup.admin();
    let mut daemon = setup.start();
    daemon.is_ready(SOON).await;
    let public = daemon.public();
    for path in ["/metrics", "/metrics/", "/status"] {
        let answer = Client::ask(public, get(path));
        assert_eq!((answer.status, answer.code().as_str()), (403, "operator_route"), "{path}");
    }
    assert!(Client::ask(admin, get("/metrics")).text().contains("sglangd_engine_state"));
    assert_eq!(Client::ask(admin, get("/status")).json()["state"], "ready");
    // By default on this machine alone.
    let shipped = sglangd_default("listen.admin");
    assert!(shipped.parse::<SocketAddr>().unwrap().ip().is_loopback(), "{shipped}");
    // Without keys nobody is an operator.
    let answer = Client::ask(admin, post("/flush_cache", ""));
    assert_eq!((answer.status, answer.code().as_str()), (403, "no_operator_keys"));
    let _stream = open_stream(public, 5);
    daemon.stops_clean(SOON).await;
}

fn sglangd_default(path: &str) -> String {
    sglangd::config::keys::find(path).unwrap().default.unwrap().to_owned()
}
