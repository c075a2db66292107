//! A log line that clients can cause at will, said at most each [`PAUSE`].

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Often enough to be seen while it happens, too seldom to fill a disk.
const PAUSE: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub struct Seldom(Mutex<Said>);

#[derive(Debug, Default)]
struct Said {
    last: Option<Instant>,
    unsaid: u64,
}

impl Seldom {
    /// Says it, with how many were left unsaid since the last time; or leaves it.
    pub fn say(&self, line: impl FnOnce(u64)) {
        let now = Instant::now();
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.last.is_some_and(|at| now.duration_since(at) < PAUSE) {
            said.unsaid += 1;
            return;
        }
        said.last = Some(now);
        let unsaid = std::mem::take(&mut said.unsaid);
        drop(said);
        line(unsaid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_one_line_and_its_number() {
        let seldom = Seldom::default();
        let mut said = Vec::new();
        (0..5).for_each(|_| seldom.say(|more| said.push(more)));
        tokio::time::advance(PAUSE).await;
        (0..2).for_each(|_| seldom.say(|more| said.push(more)));
        assert_eq!(said, [0, 4]);
    }
}
