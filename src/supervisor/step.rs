//! What the supervisor does next: one pure function of the state, an event and the time.
//!
//! ```text
//!              ┌────────────────── Stop, from any state ──────────────────┐
//!              │ (loading or earlier: straight to Reaping)                 ▼
//! Fetching ─► Preparing ─► Launching ─► Loading ─► Ready ◄─► Busy ──► Draining ─► Stopping
//!   │  ▲         │            │            │         │         │                     │
//!   │  │         │            │            └────► Failing ◄────┘                     │
//!   │  │         │            │                     │                                ▼
//!   │  │         │            └─────────────────────┴───────────────────────────► Reaping ─► Unkillable
//!   │  │         │                                                                   │          │
//!   │  └─────────┴──── Backoff ◄── retry ──── Releasing ◄────────────────────────────┴──────────┘
//!   │                     ▲                       ├─ stop ─► Stopped
//!   └── fails ────────────┘──── no use ─► GaveUp ◄┘
//! ```
//!
//! `Reaping` ends only when the engine's whole process tree is gone, `Releasing` only when its GPUs
//! are free: there is never a second engine beside a first one. Nothing here knows of processes,
//! sockets or clocks: times come in as [`Millis`], wishes go out as [`Action`]s.

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

/// What may be tuned about restarts and stops, all in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Failures within `window` of useful life after which it gives up.
    pub max_failures: u32,
    /// Counted in time the engine was ready, not in wall time: an engine that loads for 20 minutes
    /// and then dies is a crash loop too.
    pub window: Millis,
    pub backoff: Millis,
    pub backoff_max: Millis,
    pub give_up: GiveUp,
    /// From the stop signal to the end of everything.
    pub grace: Millis,
    pub start_stall: Millis,
    pub start_limit: Millis,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GiveUp {
    /// Go on answering 503 with the reason.
    Serve,
    /// End with the failure's exit code (75 for a crash loop).
    Exit,
}

/// Streams are cut, and the engine is told to end, this long before the grace is over.
pub const CUT_BEFORE_END: Millis = 8_000;
/// What is left of the engine is killed this long before the grace is over.
pub const KILL_BEFORE_END: Millis = 2_000;
/// SIGKILL ends a process within milliseconds; one that is still there after this sits in the kernel.
pub const REAP_LIMIT: Millis = 10_000;
/// The driver collects the last lines of a dead engine within this.
pub const EXAMINE_LIMIT: Millis = 5_000;
/// The same class of failure this many times in a row, without a ready engine in between, will
/// happen a fourth time too.
pub const SAME_WAY: usize = 3;
/// Exit code of a crash loop, whatever the single failures were.
pub const EXIT_CRASH_LOOP: u8 = 75;
/// Exit code when a process could not be ended.
pub const EXIT_UNKILLABLE: u8 = 70;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum State {
    /// The weights are being brought onto the disk.
    Fetching,
    /// Flags are checked, the port chosen, files written, leftovers of an earlier run ended.
    Preparing,
    /// The engine's process is being started.
    Launching,
    /// The engine loads. `progress` is when it last got further.
    Loading {
        since: Millis,
        progress: Millis,
        check: Check,
    },
    Ready,
    /// It does not answer its probe, but it works: traffic goes on.
    Busy,
    /// It is dead or hung; what can be known is being collected.
    Failing {
        until: Millis,
    },
    /// No new requests; open ones may finish until then.
    Draining {
        cut_at: Millis,
        end: Millis,
    },
    /// The engine's main process was told to end.
    Stopping {
        kill_at: Millis,
        end: Millis,
    },
    /// Everything of the engine gets SIGKILL until nothing is left.
    Reaping {
        then: Then,
        until: Millis,
    },
    /// Not even SIGKILL ended it.
    Unkillable {
        then: Then,
    },
    /// Its GPUs are to be free before anything else happens.
    Releasing {
        then: Then,
    },
    /// Waiting before the next start.
    Backoff {
        until: Millis,
    },
    /// Starting again would not help.
    GaveUp {
        failure: Failure,
    },
    Stopped {
        exit: u8,
    },
}

/// How far the proof of readiness is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Check {
    /// Neither the log nor `/ready` said so yet.
    Waiting,
    /// They did; one `/health` is on its way.
    Confirming,
}

/// What follows once the engine is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Then {
    Retry(Failure),
    Stop {
        exit: u8,
    },
    /// Started again on an operator's wish: counts as no failure.
    Restart,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Fetched,
    FetchFailed(Failure),
    Prepared,
    PrepareFailed(Failure),
    Launched,
    LaunchFailed(Failure),
    /// The start got further (a log fact, bytes read, memory growing).
    Progressed,
    /// The ready line, or `/ready` 200.
    LooksReady,
    /// `/health` answered 200.
    Healthy,
    /// `/health` failed or timed out.
    Unhealthy,
    /// Silent, but at work (`health::verdict`).
    LooksBusy,
    /// No sign of life for longer than the limit, or a rank is dead.
    Hung,
    /// The engine's main process ended.
    Exited,
    /// The driver knows why.
    Examined(Failure),
    /// No request is open towards the engine.
    Idle,
    /// Nothing of the engine (or of a fetch or a check) is left.
    TreeEmpty,
    /// The engine's GPUs are free. `roll` is a random number below 1000, for the backoff's jitter.
    Released {
        roll: u16,
    },
    /// SIGTERM or SIGINT; a second one skips the waiting.
    Stop,
    /// An operator wants a fresh engine.
    Restart,
    /// The time given by [`Machine::deadline`] has come.
    Tick,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    Fetch,
    Prepare,
    Launch,
    /// One `/health`.
    Confirm,
    /// Say why the engine died; answer with `Examined`.
    Examine,
    /// The proxy admits nothing more; `Idle` when nothing is open.
    Drain,
    /// The proxy ends open streams with an error event.
    CutStreams,
    /// SIGTERM to the engine's main process alone.
    Terminate,
    /// SIGKILL to all of the engine, and to a fetch or a check; `TreeEmpty` when nothing is left.
    Kill,
    /// Wait for the GPUs' memory; `Released` when it is free.
    Release,
    /// End the process with this code.
    Exit(u8),
}

/// The state and what it must remember.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    pub state: State,
    pub policy: Policy,
    /// Engines started again since the beginning.
    pub restarts: u32,
    /// When each failure of the present window happened, on the useful clock.
    failures: VecDeque<(Millis, Failure)>,
    /// Time spent ready before the present engine.
    useful: Millis,
    /// Since when the present engine is ready.
    ready_since: Option<Millis>,
    /// When everything must be over, once a stop was asked for.
    stop_by: Option<Millis>,
}

impl Machine {
    /// The machine before its first step, and that step's wishes.
    pub fn start(policy: Policy) -> (Self, Vec<Action>) {
        let machine = Self {
            state: State::Fetching,
            policy,
            restarts: 0,
            failures: VecDeque::new(),
            useful: 0,
            ready_since: None,
            stop_by: None,
        };
        (machine, vec![Action::Fetch])
    }

    /// When a [`Event::Tick`] is due if nothing else happens before.
    pub fn deadline(&self) -> Option<Millis> {
        match &self.state {
            State::Loading { since, progress, .. } => {
                Some((since + self.policy.start_limit).min(progress + self.policy.start_stall))
            }
            State::Failing { until } | State::Reaping { until, .. } | State::Backoff { until } => Some(*until),
            State::Draining { cut_at, .. } => Some(*cut_at),
            State::Stopping { kill_at, .. } => Some(*kill_at),
            State::Unkillable { .. } => self.stop_by,
            _ => None,
        }
    }

    /// Failures that count towards giving up at present.
    pub fn recent_failures(&self) -> usize {
        self.failures.len()
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
            (State::Preparing, Event::Prepared) => self.go(State::Launching, &[Action::Launch]),
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
                self.ready_since = Some(now);
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
            (State::Ready | State::Busy, Event::Restart) => {
                let end = now + self.policy.grace;
                self.end_useful_life(now);
                self.go(State::Draining { cut_at: end.saturating_sub(CUT_BEFORE_END).max(now), end }, &[Action::Drain])
            }
            (State::GaveUp { .. }, Event::Restart) => {
                self.failures.clear();
                self.restarts += 1;
                self.go(State::Fetching, &[Action::Fetch])
            }

            // Of a launch that failed something may have come to life before.
            (State::Launching, Event::LaunchFailed(f)) | (State::Failing { .. }, Event::Examined(f)) => {
                self.reap(Then::Retry(*f), now)
            }
            (State::Failing { until }, Event::Tick) if now >= until => {
                self.reap(Then::Retry(Failure { class: "unknown", retry: Retry::Backoff, exit: EXIT_CRASH_LOOP }), now)
            }

            (State::Draining { end, .. }, Event::Idle) => self.terminate(end, &[]),
            (State::Draining { cut_at, end }, Event::Tick) if now >= cut_at => {
                self.terminate(end, &[Action::CutStreams])
            }
            (State::Draining { .. } | State::Stopping { .. }, Event::Exited) => self.reap(self.after_drain(), now),
            (State::Stopping { kill_at, .. }, Event::Tick) if now >= kill_at => self.reap(self.after_drain(), now),

            (State::Reaping { then, .. } | State::Unkillable { then }, Event::TreeEmpty) => {
                self.go(State::Releasing { then }, &[Action::Release])
            }
            (State::Reaping { then, until }, Event::Tick) if now >= until => match then {
                Then::Stop { .. } => {
                    self.go(State::Stopped { exit: EXIT_UNKILLABLE }, &[Action::Exit(EXIT_UNKILLABLE)])
                }
                Then::Retry(_) | Then::Restart => self.go(State::Unkillable { then }, &[]),
            },

            (State::Releasing { then }, Event::Released { roll }) => match then {
                Then::Stop { exit } => self.go(State::Stopped { exit }, &[Action::Exit(exit)]),
                Then::Retry(f) => self.failed(f, now, *roll),
                Then::Restart => {
                    self.restarts += 1;
                    self.go(State::Fetching, &[Action::Fetch])
                }
            },

            (State::Backoff { until }, Event::Tick) if now >= until => {
                self.restarts += 1;
                self.go(State::Fetching, &[Action::Fetch])
            }
            _ => Vec::new(),
        }
    }

    fn go(&mut self, to: State, actions: &[Action]) -> Vec<Action> {
        self.state = to;
        actions.to_vec()
    }

    fn fail(&mut self, now: Millis) -> Vec<Action> {
        self.end_useful_life(now);
        self.go(State::Failing { until: now + EXAMINE_LIMIT }, &[Action::Examine])
    }

    fn end_useful_life(&mut self, now: Millis) {
        if let Some(since) = self.ready_since.take() {
            self.useful += now.saturating_sub(since);
        }
    }

    fn terminate(&mut self, end: Millis, before: &[Action]) -> Vec<Action> {
        self.state = State::Stopping { kill_at: end.saturating_sub(KILL_BEFORE_END), end };
        [before, &[Action::Terminate]].concat()
    }

    fn reap(&mut self, then: Then, now: Millis) -> Vec<Action> {
        // With a stop on its way the end is near anyway, but never so near that SIGKILL has no time.
        let until = match self.stop_by {
            Some(end) => end.max(now + KILL_BEFORE_END).min(now + REAP_LIMIT),
            None => now + REAP_LIMIT,
        };
        self.go(State::Reaping { then, until }, &[Action::Kill])
    }

    fn after_drain(&self) -> Then {
        if self.stopping() { Then::Stop { exit: 0 } } else { Then::Restart }
    }

    /// A start or an engine failed and nothing of it is left: again, or never again?
    fn failed(&mut self, failure: Failure, now: Millis, roll: u16) -> Vec<Action> {
        let horizon = self.useful.saturating_sub(self.policy.window);
        if self.useful > self.policy.window {
            self.failures.retain(|(at, _)| *at >= horizon);
        }
        self.failures.push_back((self.useful, failure));
        let alike = self.failures.iter().rev().take_while(|(at, f)| *at == self.useful && f.class == failure.class);
        let crash_loop = alike.count() >= SAME_WAY || self.failures.len() >= self.policy.max_failures.max(1) as usize;
        if failure.retry == Retry::Never || crash_loop {
            let exit = if failure.retry == Retry::Never { failure.exit } else { EXIT_CRASH_LOOP };
            let failure = Failure { exit, ..failure };
            return match self.policy.give_up {
                GiveUp::Serve => self.go(State::GaveUp { failure }, &[]),
                GiveUp::Exit => self.go(State::Stopped { exit }, &[Action::Exit(exit)]),
            };
        }
        let doublings = u32::try_from(self.failures.len() - 1).unwrap_or(u32::MAX).min(20);
        let wait = self.policy.backoff.saturating_mul(1 << doublings).min(self.policy.backoff_max);
        // Between three quarters and five quarters: nodes that fell together do not rise together.
        let wait = wait * 3 / 4 + wait * Millis::from(roll.min(999)) / 2_000;
        self.go(State::Backoff { until: now + wait }, &[])
    }

    fn stop(&mut self, now: Millis) -> Vec<Action> {
        let again = self.stop_by.is_some();
        let end = *self.stop_by.get_or_insert(now + self.policy.grace);
        let then = Then::Stop { exit: 0 };
        match self.state.clone() {
            State::Stopped { .. } => Vec::new(),
            State::GaveUp { .. } | State::Backoff { .. } => self.go(State::Stopped { exit: 0 }, &[Action::Exit(0)]),
            State::Ready | State::Busy if !again => {
                self.end_useful_life(now);
                let cut_at = end.saturating_sub(CUT_BEFORE_END).max(now);
                self.go(State::Draining { cut_at, end }, &[Action::Drain])
            }
            // An operator's restart was draining: now it is for good, within the stop's own grace.
            State::Draining { .. } if !again => {
                let cut_at = end.saturating_sub(CUT_BEFORE_END).max(now);
                self.go(State::Draining { cut_at, end }, &[])
            }
            State::Stopping { .. } if !again => {
                let kill_at = end.saturating_sub(KILL_BEFORE_END);
                self.go(State::Stopping { kill_at, end }, &[])
            }
            State::Draining { .. } | State::Stopping { .. } | State::Ready | State::Busy => {
                let cut = self.go(State::Reaping { then, until: now + REAP_LIMIT }, &[Action::CutStreams]);
                [cut, self.reap(then, now)].concat()
            }
            State::Reaping { until, .. } => {
                let until = until.min(end.max(now + KILL_BEFORE_END));
                self.go(State::Reaping { then, until }, &[])
            }
            State::Unkillable { .. } => {
                self.go(State::Stopped { exit: EXIT_UNKILLABLE }, &[Action::Exit(EXIT_UNKILLABLE)])
            }
            State::Releasing { .. } => self.go(State::Releasing { then }, &[]),
            // Nothing of these is worth waiting for: no answer is open.
            State::Fetching | State::Preparing | State::Launching | State::Loading { .. } | State::Failing { .. } => {
                self.reap(then, now)
            }
        }
    }
}
