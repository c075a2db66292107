//! The data plane: owns every client connection, asks for keys, keeps limits, passes bytes both ways.
//!
//! It starts no engine, reads no configuration file and knows no supervisor but the messages of
//! [`crate::link`]. Listeners are passed in, bound.
//!
//! ```text
//!  client ⇄ tap (framing) ⇄ hyper ⇄ service ─ routes ─ auth ─ admission ─┐
//!                             ▲                                           ▼
//!                             └──────────── answer ◄──── upstream (exchange, decode) ⇄ engine
//! ```

mod accept;
mod answer;
mod auth;
mod call;
mod control;
mod copies;
mod date;
mod direct;
mod error;
mod framing;
#[cfg(fuzzing)]
pub mod fuzzing;
mod headers;
mod http2;
mod line;
mod loads;
mod metrics;
mod own;
pub mod peek;
mod recent;
mod rest;
mod routes;
mod service;
mod sse;
mod state;
mod tap;
mod transport;
mod upstream;
mod websocket;
mod wire;
mod worker;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

pub use control::{End, linked};
pub use state::{Supervision, Timings};
pub use tap::Patience;
pub use transport::identity::{Identity, TlsError};
pub use transport::listener::Listener;
pub use transport::renewal::LOOK as CERTIFICATE_LOOK;

use crate::keys::KeysError;
use crate::link::{EngineView, ProxySettings, Traffic};
use jiff::Timestamp;
use state::{Mode, Shared};
use transport::renewal::Renewal;

/// How often the keys file is looked at: one `stat`, and only where there is a file.
pub const KEYS_LOOK: Duration = Duration::from_secs(2);

/// What keeps a proxy from running.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error(transparent)]
    Keys(#[from] Arc<KeysError>),
    #[error("a worker of the proxy cannot start: {0}")]
    Worker(io::Error),
}

/// A data plane. It knows no engine, and passes nothing, until it is told.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    listeners: Vec<Listener>,
    renewal: Renewal,
    workers: Vec<JoinHandle<io::Result<()>>>,
}

impl Proxy {
    /// A proxy without listeners: to be told what it should know, and then to [`Self::listen`].
    pub fn new(timings: Timings, supervision: Supervision) -> Self {
        Self {
            shared: Shared::new(timings, supervision),
            listeners: Vec::new(),
            renewal: Renewal::default(),
            workers: Vec::new(),
        }
    }

    /// Accepts from now on. Before its first settings the proxy has one worker, so that clients are
    /// answered before anything else is known.
    pub fn listen(&mut self, listeners: Vec<Listener>) -> Result<(), ProxyError> {
        for listener in &listeners {
            listener.set_nonblocking().map_err(ProxyError::Worker)?;
        }
        self.listeners = listeners;
        self.grow(self.shared.snapshot().settings.workers)
    }

    /// Takes new settings, or says why the old ones stay. More workers are started, fewer only by a
    /// new proxy: a thread's connections cannot move.
    pub fn settings(&mut self, settings: ProxySettings) -> Result<(), ProxyError> {
        let workers = settings.workers;
        let read = self.renewal.use_files(settings.listen.tls.as_ref(), &self.shared.connections, Timestamp::now());
        if let Err(error) = read {
            // No reason to refuse the rest: TLS goes on with the old one, or with the next good one.
            tracing::error!("the certificate's files are not used: {error}");
        }
        self.shared.identify(self.renewal.current());
        self.shared.apply(settings)?;
        self.grow(workers)
    }

    /// Reads the certificate anew if its files have changed; to be called each [`CERTIFICATE_LOOK`].
    pub fn look_at_certificate(&mut self) {
        match self.renewal.look(&self.shared.connections, Timestamp::now()) {
            Some(Ok(identity)) => self.shared.identify(Some(identity)),
            Some(Err(error)) => tracing::error!("the new certificate is not used, the old one stays: {error}"),
            None => {}
        }
    }

    /// Whether there are files to look at.
    pub fn has_files(&self) -> bool {
        self.renewal.is_on() || self.shared.snapshot().settings.keys_file.is_some()
    }

    /// What is not as it should be, though the proxy works.
    pub fn warnings(&self) -> &[String] {
        self.renewal.warnings()
    }

    /// Reads the keys anew if their file has changed; none: there is nothing new to say. To be called
    /// each [`KEYS_LOOK`].
    pub fn look_at_keys(&self) -> Option<Result<(), ProxyError>> {
        self.shared.look_at_keys().map(|outcome| outcome.map_err(ProxyError::from))
    }

    fn grow(&mut self, workers: usize) -> Result<(), ProxyError> {
        while !self.listeners.is_empty() && self.workers.len() < workers {
            let listeners: io::Result<Vec<_>> = self.listeners.iter().map(Listener::try_clone).collect();
            let listeners = listeners.map_err(ProxyError::Worker)?;
            let shared = Arc::clone(&self.shared);
            let counters = shared.new_counters();
            let thread = std::thread::Builder::new()
                .name(format!("proxy-{}", self.workers.len()))
                .spawn(move || worker::run(shared, counters, listeners))
                .map_err(ProxyError::Worker)?;
            self.workers.push(thread);
        }
        Ok(())
    }

    /// The supervisor lives.
    pub fn hear(&self) {
        self.shared.hear();
    }

    pub fn engine(&self, view: EngineView) {
        self.shared.engine(view);
    }

    /// Admits nothing more; what is open goes on.
    pub fn drain(&self) {
        self.shared.enter(Mode::Draining);
    }

    /// Ends what is open, saying why.
    pub fn cut_streams(&self, reason: String) {
        self.shared.enter(Mode::Cut(reason));
    }

    /// Waits for the first request since [`Self::rest`].
    async fn stirred(&self) {
        self.shared.rest.stirred().await;
    }

    /// Nobody looks at the traffic for a while.
    fn rest(&self) {
        self.shared.rest.begin();
    }

    pub fn traffic(&self) -> Traffic {
        self.shared.traffic()
    }

    /// The metrics page in Prometheus' text format.
    pub fn metrics(&self) -> String {
        self.shared.metrics()
    }

    /// The last requests that went towards the engine, a line each.
    pub fn recent(&self) -> String {
        self.shared.recent()
    }

    /// Waits until no answer is open, looking this often.
    pub async fn drained(&self) {
        const LOOK: Duration = Duration::from_millis(20);
        while self.traffic().open_answers > 0 || self.traffic().in_flight > 0 {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Closes everything: listeners, connections, threads. Returns when the address is free.
    pub fn close(self) {
        drop(self);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.enter(Mode::Closed);
        for worker in self.workers.drain(..) {
            // A worker's error was its last act, and a panic was already printed.
            let _ = worker.join();
        }
    }
}
