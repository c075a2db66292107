//! `httpx` with HTTP/2, as ALPN agrees on it under TLS.

use super::{KEY, Program, answered, counted, is_idle, serving};
use crate::harness::pki::{Folder, Pair};
use crate::harness::scene::{CHAT, SOON, number_at};
use jiff::SignedDuration;

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn httpx_speaks_http2_with_eight_streams_on_one_connection() {
    // Its name is one that a client can ask for on this machine.
    let pair = Folder::with(&Pair::beginning(SignedDuration::from_hours(-1)));
    let setup = serving("", "")
        .set("listen.tls.cert", pair.cert().to_str().unwrap())
        .set("listen.tls.key", pair.key().to_str().unwrap());
    let mut daemon = setup.start();
    // Nobody speaks plain HTTP here: the status alone tells.
    daemon.reaches(&["ready"], SOON).await;
    let base = format!("https://localhost:{}", daemon.public().port());
    let mut program = Program::start("http2_client.py", &[&base, pair.cert().to_str().unwrap(), KEY, "small"]);
    let told = program.says();
    program.ends();

    let together = told["together"].as_array().unwrap();
    let mut ids = Vec::new();
    for (n, stream) in together.iter().enumerate() {
        assert_eq!((&stream["version"], &stream["status"]), (&"HTTP/2".into(), &200.into()), "{stream}");
        assert_eq!((&stream["last"], &stream["one id"]), (&"data: [DONE]".into(), &true.into()), "{stream}");
        assert_eq!(stream["tokens"], 30 + n, "tokens of another stream, or lost: {stream}");
        ids.extend([stream["id"].to_string(), format!("stream {}", stream["stream"])]);
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 16, "eight answers on eight streams: {ids:?}");

    let left = &told["left"];
    let neighbour = (&left["neighbour"]["tokens"], &left["neighbour"]["last"]);
    assert_eq!(neighbour, (&150.into(), &"data: [DONE]".into()), "it lost something to the one that was left: {left}");
    assert_eq!(
        (&left["both"], &told["none"]),
        (&2.into(), &0.into()),
        "the connection takes its streams along: {told}"
    );
    // A token is four letters there.
    assert_eq!((&told["uploaded"]["status"], &told["uploaded"]["prompt"]), (&200.into(), &250_000.into()), "{told}");
    assert_eq!((&told["refused"]["version"], &told["refused"]["status"]), (&"HTTP/2".into(), &401.into()));

    is_idle(&mut daemon).await;
    assert_eq!(counted(&daemon, "sglangd_http2_connections_total"), 2, "all on one connection, the last look on one");
    assert_eq!(counted(&daemon, "sglangd_client_aborts_total"), 1, "the one that was left");
    assert_eq!(answered(&daemon, CHAT, "2xx"), 11);
    let status = daemon.status().await.unwrap();
    assert_eq!(number_at(&status, "/proxy/restarts"), 0);
    daemon.stops_clean(SOON).await;
}
