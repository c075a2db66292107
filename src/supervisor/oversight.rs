//! What is done about an engine that serves, from what is seen of it: opinions, events and questions out. Pure.
//!
//! The driver carries it out, and the seeded worlds run it over an engine that is made of numbers.

use std::time::Duration;

use super::step::{Event, Millis};
use crate::health::verdict::Verdict;
use crate::health::watch::Watch;

/// How long is waited for what.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    pub hang_after: Duration,
    pub probe_interval: Duration,
}

/// What is thought of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opinion {
    Trusted,
    /// Silent for so long while somebody waits. Nothing is done yet.
    Suspected(Duration),
    Hung(Duration),
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

/// What follows from one look at the clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beat {
    pub opinion: Opinion,
    pub event: Option<Event>,
    pub questions: Vec<Question>,
}

/// Once a second: first it is judged by what is known, then it is asked for what is not. One that is called hung is
/// asked nothing more.
pub fn beat(watch: &mut Watch, now: Millis, patience: &Patience) -> Beat {
    let (opinion, event) = match watch.verdict(now, patience.hang_after) {
        Verdict::Alive => (Opinion::Trusted, None),
        Verdict::Busy => (Opinion::Trusted, Some(Event::LooksBusy)),
        Verdict::Suspected(silence) => (Opinion::Suspected(silence), None),
        Verdict::Hung(silence) => {
            return Beat { opinion: Opinion::Hung(silence), event: Some(Event::Hung), questions: Vec::new() };
        }
    };
    let mut questions = Vec::new();
    if watch.wants_probe(now, patience.probe_interval) {
        watch.asked(now);
        questions.push(Question::Probe);
    }
    if watch.wants_look(now, patience.hang_after) {
        watch.looks(now);
        questions.push(Question::Look);
    }
    if watch.wants_figures(now, patience.hang_after) {
        watch.reads(now);
        questions.push(Question::Figures);
    }
    Beat { opinion, event, questions }
}

/// How a probe ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Healthy,
    /// Refused, or not within its time.
    Not,
}

pub fn answered(watch: &mut Watch, answer: Answer, now: Millis) -> Event {
    match answer {
        Answer::Healthy => {
            watch.passed(now);
            Event::Healthy
        }
        Answer::Not => {
            watch.failed();
            Event::Unhealthy
        }
    }
}

/// The supervisor's own loop turns each second. After a gap as long as this we were stopped (SIGSTOP, a debugger, a
/// frozen cgroup, a machine that slept), and what seemed silent meanwhile may only not have been heard.
pub const OVERSLEPT: Duration = Duration::from_secs(4);

/// Time in which we did not run is no silence of the engine's: every patience begins anew.
pub fn woke(watch: &mut Watch, gap: Duration, now: Millis) -> Option<Event> {
    (gap >= OVERSLEPT).then(|| {
        watch.begin_anew(now);
        Event::Progressed
    })
}

/// What a drain has to prove.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// Reports of the proxy that were there when it was asked for; none: it was not.
    pub asked: Option<u64>,
    /// Reports that are there now; none: no proxy lives.
    pub reports: Option<u64>,
    /// The proxy knows that nothing may pass.
    pub closed: bool,
    /// Requests and answers that are open.
    pub open: usize,
}

/// Only a report that is newer than the drain, of a proxy that knows of it, proves that nothing slipped in before it.
pub fn is_drained(drain: &Drain) -> bool {
    let proven = match drain.reports {
        None => true,
        Some(reports) => drain.asked.is_some_and(|asked| reports > asked) && drain.closed,
    };
    drain.open == 0 && proven
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::watch::Sign;

    const PATIENCE: Patience = Patience { hang_after: Duration::from_mins(2), probe_interval: Duration::from_secs(30) };

    fn ready() -> Watch {
        let mut watch = Watch::default();
        watch.passed(0);
        watch
    }

    #[test]
    fn an_engine_nobody_hears_of_is_asked_then_suspected_then_hung() {
        let mut watch = ready();
        watch.requests(1, 1_000);
        let asked = |beat: Beat| beat.questions;
        assert_eq!(asked(beat(&mut watch, 2_000, &PATIENCE)), [], "nobody is silent yet");
        assert_eq!(asked(beat(&mut watch, 6_000, &PATIENCE)), [Question::Look, Question::Figures]);
        assert_eq!(asked(beat(&mut watch, 7_000, &PATIENCE)), [], "asked a moment ago");
        assert_eq!(asked(beat(&mut watch, 8_000, &PATIENCE)), [Question::Figures]);
        let at = beat(&mut watch, 30_000, &PATIENCE);
        assert_eq!((at.opinion, at.event), (Opinion::Suspected(Duration::from_secs(29)), None));
        assert_eq!(at.questions, [Question::Probe, Question::Look, Question::Figures]);
        let hung =
            Beat { opinion: Opinion::Hung(Duration::from_mins(2)), event: Some(Event::Hung), questions: Vec::new() };
        assert_eq!(beat(&mut watch, 121_000, &PATIENCE), hung);
    }

    #[test]
    fn a_probe_that_fails_makes_it_busy_and_one_that_passes_ready() {
        let mut watch = ready();
        watch.asked(30_000);
        assert_eq!(answered(&mut watch, Answer::Not, 50_000), Event::Unhealthy);
        watch.sign(Sign::Batch, 50_500);
        let busy = beat(&mut watch, 51_000, &PATIENCE);
        assert_eq!((busy.opinion, busy.event), (Opinion::Trusted, Some(Event::LooksBusy)));
        assert_eq!(answered(&mut watch, Answer::Healthy, 52_000), Event::Healthy);
        let ready = beat(&mut watch, 53_000, &PATIENCE);
        assert_eq!((ready.opinion, ready.event), (Opinion::Trusted, None));
    }

    #[test]
    fn j05_only_a_long_gap_of_our_own_begins_every_patience_anew() {
        let mut watch = ready();
        watch.requests(1, 1_000);
        assert_eq!(woke(&mut watch, OVERSLEPT.saturating_sub(Duration::from_millis(1)), 110_000), None);
        assert!(matches!(beat(&mut watch.clone(), 130_000, &PATIENCE).opinion, Opinion::Hung(_)));
        assert_eq!(woke(&mut watch, OVERSLEPT, 130_000), Some(Event::Progressed));
        assert_eq!(beat(&mut watch, 130_000, &PATIENCE).opinion, Opinion::Trusted);
    }

    #[test]
    fn a_drain_is_over_when_a_newer_report_of_a_closed_proxy_has_nothing_open() {
        let over = Drain { asked: Some(7), reports: Some(8), closed: true, open: 0 };
        assert!(is_drained(&over));
        assert!(!is_drained(&Drain { reports: Some(7), ..over }), "the report is from before");
        assert!(!is_drained(&Drain { closed: false, ..over }), "it does not know yet");
        assert!(!is_drained(&Drain { open: 1, ..over }));
        assert!(!is_drained(&Drain { asked: None, ..over }), "nobody asked");
        assert!(is_drained(&Drain { reports: None, asked: None, closed: false, open: 0 }), "no proxy, no clients");
    }
}
