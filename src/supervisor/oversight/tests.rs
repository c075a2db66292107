use super::*;
use crate::supervisor::step::CUT_BEFORE_END;
use crate::supervisor::worlds::{CRASH, PATIENCE, POLICY};

const ONE: Proxy = Proxy { reports: Some(1), closed: false, waiting: 1, open: 1, last_byte: None };

fn told(oversight: &mut Oversight, events: &[Event], now: Millis) {
    for event in events {
        oversight.take(News::Event(*event), now);
    }
}

fn loading() -> Oversight {
    let mut oversight = Oversight::new(POLICY, PATIENCE);
    told(&mut oversight, &[Event::Fetched, Event::Prepared, Event::Released { roll: 0 }, Event::Launched], 0);
    oversight
}

fn ready() -> Oversight {
    let mut oversight = loading();
    assert_eq!(oversight.life(), Life::Starts);
    told(&mut oversight, &[Event::LooksReady, Event::Healthy], 0);
    assert_eq!((oversight.state(), oversight.life()), (&State::Ready, Life::Served));
    oversight
}

fn beat(oversight: &mut Oversight, now: Millis) -> Decided {
    oversight.take(News::Beat(Seen::default()), now)
}

fn asks(questions: &[Question]) -> Vec<Wanted> {
    questions.iter().map(|question| Wanted::Ask(*question)).collect()
}

fn thinks(opinion: Opinion, questions: &[Question]) -> Decided {
    Decided { event: None, orders: [vec![Wanted::Think(opinion)], asks(questions)].concat() }
}

fn rank() -> RankStatus {
    RankStatus { name: "TP3".into(), pid: 7 }
}

fn found(work: Work) -> News {
    News::Looked(Found { at: 6_000, work, stopped: None })
}

#[test]
fn an_engine_nobody_hears_of_is_asked_then_suspected_then_hung() {
    let mut o = ready();
    o.take(News::Traffic(ONE), 1_000);
    assert_eq!(beat(&mut o, 2_000), thinks(Opinion::Trusted, &[]), "nobody is silent yet");
    assert_eq!(beat(&mut o, 6_000), thinks(Opinion::Trusted, &[Question::Look, Question::Figures]));
    assert_eq!(beat(&mut o, 7_000), thinks(Opinion::Trusted, &[]), "asked a moment ago");
    assert_eq!(beat(&mut o, 8_000), thinks(Opinion::Trusted, &[Question::Figures]));
    let suspected = Opinion::Suspected(Duration::from_secs(29));
    let after = beat(&mut o, 30_000);
    assert_eq!(after, thinks(suspected, &[Question::Probe, Question::Figures]), "the look is not over");
    let hung = beat(&mut o, 121_000);
    assert_eq!(hung.event, Some(Event::Hung));
    let orders = [Wanted::Think(Opinion::Hung(Duration::from_mins(2))), Wanted::Act(Action::Examine)];
    assert_eq!(hung.orders, orders, "thought of before it is done, and asked nothing more");
}

#[test]
fn one_look_at_a_time_and_one_that_is_over_makes_room_for_the_next() {
    for over in [found(Work::None), News::LookedInVain] {
        let mut o = ready();
        o.take(News::Traffic(ONE), 1_000);
        assert!(beat(&mut o, 6_000).orders.contains(&Wanted::Ask(Question::Look)));
        assert!(!beat(&mut o, 16_000).orders.contains(&Wanted::Ask(Question::Look)));
        assert_eq!(o.take(over, 16_500), Decided::default());
        assert!(beat(&mut o, 22_000).orders.contains(&Wanted::Ask(Question::Look)));
    }
}

#[test]
fn g07_only_a_compilation_that_a_look_finds_is_a_sign_of_life() {
    for (work, opinion) in [
        (Work::Compilation, Opinion::Trusted),
        (Work::Some, Opinion::Suspected(Duration::from_secs(29))),
        (Work::None, Opinion::Suspected(Duration::from_secs(29))),
    ] {
        let mut o = ready();
        o.take(News::Traffic(ONE), 1_000);
        beat(&mut o, 6_000);
        o.take(found(work), 7_000);
        assert_eq!(beat(&mut o, 30_000).orders[0], Wanted::Think(opinion), "{work:?}");
    }
}

#[test]
fn what_the_log_the_proxy_and_the_figures_tell_is_a_sign_of_life() {
    let signs: [fn(&mut Oversight); 3] = [
        |o| _ = o.take(News::Beat(Seen { batch: Some(20_000), ..Seen::default() }), 21_000),
        |o| _ = o.take(News::Traffic(Proxy { last_byte: Some(20_000), ..ONE }), 21_000),
        |o| {
            o.take(News::Figures(figures::News::First), 15_000);
            o.take(News::Figures(figures::News::Moved(Some(Duration::from_secs(1)))), 21_000);
        },
    ];
    for sign in signs {
        let mut o = ready();
        o.take(News::Traffic(ONE), 1_000);
        sign(&mut o);
        assert_eq!(beat(&mut o, 40_000).orders[0], Wanted::Think(Opinion::Trusted));
        let suspected = Opinion::Suspected(Duration::from_secs(28));
        assert_eq!(beat(&mut o, 48_000).orders[0], Wanted::Think(suspected), "counted from the sign");
    }
}

#[test]
fn a_probe_that_fails_makes_it_busy_and_one_that_passes_ready() {
    let mut o = ready();
    let asked = beat(&mut o, 30_000);
    assert_eq!(asked, thinks(Opinion::Trusted, &[Question::Probe]));
    assert_eq!(o.take(News::Answered(Answer::Not), 50_000).event, Some(Event::Unhealthy));
    assert_eq!(o.state(), &State::Busy);
    let busy = o.take(News::Beat(Seen { batch: Some(50_500), ..Seen::default() }), 51_000);
    assert_eq!(busy.event, Some(Event::LooksBusy));
    assert_eq!(busy.orders[0], Wanted::Think(Opinion::Trusted));
    assert_eq!(o.take(News::Answered(Answer::Healthy), 52_000).event, Some(Event::Healthy));
    assert_eq!(o.state(), &State::Ready);
    assert_eq!(beat(&mut o, 53_000), thinks(Opinion::Trusted, &[]));
}

#[test]
fn g06_a_rank_that_ended_is_acted_on_at_once_where_it_serves_and_in_no_other_state() {
    let seen = Seen { gone: Some(rank()), ..Seen::default() };
    for news in [News::RankEnded(rank()), News::Beat(seen)] {
        let decided = ready().take(news, 1_000);
        assert_eq!(decided.event, Some(Event::Hung));
        assert_eq!(decided.orders, [Wanted::Think(Opinion::RankDied(rank())), Wanted::Act(Action::Examine)]);
    }
    assert_eq!(loading().take(News::RankEnded(rank()), 1_000), Decided::default());
}

#[test]
fn a_rank_that_somebody_stopped_is_suspected_at_once_until_it_runs_again() {
    let mut o = ready();
    let seen = News::Beat(Seen { stopped: Some(rank()), ..Seen::default() });
    assert_eq!(o.take(seen.clone(), 1_000).orders[0], Wanted::Think(Opinion::Suspected(Duration::ZERO)));
    assert_eq!(o.take(seen, 2_000).orders[0], Wanted::Think(Opinion::Suspected(Duration::from_secs(1))));
    assert_eq!(beat(&mut o, 3_000).orders[0], Wanted::Think(Opinion::Trusted));
}

#[test]
fn a_start_is_looked_at_each_five_seconds_and_goes_on_while_it_works() {
    let mut o = loading();
    assert_eq!(beat(&mut o, 1_000).orders, asks(&[Question::Look]));
    let works = o.take(found(Work::Some), 1_200);
    assert_eq!((works.event, works.orders), (Some(Event::Progressed), vec![Wanted::Think(Opinion::Trusted)]));
    assert_eq!(
        o.state(),
        &State::Loading { since: 0, progress: 1_200, check: crate::supervisor::step::Check::Waiting }
    );
    assert_eq!(beat(&mut o, 5_999).orders, []);
    assert_eq!(beat(&mut o, 6_000).orders, asks(&[Question::Look]));
    assert_eq!(o.take(found(Work::None), 6_100), thinks(Opinion::Trusted, &[]));
    let impatient = Patience { start_stall: Duration::from_secs(8), ..PATIENCE };
    assert_eq!(Oversight::new(POLICY, impatient).look_at_start(), Duration::from_secs(2));
}

#[test]
fn a_start_that_somebody_stopped_is_suspected_and_not_ended() {
    let mut o = loading();
    let stopped = News::Looked(Found { at: 1_000, work: Work::None, stopped: Some(rank()) });
    assert_eq!(o.take(stopped.clone(), 1_000), thinks(Opinion::Suspected(Duration::ZERO), &[]));
    assert_eq!(o.take(stopped, 400_000), thinks(Opinion::Suspected(Duration::from_secs(399)), &[]));
    assert_eq!(o.take(found(Work::None), 401_000), thinks(Opinion::Trusted, &[]));
}

#[test]
fn what_is_known_of_one_engine_is_not_held_against_the_next() {
    let mut o = ready();
    o.take(News::Beat(Seen { stopped: Some(rank()), ..Seen::default() }), 1_000);
    told(&mut o, &[Event::Exited, Event::Examined(CRASH), Event::TreeEmpty, Event::Released { roll: 0 }], 2_000);
    assert_eq!(beat(&mut o, 3_000), thinks(Opinion::Trusted, &[]), "what is being ended is suspected of nothing");
    assert_eq!(o.life(), Life::Served);
    o.take(News::Event(Event::Tick), 60_000);
    assert_eq!((o.state(), o.life()), (&State::Fetching, Life::Starts));
    assert_eq!(o.watch.evidence(61_000).stopped, None);
}

#[test]
fn j05_only_a_long_gap_of_our_own_begins_every_patience_anew() {
    let silent = || {
        let mut o = ready();
        o.take(News::Traffic(ONE), 1_000);
        o
    };
    let mut o = silent();
    assert_eq!(o.woke(OVERSLEPT.saturating_sub(Duration::from_millis(1)), 130_000), None);
    assert_eq!(beat(&mut o, 130_000).event, Some(Event::Hung));
    let mut o = silent();
    let woke = o.woke(OVERSLEPT, 130_000).expect("it slept");
    assert_eq!(woke, Decided { event: Some(Event::Progressed), orders: Vec::new() });
    assert_eq!(beat(&mut o, 130_000).orders[0], Wanted::Think(Opinion::Trusted));
}

#[test]
fn a_drain_is_over_when_a_newer_report_of_a_closed_proxy_has_nothing_open() {
    let over = Proxy { reports: Some(8), closed: true, waiting: 0, open: 0, last_byte: None };
    for wish in [News::StopWished, News::Event(Event::Restart)] {
        let draining = || {
            let mut o = ready();
            o.take(News::Traffic(Proxy { reports: Some(7), ..ONE }), 1_000);
            o.take(wish.clone(), 2_000);
            assert_eq!(o.state(), &State::Draining { cut_at: 27_000 - CUT_BEFORE_END, end: 27_000 });
            o
        };
        let idle = |proxy| draining().take(News::Traffic(proxy), 3_000).event;
        assert_eq!(idle(over), Some(Event::Idle));
        assert_eq!(idle(Proxy { reports: Some(7), ..over }), None, "the report is from before");
        assert_eq!(idle(Proxy { closed: false, ..over }), None, "it does not know yet");
        assert_eq!(idle(Proxy { open: 1, ..over }), None);
        assert_eq!(idle(Proxy::default()), Some(Event::Idle), "no proxy, no clients");
    }
    let mut o = ready();
    assert_eq!(o.take(News::Traffic(over), 1_000).event, None, "nobody asked");
}

#[test]
fn two_signals_at_once_are_one_wish_and_a_later_one_is_another() {
    let mut o = ready();
    o.take(News::Traffic(ONE), 500);
    assert_eq!(o.take(News::StopWished, 1_000).orders, [Wanted::Act(Action::Drain)]);
    assert_eq!(o.take(News::StopWished, 1_099), Decided::default());
    let again = o.take(News::StopWished, 1_100);
    assert_eq!(again.orders, [Wanted::Act(Action::CutStreams), Wanted::Act(Action::Kill)]);
}
