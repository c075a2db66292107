//! How fast the weights come from a disk, and how much of them is still to come. Pure.
//!
//! Two look at it: who reads the shards ahead while the engine imports, and who sees what the ranks take from storage
//! while they load. What lies in the page cache is in neither's figures.

use std::collections::VecDeque;

/// A rate is that of so long: shards are read in bursts.
const WINDOW_MS: u64 = 20_000;
/// Less than this is no rate yet.
const ENOUGH_MS: u64 = 3_000;
/// Ranks that have taken less than this from a disk while they load have their weights from memory: code, configuration
/// and what compilers bring come from disks, too.
const COLD: u64 = 64 << 20;
/// Slower than this is no load: watchdogs and logs read that much.
const SLOWEST: u64 = 256 << 10;

/// Something that only grows, and when it had come so far.
#[derive(Debug, Clone, Default)]
struct Flow(VecDeque<(u64, u64)>);

impl Flow {
    fn take(&mut self, bytes: u64, now_ms: u64) {
        if self.0.back().is_some_and(|(_, before)| *before > bytes) {
            // A process ended and took its count along.
            self.0.clear();
        }
        self.0.push_back((now_ms, bytes));
        while self.0.get(1).is_some_and(|(at, _)| at + WINDOW_MS <= now_ms) {
            self.0.pop_front();
        }
    }

    /// Bytes a second.
    fn rate(&self) -> Option<u64> {
        let ((from, before), (to, after)) = (self.0.front()?, self.0.back()?);
        let took = to - from;
        (took >= ENOUGH_MS).then(|| (after - before).saturating_mul(1000) / took)
    }
}

/// The reading of one start.
#[derive(Debug, Clone, Default)]
pub(super) struct Reading {
    ahead: Flow,
    /// Bytes that the reading ahead has still to get.
    ahead_left: Option<u64>,
    ranks: Flow,
    /// What the ranks had taken when the load began.
    before: Option<u64>,
}

impl Reading {
    pub fn ahead(&mut self, done: u64, total: u64, now_ms: u64) {
        self.ahead.take(done, now_ms);
        self.ahead_left = Some(total.saturating_sub(done));
    }

    /// The engine's processes have taken so many bytes from disks since they live.
    pub fn stored(&mut self, bytes: u64, load: Load, now_ms: u64) {
        match load {
            Load::Runs => {
                self.before.get_or_insert(bytes);
                self.ranks.take(bytes, now_ms);
            }
            Load::NotYet => self.before = Some(bytes),
            Load::Over => self.ranks = Flow::default(),
        }
    }

    /// Bytes a second that the ranks get from a disk, where that is what they wait for.
    pub fn cold(&self) -> Option<u64> {
        let (_, last) = self.ranks.0.back()?;
        let taken = last.saturating_sub(self.before?);
        self.ranks.rate().filter(|rate| taken >= COLD && *rate >= SLOWEST)
    }

    /// Seconds until the rest of so many bytes has come.
    pub fn seconds_left(&self, weights: Option<u64>) -> Option<f64> {
        if let (Some(rate), Some(weights), Some((_, last)), Some(before)) =
            (self.cold(), weights, self.ranks.0.back(), self.before)
        {
            return Some(weights.saturating_sub(last.saturating_sub(before)) as f64 / rate as f64);
        }
        let rate = self.ahead.rate().filter(|rate| *rate >= SLOWEST)?;
        Some(self.ahead_left? as f64 / rate as f64)
    }
}

/// Whether the weights are being loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    NotYet,
    Runs,
    Over,
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_rate_is_that_of_the_last_while() {
        let mut flow = Flow::default();
        flow.take(0, 0);
        flow.take(100, 2_999);
        assert_eq!(flow.rate(), None, "too short to tell");
        flow.take(300, 3_000);
        assert_eq!(flow.rate(), Some(100));
        let mut stands = flow.clone();
        stands.take(300, 6_000);
        assert_eq!(stands.rate(), Some(50), "a moment without a byte is a slow one, and no new beginning");
        flow.take(20_300, 23_000);
        assert_eq!(flow.rate(), Some(1_000), "the burst of long ago is forgotten");
        flow.take(50, 24_000);
        assert_eq!(flow.rate(), None, "whoever counted is gone");
    }

    #[test]
    fn ranks_that_take_their_weights_from_a_disk_are_cold_and_those_from_memory_are_not() {
        let mut reading = Reading::default();
        reading.stored(900 * MIB, Load::NotYet, 0);
        for n in 0..4 {
            reading.stored(900 * MIB + n * 10 * MIB, Load::Runs, n * 1_000);
        }
        assert_eq!((reading.cold(), reading.seconds_left(Some(1 << 30))), (None, None), "code and a little else");
        for n in 4..10 {
            reading.stored(900 * MIB + n * 100 * MIB, Load::Runs, n * 1_000);
        }
        assert_eq!(reading.cold(), Some(100 * MIB));
        assert_eq!(reading.seconds_left(Some(1_100 * MIB)), Some(2.0));
        assert_eq!(reading.seconds_left(None), None);
        for n in 10..40 {
            reading.stored(900 * MIB + 900 * MIB, Load::Runs, n * 1_000);
        }
        assert_eq!(reading.cold(), None, "nothing comes from there any more");
        reading.stored(4_000 * MIB, Load::Over, 50_000);
        assert_eq!(reading.cold(), None, "what comes now is something else");
    }

    #[test]
    fn what_is_read_ahead_tells_before_the_ranks_do() {
        let mut reading = Reading::default();
        reading.ahead(0, 4_000 * MIB, 0);
        assert_eq!(reading.seconds_left(Some(8_000 * MIB)), None);
        reading.ahead(1_000 * MIB, 4_000 * MIB, 5_000);
        assert_eq!(reading.seconds_left(Some(8_000 * MIB)), Some(15.0), "half of it lay in memory already");
        reading.ahead(4_000 * MIB, 4_000 * MIB, 20_000);
        assert_eq!(reading.seconds_left(Some(8_000 * MIB)), Some(0.0));
    }
}
