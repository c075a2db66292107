//! How long a start may still take that no earlier one tells of: a range. Pure.
//!
//! Each stage has a usual time, and takes between half and twice of it. The usual times are those of the real starts
//! under `tests/data` and of contract §f, fitted to what is known of this one: how much is read and how fast it comes,
//! how crowded the processors are and how long the ranks took to import on them, whether there are graphs to capture
//! and kernels to compile for them. What takes longer than that may take half as long again as it has taken: where
//! nothing is known any more, the range says so by its width.

use std::ops::RangeInclusive;

use super::Stage;

/// What is known of a start beside what it says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Known {
    /// Bytes of the weights' files; none: nobody knows.
    pub weights: Option<u64>,
    /// Processors that the ranks share.
    pub cores: Option<u32>,
    pub device: Device,
    pub kernels: Kernels,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Device {
    #[default]
    Gpu,
    /// No graphs are captured.
    Cpu,
}

/// Whether compiled kernels lie in their caches. Those of another model prove nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Kernels {
    #[default]
    Perhaps,
    None,
}

/// Where a start is on its way, in seconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    pub stage: Stage,
    /// Since this stage began.
    pub spent: f64,
    /// The part of this stage that is done; of the load, as its bar shows it.
    pub done: f64,
    /// Since when kernels are compiled, and the part of them that is done.
    pub compiling: Option<(f64, f64)>,
    /// What is still to come from a disk, at the rate at which it comes.
    pub reading: Option<f64>,
    /// How long the ranks imported; none: they still do.
    pub imports: Option<f64>,
    pub tp: u32,
    pub known: Known,
}

/// The ranks' imports on processors of their own (measured: 20 to 32 s beside an H100).
const IMPORTS: f64 = 35.0;
/// What disks and networks of such machines usually give, in bytes a second, where nobody has measured it.
const USUAL_RATE: f64 = 2e9;
/// From the page cache onto the GPUs, all ranks together.
const MEMORY_RATE: f64 = 8e9;
/// Larger models have more shapes to capture, and kernels that are compiled on the spot.
const LARGE: u64 = 32 << 30;
/// A cold DeepGEMM cache (sglang#9867: 10 to 20 minutes).
const COMPILATION: Span = Span { least: 300.0, most: 1_500.0 };

/// Seconds, from the least to the most.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Span {
    least: f64,
    most: f64,
}

impl Span {
    /// A part of a start is mostly within this of what it usually takes.
    fn about(usual: f64) -> Self {
        Self { least: usual / 2.0, most: usual * 2.0 }
    }

    /// The same of what is measured while it goes on.
    fn near(measured: f64) -> Self {
        Self { least: measured * 0.6, most: measured * 1.7 }
    }

    fn and(self, other: Self) -> Self {
        Self { least: self.least + other.least, most: self.most + other.most }
    }

    /// What is left of it after so long. What is overdue may take half as long again as it has taken.
    fn after(self, spent: f64) -> Self {
        Self { least: (self.least - spent).max(0.0), most: (self.most - spent).max(spent / 2.0) }
    }
}

/// Seconds until ready. None: it is.
pub(super) fn left(way: &Way) -> Option<RangeInclusive<u64>> {
    const LATER: [Stage; 6] = [Stage::Join, Stage::Load, Stage::Pool, Stage::Capture, Stage::Http, Stage::WarmUp];
    if way.stage == Stage::Ready {
        return None;
    }
    let later = LATER.into_iter().filter(|stage| *stage > way.stage).map(|stage| way.usual(stage));
    let Span { least, most } = later.fold(way.this(), Span::and);
    // Log lines carry whole seconds, and what is nearly over has no half.
    Some((least as u64).saturating_sub(1)..=most.ceil() as u64 + 1)
}

impl Way {
    fn this(&self) -> Span {
        match self.stage {
            // A bar that has moved for a while goes on about as it did.
            Stage::Load if self.done > 0.05 && self.spent >= 5.0 => {
                Span::about(self.spent * (1.0 - self.done) / self.done)
            }
            Stage::Load if self.reading.is_some() => self.usual(Stage::Load),
            Stage::Pool => match self.compiling {
                Some((since, done)) if done > 0.05 && since >= 5.0 => Span::about(since * (1.0 - done) / done),
                Some((since, _)) => COMPILATION.after(since),
                None => self.usual(Stage::Pool).after(self.spent),
            },
            stage => self.usual(stage).after(self.spent),
        }
    }

    /// More processes than processors import one after the other.
    fn crowd(&self) -> f64 {
        self.known.cores.map_or(1.0, |cores| (f64::from(self.tp + 1) / f64::from(cores.max(1))).max(1.0))
    }

    /// How slow this machine is at what Python does.
    fn pace(&self) -> f64 {
        self.imports.map_or_else(|| self.crowd(), |took| (took / IMPORTS).clamp(0.3, 20.0))
    }

    fn is_large(&self) -> bool {
        self.known.weights.is_none_or(|bytes| bytes >= LARGE)
    }

    fn usual(&self, stage: Stage) -> Span {
        let pace = self.pace();
        match stage {
            // What comes before anything was said has no range.
            Stage::Import | Stage::Ready => Span::default(),
            Stage::Ranks => Span::about(IMPORTS * self.crowd()),
            Stage::Join => Span::about(4.0 * pace),
            Stage::Load => Span::about(pace).and(self.load()),
            Stage::Pool => Span::about(2.0 * pace).and(self.compilation()),
            Stage::Capture if self.known.device == Device::Cpu => Span::default(),
            Stage::Capture => {
                let usual = match self.known.kernels {
                    Kernels::None => 60.0,
                    Kernels::Perhaps => 40.0,
                };
                Span::about(if self.is_large() { 2.0 * usual } else { usual })
            }
            Stage::Http => Span::about(0.5 * pace),
            Stage::WarmUp => Span::about(pace * if self.known.device == Device::Cpu { 2.2 } else { 10.0 }),
        }
    }

    fn load(&self) -> Span {
        let through = self.known.weights.map_or(0.0, |bytes| bytes as f64 / MEMORY_RATE);
        match (self.reading, self.known.weights) {
            (Some(seconds), _) => Span::near(seconds).and(Span { least: 0.0, most: through }),
            (None, Some(bytes)) => Span::about(bytes as f64 / USUAL_RATE),
            (None, None) => Span { least: 0.0, most: 2_400.0 },
        }
    }

    /// Said only where it may come: of a large model whose kernels lie in no cache.
    fn compilation(&self) -> Span {
        match (self.known.kernels, self.known.device) {
            (Kernels::None, Device::Gpu) if self.is_large() => Span { least: 0.0, most: COMPILATION.most },
            _ => Span::default(),
        }
    }
}

#[cfg(test)]
mod tests;
