//! One wish of the machine at a time.

use std::sync::Arc;

use rand::Rng;

use super::{Driver, Report};
use crate::config::Prefetch;
use crate::engine::death::Reached;
use crate::exit::Exit;
use crate::health::probe::{self, Pulse};
use crate::launch::beside::Beside;
use crate::launch::record::Record;
use crate::supervisor::acquire::acquire;
use crate::supervisor::ahead::{Order, Reading, reads_files};
use crate::supervisor::autopsy::{self, Found, Judged};
use crate::supervisor::cause::Cause;
use crate::supervisor::loading::{Loading, Memory};
use crate::supervisor::prepare::{Ingredients, prepare};
use crate::supervisor::running::{End, Notice, launch, stranger};
use crate::supervisor::step::{Action, Check, Event, Machine, State};

/// What clients read whose stream is cut by a stop.
const CUT_REASON: &str = "The server is shutting down; the answer is incomplete. Try again.";

impl Driver {
    pub(super) async fn act(&mut self, action: Action) {
        match action {
            Action::Fetch => self.acquire(),
            Action::Prepare => self.prepare(),
            Action::Launch => self.launch().await,
            Action::Confirm => self.confirm(),
            Action::Examine => self.examine(),
            Action::Drain => {
                self.drain_asked = Some(self.half_view.borrow().reports);
                self.half.drain();
            }
            // The proxy learns it with the state.
            Action::Hold => self.drain_asked = Some(self.half_view.borrow().reports),
            Action::CutStreams => self.half.cut(CUT_REASON),
            Action::Terminate => {
                if let Some(engine) = &self.engine {
                    engine.terminate();
                }
            }
            Action::Kill => self.kill(),
            Action::Release => {
                // Whether the GPUs' memory is free again is not known here yet (no NVML): the tree is
                // empty, and the driver frees what a dead process held within some 200 ms.
                let roll = rand::rng().random_range(0..1000);
                self.send(Report::Released { roll });
            }
            Action::Exit(code) => self.exit = Some(code),
        }
    }

    /// To ourselves, later: never waits, since the reader is the sender.
    fn send(&self, report: Report) {
        let reports = self.reports.clone();
        tokio::spawn(async move {
            let _ = reports.send(report).await;
        });
    }

    fn acquire(&mut self) {
        self.loading = Loading::default();
        let (means, spawner, current) = (self.means.clone(), self.spawner.clone(), self.current.clone());
        let (steps, phases, reports) = (self.steps.clone(), self.phases.clone(), self.reports.clone());
        self.warming = Beside::default();
        let warming = self.warming.clone();
        current.begin();
        self.acquiring = Some(tokio::spawn(async move {
            let acquired = acquire(&means, &spawner, &current, &warming, &steps, &phases).await;
            let _ = reports.send(Report::Acquired(acquired)).await;
        }));
    }

    fn prepare(&mut self) {
        let Some(acquired) = &self.acquired else { return };
        let from = Ingredients {
            config: self.means.loaded.config.clone(),
            folders: self.means.folders.clone(),
            own_env: self.means.own_env.clone(),
            resolved: acquired.resolved.clone(),
            snapshots: acquired.snapshots.clone(),
        };
        let reports = self.reports.clone();
        self.preparing = Some(tokio::spawn(async move {
            let prepared = tokio::task::spawn_blocking(move || prepare(&from)).await;
            let prepared = prepared.unwrap_or_else(|error| {
                Err(Cause::passing(
                    "bug",
                    Exit::Bug.code(),
                    format!("The preparation of a start broke off: {error}."),
                    "",
                ))
            });
            let _ = reports.send(Report::Prepared(prepared.map(Box::new))).await;
        }));
    }

    async fn launch(&mut self) {
        let Some(prepared) = self.prepared.take() else { return };
        let (notices, mut from) = tokio::sync::mpsc::channel::<Notice>(4);
        let reports = self.reports.clone();
        tokio::spawn(async move {
            while let Some(notice) = from.recv().await {
                if reports.send(Report::Notice(notice)).await.is_err() {
                    return;
                }
            }
        });
        let program = prepared.spec.argv.first().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
        let launched = launch(*prepared, &self.spawner, &self.means.folders.runtime, self.said.clone(), notices).await;
        match launched {
            Ok((engine, record)) => {
                tracing::info!("engine started: pid {}, {}", engine.pid, crate::engine::argv::shown(&engine.spec.argv));
                if let Some(guard) = &mut self.guard
                    && let Err(error) = guard.tell(Some(&record))
                {
                    tracing::warn!(
                        "the guard is gone ({error}): should sglangd be killed, the next start ends what it leaves"
                    );
                    self.guard = None;
                }
                let memory = Memory::of(&self.means.folders.state, &engine.spec);
                self.loading.launched(self.config().engine.tp, memory);
                self.engine = Some(engine);
                self.read_ahead();
                Box::pin(self.on(Event::Launched)).await;
            }
            Err(error) => {
                let cause = autopsy::not_started(&program, &error);
                let event = Event::LaunchFailed(cause.failure);
                self.blame(cause);
                Box::pin(self.on(event)).await;
            }
        }
    }

    /// While the engine imports, the disk has nothing to do.
    fn read_ahead(&mut self) {
        let config = self.config();
        let Some(acquired) = &self.acquired else { return };
        if config.weights.prefetch == Prefetch::Never || !reads_files(acquired.resolved.load_format.as_deref()) {
            return;
        }
        let order = Order {
            folders: acquired.folders.clone(),
            prefetch: config.weights.prefetch,
            env: super::tell::proxy_env(&self.means.own_env, config),
        };
        self.reading = Some(Reading::start(order, self.spawner.clone(), self.ahead.clone()));
    }

    /// The engine has its weights, or is gone.
    pub(super) fn stop_reading_ahead(&mut self) {
        self.read_ahead = None;
        if let Some(reading) = &mut self.reading {
            reading.stop();
        }
    }

    fn confirm(&mut self) {
        let Some(engine) = &self.engine else { return };
        let (addr, limit, reports) = (engine.upstream.addr, self.config().health.probe_timeout, self.reports.clone());
        self.loading.named("answering its first health check".into());
        let tree = engine.tree.clone();
        tokio::spawn(async move {
            // The log's ready line does not prove it: the engine's warm-up asks the same address.
            let pulse = match stranger(&tree, addr).await {
                Some(who) => Pulse::Silent(who),
                None => probe::pulse(addr, limit).await,
            };
            let _ = reports.send(Report::Pulse(pulse)).await;
        });
    }

    fn examine(&mut self) {
        let Some(mut engine) = self.engine.take() else {
            return;
        };
        engine.stop_watching();
        let reports = self.reports.clone();
        let reached = if self.vigil.served { Reached::Ready } else { self.loading.reached() };
        let words = engine.take_last_words();
        let (ended, heard) = (engine.ended, Arc::clone(&engine.heard));
        // The engine goes back to the driver for its end; only its last words are waited for here.
        self.engine = Some(engine);
        let verdict = self.vigil.judged.take().or_else(|| self.start_verdict().map(Judged::Hung));
        let before = self.cause.as_ref().map(|cause| cause.failure.class);
        tokio::spawn(async move {
            let tail = words.await;
            let found = Found { ended, reached, tail, signatures: heard.signatures(), verdict };
            let _ = reports.send(Report::Examined(autopsy::examine(&found, before))).await;
        });
    }

    /// Why a start was given up that is still alive.
    fn start_verdict(&self) -> Option<String> {
        if self.engine.as_ref().is_none_or(|engine| engine.ended.is_some()) {
            return None;
        }
        let start = &self.config().start;
        let engine = self.engine.as_ref()?;
        let phase = self.loading.phase(&State::Loading { since: 0, progress: 0, check: Check::Waiting });
        Some(if engine.since.elapsed() >= start.limit {
            format!(
                "The engine's start took longer than start.limit ({} s); it was {phase}{}.",
                start.limit.as_secs(),
                self.start_suspicion()
            )
        } else {
            format!(
                "The engine's start made no progress for start.stall ({} s) while {phase}{}.",
                start.stall.as_secs(),
                self.start_suspicion()
            )
        })
    }

    fn kill(&mut self) {
        let end = self.engine.as_ref().map_or_else(End::default, crate::supervisor::running::Running::end);
        if let Some(engine) = &mut self.engine {
            engine.stop_watching();
        }
        if let Some(prepared) = self.prepared.take() {
            prepared.leftovers.sweep();
        }
        let (current, stuck, reports) = (self.current.clone(), Arc::clone(&self.stuck), self.reports.clone());
        let (preparing, acquiring) = (self.preparing.take(), self.acquiring.take());
        let (warming, reading) = (self.warming.clone(), self.reading.take());
        tokio::spawn(async move {
            // What it is just making would be left behind; its report, before ours, has it removed.
            if let Some(preparing) = preparing {
                let _ = preparing.await;
            }
            end.run(current, stuck).await;
            // It ends with its child, and only then nothing more is started.
            if let Some(acquiring) = acquiring {
                let _ = acquiring.await;
            }
            warming.end().await;
            if let Some(reading) = reading {
                reading.end().await;
            }
            let _ = reports.send(Report::TreeEmpty).await;
        });
    }

    /// Nothing of the engine is left.
    pub(super) fn forget_engine(&mut self) {
        self.engine = None;
        self.ranks.clear();
        Record::remove(&self.means.folders.runtime);
        // It holds keys that no longer open anything; still nobody's business.
        let _ = std::fs::remove_file(self.means.folders.engine_yaml());
        if let Some(guard) = &mut self.guard {
            let _ = guard.tell(None);
        }
    }

    /// The cause that everybody is told from now on.
    pub(super) fn blame(&mut self, cause: Cause) {
        tracing::error!("{}{}{}", cause.sentence, if cause.advice.is_empty() { "" } else { " " }, cause.advice);
        self.cause = Some(cause);
    }

    pub(super) fn is_past_loading(machine: &Machine) -> bool {
        matches!(machine.state, State::Ready | State::Busy)
    }
}
