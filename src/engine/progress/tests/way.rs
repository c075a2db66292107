//! How far each word of the log leads on a start that nobody has seen before, and what it is called.

use super::*;

/// What is said after each of these facts: hundredths, and words.
fn told(facts: &[Fact]) -> Vec<(f32, String)> {
    let mut progress = Progress::new(1, None);
    let mut all = Vec::new();
    for (now, fact) in (1..).zip(facts) {
        progress.observe(*fact, None, now);
        all.push((progress.percent().expect("something known was said"), progress.phase(now)));
    }
    all
}

fn percents(facts: &[Fact]) -> Vec<f32> {
    told(facts).into_iter().map(|(percent, _)| percent).collect()
}

#[test]
fn kernels_that_are_compiled_and_tuned_lead_from_the_memory_to_the_graphs() {
    let facts = [
        Fact::LoadEnd { elapsed_ms: 1 },
        Fact::KvPool { tokens: 1 },
        Fact::MemoryPoolEnd,
        Fact::JitCompile { percent: None },
        Fact::JitCompile { percent: Some(50) },
        Fact::AutotuneBegin,
        Fact::AutotuneEnd,
    ];
    let words = [
        (60.0, "allocating the KV cache"),
        (64.5, "allocating the KV cache"),
        (67.5, "allocating the KV cache"),
        (69.0, "compiling kernels"),
        (71.25, "compiling kernels 50 %"),
        (73.5, "tuning kernels"),
        (75.0, "allocating the KV cache"),
    ];
    assert_eq!(told(&facts), words.map(|(percent, phase)| (percent, phase.to_owned())));
}

#[test]
fn each_set_of_graphs_takes_half_of_what_is_left_and_a_bar_without_a_name_is_the_latest_ones() {
    let bar = |of, done| Fact::Capture { of, done, total: 4 };
    let facts = [
        Fact::CaptureBegin(Graphs::Prefill),
        bar(Graphs::Prefill, 2),
        Fact::CaptureEnd(Graphs::Prefill),
        Fact::CaptureBegin(Graphs::Decode),
        bar(Graphs::Unsaid, 2),
        Fact::CaptureEnd(Graphs::Decode),
        Fact::CaptureBegin(Graphs::Draft),
        bar(Graphs::Draft, 4),
    ];
    // Of the 19 hundredths of this stage.
    let parts = [0.0, 0.25, 0.5, 0.5, 0.625, 0.75, 0.75, 0.875];
    assert_eq!(percents(&facts), parts.map(|part| 75.0 + 19.0 * part));
    let unsaid = [bar(Graphs::Unsaid, 2), bar(Graphs::Unsaid, 4)];
    assert_eq!(percents(&unsaid), [79.75, 84.5], "nor need any have one");
}

#[test]
fn a_warm_up_counts_once_the_server_starts_and_not_before() {
    // What is warmed up before is a kernel or a cache.
    let early = [Fact::LoadEnd { elapsed_ms: 1 }, Fact::WarmupDone];
    assert_eq!(percents(&early), [60.0, 60.0]);
    let due = [Fact::SchedulerReady, Fact::EngineTimings, Fact::HttpUp, Fact::WarmupDone, Fact::Ready];
    assert_eq!(percents(&due), [94.0, 95.0, 96.0, 99.0, 100.0], "99 until it is ready");
    assert_eq!(percents(&[Fact::SchedulerReady, Fact::WarmupDone]), [94.0, 99.0], "whatever line was missed");
}

#[test]
fn a_rank_that_says_twice_that_it_loads_loads_no_draft() {
    let mut progress = Progress::new(1, None);
    let first = Rank { tp: Some(0), ..Rank::default() };
    for now in [1, 2] {
        progress.observe(Fact::LoadBegin, Some(first), now);
    }
    progress.observe(Fact::Shards { done: 1, total: 4 }, None, 3);
    assert_eq!(progress.phase(3), "loading weights 1/4");
}

#[test]
fn what_is_read_between_the_last_look_and_the_loads_beginning_is_the_loads() {
    const MIB: u64 = 1 << 20;
    let mut progress = Progress::new(1, None);
    progress.stored(900 * MIB, 0);
    progress.observe(Fact::LoadBegin, None, 1_000);
    progress.stored(960 * MIB, 2_000);
    progress.stored(970 * MIB, 6_000);
    assert!(matches!(progress.slow(), Some(Slow::ColdWeights(_))), "70 MiB are more than code");
}

#[test]
fn a_start_took_as_long_as_until_it_was_first_said_to_be_ready() {
    let ready = |times: &[u64]| {
        let mut progress = Progress::new(1, None);
        progress.observe(Fact::LoadBegin, None, 20_000);
        for now in times {
            progress.ready(*now);
        }
        progress.history()
    };
    // `/ready` says so, and its line is read later.
    assert_eq!(ready(&[80_000, 95_000]), ready(&[80_000]));
}
