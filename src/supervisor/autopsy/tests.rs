use super::*;

const SEGFAULT: i32 = 11;

fn found(ended: Option<Ended>) -> Found {
    Found {
        ended,
        reached: Reached::Ready,
        tail: Vec::new(),
        signatures: Vec::new(),
        verdict: None,
        node: NodeFound::default(),
    }
}

/// Ended by the supervisor, which had seen why.
fn judged(verdict: Judged, node: NodeFound, signatures: &[Signature]) -> Cause {
    examine(&Found { verdict: Some(verdict), node, signatures: signatures.to_vec(), ..found(None) }, None)
}

fn hung() -> Judged {
    Judged::Hung("Silent for two minutes.".into())
}

fn rank_died() -> Judged {
    Judged::RankDied("Rank 3 is gone.".into())
}

#[test]
fn what_takes_too_long_to_be_examined_is_told_as_far_as_it_was_seen() {
    let told = |ended, verdict: Option<Judged>| unexamined(ended, verdict.as_ref());
    assert_eq!(told(None, Some(hung())).sentence, "Silent for two minutes.");
    assert_eq!(told(Some(Ended::Signaled(9)), Some(rank_died())).sentence, "Rank 3 is gone.");
    assert_eq!(told(Some(Ended::Signaled(9)), None).sentence, "The engine's main process ended: killed by SIGKILL.");
    let cause = told(None, None);
    assert!(!cause.sentence.is_empty() && cause.advice.contains("bundle"));
    // As the step function decides without an examination.
    assert_eq!((cause.failure.class, cause.failure.retry), ("unknown", Retry::Backoff));
    assert_eq!(cause.failure.exit, crate::supervisor::step::EXIT_CRASH_LOOP);
}

#[test]
fn g01_a_program_that_cannot_be_started_is_not_tried_again_and_a_limit_that_is_reached_is() {
    let of = |error: io::Error| {
        let Cause { failure, sentence, .. } = not_started("/opt/engine", &error);
        (failure.class, failure.retry, failure.exit, sentence)
    };
    let (class, retry, exit, sentence) = of(io::ErrorKind::NotFound.into());
    assert_eq!((class, retry, exit), ("bad_config", Retry::Never, 65));
    assert_eq!(sentence, "The engine's program /opt/engine does not exist.");
    let (class, retry, exit, sentence) = of(io::ErrorKind::PermissionDenied.into());
    assert_eq!((class, retry, exit), ("bad_config", Retry::Never, 65));
    assert_eq!(sentence, "The engine's program /opt/engine may not be executed.");
    let (class, retry, exit, sentence) = of(io::Error::from_raw_os_error(nix::libc::EMFILE));
    assert_eq!((class, retry, exit), ("no_resources", Retry::Backoff, 69));
    assert!(sentence.contains("a limit on open files is reached"), "{sentence}");
    let (class, retry, exit, sentence) = of(io::Error::from_raw_os_error(nix::libc::EIO));
    assert_eq!((class, retry, exit), ("no_resources", Retry::Backoff, 69));
    assert!(sentence.starts_with("The engine's process could not be started: "), "{sentence}");
}

#[test]
fn an_end_by_itself_is_told_by_its_status_or_its_signal() {
    let exited = examine(&found(Some(Ended::Exited(9))), None);
    assert_eq!((exited.failure.class, exited.failure.exit), ("unknown", 75));
    assert!(exited.sentence.contains("exit status 9"), "{}", exited.sentence);
    let killed = examine(&found(Some(Ended::Signaled(SEGFAULT))), None);
    assert_eq!((killed.failure.class, killed.failure.retry), ("crash", Retry::Backoff));
    assert!(killed.sentence.contains("SIGSEGV"), "{}", killed.sentence);
}

#[test]
fn what_may_help_once_is_tried_once_and_the_second_in_a_row_is_final() {
    let told = |before| {
        let signatures = vec![Signature::CudaError];
        examine(&Found { signatures, ..found(Some(Ended::Exited(1))) }, before).failure
    };
    assert_eq!((told(None).class, told(None).retry), ("cuda_error", Retry::Backoff));
    assert_eq!(told(Some("crash")).retry, Retry::Backoff, "the one before was another");
    assert_eq!(told(Some("cuda_error")).retry, Retry::Never);
    let crash = |before| examine(&found(Some(Ended::Signaled(SEGFAULT))), before).failure.retry;
    assert_eq!(crash(Some("crash")), Retry::Backoff, "that is the restart limits' to say");
}

#[test]
fn each_row_of_the_exit_codes_has_its_causes() {
    let of = |signature| {
        let Cause { failure, .. } =
            examine(&Found { signatures: vec![signature], ..found(Some(Ended::Exited(1))) }, None);
        (failure.retry, failure.exit)
    };
    assert_eq!(of(Signature::Weights), (Retry::Never, 66));
    assert_eq!(of(Signature::KvDoesNotFit), (Retry::Never, 69));
    assert_eq!(of(Signature::Nccl), (Retry::Backoff, 75));
}

#[test]
fn a_hang_is_told_as_it_was_seen_and_with_the_machines_word_where_that_is_its_cause() {
    let alone = judged(hung(), NodeFound::default(), &[Signature::Nccl]);
    assert_eq!((alone.failure.class, alone.sentence.as_str()), ("hang", "Silent for two minutes."));
    let with = |node| {
        let cause = judged(hung(), node, &[]);
        (cause.failure.class, cause.sentence.strip_prefix("Silent for two minutes. ").map(str::len))
    };
    let (class, more) = with(NodeFound { oom_kill: Some(true), ..NodeFound::default() });
    assert!(class == "host_oom" && more.is_some(), "{class}");
    let (class, more) =
        with(NodeFound { hardware: Some("Xid 79: it fell off the bus".into()), ..NodeFound::default() });
    assert!(class == "hardware" && more.is_some(), "{class}");
    let harmless = NodeFound { oom_kill: Some(false), gpu_fault: Some("Xid 31".into()), ..NodeFound::default() };
    assert_eq!(judged(hung(), harmless, &[]).sentence, "Silent for two minutes.", "it is no cause of a hang");
}

#[test]
fn a_rank_that_died_is_told_by_the_engine_or_the_machine_before_it_is_told_as_seen() {
    let silent = judged(rank_died(), NodeFound::default(), &[]);
    assert_eq!((silent.failure.class, silent.sentence.as_str()), ("crash", "Rank 3 is gone."));
    let spoke = judged(rank_died(), NodeFound::default(), &[Signature::Nccl]);
    assert_eq!((spoke.failure.class, spoke.sentence.as_str()), ("nccl", "Communication between the ranks failed."));
    // An error of a GPU is the machine's word where the engine had none, and none where its words say another thing.
    let fault = || NodeFound { gpu_fault: Some("Xid 31".into()), ..NodeFound::default() };
    let machine = judged(rank_died(), fault(), &[]);
    assert_eq!(machine.failure.class, "cuda_error");
    assert_eq!(machine.sentence, "Rank 3 is gone. A CUDA kernel failed: Xid 31.");
    let both = judged(rank_died(), fault(), &[Signature::Nccl]);
    assert_eq!((both.failure.class, both.sentence.as_str()), ("nccl", "Communication between the ranks failed."));
}
