//! A client of HTTP/2 on a raw socket: says exactly the given frames, and tells what came back.

use std::io::{ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr};
use std::time::Duration;

use super::client::{self, Stream};
use super::hpack::{self, Decoder};

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;
pub const PRIORITISED: u8 = 32;

pub const NO_ERROR: u32 = 0;
pub const PROTOCOL_ERROR: u32 = 1;
pub const INTERNAL_ERROR: u32 = 2;
pub const FLOW_CONTROL_ERROR: u32 = 3;
pub const STREAM_CLOSED: u32 = 5;
pub const FRAME_SIZE_ERROR: u32 = 6;
pub const REFUSED_STREAM: u32 = 7;
pub const CANCEL: u32 = 8;
pub const COMPRESSION_ERROR: u32 = 9;
pub const ENHANCE_YOUR_CALM: u32 = 11;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
    /// What a head says: decoded when it comes, since the decoder's table depends on the order.
    pub fields: Vec<(String, String)>,
}

/// Any frame, as bytes.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: impl AsRef<[u8]>) -> Vec<u8> {
    let payload = payload.as_ref();
    let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

pub fn settings(settings: &[(u16, u32)]) -> Vec<u8> {
    let payload: Vec<u8> =
        settings.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()).collect();
    frame(SETTINGS, 0, 0, payload)
}

pub fn window_update(stream: u32, increment: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, increment.to_be_bytes())
}

pub fn reset(stream: u32, reason: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, reason.to_be_bytes())
}

pub fn ping() -> Vec<u8> {
    frame(PING, 0, 0, b"12345678")
}

/// The fields of a good POST, and more.
pub fn fields<'a>(path: &'a str, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut fields = vec![(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "sglangd")];
    fields.push(("content-type", "application/json"));
    fields.extend(more);
    fields
}

/// HEADERS with any fields, whole.
pub fn headers<N: AsRef<[u8]>, V: AsRef<[u8]>>(stream: u32, flags: u8, fields: &[(N, V)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | flags, stream, hpack::block(fields))
}

/// A whole request.
pub fn post(stream: u32, path: &str, body: &str) -> Vec<u8> {
    let mut out = headers(stream, 0, &fields(path, &[]));
    let mut pieces = body.as_bytes().chunks(16_384).peekable();
    while let Some(piece) = pieces.next() {
        out.extend(frame(DATA, if pieces.peek().is_none() { END_STREAM } else { 0 }, stream, piece));
    }
    out
}

pub fn get(stream: u32, path: &str) -> Vec<u8> {
    let fields = [(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", "sglangd")];
    headers(stream, END_STREAM, &fields)
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Complete,
    /// RST_STREAM with this reason.
    Reset(u32),
    /// The connection's end came first.
    Gone,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goodbye {
    /// The last GOAWAY: highest stream and reason.
    Goaway(u32, u32),
    /// None came.
    Silent,
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub end: End,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// `error.code` of the body.
    pub fn code(&self) -> String {
        let json: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        json["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// Whether windows are opened again as DATA comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Appetite {
    Hungry,
    /// Whoever wants windows opened opens them.
    None,
}

#[derive(Debug)]
pub struct Client {
    stream: Stream,
    unread: Vec<u8>,
    decoder: Decoder,
    appetite: Appetite,
    /// Frames that came while another stream's were awaited.
    aside: Vec<Frame>,
    pub goaways: Vec<(u32, u32)>,
}

impl Client {
    /// A connection on which nothing was said.
    pub fn bare(addr: SocketAddr) -> Self {
        Self::on(client::Client::connect(addr))
    }

    /// The same on a connection of any kind.
    pub fn on(client: client::Client) -> Self {
        Self {
            stream: client.into_stream(),
            unread: Vec::new(),
            decoder: Decoder::default(),
            appetite: Appetite::Hungry,
            aside: Vec::new(),
            goaways: Vec::new(),
        }
    }

    /// A connection on which both sides have said and acknowledged their settings.
    pub fn connect(addr: SocketAddr) -> Self {
        Self::with(addr, &[])
    }

    pub fn with(addr: SocketAddr, theirs: &[(u16, u32)]) -> Self {
        Self::bare(addr).greet(theirs)
    }

    /// Says and acknowledges settings.
    pub fn greet(mut self, theirs: &[(u16, u32)]) -> Self {
        self.send([PREFACE, &settings(theirs)].concat());
        self.until(|frame| frame.kind == SETTINGS && frame.flags & ACK != 0).expect("our settings are acknowledged");
        self
    }

    pub fn starved(mut self) -> Self {
        self.appetite = Appetite::None;
        self
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        // A proxy may refuse and close before all is written: the answer is what counts.
        let _ = self.stream.write_all(bytes.as_ref());
        self
    }

    /// Whether a write went through: for floods.
    pub fn pours(&mut self, bytes: &[u8]) -> bool {
        self.stream.socket().set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        self.stream.write_all(bytes).is_ok()
    }

    /// The next frame; `None` at the connection's end. SETTINGS and PING are answered.
    pub fn frame(&mut self) -> Option<Frame> {
        while self.unread.len() < 9 || self.unread.len() < 9 + length(&self.unread) {
            let mut buffer = [0; 16 * 1024];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(read) => self.unread.extend_from_slice(&buffer[..read]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    panic!("nothing came for long")
                }
                Err(_) => return None,
            }
        }
        let bytes: Vec<u8> = self.unread.drain(..9 + length(&self.unread)).collect();
        let stream = u32::from_be_bytes(bytes[5..9].try_into().unwrap());
        let payload = bytes[9..].to_vec();
        let mut frame = Frame { kind: bytes[3], flags: bytes[4], stream, payload, fields: Vec::new() };
        match frame.kind {
            SETTINGS if frame.flags & ACK == 0 => _ = self.send(self::frame(SETTINGS, ACK, 0, [])),
            PING if frame.flags & ACK == 0 => _ = self.send(self::frame(PING, ACK, 0, &frame.payload)),
            DATA if self.appetite == Appetite::Hungry && !frame.payload.is_empty() => {
                let count = frame.payload.len() as u32;
                self.send([window_update(0, count), window_update(stream, count)].concat());
            }
            HEADERS => {
                assert_ne!(frame.flags & END_HEADERS, 0, "an answer's head is one frame here");
                frame.fields = self.decoder.decode(&frame.payload);
            }
            GOAWAY => {
                let number = |at: usize| u32::from_be_bytes(frame.payload[at..at + 4].try_into().unwrap());
                self.goaways.push((number(0), number(4)));
            }
            _ => {}
        }
        Some(frame)
    }

    /// Reads up to a frame that is wanted; others are thrown away.
    pub fn until(&mut self, wanted: impl Fn(&Frame) -> bool) -> Option<Frame> {
        loop {
            let frame = self.frame()?;
            if wanted(&frame) {
                return Some(frame);
            }
        }
    }

    /// Reads until so many GOAWAYs have come; the streams' frames are kept for later.
    pub fn until_goaways(&mut self, count: usize) {
        while self.goaways.len() < count {
            let frame = self.frame().expect("the connection goes on");
            if frame.stream != 0 {
                self.aside.push(frame);
            }
        }
    }

    /// The next frame of one stream, those of others being kept for later.
    pub fn of_stream(&mut self, stream: u32) -> Option<Frame> {
        if let Some(at) = self.aside.iter().position(|frame| frame.stream == stream) {
            return Some(self.aside.remove(at));
        }
        loop {
            let frame = self.frame()?;
            if frame.stream == stream {
                return Some(frame);
            }
            if frame.stream != 0 {
                self.aside.push(frame);
            }
        }
    }

    /// A stream's answer, whole or as far as it came. One that has no head has status 0.
    pub fn answer(&mut self, stream: u32) -> Answer {
        let mut answer = Answer { status: 0, fields: Vec::new(), body: Vec::new(), end: End::Gone };
        while let Some(frame) = self.of_stream(stream) {
            match frame.kind {
                HEADERS => {
                    answer.fields = frame.fields;
                    answer.status = answer.field(":status").unwrap().parse().unwrap();
                }
                DATA => answer.body.extend_from_slice(&frame.payload),
                RST_STREAM => {
                    answer.end = End::Reset(u32::from_be_bytes(frame.payload.try_into().unwrap()));
                    return answer;
                }
                _ => continue,
            }
            // A 100 is no answer yet.
            if frame.flags & END_STREAM != 0 {
                answer.end = End::Complete;
                return answer;
            }
        }
        answer
    }

    /// Reads a stream's DATA until `what` has come.
    pub fn until_text(&mut self, stream: u32, what: &str) {
        let mut seen = Vec::new();
        while !seen.windows(what.len()).any(|window| window == what.as_bytes()) {
            let frame = self.of_stream(stream).expect("the connection goes on");
            assert_ne!(frame.kind, RST_STREAM, "the stream ended before {what:?}");
            if frame.kind == DATA {
                seen.extend_from_slice(&frame.payload);
            }
        }
    }

    /// Reads so many bytes of a stream's DATA, to the end of a frame at least.
    pub fn until_bytes(&mut self, stream: u32, count: usize) {
        let mut seen = 0;
        while seen < count {
            let frame = self.of_stream(stream).expect("the connection goes on");
            assert_ne!(frame.kind, RST_STREAM, "the stream ended after {seen} bytes");
            if frame.kind == DATA {
                seen += frame.payload.len();
            }
        }
        assert_eq!(seen, count);
    }

    /// Waits for the connection's end.
    pub fn goodbye(&mut self) -> Goodbye {
        while self.frame().is_some() {}
        self.goaways.last().map_or(Goodbye::Silent, |&(last, reason)| Goodbye::Goaway(last, reason))
    }

    /// Why the connection was ended, where a GOAWAY said so.
    pub fn goodbye_reason(&mut self) -> Option<u32> {
        match self.goodbye() {
            Goodbye::Goaway(_, reason) => Some(reason),
            Goodbye::Silent => None,
        }
    }

    /// Whether nothing comes for `wait`.
    pub fn is_quiet(&mut self, wait: Duration) -> bool {
        self.stream.socket().set_read_timeout(Some(wait)).unwrap();
        let read = self.stream.socket().peek(&mut [MaybeUninit::uninit()]);
        self.stream.socket().set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        read.is_err_and(|error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
    }

    /// Whether a frame of this kind has come for the stream while others' were read.
    pub fn has_come(&self, stream: u32, kind: u8) -> bool {
        self.aside.iter().any(|frame| (frame.stream, frame.kind) == (stream, kind))
    }

    /// Whether the connection still answers: a ping comes back.
    pub fn is_alive(&mut self) -> bool {
        self.send(frame(PING, 0, 0, b"alive?!?"));
        self.until(|frame| frame.kind == PING && frame.flags & ACK != 0).is_some()
    }

    pub fn fin(&mut self) {
        self.stream.socket().shutdown(Shutdown::Write).unwrap();
    }

    pub fn rst(self) {
        self.stream.socket().set_linger(Some(Duration::ZERO)).unwrap();
    }
}

fn length(head: &[u8]) -> usize {
    u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize
}
