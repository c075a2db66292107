//! A fake engine on raw sockets: each connection runs a script, every byte that arrives is kept.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// What one connection of the proxy brought.
#[derive(Debug, Clone, Default)]
pub struct Arrived {
    pub bytes: Vec<u8>,
    /// The proxy closed or reset its side.
    pub closed: bool,
    /// Sending to the proxy failed.
    pub broken: bool,
}

type Log = Arc<Mutex<Vec<Arrived>>>;

/// Runs until the test ends; scripts are plain blocking code.
#[derive(Debug)]
pub struct Engine {
    pub addr: SocketAddr,
    log: Log,
}

impl Engine {
    pub fn start(script: impl Fn(&mut Connection) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let log: Log = Arc::default();
        let (script, shared) = (Arc::new(script), Arc::clone(&log));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                let index = {
                    let mut log = shared.lock().unwrap();
                    log.push(Arrived::default());
                    log.len() - 1
                };
                let (script, log) = (Arc::clone(&script), Arc::clone(&shared));
                thread::spawn(move || {
                    script(&mut Connection { stream, log, index, unread: Vec::new() });
                });
            }
        });
        Self { addr, log }
    }

    /// Answers every request with `answer`, on as many connections as come.
    pub fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::start(move |connection| {
            while connection.request().is_some() {
                connection.send(&answer);
            }
        })
    }

    /// Answers each request when the test says so.
    pub fn held() -> (Self, Sender<()>) {
        let (release, gate) = channel::<()>();
        let gate = Mutex::new(gate);
        let engine = Self::start(move |connection| {
            while connection.request().is_some() {
                if gate.lock().unwrap().recv().is_err() {
                    return;
                }
                connection.send(json("200 OK", "{}"));
            }
        });
        (engine, release)
    }

    pub fn arrived(&self) -> Vec<Arrived> {
        self.log.lock().unwrap().clone()
    }

    pub fn connections(&self) -> usize {
        self.log.lock().unwrap().len()
    }

    /// All that arrived on the `n`th connection, as text.
    pub fn text(&self, n: usize) -> String {
        self.log.lock().unwrap().get(n).map_or(String::new(), |it| String::from_utf8_lossy(&it.bytes).into_owned())
    }

    /// How many requests arrived, by their `x-request-id` lines: the proxy says one in each.
    pub fn requests(&self) -> usize {
        (0..self.connections()).map(|n| self.text(n).matches("\r\nx-request-id: ").count()).sum()
    }

    pub fn closed(&self) -> usize {
        self.log.lock().unwrap().iter().filter(|it| it.closed).count()
    }

    pub fn broken(&self) -> usize {
        self.log.lock().unwrap().iter().filter(|it| it.broken).count()
    }
}

pub struct Connection {
    stream: TcpStream,
    log: Log,
    pub index: usize,
    unread: Vec<u8>,
}

impl Connection {
    fn more(&mut self) -> usize {
        let mut buffer = [0; 16 * 1024];
        let read = self.stream.read(&mut buffer).unwrap_or(0);
        let mut log = self.log.lock().unwrap();
        log[self.index].bytes.extend_from_slice(&buffer[..read]);
        log[self.index].closed |= read == 0;
        self.unread.extend_from_slice(&buffer[..read]);
        read
    }

    /// The next head; `None` when the proxy closes first.
    pub fn head(&mut self) -> Option<String> {
        loop {
            if let Some(at) = find(&self.unread, b"\r\n\r\n") {
                let head: Vec<u8> = self.unread.drain(..at + 4).collect();
                return Some(String::from_utf8_lossy(&head).to_lowercase());
            }
            if self.more() == 0 {
                return None;
            }
        }
    }

    /// The next request, head and body; `None` when the proxy closes first.
    pub fn request(&mut self) -> Option<String> {
        let head = self.head()?;
        if head.contains("transfer-encoding: chunked") {
            while find(&self.unread, b"0\r\n\r\n").is_none() {
                if self.more() == 0 {
                    return None;
                }
            }
            self.unread.clear();
        } else if let Some(length) = head.split("content-length: ").nth(1) {
            let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
            while self.unread.len() < length {
                if self.more() == 0 {
                    return None;
                }
            }
            self.unread.drain(..length);
        }
        Some(head)
    }

    /// The next so many bytes; fewer when the proxy closes first.
    pub fn take(&mut self, count: usize) -> Vec<u8> {
        while self.unread.len() < count && self.more() > 0 {}
        self.unread.drain(..count.min(self.unread.len())).collect()
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        // A proxy that has gone is what some scripts are for.
        if self.stream.write_all(bytes.as_ref()).is_err() {
            self.log.lock().unwrap()[self.index].broken = true;
        }
    }

    /// Whether the proxy was found gone while sending.
    pub fn is_broken(&self) -> bool {
        self.log.lock().unwrap()[self.index].broken
    }

    /// Reads until the proxy closes.
    pub fn until_closed(&mut self) {
        while self.more() > 0 {}
    }

    pub fn close(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    pub fn reset(&mut self) {
        let socket = socket2::SockRef::from(&self.stream);
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// An answer of known length.
pub fn json(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

pub const EVENTS: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

pub fn chunk(data: impl AsRef<[u8]>) -> Vec<u8> {
    let data = data.as_ref();
    let mut out = format!("{:x}\r\n", data.len()).into_bytes();
    out.extend_from_slice(data);
    out.extend_from_slice(b"\r\n");
    out
}

pub const LAST: &[u8] = b"0\r\n\r\n";

/// What scripts of an engine wait at, on any of its connections.
pub struct Gate(Mutex<Receiver<()>>);

impl Gate {
    /// False once the test lets everybody through.
    pub fn pass(&self) -> bool {
        self.0.lock().unwrap().recv().is_ok()
    }
}

/// An engine whose steps the test releases.
pub fn stepped(steps: impl Fn(&mut Connection, &Gate) + Send + Sync + 'static) -> (Engine, Sender<()>) {
    let (release, gate) = channel();
    let gate = Gate(Mutex::new(gate));
    let engine = Engine::start(move |connection| steps(connection, &gate));
    (engine, release)
}

/// An engine that takes requests and never answers.
pub fn thinking() -> Engine {
    Engine::start(|connection| {
        connection.request();
        connection.until_closed();
    })
}
