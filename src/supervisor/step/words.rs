//! The words that a step is told in: states, events, actions, and the times that belong to them.

use crate::supervisor::restart::{Failure, Millis, Terms};

/// What may be tuned about restarts and stops, all in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    pub restart: Terms,
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
/// A dead engine's GPUs are free some 200 ms after its end (measured); what is held after this long is
/// somebody else's, or will not be freed by waiting.
pub const RELEASE_LIMIT: Millis = 20_000;
/// Exit code when a process could not be ended.
pub const EXIT_UNKILLABLE: u8 = 70;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum State {
    /// The weights are being brought onto the disk.
    Fetching,
    /// Flags are checked, the port chosen, files written, leftovers of an earlier run ended.
    Preparing,
    /// All is prepared; the GPUs are asked whether they are free.
    Claiming {
        until: Millis,
    },
    /// Somebody holds their memory. Nothing is launched until they are free.
    Occupied,
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
    /// Its GPUs' memory is to be free before anything else happens, but not for ever.
    Releasing {
        then: Then,
        until: Millis,
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
    /// They are not, and waiting does not help: somebody else holds them. `Released` may still follow.
    Held {
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
    /// The proxy keeps what comes waiting for the next engine; `Idle` when nothing is open.
    Hold,
    /// The proxy ends open streams with an error event.
    CutStreams,
    /// SIGTERM to the engine's main process alone.
    Terminate,
    /// SIGKILL to all of the engine, and to a fetch or a check; `TreeEmpty` when nothing is left.
    Kill,
    /// Ask whether the GPUs' memory is free, until it is: `Released`, or `Held` first.
    Release,
    /// End the process with this code.
    Exit(u8),
}
