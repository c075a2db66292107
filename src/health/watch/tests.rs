use super::*;

const S: Millis = 1000;
const HANG: Duration = Duration::from_mins(2);
const EVERY: Duration = Duration::from_secs(30);

fn ready(at: Millis) -> Watch {
    let mut watch = Watch::default();
    watch.passed(at);
    watch
}

#[test]
fn a_probe_waits_like_a_request_and_the_next_one_does_not_begin_its_wait_anew() {
    let mut watch = ready(0);
    let mut asked = 0;
    let hung = (0..400)
        .find(|second| {
            let now = second * S;
            if watch.wants_probe(now, EVERY) {
                watch.asked(now);
                asked += 1;
            } else if watch.probe.under_way == Asked::Yes && now == watch.probe.asked.unwrap() + 20 * S {
                watch.failed();
            }
            matches!(watch.verdict(now, HANG), Verdict::Hung(_))
        })
        .expect("an engine without traffic hangs too");
    assert_eq!(hung, 150, "the first probe at 30 s waited for two minutes");
    assert_eq!(asked, 5, "one each 30 s");
}

#[test]
fn one_probe_at_a_time_and_none_while_tokens_or_batches_come() {
    let mut watch = ready(0);
    assert!(!watch.wants_probe(29 * S, EVERY));
    assert!(watch.wants_probe(30 * S, EVERY));
    watch.sign(Sign::Token, 29 * S);
    assert!(!watch.wants_probe(30 * S, EVERY));
    assert!(!watch.wants_probe(59 * S - 1, EVERY));
    assert!(watch.wants_probe(59 * S, EVERY), "as long after the token as after a probe");
    watch.asked(60 * S);
    assert!(!watch.wants_probe(200 * S, EVERY), "one is under way");
    watch.failed();
    watch.sign(Sign::Batch, 199 * S);
    assert!(watch.wants_probe(200 * S, EVERY), "after a failure it is asked until one passes");
}

#[test]
fn g07_figures_that_move_keep_it_busy_and_count_from_what_is_proven() {
    let mut watch = ready(0);
    watch.requests(8, 0);
    watch.figures(News::First, 5 * S);
    watch.figures(News::Moved(None), 10 * S);
    assert_eq!(watch.evidence(11 * S).last_figures, Some(Duration::from_secs(6)), "since the reading before");
    watch.figures(News::Moved(Some(Duration::from_secs(2))), 15 * S);
    assert_eq!(watch.evidence(16 * S).last_figures, Some(Duration::from_secs(3)), "by its stamp");
    watch.figures(News::Moved(Some(Duration::from_hours(1))), 20 * S);
    assert_eq!(watch.evidence(20 * S).last_figures, Some(Duration::from_secs(5)), "not by a clock that was set");
    watch.failed();
    assert_eq!(watch.verdict(42 * S, HANG), Verdict::Busy);
    assert_eq!(watch.verdict(43 * S, HANG), Verdict::Suspected(Duration::from_secs(28)));
}

#[test]
fn g06_a_health_of_200_is_not_believed_while_the_figures_stand_still() {
    let mut watch = ready(0);
    watch.requests(1, S);
    watch.sign(Sign::Batch, 2 * S);
    let mut hung = None;
    for second in 3..300 {
        let now = second * S;
        if watch.wants_figures(now, HANG) {
            watch.reads(now);
            let news = if watch.still.is_none() { News::First } else { News::Still };
            watch.figures(news, now);
        }
        if watch.wants_probe(now, EVERY) {
            watch.asked(now);
            watch.passed(now);
        }
        if let Verdict::Hung(_) = watch.verdict(now, HANG) {
            hung = Some(second);
            break;
        }
    }
    assert_eq!(hung, Some(122));
    assert!(watch.probe_lies());
    watch.figures(News::Moved(None), 130 * S);
    assert!(!watch.probe_lies());
}

#[test]
fn g06_a_probe_lies_only_if_it_passed_between_two_readings_that_are_the_same_while_somebody_waits() {
    let lies = |passed, open| {
        let mut watch = ready(0);
        watch.requests(open, S);
        watch.figures(News::First, 10 * S);
        watch.passed(passed * S);
        watch.figures(News::Still, 15 * S);
        watch.probe_lies()
    };
    assert!(lies(12, 1));
    assert!(!lies(12, 0), "an engine without work need not write them anew");
    assert!(!lies(8, 1), "they may have moved with it, before the first reading");
    assert!(!lies(15, 1), "the reading may be older than its answer");
}

#[test]
fn an_honest_probe_is_believed_when_the_figures_have_moved_or_cannot_be_read() {
    let mut watch = ready(0);
    watch.requests(1, S);
    watch.figures(News::First, 10 * S);
    watch.figures(News::Still, 15 * S);
    watch.passed(16 * S);
    assert_eq!(watch.evidence(17 * S).last_probe, None, "the next reading decides");
    watch.figures(News::Moved(None), 20 * S);
    assert_eq!(watch.evidence(21 * S).last_probe, Some(Duration::from_secs(5)));
    watch.passed(50 * S);
    assert_eq!(watch.evidence(51 * S).last_probe, Some(Duration::from_secs(1)), "nobody has read them for long");
    let mut old = ready(0);
    old.requests(1, S);
    old.figures(News::First, 10 * S);
    old.figures(News::Unstamped, 15 * S);
    old.passed(16 * S);
    assert_eq!(old.evidence(17 * S).last_probe, Some(Duration::from_secs(1)), "an engine that stamps nothing");
}

#[test]
fn j05_time_in_which_nobody_looked_is_no_silence() {
    let mut watch = ready(0);
    watch.requests(3, S);
    watch.asked(30 * S);
    watch.stopped(40 * S);
    watch.begin_anew(4000 * S);
    assert_eq!(watch.verdict(4001 * S, HANG), Verdict::Suspected(Duration::from_secs(1)), "still stopped");
    watch.running();
    assert_eq!(watch.verdict(4001 * S, HANG), Verdict::Alive);
}

#[test]
fn looks_are_for_silence_only() {
    let mut watch = ready(0);
    assert!(!watch.wants_look(1000 * S, HANG), "nobody waits");
    watch.requests(1, 1000 * S);
    assert!(!watch.wants_look(1004 * S, HANG));
    assert!(watch.wants_look(1005 * S, HANG));
    watch.looks(1005 * S);
    assert!(!watch.wants_look(1009 * S, HANG));
    assert!(watch.wants_look(1010 * S, HANG));
    assert!(watch.wants_figures(1010 * S, HANG));
    watch.reads(1010 * S);
    assert!(!watch.wants_figures(1011 * S, HANG));
    assert!(watch.wants_figures(1012 * S, HANG));
    watch.sign(Sign::Token, 1009 * S);
    assert!(!watch.wants_look(1012 * S, HANG) && !watch.wants_figures(1012 * S, HANG));
}

#[test]
fn where_a_hang_is_called_one_soon_it_is_looked_soon_enough_to_come_before_the_suspicion() {
    // Suspected after two seconds.
    let hang_after = Duration::from_secs(4);
    let mut watch = ready(0);
    watch.requests(1, 1000 * S);
    assert!(!watch.wants_look(1000 * S + 499, hang_after) && !watch.wants_figures(1000 * S + 499, hang_after));
    let now = 1000 * S + 500;
    assert!(watch.wants_look(now, hang_after) && watch.wants_figures(now, hang_after));
    watch.looks(now);
    watch.reads(now);
    assert!(!watch.wants_look(now + 499, hang_after) && !watch.wants_figures(now + 499, hang_after));
    assert!(watch.wants_look(now + 500, hang_after) && watch.wants_figures(now + 500, hang_after));
}

/// An engine in simulated seconds: what it does next is drawn, what is seen of it goes to the watch.
struct Engine {
    random: u64,
    /// When the batch ends that is being computed.
    batch_until: u64,
    /// Compilers run until then, and nothing else moves.
    compiles_until: u64,
    /// When the scheduler last wrote its figures.
    stamp: u64,
    hangs_at: u64,
    probe_asked: Option<u64>,
    read: Option<u64>,
}

impl Engine {
    fn new(seed: u64, hangs_at: u64) -> Self {
        let random = seed.wrapping_mul(2) + 1;
        Self { random, batch_until: 0, compiles_until: 0, stamp: 0, hangs_at, probe_asked: None, read: None }
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % below
    }

    /// One second of both; the engine is under full load all the time.
    fn second(&mut self, at: u64, watch: &mut Watch) {
        let now = at * S;
        watch.requests(32, now);
        if at < self.hangs_at && at >= self.batch_until.max(self.compiles_until) {
            self.stamp = at;
            match self.draw(100) {
                // A chunk of a long prefill, longer than any probe waits, one after the other for minutes.
                0..=49 => self.batch_until = at + 21 + self.draw(5),
                // A new shape.
                50..=52 => self.compiles_until = at + 30 + self.draw(60),
                _ => {
                    self.batch_until = at + 1;
                    watch.sign(Sign::Token, now);
                }
            }
            // A log level above "info" leaves half of the engines without these.
            if self.random.is_multiple_of(2) {
                watch.sign(Sign::Batch, now);
            }
        }
        if watch.wants_look(now, HANG) {
            watch.looks(now);
            if at < self.compiles_until.min(self.hangs_at) {
                watch.sign(Sign::Kernel, now);
            }
        }
        if watch.wants_figures(now, HANG) {
            watch.reads(now);
            let news = match self.read.replace(self.stamp) {
                None => News::First,
                Some(stamp) if stamp != self.stamp => News::Moved(Some(Duration::from_secs(at - self.stamp))),
                Some(_) => News::Still,
            };
            watch.figures(news, now);
        }
        match self.probe_asked {
            Some(asked) if self.stamp > asked => {
                watch.passed(now);
                self.probe_asked = None;
            }
            Some(asked) if at >= asked + 20 => {
                watch.failed();
                self.probe_asked = None;
            }
            None if watch.wants_probe(now, EVERY) => {
                watch.asked(now);
                self.probe_asked = Some(at);
            }
            _ => {}
        }
    }
}

#[test]
fn g07_ten_minutes_of_prefill_in_chunks_of_25_s_are_busy_with_no_other_sign_than_its_figures() {
    let mut watch = ready(0);
    let mut read = None;
    let mut busy = 0;
    for at in 1..600 {
        let now = at * S;
        watch.requests(32, now);
        let stamp = at / 25 * 25;
        if watch.wants_figures(now, HANG) {
            watch.reads(now);
            let news = match read.replace(stamp) {
                None => News::First,
                Some(before) if before != stamp => News::Moved(Some(Duration::from_secs(at - stamp))),
                Some(_) => News::Still,
            };
            watch.figures(news, now);
        }
        // Under the full load of one request no probe comes through.
        if watch.wants_probe(now, EVERY) {
            watch.asked(now);
        } else if watch.probe.under_way == Asked::Yes && now == watch.probe.asked.unwrap() + 20 * S {
            watch.failed();
        }
        match watch.verdict(now, HANG) {
            Verdict::Busy => busy += 1,
            Verdict::Alive => assert!(at < 60, "{at}"),
            verdict => panic!("{verdict:?} at {at} s"),
        }
    }
    assert!(busy > 540);
}

const DAY: u64 = 24 * 3600;

#[test]
fn g07_a_day_of_long_prefills_and_new_shapes_has_no_false_kill() {
    for seed in 0..6 {
        let (mut engine, mut watch) = (Engine::new(seed, u64::MAX), ready(0));
        let (mut busy, mut suspected) = (0, 0);
        for at in 1..DAY {
            engine.second(at, &mut watch);
            match watch.verdict(at * S, HANG) {
                Verdict::Hung(silence) => panic!("seed {seed}: killed at {at} s, after {silence:?}"),
                Verdict::Suspected(_) => suspected += 1,
                Verdict::Busy => busy += 1,
                Verdict::Alive => {}
            }
        }
        assert!(busy > DAY / 20, "seed {seed}: this day is no hard one: busy for {busy} s");
        assert_eq!(suspected, 0, "seed {seed}: seconds under suspicion");
    }
}

#[test]
fn a_hang_is_suspected_within_thirty_seconds_and_called_one_after_two_minutes() {
    let (mut latest, mut worst) = (0, 0);
    for seed in 0..100 {
        let hangs_at = 600 + seed * 7;
        let (mut engine, mut watch) = (Engine::new(seed, hangs_at), ready(0));
        let (mut suspected, mut hung) = (None, None);
        let mut alive = 0;
        for at in 1..hangs_at + 300 {
            engine.second(at, &mut watch);
            let compiles = at < engine.compiles_until.min(hangs_at);
            alive = engine.stamp.max(if compiles { at } else { alive });
            match watch.verdict(at * S, HANG) {
                Verdict::Suspected(_) if suspected.is_none() => suspected = Some(at),
                Verdict::Hung(_) => {
                    hung = Some(at);
                    break;
                }
                _ => {}
            }
        }
        let (suspected, hung) = (suspected.expect("suspected first"), hung.expect("called a hang"));
        // A look is 5 s old at most.
        assert!(suspected >= alive + 23, "seed {seed}: suspected at {suspected} s, alive at {alive} s");
        latest = latest.max(suspected - alive);
        worst = worst.max(hung - alive);
        assert!(hung > hangs_at, "seed {seed}");
    }
    assert!(latest <= 30, "suspected {latest} s after the last sign of life");
    assert!((115..=125).contains(&worst), "called a hang {worst} s after the last sign of life");
}
