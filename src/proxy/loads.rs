//! Looks at the engine's own figures (`/v1/loads`) while requests are open, and sizes the admission by
//! them.
//!
//! One task on one worker, of all of them; it ends with the last request, so an idle proxy asks
//! nothing. A look that fails changes nothing: the engine answers from shared memory without its
//! scheduler, so a slow answer is no news. What the figures mean is [`crate::admission::sizing`]'s.

use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::AcqRel, Ordering::Acquire, Ordering::Release};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::StatusCode;
use serde::Deserialize;
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};

use super::upstream::ask;
use super::upstream::exchange::Failure;
use super::worker::Worker;
use crate::admission::sizing::{Load, Sizing};
use crate::link::{EngineLoad, SizedBy, Upstream};

/// Between two looks, and how long one may take.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks of an heir: the places of a dead proxy's requests are missed by those who wait now.
const LOOK_AS_HEIR: Duration = Duration::from_millis(100);
/// The figures of eight data-parallel ranks are some 10 KiB.
const MOST: usize = 1 << 20;
const TARGET: &str = "/v1/loads?include=core";

/// Whether somebody looks, and what was seen.
#[derive(Debug, Default)]
pub struct Loads {
    looking: AtomicBool,
    /// This proxy found the engine serving and has to look before anything is admitted.
    inherits: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    sizing: Sizing,
    /// The ranks' times in the last answer; the same again is old news.
    stamps: Vec<f64>,
    seen: Option<EngineLoad>,
    /// An engine that has no such route is not asked again.
    without: Option<Upstream>,
}

impl Loads {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was seen last.
    pub fn seen(&self) -> Option<EngineLoad> {
        self.inner().seen
    }

    /// Another engine is coming: nothing that was seen is true any more.
    pub fn forget(&self) {
        *self.inner() = Inner::default();
    }

    /// What the engine runs may be a dead proxy's: nothing is to be admitted before one look.
    pub fn inherit(&self) {
        self.inner().sizing = Sizing::heir();
        self.inherits.store(true, Release);
    }

    pub fn is_inheriting(&self) -> bool {
        self.inherits.load(Acquire)
    }
}

/// Begins to look, if nobody does. To be called with every admission, and with every change of what is
/// known of the engine.
pub fn keep_looking(worker: &Rc<Worker>) {
    let loads = &worker.shared.loads;
    if !loads.looking.load(Acquire) && worker.shared.sizing() == SizedBy::Engine && !loads.looking.swap(true, AcqRel) {
        spawn_local(watch(Rc::clone(worker)));
    }
}

async fn watch(worker: Rc<Worker>) {
    let shared = &worker.shared;
    let loads = &shared.loads;
    if loads.is_inheriting() {
        look(&worker).await;
        loads.inherits.store(false, Release);
        shared.opened();
    }
    loop {
        let is_heir = loads.inner().sizing.is_heir();
        sleep(if is_heir { LOOK_AS_HEIR } else { LOOK }).await;
        if shared.sizing() == SizedBy::Engine && !is_idle(&worker) {
            look(&worker).await;
            continue;
        }
        shared.admission.set_ceiling(usize::MAX);
        {
            let mut inner = loads.inner();
            inner.sizing = Sizing::default();
            inner.seen = inner.seen.map(|_| EngineLoad::default());
        }
        loads.looking.store(false, Release);
        // Somebody may have come since who saw that somebody looks.
        if shared.sizing() != SizedBy::Engine || is_idle(&worker) || loads.looking.swap(true, AcqRel) {
            return;
        }
    }
}

fn is_idle(worker: &Worker) -> bool {
    let counts = worker.shared.admission.counts();
    counts.open == 0 && counts.waiting == 0 && !worker.shared.loads.inner().sizing.is_heir()
}

/// One look, and what follows from it.
async fn look(worker: &Worker) {
    let shared = &worker.shared;
    let snapshot = shared.snapshot();
    let Some(engine) = snapshot.engine.as_ref().and_then(|view| view.upstream.as_ref()) else { return };
    if shared.loads.inner().without.as_ref() == Some(engine) {
        return;
    }
    let answer = match timeout(LOOK, ask::get(engine, TARGET, MOST)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            if matches!(&error, Failure::Unreachable(why) if why.kind() == io::ErrorKind::ConnectionRefused) {
                // Nobody is there who could still run a dead proxy's requests.
                shared.loads.inner().sizing = Sizing::default();
            }
            return tracing::debug!("the engine did not tell its load: {error}");
        }
        Err(_) => return tracing::debug!("the engine did not tell its load within {} s", LOOK.as_secs()),
    };
    let figures = match answer.status {
        StatusCode::OK => serde_json::from_slice::<Figures>(&answer.body).ok().filter(|found| !found.loads.is_empty()),
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => None,
        // It cannot right now.
        _ => return,
    };
    let mut inner = shared.loads.inner();
    let Some(figures) = figures else {
        tracing::info!("the engine has no {TARGET}: limits.max alone bounds what it gets");
        inner.without = Some(engine.clone());
        inner.sizing = Sizing::default();
        return;
    };
    let stamps: Vec<f64> = figures.loads.iter().map(|rank| rank.timestamp).collect();
    let is_news = stamps != inner.stamps || stamps.contains(&0.0);
    inner.stamps = stamps;
    inner.seen = Some(figures.seen());
    if is_news {
        let open = shared.admission.counts().open;
        let places = inner.sizing.look(figures.load(), open, snapshot.settings.max);
        drop(inner);
        shared.admission.set_ceiling(places);
    }
}

/// The answer to [`TARGET`], as far as it is of use: one entry a data-parallel rank.
#[derive(Debug, Deserialize)]
struct Figures {
    #[serde(default)]
    loads: Vec<Rank>,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
struct Rank {
    /// When the rank wrote this down; 0: not said.
    timestamp: f64,
    num_running_reqs: usize,
    num_waiting_reqs: usize,
    max_running_requests: usize,
    token_usage: f64,
}

impl Default for Rank {
    fn default() -> Self {
        Self { timestamp: 0.0, num_running_reqs: 0, num_waiting_reqs: 0, max_running_requests: 0, token_usage: 0.0 }
    }
}

impl Figures {
    fn sum(&self, pick: fn(&Rank) -> usize) -> usize {
        self.loads.iter().map(pick).fold(0, usize::saturating_add)
    }

    fn load(&self) -> Load {
        Load {
            running: self.sum(|rank| rank.num_running_reqs),
            waiting: self.sum(|rank| rank.num_waiting_reqs),
            most: self.sum(|rank| rank.max_running_requests),
        }
    }

    fn seen(&self) -> EngineLoad {
        let Load { running, waiting, .. } = self.load();
        // The fullest rank is the one that queues.
        let usage = self.loads.iter().map(|rank| rank.token_usage).fold(0.0, f64::max);
        EngineLoad { running, waiting, kv_percent: (usage.clamp(0.0, 1.0) * 100.0).round() as u8 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_added_up_and_the_fullest_one_counts() {
        let text = r#"{"timestamp": "2026-11-23T14:10:28+00:00", "version": "0.5.23", "loads": [
            {"dp_rank": 0, "timestamp": 12.5, "num_running_reqs": 3, "num_waiting_reqs": 1, "max_running_requests": 32,
             "token_usage": 0.41, "decode_moments": null, "memory": {"weight_gb": 1.0}},
            {"dp_rank": 1, "timestamp": 12.6, "num_running_reqs": 4, "num_waiting_reqs": 0, "max_running_requests": 32,
             "token_usage": 0.9}]}"#;
        let figures: Figures = serde_json::from_str(text).unwrap();
        assert_eq!(figures.load(), Load { running: 7, waiting: 1, most: 64 });
        assert_eq!(figures.seen(), EngineLoad { running: 7, waiting: 1, kv_percent: 90 });
    }
}
