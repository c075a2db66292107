//! Group E: WebSockets. A tunnel is the engine's 101 and nothing else, and it is a request like others.

mod carried;
mod opened;
mod served;

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use sglangd::link::ProxySettings;
use sglangd::proxy::Timings;

use crate::harness::client::{Client, head};
use crate::harness::engine::{Connection, Engine};
use crate::harness::front::{Front, settings};

/// The RFC's example, so that its answer is known.
const KEY: &str = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
const UPGRADE: &str = "Host: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n";
const VERSION: &str = "Sec-WebSocket-Version: 13\r\n";
const ACCEPTED: &str = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
    sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nsec-websocket-protocol: realtime\r\n\r\n";
const TEXT: u8 = 0x81;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;

fn asking(more: &str) -> String {
    head("GET /v1/realtime?model=m HTTP/1.1", &format!("{UPGRADE}{VERSION}{KEY}{more}"))
}

/// A frame as a server sends it.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match payload.len() {
        length @ 0..126 => frame.push(length as u8),
        length @ 126..65536 => frame.extend([&[126][..], &(length as u16).to_be_bytes()].concat()),
        length => frame.extend([&[127][..], &(length as u64).to_be_bytes()].concat()),
    }
    frame.extend_from_slice(payload);
    frame
}

/// A frame as a client sends it: with a mask, here of zeros.
fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = frame(first, payload);
    let header = frame.len() - payload.len();
    frame[1] |= 0x80;
    frame.splice(header..header, [0; 4]);
    frame
}

fn goodbye(code: u16) -> [u8; 2] {
    code.to_be_bytes()
}

/// An engine that opens each WebSocket and then does as it is told.
fn opening(then: impl Fn(&mut Connection) + Send + Sync + 'static) -> Engine {
    Engine::start(move |connection| {
        if connection.request().is_some() {
            connection.send(ACCEPTED);
            then(connection);
        }
    })
}

/// The same, step by step as the test releases them.
fn stepped(then: impl Fn(&mut Connection, &Receiver<()>) + Send + Sync + 'static) -> (Engine, Sender<()>) {
    let (release, gate) = channel();
    let gate = Mutex::new(gate);
    (opening(move |connection| then(connection, &gate.lock().unwrap())), release)
}

/// Sends back what comes, byte for byte.
fn echo(connection: &mut Connection) {
    loop {
        let byte = connection.take(1);
        if byte.is_empty() {
            return;
        }
        connection.send(byte);
    }
}

/// A client whose WebSocket is open.
fn opened(front: &Front) -> Client {
    let mut client = Client::connect(front.addr);
    client.send(asking("")).until("\r\n\r\n");
    let answer = client.answer();
    assert_eq!(answer.status, 101, "{}", answer.head);
    client
}

/// The closing frame that comes next: its code.
fn closing(client: &mut Client) -> u16 {
    let header = client.take(2);
    assert_eq!(header[0], CLOSE, "no closing frame but {header:?}");
    let payload = client.take(usize::from(header[1]));
    u16::from_be_bytes([payload[0], payload[1]])
}

fn with(engine: &Engine, timings: Timings) -> Front {
    Front::with(engine, ProxySettings { max: 1, ..settings() }, timings)
}
