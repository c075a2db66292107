//! All that the driver decides: the machine, the watch over its engine, and what lies between the two. Pure.
//!
//! ```text
//! news ─► woke? what does it prove? ─► at most one event ─► step ─► orders: actions, questions, an opinion
//! ```
//!
//! The driver brings news and carries orders out with processes, sockets and files. The seeded worlds do the same with
//! an engine, a node and a clock that are made of numbers: what runs in them is this, not a copy of it.

use std::time::Duration;

use super::step::{Action, Event, Machine, Millis, Policy, State};
use crate::health::figures;
use crate::health::verdict::Verdict;
use crate::health::watch::{Sign, Watch};
use crate::link::status::RankStatus;

/// How long is waited for what.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    pub hang_after: Duration,
    pub probe_interval: Duration,
    pub start_stall: Duration,
}

/// What the driver comes to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// What the machine understands as it is.
    Event(Event),
    /// A stop signal.
    StopWished,
    /// A second is over; this is how the engine looks.
    Beat(Seen),
    /// How a probe ended.
    Answered(Answer),
    /// A rank ended, and the main process did not.
    RankEnded(RankStatus),
    /// A look at the engine's processes is over.
    Looked(Found),
    /// Another one, of an engine that is gone, is over.
    LookedInVain,
    /// A reading of the engine's figures, beside the one before.
    Figures(figures::News),
    /// The proxy reported, or died.
    Traffic(Proxy),
}

/// What is seen of an engine without asking it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// When its log last told of a batch.
    pub batch: Option<Millis>,
    /// A rank that is gone. Each is watched by its handle too; this is for those that could not be.
    pub gone: Option<RankStatus>,
    /// A process that somebody stopped.
    pub stopped: Option<RankStatus>,
}

/// What a look at its processes and kernel caches found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// When it was begun.
    pub at: Millis,
    pub work: Work,
    pub stopped: Option<RankStatus>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    None,
    /// Bytes were read, or memory grew.
    Some,
    /// Kernels are being compiled.
    Compilation,
}

/// How a probe ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Healthy,
    /// Refused, or not within its time.
    Not,
}

/// What is known of the proxy's traffic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Proxy {
    /// Reports of this proxy so far; none: no proxy lives.
    pub reports: Option<u64>,
    /// It knows that nothing may pass.
    pub closed: bool,
    /// Requests that wait for the engine.
    pub waiting: usize,
    /// Requests and answers that are open, those that may be silent for as long as they like among them.
    pub open: usize,
    /// When a byte of an answer last passed.
    pub last_byte: Option<Millis>,
}

/// What is thought of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opinion {
    Trusted,
    /// Silent for so long while somebody waits, or stopped. Nothing is done yet.
    Suspected(Duration),
    Hung(Duration),
    RankDied(RankStatus),
}

/// What is to be asked, because it is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// Its `/health`.
    Probe,
    /// Its processes and kernel caches.
    Look,
    /// Its figures.
    Figures,
}

/// What the driver is to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    Think(Opinion),
    Act(Action),
    Ask(Question),
}

/// What came of one piece of news.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decided {
    /// What the machine was told.
    pub event: Option<Event>,
    pub orders: Vec<Wanted>,
}

/// The supervisor's own loop turns each second. After a gap as long as this we were stopped (SIGSTOP, a debugger, a
/// frozen cgroup, a machine that slept), and what seemed silent meanwhile may only not have been heard.
const OVERSLEPT: Duration = Duration::from_secs(4);
/// Stop signals closer together than this are one: terminals, `timeout` and container runtimes signal a process and
/// its group, and nobody presses Ctrl-C twice so fast.
const ONE_WISH: Millis = 100;
/// Between two looks at the processes of an engine that starts, at most: a load of any size reads more than
/// the smallest rate that counts within it.
const LOOK_AT_START: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub struct Oversight {
    pub machine: Machine,
    /// Over the engine that was launched last.
    pub watch: Watch,
    patience: Patience,
    proxy: Proxy,
    /// The proxy's reports when the drain was asked for: older ones prove nothing.
    drain_asked: Option<u64>,
    looking: Looking,
    looked: Option<Millis>,
    life: Life,
    stop_wished: Option<Millis>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Looking {
    #[default]
    No,
    Yes,
}

/// How far the engine that was launched last ever came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Life {
    #[default]
    Starts,
    Served,
}

impl Oversight {
    /// It begins with [`Action::Fetch`].
    pub fn new(policy: Policy, patience: Patience) -> Self {
        Self {
            machine: Machine::start(policy).0,
            watch: Watch::default(),
            patience,
            proxy: Proxy::default(),
            drain_asked: None,
            looking: Looking::No,
            looked: None,
            life: Life::Starts,
            stop_wished: None,
        }
    }

    pub fn state(&self) -> &State {
        &self.machine.state
    }

    pub fn life(&self) -> Life {
        self.life
    }

    /// How often a start is looked at: more often than it may be silent.
    pub fn look_at_start(&self) -> Duration {
        LOOK_AT_START.min(self.patience.start_stall / 4)
    }

    /// Time in which we did not run is no silence of the engine's: every patience begins anew.
    pub fn woke(&mut self, gap: Duration, now: Millis) -> Option<Decided> {
        (gap >= OVERSLEPT).then(|| {
            self.watch.begin_anew(now);
            self.on(Event::Progressed, now)
        })
    }

    pub fn take(&mut self, news: News, now: Millis) -> Decided {
        match news {
            News::Event(event) => self.on(event, now),
            News::StopWished if self.stop_wished.is_some_and(|at| now < at + ONE_WISH) => Decided::default(),
            News::StopWished => {
                self.stop_wished.get_or_insert(now);
                self.on(Event::Stop, now)
            }
            News::Beat(seen) => self.beat(seen, now),
            News::Answered(Answer::Healthy) => {
                self.watch.passed(now);
                self.on(Event::Healthy, now)
            }
            News::Answered(Answer::Not) => {
                self.watch.failed();
                self.on(Event::Unhealthy, now)
            }
            News::RankEnded(rank) if self.serves() => {
                self.on(Event::Hung, now).after(Wanted::Think(Opinion::RankDied(rank)))
            }
            // Its main process says what becomes of the start.
            News::RankEnded(_) => Decided::default(),
            News::Looked(found) => self.looked(&found, now),
            News::LookedInVain => {
                self.looking = Looking::No;
                Decided::default()
            }
            News::Figures(news) => {
                self.watch.figures(news, now);
                Decided::default()
            }
            News::Traffic(proxy) => self.traffic(proxy, now),
        }
    }

    fn serves(&self) -> bool {
        matches!(self.machine.state, State::Ready | State::Busy)
    }

    fn on(&mut self, event: Event, now: Millis) -> Decided {
        let before = std::mem::discriminant(&self.machine.state);
        let actions = self.machine.step(&event, now);
        if before != std::mem::discriminant(&self.machine.state) {
            match self.machine.state {
                State::Fetching | State::Preparing => {
                    (self.watch, self.looked, self.life) = (Watch::default(), None, Life::Starts);
                }
                // Also again, after it was busy.
                State::Ready => {
                    self.watch.passed(now);
                    self.life = Life::Served;
                }
                _ => {}
            }
        }
        if actions.iter().any(|action| matches!(action, Action::Drain | Action::Hold)) {
            self.drain_asked = Some(self.proxy.reports.unwrap_or(0));
        }
        Decided { event: Some(event), orders: actions.into_iter().map(Wanted::Act).collect() }
    }

    fn beat(&mut self, seen: Seen, now: Millis) -> Decided {
        match self.machine.state {
            State::Loading { .. } => {
                let every = self.look_at_start().as_millis() as Millis;
                let due = self.looked.is_none_or(|at| now >= at + every);
                Decided { event: None, orders: if due { self.look(now) } else { Vec::new() } }
            }
            State::Ready | State::Busy => self.watch_over(seen, now),
            // What is being ended is not suspected of anything.
            _ => Decided { event: None, orders: vec![Wanted::Think(Opinion::Trusted)] },
        }
    }

    /// First it is judged by what is known, then it is asked for what is not. One that is called hung is asked nothing
    /// more.
    fn watch_over(&mut self, seen: Seen, now: Millis) -> Decided {
        if let Some(at) = seen.batch {
            self.watch.sign(Sign::Batch, at);
        }
        if let Some(rank) = seen.gone {
            return self.take(News::RankEnded(rank), now);
        }
        match seen.stopped {
            Some(_) => self.watch.stopped(now),
            None => self.watch.running(),
        }
        let hang_after = self.patience.hang_after;
        let (opinion, event) = match self.watch.verdict(now, hang_after) {
            Verdict::Alive => (Opinion::Trusted, None),
            Verdict::Busy => (Opinion::Trusted, Some(Event::LooksBusy)),
            Verdict::Suspected(silence) => (Opinion::Suspected(silence), None),
            Verdict::Hung(silence) => return self.on(Event::Hung, now).after(Wanted::Think(Opinion::Hung(silence))),
        };
        let mut turn = event.map_or_else(Decided::default, |event| self.on(event, now)).after(Wanted::Think(opinion));
        if self.watch.wants_probe(now, self.patience.probe_interval) {
            self.watch.asked(now);
            turn.orders.push(Wanted::Ask(Question::Probe));
        }
        if self.watch.wants_look(now, hang_after) {
            self.watch.looks(now);
            turn.orders.extend(self.look(now));
        }
        if self.watch.wants_figures(now, hang_after) {
            self.watch.reads(now);
            turn.orders.push(Wanted::Ask(Question::Figures));
        }
        turn
    }

    /// Never two at once: a disk, or a process, may hang.
    fn look(&mut self, now: Millis) -> Vec<Wanted> {
        if self.looking == Looking::Yes {
            return Vec::new();
        }
        (self.looking, self.looked) = (Looking::Yes, Some(now));
        vec![Wanted::Ask(Question::Look)]
    }

    fn looked(&mut self, found: &Found, now: Millis) -> Decided {
        self.looking = Looking::No;
        match self.machine.state {
            State::Loading { .. } => {
                // What ends a start that is stopped is `start.stall`.
                let opinion = if found.stopped.is_some() {
                    self.watch.stopped(now);
                    Opinion::Suspected(self.watch.evidence(now).stopped.unwrap_or_default())
                } else {
                    self.watch.running();
                    Opinion::Trusted
                };
                let works = found.work != Work::None;
                let turn = if works { self.on(Event::Progressed, now) } else { Decided::default() };
                turn.after(Wanted::Think(opinion))
            }
            State::Ready | State::Busy => {
                if found.work == Work::Compilation {
                    self.watch.sign(Sign::Kernel, found.at);
                }
                Decided::default()
            }
            _ => Decided::default(),
        }
    }

    fn traffic(&mut self, proxy: Proxy, now: Millis) -> Decided {
        self.proxy = proxy;
        self.watch.requests(proxy.waiting, now);
        if let Some(at) = proxy.last_byte {
            self.watch.sign(Sign::Token, at);
        }
        if matches!(self.machine.state, State::Draining { .. }) && self.is_drained() {
            self.on(Event::Idle, now)
        } else {
            Decided::default()
        }
    }

    /// Only a report that is newer than the drain, of a proxy that knows of it, proves that nothing slipped in before
    /// it.
    fn is_drained(&self) -> bool {
        let proven = match self.proxy.reports {
            None => true,
            Some(reports) => self.drain_asked.is_some_and(|asked| reports > asked) && self.proxy.closed,
        };
        self.proxy.open == 0 && proven
    }
}

impl Decided {
    /// An opinion is known before anything is done about it.
    fn after(mut self, first: Wanted) -> Self {
        self.orders.insert(0, first);
        self
    }
}

#[cfg(test)]
mod tests;
