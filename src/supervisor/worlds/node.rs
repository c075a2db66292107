//! The node of a seeded world: an engine, a proxy, clients and a kernel that carry out what the driver decides, and
//! go wrong. Honest about what they report, as `shadow` demands it; nothing else is promised.

use std::time::Duration;

use rand::Rng;

use super::super::oversight::{self, Answer, Found, News, Question, Seen, Work};
use super::super::step::*;
use super::seeds::{Faults, MINUTE, SECOND, World};
use super::{BAD_FLAG, CRASH, OOM};
use crate::health::figures;
use crate::link::status::RankStatus;

const PROBE_LIMIT: Millis = 25_000;

/// What an engine is like, and when it becomes so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    None,
    DiesAtStart(Failure),
    HangsAtStart,
    /// It starts for longer than a start may be silent, and its log says nothing: only looks show that it works.
    StartsInSilence,
    /// Its main process ends this long after readiness.
    Dies,
    /// A rank ends, the main process lives.
    RankDies,
    /// Nothing moves any more, and nobody is dead.
    Hangs,
    /// Somebody stopped a rank.
    Stopped,
}

#[derive(Debug)]
pub struct Engine {
    number: u32,
    pub trouble: Trouble,
    /// Since when the trouble shows.
    pub broken: Option<Millis>,
    /// Until when one long prefill, or a compilation, keeps it from answering probes.
    deep_until: Millis,
    deep: Deep,
    last_batch: Option<Millis>,
    figures: Figures,
    /// It ignores SIGTERM.
    deaf: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deep {
    Prefill,
    Compilation,
}

/// Its `/v1/loads`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Figures {
    /// Of a version that has none.
    Absent,
    Unread,
    Read(Millis),
}

/// What the proxy is, and what it was told. The way to it and back is a pipe: nothing overtakes.
#[derive(Debug, Default)]
pub struct Proxy {
    /// Of the proxies that lived.
    generation: u32,
    life: Life,
    mode: Mode,
    /// Requests open towards the engine.
    pub open: usize,
    last_byte: Option<Millis>,
    /// Reports that came of this one.
    reports: u64,
    down_free: Millis,
    up_free: Millis,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Life {
    #[default]
    Alive,
    Dead,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    #[default]
    Shut,
    Open,
    Cut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Happening {
    Stop,
    Report(Event),
    /// Of the engine with this number.
    Engine(u32, Event),
    /// Its trouble begins.
    Breaks(u32),
    /// It finishes a batch, and goes on with the next.
    Batch(u32),
    Answered(u32, Answer),
    /// A look at this engine that was begun then is over.
    Looked(u32, Millis),
    FiguresRead(u32),
    Request,
    /// In the proxy of this generation, in the engine with this number.
    RequestEnds(u32, u32),
    /// The proxy of this generation.
    ProxyLearns(u32, Mode),
    ProxyReports(u32, oversight::Proxy),
    ProxyDies,
    ProxyIsBorn,
    Beat,
    /// Nothing of the supervisor runs for so long.
    Frozen(Millis),
    StrangerComes,
    StrangerGoes,
}

fn rank() -> RankStatus {
    RankStatus { name: "TP3".into(), pid: 7 }
}

impl World {
    pub fn act(&mut self, action: Action) {
        match action {
            Action::Fetch => {
                let (took, fails) = (self.between(0, 20 * SECOND), self.faulty(3));
                let event = if fails { Event::FetchFailed(CRASH) } else { Event::Fetched };
                self.later(took, Happening::Report(event));
            }
            Action::Prepare => {
                let (took, fails) = (self.between(0, 300), self.faulty(2));
                let event = if fails { Event::PrepareFailed(OOM) } else { Event::Prepared };
                self.later(took, Happening::Report(event));
            }
            Action::Release => {
                self.release_asked = true;
                self.look_at_gpus();
            }
            Action::Launch => self.launch(),
            Action::Confirm => {
                let (fails, took) = (self.faulty(5), self.between(1_000, 3 * SECOND));
                let answer = if fails { Answer::Not } else { Answer::Healthy };
                self.later(took, Happening::Answered(self.launches, answer));
                if fails {
                    // What asks for readiness goes on asking.
                    self.of_engine(took + SECOND, Event::LooksReady);
                }
            }
            Action::Examine => {
                let failure = self.engine.as_ref().map_or(CRASH, |engine| match engine.trouble {
                    Trouble::DiesAtStart(failure) => failure,
                    Trouble::Hangs | Trouble::HangsAtStart | Trouble::Stopped => OOM,
                    _ => CRASH,
                });
                let took = if self.faulty(2) { 2 * EXAMINE_LIMIT } else { 300 };
                self.later(took, Happening::Report(Event::Examined(failure)));
            }
            // The state tells the proxy to hold.
            Action::Drain | Action::Hold => self.tell_proxy(Mode::Shut),
            Action::CutStreams => self.tell_proxy(Mode::Cut),
            Action::Terminate => {
                let took = self.between(500, 6 * SECOND);
                if self.engine.as_ref().is_some_and(|engine| !engine.deaf && engine.broken.is_none()) {
                    self.of_engine(took, Event::Exited);
                }
            }
            Action::Kill => {
                self.tell_proxy(Mode::Shut);
                let took = match self.rng.random_range(0..1000) {
                    _ if self.kind.faults == Faults::None => 5,
                    // It sits in the kernel.
                    0..=5 => 10 * MINUTE,
                    6..=30 => self.between(3 * SECOND, 90 * SECOND),
                    _ => self.between(1, 40),
                };
                self.later(took, Happening::Report(Event::TreeEmpty));
            }
            Action::Exit(_) => {}
        }
    }

    pub fn asked(&mut self, question: Question) {
        let (number, now) = (self.launches, self.now);
        let Some(engine) = &self.engine else { return };
        match question {
            Question::Probe => {
                let (took, answer) = match (engine.broken, engine.deep_until > now) {
                    (Some(_), _) => (PROBE_LIMIT, Answer::Not),
                    (None, true) => (20 * SECOND, Answer::Not),
                    (None, false) => (SECOND, Answer::Healthy),
                };
                self.later(took, Happening::Answered(number, answer));
            }
            Question::Look => {
                let took = if self.faulty(1) { 40 * SECOND } else { self.between(20, 500) };
                self.later(took, Happening::Looked(number, now));
            }
            Question::Figures if engine.figures == Figures::Absent => {}
            Question::Figures => self.later(5, Happening::FiguresRead(number)),
        }
    }

    fn of_engine(&mut self, by: Millis, event: Event) {
        let number = self.launches;
        self.later(by, Happening::Engine(number, event));
    }

    fn look_at_gpus(&mut self) {
        let roll = self.rng.random_range(0..1000);
        if self.stranger {
            self.later(100, Happening::Report(Event::Held { roll }));
        } else {
            self.release_asked = false;
            let took = self.between(0, 400);
            self.later(took, Happening::Report(Event::Released { roll }));
        }
    }

    fn launch(&mut self) {
        self.launches += 1;
        self.told.launches += 1;
        let number = self.launches;
        let trouble = match self.rng.random_range(0..100) {
            _ if self.kind.faults == Faults::None => Trouble::None,
            0..=5 => Trouble::DiesAtStart(CRASH),
            6..=9 => Trouble::DiesAtStart(OOM),
            10 => Trouble::DiesAtStart(BAD_FLAG),
            11..=13 => Trouble::HangsAtStart,
            14..=25 => Trouble::Dies,
            26..=35 => Trouble::RankDies,
            36..=50 => Trouble::Hangs,
            51..=58 => Trouble::Stopped,
            59..=61 => Trouble::StartsInSilence,
            _ => Trouble::None,
        };
        self.engine = Some(Engine {
            number,
            trouble,
            broken: None,
            deep_until: 0,
            deep: Deep::Prefill,
            last_batch: None,
            figures: if self.chance(50) { Figures::Unread } else { Figures::Absent },
            deaf: self.faulty(10),
        });
        if self.faulty(1) {
            return self.later(5, Happening::Report(Event::LaunchFailed(CRASH)));
        }
        self.later(5, Happening::Report(Event::Launched));
        let start = match trouble {
            Trouble::StartsInSilence => self.between(10 * MINUTE + 30 * SECOND, 14 * MINUTE),
            _ => self.between(2 * SECOND, 40 * SECOND),
        };
        if trouble != Trouble::StartsInSilence {
            for part in 1..4 {
                self.of_engine(5 + start * part / 4, Event::Progressed);
            }
        }
        match trouble {
            Trouble::DiesAtStart(_) => {
                self.told.deaths += 1;
                self.of_engine(start / 2, Event::Exited);
            }
            Trouble::HangsAtStart => {}
            _ => self.of_engine(start, Event::LooksReady),
        }
    }

    /// Ready for the first time: it works, until its trouble begins.
    pub fn ready(&mut self) {
        let number = self.launches;
        self.tell_proxy(Mode::Open);
        self.later(SECOND, Happening::Batch(number));
        if self.engine.as_ref().is_some_and(|engine| engine.trouble != Trouble::None) {
            let after = self.between(SECOND, 4 * MINUTE);
            self.later(after, Happening::Breaks(number));
        }
    }

    fn serves(&self) -> bool {
        matches!(self.oversight.state(), State::Ready | State::Busy)
    }

    fn living(&mut self, number: u32) -> Option<&mut Engine> {
        self.engine.as_mut().filter(|engine| engine.number == number)
    }

    pub fn happens(&mut self, what: Happening) -> Result<(), String> {
        match what {
            Happening::Stop => self.take(News::StopWished)?,
            Happening::Report(Event::TreeEmpty) => {
                (self.engine, self.proxy.open) = (None, 0);
                self.report();
                self.take(News::Event(Event::TreeEmpty))?;
            }
            Happening::Report(event) => self.reports(event)?,
            // What hangs was killed, or goes on saying nothing.
            Happening::Engine(number, event) => {
                if self.living(number).is_some_and(|engine| engine.broken.is_none() || event == Event::Exited) {
                    self.reports(event)?;
                }
            }
            Happening::Breaks(number) => self.breaks(number)?,
            Happening::Batch(number) => self.batch(number),
            Happening::Answered(number, answer) => {
                let now = self.now;
                let answer = match self.living(number) {
                    Some(engine) if answer == Answer::Healthy && engine.broken.is_none() => {
                        // A probe goes through a batch.
                        engine.last_batch = Some(now);
                        Answer::Healthy
                    }
                    _ => Answer::Not,
                };
                self.take(News::Answered(answer))?;
            }
            Happening::Looked(number, at) => {
                let found = self.found(number, at);
                self.take(found.map_or(News::LookedInVain, News::Looked))?;
            }
            Happening::FiguresRead(number) => self.figures_read(number)?,
            Happening::Request => self.request(),
            Happening::RequestEnds(generation, number) => self.request_ends(generation, number),
            Happening::ProxyLearns(generation, mode) if generation == self.proxy.generation => {
                self.proxy.mode = mode;
                if mode == Mode::Cut {
                    self.proxy.open = 0;
                }
                self.report();
            }
            Happening::ProxyReports(generation, report) if generation == self.proxy.generation => {
                self.proxy.reports += 1;
                let report = oversight::Proxy { reports: Some(self.proxy.reports), ..report };
                self.take(News::Traffic(report))?;
            }
            Happening::ProxyLearns(..) | Happening::ProxyReports(..) => {}
            Happening::ProxyDies => {
                self.told.proxies_died += 1;
                self.proxy = Proxy { generation: self.proxy.generation + 1, life: Life::Dead, ..Proxy::default() };
                let again = self.between(20, 600);
                self.later(again, Happening::ProxyIsBorn);
                self.take(News::Traffic(oversight::Proxy::default()))?;
            }
            // It is told first how things stand.
            Happening::ProxyIsBorn => {
                self.proxy.life = Life::Alive;
                self.proxy.mode = if self.serves() { Mode::Open } else { Mode::Shut };
                self.report();
            }
            Happening::Beat => self.beat()?,
            Happening::Frozen(long) => {
                self.told.frozen += 1;
                self.frozen_until = self.now + long;
            }
            Happening::StrangerComes => self.stranger = true,
            Happening::StrangerGoes => {
                self.stranger = false;
                if self.release_asked {
                    self.look_at_gpus();
                }
            }
        }
        Ok(())
    }

    /// As far as an honest world may.
    fn reports(&mut self, event: Event) -> Result<(), String> {
        if self.shadow.allows(&event) { self.take(News::Event(event)) } else { Ok(()) }
    }

    fn breaks(&mut self, number: u32) -> Result<(), String> {
        let (now, by_handle) = (self.now, self.chance(80));
        let Some(engine) = self.living(number) else { return Ok(()) };
        engine.broken = Some(now);
        match engine.trouble {
            Trouble::Dies => {
                self.told.deaths += 1;
                self.take(News::Event(Event::Exited))
            }
            // Else the next beat sees it.
            Trouble::RankDies if by_handle => self.take(News::RankEnded(rank())),
            _ => Ok(()),
        }
    }

    /// Once a second, and seldomer where nothing is open: many worlds fit into a test then.
    fn beat(&mut self) -> Result<(), String> {
        let quiet = self.proxy.open == 0 && self.oversight.watch.evidence(self.now).waiting.is_none();
        self.later(if quiet { 3 * SECOND } else { SECOND }, Happening::Beat);
        let seen = self.engine.as_ref().map_or_else(Seen::default, |engine| {
            let broken = |trouble| engine.broken.is_some() && engine.trouble == trouble;
            Seen {
                batch: engine.last_batch,
                gone: broken(Trouble::RankDies).then(rank),
                stopped: broken(Trouble::Stopped).then(rank),
            }
        });
        self.take(News::Beat(seen))?;
        self.look_back()
    }

    fn found(&self, number: u32, at: Millis) -> Option<Found> {
        let engine = self.engine.as_ref().filter(|engine| engine.number == number)?;
        let compiles = engine.deep == Deep::Compilation && engine.deep_until > self.now;
        let starts = !self.serves() && engine.trouble != Trouble::HangsAtStart;
        let work = match engine.broken {
            None if compiles => Work::Compilation,
            None if starts => Work::Some,
            _ => Work::None,
        };
        // Of those that hang at their start some were stopped.
        let stopped = (engine.trouble == Trouble::HangsAtStart && number.is_multiple_of(2)).then(rank);
        Some(Found { at, work, stopped })
    }

    fn figures_read(&mut self, number: u32) -> Result<(), String> {
        let now = self.now;
        let Some(engine) = self.living(number) else { return Ok(()) };
        let news = match (engine.figures, engine.last_batch) {
            (Figures::Read(before), Some(batch)) if batch > before => {
                figures::News::Moved(Some(Duration::from_millis(now - batch)))
            }
            (Figures::Read(_), _) => figures::News::Still,
            _ => figures::News::First,
        };
        engine.figures = Figures::Read(now);
        self.take(News::Figures(news))
    }

    /// An engine with work says so in its log; in a long prefill once a chunk, while it compiles not at all.
    fn batch(&mut self, number: u32) {
        let (now, open) = (self.now, self.proxy.open);
        let (deep, compiles) = (self.chance(8), self.chance(30));
        let (long, chunk) = (self.between(MINUTE, 10 * MINUTE), self.between(2 * SECOND, 25 * SECOND));
        let Some(engine) = self.living(number) else { return };
        if engine.broken.is_some() {
            return;
        }
        let next = if engine.deep_until > now {
            match engine.deep {
                Deep::Compilation => (engine.deep_until - now).min(90 * SECOND),
                Deep::Prefill => chunk,
            }
        } else {
            if open > 0 && deep {
                engine.deep_until = now + long;
                engine.deep = if compiles { Deep::Compilation } else { Deep::Prefill };
            }
            SECOND
        };
        if open > 0 {
            engine.last_batch = Some(now);
            self.told.batches += 1;
        }
        self.later(next, Happening::Batch(number));
    }

    fn request(&mut self) {
        if self.proxy.life == Life::Alive && self.proxy.mode == Mode::Open {
            self.proxy.open += 1;
            self.report();
            let (generation, number) = (self.proxy.generation, self.launches);
            let took = self.between(300, 60 * SECOND);
            self.later(took, Happening::RequestEnds(generation, number));
        }
        let next = self.between(500, 40 * SECOND);
        self.later(next, Happening::Request);
    }

    fn request_ends(&mut self, generation: u32, number: u32) {
        let now = self.now;
        if generation != self.proxy.generation {
            return;
        }
        let Some(engine) = self.living(number) else { return };
        // Nothing ends behind a long prefill, or in an engine that hangs.
        if engine.deep_until > now {
            let wait = engine.deep_until - now + 200;
            self.later(wait, Happening::RequestEnds(generation, number));
        } else if engine.broken.is_none() && self.proxy.open > 0 {
            self.proxy.open -= 1;
            self.proxy.last_byte = Some(now);
            self.report();
        }
    }

    fn tell_proxy(&mut self, mode: Mode) {
        let delay = self.between(0, 40);
        let at = (self.now + delay).max(self.proxy.down_free);
        self.proxy.down_free = at;
        self.later(at - self.now, Happening::ProxyLearns(self.proxy.generation, mode));
    }

    /// It reports what changed.
    fn report(&mut self) {
        if self.proxy.life == Life::Dead {
            return;
        }
        let delay = self.between(0, 120);
        let at = (self.now + delay).max(self.proxy.up_free);
        self.proxy.up_free = at;
        let report = oversight::Proxy {
            reports: None,
            closed: self.proxy.mode != Mode::Open,
            waiting: self.proxy.open,
            open: self.proxy.open,
            last_byte: self.proxy.last_byte,
        };
        self.later(at - self.now, Happening::ProxyReports(self.proxy.generation, report));
    }
}
