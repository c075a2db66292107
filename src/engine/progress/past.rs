//! What an earlier start took, and what it says of this one. Pure.
//!
//! Kept is when each place on the way was reached, so that a bar whose first step takes a minute and whose
//! others take a second is no riddle the second time. A start is seldom as quick as the one before: its
//! imports depend on what the disk has in its cache, its load and its graphs on what the GPUs do. So there are
//! two paces, and the first tells little of the second.

use serde::{Deserialize, Serialize};

use super::{Place, Stage};

/// A place and when it was reached, in milliseconds since the launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    stage: Stage,
    /// In thousandths of the stage.
    part: u16,
    at_ms: u64,
}

impl Point {
    pub(super) fn of(place: Place, at_ms: u64) -> Self {
        Self { stage: place.stage, part: (place.part.clamp(0.0, 1.0) * 1000.0) as u16, at_ms }
    }

    fn place(self) -> (Stage, u16) {
        (self.stage, self.part)
    }
}

/// One start from its launch on, as far as it came.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Track(Vec<Point>);

/// Bars of a thousand steps say no more than those of fifty.
const STEP: u16 = 20;

impl Track {
    pub(super) fn reached(&mut self, point: Point) {
        match self.0.last() {
            Some(last) if last.stage == point.stage && point.part < (last.part + STEP).min(1000) => {}
            _ => self.0.push(point),
        }
    }

    /// When a stage, or one behind it, was entered.
    pub(super) fn entered(&self, stage: Stage) -> Option<u64> {
        self.0.iter().find(|point| point.stage >= stage).map(|point| point.at_ms)
    }

    fn last(&self) -> Point {
        self.0.last().copied().unwrap_or(Point { stage: Stage::Import, part: 0, at_ms: 0 })
    }
}

/// What an earlier start of the same model with the same flags took on this node. Kept between runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    track: Track,
}

/// Where the engine's own work begins: what comes before is the disk's and the processors'.
const WORK: Stage = Stage::Load;

/// Before so much of a start, in its hundredths, its pace is believed by less than half.
const BELIEVED_AFTER: u64 = 10;
/// The same of what comes before the work: it is mostly silent, and what it begins with is all there is.
const BELIEVED_BEFORE: u64 = 3;

/// How much one part of a start says of the pace of another.
fn damped(pace: f64) -> f64 {
    pace.clamp(0.8, 1.25)
}

impl History {
    /// Of a start that has reached readiness.
    pub(super) fn of(track: &Track) -> Option<Self> {
        let last = track.0.last().filter(|last| last.stage == Stage::Ready && last.at_ms > 0)?;
        debug_assert!(track.0.is_sorted_by_key(|point| point.at_ms), "{last:?}");
        Some(Self { track: track.clone() })
    }

    pub(super) fn total(&self) -> u64 {
        self.track.last().at_ms
    }

    /// When that start was where this one is, and when it got further.
    fn around(&self, place: (Stage, u16)) -> (u64, u64) {
        let points = &self.track.0;
        let after = points.partition_point(|point| point.place() <= place);
        let reached = after.checked_sub(1).and_then(|at| points.get(at)).map_or(0, |point| point.at_ms);
        (reached, points.get(after).map_or(self.total(), |point| point.at_ms))
    }

    /// The hundredths of that start that are behind this place.
    pub(super) fn percent(&self, place: Place) -> f32 {
        let (reached, _) = self.around(Point::of(place, 0).place());
        reached as f32 / self.total().max(1) as f32 * 100.0
    }

    /// Milliseconds left of a start that came so far; none once it goes another way.
    pub(super) fn left_ms(&self, track: &Track, now_ms: u64) -> Option<u64> {
        let here = track.last();
        let total = self.total();
        let (reached, next) = self.around(here.place());
        let usual = next - reached;
        let waited = now_ms.saturating_sub(here.at_ms);
        if waited > 2 * usual + (total / 8).max(10_000) {
            return None;
        }
        let work = self.track.entered(WORK).unwrap_or(total);
        let works_since = track.entered(WORK);

        // What was before the work, then and now; a wait that is longer than usual counts already.
        let weight = total * BELIEVED_AFTER / 100;
        let ratio = |now: u64, then: u64, prior: f64, weight: u64| {
            (now as f64 + prior * weight as f64) / (then + weight).max(1) as f64
        };
        let overdue = |now: u64, then: u64, pace: f64| {
            if waited as f64 > usual as f64 * pace { (now + waited, then + usual) } else { (now, then) }
        };
        let then = reached.min(work);
        let now = here.at_ms.min(works_since.unwrap_or(here.at_ms));
        let prior = ratio(now, then, 1.0, total * BELIEVED_BEFORE / 100);
        let (now, then) = if works_since.is_none() { overdue(now, then, prior) } else { (now, then) };
        let before = ratio(now, then, 1.0, total * BELIEVED_BEFORE / 100);

        let then = reached.saturating_sub(work);
        let now = works_since.map_or(0, |since| here.at_ms - since);
        let working = ratio(now, then, damped(before), weight);
        let (now, then) = if works_since.is_some() { overdue(now, then, working) } else { (now, then) };
        let working = ratio(now, then, damped(before), weight);

        let (pace, rest_before) = match works_since {
            None => (before, work.saturating_sub(next)),
            Some(_) => (working, 0),
        };
        let this = (usual as f64 * pace - waited as f64).max(0.0);
        let rest_working = total - next.max(work);
        Some((this + rest_before as f64 * before + rest_working as f64 * working) as u64)
    }
}

#[cfg(test)]
mod tests;
