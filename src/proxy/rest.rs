//! Whether anybody looks at the traffic: nobody has to, as long as there is none.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use tokio::sync::Notify;

/// Lets who reports the traffic sleep until the first request comes. A request costs one load of a shared
/// flag that hardly ever changes.
#[derive(Debug, Default)]
pub struct Rest {
    resting: AtomicBool,
    news: Notify,
}

impl Rest {
    /// From now on the next request is told of.
    pub fn begin(&self) {
        self.resting.store(true, Relaxed);
    }

    /// A request has come.
    pub fn stir(&self) {
        if self.resting.load(Relaxed) && self.resting.swap(false, Relaxed) {
            self.news.notify_one();
        }
    }

    /// Waits for the first request since [`Self::begin`].
    pub async fn stirred(&self) {
        self.news.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_the_first_request_of_a_rest_is_told_of() {
        let rest = Rest::default();
        let quiet = async |rest: &Rest| timeout(Duration::from_secs(1), rest.stirred()).await.is_err();
        rest.stir();
        assert!(quiet(&rest).await, "nobody rested");
        rest.begin();
        rest.stir();
        rest.stir();
        rest.stirred().await;
        assert!(quiet(&rest).await, "told twice");
    }
}
