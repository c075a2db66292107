//! Whether the engine's own figures (`/v1/loads`) move from one reading to the next. Pure.
//!
//! Schedulers write them into shared memory after each batch and while they idle, and the HTTP side reads
//! them there: the route answers with a hung scheduler too, with figures that stand still (contract §d).
//! What they say of the load is the proxy's business.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

/// One reading: an entry a data-parallel rank, as the engine wrote it.
#[derive(Debug, Clone, PartialEq)]
pub struct Figures(Vec<Value>);

/// What a reading tells beside the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// There was none to compare it with.
    First,
    /// Each rank that has work did something; the last of them so long ago, by the engine's own stamp.
    Moved(Option<Duration>),
    /// A rank that has work, or all that have none, did nothing: they stamp what they write.
    Still,
    /// The same figures without a time: a scheduler that writes the same again looks like this.
    Unstamped,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    loads: Vec<Value>,
}

impl Figures {
    pub fn read(body: &[u8]) -> Option<Self> {
        let answer: Answer = serde_json::from_slice(body).ok()?;
        (!answer.loads.is_empty()).then_some(Self(answer.loads))
    }

    /// `wall`: seconds since 1970, as the engine's stamps are.
    pub fn beside(&self, before: Option<&Self>, wall: f64) -> News {
        let Some(before) = before.filter(|before| before.0.len() == self.0.len()) else { return News::First };
        let pairs = || self.0.iter().zip(&before.0);
        // A healthy rank must not hide one that hangs with requests on it.
        let busy = pairs().filter(|(now, _)| has_work(now)).count();
        let counts = |now: &Value, before: &Value| if busy == 0 { now != before } else { has_work(now) };
        let counting: Vec<_> = pairs().filter(|(now, before)| counts(now, before)).collect();
        if !counting.is_empty() && counting.iter().all(|(now, before)| now != before) {
            let stamps = counting.iter().filter_map(|(now, _)| stamp(now));
            // A clock that was set makes it an age that cannot be; whoever asks knows its bounds.
            News::Moved(stamps.reduce(f64::min).and_then(|at| Duration::try_from_secs_f64(wall - at).ok()))
        } else if self.0.iter().all(|rank| stamp(rank).is_some()) {
            News::Still
        } else {
            News::Unstamped
        }
    }
}

fn stamp(rank: &Value) -> Option<f64> {
    rank.get("timestamp").and_then(Value::as_f64).filter(|at| *at > 0.0)
}

fn has_work(rank: &Value) -> bool {
    ["num_running_reqs", "num_waiting_reqs"].iter().any(|name| rank.get(name).and_then(Value::as_u64).unwrap_or(0) > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(ranks: &[(f64, u32)]) -> Figures {
        let ranks: Vec<String> = ranks
            .iter()
            .map(|(at, running)| {
                format!(r#"{{"timestamp": {at:?}, "num_running_reqs": {running}, "num_waiting_reqs": 0}}"#)
            })
            .collect();
        let text = format!(r#"{{"timestamp": "2026-11-23T14:10:28+00:00", "loads": [{}]}}"#, ranks.join(","));
        Figures::read(text.as_bytes()).expect("figures")
    }

    #[test]
    fn a_stamp_that_moves_is_a_sign_of_life() {
        let before = figures(&[(10.0, 1)]);
        assert_eq!(before.beside(None, 12.0), News::First);
        assert_eq!(figures(&[(10.5, 1)]).beside(Some(&before), 12.0), News::Moved(Some(Duration::from_millis(1500))));
        assert_eq!(figures(&[(10.5, 1)]).beside(Some(&before), 9.0), News::Moved(None), "the clock was set back");
        assert_eq!(figures(&[(10.0, 1)]).beside(Some(&before), 12.0), News::Still);
        assert_eq!(figures(&[(0.0, 1)]).beside(Some(&figures(&[(0.0, 1)])), 12.0), News::Unstamped);
        assert_eq!(figures(&[(0.0, 2)]).beside(Some(&figures(&[(0.0, 1)])), 12.0), News::Moved(None));
    }

    #[test]
    fn a_rank_that_hangs_with_requests_is_not_hidden_by_one_that_works() {
        let moved = |ago| News::Moved(Some(Duration::from_secs(ago)));
        let before = figures(&[(10.0, 1), (10.0, 3)]);
        assert_eq!(figures(&[(12.0, 1), (10.0, 3)]).beside(Some(&before), 15.0), News::Still);
        assert_eq!(figures(&[(12.0, 1), (13.0, 3)]).beside(Some(&before), 15.0), moved(3));
        let idle = figures(&[(10.0, 1), (10.0, 0)]);
        assert_eq!(figures(&[(12.0, 1), (10.0, 0)]).beside(Some(&idle), 15.0), moved(3), "nothing to do is no hang");
        let all_idle = figures(&[(10.0, 0), (10.0, 0)]);
        assert_eq!(figures(&[(10.0, 0), (12.0, 0)]).beside(Some(&all_idle), 15.0), moved(3));
        assert_eq!(all_idle.beside(Some(&all_idle), 15.0), News::Still);
        assert_eq!(figures(&[(10.0, 1)]).beside(Some(&before), 15.0), News::First, "another number of ranks");
    }

    #[test]
    fn what_is_no_answer_is_no_evidence() {
        for text in ["", "{}", "[]", r#"{"loads": []}"#, r#"{"detail": "Not Found"}"#] {
            assert_eq!(Figures::read(text.as_bytes()), None, "{text}");
        }
    }
}
