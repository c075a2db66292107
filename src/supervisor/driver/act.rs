//! One wish of the machine at a time.

use std::sync::Arc;

use rand::Rng;

use super::{Driver, Report, bundle};
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
use crate::supervisor::findings::{Stacks, Subject};
use crate::supervisor::loading::{Loading, Memory};
use crate::supervisor::oversight::Life;
use crate::supervisor::prepare::{Ingredients, prepare};
use crate::supervisor::releasing::{Uses, Waited};
use crate::supervisor::running::{End, Notice, launch, stranger};
use crate::supervisor::step::{Action, Check, Event, State};

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
            Action::Drain => self.half.drain(),
            // The proxy learns it with the state.
            Action::Hold => {}
            Action::CutStreams => self.half.cut(CUT_REASON),
            Action::Terminate => {
                if let Some(engine) = &self.engine {
                    engine.terminate();
                }
            }
            Action::Kill => self.kill(),
            Action::Release => self.release(),
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
            weights: acquired.folders.clone(),
        };
        self.node.uses = Some(Uses::of(&from.config, &from.resolved, &from.own_env));
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

    /// Before a launch: until there is room for it, for as long as it takes, unless the launch is given up.
    fn claim(&mut self, roll: u16) {
        let Some(uses) = self.node.uses.clone() else { return };
        let (room, given_up, reports) = (self.room.clone(), self.hurry.clone(), self.reports.clone());
        tokio::spawn(async move {
            let teller = reports.clone();
            let held = async move {
                let _ = teller.send(Report::Held { roll }).await;
            };
            if room.free(&uses, &given_up, held).await == Waited::Free {
                let _ = reports.send(Report::Released { roll }).await;
            }
        });
    }

    /// Until the memory of the engine that was is free; at a stop, not for long.
    fn release(&mut self) {
        let roll = rand::rng().random_range(0..1000);
        if !matches!(self.state(), State::Releasing { .. }) {
            self.claim(roll);
            return;
        }
        let Some(uses) = self.uses.take() else {
            // Nothing was launched: nothing is held.
            self.send(Report::Released { roll });
            return;
        };
        let (room, hurry, reports) = (self.room.clone(), self.hurry.clone(), self.reports.clone());
        tokio::spawn(async move {
            let _ = room.released(&uses, &hurry).await;
            let _ = reports.send(Report::Released { roll }).await;
        });
    }

    async fn launch(&mut self) {
        let Some(prepared) = self.prepared.take() else { return };
        self.uses.clone_from(&self.node.uses);
        self.node.launched();
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
        let known = prepared.known;
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
                self.loading.launched(self.config().engine.tp, memory, known);
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

    /// Once the engine has imported, the disk has nothing to do until its ranks load.
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
        self.reading = Some(Reading::of(order, self.spawner.clone(), self.ahead.clone()));
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
        let (reports, spawner) = (self.reports.clone(), self.spawner.clone());
        let (state, about) = (self.means.folders.state.clone(), self.about());
        let reached = match self.oversight.life() {
            Life::Served => Reached::Ready,
            Life::Starts => self.loading.reached(),
        };
        let words = engine.take_last_words();
        let subject = Subject::new(engine.tree.clone(), engine.spec.clone());
        let (of, ended, heard) = (engine.pid, engine.ended, Arc::clone(&engine.heard));
        // The engine goes back to the driver for its end; only its last words are waited for here.
        self.engine = Some(engine);
        let verdict = self.vigil.judged.take().or_else(|| self.start_verdict().map(Judged::Hung));
        self.unexamined = Some(autopsy::unexamined(ended, verdict.as_ref()));
        // Only of one that hangs: where a rank died, the others wait for it, and nobody should wait for them.
        let stacks = if matches!(verdict, Some(Judged::Hung(_))) { Stacks::Take } else { Stacks::Leave };
        let before = self.cause.as_ref().map(|cause| cause.failure.class);
        let node = self.node.witness(&self.ranks, self.engine.as_ref().map(|engine| engine.pid));
        let requests = bundle::requests(self.half.clone());
        tokio::spawn(async move {
            // Both before anything is killed; together they take no longer than the stacks of a hung one.
            let (tail, alive) = tokio::join!(words, subject.alive(&spawner, stacks));
            // The kernel's log may be long: not on a worker of the runtime.
            let node = tokio::task::spawn_blocking(move || node.found()).await.unwrap_or_default();
            let log = subject.tail(&tail);
            let found = Found { ended, reached, tail, signatures: heard.signatures(), verdict, node };
            let cause = autopsy::examine(&found, before);
            let mut pages = [vec![bundle::cause(&cause), log], about, subject.start(), alive].concat();
            let class = cause.failure.class;
            // The restart goes on; what is written down is for later.
            let _ = reports.send(Report::Examined { of, cause }).await;
            pages.push(requests.await);
            let written = bundle::written(state, class, pages, &spawner).await;
            let _ = reports.send(Report::Bundled(written)).await;
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
        // Whoever waits for the GPUs' memory before a launch waits in vain.
        std::mem::take(&mut self.hurry).cancel();
        let end = self.engine.as_ref().map_or_else(End::default, crate::supervisor::running::Running::end);
        if let Some(engine) = &mut self.engine {
            engine.stop_watching();
        }
        if let Some(prepared) = self.prepared.take() {
            prepared.leftovers.sweep();
        }
        let (current, stuck, reports) = (self.current.clone(), Arc::clone(&self.stuck), self.reports.clone());
        let (preparing, acquiring) = (self.preparing.take(), self.acquiring.take());
        let (warming, reading, spawner) = (self.warming.clone(), self.reading.take(), self.spawner.clone());
        tokio::spawn(async move {
            // What it is just making would be left behind; its report, before ours, has it removed.
            if let Some(preparing) = preparing {
                let _ = preparing.await;
            }
            end.run(current, stuck, spawner).await;
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

    /// Why an engine died is found: in time, while its end waits for it, or later.
    pub(super) async fn examined(&mut self, of: i32, cause: Cause) {
        let failure = cause.failure;
        let waits = self.engine.as_ref().is_some_and(|engine| engine.pid == of);
        match self.state() {
            State::Failing { .. } if waits => {
                self.unexamined = None;
                self.blame(cause);
                self.on(Event::Examined(failure)).await;
            }
            // Another one serves by now: nobody may read of the end of that one beside it.
            State::Ready | State::Busy => cause.log(),
            _ => self.blame(cause),
        }
    }

    /// The cause that everybody is told from now on.
    pub(super) fn blame(&mut self, cause: Cause) {
        cause.log();
        self.cause = Some(cause);
    }
}
