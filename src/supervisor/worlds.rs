//! Tests of `step`: the cases users feel, one by one. The whole of it is searched in `search`, driven at
//! random in `random`, and run with an engine, a node and a clock that are made of numbers (`node`) in `seeds`; what
//! must hold in all of them is `shadow`. When each thing is due is `due`.

mod due;
mod node;
mod random;
mod search;
#[allow(clippy::print_stdout)] // figures, for who asks with --no-capture
mod seeds;
mod shadow;

use std::time::Duration;

use super::oversight::Patience;
use super::step::*;

pub const POLICY: Policy = Policy {
    restart: Terms { max_failures: 5, window: 600_000, backoff: 2_000, backoff_max: 60_000 },
    give_up: GiveUp::Serve,
    grace: 25_000,
    start_stall: 600_000,
    start_limit: 10_800_000,
};

pub const PATIENCE: Patience = Patience {
    hang_after: Duration::from_mins(2),
    probe_interval: Duration::from_secs(30),
    start_stall: Duration::from_mins(10),
};

pub const CRASH: Failure = Failure { class: "crash", retry: Retry::Backoff, exit: 75 };
const OOM: Failure = Failure { class: "gpu_oom", retry: Retry::Backoff, exit: 75 };
const BAD_FLAG: Failure = Failure { class: "bad_config", retry: Retry::Never, exit: 65 };

fn name(state: &State) -> &'static str {
    match state {
        State::Fetching => "Fetching",
        State::Preparing => "Preparing",
        State::Claiming { .. } => "Claiming",
        State::Occupied => "Occupied",
        State::Launching => "Launching",
        State::Loading { .. } => "Loading",
        State::Ready => "Ready",
        State::Busy => "Busy",
        State::Failing { .. } => "Failing",
        State::Draining { .. } => "Draining",
        State::Stopping { .. } => "Stopping",
        State::Reaping { .. } => "Reaping",
        State::Unkillable { .. } => "Unkillable",
        State::Releasing { .. } => "Releasing",
        State::Backoff { .. } => "Backoff",
        State::GaveUp { .. } => "GaveUp",
        State::Stopped { .. } => "Stopped",
    }
}

const FREE: Event = Event::Released { roll: 0 };
const HELD: Event = Event::Held { roll: 0 };

/// A machine and the clock it is driven by.
struct World {
    machine: Machine,
    now: Millis,
    actions: Vec<Action>,
}

impl World {
    fn new(policy: Policy) -> Self {
        let (machine, actions) = Machine::start(policy);
        Self { machine, now: 0, actions }
    }

    fn on(&mut self, event: Event) -> &mut Self {
        self.actions = self.machine.step(&event, self.now);
        self
    }

    fn later(&mut self, by: Millis) -> &mut Self {
        self.now += by;
        self
    }

    /// Lets the machine's own deadline pass.
    fn wait(&mut self) -> &mut Self {
        self.now = self.now.max(self.machine.deadline().expect("it waits for something"));
        self.on(Event::Tick)
    }

    fn launched(&mut self) -> &mut Self {
        self.on(Event::Fetched).on(Event::Prepared).on(FREE).on(Event::Launched)
    }

    fn ready(&mut self) -> &mut Self {
        self.launched().on(Event::LooksReady).on(Event::Healthy);
        assert_eq!(self.state(), "Ready");
        self
    }

    fn dies(&mut self, failure: Failure) -> &mut Self {
        self.on(Event::Exited).on(Event::Examined(failure)).on(Event::TreeEmpty).on(Event::Released { roll: 500 })
    }

    fn state(&self) -> &'static str {
        name(&self.machine.state)
    }
}

#[test]
fn a_start_goes_through_every_stage_in_order() {
    let mut w = World::new(POLICY);
    assert_eq!(w.actions, [Action::Fetch]);
    w.on(Event::Fetched);
    assert_eq!(w.actions, [Action::Prepare]);
    w.on(Event::Prepared);
    assert_eq!(w.actions, [Action::Release]);
    w.on(FREE);
    assert_eq!(w.actions, [Action::Launch]);
    w.on(Event::Launched).on(Event::LooksReady);
    assert_eq!(w.actions, [Action::Confirm]);
    assert_eq!(w.state(), "Loading", "not ready before /health said so");
    w.on(Event::Healthy);
    assert_eq!(w.state(), "Ready");
}

#[test]
fn stop_drains_then_cuts_then_kills_within_the_grace() {
    let mut w = World::new(POLICY);
    w.ready().later(1_000).on(Event::Stop);
    assert_eq!((w.state(), w.actions.as_slice()), ("Draining", &[Action::Drain][..]));
    w.wait();
    assert_eq!(w.now, 1_000 + 25_000 - 8_000);
    assert_eq!(w.actions, [Action::CutStreams, Action::Terminate]);
    w.wait();
    assert_eq!(w.now, 1_000 + 25_000 - 2_000);
    assert_eq!((w.state(), w.actions.as_slice()), ("Reaping", &[Action::Kill][..]));
    w.on(Event::TreeEmpty).on(FREE);
    assert_eq!(w.actions, [Action::Exit(0)]);
}

#[test]
fn stop_when_idle_waits_for_nothing_but_the_engine() {
    let mut w = World::new(POLICY);
    w.ready().on(Event::Stop).on(Event::Idle);
    assert_eq!((w.state(), w.actions.as_slice()), ("Stopping", &[Action::Terminate][..]));
    w.later(2_700).on(Event::Exited);
    assert_eq!((w.state(), w.actions.as_slice()), ("Reaping", &[Action::Kill][..]), "what it left is ended too");
}

#[test]
fn j02_a_second_stop_kills_at_once() {
    let mut w = World::new(POLICY);
    w.ready().on(Event::Stop).on(Event::Stop);
    assert_eq!((w.state(), w.actions.as_slice()), ("Reaping", &[Action::CutStreams, Action::Kill][..]));
    w.on(Event::Stop);
    assert_eq!(w.state(), "Reaping", "a third one makes nothing worse");
    w.on(Event::TreeEmpty).on(FREE);
    assert_eq!(w.actions, [Action::Exit(0)]);
}

#[test]
fn j01_stop_before_ready_does_not_wait_for_anything() {
    for before in 0..6 {
        let mut w = World::new(POLICY);
        for event in [Event::Fetched, Event::Prepared, HELD, FREE, Event::Launched].into_iter().take(before) {
            w.on(event);
        }
        w.on(Event::Stop);
        assert_eq!((w.state(), w.actions.as_slice()), ("Reaping", &[Action::Kill][..]), "after {before} stages");
    }
}

#[test]
fn g02_the_same_failure_three_times_ends_it() {
    let mut w = World::new(POLICY);
    for _ in 0..2 {
        w.launched().dies(CRASH);
        assert_eq!(w.state(), "Backoff");
        w.wait();
    }
    w.launched().dies(CRASH);
    assert_eq!(w.machine.state, State::GaveUp { failure: Failure { exit: 75, ..CRASH } });
}

#[test]
fn different_failures_count_towards_the_policys_limit() {
    let mut w = World::new(POLICY);
    for failure in [CRASH, OOM, CRASH, OOM] {
        w.launched().dies(failure);
        assert_eq!(w.state(), "Backoff");
        w.wait();
    }
    w.launched().dies(CRASH);
    assert_eq!(w.state(), "GaveUp");
}

#[test]
fn what_cannot_succeed_is_not_repeated() {
    let mut w = World::new(POLICY);
    w.launched().dies(BAD_FLAG);
    assert_eq!(w.machine.state, State::GaveUp { failure: BAD_FLAG });
    let mut w = World::new(Policy { give_up: GiveUp::Exit, ..POLICY });
    w.launched().dies(BAD_FLAG);
    assert_eq!(w.actions, [Action::Exit(65)]);
}

#[test]
fn g03_long_loads_do_not_hide_a_crash_loop() {
    let mut w = World::new(POLICY);
    for round in 0..2 {
        w.launched().later(1_200_000).dies(if round == 0 { CRASH } else { OOM });
        assert_eq!(w.state(), "Backoff", "round {round}");
        w.wait();
    }
    for _ in 0..2 {
        w.ready().later(1_000).dies(CRASH).wait();
    }
    w.ready().later(1_000).dies(OOM);
    assert_eq!(w.state(), "GaveUp", "five failures within ten minutes of useful life, hours apart");
}

#[test]
fn a_long_useful_life_forgives() {
    let mut w = World::new(POLICY);
    for _ in 0..20 {
        w.ready().later(700_000).dies(CRASH);
        assert_eq!(w.state(), "Backoff");
        let wait = w.machine.deadline().expect("backoff") - w.now;
        assert!(wait <= 2 * 2_000 * 5 / 4, "backoff starts small again: {wait} ms");
        w.wait();
    }
}

#[test]
fn backoff_doubles_with_jitter_and_is_bounded() {
    let policy = Policy { restart: Terms { max_failures: 100, ..POLICY.restart }, ..POLICY };
    let mut w = World::new(policy);
    let mut waits = Vec::new();
    for round in 0..8 {
        w.launched().dies(if round % 2 == 0 { CRASH } else { OOM });
        waits.push(w.machine.deadline().expect("backoff") - w.now);
        w.wait();
    }
    assert_eq!(waits, [2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000, 60_000]);
}

#[test]
fn g04_a_start_without_progress_is_ended_but_a_slow_one_is_not() {
    let mut w = World::new(POLICY);
    w.launched();
    for _ in 0..10 {
        w.later(599_000).on(Event::Progressed).on(Event::Tick);
        assert_eq!(w.state(), "Loading");
    }
    w.wait();
    assert_eq!((w.state(), w.actions.as_slice()), ("Failing", &[Action::Examine][..]));
    let mut w = World::new(POLICY);
    w.launched();
    while w.state() == "Loading" {
        assert!(w.now < 10_800_000, "start.limit is the last resort");
        w.later(500_000).on(Event::Progressed).on(Event::Tick);
    }
    assert!(w.now >= 10_800_000, "ended after {} ms", w.now);
}

#[test]
fn a_health_that_fails_as_it_looks_ready_is_asked_again_and_is_no_progress() {
    let mut w = World::new(POLICY);
    w.launched().later(1_000).on(Event::LooksReady).later(25_000).on(Event::Unhealthy);
    assert_eq!(
        (w.state(), w.machine.deadline()),
        ("Loading", Some(1_000 + 600_000)),
        "the start's own limits bound this"
    );
    w.on(Event::LooksReady);
    assert_eq!(w.actions, [Action::Confirm]);
    w.on(Event::Healthy);
    assert_eq!(w.state(), "Ready");
}

#[test]
fn g23_what_sigkill_does_not_end_is_never_covered_by_a_second_launch() {
    let mut w = World::new(POLICY);
    w.ready().on(Event::Exited).on(Event::Examined(CRASH)).wait();
    assert_eq!(w.state(), "Unkillable");
    w.later(3_600_000).on(Event::Tick);
    assert_eq!(w.state(), "Unkillable");
    w.on(Event::Stop);
    assert_eq!(w.actions, [Action::Exit(70)]);
    let mut w = World::new(POLICY);
    w.ready().on(Event::Exited).on(Event::Examined(CRASH)).wait().on(Event::TreeEmpty);
    assert_eq!(w.state(), "Releasing", "it went after all");
}

#[test]
fn a_restart_wished_for_is_no_failure() {
    let mut w = World::new(POLICY);
    w.ready().on(Event::Restart);
    assert_eq!(w.state(), "Draining");
    w.on(Event::Idle).on(Event::Exited).on(Event::TreeEmpty).on(FREE);
    assert_eq!((w.state(), w.machine.recent_failures(), w.machine.restarts), ("Fetching", 0, 1));
}

#[test]
fn a_restart_lets_answers_end_and_cuts_nothing_of_the_proxys() {
    let mut w = World::new(POLICY);
    w.ready().on(Event::Restart);
    assert_eq!((w.state(), w.actions.as_slice()), ("Draining", &[Action::Hold][..]));
    w.wait();
    assert_eq!(w.actions, [Action::Terminate], "the engine's end ends what is open; the proxy goes on");
    w.on(Event::Stop);
    assert_eq!(w.state(), "Stopping", "now it is for good");
    w.wait();
    assert_eq!(w.actions, [Action::Kill]);
    let mut w = World::new(POLICY);
    w.ready().on(Event::Restart).on(Event::Stop);
    assert_eq!(w.actions, [Action::Drain], "a stop in the middle of it closes the proxy");
    w.wait();
    assert_eq!(w.actions, [Action::CutStreams, Action::Terminate]);
}

#[test]
fn a_restart_gets_it_out_of_everything_that_waits() {
    let mut w = World::new(POLICY);
    w.launched().dies(BAD_FLAG).on(Event::Restart);
    assert_eq!((w.state(), w.machine.recent_failures(), w.machine.restarts), ("Fetching", 0, 1));
    let mut w = World::new(POLICY);
    w.launched().dies(CRASH).on(Event::Restart);
    assert_eq!((w.state(), w.machine.recent_failures()), ("Fetching", 0), "no waiting for the backoff's end");
    let mut w = World::new(POLICY);
    w.launched().on(Event::Restart);
    assert_eq!((w.state(), w.actions.as_slice()), ("Reaping", &[Action::Kill][..]));
    w.on(Event::TreeEmpty).on(FREE);
    assert_eq!((w.state(), w.machine.recent_failures()), ("Fetching", 0), "a start cut short is no failure");
    let mut w = World::new(POLICY);
    w.ready().on(Event::Exited).on(Event::Examined(BAD_FLAG)).on(Event::Restart).on(Event::TreeEmpty).on(FREE);
    assert_eq!((w.state(), w.machine.recent_failures()), ("Fetching", 0), "what would have ended in GaveUp");
    let mut w = World::new(POLICY);
    w.ready().on(Event::Exited).on(Event::Examined(BAD_FLAG)).on(Event::TreeEmpty).on(Event::Restart).on(FREE);
    assert_eq!(w.state(), "Fetching", "asked for a little later");
    let mut w = World::new(POLICY);
    w.ready().on(Event::Exited).on(Event::Examined(BAD_FLAG)).wait().on(Event::Restart).on(Event::TreeEmpty).on(FREE);
    assert_eq!(w.state(), "Fetching", "asked for while a process did not end");
    let mut w = World::new(POLICY);
    w.ready().on(Event::Stop).on(Event::Restart);
    assert_eq!((w.state(), w.actions.len()), ("Draining", 0), "a stop is not undone");
}

#[test]
fn g13_no_engine_is_launched_beside_whoever_holds_the_gpus() {
    for blocked in [HELD, Event::Tick] {
        let mut w = World::new(POLICY);
        w.on(Event::Fetched).on(Event::Prepared).later(RELEASE_LIMIT).on(blocked);
        assert_eq!((w.state(), w.machine.deadline()), ("Occupied", None));
        w.later(86_400_000).on(Event::Tick).on(HELD).on(Event::Restart).on(Event::Prepared);
        assert_eq!((w.state(), w.actions.len()), ("Occupied", 0), "for as long as it takes");
        w.on(FREE);
        assert_eq!((w.state(), w.actions.as_slice()), ("Launching", &[Action::Launch][..]));
    }
}

#[test]
fn g13_memory_that_is_not_freed_keeps_neither_a_stop_nor_a_cause_waiting() {
    let mut w = World::new(POLICY);
    w.ready().on(Event::Stop).on(Event::Idle).on(Event::Exited).on(Event::TreeEmpty);
    assert_eq!((w.state(), w.machine.deadline()), ("Releasing", Some(RELEASE_LIMIT)));
    w.wait();
    assert_eq!(w.actions, [Action::Exit(0)]);
    let mut w = World::new(POLICY);
    w.ready().on(Event::Stop).on(Event::Idle).on(Event::Exited).on(Event::TreeEmpty).on(Event::Stop);
    assert_eq!(w.actions, [Action::Exit(0)], "a second stop waits for nothing");
    let mut w = World::new(POLICY);
    w.ready().dies(BAD_FLAG);
    let mut x = World::new(POLICY);
    x.ready().on(Event::Exited).on(Event::Examined(BAD_FLAG)).on(Event::TreeEmpty).on(HELD);
    assert_eq!((w.state(), x.state()), ("GaveUp", "GaveUp"), "the cause is told, whoever holds the memory");
}
