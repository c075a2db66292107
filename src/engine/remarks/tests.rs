use super::*;
use crate::engine::log::{Splitter, parse};

/// Takes in a whole log, as the engine wrote it.
fn read(log: &[u8]) -> Figures {
    let mut figures = Figures::default();
    let mut splitter = Splitter::new();
    let mut take = |line: crate::engine::log::RawLine<'_>| {
        let line = parse(line.bytes);
        if let Some(fact) = line.fact {
            figures.observe(fact, &line.message);
        }
    };
    splitter.push(log, &mut take);
    splitter.finish(&mut take);
    figures
}

fn kinds(figures: &Figures, expected: &Expected) -> Vec<Kind> {
    figures.remarks(expected).iter().map(|remark| remark.kind).collect()
}

fn eagle() -> Expected {
    Expected { speculation: Some("EAGLE".into()), prefix_cache: PrefixCache::On }
}

/// The wording of 0.5.23 on a GPU (`metrics_reporter.py`), and of 0.5.15 with a stop in place of the comma.
fn decode(accepted: &str) -> String {
    format!(
        "[2026-11-23 14:11:37 TP0] Decode batch, #running-req: 4, #full token: 20224, full token usage: 0.00, \
         #swa token: 14976, swa token usage: 0.05, accept len: {accepted}, accept rate: 0.24, cuda graph: True, \
         gen throughput (token/s): 122.47, #queue-req: 0\n"
    )
}

#[test]
fn draft_tokens_that_are_never_taken_are_said_under_load_and_only_then() {
    let idle = read(decode("1.00").repeat(24).as_bytes());
    let remarks = idle.remarks(&eagle());
    assert_eq!(remarks.len(), 1, "{remarks:?}");
    assert_eq!(remarks[0].kind, Kind::SpeculationIdle);
    assert!(remarks[0].sentence.contains("EAGLE") && remarks[0].sentence.contains("1.00"), "{remarks:?}");
    assert_eq!(kinds(&idle, &Expected::default()), [], "nobody asked for it");
    assert_eq!(kinds(&read(decode("1.00").repeat(23).as_bytes()), &eagle()), [], "too little to tell");
    assert_eq!(kinds(&read(decode("2.69").repeat(99).as_bytes()), &eagle()), []);
    let recovered = decode("1.00").repeat(99) + &decode("1.80").repeat(10);
    assert_eq!(kinds(&read(recovered.as_bytes()), &eagle()), [], "a remark goes when it is no longer true");
    let older = decode("1.04").replace("Decode batch,", "Decode batch.").repeat(30);
    assert_eq!(kinds(&read(older.as_bytes()), &eagle()), [Kind::SpeculationIdle]);
}

#[test]
fn speculation_that_was_asked_for_and_is_not_there_at_all_is_said_too() {
    // A real log of an engine without it: 38 decode lines, none with an accept length.
    let log = include_bytes!("../../../tests/data/startup-cpu-0.5.23.log");
    assert_eq!(kinds(&read(log), &eagle()), [Kind::SpeculationIdle]);
    assert_eq!(kinds(&read(log), &Expected::default()), []);
}

#[test]
fn real_starts_are_without_remark() {
    for log in [
        &include_bytes!("../../../tests/data/startup-cpu-0.5.23.log")[..],
        include_bytes!("../../../tests/data/startup-tp8-cpu-0.5.23.log"),
        include_bytes!("../../../tests/data/startup-gpu-0.5.15.log"),
        include_bytes!("../../../tests/data/startup-default-flags-gpu-0.5.15.log"),
    ] {
        let figures = read(log);
        assert!(figures.kv.is_some(), "the line with the KV cache's size is known");
        assert_eq!(kinds(&figures, &Expected::default()), []);
    }
}

fn scheduler(tokens: u64, requests: u64) -> String {
    format!(
        "[2026-11-23 14:48:43 TP0] max_total_num_tokens={tokens}, chunked_prefill_size=4096, \
         max_prefill_tokens=16384, max_running_requests={requests}, context_len=32768, available_gpu_mem=1.60 GB\n"
    )
}

#[test]
fn a_memory_fraction_that_leaves_no_room_for_the_kv_cache_is_said() {
    let told = |tokens, requests| read(scheduler(tokens, requests).as_bytes()).remarks(&Expected::default());
    assert_eq!(told(65_536, 32), []);
    let small = told(20_000, 32);
    assert_eq!(small[0].kind, Kind::KvCacheSmall);
    assert!(small[0].sentence.contains("20000 tokens, 625 for each of 32 requests"), "{small:?}");
    assert!(told(3_000, 1)[0].sentence.contains("one chunk of a prompt (4096)"));
    assert_eq!(told(65_536, 4096), [], "the engine's own default of requests promises nothing");
}

fn prefill(new: u64, cached: u64) -> String {
    format!(
        "[2026-11-23 14:11:34] Prefill batch, #new-seq: 1, #new-token: {new}, #cached-token: {cached}, \
         token usage: 0.00, #running-req: 0, #queue-req: 0, #pending-token: 0, cuda graph: False, \
         input throughput (token/s): 12.88\n"
    )
}

#[test]
fn a_prefix_cache_that_never_hits_is_said_where_one_is_expected() {
    let missed = prefill(2048, 0).repeat(256);
    assert_eq!(kinds(&read(missed.as_bytes()), &Expected::default()), [Kind::PrefixCacheIdle]);
    let off = Expected { prefix_cache: PrefixCache::Off, ..Expected::default() };
    assert_eq!(kinds(&read(missed.as_bytes()), &off), []);
    assert_eq!(kinds(&read(prefill(2048, 0).repeat(255).as_bytes()), &Expected::default()), [], "too few");
    assert_eq!(kinds(&read(prefill(100, 0).repeat(999).as_bytes()), &Expected::default()), [], "too short");
    let probed = prefill(2048, 0).repeat(255) + &prefill(1, 0).repeat(10);
    assert_eq!(kinds(&read(probed.as_bytes()), &Expected::default()), [], "probes are no prompts");
    let hit = missed + &prefill(12, 64);
    assert_eq!(kinds(&read(hit.as_bytes()), &Expected::default()), []);
}

#[test]
fn what_is_expected_is_read_from_the_flags_wherever_they_stand() {
    let flags = |yaml: &[(&str, YamlValue)], argv: &[&str]| Resolved {
        yaml: yaml.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect(),
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        warnings: Vec::new(),
        load_format: None,
        extra_repos: Vec::new(),
        log_level: "info".into(),
    };
    let word = |word: &str| YamlValue::Word(word.to_owned());
    assert_eq!(Expected::of(&flags(&[], &[])), Expected::default());
    assert_eq!(Expected::of(&flags(&[("speculative-algorithm", word("EAGLE"))], &[])), eagle());
    assert_eq!(Expected::of(&flags(&[], &["--speculative-algorithm", "EAGLE"])), eagle());
    assert_eq!(Expected::of(&flags(&[], &["--x", "--speculative-algorithm=EAGLE"])), eagle());
    assert_eq!(Expected::of(&flags(&[("speculative-algorithm", word("none"))], &[])), Expected::default());
    let off = Expected::of(&flags(&[("disable-radix-cache", YamlValue::True)], &[]));
    assert_eq!(off.prefix_cache, PrefixCache::Off);
}
