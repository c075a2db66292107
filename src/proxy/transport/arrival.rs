//! What happens between a connection's acceptance and its first byte of HTTP.
//!
//! Bounded in time and in number, apart from requests: who begins a handshake and never ends it costs
//! its own place among the handshakes and nobody's place among the requests. Plain connections do not
//! come through here.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use rustls::ServerConfig;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::counts::Turned;
use super::identity::{ALPN_HTTP2, Identity};
use super::proxy_header;
use super::socket::Socket;
use super::tls::Tls;
use crate::link::{Http2, ListenSettings, ProxyProtocol};
use crate::proxy::state::Shared;
use crate::proxy::wire::{self, Wire};

/// What is spoken on a connection before HTTP.
#[derive(Debug, Clone)]
pub struct Greeting {
    pub header: ProxyProtocol,
    pub tls: Encryption,
}

#[derive(Debug, Clone)]
pub enum Encryption {
    None,
    Tls(Arc<ServerConfig>),
    /// TLS, for which there is no certificate at present.
    NoCertificate,
}

impl Greeting {
    pub const NONE: Self = Self { header: ProxyProtocol::Off, tls: Encryption::None };

    pub fn new(settings: &ListenSettings, identity: Option<&Identity>) -> Self {
        let tls = match (&settings.tls, identity) {
            (None, _) => Encryption::None,
            (Some(_), Some(identity)) if settings.http2 == Http2::Off => {
                let mut config = ServerConfig::clone(&identity.config);
                config.alpn_protocols.retain(|name| name != ALPN_HTTP2);
                Encryption::Tls(Arc::new(config))
            }
            (Some(_), Some(identity)) => Encryption::Tls(Arc::clone(&identity.config)),
            (Some(_), None) => Encryption::NoCertificate,
        };
        Self { header: settings.proxy_protocol, tls }
    }

    /// Whether HTTP begins with the first byte.
    pub fn is_none(&self) -> bool {
        self.header == ProxyProtocol::Off && matches!(self.tls, Encryption::None)
    }
}

/// A connection on which HTTP may begin.
#[derive(Debug)]
pub struct Arrived {
    pub wire: Rc<Wire>,
    /// None: it came over a Unix socket.
    pub address: Option<IpAddr>,
}

/// The handshakes of one worker that are under way, the oldest first.
#[derive(Debug, Default)]
pub struct Handshakes {
    next: Cell<u64>,
    open: RefCell<BTreeMap<u64, Rc<Notify>>>,
}

/// One handshake's entry, for as long as it lasts.
struct Entry<'a> {
    handshakes: &'a Handshakes,
    id: u64,
    crowded_out: Rc<Notify>,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.handshakes.open.borrow_mut().remove(&self.id);
    }
}

impl Handshakes {
    /// One more; the oldest goes where there are too many. An honest handshake takes two round trips,
    /// so the oldest of hundreds is hardly one.
    fn begin(&self, most: usize) -> Entry<'_> {
        let id = self.next.get();
        self.next.set(id + 1);
        let crowded_out = Rc::new(Notify::new());
        let mut open = self.open.borrow_mut();
        open.insert(id, Rc::clone(&crowded_out));
        if open.len() > most
            && let Some((_, oldest)) = open.pop_first()
        {
            oldest.notify_one();
        }
        Entry { handshakes: self, id, crowded_out }
    }

    /// Greets a client; none: it was turned away.
    pub async fn greet(
        &self,
        shared: &Shared,
        socket: Socket,
        mut address: Option<IpAddr>,
        greeting: Greeting,
    ) -> Option<Arrived> {
        let socket = Rc::new(socket);
        let entry = self.begin(shared.timings.handshakes);
        let greeted = tokio::select! {
            biased;
            greeted = timeout(shared.timings.client.handshake, speak(shared, Rc::clone(&socket), &mut address, greeting)) => {
                greeted.unwrap_or(Err(Fault::Turned(Turned::HandshakeSlow)))
            }
            () = entry.crowded_out.notified() => Err(Fault::Turned(Turned::HandshakeCrowded)),
        };
        drop(entry);
        let why = match greeted {
            Ok(wire) => {
                tracing::debug!(client = ?address, protocol = ?wire.protocol(), "a connection is ready for HTTP");
                return Some(Arrived { wire, address });
            }
            Err(Fault::Turned(why)) => why,
            Err(Fault::Header(proxy_header::Fault::Bad(error))) => {
                tracing::debug!(%error, client = ?address, "a header of the PROXY protocol is bad");
                Turned::ProxyHeader
            }
            Err(Fault::Header(proxy_header::Fault::Io(error)) | Fault::Tls(error)) => {
                tracing::debug!(%error, client = ?address, "a handshake failed");
                Turned::HandshakeFailed
            }
        };
        shared.connections.turn_away(why, address);
        if why == Turned::PlainToTls {
            answer_in_clear(&socket).await;
            wire::close(socket).await;
        }
        None
    }
}

enum Fault {
    Turned(Turned),
    Header(proxy_header::Fault),
    Tls(io::Error),
}

/// First byte of every TLS connection: a record with a handshake in it.
pub const TLS_RECORD: u8 = 0x16;

async fn speak(
    shared: &Shared,
    socket: Rc<Socket>,
    address: &mut Option<IpAddr>,
    greeting: Greeting,
) -> Result<Rc<Wire>, Fault> {
    if greeting.header == ProxyProtocol::Require
        && let proxy_header::Said::Client(client) = proxy_header::read(&socket).await.map_err(Fault::Header)?
    {
        *address = client;
    }
    let config = match greeting.tls {
        Encryption::None => return Ok(Wire::plain(socket)),
        Encryption::NoCertificate => return Err(Fault::Turned(Turned::NoCertificate)),
        Encryption::Tls(config) => config,
    };
    // Looked at before the library does: its alert would be the first thing a plain client reads, and
    // it would have set up a session for a client that never says a word.
    match socket.peek().await.map_err(Fault::Tls)? {
        Some(TLS_RECORD) => {}
        Some(_) => return Err(Fault::Turned(Turned::PlainToTls)),
        None => return Err(Fault::Tls(io::ErrorKind::UnexpectedEof.into())),
    }
    let tls = Tls::accept(Rc::clone(&socket), config).await.map_err(Fault::Tls)?;
    shared.connections.handshakes.fetch_add(1, Relaxed);
    Ok(Wire::encrypted(socket, tls))
}

const IN_CLEAR: &str = "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\ncontent-length: 53\r\n\r\n\
    This port speaks TLS: ask again with https:// please\n";

/// A socket that was never written to takes these few bytes at once, or is gone.
async fn answer_in_clear(socket: &Rc<Socket>) {
    let _ = poll_fn(|cx| socket.poll_write(cx, IN_CLEAR.as_bytes())).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_in_clear_has_the_length_it_says() {
        let (head, body) = IN_CLEAR.split_once("\r\n\r\n").expect("a head");
        assert!(head.ends_with(&format!("content-length: {}", body.len())), "{head}");
    }
}
