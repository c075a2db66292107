//! What all workers know: settings, keys, the engine, and whether the proxy still admits.
//!
//! One immutable [`Snapshot`] at a time, replaced whole; a request looks at one and the same from its
//! beginning to its admission. It starts and binds nothing.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::auth::{KeyRing, KeysFile, Roster};
use super::copies::Copies;
use super::loads::Loads;
use super::metrics::{self, Counters, Gauges};
use super::recent;
use super::rest::Rest;
use super::routes::Table;
use super::tap::Patience;
use super::transport::counts::Counts;
use super::transport::crowd::Crowd;
use super::transport::identity::Identity;
use crate::admission::{Admission, Limits};
use crate::keys::KeysError;
use crate::link::{EngineView, Gate, ListenSettings, ProxySettings, SizedBy, Traffic};

/// Whether requests are admitted, and what becomes of those that were.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    Serving,
    /// Nothing new; what is open ends in its own time.
    Draining,
    /// What is open ends now, saying why.
    Cut(String),
    /// The workers end.
    Closed,
}

/// Who tells the proxy about the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Supervision {
    /// A supervisor, heard of each second.
    Linked,
    /// Nobody: the engine is taken to be ready.
    Alone,
}

/// How patient the proxy is. Not part of the configuration; tests shorten it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timings {
    pub client: Patience,
    /// An engine silent for this long in mid-answer has lost the answer. Longer than any prefill:
    /// native streams send their head before it.
    pub engine_silence: Duration,
    /// An engine that takes no connection is dead, or as good as that; its supervisor says so within this, or will not.
    pub engine_news: Duration,
    /// A client whose stream says nothing for this long is told that it is still there, the first time
    /// by the beginning of an answer that the engine has not begun. Well below what balancers and
    /// gateways allow a silent connection (60 s mostly).
    pub keep_alive: Duration,
    /// A WebSocket in which no message passes for this long is closed: it holds a place.
    pub websocket_idle: Duration,
    /// A supervisor that said nothing for this long is stuck: it speaks each second.
    pub supervisor_silence: Duration,
    /// Handshakes that one worker has under way at most.
    pub handshakes: usize,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            client: Patience::default(),
            engine_silence: Duration::from_mins(15),
            engine_news: Duration::from_secs(2),
            keep_alive: Duration::from_secs(15),
            websocket_idle: Duration::from_mins(10),
            supervisor_silence: Duration::from_secs(10),
            handshakes: 512,
        }
    }
}

#[derive(Debug, Clone)]
pub struct Snapshot {
    pub settings: ProxySettings,
    pub routes: Arc<Table>,
    /// None: no key is asked for.
    pub keys: Option<Arc<KeyRing>>,
    /// None: no certificate is wanted, or none can be used.
    pub identity: Option<Arc<Identity>>,
    /// None: nothing is known yet.
    pub engine: Option<EngineView>,
    pub mode: Mode,
}

/// What lives as long as the proxy.
#[derive(Debug)]
pub struct Shared {
    snapshot: watch::Sender<Arc<Snapshot>>,
    pub admission: Admission,
    /// What happened to connections before HTTP.
    pub connections: Counts,
    pub crowd: Crowd,
    /// Wakes the workers whose idle connections are to make room.
    pub pressure: watch::Sender<u64>,
    pub timings: Timings,
    pub supervision: Supervision,
    pub loads: Loads,
    pub copies: Copies,
    pub rest: Rest,
    roster: Roster,
    /// What was said last, whether it could be lived by or not.
    wanted: Mutex<Wanted>,
    workers: Mutex<Vec<Arc<Counters>>>,
    epoch: Instant,
    /// When the supervisor was last heard of, in milliseconds of [`Self::stamp`].
    heard: AtomicU64,
}

#[derive(Debug)]
struct Wanted {
    settings: ProxySettings,
    keys_file: Option<KeysFile>,
    /// What stands in the way of the settings.
    complaint: Option<Arc<KeysError>>,
}

/// Settings before the first message: nothing passes, so nothing needs room.
fn no_settings() -> ProxySettings {
    ProxySettings {
        max: 0,
        target: 0,
        queue: 0,
        sizing: SizedBy::Fixed,
        queue_timeout_ms: 0,
        max_body: u64::MAX, // nothing is read before there is a place
        keys_file: None,
        workers: 1,
        connections: None,
        connections_per_peer: None,
        routes: Vec::new(),
        auth_routes: Vec::new(),
        listen: ListenSettings::default(),
    }
}

impl Shared {
    pub fn new(timings: Timings, supervision: Supervision) -> Arc<Self> {
        let settings = no_settings();
        let wanted = Wanted { settings: settings.clone(), keys_file: None, complaint: None };
        let routes = Arc::default();
        let snapshot = Snapshot { settings, routes, keys: None, identity: None, engine: None, mode: Mode::Serving };
        Arc::new(Self {
            snapshot: watch::Sender::new(Arc::new(snapshot)),
            admission: Admission::new(Limits { max: 0, queue: 0 }, Gate::Closed),
            connections: Counts::default(),
            crowd: Crowd::default(),
            pressure: watch::Sender::new(0),
            timings,
            supervision,
            loads: Loads::default(),
            copies: Copies::default(),
            rest: Rest::default(),
            roster: Roster::default(),
            wanted: Mutex::new(wanted),
            workers: Mutex::default(),
            epoch: Instant::now(),
            heard: AtomicU64::new(1),
        })
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }

    pub fn changes(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.subscribe()
    }

    fn change(&self, change: impl FnOnce(&mut Snapshot)) {
        self.snapshot.send_modify(|snapshot| change(Arc::make_mut(snapshot)));
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// New settings, or the reason why the old ones stay.
    pub fn apply(&self, settings: ProxySettings) -> Result<(), Arc<KeysError>> {
        let mut wanted = self.wanted();
        wanted.settings = settings;
        self.attempt(&mut wanted)
    }

    fn attempt(&self, wanted: &mut Wanted) -> Result<(), Arc<KeysError>> {
        (wanted.keys_file, wanted.complaint) = (None, None);
        let keys = match &wanted.settings.keys_file {
            None => None,
            Some(path) => {
                let (file, ring) = KeysFile::read(path, &self.roster);
                wanted.keys_file = Some(file);
                Some(Arc::new(ring.map_err(|error| Arc::clone(wanted.complaint.insert(Arc::new(error))))?))
            }
        };
        let settings = wanted.settings.clone();
        let limits = Limits { max: settings.max, queue: settings.queue };
        let routes = Arc::new(Table::new(&settings.routes, &settings.auth_routes));
        self.change(|snapshot| {
            snapshot.settings = settings;
            snapshot.routes = routes;
            snapshot.keys = keys;
        });
        self.admission.set_limits(limits);
        Ok(())
    }

    /// Who the server is to TLS clients from now on.
    pub fn identify(&self, identity: Option<Arc<Identity>>) {
        self.change(|snapshot| snapshot.identity = identity);
    }

    /// Reads the keys anew if their file has changed since it was read; none: there is nothing new to
    /// say. A file that could not be read is tried again each time, since nothing tells when it can be.
    pub fn look_at_keys(&self) -> Option<Result<(), Arc<KeysError>>> {
        let mut wanted = self.wanted();
        let path = wanted.settings.keys_file.as_deref()?;
        let unreadable = matches!(wanted.complaint.as_deref(), Some(KeysError::Unreadable { .. }));
        if !unreadable && !wanted.keys_file.as_ref()?.has_changed(path) {
            return None;
        }
        let before = wanted.complaint.as_deref().map(ToString::to_string);
        match self.attempt(&mut wanted) {
            Err(error) if before.as_deref() == Some(error.to_string().as_str()) => None,
            outcome => Some(outcome),
        }
    }

    /// Whether the keys in use are older than their file.
    fn keys_are_stale(&self) -> bool {
        self.wanted().complaint.is_some()
    }

    pub fn engine(&self, view: EngineView) {
        let before = self.snapshot();
        let was = before.engine.as_ref().map(|view| &view.upstream);
        if before.engine.is_none() && view.state.gate() == Gate::Open && self.sizing() == SizedBy::Engine {
            self.loads.inherit();
        } else if was != Some(&view.upstream) {
            self.loads.forget();
            self.admission.set_ceiling(usize::MAX);
        }
        self.change(|snapshot| snapshot.engine = Some(view));
        self.opened();
    }

    /// Opens or closes the way to the engine, by what is known of it.
    pub fn opened(&self) {
        let snapshot = self.snapshot();
        let Some(view) = snapshot.engine.as_ref().filter(|_| snapshot.mode == Mode::Serving) else { return };
        let gate = if self.loads.is_inheriting() { Gate::Closed } else { view.state.gate() };
        self.admission.set_gate(gate);
        if view.state.gate() == Gate::Closed && !view.will_return {
            self.admission.turn_everybody_away();
        }
    }

    /// What bounds the open requests beside their limit.
    pub fn sizing(&self) -> SizedBy {
        self.snapshot.borrow().settings.sizing
    }

    pub fn enter(&self, mode: Mode) {
        self.change(|snapshot| snapshot.mode = mode);
        self.admission.set_gate(Gate::Closed);
        self.admission.turn_everybody_away();
    }

    /// Counts of a new worker.
    pub fn new_counters(&self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&counters));
        counters
    }

    /// A moment as a number that is never zero.
    pub fn stamp(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.epoch).as_millis() as u64 + 1
    }

    pub fn hear(&self) {
        self.heard.store(self.stamp(Instant::now()), Relaxed);
    }

    /// How long ago the supervisor was heard of.
    pub fn silence(&self) -> Duration {
        Duration::from_millis(self.stamp(Instant::now()).saturating_sub(self.heard.load(Relaxed)))
    }

    pub fn traffic(&self) -> Traffic {
        let now = self.stamp(Instant::now());
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |pick: fn(&Counters) -> &AtomicU64| workers.iter().map(|w| pick(w).load(Relaxed)).sum::<u64>();
        let ago = |pick: fn(&Counters) -> &AtomicU64| {
            let last = workers.iter().map(|w| pick(w).load(Relaxed)).max().filter(|last| *last > 0)?;
            Some(now.saturating_sub(last))
        };
        let counts = self.admission.counts();
        Traffic {
            in_flight: counts.open,
            queued: counts.waiting,
            open_answers: usize::try_from(sum(|w| &w.open_answers)).unwrap_or(usize::MAX),
            last_byte_ms: ago(|w| &w.last_byte),
            last_request_ms: ago(|w| &w.last_request),
            served: sum(|w| &w.served),
            websockets: usize::try_from(sum(|w| &w.websockets)).unwrap_or(usize::MAX),
            upstream_errors: sum(|w| &w.upstream_errors),
            room: counts.room,
            engine: self.loads.seen(),
            closed: counts.gate == Gate::Closed,
        }
    }

    pub fn recent(&self) -> String {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        recent::told(&workers, Instant::now())
    }

    pub fn metrics(&self) -> String {
        let snapshot = self.snapshot();
        let counts = self.admission.counts();
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let gauges = Gauges {
            busy: self.admission.busy(),
            in_flight: counts.open,
            queued: counts.waiting,
            max: snapshot.settings.max,
            room: counts.room,
            engine: self.loads.seen(),
            target: snapshot.settings.target,
            queue: snapshot.settings.queue,
            workers: workers.len(),
            keys_stale: usize::from(self.keys_are_stale()),
        };
        let mut page = metrics::page(&workers, &gauges, &self.roster.names());
        let not_after = snapshot.identity.as_ref().and_then(|identity| identity.not_after());
        self.connections.write(not_after.map(jiff::Timestamp::as_second), &mut page);
        page
    }
}
