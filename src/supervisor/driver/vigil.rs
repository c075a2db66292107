//! Watches over the engine: sees work while it starts, signs of life while it serves, and says what is
//! wrong with it before anything is done about it.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Driver, Millis, Report, State};
use crate::engine::env::kernel_caches;
use crate::engine::remarks::{Expected, Kind, Remark};
use crate::health::figures::Figures;
use crate::health::loads;
use crate::health::probe::{self, Pulse};
use crate::health::signs::Signs;
use crate::link::status::RankStatus;
use crate::observe::clock;
use crate::supervisor::autopsy::Judged;
use crate::supervisor::loading::Memory;
use crate::supervisor::look::{Look, look};
use crate::supervisor::oversight::{Answer, Found, News, Opinion, Seen, Work};
use crate::supervisor::report::Suspicion;
use crate::supervisor::warmth;
use crate::sys::proc::Stat;

/// What is known of one engine beside what it says itself.
#[derive(Debug, Default)]
pub struct Vigil {
    signs: Signs,
    /// The last reading of its figures.
    figures: Option<Figures>,
    /// A process of it that somebody stopped.
    stopped: Option<RankStatus>,
    /// Why it is ended although it lives, until the examination takes it.
    pub judged: Option<Judged>,
    pub suspicion: Option<Suspicion>,
    /// How long it compiled kernels before it was ready.
    compiled: Duration,
    pub remarks: Vec<Remark>,
    /// What the log has been told of already.
    remarked: BTreeSet<Kind>,
    cold: Option<Remark>,
    /// What the flags lead to expect of it.
    expected: Expected,
}

impl Vigil {
    pub fn of(expected: Expected) -> Self {
        Self { expected, ..Self::default() }
    }
}

impl Driver {
    /// Once a second.
    pub(super) async fn beat(&mut self) {
        self.systemd.tick();
        self.look_at_gpus();
        match self.state() {
            State::Ready | State::Busy => {
                let seen = self.seen();
                self.vigil.stopped.clone_from(&seen.stopped);
                self.take(News::Beat(seen)).await;
                self.remark();
                return;
            }
            State::Draining { .. } | State::Stopping { .. } | State::Reaping { .. } => self.systemd.progressed(),
            _ => {}
        }
        self.take(News::Beat(Seen::default())).await;
    }

    fn seen(&self) -> Seen {
        let (Some(engine), now) = (&self.engine, self.now()) else { return Seen::default() };
        Seen {
            batch: engine.heard.last_batch().map(|age| now.saturating_sub(age.as_millis() as Millis)),
            gone: engine.dead_rank().cloned(),
            stopped: engine.stopped(),
        }
    }

    /// Known everywhere before anything is done about it.
    pub(super) fn thinks(&mut self, opinion: Opinion) {
        match opinion {
            Opinion::Trusted => self.trust(),
            Opinion::Suspected(silence) => self.suspect(silence),
            Opinion::Hung(silence) => {
                let why = self.why(silence);
                self.vigil.judged.get_or_insert(Judged::Hung(format!("The engine hung: {why}.")));
            }
            Opinion::RankDied(rank) => {
                let sentence = format!("A process of the engine died: {} (pid {}).", rank.name, rank.pid);
                self.vigil.judged = Some(Judged::RankDied(sentence));
            }
        }
    }

    /// What the silence is made of, in words.
    fn why(&self, silence: Duration) -> String {
        let seconds = silence.as_secs();
        if let Some(RankStatus { name, pid }) = &self.vigil.stopped {
            return format!("{name} (pid {pid}) is stopped (state T in /proc/{pid}/stat), for {seconds} s");
        }
        let waits = match self.half_view.borrow().traffic.in_flight {
            0 => "a probe waits".to_owned(),
            1 => "a request waits".to_owned(),
            n => format!("{n} requests wait"),
        };
        let lies = if self.oversight.watch.probe_lies() { "; its /health says 200 all the while" } else { "" };
        format!(
            "no token, no batch, no figure that moves, no compiler and no answer to a probe for {seconds} s while \
             {waits}{lies}"
        )
    }

    fn trust(&mut self) {
        // What is being ended shows none.
        let lives = matches!(self.state(), State::Loading { .. } | State::Ready | State::Busy);
        if self.vigil.suspicion.take().is_some() && lives {
            tracing::info!("the engine shows signs of life again: no hang");
        }
    }

    /// A hang is suspected: said everywhere, and nothing is done yet. The first moment of it is where evidence
    /// is still to be had that a kill destroys.
    fn suspect(&mut self, silence: Duration) {
        let why = self.why(silence);
        if self.vigil.suspicion.is_none() {
            self.suspicions += 1;
            self.bundle_of_a_suspicion();
            tracing::warn!("a hang of the engine is suspected: {why}");
        }
        self.vigil.suspicion = Some(Suspicion { silence, why });
    }

    pub(super) fn look(&mut self) {
        let reports = self.reports.clone();
        let engine = self.engine.as_ref().map(|engine| (engine.tree.clone(), kernel_caches(&engine.spec.env)));
        let at = self.now();
        tokio::spawn(async move {
            let seen = match engine {
                // A look at every process, and at files on any disk: not on a worker of the runtime.
                Some((tree, caches)) => tokio::task::spawn_blocking(move || look(&tree, at, &caches)).await.ok(),
                None => None,
            };
            let _ = reports.send(Report::Looked(seen.map(Box::new))).await;
        });
    }

    /// What a look found.
    pub(super) async fn looked(&mut self, seen: Option<Box<Look>>) {
        let of = self.engine.as_ref().map(|engine| engine.pid);
        let Some(mut seen) = seen.filter(|seen| Some(seen.of) == of) else {
            self.take(News::LookedInVain).await;
            return;
        };
        let at = seen.sample.at;
        seen.sample.gpu_bytes = self.gpu_bytes(&seen.members);
        if let Some(bytes) = seen.stored {
            self.loading.stored(bytes);
        }
        let signs = self.vigil.signs.take(seen.sample);
        let work = match &signs[..] {
            [] => Work::None,
            signs if signs.iter().any(|sign| sign.is_compilation()) => Work::Compilation,
            _ => Work::Some,
        };
        let mut stopped = None;
        if let State::Loading { .. } = self.state() {
            self.ranks = seen.ranks.into_iter().map(|(name, _)| name).collect();
            stopped = seen.stopped.map(|stat| self.named(&stat));
            self.vigil.stopped.clone_from(&stopped);
            if work == Work::Compilation {
                self.vigil.compiled += self.oversight.look_at_start();
            }
            if work != Work::None {
                tracing::debug!("the start works: {signs:?}");
                self.systemd.progressed();
            }
        }
        self.take(News::Looked(Found { at, work, stopped })).await;
    }

    fn named(&self, stat: &Stat) -> RankStatus {
        let known = self.ranks.iter().find(|rank| rank.pid == stat.pid).cloned();
        known.unwrap_or_else(|| RankStatus { name: stat.comm.clone(), pid: stat.pid })
    }

    pub(super) fn read_figures(&self) {
        let Some(engine) = &self.engine else { return };
        let (of, upstream, reports) = (engine.pid, engine.upstream.clone(), self.reports.clone());
        tokio::spawn(async move {
            // Without an answer there is no evidence; the next look asks again.
            if let Some(figures) = loads::look(upstream.addr, upstream.api_key.as_deref()).await {
                let _ = reports.send(Report::Figures { of, figures }).await;
            }
        });
    }

    pub(super) async fn figures(&mut self, of: i32, figures: Figures) {
        if self.engine.as_ref().is_none_or(|engine| engine.pid != of) {
            return;
        }
        let news = figures.beside(self.vigil.figures.as_ref(), clock::unix_time());
        self.vigil.figures = Some(figures);
        self.take(News::Figures(news)).await;
    }

    pub(super) fn probe(&self) {
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
        if answer == Answer::Not && !matches!(self.state(), State::Ready | State::Busy) {
            tracing::warn!("the engine looked ready, but its /health said otherwise ({pulse:?}); asking again");
        }
        self.take(News::Answered(answer)).await;
    }

    /// Ready: from now on its ranks are known, and each that ends is told of at once.
    pub(super) fn begin_watch(&mut self) {
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
