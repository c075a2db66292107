//! Watches over the engine: sees work while it starts, signs of life while it serves, and says what is
//! wrong with it before anything is done about it.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Driver, Event, Millis, Report, State};
use crate::engine::env::kernel_caches;
use crate::engine::remarks::{Expected, Kind, Remark};
use crate::health::figures::Figures;
use crate::health::loads;
use crate::health::probe::{self, Pulse};
use crate::health::signs::Signs;
use crate::health::watch::{Sign, Watch};
use crate::link::status::RankStatus;
use crate::observe::clock;
use crate::supervisor::autopsy::Judged;
use crate::supervisor::loading::Memory;
use crate::supervisor::look::{Look, look};
use crate::supervisor::oversight::{self, Answer, Beat, Opinion, Patience, Question};
use crate::supervisor::report::Suspicion;
use crate::supervisor::warmth;
use crate::sys::proc::Stat;

/// Between two looks at the processes of an engine that starts, at most: a load of any size reads more than
/// the smallest rate that counts within it.
const LOOK_AT_START: Duration = Duration::from_secs(5);

/// What is known of one engine beside what it says itself.
#[derive(Debug, Default)]
pub struct Vigil {
    pub watch: Watch,
    signs: Signs,
    /// The last reading of its figures.
    figures: Option<Figures>,
    looking: Looking,
    looked: Option<Millis>,
    /// Why it is ended although it lives, until the examination takes it.
    pub judged: Option<Judged>,
    pub suspicion: Option<Suspicion>,
    /// This engine was ready once.
    pub served: bool,
    /// How long it compiled kernels before it was ready.
    compiled: Duration,
    pub remarks: Vec<Remark>,
    /// What the log has been told of already.
    remarked: BTreeSet<Kind>,
    cold: Option<Remark>,
    /// What the flags lead to expect of it.
    expected: Expected,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Looking {
    #[default]
    No,
    Yes,
}

impl Vigil {
    pub fn of(expected: Expected) -> Self {
        Self { expected, ..Self::default() }
    }
}

fn is_stopped(title: &str, pid: i32) -> String {
    format!("{title} (pid {pid}) is stopped (state T in /proc/{pid}/stat)")
}

impl Driver {
    /// Once a second.
    pub(super) async fn beat(&mut self) {
        self.systemd.tick();
        self.look_at_gpus();
        match self.machine.state {
            State::Loading { .. } => self.watch_start(),
            State::Ready | State::Busy => self.watch_over().await,
            State::Draining { .. } | State::Stopping { .. } | State::Reaping { .. } => {
                self.systemd.progressed();
                self.vigil.suspicion = None;
            }
            _ => self.vigil.suspicion = None,
        }
    }

    /// While it starts: looks for work that the log does not speak of.
    fn watch_start(&mut self) {
        let every = LOOK_AT_START.min(self.config().start.stall / 4).as_millis() as Millis;
        if self.vigil.looked.is_none_or(|at| self.now() >= at + every) {
            self.look();
        }
    }

    async fn watch_over(&mut self) {
        let now = self.now();
        let Some(engine) = &self.engine else { return };
        let watch = &mut self.vigil.watch;
        if let Some(age) = engine.heard.last_batch() {
            watch.sign(Sign::Batch, now.saturating_sub(age.as_millis() as Millis));
        }
        // Each of them is watched by its handle; this is for those that could not be.
        if let Some(rank) = engine.dead_rank().cloned() {
            self.rank_ended(&rank).await;
            return;
        }
        let stopped = engine.stopped();
        match &stopped {
            Some(_) => watch.stopped(now),
            None => watch.running(),
        }
        let health = &self.config().health;
        let patience = Patience { hang_after: health.hang_after, probe_interval: health.probe_interval };
        let Beat { opinion, event, questions } = oversight::beat(&mut self.vigil.watch, now, &patience);
        match opinion {
            Opinion::Trusted => self.trust(),
            Opinion::Suspected(silence) => self.suspect(silence, self.why(silence, stopped)),
            Opinion::Hung(silence) => {
                let why = self.why(silence, stopped);
                self.vigil.judged.get_or_insert(Judged::Hung(format!("The engine hung: {why}.")));
            }
        }
        if let Some(event) = event {
            self.on(event).await;
        }
        self.remark();
        for question in questions {
            match question {
                Question::Probe => self.probe(),
                Question::Look => self.look(),
                Question::Figures => self.read_figures(),
            }
        }
    }

    /// What the silence is made of, in words.
    fn why(&self, silence: Duration, stopped: Option<RankStatus>) -> String {
        let seconds = silence.as_secs();
        if let Some(RankStatus { name, pid }) = stopped {
            return format!("{}, for {seconds} s", is_stopped(&name, pid));
        }
        let waits = match self.half_view.borrow().traffic.in_flight {
            0 => "a probe waits".to_owned(),
            1 => "a request waits".to_owned(),
            n => format!("{n} requests wait"),
        };
        let lies = if self.vigil.watch.probe_lies() { "; its /health says 200 all the while" } else { "" };
        format!(
            "no token, no batch, no figure that moves, no compiler and no answer to a probe for {seconds} s while \
             {waits}{lies}"
        )
    }

    fn trust(&mut self) {
        if self.vigil.suspicion.take().is_some() {
            tracing::info!("the engine shows signs of life again: no hang");
        }
    }

    /// A hang is suspected: said everywhere, and nothing is done yet. The first moment of it is where evidence
    /// is still to be had that a kill destroys.
    fn suspect(&mut self, silence: Duration, why: String) {
        if self.vigil.suspicion.is_none() {
            self.suspicions += 1;
            self.bundle_of_a_suspicion();
            tracing::warn!("a hang of the engine is suspected: {why}");
        }
        self.vigil.suspicion = Some(Suspicion { silence, why });
    }

    /// A rank is gone while the main process lives: nothing will come of what is open.
    pub(super) async fn rank_ended(&mut self, rank: &RankStatus) {
        if !Self::is_past_loading(&self.machine) {
            return;
        }
        let sentence = format!("A process of the engine died: {} (pid {}).", rank.name, rank.pid);
        self.vigil.judged = Some(Judged::RankDied(sentence));
        self.on(Event::Hung).await;
    }

    fn look(&mut self) {
        let Some(engine) = &self.engine else { return };
        if self.vigil.looking == Looking::Yes {
            return;
        }
        let at = self.now();
        let (tree, caches, reports) = (engine.tree.clone(), kernel_caches(&engine.spec.env), self.reports.clone());
        self.vigil.looking = Looking::Yes;
        self.vigil.looked = Some(at);
        tokio::spawn(async move {
            // A look at every process, and at files on any disk: not on a worker of the runtime.
            if let Ok(seen) = tokio::task::spawn_blocking(move || look(&tree, at, &caches)).await {
                let _ = reports.send(Report::Looked(Box::new(seen))).await;
            }
        });
    }

    /// What a look found.
    pub(super) async fn looked(&mut self, mut seen: Look) {
        self.vigil.looking = Looking::No;
        if self.engine.as_ref().is_none_or(|engine| engine.pid != seen.of) {
            return;
        }
        let at = seen.sample.at;
        seen.sample.gpu_bytes = self.gpu_bytes(&seen.members);
        if let Some(bytes) = seen.stored {
            self.loading.stored(bytes);
        }
        let work = self.vigil.signs.take(seen.sample);
        let compiles = work.iter().any(|work| work.is_compilation());
        match self.machine.state {
            State::Loading { .. } => {
                self.ranks = seen.ranks.into_iter().map(|(name, _)| name).collect();
                self.suspect_start(seen.stopped.as_ref());
                if compiles {
                    self.vigil.compiled += LOOK_AT_START.min(self.config().start.stall / 4);
                }
                if !work.is_empty() {
                    tracing::debug!("the start works: {work:?}");
                    self.systemd.progressed();
                    self.on(Event::Progressed).await;
                }
            }
            State::Ready | State::Busy if compiles => self.vigil.watch.sign(Sign::Kernel, at),
            _ => {}
        }
    }

    /// A process that is stopped is said in a start, too; what ends it there is `start.stall`.
    fn suspect_start(&mut self, stopped: Option<&Stat>) {
        let now = self.now();
        let Some(stat) = stopped else {
            self.vigil.watch.running();
            return self.trust();
        };
        self.vigil.watch.stopped(now);
        let silence = self.vigil.watch.evidence(now).stopped.unwrap_or_default();
        let known = self.ranks.iter().find(|rank| rank.pid == stat.pid);
        let title = known.map_or_else(|| stat.comm.clone(), |rank| rank.name.clone());
        self.suspect(silence, format!("{}, for {} s", is_stopped(&title, stat.pid), silence.as_secs()));
    }

    fn read_figures(&self) {
        let Some(engine) = &self.engine else { return };
        let (of, upstream, reports) = (engine.pid, engine.upstream.clone(), self.reports.clone());
        tokio::spawn(async move {
            // Without an answer there is no evidence; the next look asks again.
            if let Some(figures) = loads::look(upstream.addr, upstream.api_key.as_deref()).await {
                let _ = reports.send(Report::Figures { of, figures }).await;
            }
        });
    }

    pub(super) fn figures(&mut self, of: i32, figures: Figures) {
        if self.engine.as_ref().is_none_or(|engine| engine.pid != of) {
            return;
        }
        let news = figures.beside(self.vigil.figures.as_ref(), clock::unix_time());
        self.vigil.figures = Some(figures);
        self.vigil.watch.figures(news, self.now());
    }

    fn probe(&self) {
        let Some(engine) = &self.engine else { return };
        let (addr, limit, reports) = (engine.upstream.addr, self.config().health.probe_timeout, self.reports.clone());
        tokio::spawn(async move {
            let pulse = probe::pulse(addr, limit).await;
            let _ = reports.send(Report::Pulse(pulse)).await;
        });
    }

    pub(super) async fn pulsed(&mut self, pulse: &Pulse) {
        let answer = match pulse {
            Pulse::Healthy => Answer::Healthy,
            Pulse::Refused(_) | Pulse::Silent(_) => Answer::Not,
        };
        if answer == Answer::Not && !Self::is_past_loading(&self.machine) {
            tracing::warn!("the engine looked ready, but its /health said otherwise ({pulse:?}); asking again");
        }
        let now = self.now();
        let event = oversight::answered(&mut self.vigil.watch, answer, now);
        self.on(event).await;
    }

    /// Ready: from now on its ranks are known, and each that ends is told of at once. Ready again after it was
    /// busy: nothing begins.
    pub(super) fn begin_watch(&mut self) {
        let now = self.now();
        self.vigil.watch.passed(now);
        self.vigil.suspicion = None;
        if std::mem::replace(&mut self.vigil.served, true) {
            return;
        }
        let Some(engine) = &mut self.engine else { return };
        engine.stop_watching();
        self.ranks = engine.note_ranks();
        let memory = Memory::of(&self.means.folders.state, &engine.spec);
        self.vigil.cold = warmth::remark(&memory.beside("kernels"), self.vigil.compiled, &engine.spec.env);
    }

    /// What its own figures say that nobody meant.
    fn remark(&mut self) {
        let Some(engine) = &self.engine else { return };
        let mut remarks = engine.heard.remarks(&self.vigil.expected);
        remarks.extend(self.vigil.cold.clone());
        for remark in &remarks {
            if self.vigil.remarked.insert(remark.kind) {
                tracing::warn!("{}", remark.sentence);
            }
        }
        self.vigil.remarks = remarks;
    }

    /// What was seen last of a start that makes no progress, for the sentence about it.
    pub(super) fn start_suspicion(&self) -> String {
        self.vigil.suspicion.as_ref().map_or_else(String::new, |suspicion| format!("; {}", suspicion.why))
    }
}
