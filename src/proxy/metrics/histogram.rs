//! A histogram of durations, as Prometheus counts them.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// How many upper bounds every histogram has.
const BOUNDS: usize = 14;

/// Upper bounds in seconds, ascending.
pub type Bounds = [f64; BOUNDS];

/// From a fraction of the proxy's own cost to the worst prefill.
static WAITS: Bounds = [0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

#[derive(Debug)]
pub struct Histogram {
    bounds: &'static Bounds,
    buckets: [AtomicU64; BOUNDS + 1],
    micros: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new(&WAITS)
    }
}

impl Histogram {
    pub fn new(bounds: &'static Bounds) -> Self {
        Self { bounds, buckets: Default::default(), micros: AtomicU64::new(0) }
    }

    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let at = self.bounds.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS);
        self.buckets[at].fetch_add(1, Relaxed);
        self.micros.fetch_add(took.as_micros() as u64, Relaxed);
    }

    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum()
    }

    /// So many that took no time.
    pub fn observe_none(&self, count: u64) {
        if count > 0 {
            self.buckets[0].fetch_add(count, Relaxed);
        }
    }
}

/// One of a thing's histograms.
pub type Pick<T> = fn(&T) -> &Histogram;

/// Writes the sum of `parts`, which have the same bounds. `labels` are `a="b",c="d"`, or nothing.
pub fn write(out: &mut String, name: &str, labels: &str, parts: &[&Histogram]) {
    let Some(first) = parts.first() else { return };
    let comma = if labels.is_empty() { "" } else { "," };
    let braced = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
    let mut count = 0;
    // Writing into a String does not fail.
    for at in 0..=BOUNDS {
        count += parts.iter().map(|part| part.buckets[at].load(Relaxed)).sum::<u64>();
        let bound = first.bounds.get(at).map_or_else(|| "+Inf".to_owned(), f64::to_string);
        let _ = writeln!(out, "sglangd_{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {count}");
    }
    let micros: u64 = parts.iter().map(|part| part.micros.load(Relaxed)).sum();
    let _ = writeln!(out, "sglangd_{name}_sum{braced} {}", micros as f64 / 1e6);
    let _ = writeln!(out, "sglangd_{name}_count{braced} {count}");
}
