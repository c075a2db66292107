//! A start that nobody has seen before: its range, over the real logs and over large models made of numbers.

use super::*;

/// What is known of the machines on which the logs were made. The model is a tiny one.
fn known_of(name: &str) -> Known {
    let (cores, device) = if matches!(name, "cpu" | "tp8") { (2, Device::Cpu) } else { (16, Device::Gpu) };
    Known { weights: Some(300_000), cores: Some(cores), device, kernels: Kernels::Perhaps }
}

/// As a stage begins the range is not wider than five to one, and while it runs not wider than it was then; what is
/// within a minute is of use in any case.
#[derive(Default)]
struct Use(Option<(Stage, u64)>);

impl Use {
    fn has(&mut self, stage: Stage, range: &RangeInclusive<u64>) -> bool {
        let width = range.end() - range.start();
        let of_use = match self.0 {
            Some((of, before)) if of == stage => width <= before + 2,
            _ => {
                self.0 = Some((stage, width));
                *range.end() <= 5 * range.start()
            }
        };
        of_use || width <= 60
    }
}

#[test]
fn a_first_start_has_a_range_that_holds_the_truth_is_of_use_and_gets_narrower() {
    for (log, tp, name) in LOGS {
        for kernels in [Kernels::Perhaps, Kernels::None] {
            let known = Known { kernels, ..known_of(name) };
            let (_, said, total) = lived_knowing(log, tp, None, known, |ms, _| ms);
            let (mut told, mut widest, mut of) = (0, 0, Use::default());
            for (now, said) in &said {
                assert_eq!(said.eta, None, "{name}: nothing tells");
                let Some(range) = &said.range else { continue };
                let truth = (total - now).div_ceil(1000);
                assert!(range.contains(&truth), "{name} at {now} ms, {:?}: {truth} s, said {range:?}", said.stage);
                assert!(range.end() <= &600, "{name} at {now} ms: said {range:?}");
                if said.stage > Stage::Ranks {
                    assert!(of.has(said.stage, range), "{name} at {now} ms, {:?}: {range:?}", said.stage);
                }
                told += 1;
                widest = widest.max(range.end() - range.start());
            }
            assert!(told * 10 >= said.len() * 6, "{name}: a range most of the way ({told} of {})", said.len());
            let (_, last) = said.last().expect("it took a while");
            let last = last.range.as_ref().expect("up to the end");
            assert!(last.end() - last.start() < widest / 2, "{name}: {last:?}");
        }
    }
}

/// A start of a large model on eight GPUs, whose ranks read `bytes` at `rate`; each other part takes `pace`
/// hundredths of what is usual. What was said, each five seconds from the load on, and when it was ready.
fn large(bytes: u64, rate: u64, pace: u64, told: Told) -> (Vec<(u64, Said)>, u64) {
    let usual: [(Fact, u64); 5] = [
        (Fact::ArgsResolved, 30),
        (Fact::DistInitBegin, 35),
        (Fact::DistInitEnd, 4),
        (Fact::LoadBegin, 1),
        (Fact::LoadEnd { elapsed_ms: 1 }, 0),
    ];
    let later: [(Fact, u64); 4] =
        [(Fact::CaptureBegin(Graphs::Decode), 2), (Fact::SchedulerReady, 80), (Fact::HttpUp, 1), (Fact::Ready, 10)];
    let mut progress = Progress::new(1, None);
    progress.know(Known { weights: Some(bytes), cores: Some(64), ..Known::default() });
    let (mut now, mut said) = (0, Vec::new());
    let mut say = |progress: &Progress, now| {
        let range = progress.eta_range_seconds(now);
        said.push((now, Said { stage: progress.stage(), eta: None, range }));
    };
    for (fact, seconds) in usual {
        now += seconds * pace * 10;
        if matches!(fact, Fact::LoadEnd { .. }) {
            let load = bytes * 1000 / rate;
            for at in (0..load).step_by(5000) {
                if told == Told::Reading {
                    progress.stored((3 << 30) + bytes * at / load, now + at);
                }
                say(&progress, now + at);
            }
            now += load;
        }
        progress.observe(fact, None, now);
    }
    for (fact, seconds) in later {
        let until = now + seconds * pace * 10;
        for at in (now..until).step_by(5000) {
            say(&progress, at);
        }
        now = until;
        progress.observe(fact, None, now);
    }
    (said, now)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Nothing,
    Reading,
}

#[test]
fn a_large_model_has_a_range_of_use_as_soon_as_it_is_seen_how_fast_its_weights_come() {
    for (gigabytes, megabytes_a_second) in [(60, 300), (860, 400), (860, 2_000), (860, 12_000), (140, 900)] {
        for pace in [60, 100, 180] {
            let (said, total) = large(gigabytes * 1_000_000_000, megabytes_a_second * 1_000_000, pace, Told::Reading);
            let load = said.iter().position(|(_, said)| said.stage == Stage::Load).expect("it loads");
            // The first look has nothing to compare with, and the second too little time.
            let mut of_use = Use::default();
            for (now, said) in &said[load + 2..] {
                let (range, truth) = (said.range.as_ref().expect("a range"), (total - now).div_ceil(1000));
                let of = format!("{gigabytes} GB at {megabytes_a_second} MB/s, pace {pace}, {now} ms {:?}", said.stage);
                assert!(range.contains(&truth), "{of}: {truth} s, said {range:?}");
                assert!(of_use.has(said.stage, range), "{of}: {range:?}");
            }
        }
    }
}

#[test]
fn what_nobody_measures_has_the_range_of_usual_disks() {
    for rate in [1_100_000_000, 2_000_000_000, 3_800_000_000] {
        let (said, total) = large(860_000_000_000, rate, 100, Told::Nothing);
        for (now, said) in said.iter().filter(|(_, said)| said.range.is_some()) {
            let (range, truth) = (said.range.as_ref().expect("filtered"), (total - now).div_ceil(1000));
            assert!(range.contains(&truth), "{rate} at {now} ms: {truth} s, said {range:?}");
        }
    }
    let mut progress = Progress::new(1, None);
    progress.observe(Fact::LoadBegin, None, 10_000);
    let range = progress.eta_range_seconds(10_000).expect("a range");
    assert!(*range.end() > 2_400, "weights of any size: {range:?}");
}

#[test]
fn reading_ahead_while_it_imports_tells_of_the_load_before_it_begins() {
    let of = |rate: Option<u64>| {
        let mut progress = Progress::new(8, None);
        progress.know(Known { weights: Some(800_000_000_000), cores: Some(64), ..Known::default() });
        progress.observe(Fact::ArgsResolved, None, 20_000);
        for second in (0..20).step_by(4) {
            if let Some(rate) = rate {
                progress.read_ahead(rate * second, 800_000_000_000, 20_000 + second * 1000);
            }
        }
        progress.eta_range_seconds(40_000).expect("a range")
    };
    let (unknown, slow, fast) = (of(None), of(Some(500_000_000)), of(Some(10_000_000_000)));
    assert!(unknown.contains(&400) && *slow.start() > 900 && *fast.end() < *slow.start(), "{slow:?} {fast:?}");
}

#[test]
fn a_bar_that_moved_for_a_while_makes_the_range_narrow() {
    let mut progress = Progress::new(1, None);
    progress.know(Known { weights: Some(400_000_000_000), ..Known::default() });
    progress.observe(Fact::LoadBegin, None, 10_000);
    let wide = progress.eta_range_seconds(10_000).expect("a range");
    progress.observe(Fact::Shards { done: 32, total: 64 }, None, 110_000);
    let narrow = progress.eta_range_seconds(110_000).expect("a range");
    assert!(narrow.end() - narrow.start() < wide.end() - wide.start(), "{wide:?}, {narrow:?}");
    progress.observe(Fact::Shards { done: 60, total: 64 }, None, 200_000);
    let narrower = progress.eta_range_seconds(200_000).expect("a range");
    assert!(narrower.end() < narrow.end(), "{narrower:?}, {narrow:?}");
}

#[test]
fn kernels_that_may_have_to_be_compiled_widen_the_range_until_their_bar_tells() {
    let of = |kernels| {
        let mut progress = Progress::new(1, None);
        progress.know(Known { weights: Some(800_000_000_000), kernels, ..Known::default() });
        progress.observe(Fact::LoadEnd { elapsed_ms: 1 }, None, 100_000);
        progress
    };
    let (perhaps, mut none) = (of(Kernels::Perhaps), of(Kernels::None));
    let end = |progress: &Progress, now| *progress.eta_range_seconds(now).expect("a range").end();
    assert!(end(&perhaps, 100_000) < 400 && end(&none, 100_000) > 1_500);
    none.observe(Fact::JitCompile { percent: None }, None, 110_000);
    let range = none.eta_range_seconds(120_000).expect("a range");
    assert!(*range.start() > 290 && *range.end() > 1_490, "{range:?}");
    none.observe(Fact::JitCompile { percent: Some(50) }, None, 410_000);
    let range = none.eta_range_seconds(410_000).expect("a range");
    assert!(range.contains(&400) && *range.end() <= 5 * range.start(), "half of it took five minutes: {range:?}");
}

#[test]
fn imports_count_from_the_line_that_begins_them_or_from_the_launch_where_there_is_none() {
    let joining = |begun: Option<u64>, joined: u64| {
        let mut progress = Progress::new(1, None);
        if let Some(begun) = begun {
            progress.observe(Fact::ArgsResolved, None, begun);
        }
        progress.observe(Fact::DistInitBegin, None, joined);
        progress.eta_range_seconds(joined).expect("a range")
    };
    assert_eq!(joining(Some(600_000), 635_000), joining(Some(1_000), 36_000), "what was before is not Python's pace");
    assert_eq!(joining(None, 35_000), joining(Some(1_000), 36_000));
    assert!(joining(None, 350_000).end() > joining(None, 35_000).end());
}
