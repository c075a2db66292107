//! A connection that wakes itself while it is polled is polled once more in the same turn, not behind all others that are
//! ready. hyper hands a request's body over in the turn after it was asked for: where thirty requests come at once, each would
//! be sent on only when all of them were read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// Nobody polls: who wakes, wakes the task.
const RESTS: u8 = 0;
const POLLED: u8 = 1;
/// Woken while it was polled.
const RUNG: u8 = 2;

#[derive(Debug)]
pub struct Again {
    bell: Arc<Bell>,
    waker: Waker,
}

#[derive(Debug, Default)]
struct Bell {
    state: AtomicU8,
    task: AtomicWaker,
}

impl Default for Again {
    fn default() -> Self {
        let bell = Arc::<Bell>::default();
        Self { waker: Waker::from(Arc::clone(&bell)), bell }
    }
}

impl Again {
    /// Polls, and once more if that woke the task. Who wakes it then once more waits for its next turn.
    pub fn poll<T>(&mut self, cx: &mut Context<'_>, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        self.bell.task.register(cx.waker());
        for _ in 0..2 {
            self.bell.state.store(POLLED, Ordering::Release);
            let outcome = poll(&mut Context::from_waker(&self.waker));
            let rung = self.bell.state.swap(RESTS, Ordering::AcqRel) == RUNG;
            if outcome.is_ready() || !rung {
                return outcome;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // In one step: a bell that rings between two would be heard by nobody.
        match self.state.compare_exchange(POLLED, RUNG, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) | Err(RUNG) => {}
            Err(_) => self.task.wake(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often it was polled and its task woken, of a future that wakes itself in its first polls.
    fn run(wakes: usize) -> (usize, usize) {
        let count = Arc::<Count>::default();
        let waker = Waker::from(Arc::clone(&count));
        let mut polls = 0;
        let outcome: Poll<()> = Again::default().poll(&mut Context::from_waker(&waker), |cx| {
            polls += 1;
            if polls <= wakes {
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        });
        assert!(outcome.is_pending());
        (polls, count.0.load(Ordering::Relaxed))
    }

    #[test]
    fn who_wakes_itself_has_one_more_turn_at_once_and_the_next_one_behind_the_others() {
        assert_eq!(run(0), (1, 0));
        assert_eq!(run(1), (2, 0));
        assert_eq!(run(2), (2, 1));
    }

    #[test]
    fn who_is_woken_at_rest_wakes_its_task() {
        let count = Arc::<Count>::default();
        let waker = Waker::from(Arc::clone(&count));
        let mut again = Again::default();
        let mut inner = None;
        let _: Poll<()> = again.poll(&mut Context::from_waker(&waker), |cx| {
            inner = Some(cx.waker().clone());
            Poll::Pending
        });
        assert_eq!(count.0.load(Ordering::Relaxed), 0);
        inner.unwrap().wake();
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }

    /// Another thread's bell is heard, whenever it rings.
    #[test]
    fn no_bell_is_lost() {
        for _ in 0..2_000 {
            let count = Arc::<Count>::default();
            let waker = Waker::from(Arc::clone(&count));
            let (mut ringing, mut polls) = (None, 0);
            let _: Poll<()> = Again::default().poll(&mut Context::from_waker(&waker), |cx| {
                polls += 1;
                let waker = cx.waker().clone();
                ringing.get_or_insert_with(|| std::thread::spawn(move || waker.wake()));
                Poll::Pending
            });
            ringing.unwrap().join().unwrap();
            assert!(polls + count.0.load(Ordering::Relaxed) >= 2, "{polls} polls, never woken");
        }
    }
}
