//! The messages between the supervisor and the proxy: the only thing the two halves share.
//!
//! Supervisor and proxy are two processes on one `AF_UNIX` socketpair. Each message is one line of
//! JSON, at most [`MAX_MESSAGE`] bytes. Down go the engine's state and the proxy's settings, up go
//! facts about traffic. The end of the link is the end of the proxy.
//!
//! This module does not know what either side does with a message.

pub mod routes;
pub mod status;
mod wire;

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use wire::{LinkError, Reader, Writer, pair, split};

/// Longest line either side accepts, in bytes. A metrics page of a busy proxy is some tens of KiB;
/// four MiB says "something is broken" long before memory does.
pub const MAX_MESSAGE: usize = 4 << 20;

/// How often the supervisor sends a message even when nothing changed, so that the proxy can tell a
/// live supervisor from a stuck one (`GET /live`).
pub const HEARTBEAT: std::time::Duration = std::time::Duration::from_secs(1);

/// The states of the engine's life as everybody outside the supervisor sees them.
///
/// The names are those of `GET /status` and of the state machine's diagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EngineState {
    Fetching,
    Preparing,
    Launching,
    Loading,
    Ready,
    Busy,
    Asleep,
    Failing,
    Draining,
    Stopping,
    Reaping,
    Releasing,
    Unkillable,
    /// Somebody else holds the GPUs.
    Occupied,
    Backoff,
    GaveUp,
    Stopped,
}

impl EngineState {
    /// The name in `GET /status`, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fetching => "fetching",
            Self::Preparing => "preparing",
            Self::Launching => "launching",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Busy => "busy",
            Self::Asleep => "asleep",
            Self::Failing => "failing",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Reaping => "reaping",
            Self::Releasing => "releasing",
            Self::Unkillable => "unkillable",
            Self::Occupied => "occupied",
            Self::Backoff => "backoff",
            Self::GaveUp => "gave_up",
            Self::Stopped => "stopped",
        }
    }

    /// Whether requests may pass to the engine.
    pub fn gate(self) -> Gate {
        match self {
            Self::Ready | Self::Busy => Gate::Open,
            _ => Gate::Closed,
        }
    }
}

/// Whether requests may pass to the engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Gate {
    Open,
    #[default]
    Closed,
}

/// What the proxy knows of the engine: enough to pass traffic, or to say truthfully why not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EngineView {
    pub state: EngineState,
    /// The phase of a start in words ("loading weights 12/64"); empty when there is none.
    pub phase: String,
    /// Progress of a start, 0–100, never going back within one start.
    pub percent: Option<f32>,
    /// Seconds until ready, as far as anybody can say.
    pub eta_seconds: Option<u64>,
    /// The least and the most seconds until ready, where nothing tells more (a first start).
    #[serde(default)]
    pub eta_range_seconds: Option<[u64; 2]>,
    /// Why the engine is not serving, in one sentence; empty when it is.
    pub reason: String,
    /// Where the engine listens, once it does.
    pub upstream: Option<Upstream>,
    /// Set while a hang is suspected: `/ready` answers 503, traffic goes on.
    pub suspected: bool,
    /// Whether this engine, or its successor, is expected to serve (again): false once sglangd gave
    /// up or stops for good.
    pub will_return: bool,
    /// How long a request may be held for it, in milliseconds; 0: answered 503 at once. Longer over a
    /// restart than over a first start, so the supervisor decides.
    pub hold_ms: u64,
}

/// The engine's private address and the key made for this start.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upstream {
    pub addr: SocketAddr,
    /// Sent to the engine as `Authorization: Bearer`; never shown to anybody.
    pub api_key: Option<String>,
    /// Opens the engine's operator routes. It stays with the supervisor: the proxy parses what
    /// strangers send, and never learns it.
    #[serde(skip)]
    pub admin_key: Option<String>,
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstream").field("addr", &self.addr).finish_non_exhaustive()
    }
}

/// What of the configuration the proxy lives by. Sent at its start and again on every reload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProxySettings {
    /// Requests open towards the engine at once.
    pub max: usize,
    /// Requests in flight that the node should carry: exported as the scaling signal, no limit.
    pub target: usize,
    /// Requests that may wait for a place.
    pub queue: usize,
    /// What bounds the requests that are open, beside `max`.
    pub sizing: SizedBy,
    /// How long a request may wait for a place, in milliseconds.
    pub queue_timeout_ms: u64,
    /// Largest request body, in bytes.
    pub max_body: u64,
    /// File of named API keys; none: the public listener asks for no key.
    pub keys_file: Option<PathBuf>,
    /// Worker threads.
    pub workers: usize,
    /// Clients' connections that may be open; none: as many as descriptors allow.
    #[serde(default)]
    pub connections: Option<usize>,
    /// Of one client's address; none: any number.
    #[serde(default)]
    pub connections_per_peer: Option<usize>,
    /// Routes beside the usual ones, and those that are closed.
    #[serde(default)]
    pub routes: Vec<routes::Rule>,
    /// Routes that ask for a key though they usually do not, and those that do not though they do.
    #[serde(default)]
    pub auth_routes: Vec<routes::Rule>,
    /// What comes under HTTP on the public side.
    pub listen: ListenSettings,
}

/// What bounds the requests that are open, beside their limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SizedBy {
    /// What the engine says it can take.
    Engine,
    /// Nothing.
    Fixed,
}

/// How clients' connections are spoken before HTTP begins.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenSettings {
    /// None: the public address speaks plain HTTP.
    pub tls: Option<TlsFiles>,
    #[serde(default)]
    pub proxy_protocol: ProxyProtocol,
    /// Whether clients may speak HTTP/2 as well.
    #[serde(default)]
    pub http2: Http2,
}

/// Whether HTTP/2 is spoken beside HTTP/1.1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Http2 {
    #[default]
    On,
    Off,
}

/// Whether connections to the public address begin with a header of the PROXY protocol, version 2.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProxyProtocol {
    /// None is expected: one that comes is no HTTP, and refused as such.
    #[default]
    Off,
    /// Nothing passes without it.
    Require,
}

/// Where the server's certificate and key lie, as PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsFiles {
    /// The chain, the server's own certificate first.
    pub cert: PathBuf,
    pub key: PathBuf,
    pub expired: Expired,
}

/// What becomes of a certificate that is past its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expired {
    /// Used, and said loudly: clients decide.
    #[default]
    Warned,
    /// Not used.
    Refused,
}

/// From the supervisor to the proxy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Down {
    Settings(ProxySettings),
    Engine(EngineView),
    /// Admit nothing more; finish what is open.
    Drain,
    /// End every open stream now with an error event and no `[DONE]`.
    CutStreams {
        reason: String,
    },
    /// Send the metrics page.
    Scrape {
        id: u64,
    },
    /// Send the last requests' ids; answered as a scrape is.
    Recent {
        id: u64,
    },
    Heartbeat,
}

/// From the proxy to the supervisor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Up {
    /// First message: the proxy accepts connections.
    Hello {
        pid: u32,
        version: String,
    },
    Traffic(Traffic),
    /// The text that was asked for under this number.
    Scraped {
        id: u64,
        text: String,
    },
    /// There is something the proxy cannot live by (a broken keys file); it goes on with what it had.
    Refused {
        reason: String,
    },
    /// What is not as it should be, though it works (a certificate that ends soon); replaces what was
    /// said before.
    Warnings {
        warnings: Vec<String>,
    },
    /// What was refused is in order again, and in use.
    Recovered,
}

/// Facts about traffic, sent at most each 100 ms while they change and each second otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Requests open towards the engine.
    pub in_flight: usize,
    /// Requests waiting for a place or for the engine.
    pub queued: usize,
    /// Client connections that still carry an answer.
    pub open_answers: usize,
    /// Bytes of an engine's answer last passed on, milliseconds ago; none: never.
    pub last_byte_ms: Option<u64>,
    /// Last request seen, milliseconds ago; none: never.
    pub last_request_ms: Option<u64>,
    /// Requests answered by the engine since the proxy's start.
    pub served: u64,
    /// WebSockets open; each holds a place.
    #[serde(default)]
    pub websockets: usize,
    /// Connections to the engine that were refused or broke since the proxy's start.
    pub upstream_errors: u64,
    /// Requests that may be open at present: the limit, or less while the engine can take no more.
    pub room: usize,
    /// What the engine last said of itself; none: it was not asked, or does not tell.
    pub engine: Option<EngineLoad>,
    /// No request is let through to the engine at present.
    #[serde(default)]
    pub closed: bool,
}

/// The engine's own figures (`/v1/loads`), over all its ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineLoad {
    /// Requests that it computes.
    pub running: usize,
    /// Requests in its own queue.
    pub waiting: usize,
    /// Of the KV cache, on the fullest rank.
    pub kv_percent: u8,
}
