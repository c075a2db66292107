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
    pub last_byte: Option<Duration>,
    /// A "Prefill batch" or "Decode batch" line, or a counter of `/v1/loads` that moved.
    pub last_batch: Option<Duration>,
    /// A `/health` that was answered 200.
    pub last_pulse: Option<Duration>,
    /// Since when something waits for an answer: an open request, or a probe that failed.
    pub waiting: Option<Duration>,
    /// A rank is dead or a zombie while the main process lives.
    pub rank_dead: bool,
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

/// A silence shorter than this is nothing: `/health` alone takes 20 s to say so. Where a hang is called
/// one sooner than that, it is suspected halfway: new traffic must go elsewhere before the end.
pub const SUSPECT_AFTER: Duration = Duration::from_secs(30);

/// `probe_failed`: the latest `/health` failed or timed out.
pub fn judge(evidence: &Evidence, probe: LastProbe, hang_after: Duration) -> Verdict {
    if evidence.rank_dead {
        return Verdict::Hung(Duration::ZERO);
    }
    let sign = [evidence.last_byte, evidence.last_batch, evidence.last_pulse].into_iter().flatten().min();
    let silence = match (evidence.waiting, sign) {
        (None, _) => return Verdict::Alive,
        // Silence counts from when somebody began to wait, or from the last sign after that.
        (Some(waiting), Some(sign)) => waiting.min(sign),
        (Some(waiting), None) => waiting,
    };
    if silence >= hang_after {
        Verdict::Hung(silence)
    } else if silence >= SUSPECT_AFTER.min(hang_after / 2) {
        Verdict::Suspected(silence)
    } else if probe == LastProbe::Failed {
        Verdict::Busy
    } else {
        Verdict::Alive
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastProbe {
    Passed,
    Failed,
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
    fn silence_while_somebody_waits_is_suspected_and_then_hung() {
        let silent = |s| Evidence { last_batch: Some(S(s)), waiting: Some(S(s)), ..Evidence::default() };
        assert_eq!(judge(&silent(29), LastProbe::Failed, LIMIT), Verdict::Busy);
        assert_eq!(judge(&silent(30), LastProbe::Failed, LIMIT), Verdict::Suspected(S(30)));
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
    fn a_byte_through_the_proxy_proves_it_alive() {
        let evidence = Evidence { last_byte: Some(S(1)), waiting: Some(S(600)), ..Evidence::default() };
        assert_eq!(judge(&evidence, LastProbe::Passed, LIMIT), Verdict::Alive);
    }

    #[test]
    fn g08_a_dead_rank_is_not_waited_for() {
        let evidence = Evidence { last_byte: Some(S(0)), rank_dead: true, ..Evidence::default() };
        assert!(matches!(judge(&evidence, LastProbe::Passed, LIMIT), Verdict::Hung(_)));
    }
}
