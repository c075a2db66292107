//! How long a start may still take of which nothing is known but where it is: a range. Pure.

use std::ops::RangeInclusive;

use super::Stage;

/// The least and the most that each stage takes, in seconds: from what was measured (contract §f and the
/// logs under `tests/data`) on two busy cores, on one GPU, and told of eight (sglang#9867: 10 to 20 minutes
/// for a cold DeepGEMM).
const SECONDS: [(Stage, u64, u64); 8] = [
    (Stage::Import, 2, 120),
    (Stage::Ranks, 5, 240),
    (Stage::Join, 0, 60),
    (Stage::Load, 0, 2_400),
    (Stage::Pool, 0, 1_500),
    (Stage::Capture, 0, 900),
    (Stage::Http, 0, 10),
    (Stage::WarmUp, 1, 120),
];

/// Seconds left in a stage since `spent_ms`, of which a steady bar may have told how much is done.
pub(super) fn left(stage: Stage, spent_ms: u64, bar: Option<f32>) -> Option<RangeInclusive<u64>> {
    if stage == Stage::Ready {
        return None;
    }
    let later = SECONDS.iter().filter(|(of, ..)| *of > stage).fold((0, 0), |sum, row| (sum.0 + row.1, sum.1 + row.2));
    let (least, most) = SECONDS.iter().find(|(of, ..)| *of == stage).map_or((0, 0), |row| (row.1, row.2));
    let spent = spent_ms / 1000;
    let (least, most) = match bar {
        // A bar that has moved for a while goes on about as it did.
        Some(done) if done > 0.05 && spent >= 5 => {
            let rest = spent as f32 * (1.0 - done) / done;
            ((rest * 0.5) as u64, (rest * 2.0).ceil() as u64)
        }
        _ => (least.saturating_sub(spent), most.saturating_sub(spent).max(1)),
    };
    Some(later.0 + least..=later.1 + most)
}
