//! How far a start is, in words and per cent, for whichever state it is in.
//!
//! The engine's own progress is `engine::progress`; this adds what happens before the engine exists,
//! and keeps what earlier starts took.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::step::State;
use crate::engine::argv::LaunchSpec;
use crate::engine::death::Reached;
use crate::engine::log::Fact;
use crate::engine::progress::{History, Known, Progress, Stage};
use crate::launch::output::Said;
use crate::link::status::WeightsStatus;
use crate::weights::Pace;

/// Earlier starts of one model with one set of flags, in a file of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory(PathBuf);

impl Memory {
    /// What a start is like depends on the command, the model and the flags; not on the port, the
    /// keys or the launch's own folders.
    pub fn of(state: &Path, spec: &LaunchSpec) -> Self {
        let mut hash = Sha256::new();
        let mut skip = false;
        for word in &spec.argv {
            if !std::mem::take(&mut skip) {
                hash.update(word.as_encoded_bytes());
                hash.update([0]);
            }
            skip = word == "--port" || word == "--config";
        }
        for line in spec.yaml.lines().filter(|line| !line.contains("api-key")) {
            hash.update(line.as_bytes());
            hash.update([0]);
        }
        let (name, _) = hash
            .finalize()
            .split_first_chunk::<8>()
            .map(|(first, rest)| (u64::from_be_bytes(*first), rest.len()))
            .expect("a sha256 has 32 bytes");
        Self(state.join("starts").join(format!("{name:016x}.json")))
    }

    /// A file of another kind about the same starts.
    pub fn beside(&self, extension: &str) -> PathBuf {
        self.0.with_extension(extension)
    }

    fn recall(&self) -> Option<History> {
        serde_json::from_slice(&fs::read(&self.0).ok()?).ok()
    }

    /// Best effort: without it the next start has no ETA, and that is all.
    fn keep(&self, history: &History) -> std::io::Result<()> {
        if let Some(folder) = self.0.parent() {
            fs::create_dir_all(folder)?;
        }
        let temporary = self.0.with_extension("new");
        fs::write(&temporary, serde_json::to_vec(history)?)?;
        fs::rename(temporary, &self.0)
    }
}

/// From cold disks imports take up to a minute and a half (measured on two busy cores).
pub const LONGEST_IMPORT: Duration = Duration::from_mins(2);

/// Whether something that was said is progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    Further,
    Old,
}

#[derive(Debug)]
struct Start {
    since: Instant,
    progress: Progress,
    memory: Memory,
}

/// One attempt, from the first look at the cache to readiness.
#[derive(Debug, Default)]
pub struct Loading {
    /// What happens outside the engine's log.
    named: String,
    fetch_eta: Option<u64>,
    /// Bytes read and bytes to read, while what is there is proved.
    proved: Option<(u64, u64)>,
    start: Option<Start>,
}

impl Loading {
    /// Something begins that the engine's log does not speak of.
    pub fn named(&mut self, phase: String) {
        self.named = phase;
    }

    /// Bytes come, or do not.
    pub fn fetching(&mut self, pace: Pace, eta_seconds: Option<u64>) {
        self.named = match pace {
            Pace::Moving => "fetching the weights".into(),
            Pace::Stalled => "fetching the weights (stalled)".into(),
        };
        self.fetch_eta = eta_seconds;
        self.proved = None;
    }

    /// What is there is read and compared.
    pub fn verifying(&mut self, file: &str, done: u64, total: u64) {
        self.named = format!("verifying {file}");
        self.fetch_eta = None;
        self.proved = Some((done, total));
    }

    /// The engine's process exists.
    pub fn launched(&mut self, tp: u32, memory: Memory, known: Known) {
        let mut progress = Progress::new(tp, memory.recall().as_ref());
        progress.know(known);
        self.named.clear();
        self.start = Some(Start { since: Instant::now(), progress, memory });
    }

    /// Takes in what the engine said.
    pub fn heard(&mut self, said: &Said) -> News {
        let Some(start) = &mut self.start else { return News::Old };
        if matches!(said.fact, Fact::Fatal(_) | Fact::PrefillBatch { .. } | Fact::DecodeBatch { .. }) {
            return News::Old;
        }
        start.progress.observe(said.fact, said.rank, start.since.elapsed().as_millis() as u64);
        // Each rank's own step is progress too, though the slowest one sets the percentage.
        News::Further
    }

    /// Shards are read ahead of it.
    pub fn read_ahead(&mut self, done: u64, total: u64) {
        if let Some(start) = &mut self.start {
            start.progress.read_ahead(done, total, start.since.elapsed().as_millis() as u64);
        }
    }

    /// Its processes have taken so many bytes from disks since they live.
    pub fn stored(&mut self, bytes: u64) {
        if let Some(start) = &mut self.start {
            start.progress.stored(bytes, start.since.elapsed().as_millis() as u64);
        }
    }

    /// Ready: what it took is kept for the next start.
    pub fn ready(&mut self) {
        let Some(start) = &mut self.start else { return };
        start.progress.ready(start.since.elapsed().as_millis() as u64);
        if let Some(history) = start.progress.history()
            && let Err(error) = start.memory.keep(&history)
        {
            tracing::debug!("what this start took could not be kept: {error}");
        }
    }

    /// Whether the engine's processes still import: they say nothing and answer to nothing, not even to
    /// their parent's death. Silent for very long, it may be an engine whose words are not known.
    pub fn is_importing(&self) -> bool {
        self.start
            .as_ref()
            .is_some_and(|start| start.progress.stage() <= Stage::Ranks && start.since.elapsed() < LONGEST_IMPORT)
    }

    pub fn phase(&self, state: &State) -> String {
        match (state, &self.start) {
            (State::Loading { .. }, Some(start)) if self.named.is_empty() => {
                start.progress.phase(start.since.elapsed().as_millis() as u64)
            }
            (State::Fetching | State::Preparing | State::Launching | State::Loading { .. }, _) => self.named.clone(),
            _ => String::new(),
        }
    }

    pub fn percent(&self, state: &State, weights: Option<&WeightsStatus>) -> Option<f32> {
        if let (State::Fetching, Some((done, total))) = (state, self.proved.filter(|(_, total)| *total > 0)) {
            return Some((done as f64 / total as f64 * 100.0) as f32);
        }
        match (state, weights, &self.start) {
            (State::Fetching, Some(w), _) if w.total > 0 => Some((w.done as f64 / w.total as f64 * 100.0) as f32),
            // The engine's own 100 is the ready line; here it is not ready before its /health said so.
            (State::Loading { .. }, _, Some(start)) => start.progress.percent().map(|percent| percent.min(99.0)),
            _ => None,
        }
    }

    pub fn eta_seconds(&self, state: &State) -> Option<u64> {
        match (state, &self.start) {
            (State::Fetching, _) => self.fetch_eta,
            (State::Loading { .. }, Some(start)) => {
                start.progress.eta_seconds(start.since.elapsed().as_millis() as u64)
            }
            _ => None,
        }
    }

    /// Between how many seconds it may still take, where no earlier start tells.
    pub fn eta_range_seconds(&self, state: &State) -> Option<[u64; 2]> {
        let (State::Loading { .. }, Some(start)) = (state, &self.start) else { return None };
        let range = start.progress.eta_range_seconds(start.since.elapsed().as_millis() as u64)?;
        Some([*range.start(), *range.end()])
    }

    /// Why the start takes long at present, where that is known; empty where it is not.
    pub fn slow(&self, state: &State) -> String {
        let (State::Loading { .. }, Some(start)) = (state, &self.start) else { return String::new() };
        start.progress.slow().map(|slow| slow.to_string()).unwrap_or_default()
    }

    /// How far the engine came, for the cause of its death.
    pub fn reached(&self) -> Reached {
        match self.start.as_ref().map(|start| start.progress.stage()) {
            None | Some(Stage::Import) => Reached::Nothing,
            Some(Stage::Ranks | Stage::Join) => Reached::Ranks,
            Some(Stage::Load) => Reached::Loading,
            Some(Stage::Pool | Stage::Capture) => Reached::Loaded,
            Some(Stage::Http | Stage::WarmUp) => Reached::Listening,
            Some(Stage::Ready) => Reached::Ready,
        }
    }
}
