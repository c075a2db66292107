//! What the simulated engine is asked to be like: `SGLANG_SIM_*`. (Variables that begin with
//! `SGLANG_` reach an engine; sglangd's own do not.)

use std::time::Duration;

#[derive(Debug, Clone)]
pub struct Knobs {
    /// From exec to the bound port; split over the phases (`SGLANG_SIM_START_SECONDS`).
    pub start: Duration,
    /// The window in which children import and have no parent-death signal
    /// (`SGLANG_SIM_IMPORT_SECONDS`); none: its share of `start`.
    pub import: Option<Duration>,
    /// Of each stream (`SGLANG_SIM_TOKENS_PER_SECOND`).
    pub tokens_per_second: f64,
    /// The KV cache's (`SGLANG_SIM_KV_TOKENS`), as the log tells it.
    pub kv_tokens: u64,
    /// How often a drain looks whether requests are left (`SGLANG_SIM_DRAIN_POLL_SECONDS`; the real
    /// engine: 5 s).
    pub drain_poll: Duration,
    /// How long an engine that found its port taken stays (`SGLANG_SIM_BIND_WAIT_SECONDS`).
    pub bind_wait: Duration,
    /// How long `/health` waits for the scheduler (`SGLANG_HEALTH_CHECK_TIMEOUT`, as the real one).
    pub health_timeout: Duration,
    /// The warm-up's limit (`SGLANG_WARMUP_TIMEOUT`, as the real one).
    pub warmup_timeout: Duration,
    /// The pause before a crash's end: 5 s, plus 60 s while a scheduler lives, unless both
    /// `SGLANG_PYSPY_DUMP_BEFORE_CRASH` and `SGLANG_CUDA_COREDUMP_BEFORE_CRASH` are off.
    pub diagnostics: Diagnostics,
    /// `SGLANG_SIM_FAULT`: comma-separated names, some with `=VALUE`.
    pub faults: Vec<Fault>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Diagnostics {
    On,
    Off,
}

/// A misbehaviour on request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// End with this code as soon as the imports are done.
    ExitAtStart(u8),
    /// A rank's exception this long after readiness.
    CrashAfter(Duration),
    /// The load never goes on, and says nothing.
    HangAtLoad,
    /// SIGTERM has no effect, from the first moment.
    IgnoreSigterm,
    /// A grandchild in a session of its own, forked twice, deaf to SIGTERM.
    OrphanSetsid,
    /// As many lines as the pipe takes, to standard output.
    FloodStdout,
    /// The same to standard error.
    FloodStderr,
    /// One line of so many MiB without an end, with NUL, colours and invalid UTF-8 in it.
    LongLine(usize),
    /// Answers that are no HTTP.
    GarbageHttp,
    /// `/health` says 200 whatever the ranks do, and nobody watches them.
    HealthLies,
    /// The last rank stops (SIGSTOP) this long after readiness.
    StopRank(Duration),
    /// The main process takes memory without end (2 GiB at most) this long after readiness.
    EatMemory(Duration),
    /// Each prefill takes this long, in silence.
    SlowPrefill(Duration),
    /// Each prefill takes this long, with a log line a chunk; `/health` fails meanwhile.
    BusyPrefill(Duration),
    /// The last rank dies after so many tokens in all.
    DieAfterTokens(u64),
    /// No token any more after so many in all.
    HangAfterTokens(u64),
    /// The scheduler goes on no more after so many tokens in all, and is not stopped: it spins.
    StallAfterTokens(u64),
    /// No draft token is ever taken.
    IdleSpeculation,
    /// Leave files in `/dev/shm` and in `TMPDIR`.
    LeakShm,
    /// What argparse says to a flag that it does not know.
    BadFlag,
    /// A rank runs out of GPU memory while it loads.
    CudaOom,
    /// Close standard output and error once ready.
    CloseStdio,
    /// The port is found taken after the load.
    BusyPort,
    /// `/v1/realtime` is refused with 403.
    RefuseWebsocket,
}

#[derive(Debug, thiserror::Error)]
pub enum KnobError {
    #[error("SGLANG_SIM_FAULT: there is no fault {0:?}")]
    Unknown(String),
    #[error("{0}={1:?} is not a number that fits")]
    Number(String, String),
}

impl Knobs {
    pub fn from_env() -> Result<Self, KnobError> {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(get: impl Fn(&str) -> Option<String>) -> Result<Self, KnobError> {
        let seconds = |name: &str| get(name).map(|text| parse_seconds(name, &text)).transpose();
        // Negative means "the default" to SGLang.
        let integer = |name: &str, default: u64| {
            get(name)
                .and_then(|text| text.trim().parse().ok())
                .map_or(Duration::from_secs(default), Duration::from_secs)
        };
        let off = |name: &str| {
            get(name).is_some_and(|v| matches!(v.to_ascii_lowercase().as_str(), "0" | "false" | "no" | "n"))
        };
        let both_off = off("SGLANG_PYSPY_DUMP_BEFORE_CRASH") && off("SGLANG_CUDA_COREDUMP_BEFORE_CRASH");
        let tps = "SGLANG_SIM_TOKENS_PER_SECOND";
        let tokens_per_second = match get(tps) {
            None => 60.0,
            Some(text) => match text.parse::<f64>() {
                Ok(n) if n > 0.0 && n <= 1e6 => n,
                _ => return Err(KnobError::Number(tps.into(), text)),
            },
        };
        let faults = get("SGLANG_SIM_FAULT").unwrap_or_default();
        Ok(Self {
            start: seconds("SGLANG_SIM_START_SECONDS")?.unwrap_or(Duration::from_secs(4)),
            import: seconds("SGLANG_SIM_IMPORT_SECONDS")?,
            tokens_per_second,
            kv_tokens: match get("SGLANG_SIM_KV_TOKENS") {
                None => 65_536,
                Some(text) => text.parse().map_err(|_| KnobError::Number("SGLANG_SIM_KV_TOKENS".into(), text))?,
            },
            drain_poll: seconds("SGLANG_SIM_DRAIN_POLL_SECONDS")?.unwrap_or(Duration::from_secs(1)),
            bind_wait: seconds("SGLANG_SIM_BIND_WAIT_SECONDS")?.unwrap_or(Duration::from_mins(2)),
            health_timeout: integer("SGLANG_HEALTH_CHECK_TIMEOUT", 20),
            warmup_timeout: integer("SGLANG_WARMUP_TIMEOUT", 600),
            diagnostics: if both_off { Diagnostics::Off } else { Diagnostics::On },
            faults: faults
                .split(',')
                .map(str::trim)
                .filter(|f| !f.is_empty())
                .map(Fault::parse)
                .collect::<Result<_, _>>()?,
        })
    }

    /// A phase's part of the start, in hundredths.
    pub fn share(&self, percent: u32) -> Duration {
        self.start * percent / 100
    }

    pub fn import_window(&self) -> Duration {
        self.import.unwrap_or_else(|| self.share(25))
    }

    pub fn has(&self, fault: Fault) -> bool {
        self.faults.contains(&fault)
    }

    /// The first answer of `pick` over the faults asked for.
    pub fn find<T>(&self, pick: impl Fn(Fault) -> Option<T>) -> Option<T> {
        self.faults.iter().copied().find_map(pick)
    }
}

impl Fault {
    fn parse(text: &str) -> Result<Self, KnobError> {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        let seconds = || if value.is_empty() { Ok(Duration::ZERO) } else { parse_seconds(name, value) };
        let number = || value.parse::<u64>().map_err(|_| KnobError::Number(name.into(), value.into()));
        Ok(match name {
            "exit_at_start" => {
                Self::ExitAtStart(u8::try_from(number()?).map_err(|_| KnobError::Number(name.into(), value.into()))?)
            }
            "crash_after" => Self::CrashAfter(seconds()?),
            "hang_at_load" => Self::HangAtLoad,
            "ignore_sigterm" => Self::IgnoreSigterm,
            "orphan_setsid" => Self::OrphanSetsid,
            "flood_stdout" => Self::FloodStdout,
            "flood_stderr" => Self::FloodStderr,
            "long_line" => Self::LongLine(if value.is_empty() { 64 } else { number()? as usize }),
            "garbage_http" => Self::GarbageHttp,
            "health_lies" => Self::HealthLies,
            "stop_rank" => Self::StopRank(seconds()?),
            "eat_memory" => Self::EatMemory(seconds()?),
            "slow_prefill" => Self::SlowPrefill(seconds()?),
            "busy_prefill" => Self::BusyPrefill(seconds()?),
            "die_after_tokens" => Self::DieAfterTokens(number()?),
            "hang_after_tokens" => Self::HangAfterTokens(number()?),
            "stall_after_tokens" => Self::StallAfterTokens(number()?),
            "idle_speculation" => Self::IdleSpeculation,
            "leak_shm" => Self::LeakShm,
            "bad_flag" => Self::BadFlag,
            "cuda_oom" => Self::CudaOom,
            "close_stdio" => Self::CloseStdio,
            "busy_port" => Self::BusyPort,
            "refuse_websocket" => Self::RefuseWebsocket,
            _ => return Err(KnobError::Unknown(name.to_owned())),
        })
    }
}

fn parse_seconds(name: &str, text: &str) -> Result<Duration, KnobError> {
    text.trim()
        .parse::<f64>()
        .ok()
        .and_then(|s| Duration::try_from_secs_f64(s).ok())
        .ok_or_else(|| KnobError::Number(name.to_owned(), text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_that_does_not_exist_is_an_error_and_not_a_passing_test() {
        let read = |faults: &str| Knobs::read(|name| (name == "SGLANG_SIM_FAULT").then(|| faults.to_owned()));
        assert!(matches!(read("crash_afer=1"), Err(KnobError::Unknown(_))));
        assert!(matches!(read("exit_at_start=300"), Err(KnobError::Number(..))));
        let knobs = read("crash_after=1.5, leak_shm").expect("both exist");
        assert_eq!(knobs.faults, [Fault::CrashAfter(Duration::from_millis(1500)), Fault::LeakShm]);
    }
}
