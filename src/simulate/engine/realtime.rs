//! `/v1/realtime` of the simulated engine: a WebSocket on which audio becomes text, in the events of
//! OpenAI's realtime transcription. Like the real one it asks nobody for a key.
//!
//! The audio is not listened to: each committed piece becomes the same text, a token at a time.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use sha1::{Digest as _, Sha1};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::http::{Answer, empty};
use super::knobs::Fault;
use super::requests::Engine;
use super::{logline, speech};

/// Largest message, as uvicorn's default (`ws_max_size`).
const MAX_MESSAGE: u64 = 16 << 20;
const TEXT: u8 = 1;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// Whether the request asks for a WebSocket: keys are then not looked at.
pub fn is_asked(request: &Request<Incoming>) -> bool {
    let upgrade = request.headers().get(UPGRADE).map(HeaderValue::as_bytes);
    request.uri().path() == "/v1/realtime" && upgrade.is_some_and(|what| what.eq_ignore_ascii_case(b"websocket"))
}

pub fn open(engine: &Arc<Engine>, mut request: Request<Incoming>) -> Response<Answer> {
    if engine.knobs.has(Fault::RefuseWebsocket) {
        return empty(StatusCode::FORBIDDEN);
    }
    let headers = request.headers();
    let version = headers.get(SEC_WEBSOCKET_VERSION).map(HeaderValue::as_bytes);
    let (Some(key), Some(b"13")) = (headers.get(SEC_WEBSOCKET_KEY), version) else {
        return empty(StatusCode::BAD_REQUEST);
    };
    let mut response = empty(StatusCode::SWITCHING_PROTOCOLS);
    let fields = response.headers_mut();
    fields.insert(SEC_WEBSOCKET_ACCEPT, accept(key.as_bytes()));
    fields.insert(UPGRADE, HeaderValue::from_static("websocket"));
    fields.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    let (engine, upgrading) = (Arc::clone(engine), hyper::upgrade::on(&mut request));
    tokio::spawn(async move {
        if let Ok(upgraded) = upgrading.await {
            // A client that is gone needs no answer.
            let _ = Session::new(engine, upgraded).run().await;
            logline::say(None, "INFO:     connection closed");
        }
    });
    response
}

fn accept(key: &[u8]) -> HeaderValue {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digest = Sha1::new().chain_update(key).chain_update("258EAFA5-E914-47DA-95CA-C5AB0DC85B11").finalize();
    // Twenty bytes are six groups of three and one of two.
    let mut text = String::new();
    for group in digest.chunks(3) {
        let bits = group.iter().enumerate().fold(0, |bits, (at, byte)| bits | u32::from(*byte) << (16 - 8 * at));
        text.extend((0..=group.len()).map(|at| char::from(DIGITS[(bits >> (18 - 6 * at)) as usize & 63])));
    }
    text.push('=');
    HeaderValue::from_bytes(text.as_bytes()).expect("base64 is a header's value")
}

struct Session {
    engine: Arc<Engine>,
    socket: TokioIo<Upgraded>,
    /// Bytes of audio since the last commit, as sent (base64).
    audio: u64,
}

enum Message {
    Text(Vec<u8>),
    Binary,
    Close(Vec<u8>),
}

impl Session {
    fn new(engine: Arc<Engine>, upgraded: Upgraded) -> Self {
        Self { engine, socket: TokioIo::new(upgraded), audio: 0 }
    }

    async fn run(&mut self) -> io::Result<()> {
        let id = id("sess");
        self.say(&json!({"type": "session.created", "session": {"id": id, "type": "transcription"}})).await?;
        loop {
            match self.message().await? {
                Message::Close(payload) => return self.send(CLOSE, &payload).await,
                Message::Binary => self.error("invalid_payload", "Binary frames are not supported").await?,
                Message::Text(text) => match serde_json::from_slice::<Value>(&text) {
                    Ok(event) if event.is_object() => self.event(&event, &id).await?,
                    Ok(_) => self.error("invalid_payload", "Top-level event must be a JSON object").await?,
                    Err(_) => self.error("invalid_payload", "Invalid JSON").await?,
                },
            }
        }
    }

    async fn event(&mut self, event: &Value, session: &str) -> io::Result<()> {
        match event["type"].as_str().unwrap_or_default() {
            "session.update" => {
                self.say(&json!({"type": "session.updated", "session": {"id": session, "type": "transcription"}})).await
            }
            "input_audio_buffer.append" => {
                self.audio += event["audio"].as_str().map_or(0, |audio| audio.len() as u64);
                Ok(())
            }
            "input_audio_buffer.clear" => {
                self.audio = 0;
                self.say(&json!({"type": "input_audio_buffer.cleared"})).await
            }
            "input_audio_buffer.commit" => self.transcribe().await,
            other => self.error("unknown_event", &format!("Unknown event type: '{other}'")).await,
        }
    }

    async fn transcribe(&mut self) -> io::Result<()> {
        let item = id("item");
        self.say(&json!({"type": "input_audio_buffer.committed", "item_id": item})).await?;
        let prompt = std::mem::take(&mut self.audio).div_ceil(1024).max(1);
        let said = speech::answer("");
        let pieces = speech::tokens(said.content);
        let aborted = "conversation.item.input_audio_transcription.failed";
        let Some(mut request) = self.engine.admit(item.clone(), prompt).await else {
            return self.say(&json!({"type": aborted, "item_id": item})).await;
        };
        let mut given = 0;
        while given < pieces.len() {
            let Some(tokens) = request.next().await else {
                return self.say(&json!({"type": aborted, "item_id": item})).await;
            };
            let to = pieces.len().min(given + tokens as usize);
            for piece in &pieces[given..to] {
                let delta = "conversation.item.input_audio_transcription.delta";
                self.say(&json!({"type": delta, "item_id": item, "delta": piece})).await?;
            }
            given = to;
        }
        request.finish(given as u64);
        let completed = "conversation.item.input_audio_transcription.completed";
        self.say(&json!({"type": completed, "item_id": item, "transcript": said.content})).await
    }

    async fn error(&mut self, code: &str, message: &str) -> io::Result<()> {
        let error = json!({"type": "invalid_request_error", "code": code, "message": message});
        self.say(&json!({"type": "error", "event_id": id("event"), "error": error})).await
    }

    async fn say(&mut self, event: &Value) -> io::Result<()> {
        self.send(TEXT, event.to_string().as_bytes()).await
    }

    async fn send(&mut self, opcode: u8, payload: &[u8]) -> io::Result<()> {
        let mut frame = vec![0x80 | opcode];
        match payload.len() {
            length @ 0..126 => frame.push(length as u8),
            length @ 126..65536 => frame.extend([&[126][..], &(length as u16).to_be_bytes()].concat()),
            length => frame.extend([&[127][..], &(length as u64).to_be_bytes()].concat()),
        }
        frame.extend_from_slice(payload);
        self.socket.write_all(&frame).await
    }

    /// The next whole message; pings are answered on the way.
    async fn message(&mut self) -> io::Result<Message> {
        let mut message = Vec::new();
        let mut kind = 0;
        loop {
            let (last, opcode, payload) = self.frame(MAX_MESSAGE - message.len() as u64).await?;
            match opcode {
                CLOSE => return Ok(Message::Close(payload)),
                PING => self.send(PONG, &payload).await?,
                PONG => {}
                opcode => {
                    kind = if opcode == 0 { kind } else { opcode };
                    message.extend(payload);
                    if last {
                        return Ok(if kind == TEXT { Message::Text(message) } else { Message::Binary });
                    }
                }
            }
        }
    }

    async fn frame(&mut self, max: u64) -> io::Result<(bool, u8, Vec<u8>)> {
        let first = self.socket.read_u8().await?;
        let second = self.socket.read_u8().await?;
        let length = match second & 0x7f {
            126 => u64::from(self.socket.read_u16().await?),
            127 => self.socket.read_u64().await?,
            length => u64::from(length),
        };
        // A client's frames are masked, or it is no client.
        if second & 0x80 == 0 || length > max {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut mask = [0; 4];
        self.socket.read_exact(&mut mask).await?;
        let mut payload = vec![0; length as usize];
        self.socket.read_exact(&mut payload).await?;
        for (byte, mask) in payload.iter_mut().zip(mask.iter().cycle()) {
            *byte ^= mask;
        }
        Ok((first & 0x80 != 0, first & 0x0f, payload))
    }
}

fn id(prefix: &str) -> String {
    static IDS: AtomicU64 = AtomicU64::new(1);
    format!("{prefix}_{:016x}", IDS.fetch_add(1, Ordering::Relaxed))
}
