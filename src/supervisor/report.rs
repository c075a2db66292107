//! What is told to the world after each step: `GET /status`, the proxy's view of the engine, systemd.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::Instant;

use super::cause::Cause;
use super::half::HalfView;
use super::running::Running;
use super::step::{Machine, State};
use crate::config::{Config, ModelSource};
use crate::engine::remarks::Remark;
use crate::link::status::{
    EngineStatus, GpuStatus, Listening, ModelStatus, ProxyStatus, RankStatus, ReadAhead, RemarkStatus, Requests,
    Status, WeightsStatus,
};
use crate::link::{EngineState, EngineView};
use crate::weights::Snapshot;

/// Held over a restart where `limits.hold` says nothing: most engines that come back at all come
/// back for a client that is still there.
const HOLD_OVER_RESTART: Duration = Duration::from_secs(30);
/// systemd is asked for this much more time with every sign of progress.
const MORE_TIME: Duration = Duration::from_mins(1);
/// And asked at most this often.
const ASK_EVERY: Duration = Duration::from_secs(10);

/// A hang that nobody acts upon yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspicion {
    pub silence: Duration,
    /// In words that go on from "the engine hung:".
    pub why: String,
}

/// Everything a report is made from; borrowed from the driver.
#[derive(Debug)]
pub struct Facts<'a> {
    pub machine: &'a Machine,
    pub config: &'a Config,
    pub config_files: &'a [PathBuf],
    /// The engine's processes have not said anything yet (`Loading::is_importing`).
    pub importing: bool,
    pub phase: &'a str,
    pub percent: Option<f32>,
    pub eta_seconds: Option<u64>,
    pub eta_range_seconds: Option<[u64; 2]>,
    pub slow: &'a str,
    pub cause: Option<&'a Cause>,
    pub stuck: &'a str,
    pub engine: Option<&'a Running>,
    pub ranks: &'a [RankStatus],
    pub engine_version: Option<&'a str>,
    pub last_exit: Option<&'a str>,
    pub snapshots: &'a [Snapshot],
    pub weights: Option<&'a WeightsStatus>,
    pub read_ahead: Option<ReadAhead>,
    pub half: &'a HalfView,
    pub listen: &'a Listening,
    pub warnings: &'a [String],
    pub uptime: Duration,
    pub gpus: &'a [GpuStatus],
    /// Who holds memory that the next engine needs, as a sentence.
    pub in_the_way: &'a str,
    pub bundle: Option<&'a Path>,
    pub suspicion: Option<&'a Suspicion>,
    pub suspicions: u64,
    pub remarks: &'a [Remark],
}

/// The state's name for everybody outside.
///
/// The machine waits in one state from the fork to readiness; people are told apart the part in which the
/// engine's processes import from the one in which they load.
fn public_state(machine: &Machine, importing: bool) -> EngineState {
    match &machine.state {
        State::Loading { .. } if importing => EngineState::Launching,
        State::Fetching => EngineState::Fetching,
        State::Preparing | State::Claiming { .. } => EngineState::Preparing,
        State::Occupied => EngineState::Occupied,
        State::Launching => EngineState::Launching,
        State::Loading { .. } => EngineState::Loading,
        State::Ready => EngineState::Ready,
        State::Busy => EngineState::Busy,
        State::Failing { .. } => EngineState::Failing,
        State::Draining { .. } => EngineState::Draining,
        State::Stopping { .. } => EngineState::Stopping,
        State::Reaping { .. } => EngineState::Reaping,
        State::Releasing { .. } => EngineState::Releasing,
        State::Unkillable { .. } => EngineState::Unkillable,
        State::Backoff { .. } => EngineState::Backoff,
        State::GaveUp { .. } => EngineState::GaveUp,
        State::Stopped { .. } => EngineState::Stopped,
    }
}

impl Facts<'_> {
    fn reason(&self) -> String {
        match &self.machine.state {
            State::Ready | State::Busy => String::new(),
            State::Unkillable { .. } => {
                format!(
                    "These processes do not end, not even by SIGKILL: {}. No second engine is started beside them.",
                    self.stuck
                )
            }
            _ if self.machine.stopping() => "sglangd is stopping.".into(),
            State::Claiming { .. } | State::Occupied | State::Releasing { .. } if !self.in_the_way.is_empty() => {
                self.in_the_way.to_owned()
            }
            State::Occupied => "The GPUs are not free. No engine is started until they are.".into(),
            State::Draining { .. } | State::Stopping { .. } => "The engine is being restarted, as told.".into(),
            _ => self.cause.map(|cause| cause.sentence.clone()).unwrap_or_default(),
        }
    }

    fn advice(&self) -> String {
        match &self.machine.state {
            State::Ready | State::Busy => String::new(),
            State::Unkillable { .. } => {
                "They hang in the kernel, mostly in a driver: the node needs a look, then a reboot.".into()
            }
            State::Claiming { .. } | State::Occupied if !self.in_the_way.is_empty() => {
                "End what holds the memory, or lower `mem-fraction-static`; the engine starts by itself once there is room."
                    .into()
            }
            _ => self.cause.map(|cause| cause.advice.clone()).unwrap_or_default(),
        }
    }

    pub fn status(&self) -> Status {
        let (repo, revision) = match &self.config.model.source {
            ModelSource::Repo { repo, revision } => (Some(repo.clone()), Some(revision.clone())),
            ModelSource::Folder(_) => (None, None),
        };
        let snapshot = self.snapshots.iter().find(|s| s.flag.is_none());
        let path = match &self.config.model.source {
            ModelSource::Folder(folder) => Some(folder.clone()),
            ModelSource::Repo { .. } => snapshot.map(|s| s.path.clone()),
        };
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            state: public_state(self.machine, self.importing),
            phase: self.phase.to_owned(),
            percent: self.percent,
            eta_seconds: self.eta_seconds,
            eta_range_seconds: self.eta_range_seconds,
            slow: self.slow.to_owned(),
            reason: self.reason(),
            advice: self.advice(),
            model: ModelStatus {
                name: self.config.model.name.clone(),
                repo,
                revision,
                commit: snapshot.map(|s| s.commit.clone()),
                path,
            },
            engine: EngineStatus {
                pid: self.engine.map(|e| e.pid),
                version: self.engine_version.map(str::to_owned),
                started_at: self.engine.map(|e| e.started_at.clone()),
                restarts: self.machine.restarts,
                last_exit: self.last_exit.map(str::to_owned),
                command: self.config.engine.command.clone(),
                port: self.engine.map(|e| e.upstream.addr.port()),
                ranks: self.ranks.to_vec(),
                cgroup: self.engine.and_then(|e| e.tree.cgroup.clone()),
                suspected_seconds: self.suspicion.map(|s| s.silence.as_secs()),
                suspicion: self.suspicion.map(|s| s.why.clone()).unwrap_or_default(),
                suspected_total: self.suspicions,
                remarks: self.remarks.iter().map(shown).collect(),
            },
            requests: Requests {
                in_flight: self.half.traffic.in_flight,
                queued: self.half.traffic.queued,
                max: self.config.limits.max,
                target: self.config.limits.target,
                served: self.half.traffic.served,
                websockets: self.half.traffic.websockets,
                room: self.half.traffic.room,
                engine: self.half.traffic.engine,
            },
            proxy: ProxyStatus { pid: self.half.pid, restarts: self.half.restarts },
            weights: self.weights.cloned(),
            gpus: self.gpus.to_vec(),
            bundle: self.bundle.map(Path::to_owned),
            read_ahead: self.read_ahead,
            // TLS can be switched by a reload, an address cannot.
            listen: Listening { tls: self.config.listen.tls.is_some(), ..self.listen.clone() },
            warnings: (self.warnings.iter().chain(&self.half.warnings).chain(&self.half.refused))
                .chain(&self.config.exposure())
                .chain(self.remarks.iter().map(|remark| &remark.sentence))
                .cloned()
                .collect(),
            uptime_seconds: self.uptime.as_secs(),
            config_files: self.config_files.to_vec(),
        }
    }

    /// What the proxy may say and do.
    pub fn view(&self) -> EngineView {
        let state = public_state(self.machine, self.importing);
        let will_return = !self.machine.stopping()
            && !matches!(
                state,
                EngineState::GaveUp | EngineState::Stopped | EngineState::Unkillable | EngineState::Occupied
            );
        let hold = match (will_return, self.config.limits.hold) {
            (false, _) => Duration::ZERO,
            (true, Duration::ZERO) => held_unasked(self.machine, self.cause),
            (true, hold) => hold,
        };
        EngineView {
            state,
            phase: self.phase.to_owned(),
            percent: self.percent,
            eta_seconds: self.eta_seconds,
            eta_range_seconds: self.eta_range_seconds,
            reason: self.reason(),
            upstream: match state {
                EngineState::Ready | EngineState::Busy => self.engine.map(|e| e.upstream.clone()),
                _ => None,
            },
            suspected: self.suspicion.is_some(),
            will_return,
            hold_ms: hold.as_millis() as u64,
        }
    }
}

/// How long requests wait for an engine that will return, where nobody said how long: over a restart, not for the first start.
fn held_unasked(machine: &Machine, cause: Option<&Cause>) -> Duration {
    match machine.state {
        // From the first moment of a death, even of one whose cause is never known.
        State::Failing { .. }
        | State::Draining { .. }
        | State::Stopping { .. }
        | State::Reaping { .. }
        | State::Releasing { .. }
        | State::Backoff { .. } => HOLD_OVER_RESTART,
        _ if machine.restarts > 0 || cause.is_some() => HOLD_OVER_RESTART,
        _ => Duration::ZERO,
    }
}

fn shown(remark: &Remark) -> RemarkStatus {
    RemarkStatus { kind: remark.kind.name().to_owned(), text: remark.sentence.clone() }
}

/// One line for people: the log, systemd's STATUS.
pub fn headline(status: &Status) -> String {
    let mut line = status.state.name().replace('_', " ");
    if !status.phase.is_empty() {
        line = format!("{line}: {}", status.phase);
    }
    if let Some(percent) = status.percent {
        line = format!("{line}, {percent:.0} %");
    }
    if let Some(eta) = status.eta_seconds {
        line = format!("{line}, ready in about {eta} s");
    }
    if let Some([least, most]) = status.eta_range_seconds {
        line = format!("{line}, ready in {}", crate::link::status::between(least, most));
    }
    if !status.slow.is_empty() {
        line = format!("{line}; {}", status.slow);
    }
    if !status.reason.is_empty() {
        line = format!("{line}: {}", status.reason);
    }
    if matches!(status.state, EngineState::Ready | EngineState::Busy) {
        // By now the greeting has scrolled off the screen.
        let scheme = match (status.listen.tls, status.listen.public.starts_with("unix:")) {
            (_, true) => "",
            (true, false) => "https://",
            (false, false) => "http://",
        };
        line = format!("{line}: {} on {scheme}{}", status.model.name, status.listen.public);
    }
    line
}

/// What systemd is told. All of it is best effort: without systemd nothing is said, and a socket
/// that refuses changes nothing.
#[derive(Debug)]
pub struct Systemd {
    told_ready: bool,
    headline: String,
    asked: Option<Instant>,
    watchdog: Option<Duration>,
    petted: Instant,
}

impl Systemd {
    pub fn new() -> Self {
        Self {
            told_ready: false,
            headline: String::new(),
            asked: None,
            // Half the time given, as sd_watchdog_enabled(3) advises.
            watchdog: sd_notify::watchdog_enabled().map(|limit| limit / 2),
            petted: Instant::now(),
        }
    }

    fn tell(states: &[NotifyState<'_>]) {
        let _ = sd_notify::notify(states);
    }

    /// After each step. READY is said at Ready, or at GaveUp, which serves too (503 with the reason).
    pub fn step(&mut self, status: &Status) {
        let line = headline(status);
        if line != self.headline {
            Self::tell(&[NotifyState::Status(&line)]);
            self.headline = line;
        }
        let serves = matches!(status.state, EngineState::Ready | EngineState::Busy | EngineState::GaveUp);
        if serves && !self.told_ready {
            self.told_ready = true;
            Self::tell(&[NotifyState::Ready]);
        }
    }

    /// The start or the stop got further: systemd is to wait on.
    pub fn progressed(&mut self) {
        if self.asked.is_some_and(|at| at.elapsed() < ASK_EVERY) {
            return;
        }
        self.asked = Some(Instant::now());
        Self::tell(&[NotifyState::ExtendTimeoutUsec(u32::try_from(MORE_TIME.as_micros()).unwrap_or(u32::MAX))]);
    }

    /// Called by the driver's own loop each second: a driver that hangs pets no watchdog.
    pub fn tick(&mut self) {
        if self.watchdog.is_some_and(|every| self.petted.elapsed() >= every.saturating_sub(Duration::from_secs(1))) {
            self.petted = Instant::now();
            Self::tell(&[NotifyState::Watchdog]);
        }
    }

    pub fn stopping(&self) {
        Self::tell(&[NotifyState::Stopping]);
    }

    pub fn reloading(&self) {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            Self::tell(&[NotifyState::Reloading, now]);
        }
    }

    pub fn reloaded(&self) {
        if self.told_ready {
            Self::tell(&[NotifyState::Ready]);
        }
    }
}

impl Default for Systemd {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Gate;
    use crate::supervisor::step::{Check, Failure, GiveUp, Policy, Retry, Terms, Then};

    fn machine() -> Machine {
        let restart = Terms { max_failures: 5, window: 1, backoff: 1, backoff_max: 1 };
        let policy = Policy { restart, give_up: GiveUp::Serve, grace: 1, start_stall: 1, start_limit: 1 };
        Machine::start(policy).0
    }

    #[test]
    fn requests_are_held_over_a_restart_whose_cause_nobody_knows_but_not_for_the_first_start() {
        let mut machine = machine();
        let then = Then::Retry(Failure { class: "unknown", retry: Retry::Backoff, exit: 1 });
        for first in [State::Fetching, State::Preparing, State::Claiming { until: 0 }, State::Launching] {
            machine.state = first;
            assert_eq!(held_unasked(&machine, None), Duration::ZERO, "{:?}", machine.state);
        }
        let away = [
            State::Failing { until: 0 },
            State::Draining { cut_at: 0, end: 0 },
            State::Stopping { kill_at: 0, end: 0 },
            State::Reaping { then, until: 0 },
            State::Releasing { then, until: 0 },
            State::Backoff { until: 0 },
        ];
        for state in away {
            machine.state = state;
            assert_eq!(held_unasked(&machine, None), HOLD_OVER_RESTART, "{:?}", machine.state);
        }
        (machine.state, machine.restarts) = (State::Fetching, 1);
        assert_eq!(held_unasked(&machine, None), HOLD_OVER_RESTART);
    }

    #[test]
    fn clients_are_let_through_in_ready_and_busy_alone() {
        let mut machine = machine();
        let (then, failure) = (Then::Restart, Failure { class: "crash", retry: Retry::Never, exit: 1 });
        let closed = [
            State::Fetching,
            State::Preparing,
            State::Claiming { until: 0 },
            State::Occupied,
            State::Launching,
            State::Loading { since: 0, progress: 0, check: Check::Confirming },
            State::Failing { until: 0 },
            State::Draining { cut_at: 0, end: 0 },
            State::Stopping { kill_at: 0, end: 0 },
            State::Reaping { then, until: 0 },
            State::Unkillable { then },
            State::Releasing { then, until: 0 },
            State::Backoff { until: 0 },
            State::GaveUp { failure },
            State::Stopped { exit: 0 },
        ];
        for state in closed {
            machine.state = state;
            assert_eq!(public_state(&machine, false).gate(), Gate::Closed, "{:?}", machine.state);
        }
        for state in [State::Ready, State::Busy] {
            machine.state = state;
            assert_eq!(public_state(&machine, true).gate(), Gate::Open, "{:?}", machine.state);
        }
    }
}
