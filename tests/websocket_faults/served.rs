//! A WebSocket through the whole daemon, to the simulated engine's `/v1/realtime`.

use std::net::SocketAddr;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{CLOSE, TEXT, asking, closing, goodbye, masked};
use crate::harness::client::{Client, End};
use crate::harness::scene::{SOON, number_at, quick};

fn say(client: &mut Client, event: &Value) {
    client.send(masked(TEXT, event.to_string().as_bytes()));
}

/// The next event.
fn event(client: &mut Client) -> Value {
    let header = client.take(2);
    assert_eq!(header[0], TEXT, "no text but {header:?}");
    let length = match header[1] {
        126 => usize::from(u16::from_be_bytes(client.take(2).try_into().unwrap())),
        length => usize::from(length),
    };
    serde_json::from_slice(&client.take(length)).unwrap()
}

fn connected(addr: SocketAddr) -> Client {
    let mut client = Client::connect(addr);
    client.send(asking(""));
    let answer = client.answer();
    assert_eq!(answer.status, 101, "{}", answer.head);
    assert_eq!(event(&mut client)["type"], "session.created");
    client
}

#[tokio::test]
async fn audio_becomes_text_and_a_stop_says_1012() {
    let mut daemon = quick("").start();
    daemon.is_ready(SOON).await;
    let mut client = connected(daemon.public());
    say(&mut client, &json!({"type": "session.update", "session": {"type": "transcription"}}));
    assert_eq!(event(&mut client)["type"], "session.updated");
    say(&mut client, &json!({"type": "input_audio_buffer.append", "audio": "QUJD"}));
    say(&mut client, &json!({"type": "input_audio_buffer.commit"}));
    assert_eq!(event(&mut client)["type"], "input_audio_buffer.committed");
    let mut heard = String::new();
    let transcript = loop {
        let event = event(&mut client);
        match event["type"].as_str().unwrap().rsplit_once('.').unwrap().1 {
            "delta" => heard.push_str(event["delta"].as_str().unwrap()),
            "completed" => break event["transcript"].as_str().unwrap().to_owned(),
            other => panic!("{other}"),
        }
    };
    assert!(!heard.is_empty() && heard == transcript);
    say(&mut client, &json!({"type": "nonsense"}));
    assert_eq!(event(&mut client)["error"]["code"], "unknown_event");
    daemon
        .until("the status shows it", SOON, async |daemon| {
            let status = daemon.status().await?;
            let shown = (number_at(&status, "/requests/websockets"), number_at(&status, "/requests/in_flight"));
            (shown == (1, 1)).then_some(())
        })
        .await;
    daemon.note_processes();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(closing(&mut client), 1012);
    client.send(masked(CLOSE, &goodbye(1012)));
    assert_eq!(client.closes(), End::Broken);
    assert_eq!(daemon.exit(SOON).await, 0, "{}", daemon.log());
}

#[tokio::test]
async fn e01_an_engine_that_refuses_and_e04_one_that_dies() {
    let mut daemon = quick("refuse_websocket").start();
    daemon.is_ready(SOON).await;
    let answer = Client::connect(daemon.public()).send(asking("")).answer_to("GET");
    assert_eq!(answer.status, 403);
    daemon.stops_clean(SOON).await;

    let mut daemon = quick("die_after_tokens=20").start();
    daemon.is_ready(SOON).await;
    let mut client = connected(daemon.public());
    say(&mut client, &json!({"type": "input_audio_buffer.commit"}));
    // Some events, and then the proxy's own goodbye.
    while client.take(1)[0] == TEXT {
        let length = match client.take(1)[0] {
            126 => usize::from(u16::from_be_bytes(client.take(2).try_into().unwrap())),
            length => usize::from(length),
        };
        client.take(length);
    }
    let length = usize::from(client.take(1)[0]);
    assert_eq!(client.take(length)[..2], goodbye(1011));
    assert_eq!(client.closes(), End::Broken);
    daemon.stops_clean(SOON).await;
}
