//! Which of the engine's health routes tells what, and how often they may be asked.
//!
//! `/ready` (SGLang 0.5.23; `/ping` before) answers at once but only repeats the last known state;
//! `/health` puts a one-token request through the scheduler, always takes a second, and answers 503
//! by itself after 20 s. A probe with a time-out of a second or less never passes.

use std::net::SocketAddr;
use std::time::Duration;

use http::StatusCode;

use super::client::{self, ClientError, Target};

/// First wait between two looks, and after anything changed.
const QUICK: Duration = Duration::from_millis(25);
/// Longest wait between two looks: on average readiness is seen within half of it.
const SLOW: Duration = Duration::from_millis(100);
/// `/ready` and `/ping` answer within milliseconds; while the engine's event loop is blocked they
/// do not, and that is "not ready".
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// What one look at the engine's port showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Nothing listens: it imports, loads, captures.
    Closed,
    /// It listens, and is warming up.
    NotReady,
    Ready,
}

/// When to look again: quickly after a change, then less often.
#[derive(Debug, Clone)]
pub struct Pace {
    wait: Duration,
    last: Option<Look>,
}

impl Default for Pace {
    fn default() -> Self {
        Self { wait: QUICK, last: None }
    }
}

impl Pace {
    pub fn after(&mut self, look: Look) -> Duration {
        self.wait = if self.last == Some(look) { (self.wait * 3 / 2).min(SLOW) } else { QUICK };
        self.last = Some(look);
        self.wait
    }
}

/// One look. `key` is the engine's API key; `/ping` asks for it, `/ready` does not.
pub async fn look(engine: SocketAddr, key: Option<&str>) -> Look {
    let target = Target::Tcp(engine);
    match client::get(&target, "/ready", None, ANSWER_LIMIT).await {
        Ok(answer) if answer.status == StatusCode::OK => Look::Ready,
        // Older than 0.5.23.
        Ok(answer) if answer.status == StatusCode::NOT_FOUND => {
            match client::get(&target, "/ping", key, ANSWER_LIMIT).await {
                Ok(answer) if answer.status == StatusCode::OK => Look::Ready,
                _ => Look::NotReady,
            }
        }
        Err(ClientError::Connect(_)) => Look::Closed,
        Ok(_) | Err(_) => Look::NotReady,
    }
}

/// How a `/health` ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pulse {
    Healthy,
    /// Answered, but not with 200: 503 is "no token within 20 s".
    Refused(u16),
    /// No answer in time, or no connection.
    Silent(String),
}

/// One `/health`. Never more than one at a time: probes that time out pile up in the scheduler
/// (sglang#35884).
pub async fn pulse(engine: SocketAddr, limit: Duration) -> Pulse {
    match client::get(&Target::Tcp(engine), "/health", None, limit).await {
        Ok(answer) if answer.status == StatusCode::OK => Pulse::Healthy,
        Ok(answer) => Pulse::Refused(answer.status.as_u16()),
        Err(error) => Pulse::Silent(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_slow_down_until_something_changes() {
        let mut pace = Pace::default();
        let waits: Vec<u128> = (0..6).map(|_| pace.after(Look::Closed).as_millis()).collect();
        assert_eq!(waits, [25, 37, 56, 84, 100, 100]);
        assert_eq!(pace.after(Look::NotReady), QUICK, "the port opened: ready may be near");
    }

    /// The figure of the main job: with no word in the log, readiness is seen within 60 ms on average,
    /// whenever it comes.
    #[test]
    fn readiness_is_seen_within_60_ms_on_average() {
        let mut total = 0;
        let (opens, starts) = (5_000, 2_000);
        for n in 0..starts {
            // Ready at 2,000 instants spread over ten seconds of warm-up, at no whole step of the pace.
            let ready = opens + n * 5 + n % 7;
            let (mut pace, mut now) = (Pace::default(), 0);
            let seen = loop {
                let look = match now {
                    t if t >= ready => break t,
                    t if t >= opens => Look::NotReady,
                    _ => Look::Closed,
                };
                now += pace.after(look).as_millis() as u64;
            };
            total += seen - ready;
        }
        let mean = total / starts;
        assert!((20..60).contains(&mean), "{mean} ms");
    }
}
