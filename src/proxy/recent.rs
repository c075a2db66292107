//! The last requests that went towards the engine, by their ids: what it may have died of.
//!
//! Each worker keeps so many and no more; nothing is done at a request's end, and nothing is counted by them.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use http::HeaderValue;
use tokio::time::Instant;

use super::metrics::Counters;

/// Of each worker: more than the engine's usual limit of requests at once.
const KEPT: usize = 64;

#[derive(Debug, Clone)]
struct Request {
    id: HeaderValue,
    route: &'static str,
    at: Instant,
}

/// Those of one worker. Only who asks for all of them ever waits for its lock.
#[derive(Debug, Default)]
pub struct Recent(Mutex<VecDeque<Request>>);

impl Recent {
    pub fn note(&self, id: &HeaderValue, route: &'static str, at: Instant) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(Request { id: id.clone(), route, at });
    }
}

/// Of all workers, a line each, the last one at the end.
pub fn told(workers: &[Arc<Counters>], now: Instant) -> String {
    let of = |worker: &Arc<Counters>| worker.recent.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut all: Vec<Request> = workers.iter().flat_map(of).collect();
    all.sort_by_key(|request| request.at);
    let mut text = String::new();
    for Request { id, route, at } in all {
        let ago = now.saturating_duration_since(at).as_secs_f64();
        // Writing to a String cannot fail. An id is plain text: it was made here, or looked at.
        let _ = writeln!(text, "{ago:9.1} s ago  {route}  {}", id.to_str().unwrap_or("?"));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_last_of_all_workers_are_told_in_the_order_in_which_they_came() {
        let (workers, begun) = ([Arc::new(Counters::default()), Arc::new(Counters::default())], Instant::now());
        for n in 0..300u64 {
            let id = HeaderValue::from(n);
            let worker = usize::from(n % 3 == 0);
            workers[worker].recent.note(&id, "chat_completions", begun + Duration::from_secs(n));
        }
        let text = told(&workers, begun + Duration::from_mins(5));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2 * KEPT, "no more than that, whatever came");
        assert_eq!(lines[2 * KEPT - 1], "      1.0 s ago  chat_completions  299");
        let ids: Vec<u64> = lines.iter().filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        assert!(ids.is_sorted(), "{ids:?}");
    }
}
