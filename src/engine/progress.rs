//! How far a start has come: the phase in words, a percentage that never goes back, and the time left.
//!
//! ```text
//! importing ─► ranks ─► join ─► load ─► pool ─► capture ─► http ─► warm-up ─► ready
//! ```
//!
//! Facts of the log come in; ranks say the same things one after another, so what counts is the slowest
//! rank where each goes at its own pace (weights, memory), and any rank where they go in step (graphs).
//! A time is only told where this node has seen the same start before (`past`), and a range where it has not
//! (`unknown`, by what is `reading`). Pure: time comes in as data, in milliseconds since the launch. It decides nothing; a start
//! without progress is the supervisor's.

mod past;
mod reading;
mod slow;
mod unknown;

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

pub use past::History;
use past::{Point, Track};
use reading::{Load, Reading};
pub use slow::Slow;
use unknown::Way;
pub use unknown::{Device, Kernels, Known};

use super::log::{Fact, Graphs, Rank};

/// The stages of a start, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Python imports; nothing was said yet.
    Import,
    /// The ranks are processes and import.
    Ranks,
    /// The ranks find each other.
    Join,
    Load,
    /// KV cache, kernels.
    Pool,
    Capture,
    Http,
    WarmUp,
    Ready,
}

/// Where each stage begins, in hundredths of a start nobody has seen before (contract §f).
const STAGES: [(Stage, f32); 9] = [
    (Stage::Import, 0.0),
    (Stage::Ranks, 1.0),
    (Stage::Join, 2.0),
    (Stage::Load, 5.0),
    (Stage::Pool, 60.0),
    (Stage::Capture, 75.0),
    (Stage::Http, 94.0),
    (Stage::WarmUp, 96.0),
    (Stage::Ready, 100.0),
];

/// A start that has said nothing known for so long may be of a version whose words are not known:
/// "importing" would be a guess then.
const SILENT_IMPORT_MS: u64 = 120_000;

/// A place on the way: a stage, and the part of it that is done (0–1).
#[derive(Debug, Clone, Copy, PartialEq)]
struct Place {
    stage: Stage,
    part: f32,
}

impl Eq for Place {}

impl Ord for Place {
    fn cmp(&self, other: &Self) -> Ordering {
        self.stage.cmp(&other.stage).then(self.part.total_cmp(&other.part))
    }
}

impl PartialOrd for Place {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

const fn place(stage: Stage, part: f32) -> Place {
    Place { stage, part }
}

/// One start.
#[derive(Debug, Clone)]
pub struct Progress {
    tp: u32,
    past: Option<History>,
    /// What each rank has said of itself.
    ranks: BTreeMap<Rank, Place>,
    /// What is certain of all of them.
    floor: Place,
    at: Place,
    percent: f32,
    track: Track,
    shards: Option<(u32, u32)>,
    /// A second set of weights is loaded by ranks that had theirs: the draft model's.
    draft: Draft,
    work: Work,
    /// Since when kernels are compiled.
    compiling: Option<u64>,
    known: Known,
    reading: Reading,
    /// The sets of graphs begun so far; how many there will be is not known.
    captures: Vec<Graphs>,
    bar: Option<(u32, u32)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Draft {
    No,
    Loading,
}

/// What goes on between the load and the graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Memory,
    Compile(Option<u8>),
    Tune,
}

impl Progress {
    pub fn new(tp: u32, past: Option<&History>) -> Self {
        Self {
            tp,
            past: past.cloned(),
            ranks: BTreeMap::new(),
            floor: place(Stage::Import, 0.0),
            at: place(Stage::Import, 0.0),
            percent: 0.0,
            track: Track::default(),
            shards: None,
            draft: Draft::No,
            work: Work::Memory,
            compiling: None,
            known: Known::default(),
            reading: Reading::default(),
            captures: Vec::new(),
            bar: None,
        }
    }

    /// What a start that nobody has seen before is measured by.
    pub fn know(&mut self, known: Known) {
        self.known = known;
    }

    /// Shards are read ahead of the engine: so much of so much.
    pub fn read_ahead(&mut self, done: u64, total: u64, now_ms: u64) {
        self.reading.ahead(done, total, now_ms);
    }

    /// The engine's processes have taken so many bytes from disks since they live.
    pub fn stored(&mut self, bytes: u64, now_ms: u64) {
        let load = match self.at.stage {
            Stage::Import | Stage::Ranks | Stage::Join => Load::NotYet,
            Stage::Load => Load::Runs,
            _ => Load::Over,
        };
        self.reading.stored(bytes, load, now_ms);
    }

    /// Takes a fact. `now_ms`: since the launch.
    pub fn observe(&mut self, fact: Fact, rank: Option<Rank>, now_ms: u64) {
        match fact {
            Fact::ArgsResolved => self.all(place(Stage::Ranks, 0.0)),
            Fact::DistInitBegin => self.one(rank, place(Stage::Join, 0.0)),
            Fact::DistInitEnd => {
                // A rendezvous: that one is through proves that all were there.
                self.all(place(Stage::Join, 0.5));
                self.one(rank, place(Stage::Join, 1.0));
            }
            Fact::LoadBegin => {
                if self.place_of(rank).is_some_and(|p| p.stage > Stage::Load) {
                    self.draft = Draft::Loading;
                    self.shards = None;
                }
                self.one(rank, place(Stage::Load, 0.0));
            }
            Fact::Shards { done, total } => self.shard(done, total),
            Fact::LoadEnd { .. } => {
                self.draft = Draft::No;
                self.one(rank, place(Stage::Pool, 0.0));
            }
            Fact::KvPool { .. } => self.one(rank, place(Stage::Pool, 0.3)),
            Fact::MemoryPoolEnd => self.one(rank, place(Stage::Pool, 0.5)),
            Fact::JitCompile { percent } => {
                self.work = Work::Compile(percent);
                self.compiling.get_or_insert(now_ms);
                self.one(rank, place(Stage::Pool, 0.6 + 0.3 * f32::from(percent.unwrap_or(0)) / 100.0));
            }
            Fact::AutotuneBegin => {
                self.work = Work::Tune;
                self.one(rank, place(Stage::Pool, 0.9));
            }
            Fact::AutotuneEnd => {
                self.work = Work::Memory;
                self.one(rank, place(Stage::Pool, 1.0));
            }
            Fact::CaptureBegin(of) => self.capture(of, 0.0),
            Fact::Capture { of, done, total } => {
                self.bar = Some((done, total));
                self.capture(of, done as f32 / total.max(1) as f32);
            }
            Fact::CaptureEnd(of) => self.capture(of, 1.0),
            // Not "captured": graphs may be switched off.
            Fact::SchedulerReady => self.one(rank, place(Stage::Http, 0.0)),
            Fact::EngineTimings => self.all(place(Stage::Http, 0.5)),
            Fact::HttpUp => self.all(place(Stage::WarmUp, 0.0)),
            Fact::WarmupDone if self.at.stage >= Stage::Http => self.all(place(Stage::WarmUp, 0.8)),
            Fact::Ready => self.all(place(Stage::Ready, 1.0)),
            Fact::WarmupDone
            | Fact::PrefillBatch { .. }
            | Fact::DecodeBatch { .. }
            | Fact::Draining
            | Fact::GracefulExit { .. }
            | Fact::HealthTimedOut
            | Fact::Fatal(_) => return,
        }
        self.settle(now_ms);
    }

    /// `/ready` may answer before the line is read, or in a version whose line is not known.
    pub fn ready(&mut self, now_ms: u64) {
        self.observe(Fact::Ready, None, now_ms);
    }

    pub fn stage(&self) -> Stage {
        self.at.stage
    }

    /// The phase in words.
    pub fn phase(&self, now_ms: u64) -> String {
        match self.at.stage {
            Stage::Import if now_ms >= SILENT_IMPORT_MS => "loading".into(),
            Stage::Import => "importing".into(),
            Stage::Ranks if !self.ranks.is_empty() => {
                format!("starting the ranks {}/{}", self.ranks.len(), self.tp)
            }
            Stage::Ranks => "starting the ranks".into(),
            Stage::Join => "joining the ranks".into(),
            _ if self.draft == Draft::Loading => counted("loading draft weights", self.shards),
            Stage::Load => counted("loading weights", self.shards),
            Stage::Pool => match self.work {
                Work::Memory => "allocating the KV cache".into(),
                Work::Compile(None) => "compiling kernels".into(),
                Work::Compile(Some(percent)) => format!("compiling kernels {percent} %"),
                Work::Tune => "tuning kernels".into(),
            },
            Stage::Capture => match self.bar {
                Some((done, total)) => {
                    format!("capturing CUDA graphs {} %", u64::from(done) * 100 / u64::from(total.max(1)))
                }
                None => "capturing CUDA graphs".into(),
            },
            Stage::Http => "starting the HTTP server".into(),
            Stage::WarmUp => "warming up".into(),
            Stage::Ready => "ready".into(),
        }
    }

    /// 0–100, never less than before; none until the engine has said anything known.
    pub fn percent(&self) -> Option<f32> {
        (self.at.stage > Stage::Import).then_some(self.percent)
    }

    /// Seconds until ready, where an earlier start tells; none once this one goes another way.
    pub fn eta_seconds(&self, now_ms: u64) -> Option<u64> {
        if self.at.stage == Stage::Ready {
            return Some(0);
        }
        Some(self.past.as_ref()?.left_ms(&self.track, now_ms)?.div_ceil(1000))
    }

    /// Between how many seconds it may still take, where no earlier start tells. None before anything known
    /// was said: an unknown version may do anything.
    pub fn eta_range_seconds(&self, now_ms: u64) -> Option<RangeInclusive<u64>> {
        if self.at.stage == Stage::Import || self.eta_seconds(now_ms).is_some() {
            return None;
        }
        let since = |ms: u64| now_ms.saturating_sub(ms) as f64 / 1000.0;
        let entered = |stage| self.track.entered(stage);
        let imports = entered(Stage::Join).map(|joined| {
            // A log without the line that begins them: then they are all of the imports.
            let begun = entered(Stage::Ranks).filter(|begun| *begun < joined).unwrap_or(0);
            (joined - begun) as f64 / 1000.0
        });
        unknown::left(&Way {
            stage: self.at.stage,
            spent: since(entered(self.at.stage).unwrap_or(0)),
            done: f64::from(self.at.part),
            compiling: match (self.work, self.compiling) {
                (Work::Compile(percent), Some(begun)) => Some((since(begun), f64::from(percent.unwrap_or(0)) / 100.0)),
                _ => None,
            },
            reading: self.reading.seconds_left(self.known.weights),
            imports,
            tp: self.tp,
            known: self.known,
        })
    }

    /// Why it takes long at present, where that is known.
    pub fn slow(&self) -> Option<Slow> {
        match (self.at.stage, self.work) {
            (Stage::Load, _) => self.reading.cold().map(Slow::ColdWeights),
            (Stage::Pool, Work::Compile(_)) => Some(Slow::Compiling),
            (Stage::Pool, Work::Tune) => Some(Slow::Tuning),
            _ => None,
        }
    }

    /// What this start took, for the next one; none before it is ready.
    pub fn history(&self) -> Option<History> {
        History::of(&self.track)
    }

    fn place_of(&self, rank: Option<Rank>) -> Option<Place> {
        self.ranks.get(&rank.unwrap_or_default()).copied()
    }

    /// A fact about one rank (with a single rank, lines name none).
    fn one(&mut self, rank: Option<Rank>, to: Place) {
        let known = self.ranks.entry(rank.unwrap_or_default()).or_insert(to);
        *known = (*known).max(to);
    }

    /// A fact about all.
    fn all(&mut self, to: Place) {
        self.floor = self.floor.max(to);
    }

    /// The bar is drawn by the first rank, without its name: all that load are taken to be as far.
    fn shard(&mut self, done: u32, total: u32) {
        self.shards = Some((done, total));
        let to = place(Stage::Load, done as f32 / total.max(1) as f32 * 0.98);
        if self.ranks.is_empty() {
            self.all(to);
        }
        for known in self.ranks.values_mut().filter(|known| known.stage == Stage::Load) {
            *known = (*known).max(to);
        }
    }

    /// Graphs are captured in step. How many sets will come is not known, so each takes half of what
    /// is left.
    fn capture(&mut self, of: Graphs, part: f32) {
        let at = match self.captures.iter().position(|known| *known == of) {
            Some(at) => at,
            None if of == Graphs::Unsaid && !self.captures.is_empty() => self.captures.len() - 1,
            None => {
                self.captures.push(of);
                self.captures.len() - 1
            }
        };
        let left = 0.5f32.powi(i32::try_from(at).unwrap_or(i32::MAX));
        self.all(place(Stage::Capture, 1.0 - left + left * 0.5 * part));
    }

    fn settle(&mut self, now_ms: u64) {
        let slowest = self.ranks.values().min().copied();
        // Before they have joined, ranks that have not spoken are behind those that have.
        let slowest =
            slowest.filter(|_| self.floor.stage >= Stage::Join || self.ranks.len() as u64 >= u64::from(self.tp));
        let at = slowest.map_or(self.floor, |slowest| slowest.max(self.floor));
        if at <= self.at {
            return;
        }
        self.track.reached(Point::of(at, now_ms));
        self.at = at;
        self.percent = self.percent.max(self.scaled(at));
    }

    fn scaled(&self, at: Place) -> f32 {
        if at.stage == Stage::Ready {
            return 100.0;
        }
        let percent = if let Some(past) = &self.past {
            past.percent(at)
        } else {
            let from = begin(at.stage);
            let next = STAGES.iter().find(|(stage, _)| *stage > at.stage).map_or(100.0, |(_, begin)| *begin);
            from + (next - from) * at.part
        };
        // 100 is said when it is ready, and not a rounding earlier.
        percent.min(99.0)
    }
}

/// Where a stage begins in a start nobody has seen before.
fn begin(wanted: Stage) -> f32 {
    STAGES.iter().find(|(stage, _)| *stage == wanted).map_or(0.0, |(_, begin)| *begin)
}

fn counted(what: &str, of: Option<(u32, u32)>) -> String {
    of.map_or_else(|| what.to_owned(), |(done, total)| format!("{what} {done}/{total}"))
}

#[cfg(test)]
mod tests;
