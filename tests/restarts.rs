//! What an operator's `sglangd restart-engine` does, and to whom it listens.

use std::time::Duration;

use crate::harness::client::{Client, End, post};
use crate::harness::daemon::Daemon;
use crate::harness::scene::{
    SOON, engine_pid, is_whole, number_at, open_stream, proxy_pid, quick, replaces, stream_of, streamed, text_at,
};

fn restart(daemon: &Daemon) -> (Option<i32>, String) {
    let output = daemon.command("restart-engine").arg("--runtime-dir").arg(daemon.runtime_dir()).output().unwrap();
    let words = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(words).unwrap())
}

#[tokio::test]
async fn a_restart_lets_the_open_answer_end_and_holds_what_comes_meanwhile() {
    let mut daemon = quick("").env("SGLANG_SIM_TOKENS_PER_SECOND", "40").start();
    let before = daemon.is_ready(SOON).await;
    let (addr, first) = (daemon.public(), engine_pid(&before));
    let mut open = open_stream(addr, 80);
    let (code, words) = restart(&daemon);
    assert_eq!(code, Some(0), "{words}");
    assert!(words.contains("open answers may end"), "{words}");
    daemon.until("it drains", SOON, async |daemon| (daemon.state().await? == "draining").then_some(())).await;
    let mut held = Client::connect(addr);
    held.send(stream_of(3));
    let answer = open.answer();
    assert_eq!(answer.end, End::Complete, "a stream that could end was cut: {answer:?}");
    assert!(answer.text().ends_with("data: [DONE]\n\n"), "{}", answer.text());
    let after = replaces(&mut daemon, first).await;
    let answer = held.answer();
    assert!(is_whole(&answer), "not held over the restart: {answer:?}");
    assert_eq!(number_at(&after, "/engine/restarts"), 1);
    assert_eq!(proxy_pid(&after), proxy_pid(&before), "the proxy went on");
    assert!(is_whole(&streamed(addr, 3)));
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn a_restart_whose_answers_do_not_end_waits_no_longer_than_the_grace() {
    let mut daemon = quick("").env("SGLANG_SIM_TOKENS_PER_SECOND", "5").set("shutdown.grace", "10s").start();
    let (addr, first) = (daemon.public(), engine_pid(&daemon.is_ready(SOON).await));
    let mut endless = open_stream(addr, 20_000);
    assert_eq!(restart(&daemon).0, Some(0));
    let answer = endless.answer();
    assert_ne!(answer.end, End::Complete, "a cut stream looks complete");
    assert!(!answer.text().contains("[DONE]"), "{}", answer.text());
    replaces(&mut daemon, first).await;
    assert!(is_whole(&streamed(addr, 3)), "the proxy serves on");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g02_a_restart_leaves_gave_up_once_the_cause_is_gone() {
    let setup = quick("");
    let broken = setup.folder().join("broken");
    std::fs::write(&broken, "").unwrap();
    let engine = setup.folder().join("engine.sh");
    let text = format!("[ -e {} ] && exit 1\nexec {} simulate \"$@\"", broken.display(), env!("CARGO_BIN_EXE_sglangd"));
    crate::harness::scene::write_script(&engine, &text);
    let mut daemon = setup.set("engine.command", &format!("[{}]", engine.display())).set("restart.max", "1").start();
    daemon.reaches(&["gave_up"], SOON).await;
    // Still broken: it tries, and gives up again with the same words.
    let (code, words) = restart(&daemon);
    assert_eq!(code, Some(0), "{words}");
    assert!(words.contains("earlier failures do not count"), "{words}");
    let status = daemon
        .until("a second try", SOON, async |daemon| {
            let status = daemon.status().await?;
            (text_at(&status, "/state") == "gave_up" && number_at(&status, "/engine/restarts") == 1).then_some(status)
        })
        .await;
    assert!(!text_at(&status, "/reason").is_empty());
    std::fs::remove_file(&broken).unwrap();
    assert_eq!(restart(&daemon).0, Some(0));
    daemon.is_ready(SOON).await;
    assert!(is_whole(&streamed(daemon.public(), 3)));
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn only_the_runtime_folders_socket_takes_orders() {
    let mut daemon = quick("").start();
    let engine = engine_pid(&daemon.is_ready(SOON).await);
    let refused = Client::ask(daemon.admin(), post("/restart-engine", "{}"));
    assert_eq!(refused.status, 403, "whoever reaches the admin address may look, not act");
    assert_eq!(Client::ask(daemon.public(), post("/restart-engine", "{}")).status, 404);
    assert_eq!(engine_pid(&daemon.status().await.unwrap()), engine);
    let nobody = daemon.folder().join("nobody");
    let output = daemon.command("restart-engine").arg("--runtime-dir").arg(&nobody).output().unwrap();
    assert_eq!(output.status.code(), Some(69), "{output:?}");
    daemon.stops_clean(Duration::from_secs(30)).await;
}
