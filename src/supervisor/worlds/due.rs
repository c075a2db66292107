//! When each thing is due, in numbers: the other tests follow a deadline wherever it lies.

use super::super::step::*;
use super::{CRASH, FREE, POLICY, World};

/// A second after its beginning, which no time can be mistaken for.
const AT: Millis = 1_000;

fn hurried(grace: Millis) -> Policy {
    Policy { grace, ..POLICY }
}

fn ready(policy: Policy) -> World {
    let mut w = World::new(policy);
    w.later(AT).ready();
    w
}

fn due(w: &World) -> Millis {
    w.machine.deadline().expect("it waits for something")
}

#[test]
fn a_start_is_due_by_its_stall_or_by_its_limit_whichever_is_sooner() {
    let mut w = World::new(POLICY);
    w.later(AT).launched();
    assert_eq!(due(&w), AT + 600_000);
    w.later(10_700_000).on(Event::Progressed);
    assert_eq!(due(&w), AT + 10_800_000);
}

#[test]
fn a_death_that_nobody_explains_within_five_seconds_is_of_unknown_cause() {
    let mut w = ready(POLICY);
    for round in 1..=3 {
        w.on(Event::Exited);
        assert_eq!(due(&w), w.now + 5_000);
        w.wait();
        assert_eq!((w.state(), w.actions.as_slice()), ("Reaping", &[Action::Kill][..]));
        w.on(Event::TreeEmpty).on(FREE);
        if round < 3 {
            w.wait().launched();
        }
    }
    let State::GaveUp { failure } = w.machine.state else { panic!("three of a kind: {}", w.state()) };
    assert_eq!((failure.class, failure.exit), ("unknown", EXIT_CRASH_LOOP));
}

#[test]
fn a_restart_has_the_times_of_a_stop_and_sigkill_its_ten_seconds() {
    let mut w = ready(POLICY);
    w.on(Event::Restart);
    assert_eq!(due(&w), AT + 25_000 - CUT_BEFORE_END);
    w.wait();
    assert_eq!(due(&w), AT + 25_000 - KILL_BEFORE_END);
    w.wait();
    assert_eq!(due(&w), w.now + REAP_LIMIT);
    let mut w = ready(hurried(5_000));
    w.on(Event::Restart);
    assert_eq!(due(&w), AT, "a grace too short for a drain has none");
    w.wait();
    assert_eq!(due(&w), AT + 3_000);
}

#[test]
fn a_stop_in_the_middle_of_a_restart_has_a_grace_of_its_own() {
    let mut w = ready(POLICY);
    w.on(Event::Restart).later(10_000).on(Event::Stop);
    assert_eq!(due(&w), AT + 10_000 + 25_000 - CUT_BEFORE_END);
    let mut w = ready(POLICY);
    w.on(Event::Restart).on(Event::Idle).later(10_000).on(Event::Stop);
    assert_eq!(due(&w), AT + 10_000 + 25_000 - KILL_BEFORE_END);
    let mut w = ready(hurried(9_000));
    w.on(Event::Restart).on(Event::Stop);
    assert_eq!(due(&w), AT + 1_000);
    w.wait();
    assert_eq!(due(&w), AT + 7_000);
}

#[test]
fn under_a_stop_sigkill_has_what_is_left_of_the_grace_up_to_ten_seconds_and_never_less_than_two() {
    let stopped = |grace| {
        let mut w = World::new(hurried(grace));
        w.later(AT).launched().on(Event::Stop);
        assert_eq!(w.state(), "Reaping");
        due(&w) - w.now
    };
    assert_eq!([stopped(25_000), stopped(5_000), stopped(1_000)], [10_000, 5_000, 2_000]);
    // Two stops, the second of which skips the waiting.
    let again = |later| {
        let mut w = ready(POLICY);
        w.on(Event::Stop).later(later).on(Event::Stop);
        assert_eq!(w.state(), "Reaping");
        due(&w) - w.now
    };
    assert_eq!([again(3_000), again(16_500)], [10_000, 8_500]);
    // SIGKILL was under way already.
    let reaping = |grace| {
        let mut w = ready(hurried(grace));
        w.on(Event::Exited).on(Event::Examined(CRASH)).later(1_000).on(Event::Stop);
        assert_eq!(w.state(), "Reaping");
        due(&w) - w.now
    };
    assert_eq!([reaping(25_000), reaping(5_000), reaping(1_000)], [9_000, 5_000, 2_000]);
}

#[test]
fn gpus_are_waited_for_twenty_seconds_and_under_a_stop_no_longer_than_its_grace_or_two() {
    let mut w = World::new(POLICY);
    w.later(AT).on(Event::Fetched).on(Event::Prepared);
    assert_eq!(due(&w), AT + RELEASE_LIMIT);
    let releasing = |grace| {
        let mut w = ready(hurried(grace));
        w.on(Event::Exited).on(Event::Examined(CRASH)).on(Event::TreeEmpty);
        assert_eq!(due(&w), AT + RELEASE_LIMIT);
        w.later(4_000).on(Event::Stop);
        assert_eq!(w.state(), "Releasing");
        due(&w) - w.now
    };
    assert_eq!([releasing(25_000), releasing(5_000), releasing(1_000)], [16_000, 5_000, 2_000]);
    let mut w = ready(POLICY);
    w.on(Event::Stop).wait().wait().later(1_500).on(Event::TreeEmpty);
    assert_eq!((w.state(), due(&w)), ("Releasing", w.now + KILL_BEFORE_END), "half a second before the grace's end");
}

#[test]
fn a_stop_within_the_last_moments_of_a_restart_takes_no_more_time_than_its_own() {
    let mut w = ready(POLICY);
    w.on(Event::Restart).wait().wait();
    assert_eq!(w.state(), "Reaping");
    w.later(9_000).on(Event::Stop);
    assert_eq!(due(&w), w.now + 1_000, "SIGKILL went nine seconds ago");
}

#[test]
fn the_next_start_is_due_after_its_backoff() {
    let mut w = ready(POLICY);
    w.dies(CRASH);
    assert_eq!((w.state(), due(&w)), ("Backoff", AT + 2_000));
}
