//! How far a fetch is, for a bar, a log line or the supervisor: plain data with its rate and ETA. Draws nothing.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// What a fetch reports while it runs; one JSON line each on `--progress-fd`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Progress {
    /// Listed and compared with the cache; nothing fetched yet.
    Plan {
        files: usize,
        bytes_total: u64,
        bytes_present: u64,
    },
    /// At most four times a second.
    Bytes {
        done: u64,
        total: u64,
        rate_bytes_per_s: u64,
        /// Seconds left at this rate; none while it is unknown or nothing moves.
        eta_seconds: Option<u64>,
        pace: Pace,
        /// The files whose bytes come just now.
        files: Vec<FileProgress>,
    },
    /// Files that were there already are read and compared with the hub's hashes.
    Verifying {
        done: u64,
        total: u64,
        file: String,
    },
    /// Somebody else fetches the same file into the same cache.
    Waiting {
        file: String,
        holder: String,
    },
    Done {
        snapshots: Vec<Snapshot>,
    },
    Failed {
        class: String,
        retry_after_seconds: Option<u64>,
        message: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileProgress {
    pub name: String,
    pub done: u64,
    pub total: u64,
}

/// Whether bytes arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pace {
    Moving,
    /// No byte for some seconds, on any connection.
    Stalled,
}

/// One repository, whole and verified on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The engine flag that asked for it; none: the model.
    pub flag: Option<String>,
    pub repo: String,
    pub revision: String,
    pub commit: String,
    pub path: PathBuf,
}

/// Without a byte for this long, it is called stalled.
const STALLED_AFTER: Duration = Duration::from_secs(5);
/// The rate is that of the last while, so that it follows a network that changes.
const WINDOW: Duration = Duration::from_secs(10);
/// Between two samples.
const STEP: Duration = Duration::from_millis(200);

/// Rate and ETA from how many bytes there were when.
#[derive(Debug)]
pub struct Meter {
    total: u64,
    samples: VecDeque<(Instant, u64)>,
    /// Bytes read from the disk, to prove them.
    read: u64,
    moved: Instant,
}

impl Meter {
    /// `done` bytes were there before the first one came.
    pub fn new(now: Instant, done: u64, total: u64) -> Self {
        Self { total, samples: VecDeque::from([(now, done)]), read: 0, moved: now }
    }

    /// Notes that `done` bytes are there at `now`; bytes thrown away (a file begun anew) make it smaller. Bytes
    /// `read` to prove what was there count as motion, not as rate.
    pub fn note(&mut self, now: Instant, done: u64, read: u64) {
        let &(last, before) = self.samples.back().expect("new() puts one sample in and the trim below leaves two");
        if done != before || read != self.read {
            if now.duration_since(self.moved) >= STALLED_AFTER {
                // A stall that is over says nothing about the rate of now.
                self.samples.clear();
                self.samples.push_back((self.moved.max(now - STEP), before));
            }
            self.moved = now;
            self.read = read;
        }
        if done < before {
            self.samples.clear();
            self.samples.push_back((now, done));
        } else if now.duration_since(last) >= STEP {
            self.samples.push_back((now, done));
        }
        while self.samples.len() > 2 && now.duration_since(self.samples[1].0) >= WINDOW {
            self.samples.pop_front();
        }
    }

    /// Rate (bytes a second), seconds left, and whether anything moves.
    pub fn read(&self, now: Instant, done: u64) -> (u64, Option<u64>, Pace) {
        let (first, then) = self.samples[0];
        let seconds = now.duration_since(first).as_secs_f64();
        let rate = if seconds > 0.0 { done.saturating_sub(then) as f64 / seconds } else { 0.0 };
        if now.duration_since(self.moved) >= STALLED_AFTER {
            return (rate as u64, None, Pace::Stalled);
        }
        let eta = (rate >= 1.0).then(|| (self.total.saturating_sub(done) as f64 / rate).ceil() as u64);
        (rate as u64, eta, Pace::Moving)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(meter: &mut Meter, from: Instant, seconds: u64, start: u64, rate: u64) -> (Instant, u64) {
        let mut now = from;
        let mut done = start;
        for _ in 0..seconds * 5 {
            now += STEP;
            done += rate / 5;
            meter.note(now, done, 0);
        }
        (now, done)
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds_and_what_was_there_does_not_count() {
        let start = Instant::now();
        let mut meter = Meter::new(start, 5000, 100_000);
        let (now, done) = run(&mut meter, start, 10, 5000, 1000);
        assert_eq!(meter.read(now, done), (1000, Some(85), Pace::Moving));
        let (now, done) = run(&mut meter, now, 11, done, 100);
        let (rate, _, _) = meter.read(now, done);
        assert!((95..=120).contains(&rate), "still follows the old rate: {rate}");
    }

    #[test]
    fn h07_nothing_for_five_seconds_is_stalled_and_has_no_eta() {
        let start = Instant::now();
        let mut meter = Meter::new(start, 0, 1000);
        let (now, done) = run(&mut meter, start, 2, 0, 100);
        let later = now + Duration::from_secs(6);
        meter.note(later, done, 0);
        let (_, eta, pace) = meter.read(later, done);
        assert_eq!((eta, pace), (None, Pace::Stalled));
    }

    #[test]
    fn h07_a_stall_that_is_over_does_not_count_for_the_rate() {
        let start = Instant::now();
        let mut meter = Meter::new(start, 0, 100_000);
        let (now, done) = run(&mut meter, start, 4, 0, 1000);
        let (now, done) = run(&mut meter, now + Duration::from_secs(8), 2, done, 1000);
        let (rate, eta, _) = meter.read(now, done);
        assert!((900..=1100).contains(&rate), "{rate}");
        assert!(eta.is_some_and(|eta| (80..=110).contains(&eta)), "{eta:?}");
    }

    #[test]
    fn who_reads_what_is_there_is_not_stalled() {
        let start = Instant::now();
        let mut meter = Meter::new(start, 1000, 1000);
        for second in 1..=8 {
            meter.note(start + Duration::from_secs(second), 1000, second << 20);
        }
        assert_eq!(meter.read(start + Duration::from_secs(8), 1000).2, Pace::Moving);
    }

    #[test]
    fn a_file_begun_anew_does_not_make_the_rate_negative_or_huge() {
        let start = Instant::now();
        let mut meter = Meter::new(start, 0, 10_000);
        let (now, _) = run(&mut meter, start, 5, 0, 1000);
        let now = now + STEP;
        meter.note(now, 10, 0);
        assert_eq!(meter.read(now, 10).2, Pace::Moving);
        let (now, done) = run(&mut meter, now, 5, 10, 1000);
        assert_eq!(meter.read(now, done).0, 1000);
    }
}
