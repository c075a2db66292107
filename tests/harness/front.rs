//! The data plane in the test's own process, in front of a fake engine.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use sglangd::keys::hashed;
use sglangd::link::{EngineState, EngineView, ListenSettings, ProxySettings, SizedBy, Upstream};
use sglangd::proxy::{Listener, Patience, Proxy, Supervision, Timings};
use tokio::time::Instant;

use super::engine::Engine;
use super::scene::SOON;

pub struct Front {
    pub addr: SocketAddr,
    pub proxy: Proxy,
}

pub fn settings() -> ProxySettings {
    ProxySettings {
        max: 32,
        target: 10,
        queue: 16,
        sizing: SizedBy::Fixed,
        queue_timeout_ms: 10_000,
        max_body: 1 << 20,
        keys_file: None,
        workers: 1,
        connections: None,
        connections_per_peer: None,
        routes: Vec::new(),
        auth_routes: Vec::new(),
        listen: ListenSettings::default(),
    }
}

pub fn view(state: EngineState, upstream: Option<SocketAddr>) -> EngineView {
    EngineView {
        state,
        phase: String::new(),
        percent: None,
        eta_seconds: None,
        eta_range_seconds: None,
        reason: String::new(),
        upstream: upstream.map(|addr| Upstream { addr, api_key: None, admin_key: None }),
        suspected: false,
        will_return: true,
        hold_ms: 0,
    }
}

impl Front {
    /// A proxy that has been told nothing yet.
    pub fn unaware(timings: Timings) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let mut proxy = Proxy::new(timings, Supervision::Alone);
        proxy.listen(vec![listener.into()]).unwrap();
        Self { addr, proxy }
    }

    /// On these listeners, whose addresses the test knows.
    pub fn on(engine: &Engine, listeners: Vec<Listener>) -> Self {
        let mut proxy = Proxy::new(Timings::default(), Supervision::Alone);
        proxy.settings(settings()).unwrap();
        proxy.engine(view(EngineState::Ready, Some(engine.addr)));
        proxy.listen(listeners).unwrap();
        Self { addr: SocketAddr::from(([0, 0, 0, 0], 0)), proxy }
    }

    pub fn with(engine: &Engine, settings: ProxySettings, timings: Timings) -> Self {
        let mut front = Self::unaware(timings);
        front.proxy.settings(settings).unwrap();
        front.proxy.engine(view(EngineState::Ready, Some(engine.addr)));
        front
    }

    /// With other settings than the usual ones.
    pub fn tuned(engine: &Engine, change: impl FnOnce(&mut ProxySettings)) -> Self {
        let mut settings = settings();
        change(&mut settings);
        Self::with(engine, settings, Timings::default())
    }

    pub fn of(engine: &Engine) -> Self {
        Self::with(engine, settings(), Timings::default())
    }

    /// Waits until so many requests are open towards the engine and so many wait.
    pub fn holds(&self, in_flight: usize, queued: usize) {
        eventually("the proxy's counts are right", || {
            let traffic = self.proxy.traffic();
            (traffic.in_flight, traffic.queued) == (in_flight, queued)
        });
    }

    /// The value of a line of the metrics page.
    pub fn metric(&self, line: &str) -> Option<f64> {
        metric(&self.proxy.metrics(), line)
    }
}

/// The value of a line of a metrics page.
pub fn metric(page: &str, line: &str) -> Option<f64> {
    page.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' ')?.parse().ok())
}

/// Ordinary timings but for how patient the proxy is with clients.
pub fn patience(change: impl FnOnce(&mut Patience)) -> Timings {
    let mut timings = Timings::default();
    change(&mut timings.client);
    timings
}

/// A keys file of lines such as `("ci", "secret", "weight=2")`: a name, a key, what it is granted.
pub fn keys_file(keys: &[(&str, &str, &str)]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(keys_lines(keys).as_bytes()).unwrap();
    file
}

/// What stands in such a file.
pub fn keys_lines(keys: &[(&str, &str, &str)]) -> String {
    let lines = keys.iter().map(|(name, key, granted)| format!("{name} {} {granted} # {name}\n", hashed(key)));
    format!("# keys\n{}", lines.collect::<String>())
}

/// Looks each 2 ms, for as long as a busy machine may take.
#[allow(clippy::disallowed_methods)] // a test's bounded wait, on a thread of its own
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while begun.elapsed() < SOON {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("not within {SOON:?}: {what}");
}
