//! What the driver does with news from outside, and by itself each second.

use std::time::Duration;

use tokio::time::Instant;

use super::{Driver, Event, LastProbe, Order, Report, State};
use crate::engine::log::{Fact, Signature};
use crate::health::probe::{self, Pulse};
use crate::health::verdict::{Evidence, Verdict, judge};
use crate::launch::output::Said;
use crate::link::status::WeightsStatus;
use crate::supervisor::loading::News;
use crate::supervisor::running::Notice;
use crate::weights::{Pace, Progress};

/// Titles appear when the ranks have imported everything; nobody needs them sooner.
const RANKS_EVERY: u64 = 5;

/// What is known from `/health` and from silence.
#[derive(Debug)]
pub struct PulseState {
    pub last: LastProbe,
    /// When a probe was last answered 200.
    answered: Option<Instant>,
    /// When one was last sent.
    asked: Option<Instant>,
    in_flight: bool,
    /// Since when something waits for the engine.
    waiting_since: Option<Instant>,
    /// Why it is called hung, until the examination takes it.
    pub judged: Option<String>,
    pub suspected: Option<Duration>,
    /// This engine was ready once.
    pub served: bool,
}

impl Default for PulseState {
    fn default() -> Self {
        Self {
            last: LastProbe::Passed,
            answered: None,
            asked: None,
            in_flight: false,
            waiting_since: None,
            judged: None,
            suspected: None,
            served: false,
        }
    }
}

impl PulseState {
    pub fn passed(&mut self) {
        let now = Instant::now();
        (self.last, self.answered, self.asked, self.suspected) = (LastProbe::Passed, Some(now), Some(now), None);
    }

    fn begin_anew(&mut self) {
        let now = Instant::now();
        self.asked = self.asked.map(|_| now);
        self.waiting_since = self.waiting_since.map(|_| now);
        self.suspected = None;
    }
}

/// How the warning about what a reload could not make live begins.
const WAITS: &str = "changed in the configuration, live only after a restart";

impl Driver {
    pub(super) async fn reported(&mut self, report: Report) {
        match report {
            Report::Acquired(Ok(acquired)) => {
                for warning in &acquired.resolved.warnings {
                    self.warn(warning);
                }
                self.acquired = Some(acquired);
                self.on(Event::Fetched).await;
            }
            Report::Acquired(Err(cause)) => {
                if !self.machine.stopping() {
                    let failure = cause.failure;
                    self.blame(cause);
                    self.on(Event::FetchFailed(failure)).await;
                }
            }
            Report::Prepared(Ok(prepared)) => {
                if matches!(self.machine.state, State::Preparing) {
                    self.prepared = Some(prepared);
                    self.on(Event::Prepared).await;
                } else {
                    // A stop came first.
                    prepared.leftovers.sweep();
                    let _ = std::fs::remove_file(&prepared.yaml);
                }
            }
            Report::Prepared(Err(cause)) => {
                let failure = cause.failure;
                self.blame(cause);
                self.on(Event::PrepareFailed(failure)).await;
            }
            Report::Examined(cause) => {
                let failure = cause.failure;
                self.blame(cause);
                self.on(Event::Examined(failure)).await;
            }
            Report::Pulse(pulse) => self.pulsed(&pulse).await,
            Report::Notice(Notice::LooksReady) => self.on(Event::LooksReady).await,
            Report::Notice(Notice::Ended(how)) => {
                if let Some(engine) = &mut self.engine {
                    engine.ended = Some(how);
                    self.last_exit = Some(how.to_string());
                }
                self.on(Event::Exited).await;
            }
            Report::TreeEmpty => {
                self.forget_engine();
                self.systemd.progressed();
                self.on(Event::TreeEmpty).await;
            }
            Report::Released { roll } => self.on(Event::Released { roll }).await,
            Report::Order(Order::Restart(reply)) => {
                let before = self.machine.state.clone();
                let stopping = self.machine.stopping();
                self.on(Event::Restart).await;
                let answer = restart_in_words(&before, stopping);
                tracing::info!("asked to restart the engine: {answer}");
                // Whoever asked may have left.
                let _ = reply.send(answer.to_owned());
            }
        }
    }

    async fn pulsed(&mut self, pulse: &Pulse) {
        self.pulse.in_flight = false;
        match pulse {
            Pulse::Healthy => {
                self.pulse.passed();
                self.on(Event::Healthy).await;
            }
            Pulse::Refused(_) | Pulse::Silent(_) if !Self::is_past_loading(&self.machine) => {
                tracing::warn!("the engine looked ready, but its /health said otherwise ({pulse:?}); asking again");
                self.on(Event::Unhealthy).await;
            }
            Pulse::Refused(_) | Pulse::Silent(_) => {
                self.last_probe_failed();
                self.on(Event::Unhealthy).await;
            }
        }
    }

    pub(super) async fn heard(&mut self, said: Said) {
        if let Fact::Ready = said.fact {
            self.on(Event::LooksReady).await;
            return;
        }
        if matches!(said.fact, Fact::Fatal(Signature::Port)) && matches!(self.machine.state, State::Loading { .. }) {
            // Found after the whole load, and not exited over: it would stay for as long as it may.
            self.pulse.judged = Some("The engine found its private port taken by another program.".into());
            self.on(Event::Hung).await;
            return;
        }
        if self.loading.heard(&said) == News::Further {
            self.systemd.progressed();
            self.on(Event::Progressed).await;
        }
    }

    pub(super) fn downloaded(&mut self, step: &Progress) {
        self.systemd.progressed();
        let weights = self.weights.get_or_insert_default();
        match step {
            Progress::Plan { files, bytes_total, bytes_present } => {
                *weights = WeightsStatus {
                    files: *files as u64,
                    done: *bytes_present,
                    total: *bytes_total,
                    ..WeightsStatus::default()
                };
                self.loading.named(format!("fetching {files} files"));
            }
            Progress::Bytes { done, total, rate_bytes_per_s, eta_seconds, pace, .. } => {
                (weights.done, weights.total, weights.rate) = (*done, *total, *rate_bytes_per_s);
                weights.stalled = *pace == Pace::Stalled;
                self.loading.fetching(*pace, *eta_seconds);
            }
            Progress::Verifying { file, .. } => self.loading.named(format!("verifying {file}")),
            Progress::Waiting { file, holder } => {
                self.loading.named(format!("waiting for {holder}, who fetches {file}"));
            }
            Progress::Done { .. } | Progress::Failed { .. } => {}
        }
    }

    pub(super) async fn traffic_changed(&mut self) {
        let view = self.half_view.borrow_and_update().clone();
        let busy = view.traffic.in_flight > 0 || view.traffic.open_answers > 0;
        if view.traffic.in_flight == 0 {
            self.pulse.waiting_since = None;
        } else {
            self.pulse.waiting_since.get_or_insert_with(Instant::now);
        }
        // Only a report that is newer than the drain, of a proxy that knows of it, proves that nothing slipped
        // in before it.
        let newer = self.drain_asked.is_some_and(|asked| view.reports > asked);
        let proven = view.pid.is_none() || (newer && view.traffic.closed);
        if matches!(self.machine.state, State::Draining { .. }) && !busy && proven {
            self.on(Event::Idle).await;
        }
    }

    /// Time in which we did not run is no silence of the engine's: every patience begins anew.
    pub(super) async fn woke(&mut self) {
        let gap = self.awake.elapsed();
        if gap < super::OVERSLEPT {
            return;
        }
        tracing::warn!(
            "sglangd itself did not run for {} s; the engine's silence meanwhile does not count",
            gap.as_secs()
        );
        self.pulse.begin_anew();
        self.on(Event::Progressed).await;
    }

    /// Once a second.
    pub(super) async fn beat(&mut self) {
        self.systemd.tick();
        if matches!(self.machine.state, State::Loading { .. })
            && self.born.elapsed().as_secs().is_multiple_of(RANKS_EVERY)
            && let Some(engine) = &self.engine
        {
            self.ranks = engine.named_ranks().into_iter().map(|(name, _)| name).collect();
        }
        if matches!(self.machine.state, State::Draining { .. } | State::Stopping { .. } | State::Reaping { .. }) {
            self.systemd.progressed();
        }
        if !Self::is_past_loading(&self.machine) {
            self.pulse.suspected = None;
            return;
        }
        let evidence = self.evidence();
        if let Some(rank) = self.engine.as_ref().and_then(|e| e.dead_rank()) {
            self.pulse.judged = Some(format!("A process of the engine died: {} (pid {}).", rank.comm, rank.pid));
        }
        match judge(&evidence, self.pulse.last, self.config().health.hang_after) {
            Verdict::Alive => self.pulse.suspected = None,
            Verdict::Busy => {
                self.pulse.suspected = None;
                self.on(Event::LooksBusy).await;
            }
            Verdict::Suspected(silence) => {
                if self.pulse.suspected.is_none() {
                    tracing::warn!(
                        "no sign of life from the engine for {} s while something waits: a hang is suspected",
                        silence.as_secs()
                    );
                }
                self.pulse.suspected = Some(silence);
            }
            Verdict::Hung(silence) => {
                self.pulse.judged.get_or_insert_with(|| {
                    format!(
                        "The engine hung: no token, no batch and no answer to a probe for {} s while something waited.",
                        silence.as_secs()
                    )
                });
                self.on(Event::Hung).await;
                return;
            }
        }
        self.ask_for_a_pulse(&evidence);
    }

    fn evidence(&self) -> Evidence {
        let view = self.half_view.borrow();
        let since = |at: Option<Instant>| at.map(|at| at.elapsed());
        let failing = (self.pulse.last == LastProbe::Failed).then_some(self.pulse.asked).flatten();
        Evidence {
            last_byte: view.traffic.last_byte_ms.map(Duration::from_millis),
            last_batch: self.engine.as_ref().and_then(|engine| engine.heard.last_batch()),
            last_pulse: since(self.pulse.answered),
            waiting: [since(self.pulse.waiting_since), since(failing)].into_iter().flatten().max(),
            rank_dead: self.engine.as_ref().is_some_and(|engine| engine.dead_rank().is_some()),
        }
    }

    /// A probe is a request to the scheduler: only where nothing else proves it alive.
    fn ask_for_a_pulse(&mut self, evidence: &Evidence) {
        let every = self.config().health.probe_interval;
        let fresh = [evidence.last_byte, evidence.last_batch].into_iter().flatten().any(|age| age < every);
        let due = self.pulse.asked.is_none_or(|at| at.elapsed() >= every);
        if self.pulse.in_flight || !due || (fresh && self.pulse.last == LastProbe::Passed) {
            return;
        }
        let Some(engine) = &self.engine else { return };
        self.pulse.in_flight = true;
        self.pulse.asked = Some(Instant::now());
        let (addr, limit, reports) = (engine.upstream.addr, self.config().health.probe_timeout, self.reports.clone());
        tokio::spawn(async move {
            let pulse = probe::pulse(addr, limit).await;
            let _ = reports.send(Report::Pulse(pulse)).await;
        });
    }

    /// SIGHUP: limits and keys go live, all else is named; a bad file changes nothing.
    pub(super) fn reloaded(&mut self) {
        self.systemd.reloading();
        match (self.reload.0)() {
            Err(error) => tracing::error!("the configuration was not reloaded, everything stays as it was:\n{error}"),
            Ok(loaded) => {
                let live = &mut self.means.loaded;
                live.config.limits = loaded.config.limits.clone();
                live.config.auth = loaded.config.auth.clone();
                live.config.listen.tls.clone_from(&loaded.config.listen.tls);
                live.config.listen.proxy_protocol = loaded.config.listen.proxy_protocol;
                let settings = crate::link::ProxySettings::from(&live.config);
                let waiting = crate::config::needs_restart(live, &loaded);
                // What the last reload said of the file is no longer true of it.
                self.warnings.retain(|warning| !warning.starts_with(WAITS));
                if waiting.is_empty() {
                    tracing::info!("configuration reloaded");
                } else {
                    self.warn(&format!("{WAITS}: {}", waiting.join(", ")));
                }
                self.settings.send_replace(settings);
            }
        }
        self.systemd.reloaded();
    }

    /// Said once in the log, and in status for as long as we live.
    pub(super) fn warn(&mut self, warning: &str) {
        if !self.warnings.iter().any(|known| known == warning) {
            tracing::warn!("{warning}");
            self.warnings.push(warning.to_owned());
        }
    }
}

/// What an operator's restart leads to, from the state in which it came.
fn restart_in_words(state: &State, stopping: bool) -> &'static str {
    match state {
        _ if stopping => "sglangd is stopping; nothing is started any more",
        State::Ready | State::Busy => {
            "open answers may end within shutdown.grace, new requests wait for the next engine"
        }
        State::Launching | State::Loading { .. } => "the start under way is ended, and another one begun",
        State::GaveUp { .. } | State::Backoff { .. } => "starting now; earlier failures do not count any more",
        State::Reaping { .. } | State::Releasing { .. } => "starting as soon as nothing of the last engine is left",
        State::Unkillable { .. } => "starting as soon as the processes that do not end are gone",
        State::Occupied => "starting as soon as the GPUs are free",
        State::Draining { .. }
        | State::Stopping { .. }
        | State::Failing { .. }
        | State::Fetching
        | State::Preparing
        | State::Claiming { .. } => "a fresh engine is on its way already",
        State::Stopped { .. } => "sglangd has stopped",
    }
}
