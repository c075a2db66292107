use super::*;

fn fact(line: &str) -> Option<Fact> {
    parse(line.as_bytes()).fact
}

/// The facts of a real log, each as one line; a run of the same words is told once with its count.
fn facts_of(log: &[u8]) -> String {
    let mut told: Vec<(String, usize)> = Vec::new();
    let mut splitter = Splitter::new();
    let mut tell = |line: RawLine<'_>| {
        let line = parse(line.bytes);
        let Some(fact) = line.fact else { return };
        let rank = line.rank.map_or_else(|| "-".to_owned(), |rank| rank.to_string());
        let said = match fact {
            // Sixty bars say no more than their last one.
            Fact::Capture { of, done, total } if done != total => format!("{rank} Capture {of:?} of {total}"),
            Fact::PrefillBatch { .. } => format!("{rank} PrefillBatch"),
            Fact::DecodeBatch { .. } => format!("{rank} DecodeBatch"),
            fact => format!("{rank} {fact:?}"),
        };
        match told.last_mut() {
            Some((last, count)) if *last == said => *count += 1,
            _ => told.push((said, 1)),
        }
    };
    splitter.push(log, &mut tell);
    splitter.finish(&mut tell);
    told.iter()
        .map(|(said, count)| if *count > 1 { format!("{said} ×{count}\n") } else { format!("{said}\n") })
        .collect()
}

#[test]
fn the_real_log_of_0_5_23_on_a_cpu() {
    insta::assert_snapshot!(facts_of(include_bytes!("../../../tests/data/startup-cpu-0.5.23.log")));
}

#[test]
fn the_real_log_of_0_5_23_with_eight_ranks_of_which_one_is_killed() {
    insta::assert_snapshot!(facts_of(include_bytes!("../../../tests/data/startup-tp8-cpu-0.5.23.log")));
}

#[test]
fn the_real_log_of_0_5_15_on_a_gpu() {
    insta::assert_snapshot!(facts_of(include_bytes!("../../../tests/data/startup-gpu-0.5.15.log")));
}

#[test]
fn the_real_log_of_0_5_15_on_a_gpu_with_prefill_graphs() {
    insta::assert_snapshot!(facts_of(include_bytes!("../../../tests/data/startup-default-flags-gpu-0.5.15.log")));
}

#[test]
fn the_rank_and_the_message_are_taken_apart() {
    let line = parse(b"[2026-11-23 14:48:17 DP1 PP0 TP3] Init parallel begin.");
    assert_eq!(line.rank.map(|r| r.to_string()).as_deref(), Some("DP1 PP0 TP3"));
    assert_eq!(&*line.message, b"Init parallel begin.");
    let line = parse(b"[2026-11-23 14:48:17.123 TP7] Load weight begin. avail mem=1 GB");
    assert_eq!((line.rank.map(|r| r.to_string()).as_deref(), line.fact), (Some("TP7"), Some(Fact::LoadBegin)));
    let line = parse(b"[2026-11-23 14:48:43] INFO:     Uvicorn running on http://127.0.0.1:1 (Press CTRL+C to quit)");
    assert_eq!((line.rank, line.level, line.fact), (None, Level::Info, Some(Fact::HttpUp)));
    assert_eq!(line.message.first(), Some(&b'U'));
}

#[test]
fn what_only_looks_like_a_prefix_is_left_alone() {
    for text in ["[rank0]:[W1123 14:13:49] Warning: x", "[2026-11-23 14:48:17", "[2026-11-23 14:48:17 T P]x", "["] {
        assert_eq!(&*parse(text.as_bytes()).message, text.as_bytes());
    }
}

#[test]
fn colours_are_stripped_and_cut_escapes_do_no_harm() {
    let line = parse(b"[2026-11-23 14:10:14] \x1b[1;33m'--disable-cuda-graph' is deprecated\x1b[0m");
    assert_eq!(&*line.message, b"'--disable-cuda-graph' is deprecated");
    for end in [&b"x\x1b"[..], b"x\x1b[", b"x\x1b[1;3", b"x\x1b]0;title", b"x\x1b]0;t\x1b"] {
        assert_eq!(&*parse(end).message, b"x");
    }
}

#[test]
fn i08_the_line_with_the_keys_is_withheld_wherever_it_stands() {
    for text in [
        "[2026-11-23 14:10:28] server_args={'api_key': 'sekret'}",
        "server_args=ServerArgs(api_key='sekret')",
        "\x1b[1mroot: server_args={'admin_api_key': 'sekret'}\x1b[0m CUDA out of memory",
    ] {
        let line = parse(text.as_bytes());
        assert_eq!(line.fact, Some(Fact::ArgsResolved));
        assert!(!String::from_utf8_lossy(&line.message).contains("sekret"));
    }
}

#[test]
fn each_class_of_death_is_known_by_its_words() {
    use Signature::*;
    let table: &[(&str, Signature)] = &[
        ("sglang serve: error: unrecognized arguments: --tp_size 8", BadConfig),
        ("sglang serve: error: ambiguous option: --cuda-graph-bs could match …", BadConfig),
        ("ValueError: Unsupported config option: lora-paths", BadConfig),
        ("AssertionError: served_model_name cannot contain a colon", BadConfig),
        ("ModuleNotFoundError: No module named 'sglang'", BadImage),
        ("/usr/bin/python3: No module named sglang", BadImage),
        ("RuntimeError: Cannot find any model weights with `/m`", Weights),
        ("safetensors_rust.SafetensorError: Error while deserializing header", CorruptWeights),
        ("OSError: [Errno 28] No space left on device", Disk),
        ("OSError: [Errno 5] Input/output error: '/m/a.safetensors'", DiskFails),
        ("safetensors_rust.SafetensorError: Stale file handle (os error 116)", DiskFails),
        ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. x", KvDoesNotFit),
        ("Exception: Capture target decode CUDA graph failed: CUDA out of memory. Tried", CaptureOom),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", GpuOom),
        ("ValueError: The memory capacity is unbalanced. min_per_gpu_memory=1", ForeignGpuMemory),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", CudaError),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", Hardware),
        ("torch.distributed.DistBackendError: NCCL error in: x, ncclSystemError", Nccl),
        (
            "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use",
            Port,
        ),
        ("RuntimeError: Rank 0 scheduler died during initialization (exit code: -9). x", DiedAtInit { status: -9 }),
        ("Scheduler hit an exception: Traceback (most recent call last):", Exception),
        ("Subprocess scheduler_0 (pid=1) crashed with exit code -9. Triggering SIGQUIT for cleanup...", Consequence),
        ("Watchdog: watchdog timeout (self.watchdog_timeout=300, self.soft=False)", Hang),
        ("Initialization failed. warmup error: x", Warmup),
        ("KeyError: 'model.layers.0.mlp'", PythonError),
        ("torch.AcceleratorError: x", PythonError),
    ];
    for (text, signature) in table {
        assert_eq!(fact(text), Some(Fact::Fatal(*signature)), "{text}");
        assert_eq!(parse(text.as_bytes()).level, Level::Error, "{text}");
    }
}

#[test]
fn what_only_sounds_fatal_is_not() {
    for text in [
        "Ignore import error when loading sglang.srt.models.grok: No module named 'cutlass'",
        "flashinfer.comm allreduce_fusion API is not available (No module named 'cuda.tile'), falling back",
        "watchdog timeout (self.watchdog_timeout=300, self.soft=True)",
        "VENV/lib/x.py:53: UserWarning: Only CUDA supports AWQ currently.",
        "Fail to set RLIMIT_NOFILE: current limit exceeds maximum limit",
        "[rank0]:[W1123 14:13:49.470 ProcessGroupNCCL.cpp:1575] Warning: WARNING: destroy_process_group() was not",
    ] {
        assert_eq!(fact(text), None, "{text}");
    }
}

#[test]
fn bars_are_read_and_broken_ones_are_not() {
    let shards = "Multi-thread loading shards:  19% Completed | 12/64 [00:10<00:43,  1.20it/s]";
    assert_eq!(fact(shards), Some(Fact::Shards { done: 12, total: 64 }));
    let older = "Loading safetensors checkpoint shards: 100% Completed | 4/4 [00:01<00:00,  2.40it/s]";
    assert_eq!(fact(older), Some(Fact::Shards { done: 4, total: 4 }));
    let graphs = "Capturing batches (bs=4 avail_mem=29.99 GB):  33%|███▎      | 1/3 [01:09<02:19, 69.84s/it]";
    assert_eq!(fact(graphs), Some(Fact::Capture { of: Graphs::Decode, done: 1, total: 3 }));
    assert_eq!(
        fact("DeepGEMM warmup:  42%|████▏     | 42/100 [00:01<00:01]"),
        Some(Fact::JitCompile { percent: Some(42) })
    );
    for text in ["Multi-thread loading shards: x | 9/0 [", "Multi-thread loading shards: 9/", "Capturing batches (bs=1"]
    {
        assert_eq!(fact(text), None, "{text}");
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_can_be_parsed(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
        let mut prefixed = b"[2026-11-23 14:48:17 TP7".to_vec();
        prefixed.extend_from_slice(&bytes);
        let _ = parse(&prefixed);
        let _ = parse(&bytes);
    }
}
