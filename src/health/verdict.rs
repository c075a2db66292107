//! Alive, busy or hung: the judgement over all evidence. Pure.
//!
//! A long prefill makes `/health` answer 503 for minutes while the engine works (sglang#22511), and a
//! hung scheduler leaves `/ready` at 200. So silence counts only where something waits for an answer,
//! and any sign of work since then refutes it. CPU use is no sign of life: idle and hung ranks spin.

use std::time::Duration;

/// What is known at one moment. Ages are "how long ago"; none: never, or not since the engine is up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Bytes of an answer passed the proxy.
    pub last_token: Option<Duration>,
    /// A "Prefill batch" or "Decode batch" line.
    pub last_batch: Option<Duration>,
    /// `/v1/loads` moved.
    pub last_figures: Option<Duration>,
    /// A compiler ran, or a kernel cache grew.
    pub last_kernel: Option<Duration>,
    /// A `/health` that was answered 200, and is believed.
    pub last_probe: Option<Duration>,
    /// Since when something waits for an answer: an open request, or a probe.
    pub waiting: Option<Duration>,
    /// Since when somebody has one of its processes stopped.
    pub stopped: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Alive,
    /// Silent towards its probe, but at work.
    Busy,
    /// Nothing for this long while something waits; not yet long enough to act.
    Suspected(Duration),
    Hung(Duration),
}

/// How the latest `/health` ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LastProbe {
    #[default]
    Passed,
    Failed,
}

/// A silence shorter than this is nothing: `/health` alone takes 20 s to say so. Longer by a look and a
/// step of the supervisor it is still said within 30 s.
const SUSPECT_AFTER: Duration = Duration::from_secs(28);

/// Where a hang is called one sooner than that, it is suspected halfway: new traffic must go elsewhere
/// before the end.
pub fn suspect_after(hang_after: Duration) -> Duration {
    SUSPECT_AFTER.min(hang_after / 2)
}

/// A rank that is dead is no matter of judgement, and not waited for.
pub fn judge(evidence: &Evidence, probe: LastProbe, hang_after: Duration) -> Verdict {
    if let Some(stopped) = evidence.stopped {
        // Signs of the others refute nothing: a scheduler decodes on behind a stopped detokenizer.
        return if stopped >= hang_after { Verdict::Hung(stopped) } else { Verdict::Suspected(stopped) };
    }
    let signs =
        [evidence.last_token, evidence.last_batch, evidence.last_figures, evidence.last_kernel, evidence.last_probe];
    let silence = match (evidence.waiting, signs.into_iter().flatten().min()) {
        (None, _) => return Verdict::Alive,
        // Silence counts from when somebody began to wait, or from the last sign after that.
        (Some(waiting), Some(sign)) => waiting.min(sign),
        (Some(waiting), None) => waiting,
    };
    if silence >= hang_after {
        Verdict::Hung(silence)
    } else if silence >= suspect_after(hang_after) {
        Verdict::Suspected(silence)
    } else if probe == LastProbe::Failed {
        Verdict::Busy
    } else {
        Verdict::Alive
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;
    const LIMIT: Duration = Duration::from_mins(2);

    #[test]
    fn an_idle_engine_is_alive_however_long_it_was_silent() {
        let evidence = Evidence { last_batch: Some(S(9_000)), ..Evidence::default() };
        assert_eq!(judge(&evidence, LastProbe::Passed, LIMIT), Verdict::Alive);
    }

    #[test]
    fn g07_a_long_prefill_is_busy_while_batches_finish() {
        let evidence = Evidence { last_batch: Some(S(15)), waiting: Some(S(600)), ..Evidence::default() };
        assert_eq!(judge(&evidence, LastProbe::Failed, LIMIT), Verdict::Busy);
    }

    #[test]
    fn g07_kernels_that_compile_are_a_sign_of_life_when_nothing_else_moves() {
        let evidence = Evidence { last_kernel: Some(S(5)), waiting: Some(S(600)), ..Evidence::default() };
        assert_eq!(judge(&evidence, LastProbe::Failed, LIMIT), Verdict::Busy);
    }

    #[test]
    fn silence_while_somebody_waits_is_suspected_and_then_hung() {
        let silent = |s| Evidence { last_batch: Some(S(s)), waiting: Some(S(s)), ..Evidence::default() };
        assert_eq!(judge(&silent(27), LastProbe::Failed, LIMIT), Verdict::Busy);
        assert_eq!(judge(&silent(28), LastProbe::Failed, LIMIT), Verdict::Suspected(S(28)));
        assert_eq!(judge(&silent(119), LastProbe::Failed, LIMIT), Verdict::Suspected(S(119)));
        assert_eq!(judge(&silent(120), LastProbe::Failed, LIMIT), Verdict::Hung(S(120)));
    }

    #[test]
    fn g10_a_hang_is_suspected_before_it_is_called_one_however_small_the_limit() {
        let silent = |s| Evidence { last_batch: Some(S(s)), waiting: Some(S(s)), ..Evidence::default() };
        assert_eq!(judge(&silent(1), LastProbe::Passed, S(4)), Verdict::Alive);
        assert_eq!(judge(&silent(2), LastProbe::Passed, S(4)), Verdict::Suspected(S(2)));
        assert_eq!(judge(&silent(4), LastProbe::Passed, S(4)), Verdict::Hung(S(4)));
    }

    #[test]
    fn silence_counts_from_when_somebody_began_to_wait() {
        let evidence = Evidence { last_batch: Some(S(9_000)), waiting: Some(S(3)), ..Evidence::default() };
        assert_eq!(judge(&evidence, LastProbe::Passed, LIMIT), Verdict::Alive);
    }

    #[test]
    fn each_sign_of_life_proves_it_alive() {
        let waits = Evidence { waiting: Some(S(600)), ..Evidence::default() };
        assert_eq!(judge(&waits, LastProbe::Passed, LIMIT), Verdict::Hung(S(600)));
        let now = Some(S(1));
        for evidence in [
            Evidence { last_token: now, ..waits },
            Evidence { last_batch: now, ..waits },
            Evidence { last_figures: now, ..waits },
            Evidence { last_kernel: now, ..waits },
            Evidence { last_probe: now, ..waits },
        ] {
            assert_eq!(judge(&evidence, LastProbe::Passed, LIMIT), Verdict::Alive, "{evidence:?}");
        }
    }

    #[test]
    fn g10_a_stopped_process_is_suspected_at_once_whoever_waits_and_whatever_else_moves() {
        let stopped = |s| Evidence { stopped: Some(S(s)), last_token: Some(S(0)), ..Evidence::default() };
        assert_eq!(judge(&stopped(0), LastProbe::Passed, LIMIT), Verdict::Suspected(S(0)));
        assert_eq!(judge(&stopped(120), LastProbe::Passed, LIMIT), Verdict::Hung(S(120)));
    }
}
