//! The requests inside the simulated engine: who waits, who runs, who left.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::args::Args;
use super::knobs::Knobs;
use super::loads::Snapshot;

/// Prefills that may be handed over at once; more callers than this wait for a place in line.
const PREFILLS: usize = 4096;

/// SGLang's `ServerStatus`, and the drain beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Starting,
    Up,
    UnHealthy,
    Draining,
}

/// What the HTTP side and the scheduler share.
#[derive(Debug)]
pub struct Engine {
    pub args: Args,
    pub knobs: Knobs,
    status: AtomicU8,
    /// Tokens that any one running stream has been given since the start.
    pub steps: watch::Sender<u64>,
    /// Moves with every batch result, as `last_receive_tstamp` does.
    pub received: AtomicU64,
    pub running: AtomicUsize,
    pub totals: Totals,
    places: Arc<Semaphore>,
    prefills: mpsc::Sender<Prefill>,
    rids: Mutex<BTreeMap<String, CancellationToken>>,
    figures: Mutex<Snapshot>,
}

#[derive(Debug, Default)]
pub struct Totals {
    pub requests: AtomicU64,
    pub aborted: AtomicU64,
    pub prompt: AtomicU64,
    pub generated: AtomicU64,
}

/// Lives as long as its request decodes.
pub type Slot = Arc<()>;

#[derive(Debug)]
pub struct Prefill {
    pub tokens: u64,
    pub slot: std::sync::Weak<()>,
    pub done: oneshot::Sender<()>,
}

impl Engine {
    pub fn new(args: Args, knobs: Knobs) -> (Arc<Self>, mpsc::Receiver<Prefill>) {
        let (prefills, line) = mpsc::channel(PREFILLS);
        let places = args.number("max-running-requests").map_or(48, |n| n as usize).clamp(1, 1 << 16);
        let engine = Self {
            args,
            knobs,
            status: AtomicU8::new(0),
            steps: watch::Sender::new(0),
            received: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            totals: Totals::default(),
            places: Arc::new(Semaphore::new(places)),
            prefills,
            rids: Mutex::default(),
            figures: Mutex::default(),
        };
        (Arc::new(engine), line)
    }

    pub fn status(&self) -> Status {
        match self.status.load(Ordering::Relaxed) {
            0 => Status::Starting,
            1 => Status::Up,
            2 => Status::UnHealthy,
            _ => Status::Draining,
        }
    }

    /// A drain is final.
    pub fn set_status(&self, status: Status) {
        if self.status() != Status::Draining {
            self.status.store(status as u8, Ordering::Relaxed);
        }
    }

    fn rids(&self) -> MutexGuard<'_, BTreeMap<String, CancellationToken>> {
        self.rids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ids of all requests inside, waiting or running.
    pub fn remaining(&self) -> Vec<String> {
        self.rids().keys().cloned().collect()
    }

    pub fn waiting(&self) -> usize {
        self.rids().len().saturating_sub(self.running.load(Ordering::Relaxed))
    }

    /// Writes down how busy it is, as the scheduler does after each batch.
    pub fn publish(&self) {
        let now = Snapshot::of(self);
        *self.figures.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }

    /// What was written down last; an idle scheduler writes all the time.
    pub fn figures(&self) -> Snapshot {
        if self.remaining().is_empty() {
            self.publish();
        }
        *self.figures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends those whose id begins so (SGLang matches by prefix); none: all.
    pub fn abort(&self, prefix: Option<&str>) {
        for (rid, token) in self.rids().iter() {
            if prefix.is_none_or(|prefix| rid.starts_with(prefix)) {
                token.cancel();
            }
        }
    }

    /// Waits for a place and for the prefill. Dropping the future is leaving.
    pub async fn admit(self: &Arc<Self>, rid: String, tokens: u64) -> Option<Request> {
        let aborted = CancellationToken::new();
        self.rids().insert(rid.clone(), aborted.clone());
        self.totals.requests.fetch_add(1, Ordering::Relaxed);
        self.totals.prompt.fetch_add(tokens, Ordering::Relaxed);
        let mut request = Request {
            engine: Arc::clone(self),
            rid,
            aborted,
            slot: Arc::new(()),
            place: None,
            steps: self.steps.subscribe(),
            seen: 0,
            end: End::Aborted,
        };
        let admitted = async {
            request.place = Arc::clone(&self.places).acquire_owned().await.ok();
            self.prefill(tokens, &request.slot).await;
        };
        let aborted = request.aborted.clone();
        tokio::select! {
            () = admitted => {}
            () = aborted.cancelled() => return None,
        }
        request.seen = *request.steps.borrow_and_update();
        Some(request)
    }

    async fn prefill(&self, tokens: u64, slot: &Slot) {
        let (done, prefilled) = oneshot::channel();
        let _ = self.prefills.send(Prefill { tokens, slot: Arc::downgrade(slot), done }).await;
        let _ = prefilled.await;
    }

    /// `/health`: a request of one token, then a look each second whether *any* result came.
    pub async fn probe(&self) -> bool {
        let before = self.received.load(Ordering::Relaxed);
        let slot = Slot::default();
        let (done, _prefilled) = oneshot::channel();
        let _ = self.prefills.try_send(Prefill { tokens: 1, slot: Arc::downgrade(&slot), done });
        drop(slot);
        let mut waited = Duration::ZERO;
        while waited < self.knobs.health_timeout {
            tokio::time::sleep(Duration::from_secs(1)).await;
            waited += Duration::from_secs(1);
            if self.received.load(Ordering::Relaxed) != before {
                return true;
            }
        }
        false
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Finished,
    Aborted,
}

/// A request that decodes. Dropping it before it is finished is an abort.
#[derive(Debug)]
pub struct Request {
    engine: Arc<Engine>,
    pub rid: String,
    aborted: CancellationToken,
    slot: Slot,
    place: Option<OwnedSemaphorePermit>,
    steps: watch::Receiver<u64>,
    /// What of `steps` was given before, or went to this request.
    seen: u64,
    end: End,
}

impl Request {
    /// How many tokens the next steps gave; none: aborted by `/abort_request`.
    pub async fn next(&mut self) -> Option<u64> {
        loop {
            let given = *self.steps.borrow_and_update();
            if given > self.seen {
                let tokens = given - self.seen;
                self.seen = given;
                return Some(tokens);
            }
            tokio::select! {
                changed = self.steps.changed() => changed.ok()?,
                () = self.aborted.cancelled() => return None,
            }
        }
    }

    pub fn finish(&mut self, generated: u64) {
        self.end = End::Finished;
        self.engine.totals.generated.fetch_add(generated, Ordering::Relaxed);
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.engine.rids().remove(&self.rid);
        if self.end == End::Aborted {
            self.engine.totals.aborted.fetch_add(1, Ordering::Relaxed);
        }
    }
}
