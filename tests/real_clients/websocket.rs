//! The `websockets` library on `/v1/realtime`, for which SGLang itself asks no key.

use nix::sys::signal::Signal;

use super::{KEY, Program, serving, started};
use crate::harness::scene::{SOON, number_at};

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn e01_the_websockets_library_needs_a_key_and_is_told_when_to_go() {
    let mut daemon = started(serving("", "")).await;
    let mut program = Program::start("realtime.py", &[&daemon.public().to_string(), KEY]);
    let refused = program.says();
    assert_eq!((&refused["none"], &refused["wrong"]), (&401.into(), &401.into()), "{refused}");
    let told = program.says();
    assert_eq!((&told["created"], &told["closed"]), (&"session.created".into(), &1000.into()), "{told}");
    assert_eq!(told["committed"], "input_audio_buffer.committed");
    let transcript = told["transcript"].as_str().unwrap();
    assert!(transcript.len() > 100 && told["heard"] == transcript, "{told}");
    assert!(told["pong"].is_boolean(), "{told}");
    assert_eq!(program.says()["open"], "session.created");
    daemon
        .until("the one that stays is counted", SOON, async |daemon| {
            let status = daemon.status().await?;
            ((number_at(&status, "/requests/websockets"), number_at(&status, "/requests/in_flight")) == (1, 1))
                .then_some(())
        })
        .await;
    daemon.note_processes();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(program.says()["code"], 1012, "service restart");
    program.ends();
    assert_eq!(daemon.exit(SOON).await, 0, "{}", daemon.log());
    daemon.leaves_nothing(SOON).await;
}
