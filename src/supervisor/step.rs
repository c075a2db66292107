//! What the supervisor does next: one pure function of the state, an event and the time.
//!
//! ```text
//!              ┌────────────────── Stop, from any state ──────────────────┐
//!              │ (loading or earlier: straight to Reaping)                 ▼
//! Fetching ─► Preparing ─► Claiming ─► Launching ─► Loading ─► Ready ◄─► Busy ──► Draining ─► Stopping
//!   │  ▲         │          │     ▲        │           │         │         │                     │
//!   │  │         │          ▼     │        │           └────► Failing ◄────┘                     │
//!   │  │         │        Occupied┘        │                     │                               ▼
//!   │  │         │                         └─────────────────────┴──────────────────────────► Reaping ─► Unkillable
//!   │  │         │                                                                              │          │
//!   │  └─────────┴──── Backoff ◄── retry ──── Releasing ◄───────────────────────────────────────┴──────────┘
//!   │                     ▲                       ├─ stop ─► Stopped
//!   └── fails ────────────┘──── no use ─► GaveUp ◄┘
//! ```
//!
//! Every edge, as a test holds them against the reachable ones:
//!
//! ```text
//! Fetching   ─► Preparing Backoff GaveUp Reaping Stopped
//! Preparing  ─► Claiming Backoff GaveUp Reaping Stopped
//! Claiming   ─► Launching Occupied Reaping
//! Occupied   ─► Launching Reaping
//! Launching  ─► Loading Failing Reaping
//! Loading    ─► Ready Failing Reaping
//! Ready      ─► Busy Failing Draining
//! Busy       ─► Ready Failing Draining
//! Failing    ─► Reaping
//! Draining   ─► Stopping Reaping
//! Stopping   ─► Reaping
//! Reaping    ─► Releasing Unkillable Stopped
//! Unkillable ─► Releasing Stopped
//! Releasing  ─► Backoff Fetching GaveUp Stopped
//! Backoff    ─► Fetching Stopped
//! GaveUp     ─► Fetching Stopped
//! ```
//!
//! `Reaping` ends only when the engine's whole process tree is gone, and each launch comes out of
//! `Claiming`, which asks once more whether the GPUs are free: there is never a second engine beside a
//! first one, and none beside a stranger who holds its memory. That one is waited for in `Occupied`, for as
//! long as it takes. `Releasing` waits too, but not for ever: what a dead engine's driver does not free
//! must not keep a stop from ending, and the next launch asks again. An operator's restart lets open
//! answers end and new requests wait, and counts as no failure. Nothing here knows of processes, sockets
//! or clocks: times come in as [`Millis`], wishes go out as [`Action`]s.

mod words;

pub use super::restart::{EXIT_CRASH_LOOP, Failure, Millis, Retry, SAME_WAY, Terms};
use super::restart::{Ledger, Next};
pub use words::*;

/// The state and what it must remember.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    pub state: State,
    pub policy: Policy,
    /// Engines started again since the beginning.
    pub restarts: u32,
    ledger: Ledger,
    /// When everything must be over, once a stop was asked for.
    stop_by: Option<Millis>,
}

impl Machine {
    /// The machine before its first step, and that step's wishes.
    pub fn start(policy: Policy) -> (Self, Vec<Action>) {
        let machine = Self { state: State::Fetching, policy, restarts: 0, ledger: Ledger::default(), stop_by: None };
        (machine, vec![Action::Fetch])
    }

    /// When a [`Event::Tick`] is due if nothing else happens before.
    pub fn deadline(&self) -> Option<Millis> {
        match &self.state {
            State::Loading { since, progress, .. } => {
                Some((since + self.policy.start_limit).min(progress + self.policy.start_stall))
            }
            State::Failing { until }
            | State::Reaping { until, .. }
            | State::Releasing { until, .. }
            | State::Claiming { until }
            | State::Backoff { until } => Some(*until),
            State::Draining { cut_at, .. } => Some(*cut_at),
            State::Stopping { kill_at, .. } => Some(*kill_at),
            _ => None,
        }
    }

    /// Failures that count towards giving up at present.
    pub fn recent_failures(&self) -> usize {
        self.ledger.recent()
    }

    /// Whether a stop was asked for.
    pub fn stopping(&self) -> bool {
        self.stop_by.is_some()
    }

    /// One step. Unexpected events change nothing: a late answer of something that was given up.
    pub fn step(&mut self, event: &Event, now: Millis) -> Vec<Action> {
        if *event == Event::Stop {
            return self.stop(now);
        }
        match (self.state.clone(), event) {
            (State::Fetching, Event::Fetched) => self.go(State::Preparing, &[Action::Prepare]),
            (State::Fetching, Event::FetchFailed(f)) | (State::Preparing, Event::PrepareFailed(f)) => {
                self.failed(*f, now, 0)
            }
            (State::Preparing, Event::Prepared) => {
                self.go(State::Claiming { until: now + RELEASE_LIMIT }, &[Action::Release])
            }
            (State::Claiming { .. } | State::Occupied, Event::Released { .. }) => {
                self.go(State::Launching, &[Action::Launch])
            }
            (State::Claiming { .. }, Event::Held { .. }) => self.go(State::Occupied, &[]),
            (State::Claiming { until }, Event::Tick) if now >= until => self.go(State::Occupied, &[]),
            (State::Launching, Event::Launched) => {
                self.go(State::Loading { since: now, progress: now, check: Check::Waiting }, &[])
            }

            (State::Loading { since, check, .. }, Event::Progressed) => {
                self.go(State::Loading { since, progress: now, check }, &[])
            }
            (State::Loading { since, check: Check::Waiting, .. }, Event::LooksReady) => {
                self.go(State::Loading { since, progress: now, check: Check::Confirming }, &[Action::Confirm])
            }
            (State::Loading { check: Check::Confirming, .. }, Event::Healthy) => {
                self.ledger.ready(now);
                self.go(State::Ready, &[])
            }
            // Not taken for a death: it may be compiling for the first real request. It is asked
            // again; the start's own limits bound this.
            (State::Loading { since, progress, check: Check::Confirming }, Event::Unhealthy) => {
                self.go(State::Loading { since, progress, check: Check::Waiting }, &[])
            }
            (State::Loading { since, progress, .. }, Event::Tick)
                if now >= since + self.policy.start_limit || now >= progress + self.policy.start_stall =>
            {
                self.fail(now)
            }

            (State::Ready, Event::LooksBusy | Event::Unhealthy) => self.go(State::Busy, &[]),
            (State::Busy, Event::Healthy) => self.go(State::Ready, &[]),
            (State::Launching | State::Loading { .. } | State::Ready | State::Busy, Event::Exited | Event::Hung) => {
                self.fail(now)
            }
            (_, Event::Restart) => self.restart(now),

            // Of a launch that failed something may have come to life before.
            (State::Launching, Event::LaunchFailed(f)) | (State::Failing { .. }, Event::Examined(f)) => {
                self.reap(Then::Retry(*f), now)
            }
            (State::Failing { until }, Event::Tick) if now >= until => {
                self.reap(Then::Retry(Failure { class: "unknown", retry: Retry::Backoff, exit: EXIT_CRASH_LOOP }), now)
            }

            (State::Draining { end, .. }, Event::Idle) => self.terminate(end, &[]),
            // Over a restart the proxy goes on: the engine's end ends what is open, and says so.
            (State::Draining { cut_at, end }, Event::Tick) if now >= cut_at => {
                let cut: &[Action] = if self.stopping() { &[Action::CutStreams] } else { &[] };
                self.terminate(end, cut)
            }
            (State::Draining { .. } | State::Stopping { .. }, Event::Exited) => self.reap(self.after_drain(), now),
            (State::Stopping { kill_at, .. }, Event::Tick) if now >= kill_at => self.reap(self.after_drain(), now),

            (State::Reaping { then, .. } | State::Unkillable { then }, Event::TreeEmpty) => {
                self.go(State::Releasing { then, until: self.bounded(now, RELEASE_LIMIT) }, &[Action::Release])
            }
            (State::Reaping { then, until }, Event::Tick) if now >= until => match then {
                Then::Stop { .. } => {
                    self.go(State::Stopped { exit: EXIT_UNKILLABLE }, &[Action::Exit(EXIT_UNKILLABLE)])
                }
                Then::Retry(_) | Then::Restart => self.go(State::Unkillable { then }, &[]),
            },

            (State::Releasing { then, .. }, Event::Released { roll } | Event::Held { roll }) => {
                self.gone(then, now, *roll)
            }
            (State::Releasing { then, until }, Event::Tick) if now >= until => self.gone(then, now, 0),

            (State::Backoff { until }, Event::Tick) if now >= until => self.again(),
            _ => Vec::new(),
        }
    }

    fn go(&mut self, to: State, actions: &[Action]) -> Vec<Action> {
        self.state = to;
        actions.to_vec()
    }

    fn fail(&mut self, now: Millis) -> Vec<Action> {
        self.ledger.no_longer_ready(now);
        self.go(State::Failing { until: now + EXAMINE_LIMIT }, &[Action::Examine])
    }

    /// Nothing of the engine is left.
    fn gone(&mut self, then: Then, now: Millis, roll: u16) -> Vec<Action> {
        match then {
            Then::Stop { exit } => self.go(State::Stopped { exit }, &[Action::Exit(exit)]),
            Then::Retry(failure) => self.failed(failure, now, roll),
            Then::Restart => self.again(),
        }
    }

    fn again(&mut self) -> Vec<Action> {
        self.restarts += 1;
        self.go(State::Fetching, &[Action::Fetch])
    }

    /// An operator wants a fresh engine: what failed before is forgiven, whatever it was.
    fn restart(&mut self, now: Millis) -> Vec<Action> {
        match self.state.clone() {
            State::Ready | State::Busy => {
                let end = now + self.policy.grace;
                self.ledger.no_longer_ready(now);
                self.go(State::Draining { cut_at: end.saturating_sub(CUT_BEFORE_END).max(now), end }, &[Action::Hold])
            }
            State::Launching | State::Loading { .. } => self.reap(Then::Restart, now),
            State::GaveUp { .. } | State::Backoff { .. } => {
                self.ledger.forgive();
                self.again()
            }
            State::Reaping { then: Then::Retry(_), until } => {
                self.ledger.forgive();
                self.go(State::Reaping { then: Then::Restart, until }, &[])
            }
            State::Releasing { then: Then::Retry(_), until } => {
                self.ledger.forgive();
                self.go(State::Releasing { then: Then::Restart, until }, &[])
            }
            State::Unkillable { then: Then::Retry(_) } => {
                self.ledger.forgive();
                self.go(State::Unkillable { then: Then::Restart }, &[])
            }
            // A fresh one is on its way, or (failing) the next step takes the old one away, or a stop does: where one
            // is on its way there is none of the above.
            _ => Vec::new(),
        }
    }

    fn terminate(&mut self, end: Millis, before: &[Action]) -> Vec<Action> {
        self.state = State::Stopping { kill_at: end.saturating_sub(KILL_BEFORE_END), end };
        [before, &[Action::Terminate]].concat()
    }

    fn reap(&mut self, then: Then, now: Millis) -> Vec<Action> {
        self.go(State::Reaping { then, until: self.bounded(now, REAP_LIMIT) }, &[Action::Kill])
    }

    /// With a stop on its way the end is near anyway, but never so near that SIGKILL has no time.
    fn bounded(&self, now: Millis, limit: Millis) -> Millis {
        match self.stop_by {
            Some(end) => end.max(now + KILL_BEFORE_END).min(now + limit),
            None => now + limit,
        }
    }

    fn after_drain(&self) -> Then {
        if self.stopping() { Then::Stop { exit: 0 } } else { Then::Restart }
    }

    /// A start or an engine failed and nothing of it is left: again, or never again?
    fn failed(&mut self, failure: Failure, now: Millis, roll: u16) -> Vec<Action> {
        match self.ledger.failed(failure, &self.policy.restart, roll) {
            Next::After(wait) => self.go(State::Backoff { until: now + wait }, &[]),
            Next::Never(failure) if self.policy.give_up == GiveUp::Serve => self.go(State::GaveUp { failure }, &[]),
            Next::Never(Failure { exit, .. }) => self.go(State::Stopped { exit }, &[Action::Exit(exit)]),
        }
    }

    fn stop(&mut self, now: Millis) -> Vec<Action> {
        let again = self.stop_by.is_some();
        let end = *self.stop_by.get_or_insert(now + self.policy.grace);
        let then = Then::Stop { exit: 0 };
        match self.state.clone() {
            State::Stopped { .. } => Vec::new(),
            State::GaveUp { .. } | State::Backoff { .. } => self.go(State::Stopped { exit: 0 }, &[Action::Exit(0)]),
            State::Ready | State::Busy => {
                self.ledger.no_longer_ready(now);
                let cut_at = end.saturating_sub(CUT_BEFORE_END).max(now);
                self.go(State::Draining { cut_at, end }, &[Action::Drain])
            }
            // An operator's restart was draining: now it is for good, within the stop's own grace.
            State::Draining { .. } if !again => {
                let cut_at = end.saturating_sub(CUT_BEFORE_END).max(now);
                self.go(State::Draining { cut_at, end }, &[Action::Drain])
            }
            State::Stopping { .. } if !again => {
                let kill_at = end.saturating_sub(KILL_BEFORE_END);
                self.go(State::Stopping { kill_at, end }, &[])
            }
            State::Draining { .. } | State::Stopping { .. } => {
                [vec![Action::CutStreams], self.reap(then, now)].concat()
            }
            State::Reaping { until, .. } => {
                let until = until.min(end.max(now + KILL_BEFORE_END));
                self.go(State::Reaping { then, until }, &[])
            }
            State::Unkillable { .. } => {
                self.go(State::Stopped { exit: EXIT_UNKILLABLE }, &[Action::Exit(EXIT_UNKILLABLE)])
            }
            // Nothing lives any more; what is waited for is the node's courtesy.
            State::Releasing { .. } if again => self.gone(then, now, 0),
            State::Releasing { until, .. } => {
                self.go(State::Releasing { then, until: until.min(self.bounded(now, RELEASE_LIMIT)) }, &[])
            }
            // Nothing of these is worth waiting for: no answer is open.
            State::Fetching
            | State::Preparing
            | State::Claiming { .. }
            | State::Occupied
            | State::Launching
            | State::Loading { .. }
            | State::Failing { .. } => self.reap(then, now),
        }
    }
}
