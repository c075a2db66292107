//! Whether an engine that failed is started again, and when: the failures so far, counted by useful life.
//! Pure.
//!
//! The clock that counts is the time in which engines were ready: one that loads for 20 minutes and then
//! dies, again and again, is a crash loop too, though its failures are hours apart.

use std::collections::VecDeque;

/// Monotonic time in milliseconds since some fixed instant.
pub type Millis = u64;

/// Why a start or an engine ended, as far as the next step depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Failure {
    /// The class of the cause: two failures of one class "failed the same way".
    pub class: &'static str,
    pub retry: Retry,
    /// The exit code if sglangd is to end because of it.
    pub exit: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Retry {
    /// Repeating cannot help: bad flags, missing files, wrong Python.
    Never,
    /// It may pass by itself.
    Backoff,
}

/// How often and how soon, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Failures within `window` of useful life after which it gives up.
    pub max_failures: u32,
    pub window: Millis,
    pub backoff: Millis,
    pub backoff_max: Millis,
}

/// The same class of failure this many times in a row, without a ready engine in between, will
/// happen a fourth time too.
pub const SAME_WAY: usize = 3;
/// Exit code of a crash loop, whatever the single failures were.
pub const EXIT_CRASH_LOOP: u8 = 75;

/// What follows a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another start, after this wait.
    After(Millis),
    /// None: the failure to be told, with the exit code of giving up.
    Never(Failure),
}

/// The failures that count, and the useful clock.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    /// When each failure of the present window happened, on the useful clock.
    failures: VecDeque<(Millis, Failure)>,
    /// Time spent ready before the present engine.
    useful: Millis,
    /// Since when the present engine is ready.
    ready_since: Option<Millis>,
}

impl Ledger {
    /// Failures that count towards giving up at present.
    pub fn recent(&self) -> usize {
        self.failures.len()
    }

    /// The useful clock runs.
    pub fn ready(&mut self, now: Millis) {
        self.ready_since = Some(now);
    }

    /// The useful clock stands.
    pub fn no_longer_ready(&mut self, now: Millis) {
        if let Some(since) = self.ready_since.take() {
            self.useful += now.saturating_sub(since);
        }
    }

    /// Somebody has looked after it: what was counts no more.
    pub fn forgive(&mut self) {
        self.failures.clear();
    }

    /// A start or an engine failed. `roll` is a random number below 1000, for the jitter.
    pub fn failed(&mut self, failure: Failure, terms: &Terms, roll: u16) -> Next {
        let (useful, window) = (self.useful, terms.window);
        self.failures.retain(|(at, _)| useful - at <= window);
        self.failures.push_back((useful, failure));
        if failure.retry == Retry::Never {
            return Next::Never(failure);
        }
        let alike = self.failures.iter().rev().take_while(|(at, f)| *at == useful && f.class == failure.class);
        if alike.count() >= SAME_WAY || self.failures.len() >= terms.max_failures.max(1) as usize {
            return Next::Never(Failure { exit: EXIT_CRASH_LOOP, ..failure });
        }
        let doublings = u32::try_from(self.failures.len() - 1).unwrap_or(u32::MAX).min(20);
        let wait = terms.backoff.saturating_mul(1 << doublings).min(terms.backoff_max);
        // Between three quarters and five quarters: nodes that fell together do not rise together.
        Next::After(wait.saturating_mul(3) / 4 + wait.saturating_mul(Millis::from(roll.min(999))) / 2_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms { max_failures: 5, window: 600_000, backoff: 2_000, backoff_max: 60_000 };
    const CRASH: Failure = Failure { class: "crash", retry: Retry::Backoff, exit: 69 };
    const OOM: Failure = Failure { class: "gpu_oom", retry: Retry::Backoff, exit: 69 };
    const BAD_FLAG: Failure = Failure { class: "bad_config", retry: Retry::Never, exit: 65 };

    #[test]
    fn waits_double_up_to_their_bound() {
        let terms = Terms { max_failures: 100, ..TERMS };
        let mut ledger = Ledger::default();
        let waits: Vec<Next> = (0..8).map(|n| ledger.failed([CRASH, OOM][n % 2], &terms, 0)).collect();
        let at_least = [1_500, 3_000, 6_000, 12_000, 24_000, 45_000, 45_000, 45_000];
        assert_eq!(waits, at_least.map(Next::After), "three quarters of 2, 4, 8 … 60 s");
        for n in 0..80 {
            ledger.failed([CRASH, OOM][n % 2], &terms, 0);
        }
        assert_eq!(
            ledger.failed(CRASH, &Terms { backoff_max: Millis::MAX / 4, ..terms }, 0),
            Next::After(1_572_864_000),
            "2 s, 20 times doubled"
        );
    }

    #[test]
    fn jitter_spreads_a_wait_over_three_to_five_quarters() {
        let wait = |roll| match Ledger::default().failed(CRASH, &TERMS, roll) {
            Next::After(wait) => wait,
            Next::Never(failure) => panic!("{failure:?}"),
        };
        assert_eq!([wait(0), wait(500), wait(999)], [1_500, 2_000, 2_499]);
        assert_eq!(wait(9_999), 2_499, "no random number leads outside");
        let terms = Terms { backoff: 0, ..TERMS };
        assert_eq!(Ledger::default().failed(CRASH, &terms, 500), Next::After(0));
    }

    #[test]
    fn the_useful_clock_runs_only_while_ready() {
        let mut ledger = Ledger::default();
        for (from, to) in [(1_000, 3_000), (500_000, 501_500)] {
            ledger.ready(from);
            ledger.no_longer_ready(to);
            ledger.no_longer_ready(to + 7_000);
        }
        assert_eq!(ledger.useful, 3_500);
    }

    #[test]
    fn failures_leave_the_window_with_useful_life_and_not_before() {
        const DAYS: Millis = 2 * 86_400_000;
        // Whether the first of them came at once or after days.
        for (earlier, life, left) in [(0, 600_000, 2), (0, 600_001, 1), (DAYS, 600_000, 2), (DAYS, 600_001, 1)] {
            let mut ledger = Ledger::default();
            ledger.ready(0);
            ledger.no_longer_ready(earlier);
            ledger.failed(CRASH, &TERMS, 0);
            ledger.ready(0);
            ledger.no_longer_ready(life);
            ledger.failed(CRASH, &TERMS, 0);
            assert_eq!(ledger.recent(), left, "{life} ms after one at {earlier}");
        }
    }

    #[test]
    fn three_of_a_kind_in_a_row_are_enough_and_a_ready_engine_breaks_the_row() {
        let mut ledger = Ledger::default();
        for failure in [CRASH, CRASH, OOM, CRASH] {
            assert!(matches!(ledger.failed(failure, &TERMS, 0), Next::After(_)));
        }
        let mut ledger = Ledger::default();
        ledger.failed(CRASH, &TERMS, 0);
        ledger.failed(CRASH, &TERMS, 0);
        let mut with_life = ledger.clone();
        with_life.ready(0);
        with_life.no_longer_ready(1);
        assert!(matches!(with_life.failed(CRASH, &TERMS, 0), Next::After(_)));
        assert_eq!(ledger.failed(CRASH, &TERMS, 0), Next::Never(Failure { exit: 75, ..CRASH }));
    }

    #[test]
    fn the_limit_counts_every_kind_and_is_never_less_than_one() {
        let mut ledger = Ledger::default();
        for failure in [CRASH, OOM, CRASH, OOM] {
            assert!(matches!(ledger.failed(failure, &TERMS, 0), Next::After(_)));
        }
        assert_eq!(ledger.failed(CRASH, &TERMS, 0), Next::Never(Failure { exit: 75, ..CRASH }));
        for max_failures in [0, 1] {
            let next = Ledger::default().failed(CRASH, &Terms { max_failures, ..TERMS }, 0);
            assert_eq!(next, Next::Never(Failure { exit: 75, ..CRASH }));
        }
    }

    #[test]
    fn what_cannot_succeed_keeps_its_own_exit_code() {
        assert_eq!(Ledger::default().failed(BAD_FLAG, &TERMS, 0), Next::Never(BAD_FLAG));
    }

    #[test]
    fn forgiven_is_forgotten() {
        let mut ledger = Ledger::default();
        ledger.failed(CRASH, &TERMS, 0);
        ledger.forgive();
        assert_eq!((ledger.recent(), ledger.failed(CRASH, &TERMS, 0)), (0, Next::After(1_500)));
    }
}
