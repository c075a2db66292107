//! What the driver does with news from outside, and by itself each second.

use super::{Driver, Event, Order, Report, State};
use crate::engine::death::Reached;
use crate::engine::log::{Fact, Signature};
use crate::engine::remarks::Expected;
use crate::launch::output::Said;
use crate::launch::reaper::BATCH;
use crate::link::status::{ReadAhead, WeightsStatus};
use crate::shutdown::Wish;
use crate::supervisor::ahead::{Reading, told};
use crate::supervisor::autopsy::Judged;
use crate::supervisor::loading::News as Heard;
use crate::supervisor::oversight::{News, Proxy};
use crate::supervisor::running::Notice;
use crate::weights::ahead::Ahead;
use crate::weights::{Pace, Progress};

/// How the warning about what a reload could not make live begins.
const WAITS: &str = "changed in the configuration, live only after a restart";

impl Driver {
    pub(super) async fn wished(&mut self, wish: Wish) {
        match wish {
            Wish::Stop => self.stop_wished().await,
            Wish::Reload => self.reloaded(),
            Wish::Reap => {
                while self.spawner.reap() == BATCH {
                    tokio::task::yield_now().await;
                }
            }
            Wish::Quit => tracing::warn!(
                "SIGQUIT: an orphaned rank of the engine signals its failure, or somebody wants a core dump; nothing is done about it"
            ),
            Wish::Nothing => tracing::debug!("SIGUSR1 or SIGUSR2: nothing is done about it"),
        }
    }

    async fn stop_wished(&mut self) {
        self.traffic_changed().await;
        let before = self.state().clone();
        let again = self.oversight.machine.stopping();
        let decided = self.oversight.take(News::StopWished, self.now());
        if decided.event.is_none() {
            return;
        }
        if again {
            tracing::warn!("asked again to stop: not waiting any longer");
        } else {
            tracing::info!("stopping, within {} s", self.config().shutdown.grace.as_secs());
            self.systemd.stopping();
        }
        self.carry_out(decided, &before).await;
        self.hurry.cancel();
    }

    pub(super) async fn reported(&mut self, report: Report) {
        match report {
            Report::Acquired(Ok(acquired)) => {
                for warning in &acquired.resolved.warnings {
                    self.warn(warning);
                }
                self.expected = Expected::of(&acquired.resolved);
                self.acquired = Some(acquired);
                self.on(Event::Fetched).await;
            }
            Report::Acquired(Err(cause)) => {
                if !self.oversight.machine.stopping() {
                    let failure = cause.failure;
                    self.blame(cause);
                    self.on(Event::FetchFailed(failure)).await;
                }
            }
            Report::Prepared(Ok(prepared)) => {
                if matches!(self.state(), State::Preparing) {
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
            Report::Examined { of, cause } => self.examined(of, cause).await,
            Report::Pulse(pulse) => self.pulsed(&pulse).await,
            Report::Looked(seen) => self.looked(seen).await,
            Report::Figures { of, figures } => self.figures(of, figures).await,
            Report::Notice(Notice::RankEnded(rank)) => {
                self.take(News::RankEnded(rank)).await;
            }
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
            Report::Held { roll } => self.on(Event::Held { roll }).await,
            Report::Gpus(look) => self.saw_gpus(look),
            Report::Bundled(written) => self.bundled(written),
            Report::Order(Order::Bundle(reply)) => self.bundle_on_demand(reply),
            Report::Order(Order::Restart(reply)) => {
                self.traffic_changed().await;
                let before = self.state().clone();
                let stopping = self.oversight.machine.stopping();
                self.on(Event::Restart).await;
                let answer = restart_in_words(&before, stopping);
                tracing::info!("asked to restart the engine: {answer}");
                // Whoever asked may have left.
                let _ = reply.send(answer.to_owned());
            }
        }
    }

    pub(super) async fn heard(&mut self, said: Said) {
        if let Fact::Ready = said.fact {
            self.on(Event::LooksReady).await;
            return;
        }
        if matches!(said.fact, Fact::Fatal(Signature::Port)) && matches!(self.state(), State::Loading { .. }) {
            // Found after the whole load, and not exited over: it would stay for as long as it may.
            let sentence = "The engine found its private port taken by another program.";
            self.vigil.judged = Some(Judged::Hung(sentence.into()));
            self.on(Event::Hung).await;
            return;
        }
        if self.loading.heard(&said) == Heard::Further {
            self.systemd.progressed();
            self.on(Event::Progressed).await;
            match self.loading.reached() {
                Reached::Nothing => {}
                Reached::Ranks | Reached::Loading => self.reading.iter_mut().for_each(Reading::begin),
                Reached::Loaded | Reached::Listening | Reached::Ready => self.stop_reading_ahead(),
            }
        }
    }

    /// What it says after its end was asked for is no news.
    pub(super) fn read_ahead_is(&mut self, ahead: Ahead) {
        let over = self.reading.as_ref().is_none_or(Reading::is_over);
        match ahead {
            Ahead::Reading { done, total } if !over => {
                self.read_ahead = Some(ReadAhead { done, total });
                self.loading.read_ahead(done, total);
            }
            Ahead::Reading { .. } => {}
            Ahead::Done(outcome) => {
                self.read_ahead = None;
                let told = told(&outcome);
                if outcome.failed.is_empty() { tracing::info!("{told}") } else { self.warn(&told) }
            }
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
            Progress::Verifying { done, total, file } => self.loading.verifying(file, *done, *total),
            Progress::Waiting { file, holder } => {
                self.loading.named(format!("waiting for {holder}, who fetches {file}"));
            }
            Progress::Done { .. } | Progress::Failed { .. } => {}
        }
    }

    /// What the proxy said last; also before it is asked to drain, so that nothing it said earlier proves that it has.
    pub(super) async fn traffic_changed(&mut self) {
        let view = self.half_view.borrow_and_update().clone();
        let (traffic, now) = (&view.traffic, self.now());
        let proxy = Proxy {
            reports: view.pid.map(|_| view.reports),
            closed: traffic.closed,
            // A WebSocket may be silent for as long as its client is.
            waiting: traffic.in_flight.saturating_sub(traffic.websockets),
            open: traffic.in_flight + traffic.open_answers,
            last_byte: traffic.last_byte_ms.map(|age| now.saturating_sub(age)),
        };
        self.take(News::Traffic(proxy)).await;
    }

    pub(super) async fn woke(&mut self) {
        let gap = self.awake.elapsed();
        let before = self.state().clone();
        if let Some(decided) = self.oversight.woke(gap, self.now()) {
            tracing::warn!(
                "sglangd itself did not run for {} s; the engine's silence meanwhile does not count",
                gap.as_secs()
            );
            self.carry_out(decided, &before).await;
        }
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
