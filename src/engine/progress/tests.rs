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
    let (mut begun, mut now) = (None, 0);
    let mut before = 0.0f32;
    let mut see = |raw: log::RawLine<'_>| {
        if let Some(at) = stamp(raw.bytes) {
            now = at - *begun.get_or_insert(at);
        }
        let line = log::parse(raw.bytes);
        let Some(fact) = line.fact else { return };
        if progress.stage() == Stage::Ready {
            return;
        }
        let phase = progress.phase(now);
        progress.observe(fact, line.rank, now);
        let percent = progress.percent().unwrap_or(0.0);
        assert!(percent >= before, "{percent} after {before}");
        assert!(percent < 100.0 || progress.stage() == Stage::Ready);
        before = percent;
        if progress.phase(now) != phase {
            let eta = progress.eta_seconds(now).map_or_else(String::new, |s| format!(", {s} s left"));
            let seconds = now as f64 / 1000.0;
            writeln!(told, "{seconds:5.1} s {percent:5.1} % {}{eta}", progress.phase(now)).expect("a string takes all");
        }
    };
    let mut splitter = Splitter::new();
    splitter.push(log, &mut see);
    splitter.finish(&mut see);
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
    let history = History::from_progress(&progress).expect("it became ready");
    let (again, second) = replay(GRAPHS, 1, Some(&history));
    assert_eq!(second.percent(), Some(100.0));
    insta::assert_snapshot!(format!("{words}\n{again}"));
}

#[test]
fn history_survives_being_written_and_read() {
    let (_, progress) = replay(GRAPHS, 1, None);
    let history = History::from_progress(&progress).expect("it became ready");
    let text = serde_json::to_string(&history).expect("writes");
    assert_eq!(serde_json::from_str::<History>(&text).expect("reads"), history);
    assert_eq!(History::from_progress(&Progress::new(1, None)), None);
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

#[test]
fn a_start_that_takes_much_longer_than_the_last_one_has_no_time() {
    let past = History { stages_ms: BTreeMap::from([(Stage::Import, 20_000), (Stage::Load, 60_000)]) };
    let progress = Progress::new(1, Some(&past));
    assert_eq!(progress.eta_seconds(5_000), Some(75));
    assert_eq!(progress.eta_seconds(30_000), Some(60));
    assert_eq!(progress.eta_seconds(51_000), None);
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
