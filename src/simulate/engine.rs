//! A simulated SGLang engine: a process tree that takes SGLang's launch arguments, goes through its
//! phases and log lines, speaks its HTTP, and dies the way it dies.
//!
//! It computes nothing: its answers are fixed texts, its timing comes from `SGLANG_SIM_*` variables.
//! What is imitated was measured on the real engine, with the processes' odd sides kept: children
//! that are orphans in the making until they have imported, a port that is bound only after the load,
//! a drain without a time limit, and SIGKILL upon oneself as the normal way to crash.

mod args;
mod generate;
mod http;
mod knobs;
mod life;
mod loads;
mod logline;
mod messages;
mod model;
mod rank;
mod realtime;
mod requests;
mod routes;
mod scheduler;
mod speech;
mod strays;
mod trouble;

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How a process of the simulated engine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With SGLang's own exit code.
    Code(u8),
    /// By this signal, upon itself.
    By(Signal),
}

/// Runs the process that `words` (all after `sglangd simulate`) ask for: the engine's main process,
/// or one of those it starts itself.
pub fn run(words: &[String]) -> Ended {
    let knobs = match knobs::Knobs::from_env() {
        Ok(knobs) => knobs,
        Err(error) => {
            logline::raw(&format!("simulated engine: {error}\n"));
            return Ended::Code(64);
        }
    };
    match words.split_first() {
        Some((role, rest)) if role == rank::ROLE => rank::run(rest, &knobs),
        Some((role, rest)) if role == strays::ROLE => strays::run(rest),
        Some((role, rest)) if role == DIE => die_now(rest),
        _ => life::run(words, &knobs),
    }
}

/// This program's file; where there is no `/proc` to tell, whoever starts us says it.
fn own_program() -> std::io::Result<std::path::PathBuf> {
    std::env::current_exe().or_else(|error| std::env::var_os("SGLANG_SIM_PROGRAM").map(Into::into).ok_or(error))
}

const DIE: &str = "::die";

/// Ends this process by `signal`, as a parent sees it.
///
/// A handler that tokio installed cannot be taken back; `execve` resets it, and keeps the pid.
pub fn die_by(signal: Signal) -> Ended {
    if signal == Signal::SIGKILL {
        let _ = kill(Pid::this(), signal);
    }
    if let Ok(own) = own_program() {
        let error = Command::new(own).args(["simulate", DIE, &(signal as i32).to_string()]).exec();
        logline::raw(&format!("simulated engine: cannot exec itself: {error}\n"));
    }
    Ended::Code(128 + signal as i32 as u8)
}

fn die_now(words: &[String]) -> Ended {
    let signal = words.first().and_then(|word| word.parse().ok()).and_then(|n: i32| Signal::try_from(n).ok());
    if let Some(signal) = signal {
        let _ = kill(Pid::this(), signal);
    }
    Ended::Code(70)
}
