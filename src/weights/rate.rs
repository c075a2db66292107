//! The most bytes a second that all connections of a fetch together take.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

#[derive(Debug)]
pub struct Rate {
    per_second: Option<NonZeroU64>,
    /// When the bytes taken so far are paid for.
    paid: Mutex<Instant>,
}

impl Rate {
    pub fn new(per_second: Option<NonZeroU64>) -> Self {
        Self { per_second, paid: Mutex::new(Instant::now()) }
    }

    /// Passes when these bytes, already read, were due; meanwhile the connection's window fills and its server waits.
    pub async fn take(&self, bytes: u64) {
        let Some(per_second) = self.per_second else { return };
        let cost = Duration::from_secs_f64(bytes as f64 / per_second.get() as f64);
        let due = {
            let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
            *paid = (*paid).max(Instant::now()) + cost;
            *paid
        };
        sleep_until(due).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_together_take_no_more_than_the_rate_and_rest_is_not_saved_up() {
        let rate = Rate::new(NonZeroU64::new(1000));
        let begun = Instant::now();
        tokio::join!(rate.take(500), rate.take(500), rate.take(1000));
        assert_eq!(begun.elapsed(), Duration::from_secs(2));
        tokio::time::sleep(Duration::from_mins(1)).await;
        let begun = Instant::now();
        rate.take(3000).await;
        assert_eq!(begun.elapsed(), Duration::from_secs(3));
        Rate::new(None).take(u64::MAX).await;
    }
}
