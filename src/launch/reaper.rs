//! The one place that waits for children. As subreaper or PID 1 we inherit orphans by the thousand;
//! each is collected at once, and nobody else ever waits, so that no exit status is lost.

use rustix::io::Errno;
use rustix::process::{WaitOptions, wait};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exited(i32),
    Signaled(i32),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit status {code}"),
            Self::Signaled(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "killed by {signal}"),
                Err(_) => write!(f, "killed by signal {number}"),
            },
        }
    }
}

/// Most children collected in one go; the caller comes back for the rest, so that a storm of
/// orphans starves nobody.
pub const BATCH: usize = 256;

/// Collects up to [`BATCH`] children that have ended. Fewer than that: nothing more to collect now.
pub fn collect() -> Vec<(i32, Ended)> {
    let mut ended = Vec::new();
    while ended.len() < BATCH {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => {
                let how = match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => Ended::Exited(code),
                    (None, Some(signal)) => Ended::Signaled(signal),
                    // Stops and continues are not asked for.
                    (None, None) => continue,
                };
                ended.push((pid.as_raw_nonzero().get(), how));
            }
            Err(Errno::INTR) => {}
            // Nobody has ended, or there is no child at all.
            Ok(None) | Err(_) => break,
        }
    }
    ended
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test, since it collects all children of this process: nextest gives each test its own.
    #[test]
    fn exits_and_signals_are_told_apart_also_real_time_ones() {
        let script = |s: &str| std::process::Command::new("/bin/sh").args(["-c", s]).spawn().expect("sh").id();
        let expected = [
            (script("exit 7"), Ended::Exited(7)),
            (script("kill -9 $$"), Ended::Signaled(9)),
            (script("kill -40 $$"), Ended::Signaled(40)),
        ];
        let mut seen = Vec::new();
        for _ in 0..1000 {
            seen.extend(collect());
            if seen.len() == expected.len() {
                break;
            }
            std::thread::yield_now();
            #[allow(clippy::disallowed_methods)]
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        for (pid, how) in expected {
            assert!(seen.contains(&(i32::try_from(pid).expect("pid"), how)), "{how} not in {seen:?}");
        }
    }
}
