mod first;
mod way;

use std::fmt::Write;

use super::*;
use crate::engine::log::{self, Splitter};

/// Milliseconds of the day of a line's time stamp.
fn stamp(line: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(line.get(12..20)?).ok()?;
    let mut parts = text.split(':').map(|part| part.parse::<u64>().ok());
    let (h, m, s) = (parts.next()??, parts.next()??, parts.next()??);
    (line.first() == Some(&b'[')).then_some(((h * 60 + m) * 60 + s) * 1000)
}

/// Replays a real log with its own times: each change of phase or percentage, and the end.
fn replay(log: &[u8], tp: u32, past: Option<&History>) -> (String, Progress) {
    let mut progress = Progress::new(tp, past);
    let mut told = String::new();
    let mut before = 0.0f32;
    for (now, fact, rank) in facts(log) {
        let phase = progress.phase(now);
        progress.observe(fact, rank, now);
        let percent = progress.percent().unwrap_or(0.0);
        assert!(percent >= before, "{percent} after {before}");
        assert!(percent < 100.0 || progress.stage() == Stage::Ready);
        before = percent;
        if progress.phase(now) != phase {
            let eta = progress.eta_seconds(now).map_or_else(String::new, |s| format!(", {s} s left"));
            let seconds = now as f64 / 1000.0;
            writeln!(told, "{seconds:5.1} s {percent:5.1} % {}{eta}", progress.phase(now)).expect("a string takes all");
        }
    }
    (told, progress)
}

const CPU: &[u8] = include_bytes!("../../../tests/data/startup-cpu-0.5.23.log");
const TP8: &[u8] = include_bytes!("../../../tests/data/startup-tp8-cpu-0.5.23.log");
const GPU: &[u8] = include_bytes!("../../../tests/data/startup-gpu-0.5.15.log");
const GRAPHS: &[u8] = include_bytes!("../../../tests/data/startup-default-flags-gpu-0.5.15.log");

#[test]
fn every_real_start_goes_forward_only_and_ends_at_100() {
    for (log, tp) in [(CPU, 1), (TP8, 8), (GPU, 1), (GRAPHS, 1)] {
        let (_, progress) = replay(log, tp, None);
        assert_eq!((progress.stage(), progress.percent()), (Stage::Ready, Some(100.0)));
    }
}

#[test]
fn a_start_of_0_5_23_in_words() {
    insta::assert_snapshot!(replay(CPU, 1, None).0);
}

#[test]
fn a_start_of_eight_ranks_in_words() {
    insta::assert_snapshot!(replay(TP8, 8, None).0);
}

#[test]
fn a_start_with_graphs_in_words_and_the_next_one_with_its_time() {
    let (words, progress) = replay(GRAPHS, 1, None);
    let history = progress.history().expect("it became ready");
    let (again, second) = replay(GRAPHS, 1, Some(&history));
    assert_eq!(second.percent(), Some(100.0));
    insta::assert_snapshot!(format!("{words}\n{again}"));
}

#[test]
fn history_survives_being_written_and_read() {
    let (_, progress) = replay(GRAPHS, 1, None);
    let history = progress.history().expect("it became ready");
    let text = serde_json::to_string(&history).expect("writes");
    assert_eq!(serde_json::from_str::<History>(&text).expect("reads"), history);
    assert_eq!(Progress::new(1, None).history(), None);
}

#[test]
fn a_version_that_says_nothing_known_is_loading_and_no_more() {
    let mut progress = Progress::new(8, None);
    for text in ["Weights are being read", "Stage 3 of 7", "INFO: hello"] {
        assert_eq!(log::parse(text.as_bytes()).fact, None);
    }
    assert_eq!((progress.phase(0).as_str(), progress.percent()), ("importing", None));
    assert_eq!((progress.phase(600_000).as_str(), progress.percent()), ("loading", None));
    assert_eq!(progress.eta_seconds(600_000), None);
    progress.ready(700_000);
    assert_eq!((progress.phase(700_000).as_str(), progress.percent()), ("ready", Some(100.0)));
}

#[test]
fn the_slowest_rank_counts_and_a_draft_model_does_not_lead_back() {
    let tp = |n| Some(Rank { tp: Some(n), ..Rank::default() });
    let mut progress = Progress::new(2, None);
    progress.observe(Fact::ArgsResolved, None, 1000);
    progress.observe(Fact::DistInitBegin, tp(0), 2000);
    assert_eq!(progress.phase(2000), "starting the ranks 1/2");
    progress.observe(Fact::DistInitBegin, tp(1), 2000);
    progress.observe(Fact::DistInitEnd, tp(0), 3000);
    progress.observe(Fact::LoadBegin, tp(0), 3000);
    assert_eq!(progress.phase(3000), "joining the ranks");
    progress.observe(Fact::LoadBegin, tp(1), 3000);
    progress.observe(Fact::Shards { done: 12, total: 64 }, None, 4000);
    assert_eq!(progress.phase(4000), "loading weights 12/64");
    progress.observe(Fact::LoadEnd { elapsed_ms: 1 }, tp(0), 5000);
    assert_eq!(progress.stage(), Stage::Load);
    progress.observe(Fact::LoadEnd { elapsed_ms: 1 }, tp(1), 6000);
    assert_eq!(progress.stage(), Stage::Pool);
    let before = progress.percent();
    progress.observe(Fact::LoadBegin, tp(0), 7000);
    progress.observe(Fact::Shards { done: 1, total: 2 }, None, 7000);
    assert_eq!((progress.phase(7000).as_str(), progress.percent()), ("loading draft weights 1/2", before));
}

/// Each fact of a real start with its time, the last of them that it is ready.
fn facts(log: &[u8]) -> Vec<(u64, Fact, Option<Rank>)> {
    let (mut out, mut begun, mut now) = (Vec::new(), None, 0);
    // A bar's own clock tells more than the stamp of the line before it: `1/58 [01:01<`.
    let mut bar = (0, 0);
    let mut see = |raw: log::RawLine<'_>| {
        if let Some(at) = stamp(raw.bytes) {
            now = at - *begun.get_or_insert(at);
            bar = (now, 0);
        } else if let Some(elapsed) = bar_clock(raw.bytes) {
            bar.1 = elapsed;
            now = now.max(bar.0 + bar.1);
        }
        let line = log::parse(raw.bytes);
        out.extend(line.fact.map(|fact| (now, fact, line.rank)));
    };
    let mut splitter = Splitter::new();
    splitter.push(log, &mut see);
    splitter.finish(&mut see);
    let ready = out.iter().position(|(_, fact, _)| *fact == Fact::Ready).expect("it became ready");
    out.truncate(ready + 1);
    out
}

/// The milliseconds in ` [01:01<58:24, …`.
fn bar_clock(line: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(line).ok()?;
    let (clock, _) = text.rsplit_once(" [")?.1.split_once('<')?;
    let (minutes, seconds) = clock.split_once(':')?;
    Some((minutes.parse::<u64>().ok()? * 60 + seconds.parse::<u64>().ok()?) * 1000)
}

/// Lives through a start whose every moment is told by `warp`, looks each half second, and gives the moments
/// with what was said of the rest.
fn lived(
    log: &[u8],
    tp: u32,
    past: Option<&History>,
    warp: impl Fn(u64, Stage) -> u64,
) -> (Progress, Vec<(u64, Said)>, u64) {
    lived_knowing(log, tp, past, Known::default(), warp)
}

fn lived_knowing(
    log: &[u8],
    tp: u32,
    past: Option<&History>,
    known: Known,
    warp: impl Fn(u64, Stage) -> u64,
) -> (Progress, Vec<(u64, Said)>, u64) {
    let mut progress = Progress::new(tp, past);
    progress.know(known);
    let (mut said, mut now) = (Vec::new(), 0);
    let (mut before, mut was) = (0, 0);
    let mut percent = 0.0;
    for (at, fact, rank) in facts(log) {
        let then = was + warp(at - before, progress.stage());
        (before, was) = (at, then);
        while now < then {
            let range = progress.eta_range_seconds(now);
            said.push((now, Said { stage: progress.stage(), eta: progress.eta_seconds(now), range }));
            now += 500;
        }
        progress.observe(fact, rank, then);
        let told = progress.percent().unwrap_or(0.0);
        assert!(told >= percent, "{told} after {percent}");
        percent = told;
    }
    (progress, said, was)
}

struct Said {
    stage: Stage,
    eta: Option<u64>,
    range: Option<RangeInclusive<u64>>,
}

const LOGS: [(&[u8], u32, &str); 4] = [(CPU, 1, "cpu"), (TP8, 8, "tp8"), (GPU, 1, "gpu"), (GRAPHS, 1, "graphs")];

/// The furthest that what was said lay from the truth, from 30 % of the way on: of the moment of arrival, in
/// hundredths of the whole start; of the time left, in hundredths of it (a second or two are rounding).
fn furthest(said: &[(u64, Said)], total: u64) -> (f64, f64) {
    let (mut arrival, mut left) = (0.0f64, 0.0f64);
    for (now, said) in said.iter().filter(|(now, _)| now * 10 >= total * 3) {
        let told = said.eta.expect("an earlier start tells") as f64 * 1000.0;
        let truth = (total - now) as f64;
        let off = (told - truth).abs();
        arrival = arrival.max(off / total as f64 * 100.0);
        left = left.max((off - 2000.0).max(0.0) / truth * 100.0);
    }
    (arrival, left)
}

#[test]
fn a_second_start_like_the_first_has_its_time_within_a_fifth_to_the_end() {
    for (log, tp, name) in LOGS {
        let (first, ..) = lived(log, tp, None, |ms, _| ms);
        let history = first.history().expect("it became ready");
        let (_, said, total) = lived(log, tp, Some(&history), |ms, _| ms);
        let (arrival, left) = furthest(&said, total);
        assert!(arrival <= 5.0 && left <= 20.0, "{name}: {arrival:.1} % of the start, {left:.1} % of the rest");
    }
}

#[test]
fn a_second_start_that_is_quicker_or_slower_arrives_within_a_fifth_of_what_was_said() {
    for (log, tp, name) in LOGS {
        let (first, ..) = lived(log, tp, None, |ms, _| ms);
        let history = first.history().expect("it became ready");
        for pace in [70u64, 80, 90, 110, 120, 130, 150] {
            let (_, said, total) = lived(log, tp, Some(&history), |ms, _| ms * pace / 100);
            let (arrival, _) = furthest(&said, total);
            assert!(arrival <= 20.0, "{name} at {pace} %: off by {arrival:.1} % of the start");
        }
    }
}

#[test]
fn stages_that_each_go_their_own_pace_still_arrive_within_a_fifth() {
    for (log, tp, name) in LOGS {
        let (first, ..) = lived(log, tp, None, |ms, _| ms);
        let history = first.history().expect("it became ready");
        for seed in 0..40u64 {
            // 90 to 110 %, another one for each stage.
            let pace = |stage: Stage| 90 + (seed * 37 + stage as u64 * 61 + seed * stage as u64 * 13) % 21;
            let (_, said, total) = lived(log, tp, Some(&history), |ms, stage| ms * pace(stage) / 100);
            let (arrival, _) = furthest(&said, total);
            assert!(arrival <= 20.0, "{name}, seed {seed}: off by {arrival:.1} % of the start");
        }
    }
}

#[test]
fn imports_from_a_warm_disk_do_not_promise_quick_graphs() {
    let (first, ..) = lived(GRAPHS, 1, None, |ms, _| ms);
    let history = first.history().expect("it became ready");
    let warm = |ms, stage| if stage <= Stage::Join { ms / 4 } else { ms };
    let (_, said, total) = lived(GRAPHS, 1, Some(&history), warm);
    let (arrival, _) = furthest(&said, total);
    assert!(arrival <= 20.0, "off by {arrival:.1} % of the start");
}

#[test]
fn why_it_is_slow_is_said_where_it_is_known() {
    let mut progress = Progress::new(1, None);
    progress.observe(Fact::LoadEnd { elapsed_ms: 1 }, None, 1000);
    assert_eq!(progress.slow(), None);
    progress.observe(Fact::JitCompile { percent: Some(3) }, None, 2000);
    assert!(progress.slow().is_some_and(|why| why.to_string().contains("DeepGEMM")));
    progress.observe(Fact::AutotuneBegin, None, 3000);
    assert!(progress.slow().is_some_and(|why| why.to_string().contains("FlashInfer")));
    progress.observe(Fact::AutotuneEnd, None, 4000);
    assert_eq!(progress.slow(), None);
    progress.observe(Fact::JitCompile { percent: None }, None, 5000);
    progress.observe(Fact::CaptureBegin(Graphs::Decode), None, 6000);
    assert_eq!(progress.slow(), None, "over by then");
}

#[test]
fn weights_that_come_from_the_disk_are_said_while_they_do() {
    let mut progress = Progress::new(1, None);
    for second in 0..30 {
        progress.stored(second * 500_000_000, second * 1000);
        assert_eq!(progress.slow(), None, "imports read from the disk, too");
    }
    progress.observe(Fact::LoadBegin, None, 30_000);
    for second in 30..40 {
        progress.stored(second * 500_000_000, second * 1000);
    }
    let said = progress.slow().expect("it is slow, and known why").to_string();
    assert_eq!(said, "the weights are not in the page cache: they come from the disk at 0.50 GB/s");
    progress.observe(Fact::LoadEnd { elapsed_ms: 1 }, None, 41_000);
    assert_eq!(progress.slow(), None);
}

/// A start of two steps: 20 s of imports and what else comes before the work, and 60 s of load.
fn short_history() -> History {
    let mut first = Progress::new(1, None);
    first.observe(Fact::LoadBegin, None, 20_000);
    first.ready(80_000);
    first.history().expect("it became ready")
}

#[test]
fn a_start_that_takes_much_longer_than_the_last_one_has_no_time_but_a_range() {
    let past = short_history();
    let mut progress = Progress::new(1, Some(&past));
    assert_eq!(progress.eta_seconds(5_000), Some(75));
    assert!(progress.eta_seconds(30_000).is_some_and(|s| (60..=76).contains(&s)), "late, and later a little late");
    assert_eq!(progress.eta_seconds(51_000), None);
    progress.observe(Fact::ArgsResolved, None, 52_000);
    assert_eq!(progress.eta_range_seconds(52_000), None, "it speaks: it goes on as the last one did");
    assert!(progress.eta_seconds(52_000).is_some());
    assert!(progress.eta_range_seconds(103_000).is_some());
}

#[test]
fn no_earlier_start_is_one_that_ended_at_once_or_never() {
    let mut progress = Progress::new(1, None);
    progress.observe(Fact::LoadBegin, None, 20_000);
    assert_eq!(progress.history(), None);
    let mut progress = Progress::new(1, None);
    progress.ready(0);
    assert_eq!(progress.history(), None);
}

proptest::proptest! {
    #[test]
    fn no_order_of_facts_leads_back(order in proptest::collection::vec((0usize..19, 0u16..8, 0u32..5), 0..80)) {
        let mut progress = Progress::new(8, None);
        let mut before = 0.0;
        for (n, (which, rank, done)) in order.into_iter().enumerate() {
            let fact = [
                Fact::ArgsResolved, Fact::DistInitBegin, Fact::DistInitEnd, Fact::LoadBegin,
                Fact::Shards { done, total: 4 }, Fact::LoadEnd { elapsed_ms: 1 }, Fact::KvPool { tokens: 1 },
                Fact::MemoryPoolEnd, Fact::JitCompile { percent: Some(9) }, Fact::AutotuneBegin, Fact::AutotuneEnd,
                Fact::CaptureBegin(Graphs::Decode), Fact::Capture { of: Graphs::Unsaid, done, total: 4 },
                Fact::CaptureEnd(Graphs::Draft), Fact::SchedulerReady, Fact::EngineTimings, Fact::HttpUp,
                Fact::WarmupDone, Fact::Ready,
            ][which];
            progress.observe(fact, Some(Rank { tp: Some(rank), ..Rank::default() }), n as u64);
            let now = progress.percent().unwrap_or(0.0);
            proptest::prop_assert!(now >= before && now <= 100.0);
            before = now;
        }
    }
}
