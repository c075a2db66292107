//! Long random histories in an honest world, with times, beside the shadow model.

use proptest::prelude::*;

use super::super::step::*;
use super::shadow::Shadow;
use super::{BAD_FLAG, CRASH, OOM, POLICY, name};

fn event() -> impl Strategy<Value = Event> {
    let failure = prop_oneof![8 => Just(CRASH), 8 => Just(OOM), 1 => Just(BAD_FLAG)].boxed();
    prop_oneof![
        8 => Just(Event::Fetched),
        1 => failure.clone().prop_map(Event::FetchFailed),
        8 => Just(Event::Prepared),
        1 => failure.clone().prop_map(Event::PrepareFailed),
        8 => Just(Event::Launched),
        1 => failure.clone().prop_map(Event::LaunchFailed),
        2 => Just(Event::Progressed),
        8 => Just(Event::LooksReady),
        8 => Just(Event::Healthy),
        2 => Just(Event::Unhealthy),
        2 => Just(Event::LooksBusy),
        1 => Just(Event::Hung),
        2 => Just(Event::Exited),
        4 => failure.prop_map(Event::Examined),
        4 => Just(Event::Idle),
        8 => Just(Event::TreeEmpty),
        8 => (0u16..1000).prop_map(|roll| Event::Released { roll }),
        1 => (0u16..1000).prop_map(|roll| Event::Held { roll }),
        1 => Just(Event::Restart),
        8 => Just(Event::Tick),
    ]
}

/// Launches that followed a failure, by the time engines had been ready until then.
#[derive(Default)]
struct Launches {
    useful: Millis,
    ready_since: Option<Millis>,
    after_failure: Vec<Millis>,
    failed: bool,
}

impl Launches {
    fn observe(&mut self, before: &State, machine: &Machine, actions: &[Action], now: Millis) {
        let serves = |state: &State| matches!(state, State::Ready | State::Busy);
        match (serves(before), serves(&machine.state)) {
            (false, true) => self.ready_since = Some(now),
            (true, false) => self.useful += now - self.ready_since.take().expect("it was ready"),
            _ => {}
        }
        if matches!(machine.state, State::Backoff { .. }) {
            self.failed = true;
        }
        if actions.contains(&Action::Launch) && std::mem::take(&mut self.failed) {
            self.after_failure.push(self.useful);
        }
    }
}

proptest! {
    #[test]
    fn no_long_history_breaks_an_invariant(
        history in prop::collection::vec((event(), 0u64..400_000), 1..300),
        stop_at in 0usize..400,
    ) {
        let (mut machine, _) = Machine::start(POLICY);
        let (mut shadow, mut launches, mut now) = (Shadow::new(), Launches::default(), 0);
        for (n, (event, pause)) in history.into_iter().enumerate() {
            let event = if n == stop_at { Event::Stop } else { event };
            if !shadow.allows(&event) {
                continue;
            }
            now += pause;
            if event == Event::Tick {
                now = now.max(machine.deadline().unwrap_or(now));
            }
            let before = machine.state.clone();
            let actions = machine.step(&event, now);
            let told = shadow.observe(&before, &event, &actions, &machine);
            prop_assert!(told.is_ok(), "{told:?}: {event:?} in {}", name(&before));
            launches.observe(&before, &machine, &actions, now);
            if event == Event::Restart {
                launches.after_failure.clear();
            }
            let Terms { max_failures, window, .. } = POLICY.restart;
            let within = launches.after_failure.iter().filter(|at| launches.useful - **at <= window).count();
            prop_assert!(within < max_failures as usize, "{within} launches after failures within the window");
        }
    }
}
