//! Remembers an engine's signs of life, and who waits for one. Pure: time comes in as data.
//!
//! ```text
//! tokens ┐                                   ┌ somebody waits: an open request, a probe that is not answered
//! batch  ┤                                   │
//! figures├─► the last sign of life ─► silence ◄── counted from the later of the two ─► verdict
//! kernels┤                                   │
//! probe  ┘                                   └ a process that is stopped waits for nobody: at once
//! ```
//!
//! It asks nothing itself: it says when a probe or a look is due, and is told what came of it.

use std::time::Duration;

use super::figures::News;
use super::verdict::{self, Evidence, LastProbe, Verdict};

/// Monotonic time in milliseconds since some fixed instant.
pub type Millis = u64;

/// What only a working engine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// A byte of an answer passed the proxy.
    Token,
    /// A "Prefill batch" or "Decode batch" line.
    Batch,
    /// `/v1/loads` moved.
    Figures,
    /// A compiler ran, or a kernel cache grew.
    Kernel,
}

impl Sign {
    const COUNT: usize = 4;
}

/// Without tokens and batches for so long, while somebody waits, it is looked for other signs: figures and
/// compilers. Often enough that two looks come before a hang is suspected.
const LOOK_AFTER: Duration = Duration::from_secs(5);
/// Figures are read so often then: a chunk of a prefill that takes 25 s must be seen to end before its silence
/// is suspected.
const READ_EVERY: Duration = Duration::from_secs(2);

/// The figures are being read while the last reading is no older than this.
const READ_LATELY: Duration = Duration::from_secs(15);

/// One engine, from its launch on.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    signs: [Option<Millis>; Sign::COUNT],
    /// Since when requests have been open without a break.
    requests_since: Option<Millis>,
    probe: Probe,
    /// Since when one of its processes is stopped.
    stopped_since: Option<Millis>,
    /// The figures were the same in all readings from the first to the second time.
    still: Option<(Millis, Millis)>,
    /// When a probe was answered 200 although they stood still before and after.
    lied: Option<Millis>,
    looked: Option<Millis>,
    /// When a reading of the figures was last begun.
    reads: Option<Millis>,
    /// When one last came.
    read: Option<Millis>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Probe {
    /// When one was last sent.
    asked: Option<Millis>,
    under_way: Asked,
    /// Since when none has passed although one was sent.
    unanswered_since: Option<Millis>,
    /// When one was last answered 200.
    passed: Option<Millis>,
    last: LastProbe,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Asked {
    #[default]
    No,
    Yes,
}

impl Watch {
    /// A sign of life. An older one than is known changes nothing.
    pub fn sign(&mut self, sign: Sign, at: Millis) {
        let known = &mut self.signs[sign as usize];
        *known = Some(known.map_or(at, |known| known.max(at)));
    }

    /// How many requests are open towards the engine.
    pub fn requests(&mut self, open: usize, now: Millis) {
        if open == 0 {
            self.requests_since = None;
        } else {
            self.requests_since.get_or_insert(now);
        }
    }

    /// A probe is on its way: it waits, too.
    pub fn asked(&mut self, now: Millis) {
        self.probe.asked = Some(now);
        self.probe.under_way = Asked::Yes;
        self.probe.unanswered_since.get_or_insert(now);
    }

    pub fn passed(&mut self, now: Millis) {
        self.probe.passed = Some(now);
        self.probe.asked.get_or_insert(now);
        self.probe.unanswered_since = None;
        self.probe.under_way = Asked::No;
        self.probe.last = LastProbe::Passed;
    }

    pub fn failed(&mut self) {
        self.probe.under_way = Asked::No;
        self.probe.last = LastProbe::Failed;
    }

    pub fn stopped(&mut self, now: Millis) {
        self.stopped_since.get_or_insert(now);
    }

    pub fn running(&mut self) {
        self.stopped_since = None;
    }

    /// A look at its processes begins.
    pub fn looks(&mut self, now: Millis) {
        self.looked = Some(now);
    }

    /// A reading of its figures begins.
    pub fn reads(&mut self, now: Millis) {
        self.reads = Some(now);
    }

    /// What a reading of the figures told.
    pub fn figures(&mut self, news: News, now: Millis) {
        let before = self.read.replace(now);
        match news {
            News::First => self.still = Some((now, now)),
            News::Moved(ago) => {
                // Since the reading before, whatever the clocks say; without a stamp no more than that is proven.
                let before = before.unwrap_or(now);
                let at = ago.map_or(before, |ago| now.saturating_sub(ago.as_millis() as Millis));
                self.sign(Sign::Figures, at.clamp(before, now));
                self.still = Some((now, now));
            }
            News::Still => {
                let from = self.still.map_or(now, |(from, _)| from);
                self.still = Some((from, now));
                if self.requests_since.is_some() && self.probe.passed.is_some_and(|at| from <= at && at < now) {
                    self.lied = self.probe.passed;
                }
            }
            News::Unstamped => self.still = None,
        }
        if news != News::Still {
            self.lied = None;
        }
    }

    /// Nobody looked for a while (we were stopped): what seemed silent may only not have been heard.
    pub fn begin_anew(&mut self, now: Millis) {
        for since in
            [&mut self.probe.asked, &mut self.probe.unanswered_since, &mut self.requests_since, &mut self.stopped_since]
        {
            *since = since.map(|_| now);
        }
        self.still = None;
    }

    fn age(since: Option<Millis>, now: Millis) -> Option<Duration> {
        since.map(|since| Duration::from_millis(now.saturating_sub(since)))
    }

    fn waiting(&self, now: Millis) -> Option<Duration> {
        [self.requests_since, self.probe.unanswered_since].into_iter().filter_map(|since| Self::age(since, now)).max()
    }

    /// Whether `/health` said 200 while no scheduler did anything (sglang#6624): a probe that passes has
    /// gone through a batch, and after a batch the figures are written anew.
    pub fn probe_lies(&self) -> bool {
        self.lied.is_some()
    }

    /// While the figures are read and stand still, they decide: a probe that passes moves them, which the
    /// next reading sees.
    fn doubts_probe(&self, now: Millis) -> bool {
        let (Some(passed), Some((from, to))) = (self.probe.passed, self.still) else { return false };
        let read_lately = Self::age(Some(to), now).is_some_and(|age| age <= READ_LATELY);
        self.requests_since.is_some() && from <= passed && read_lately
    }

    pub fn evidence(&self, now: Millis) -> Evidence {
        let age = |sign: Sign| Self::age(self.signs[sign as usize], now);
        Evidence {
            last_token: age(Sign::Token),
            last_batch: age(Sign::Batch),
            last_figures: age(Sign::Figures),
            last_kernel: age(Sign::Kernel),
            last_probe: Self::age(self.probe.passed.filter(|_| !self.doubts_probe(now)), now),
            waiting: self.waiting(now),
            stopped: Self::age(self.stopped_since, now),
        }
    }

    pub fn verdict(&self, now: Millis, hang_after: Duration) -> Verdict {
        verdict::judge(&self.evidence(now), self.probe.last, hang_after)
    }

    /// A probe is a request to the scheduler: one at a time, never sooner than `every` after the last, and
    /// only where nothing else proves it alive.
    pub fn wants_probe(&self, now: Millis, every: Duration) -> bool {
        let due = Self::age(self.probe.asked, now).is_none_or(|age| age >= every);
        let fresh = self.quiet(now).is_some_and(|quiet| quiet < every);
        self.probe.under_way == Asked::No && due && !(fresh && self.probe.last == LastProbe::Passed)
    }

    /// Whether processes and caches are to be looked at.
    pub fn wants_look(&self, now: Millis, hang_after: Duration) -> bool {
        let every = LOOK_AFTER.min(verdict::suspect_after(hang_after) / 4);
        self.is_silent(now, every) && Self::age(self.looked, now).is_none_or(|age| age >= every)
    }

    /// Whether the figures are to be read.
    pub fn wants_figures(&self, now: Millis, hang_after: Duration) -> bool {
        let limit = verdict::suspect_after(hang_after) / 4;
        let due = Self::age(self.reads, now).is_none_or(|age| age >= READ_EVERY.min(limit));
        due && self.is_silent(now, LOOK_AFTER.min(limit))
    }

    /// Whether somebody waits, and neither tokens nor batches have come for so long.
    fn is_silent(&self, now: Millis, so_long: Duration) -> bool {
        let Some(waiting) = self.waiting(now) else { return false };
        self.quiet(now).map_or(waiting, |quiet| quiet.min(waiting)) >= so_long
    }

    /// Since when neither tokens nor batches came; none: they never did.
    fn quiet(&self, now: Millis) -> Option<Duration> {
        [Sign::Token, Sign::Batch].into_iter().filter_map(|sign| Self::age(self.signs[sign as usize], now)).min()
    }
}

#[cfg(test)]
mod tests;
