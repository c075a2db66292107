//! HTTP/2 on the public port: by its preface on plain connections, by ALPN on TLS.
//!
//! h2, hyper's own implementation of the protocol, is used directly and not through hyper's server,
//! which cannot say why it ends a connection, does not poll an answer whose client gives it no window
//! (so nobody would cut it), answers HEAD with a body and knows no 100. What the service and the answer
//! are is the same as for HTTP/1.
//!
//! ```text
//!  client ⇄ io (watch) ⇄ h2 ⇄ connection ─┬─ stream ─ head ─ service ─ … ─ engine
//!                                          └─ stream …
//! ```
//!
//! Towards the engine everything is HTTP/1.1 text, written by [`super::headers`] and framed by what h2
//! and [`head`] have checked. No push, no CONNECT, no h2c upgrade.

mod connection;
mod flow;
mod frames;
mod head;
mod io;
mod stream;
mod upload;
mod watch;

use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

pub use connection::serve;
pub use flow::Flow;
pub use upload::Upload;

use super::framing::MAX_HEAD;
use super::transport::crowd::Standing;
use super::wire::Scheme;
use super::worker::Worker;

/// Who speaks on one connection.
#[derive(Debug)]
pub struct Client {
    pub worker: Rc<Worker>,
    /// None: it came over a Unix socket.
    pub address: Option<IpAddr>,
    pub scheme: Scheme,
    pub standing: Standing,
}

/// Whether a connection's first bytes are HTTP/2's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    Http2,
    /// They may become it.
    Open,
    Other,
}

/// Looks at the first bytes of a connection.
pub fn opening(bytes: &[u8]) -> Opening {
    let shared = bytes.len().min(watch::PREFACE.len());
    match bytes[..shared] == watch::PREFACE[..shared] {
        true if shared == watch::PREFACE.len() => Opening::Http2,
        true => Opening::Open,
        false => Opening::Other,
    }
}

/// Streams that a client may have open on one connection: what RFC 9113 §6.5.2 calls the least that
/// is reasonable. More clients than that come over more connections, which workers share.
const STREAMS: u32 = 100;
/// Bytes of a body that may come before anybody takes them: as much as is read ahead of a waiting
/// HTTP/1 body. At 50 ms of round trip a body still comes at 5 MB/s.
const STREAM_WINDOW: u32 = 256 * 1024;
/// All streams' windows, so that bodies that wait for a place do not stop one that has one. What may
/// really lie here is bounded by admission: who is refused loses its bytes at once.
const CONNECTION_WINDOW: u32 = STREAMS * STREAM_WINDOW;
/// Bookkeeping (256 bytes each) for DATA frames smaller than it that lie here unread: 4096 such frames.
const SMALL_FRAMES: usize = 1024 * 1024;
/// Streams that we reset and the client may still send on: remembered for longer than a bad round
/// trip, so that its frames are ignored and not answered.
const REMEMBERED: usize = STREAMS as usize;
const REMEMBERED_FOR: Duration = Duration::from_secs(10);

/// h2's limits, each on purpose. What h2 has no limit for is in [`watch`].
fn settings() -> h2::server::Builder {
    let mut settings = h2::server::Builder::new();
    settings
        .max_concurrent_streams(STREAMS)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        // The least there is: larger frames gain nothing here and hold others up.
        .max_frame_size(16_384)
        // Decoded, with 32 bytes for each field: over it 431, over four times it GOAWAY. It bounds the
        // CONTINUATION frames too (5).
        .max_header_list_size(MAX_HEAD as u32)
        // What a connection's decoder may hold.
        .header_table_size(4096)
        .data_frame_budget(SMALL_FRAMES)
        // Not used for back-pressure: `flow` counts what waits, and when it is out.
        .max_send_buffer_size(flow::MOST_UNSENT)
        // Of those that were reset before we saw them: the watch has counted them all.
        .max_pending_accept_reset_streams(watch::RESETS as usize)
        // The watch counts these together with the client's own, and forgives with time.
        .max_local_error_reset_streams(None)
        .max_concurrent_reset_streams(REMEMBERED)
        .reset_stream_duration(REMEMBERED_FOR);
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_preface_is_http2() {
        assert_eq!(opening(watch::PREFACE), Opening::Http2);
        assert_eq!(opening(&[watch::PREFACE.as_slice(), b"more"].concat()), Opening::Http2);
        for length in 0..watch::PREFACE.len() {
            assert_eq!(opening(&watch::PREFACE[..length]), Opening::Open);
        }
        for other in [&b"POST / HTTP/1.1\r\n"[..], b"G", b"PRI * HTTP/1.1", b"PRI * HTTP/2.0\r\n\r\nXX"] {
            assert_eq!(opening(other), Opening::Other);
        }
    }
}
