use nix::libc::{SIGKILL, SIGSEGV, SIGTERM};

use super::*;
use crate::engine::log::{self, Fact, Splitter};

/// The verdict on a log as the supervisor would have it: signatures of all lines, the last 200 kept.
fn verdict_of(log: &[u8], how: How, reached: Reached, oom_kill: Option<bool>) -> Cause {
    let mut signatures = Vec::new();
    let mut tail: Vec<Vec<u8>> = Vec::new();
    let mut splitter = Splitter::new();
    let mut see = |raw: log::RawLine<'_>| {
        let line = log::parse(raw.bytes);
        if let Some(Fact::Fatal(signature)) = line.fact {
            signatures.push(signature);
        }
        tail.push(line.message.into_owned());
    };
    splitter.push(log, &mut see);
    splitter.finish(&mut see);
    let tail = &tail[tail.len().saturating_sub(200)..];
    classify(&Evidence { oom_kill, ..seen(how, reached, tail, &signatures) })
}

/// What is known where the machine says nothing.
fn seen<'a>(how: How, reached: Reached, tail: &'a [Vec<u8>], signatures: &'a [Signature]) -> Evidence<'a, Vec<u8>> {
    Evidence { how, reached, tail, signatures, oom_kill: None, hardware: None, gpu_fault: None }
}

fn verdict(log: &str, how: How, reached: Reached) -> Cause {
    verdict_of(log.as_bytes(), how, reached, None)
}

#[test]
fn g01_flags_and_images_are_not_tried_again() {
    let cause = verdict(
        "usage: sglang serve\nsglang serve: error: unrecognized arguments: --x 1\n",
        How::Exited(2),
        Reached::Nothing,
    );
    assert_eq!((cause.class, cause.retry, cause.exit), (Class::BadConfig, Retry::Never, ExitRow::Engine));
    assert!(cause.sentence.contains("unrecognized arguments: --x 1"), "{}", cause.sentence);
    let cause = verdict(
        "Traceback (most recent call last):\n  File \"x\"\nModuleNotFoundError: No module named 'sglang'\n",
        How::Exited(1),
        Reached::Nothing,
    );
    assert_eq!((cause.class, cause.retry), (Class::BadImage, Retry::Never));
    assert_eq!(
        cause.sentence,
        "The engine's Python environment is incomplete: ModuleNotFoundError: No module named 'sglang'."
    );
    assert_eq!(verdict("", How::Exited(127), Reached::Nothing).class, Class::BadImage);
    assert_eq!(verdict("", How::Exited(2), Reached::Nothing).class, Class::BadConfig);
}

#[test]
fn an_image_that_lacks_what_the_model_needs_is_named_after_the_load_too() {
    let log = "[2026-11-24 02:10:14] ERROR:    Traceback (most recent call last):\n  File \"x\"\n    import deepseek_recipe\n\
               ModuleNotFoundError: No module named 'deepseek_recipe'\n\n\
               The above exception was the direct cause of the following exception:\n\n\
               Traceback (most recent call last):\n  File \"x\"\n\
               ImportError: Serving DeepSeek-V4 / V4.1 requires the `deepseek-recipe` package.\n\n\
               [2026-11-24 02:10:14] ERROR:    Application startup failed. Exiting.\n";
    let cause = verdict(log, How::Exited(3), Reached::Loaded);
    assert_eq!((cause.class, cause.retry), (Class::BadImage, Retry::Never), "{}", cause.sentence);
    assert!(cause.sentence.contains("deepseek_recipe"), "{}", cause.sentence);
    let cause = verdict("ERROR:    Application startup failed. Exiting.\n", How::Exited(3), Reached::Loaded);
    assert_eq!(cause.class, Class::Crash, "no port was in the way");
}

#[test]
fn weights_that_lack_or_are_corrupt_end_with_66() {
    let log = "[2026-11-23 14:10:14 TP3] Scheduler hit an exception: Traceback (most recent call last):\n  File \"x\"\n\
               safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge\n\n\
               [2026-11-23 14:10:14] Received sigquit from a child process. It usually means the child failed.\n";
    let cause = verdict(log, How::Signaled(SIGKILL), Reached::Loading);
    assert_eq!((cause.class, cause.retry, cause.exit), (Class::CorruptWeights, Retry::Never, ExitRow::Weights));
    assert!(cause.sentence.contains("HeaderTooLarge"), "{}", cause.sentence);
    let cause = verdict(
        "OSError: Repo id must be in the form 'repo_name': '/nonexistent'.\n",
        How::Exited(1),
        Reached::Nothing,
    );
    assert_eq!((cause.class, cause.exit), (Class::Weights, ExitRow::Weights));
    let log = "Traceback (most recent call last):\n  File \"qwen2.py\", line 1, in load_weights\nKeyError: 'model.x'\n";
    assert_eq!(verdict(log, How::Signaled(SIGKILL), Reached::Loading).class, Class::CorruptWeights);
}

#[test]
fn h16_a_disk_that_fails_is_named_and_not_the_engine_nor_the_file() {
    for words in
        ["OSError: [Errno 5] Input/output error", "safetensors_rust.SafetensorError: Stale file handle (os error 116)"]
    {
        let log = format!(
            "[2026-11-23 14:10:14 TP3] Scheduler hit an exception: Traceback (most recent call last):\n  File \"x\"\n{words}\n\n"
        );
        let cause = verdict(&log, How::Signaled(SIGKILL), Reached::Loading);
        assert_eq!((cause.class, cause.retry), (Class::DiskFails, Retry::Once), "{}", cause.sentence);
        assert_eq!(cause.sentence, format!("The disk failed, not the engine: {words}."));
        assert!(cause.advice.contains("network mount"), "{}", cause.advice);
    }
}

#[test]
fn a_cause_is_believed_before_what_it_brings_about() {
    let log = "[2026-11-23 14:10:14 TP1] Scheduler hit an exception: Traceback (most recent call last):\n  x\n\
               torch.distributed.DistBackendError: NCCL error in: x.cpp:1, ncclSystemError\n\
               [2026-11-23 14:10:14 TP0] Scheduler hit an exception: Traceback (most recent call last):\n  x\n\
               torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n\
               [2026-11-23 14:10:15] Subprocess scheduler_0 (pid=7) crashed with exit code 1. Triggering SIGQUIT for cleanup...\n";
    let cause = verdict(log, How::Signaled(SIGKILL), Reached::Ready);
    assert_eq!((cause.class, cause.retry), (Class::GpuOom, Retry::Backoff));
    assert!(cause.sentence.contains("CUDA out of memory"), "{}", cause.sentence);
    assert_eq!(verdict(log, How::Signaled(SIGKILL), Reached::Loading).retry, Retry::Once);
}

#[test]
fn out_of_memory_in_a_capture_is_not_any_out_of_memory() {
    let log = "Exception: Capture target decode CUDA graph failed: CUDA out of memory. Tried to allocate\nPossible solutions:\n";
    assert_eq!(verdict(log, How::Signaled(SIGKILL), Reached::Loaded).class, Class::CaptureOom);
}

#[test]
fn g09_the_kernels_oom_killer_is_named() {
    let killed = "[2026-11-23 14:10:14] Subprocess scheduler_0 (pid=7) crashed with exit code -9. Triggering\n";
    let cause = verdict_of(killed.as_bytes(), How::Signaled(SIGKILL), Reached::Ready, Some(true));
    assert_eq!((cause.class, cause.retry), (Class::HostOom, Retry::Backoff));
    let at_init = "RuntimeError: Rank 0 scheduler died during initialization (exit code: -9). If exit code is -9\n";
    assert_eq!(verdict(at_init, How::Exited(1), Reached::Loading).class, Class::HostOom);
    assert_eq!(verdict_of(at_init.as_bytes(), How::Exited(1), Reached::Loading, Some(false)).class, Class::Crash);
}

#[test]
fn what_the_driver_reports_of_a_gpu_is_believed_before_what_the_engine_makes_of_it() {
    let tail = [b"RuntimeError: NCCL error: unhandled system error".to_vec()];
    let signatures = [Signature::Nccl];
    let seen = seen(How::Signaled(SIGKILL), Reached::Ready, &tail, &signatures);
    let lost = "Xid 79 (GPU has fallen off the bus) on GPU-1";
    let cause = classify(&Evidence { hardware: Some(lost), ..seen.clone() });
    assert_eq!((cause.class, cause.retry), (Class::Hardware, Retry::Never));
    assert_eq!(cause.sentence, format!("A GPU is broken or not usable: {lost}."));
    assert_eq!(cause.class, classify(&Evidence { hardware: Some(lost), how: How::Hung, ..seen.clone() }).class);
    // A program's own error is known better by the program, where it says anything.
    let fault = Some("Xid 31 (memory page fault) on GPU-1");
    assert_eq!(classify(&Evidence { gpu_fault: fault, ..seen.clone() }).class, Class::Nccl);
    let silent = Evidence { gpu_fault: fault, signatures: &[], tail: &[], ..seen };
    assert_eq!(classify(&silent).sentence, "A CUDA kernel failed: Xid 31 (memory page fault) on GPU-1.");
}

#[test]
fn a_killed_rank_is_told_by_the_line_that_saw_it() {
    let log = "[2026-11-23 14:10:14] Subprocess scheduler_0 (pid=7) crashed with exit code -9. Triggering SIGQUIT for cleanup...\n";
    let cause = verdict(log, How::Signaled(SIGKILL), Reached::Ready);
    assert_eq!((cause.class, cause.retry, cause.exit), (Class::Crash, Retry::Backoff, ExitRow::CrashLoop));
    assert_eq!(cause.sentence, "The engine crashed: Subprocess scheduler_0 (pid=7) crashed with exit code -9.");
}

#[test]
fn the_real_death_of_eight_ranks_is_a_crash_with_the_first_ones_words() {
    let log = include_bytes!("../../../tests/data/startup-tp8-cpu-0.5.23.log");
    let cause = verdict_of(log, How::Signaled(SIGKILL), Reached::Ready, Some(false));
    assert_eq!((cause.class, cause.retry), (Class::Crash, Retry::Backoff));
}

#[test]
fn what_was_ended_from_outside_is_not_the_engines_fault() {
    assert_eq!(verdict("", How::Signaled(SIGTERM), Reached::Loading).class, Class::Signal);
    let cause = verdict("", How::Signaled(SIGKILL), Reached::Ready);
    assert_eq!(
        (cause.class, cause.sentence.as_str()),
        (Class::Signal, "The engine was ended from outside (by SIGKILL).")
    );
    assert_eq!(verdict("", How::Signaled(SIGSEGV), Reached::Ready).class, Class::Crash);
    assert_eq!(verdict("", How::Exited(0), Reached::Ready).class, Class::Unknown);
}

#[test]
fn a_port_taken_and_a_failed_warm_up_have_their_classes() {
    let log =
        "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 30111): address already in use\n";
    assert_eq!(verdict(log, How::Signaled(SIGKILL), Reached::Loaded).class, Class::Port);
    assert_eq!(verdict("", How::Exited(3), Reached::Loaded).class, Class::Port);
    let log = "Initialization failed. warmup error: Traceback (most recent call last):\n  x\nTimeoutError: timed out\n";
    let cause = verdict(log, How::Signaled(SIGKILL), Reached::Listening);
    assert_eq!((cause.class, cause.retry), (Class::Warmup, Retry::Once));
}

#[test]
fn a_value_error_before_the_load_is_the_configurations() {
    let log =
        "Traceback (most recent call last):\n  File \"x\"\nValueError: attention backend and page size do not fit\n";
    assert_eq!(verdict(log, How::Exited(1), Reached::Nothing).class, Class::BadConfig);
    let cause = verdict(log, How::Signaled(SIGKILL), Reached::Ready);
    assert_eq!(cause.class, Class::Crash);
    assert!(cause.sentence.contains("page size do not fit"), "{}", cause.sentence);
}

#[test]
fn chained_tracebacks_are_quoted_by_their_last_line_and_other_ranks_not_at_all() {
    let log = "Traceback (most recent call last):\n  a\nKeyError: 'x'\n\nDuring handling of the above exception, another exception occurred:\n\n\
               Traceback (most recent call last):\n  b\nRuntimeError: the outer one\n\
               [2026-11-23 14:10:14 TP1] Scheduler hit an exception: Traceback (most recent call last):\n  c\nRuntimeError: another rank\n";
    let cause = verdict(log, How::Signaled(SIGKILL), Reached::Ready);
    assert!(cause.sentence.ends_with("RuntimeError: the outer one."), "{}", cause.sentence);
}

#[test]
fn a_hang_stays_a_hang_and_a_sentence_stays_short() {
    assert_eq!(verdict("", How::Hung, Reached::Ready).class, Class::Hang);
    let log = format!("Traceback (most recent call last):\n  a\nRuntimeError: {}\n", "é".repeat(5000));
    assert!(verdict(&log, How::Exited(1), Reached::Ready).sentence.len() < 600);
}
