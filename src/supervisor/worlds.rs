//! Tests of `step`: its edges, its invariants over every short history, and the cases users feel.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::step::*;

const POLICY: Policy = Policy {
    max_failures: 5,
    window: 600_000,
    backoff: 2_000,
    backoff_max: 60_000,
    give_up: GiveUp::Serve,
    grace: 25_000,
    start_stall: 600_000,
    start_limit: 10_800_000,
};

const CRASH: Failure = Failure { class: "crash", retry: Retry::Backoff, exit: 75 };
const OOM: Failure = Failure { class: "gpu_oom", retry: Retry::Backoff, exit: 75 };
const BAD_FLAG: Failure = Failure { class: "bad_config", retry: Retry::Never, exit: 65 };

fn name(state: &State) -> &'static str {
    match state {
        State::Fetching => "Fetching",
        State::Preparing => "Preparing",
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
        self.on(Event::Fetched).on(Event::Prepared).on(Event::Launched)
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
    w.on(Event::TreeEmpty).on(Event::Released { roll: 0 });
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
    w.on(Event::TreeEmpty).on(Event::Released { roll: 0 });
    assert_eq!(w.actions, [Action::Exit(0)]);
}

#[test]
fn j01_stop_before_ready_does_not_wait_for_anything() {
    for before in 0..4 {
        let mut w = World::new(POLICY);
        for event in [Event::Fetched, Event::Prepared, Event::Launched].into_iter().take(before) {
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
    let policy = Policy { max_failures: 100, ..POLICY };
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
        w.later(599_000).on(Event::Progressed);
        assert_eq!(w.state(), "Loading");
    }
    w.wait();
    assert_eq!((w.state(), w.actions.as_slice()), ("Failing", &[Action::Examine][..]));
    let mut w = World::new(POLICY);
    w.launched();
    while w.state() == "Loading" {
        assert!(w.now <= 10_800_000, "start.limit is the last resort");
        w.later(500_000).on(Event::Progressed).on(Event::Tick);
    }
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
    w.on(Event::Idle).on(Event::Exited).on(Event::TreeEmpty).on(Event::Released { roll: 0 });
    assert_eq!((w.state(), w.machine.recent_failures(), w.machine.restarts), ("Fetching", 0, 1));
}

fn alphabet() -> Vec<Event> {
    vec![
        Event::Fetched,
        Event::FetchFailed(CRASH),
        Event::FetchFailed(BAD_FLAG),
        Event::Prepared,
        Event::PrepareFailed(BAD_FLAG),
        Event::PrepareFailed(CRASH),
        Event::Launched,
        Event::LaunchFailed(CRASH),
        Event::Progressed,
        Event::LooksReady,
        Event::Healthy,
        Event::Unhealthy,
        Event::LooksBusy,
        Event::Hung,
        Event::Exited,
        Event::Examined(CRASH),
        Event::Idle,
        Event::TreeEmpty,
        Event::Released { roll: 0 },
        Event::Stop,
        Event::Restart,
        Event::Tick,
    ]
}

/// What must hold whatever happens, checked along every history. The environment is honest: a tree
/// is reported empty only after `Kill`, GPUs only after `Release`.
#[derive(Clone, PartialEq, Eq, Hash)]
#[allow(clippy::struct_excessive_bools)] // four independent facts; none is a policy
struct Shadow {
    engine_may_live: bool,
    gpus_may_be_held: bool,
    kill_asked: bool,
    release_asked: bool,
}

#[test]
fn every_short_history_keeps_the_invariants_and_the_diagrams_edges_are_the_reachable_ones() {
    let mut edges: BTreeSet<(&'static str, &'static str)> = BTreeSet::new();
    let mut seen: HashMap<String, usize> = HashMap::new();
    let (machine, _) = Machine::start(POLICY);
    let shadow = Shadow { engine_may_live: false, gpus_may_be_held: false, kill_asked: false, release_asked: false };
    let mut todo = VecDeque::from([(machine, shadow, 0u64, 0usize)]);
    while let Some((machine, shadow, now, depth)) = todo.pop_front() {
        if depth >= 14 {
            continue;
        }
        for event in alphabet() {
            if event == Event::TreeEmpty && !shadow.kill_asked
                || matches!(event, Event::Released { .. }) && !shadow.release_asked
            {
                continue;
            }
            let mut next = machine.clone();
            let mut s = shadow.clone();
            let now = if event == Event::Tick { machine.deadline().unwrap_or(now).max(now) } else { now };
            let before = name(&machine.state);
            match event {
                Event::TreeEmpty => {
                    s.engine_may_live = false;
                    s.kill_asked = false;
                }
                Event::Released { .. } => {
                    s.gpus_may_be_held = false;
                    s.release_asked = false;
                }
                _ => {}
            }
            let actions = next.step(&event, now);
            let after = name(&next.state);
            if before != after {
                edges.insert((before, after));
            }
            for action in &actions {
                match action {
                    Action::Launch => {
                        assert!(!s.engine_may_live, "a second engine beside a first one");
                        assert!(!s.gpus_may_be_held, "a launch on GPUs that are not known to be free");
                        assert!(!next.stopping(), "a launch after a stop");
                        s.engine_may_live = true;
                        s.gpus_may_be_held = true;
                    }
                    Action::Kill => s.kill_asked = true,
                    Action::Release => {
                        assert!(!s.engine_may_live, "GPUs are waited for only when the tree is empty");
                        s.release_asked = true;
                    }
                    Action::Exit(0) => assert!(!s.engine_may_live, "exit 0 with an engine alive"),
                    _ => {}
                }
            }
            if matches!(next.state, State::Ready | State::Busy) {
                assert!(s.engine_may_live, "traffic with no engine");
            }
            // The abstract state: times only as "due or not" through the deadline.
            let key = format!("{:?}|{}|{}", abstracted(&next), next.recent_failures().min(3), hash_of(&s));
            if seen.insert(key, depth).is_none() {
                todo.push_back((next, s, now, depth + 1));
            }
        }
    }
    let drawn: BTreeSet<(&str, &str)> = DIAGRAM.iter().copied().collect();
    let missing: Vec<_> = drawn.difference(&edges).collect();
    let extra: Vec<_> = edges.difference(&drawn).collect();
    assert!(missing.is_empty() && extra.is_empty(), "not reachable: {missing:?}; not drawn: {extra:?}");
    assert!(seen.len() > 60, "the search went somewhere: {} states", seen.len());
}

fn abstracted(machine: &Machine) -> (String, bool, usize) {
    let state = match &machine.state {
        State::Loading { check, .. } => format!("Loading {check:?}"),
        State::Reaping { then, .. } | State::Unkillable { then } | State::Releasing { then } => {
            format!("{} {then:?}", name(&machine.state))
        }
        State::GaveUp { failure } => format!("GaveUp {failure:?}"),
        other => name(other).to_owned(),
    };
    (state, machine.stopping(), machine.restarts.min(1) as usize)
}

fn hash_of(shadow: &Shadow) -> u8 {
    u8::from(shadow.engine_may_live)
        | u8::from(shadow.gpus_may_be_held) << 1
        | u8::from(shadow.kill_asked) << 2
        | u8::from(shadow.release_asked) << 3
}

/// The edges of the diagram in `step`'s documentation.
const DIAGRAM: &[(&str, &str)] = &[
    ("Fetching", "Preparing"),
    ("Fetching", "Backoff"),
    ("Fetching", "GaveUp"),
    ("Fetching", "Reaping"),
    ("Preparing", "Launching"),
    ("Preparing", "Backoff"),
    ("Preparing", "GaveUp"),
    ("Preparing", "Reaping"),
    ("Launching", "Loading"),
    ("Launching", "Failing"),
    ("Launching", "Reaping"),
    ("Loading", "Ready"),
    ("Loading", "Failing"),
    ("Loading", "Reaping"),
    ("Ready", "Busy"),
    ("Ready", "Failing"),
    ("Ready", "Draining"),
    ("Busy", "Ready"),
    ("Busy", "Failing"),
    ("Busy", "Draining"),
    ("Failing", "Reaping"),
    ("Draining", "Stopping"),
    ("Draining", "Reaping"),
    ("Stopping", "Reaping"),
    ("Reaping", "Releasing"),
    ("Reaping", "Unkillable"),
    ("Reaping", "Stopped"),
    ("Unkillable", "Releasing"),
    ("Unkillable", "Stopped"),
    ("Releasing", "Backoff"),
    ("Releasing", "Fetching"),
    ("Releasing", "GaveUp"),
    ("Releasing", "Stopped"),
    ("Backoff", "Fetching"),
    ("Backoff", "Stopped"),
    ("GaveUp", "Fetching"),
    ("GaveUp", "Stopped"),
];

proptest::proptest! {
    /// Whatever happens, a stop is over within the grace and the time SIGKILL may take.
    #[test]
    fn stop_is_bounded_whatever_the_engine_does(history in proptest::collection::vec((0usize..22, 0u64..700_000), 0..40)) {
        let mut w = World::new(POLICY);
        for (index, pause) in history {
            let event = alphabet()[index];
            if matches!(event, Event::Stop) { continue }
            w.later(pause);
            w.on(event);
        }
        w.on(Event::Stop);
        let from = w.now;
        let mut steps = 0;
        // The engine ignores everything: only deadlines pass.
        while w.state() != "Stopped" && w.state() != "Releasing" {
            steps += 1;
            proptest::prop_assert!(steps < 10, "stuck in {:?}", w.machine.state);
            w.wait();
        }
        proptest::prop_assert!(w.now - from <= POLICY.grace + KILL_BEFORE_END, "{} ms", w.now - from);
    }
}
