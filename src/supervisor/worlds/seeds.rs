//! Whole lives in worlds made of numbers: the machine, the watch over its engine and the policy of restarts
//! are the real ones; the engine, the node, the clients and the clock are not. One seed is one world.
//!
//! What the driver decides in between (what a beat leads to, a probe's end, a gap of its own, a drain that is over)
//! is the real `oversight`. Told again here is only how actions are carried out and which report says so: the
//! driver's own files carry descriptors and processes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::oversight::{self, Answer, Drain, Opinion, Patience, Question};
use super::super::step::*;
use super::shadow::Shadow;
use super::{BAD_FLAG, CRASH, OOM, POLICY, name};
use crate::health::watch::{Sign, Watch};

const PATIENCE: Patience = Patience { hang_after: Duration::from_mins(2), probe_interval: Duration::from_secs(30) };
const PROBE_LIMIT: Millis = 25_000;
const SECOND: Millis = 1_000;
const MINUTE: Millis = 60 * SECOND;
/// From the beginning of a hang to its end: a probe must fall due, wait for as long as a hang may last, and
/// the beats lie a second apart.
const HANG_NOTICED: Millis = 30 * SECOND + 120 * SECOND + 5 * SECOND;

/// What an engine is like, and when it becomes so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    DiesAtStart(Failure),
    HangsAtStart,
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
struct Engine {
    number: u32,
    trouble: Trouble,
    /// Since when the trouble shows.
    broken: Option<Millis>,
    /// Until when one long prefill, or a compilation, keeps it from answering probes.
    deep_until: Millis,
    compiles: bool,
    terminated: bool,
    deaf: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Happening {
    Report(Event),
    /// Of the engine with this number.
    Engine(u32, Event),
    /// Its trouble begins.
    Breaks(u32),
    /// It finishes a batch, and goes on with the next.
    Batch(u32),
    Answered(u32, Answer),
    Request,
    RequestEnds(u32),
    Beat,
    /// Nothing of the supervisor runs for so long.
    Frozen(Millis),
    StrangerComes,
    StrangerGoes,
}

/// How a world is made.
#[derive(Debug, Clone, Copy)]
struct Kind {
    length: Millis,
    faults: Faults,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Faults {
    Some,
    None,
}

struct World {
    rng: StdRng,
    kind: Kind,
    now: Millis,
    agenda: BinaryHeap<Reverse<(Millis, u64, usize)>>,
    /// What the agenda's entries stand for.
    happenings: Vec<Happening>,
    machine: Machine,
    shadow: Shadow,
    watch: Watch,
    engine: Option<Engine>,
    launches: u32,
    /// Requests open towards the engine.
    open: usize,
    stranger: bool,
    release_asked: bool,
    drain_asked: bool,
    entered: Millis,
    stop_asked: Option<Millis>,
    frozen_until: Millis,
    /// For how long, when it last was.
    froze: Millis,
    told: Told,
}

/// What came of it.
#[derive(Debug, Default, Clone, Copy)]
struct Told {
    hung: u32,
    suspected: u32,
    batches: u32,
    busy: u32,
    launches: u32,
    deaths: u32,
    gave_up: u32,
    occupied: u32,
    frozen: u32,
}

impl World {
    fn new(seed: u64, kind: Kind) -> Self {
        let (machine, actions) = Machine::start(POLICY);
        let mut world = Self {
            rng: StdRng::seed_from_u64(seed),
            kind,
            now: 0,
            agenda: BinaryHeap::new(),
            happenings: Vec::new(),
            machine,
            shadow: Shadow::new(),
            watch: Watch::default(),
            engine: None,
            launches: 0,
            open: 0,
            stranger: false,
            release_asked: false,
            drain_asked: false,
            entered: 0,
            stop_asked: None,
            frozen_until: 0,
            froze: 0,
            told: Told::default(),
        };
        for action in actions {
            world.act(action);
        }
        world.later(SECOND, Happening::Beat);
        world.later(5 * SECOND, Happening::Request);
        if kind.faults == Faults::Some {
            world.plan_faults();
        }
        world
    }

    fn chance(&mut self, of: u32) -> bool {
        self.rng.random_range(0..100) < of
    }

    fn between(&mut self, least: Millis, most: Millis) -> Millis {
        self.rng.random_range(least..=most)
    }

    fn later(&mut self, by: Millis, what: Happening) {
        self.happenings.push(what);
        self.agenda.push(Reverse((self.now + by, self.happenings.len() as u64, self.happenings.len() - 1)));
    }

    fn plan_faults(&mut self) {
        let length = self.kind.length;
        if self.chance(30) {
            let at = self.between(0, length);
            self.later(at, Happening::Report(Event::Restart));
        }
        if self.chance(20) {
            let (at, stays) = (self.between(0, length), self.between(SECOND, 3 * MINUTE));
            self.later(at, Happening::StrangerComes);
            self.later(at + stays, Happening::StrangerGoes);
        }
        if self.chance(15) {
            let (at, long) = (self.between(0, length), self.between(5 * SECOND, 10 * MINUTE));
            self.later(at, Happening::Frozen(long));
        }
        // Often before the world's end, and sometimes twice.
        if self.chance(40) {
            let at = self.between(0, length);
            self.later(at, Happening::Report(Event::Stop));
            if self.chance(30) {
                let again = self.between(200, 20 * SECOND);
                self.later(at + again, Happening::Report(Event::Stop));
            }
        }
    }

    /// Runs it to its end, which is a stop.
    fn run(mut self) -> Result<Told, String> {
        let end = self.kind.length;
        self.later(end, Happening::Report(Event::Stop));
        while !matches!(self.machine.state, State::Stopped { .. }) {
            let due = self.machine.deadline().map(|at| at.max(self.now).max(self.frozen_until));
            let next = self.agenda.peek().map(|Reverse((at, ..))| (*at).max(self.frozen_until));
            match (due, next) {
                (Some(due), next) if next.is_none_or(|next| due <= next) => {
                    self.now = self.now.max(due);
                    self.wake();
                    let before = self.machine.state.clone();
                    self.on(Event::Tick)?;
                    // The driver would ask again at once, for ever.
                    if self.machine.state == before && self.machine.deadline().is_some_and(|at| at <= self.now) {
                        return Err(format!("what is due changes nothing in {}", name(&before)));
                    }
                }
                (_, Some(_)) => {
                    let Some(Reverse((at, _, what))) = self.agenda.pop() else { break };
                    self.now = self.now.max(at).max(self.frozen_until);
                    self.wake();
                    let what = self.happenings[what];
                    self.happens(what)?;
                }
                (None, None) => return Err(format!("nothing will ever happen again in {}", name(&self.machine.state))),
                (Some(_), None) => unreachable!("the first arm takes it"),
            }
            if self.stop_asked.is_some_and(|at| self.now > at + POLICY.grace + 2 * KILL_BEFORE_END + SECOND) {
                return Err(format!("a stop is not over after {} ms", self.now - self.stop_asked.unwrap_or(0)));
            }
            if self.now > end + 10 * MINUTE {
                return Err("the world does not end".into());
            }
        }
        Ok(self.told)
    }

    /// After a gap nothing that seemed silent counts, as in the driver.
    fn wake(&mut self) {
        if self.frozen_until > 0 && self.now >= self.frozen_until {
            self.frozen_until = 0;
            self.entered = self.now;
            let now = self.now;
            let event = oversight::woke(&mut self.watch, Duration::from_millis(self.froze), now);
            if let Some(stop) = &mut self.stop_asked {
                *stop = now;
            }
            if let Some(broken) = self.engine.as_mut().and_then(|engine| engine.broken.as_mut()) {
                *broken = now;
            }
            if let Some(event) = event {
                let _ = self.machine.step(&event, now);
            }
        }
    }

    fn on(&mut self, event: Event) -> Result<(), String> {
        let before = self.machine.state.clone();
        let actions = self.machine.step(&event, self.now);
        self.shadow.observe(&before, &event, &actions, &self.machine)?;
        if event == Event::Stop {
            self.stop_asked.get_or_insert(self.now);
        }
        if name(&before) != name(&self.machine.state) {
            self.left(&before)?;
            self.entered = self.now;
            match self.machine.state {
                State::Ready if !matches!(before, State::Busy) => {
                    self.watch.passed(self.now);
                    self.ready();
                }
                State::Busy => self.told.busy += 1,
                State::GaveUp { .. } => self.told.gave_up += 1,
                State::Occupied => self.told.occupied += 1,
                State::Preparing => self.watch = Watch::default(),
                _ => {}
            }
        }
        for action in actions {
            self.act(action);
        }
        Ok(())
    }

    /// No state that waits for something may wait for longer than its bound.
    fn left(&self, state: &State) -> Result<(), String> {
        let bound = match state {
            State::Failing { .. } => EXAMINE_LIMIT,
            State::Reaping { .. } => REAP_LIMIT,
            State::Releasing { .. } | State::Claiming { .. } => RELEASE_LIMIT,
            State::Backoff { .. } => POLICY.restart.backoff_max * 5 / 4,
            State::Draining { .. } | State::Stopping { .. } => 2 * POLICY.grace,
            _ => return Ok(()),
        };
        let took = self.now - self.entered;
        if took > bound { Err(format!("{} took {took} ms", name(state))) } else { Ok(()) }
    }

    fn act(&mut self, action: Action) {
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
                let end = if fails { Event::Unhealthy } else { Event::Healthy };
                self.of_engine(took, end);
            }
            Action::Examine => {
                let failure = self.engine.as_ref().map_or(CRASH, |engine| match engine.trouble {
                    Trouble::DiesAtStart(failure) => failure,
                    Trouble::Hangs | Trouble::HangsAtStart | Trouble::Stopped => OOM,
                    _ => CRASH,
                });
                let late = self.faulty(2);
                let took = if late { 2 * EXAMINE_LIMIT } else { 300 };
                self.later(took, Happening::Report(Event::Examined(failure)));
            }
            Action::Drain | Action::Hold => {
                self.drain_asked = true;
                self.idle_perhaps();
            }
            Action::CutStreams => self.open = 0,
            Action::Terminate => {
                self.drain_asked = false;
                let took = self.between(500, 6 * SECOND);
                if let Some(engine) = &mut self.engine {
                    engine.terminated = true;
                    if !engine.deaf && engine.broken.is_none() {
                        self.of_engine(took, Event::Exited);
                    }
                }
            }
            Action::Kill => {
                let took = match self.rng.random_range(0..1000) {
                    // It sits in the driver.
                    _ if self.kind.faults == Faults::None => 5,
                    0..=5 => 10 * MINUTE,
                    6..=30 => self.between(3 * SECOND, 90 * SECOND),
                    _ => self.between(1, 40),
                };
                self.later(took, Happening::Report(Event::TreeEmpty));
            }
            Action::Exit(_) => {}
        }
    }

    fn faulty(&mut self, of: u32) -> bool {
        self.kind.faults == Faults::Some && self.chance(of)
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
            _ => Trouble::None,
        };
        let deaf = self.faulty(10);
        self.engine =
            Some(Engine { number, trouble, broken: None, deep_until: 0, compiles: false, terminated: false, deaf });
        if self.faulty(1) {
            return self.later(5, Happening::Report(Event::LaunchFailed(CRASH)));
        }
        self.later(5, Happening::Report(Event::Launched));
        let start = self.between(2 * SECOND, 40 * SECOND);
        for part in 1..4 {
            self.of_engine(5 + start * part / 4, Event::Progressed);
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
    fn ready(&mut self) {
        let number = self.launches;
        self.later(SECOND, Happening::Batch(number));
        if self.engine.as_ref().is_some_and(|engine| engine.trouble != Trouble::None) {
            let after = self.between(SECOND, 4 * MINUTE);
            self.later(after, Happening::Breaks(number));
        }
    }

    fn serves(&self) -> bool {
        matches!(self.machine.state, State::Ready | State::Busy)
    }

    fn living(&mut self, number: u32) -> Option<&mut Engine> {
        self.engine.as_mut().filter(|engine| engine.number == number)
    }

    fn happens(&mut self, what: Happening) -> Result<(), String> {
        match what {
            Happening::Report(Event::TreeEmpty) => {
                (self.engine, self.open) = (None, 0);
                self.on(Event::TreeEmpty)?;
            }
            Happening::Report(event) if self.shadow.allows(&event) => self.on(event)?,
            Happening::Report(_) => {}
            Happening::Engine(number, event) => {
                let Some(engine) = self.living(number) else { return Ok(()) };
                // What hangs at its start was killed or goes on saying nothing.
                if engine.broken.is_some() && event != Event::Exited {
                    return Ok(());
                }
                if self.shadow.allows(&event) {
                    self.on(event)?;
                }
            }
            Happening::Breaks(number) => {
                let (now, serves) = (self.now, self.serves());
                let Some(engine) = self.living(number) else { return Ok(()) };
                engine.broken = Some(now);
                match engine.trouble {
                    Trouble::Dies => {
                        self.told.deaths += 1;
                        self.on(Event::Exited)?;
                    }
                    // Seen by its handle at once, which the driver takes for a hang without a doubt.
                    Trouble::RankDies if serves => {
                        self.told.deaths += 1;
                        self.on(Event::Hung)?;
                    }
                    Trouble::Stopped => self.watch.stopped(now),
                    _ => {}
                }
            }
            Happening::Batch(number) => self.batch(number),
            Happening::Answered(number, end) => {
                if self.living(number).is_none() {
                    return Ok(());
                }
                let event = oversight::answered(&mut self.watch, end, self.now);
                self.on(event)?;
            }
            Happening::Request => {
                if self.serves() {
                    self.open += 1;
                    self.watch.requests(self.open, self.now);
                    let (number, took) = (self.launches, self.between(300, 60 * SECOND));
                    self.later(took, Happening::RequestEnds(number));
                }
                let next = self.between(500, 40 * SECOND);
                self.later(next, Happening::Request);
            }
            Happening::RequestEnds(number) => {
                let now = self.now;
                let Some(engine) = self.living(number) else { return Ok(()) };
                // Nothing ends behind a long prefill, or in an engine that hangs.
                if engine.deep_until > now {
                    let wait = engine.deep_until - now + 200;
                    self.later(wait, Happening::RequestEnds(number));
                } else if engine.broken.is_none() && self.open > 0 {
                    self.watch.sign(Sign::Token, now);
                    self.open -= 1;
                    self.watch.requests(self.open, now);
                    self.idle_perhaps();
                }
            }
            Happening::Beat => self.beat()?,
            Happening::Frozen(long) => {
                self.told.frozen += 1;
                self.froze = long;
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

    /// The proxy reports what changed; a drain that was asked for it knows of.
    fn idle_perhaps(&mut self) {
        let asked = self.drain_asked.then_some(0);
        if oversight::is_drained(&Drain { asked, reports: Some(1), closed: self.drain_asked, open: self.open }) {
            self.later(100, Happening::Report(Event::Idle));
        }
    }

    /// An engine with work says so in its log; in a long prefill once a chunk, while it compiles not at all.
    fn batch(&mut self, number: u32) {
        let (now, open) = (self.now, self.open);
        let (deep, compiles) = (self.chance(8), self.chance(30));
        let (long, chunk) = (self.between(MINUTE, 10 * MINUTE), self.between(2 * SECOND, 25 * SECOND));
        let Some(engine) = self.living(number) else { return };
        if engine.broken.is_some() {
            return;
        }
        let next = if engine.deep_until > now {
            if engine.compiles { (engine.deep_until - now).min(90 * SECOND) } else { chunk }
        } else {
            if open > 0 && deep {
                engine.deep_until = now + long;
                engine.compiles = compiles;
            }
            SECOND
        };
        if open > 0 {
            self.told.batches += 1;
            self.watch.sign(Sign::Batch, now);
        }
        self.later(next, Happening::Batch(number));
    }

    /// As the driver's: judge first, then ask.
    fn beat(&mut self) -> Result<(), String> {
        let quiet = self.open == 0 && self.watch.evidence(self.now).waiting.is_none();
        self.later(if quiet { 5 * SECOND } else { SECOND }, Happening::Beat);
        if !self.serves() {
            return Ok(());
        }
        let now = self.now;
        let beat = oversight::beat(&mut self.watch, now, &PATIENCE);
        let engine = self.engine.as_ref().ok_or("it serves, and has no engine")?;
        let (number, broken, deep) = (engine.number, engine.broken, engine.deep_until > now);
        match beat.opinion {
            Opinion::Trusted => {}
            Opinion::Suspected(_) => self.told.suspected += 1,
            Opinion::Hung(silence) => {
                let Some(since) = broken else {
                    return Err(format!("a working engine is called hung after {} s of silence", silence.as_secs()));
                };
                if now - since > HANG_NOTICED {
                    return Err(format!("a hang is acted on after {} ms", now - since));
                }
                self.told.hung += 1;
            }
        }
        if !matches!(beat.opinion, Opinion::Hung(_)) && broken.is_some_and(|since| now - since > HANG_NOTICED) {
            return Err(format!("a hang of {} ms is {:?}", now - broken.unwrap_or(now), beat.opinion));
        }
        if let Some(event) = beat.event {
            self.on(event)?;
        }
        for question in beat.questions {
            match question {
                Question::Probe => {
                    let (took, end) = match (broken, deep) {
                        (Some(_), _) => (PROBE_LIMIT, Answer::Not),
                        (None, true) => (20 * SECOND, Answer::Not),
                        (None, false) => (SECOND, Answer::Healthy),
                    };
                    self.later(took, Happening::Answered(number, end));
                }
                Question::Look => {
                    if broken.is_none() && deep && self.engine.as_ref().is_some_and(|engine| engine.compiles) {
                        self.watch.sign(Sign::Kernel, now);
                    }
                }
                // This engine has no such route.
                Question::Figures => {}
            }
        }
        Ok(())
    }
}

const LIVES: Kind = Kind { length: 12 * MINUTE, faults: Faults::Some };

/// `SEED=N` runs that world alone.
fn worlds(seeds: std::ops::Range<u64>) {
    let one = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = one.map_or(seeds, |seed: u64| seed..seed + 1);
    let mut all = Told::default();
    for seed in seeds.clone() {
        match World::new(seed, LIVES).run() {
            Ok(told) => {
                all.hung += told.hung;
                all.busy += told.busy;
                all.deaths += told.deaths;
                all.gave_up += told.gave_up;
                all.occupied += told.occupied;
                all.launches += told.launches;
                all.frozen += told.frozen;
            }
            Err(wrong) => panic!("{wrong}\nagain: SEED={seed} cargo nextest run --lib -E 'test(seeded_worlds_1)'"),
        }
    }
    println!("figure: {} seeded worlds: {all:?}", seeds.end - seeds.start);
    // Of a handful, as mutants run, some kinds may not be among them.
    if seeds.end - seeds.start >= 1_000 {
        let few = (seeds.end - seeds.start) as u32 / 100;
        let seen = [all.hung, all.busy, all.deaths, all.gave_up, all.occupied, all.frozen];
        assert!(seen.iter().all(|seen| *seen > few), "worlds in which little happens prove little: {all:?}");
    }
}

/// Ten thousand in four tests, which run beside each other. `SEEDS=N`: so many in each, for `tests/long mutants`.
fn each() -> u64 {
    std::env::var("SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(2_500)
}

#[test]
fn seeded_worlds_1() {
    worlds(0..each());
}

#[test]
fn seeded_worlds_2() {
    worlds(each()..2 * each());
}

#[test]
fn seeded_worlds_3() {
    worlds(2 * each()..3 * each());
}

#[test]
fn seeded_worlds_4() {
    worlds(3 * each()..4 * each());
}

/// A day in which one prefill or compilation of up to ten minutes follows the other.
#[test]
fn g07_a_day_of_long_prefills_has_no_false_kill() {
    let kind = Kind { length: 24 * 60 * MINUTE, faults: Faults::None };
    let told = World::new(7, kind).run().expect("nobody is killed");
    println!("figure: 24 h of long prefills: {told:?}");
    assert_eq!((told.launches, told.hung, told.deaths), (1, 0, 0));
    assert!(told.busy > 20 && told.batches > 5_000, "the day was an easy one: {told:?}");
}
