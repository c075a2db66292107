//! A client on a raw socket: says exactly the given bytes and tells a whole answer from a broken one.

use std::io::{ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, ClientConnection, StreamOwned};
use socket2::SockRef;

#[derive(Debug)]
pub struct Client {
    stream: Stream,
    unread: Vec<u8>,
}

/// What the client's bytes go through.
#[derive(Debug)]
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Stream {
    pub fn socket(&self) -> SockRef<'_> {
        match self {
            Self::Tcp(stream) => SockRef::from(stream),
            Self::Unix(stream) => SockRef::from(stream),
            Self::Tls(stream) => SockRef::from(&stream.sock),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.flush(),
            Self::Unix(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Complete,
    /// The connection's end (FIN) came before the answer's.
    Broken,
    /// RST: what was on its way may be lost.
    Reset,
    /// FIN without TLS's own goodbye: somebody cut it.
    Truncated,
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
    pub end: End,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let prefix = format!("{name}: ");
        self.head.lines().find_map(|line| line.strip_prefix(prefix.as_str()))
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {:?}", self.text()))
    }

    /// `error.code` of the body.
    pub fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

enum More {
    Some,
    Fin,
    Rst,
    Cut,
}

impl Client {
    pub fn connect(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream: Stream::Tcp(stream), unread: Vec::new() }
    }

    pub fn connect_unix(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { stream: Stream::Unix(stream), unread: Vec::new() }
    }

    /// Waits so long for the next byte before it calls that a failure, in place of 20 s.
    pub fn patient(self, wait: Duration) -> Self {
        self.stream.socket().set_read_timeout(Some(wait)).unwrap();
        self
    }

    /// Speaks TLS from now on.
    pub fn encrypt(self, config: Arc<ClientConfig>) -> std::io::Result<Self> {
        let Stream::Tcp(mut stream) = self.stream else { panic!("TLS stands on TCP") };
        let mut session = ClientConnection::new(config, "sglangd".try_into().unwrap()).unwrap();
        while session.is_handshaking() {
            session.complete_io(&mut stream)?;
        }
        Ok(Self { stream: Stream::Tls(Box::new(StreamOwned::new(session, stream))), unread: self.unread })
    }

    /// For who speaks something else on it.
    pub fn into_stream(self) -> Stream {
        self.stream
    }

    /// What both sides agreed to speak.
    pub fn protocol(&self) -> Option<&[u8]> {
        let Stream::Tls(stream) = &self.stream else { panic!("no TLS, no agreement") };
        stream.conn.alpn_protocol()
    }

    /// The certificate that the server showed.
    pub fn certificate(&self) -> Vec<u8> {
        let Stream::Tls(stream) = &self.stream else { panic!("no TLS, no certificate") };
        stream.conn.peer_certificates().unwrap()[0].to_vec()
    }

    /// Whether the handshake was a short one, by a ticket of an earlier connection.
    pub fn was_known(&self) -> bool {
        let Stream::Tls(stream) = &self.stream else { return false };
        stream.conn.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        // A proxy may refuse and close before all is written: the answer is what counts.
        let _ = self.stream.write_all(bytes.as_ref());
        self
    }

    /// One request on a new connection, and its answer.
    pub fn ask(addr: SocketAddr, request: impl AsRef<[u8]>) -> Answer {
        Self::connect(addr).send(request).answer()
    }

    fn more(&mut self) -> More {
        let mut buffer = [0; 16 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => More::Fin,
            Ok(read) => {
                self.unread.extend_from_slice(&buffer[..read]);
                More::Some
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("nothing came for long behind {:?}", String::from_utf8_lossy(&self.unread))
            }
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => More::Cut,
            Err(_) => More::Rst,
        }
    }

    /// Reads until `what` has come; all that came with it stays for the answer.
    pub fn until(&mut self, what: &str) -> &mut Self {
        while !self.unread.windows(what.len()).any(|window| window == what.as_bytes()) {
            assert!(matches!(self.more(), More::Some), "the connection ended before {what:?}: {:?}", self.seen());
        }
        self
    }

    /// Reads until `what` has come so many times.
    pub fn until_times(&mut self, what: &str, times: usize) -> &mut Self {
        while self.seen().matches(what).count() < times {
            assert!(matches!(self.more(), More::Some), "the connection ended before {what:?}: {:?}", self.seen());
        }
        self
    }

    /// The next so many bytes, whatever they are.
    pub fn take(&mut self, count: usize) -> Vec<u8> {
        self.bytes(count).unread.drain(..count).collect()
    }

    /// Forgets what has come.
    pub fn forget(&mut self) -> &mut Self {
        self.unread.clear();
        self
    }

    /// Writes until nothing more is taken.
    pub fn send_what_fits(&mut self) {
        self.stream.socket().set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        let piece = vec![b'x'; 64 * 1024];
        while self.stream.write(&piece).is_ok() {}
    }

    /// Reads until at least so many bytes are here.
    pub fn bytes(&mut self, count: usize) -> &mut Self {
        while self.unread.len() < count {
            assert!(matches!(self.more(), More::Some), "the connection ended after {} bytes", self.unread.len());
        }
        self
    }

    /// Whether nothing comes for `wait`.
    pub fn is_quiet(&mut self, wait: Duration) -> bool {
        self.stream.socket().set_read_timeout(Some(wait)).unwrap();
        let read = self.stream.socket().peek(&mut [MaybeUninit::uninit()]);
        self.stream.socket().set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        read.is_err_and(|error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
    }

    pub fn seen(&self) -> String {
        String::from_utf8_lossy(&self.unread).into_owned()
    }

    /// The next answer's head; none when the connection ends first.
    fn head(&mut self) -> Option<String> {
        loop {
            if let Some(at) = self.unread.windows(4).position(|window| window == b"\r\n\r\n") {
                let head: Vec<u8> = self.unread.drain(..at + 4).collect();
                return Some(String::from_utf8(head).unwrap());
            }
            if !matches!(self.more(), More::Some) {
                return None;
            }
        }
    }

    /// The next answer, whole or as far as it came.
    pub fn answer(&mut self) -> Answer {
        self.answer_to("POST")
    }

    pub fn answer_to(&mut self, method: &str) -> Answer {
        self.any_answer_to(method).unwrap_or_else(|| panic!("the connection ended before an answer: {:?}", self.seen()))
    }

    /// The next answer, or none where the connection ends before its head.
    pub fn any_answer(&mut self) -> Option<Answer> {
        self.any_answer_to("POST")
    }

    fn any_answer_to(&mut self, method: &str) -> Option<Answer> {
        let head = self.head()?;
        let status: u16 = head.split(' ').nth(1).unwrap().parse().unwrap();
        let lower = head.to_lowercase();
        let (mut body, mut end) = (Vec::new(), End::Complete);
        if method == "HEAD" || matches!(status, 100..200 | 204 | 304) {
        } else if lower.contains("transfer-encoding: chunked") {
            (body, end) = self.chunks();
        } else if let Some(length) = lower.split("content-length: ").nth(1) {
            let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
            while self.unread.len() < length && end == End::Complete {
                end = ended(&self.more());
            }
            body = self.unread.drain(..length.min(self.unread.len())).collect();
        } else {
            end = loop {
                match self.more() {
                    More::Some => {}
                    More::Fin => break End::Complete,
                    more => break ended(&more),
                }
            };
            body = std::mem::take(&mut self.unread);
        }
        Some(Answer { status, head: lower, body, end })
    }

    fn chunks(&mut self) -> (Vec<u8>, End) {
        let mut body = Vec::new();
        loop {
            let Some(at) = self.unread.windows(2).position(|window| window == b"\r\n") else {
                match self.more() {
                    More::Some => continue,
                    more => return (body, ended(&more)),
                }
            };
            let size = usize::from_str_radix(std::str::from_utf8(&self.unread[..at]).unwrap(), 16).unwrap();
            let whole = at + 2 + size + 2;
            while self.unread.len() < whole {
                match self.more() {
                    More::Some => {}
                    more => return (body, ended(&more)),
                }
            }
            body.extend_from_slice(&self.unread[at + 2..at + 2 + size]);
            self.unread.drain(..whole);
            if size == 0 {
                return (body, End::Complete);
            }
        }
    }

    /// How the connection ends, throwing away what still comes.
    pub fn closes(&mut self) -> End {
        loop {
            match self.more() {
                More::Some => {}
                more => return ended(&more),
            }
        }
    }

    /// Half of the connection's end: nothing more will be said.
    pub fn fin(&mut self) -> &mut Self {
        self.stream.socket().shutdown(Shutdown::Write).unwrap();
        self
    }

    /// Leaves without a goodbye.
    pub fn rst(self) {
        self.stream.socket().set_linger(Some(Duration::ZERO)).unwrap();
    }
}

fn ended(more: &More) -> End {
    match more {
        More::Some => End::Complete,
        More::Fin => End::Broken,
        More::Rst => End::Reset,
        More::Cut => End::Truncated,
    }
}

/// A POST with a body of known length.
pub fn post(path: &str, body: &str) -> String {
    post_with(path, "", body)
}

/// The same with more header lines, each ended by CRLF.
pub fn post_with(path: &str, fields: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: sglangd\r\nContent-Type: application/json\r\n{fields}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

pub fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: sglangd\r\n\r\n")
}

/// Any request line and header lines (each ended by CRLF), no body.
pub fn head(line: &str, fields: &str) -> String {
    format!("{line}\r\n{fields}\r\n")
}
