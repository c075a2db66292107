//! Every history of events, breadth first, over all abstract states that can be told apart.

use std::collections::{BTreeSet, HashSet, VecDeque};

use super::super::step::*;
use super::shadow::Shadow;
use super::{BAD_FLAG, CRASH, FREE, HELD, POLICY, name};

/// No state is first reached by a longer history than this; asserted below.
const DEPTH: usize = 40;
const ALPHABET: [Event; 23] = [
    Event::Fetched,
    Event::FetchFailed(CRASH),
    Event::FetchFailed(BAD_FLAG),
    Event::Prepared,
    Event::PrepareFailed(CRASH),
    Event::PrepareFailed(BAD_FLAG),
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
    FREE,
    HELD,
    Event::Stop,
    Event::Restart,
    Event::Tick,
];

/// What tells two states apart: everything but the times, which are only "due" or "not yet".
fn abstracted(machine: &Machine, shadow: &Shadow) -> String {
    let state = match &machine.state {
        State::Loading { check, .. } => format!("Loading {check:?}"),
        State::Reaping { then, .. } | State::Unkillable { then } | State::Releasing { then, .. } => {
            format!("{} {then:?}", name(&machine.state))
        }
        State::GaveUp { failure } => format!("GaveUp {failure:?}"),
        State::Stopped { exit } => format!("Stopped {exit}"),
        other => name(other).to_owned(),
    };
    format!("{state} {} {:?}", machine.recent_failures(), shadow)
}

struct Found {
    edges: BTreeSet<(&'static str, &'static str)>,
    states: usize,
    deepest: usize,
}

fn search(policy: Policy) -> Found {
    let mut found = Found { edges: BTreeSet::new(), states: 0, deepest: 0 };
    let mut seen = HashSet::new();
    let (machine, _) = Machine::start(policy);
    let mut todo = VecDeque::from([(machine, Shadow::new(), 0u64, Vec::<Event>::new())]);
    while let Some((machine, shadow, now, history)) = todo.pop_front() {
        found.deepest = found.deepest.max(history.len());
        assert!(history.len() < DEPTH, "the search does not end: {history:?}");
        stops_in_time(&machine, &shadow, now);
        for event in ALPHABET.iter().filter(|event| shadow.allows(event)) {
            let (mut next, mut s) = (machine.clone(), shadow.clone());
            let now = match event {
                Event::Tick => machine.deadline().unwrap_or(now).max(now),
                _ => now + 1,
            };
            let actions = next.step(event, now);
            if let Err(wrong) = s.observe(&machine.state, event, &actions, &next) {
                panic!("{wrong}: {event:?} after {history:?}");
            }
            let (before, after) = (name(&machine.state), name(&next.state));
            if before != after {
                found.edges.insert((before, after));
            }
            if seen.insert(abstracted(&next, &s)) {
                let history = history.iter().copied().chain([*event]).collect();
                todo.push_back((next, s, now, history));
            }
        }
        // A wake-up that comes too soon is none.
        if let Some(early) = machine.deadline().filter(|at| *at > now) {
            let mut next = machine.clone();
            assert_eq!(next.step(&Event::Tick, early - 1), [], "{} is early", name(&machine.state));
            assert_eq!(next, machine);
        }
    }
    found.states = seen.len();
    found
}

/// From here a stop ends everything within the grace and the time SIGKILL may take, whether the engine's
/// processes end or not, whether its GPUs become free or not, and however often it is said.
fn stops_in_time(machine: &Machine, shadow: &Shadow, now: Millis) {
    for (dies, again) in [(false, false), (true, false), (false, true), (true, true)] {
        let (mut m, mut s, from, mut now) = (machine.clone(), shadow.clone(), now, now);
        let mut events = VecDeque::from([Event::Stop]);
        if again {
            events.push_back(Event::Stop);
        }
        for steps in 0.. {
            assert!(steps < 9, "a stop does not end: {:?}", m.state);
            if matches!(m.state, State::Stopped { .. }) {
                break;
            }
            let event = match events.pop_front() {
                Some(event) => event,
                None if dies && s.allows(&Event::TreeEmpty) => Event::TreeEmpty,
                None => {
                    now = now.max(m.deadline().expect("a stop waits for nothing without an end"));
                    Event::Tick
                }
            };
            let before = m.state.clone();
            let actions = m.step(&event, now);
            s.observe(&before, &event, &actions, &m).expect("the invariants hold on the way out");
        }
        let limit = m.policy.grace + 2 * KILL_BEFORE_END;
        assert!(now - from <= limit, "{} ms from {:?}", now - from, machine.state);
    }
}

/// The edges as `step`'s documentation lists them.
fn drawn() -> BTreeSet<(&'static str, &'static str)> {
    let rows = include_str!("../step.rs").lines().filter_map(|line| line.strip_prefix("//! ")?.split_once(" ─► "));
    let plain = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphabetic());
    rows.map(|(from, to)| (from.trim_end(), to.split(' ').collect::<Vec<_>>()))
        .filter(|(from, to)| plain(from) && to.iter().all(|to| plain(to)))
        .flat_map(|(from, to)| to.into_iter().map(move |to| (from, to)))
        .collect()
}

#[test]
fn every_history_keeps_the_invariants_and_the_edges_drawn_are_the_reachable_ones() {
    let small = Terms { max_failures: 3, ..POLICY.restart };
    let serve = search(Policy { restart: small, ..POLICY });
    let exit = search(Policy { restart: small, give_up: GiveUp::Exit, ..POLICY });
    let reachable: BTreeSet<_> = serve.edges.union(&exit.edges).copied().collect();
    let drawn = drawn();
    let missing: Vec<_> = drawn.difference(&reachable).collect();
    let extra: Vec<_> = reachable.difference(&drawn).collect();
    assert!(missing.is_empty() && extra.is_empty(), "not reachable: {missing:?}; not drawn: {extra:?}");
    assert!(serve.deepest >= 8 && serve.states > 500, "{} states, {} deep", serve.states, serve.deepest);
}
