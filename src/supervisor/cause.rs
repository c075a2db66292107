//! Why a start or an engine ended: one class for the machine, one sentence and one piece of advice
//! for people.

use std::io;

use nix::libc;

use super::step::{Failure, Retry};
use crate::exit::Exit;

/// The same words in status, the 503's body, the log and the metric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    pub failure: Failure,
    /// One sentence: what happened.
    pub sentence: String,
    /// What to do about it; empty when there is nothing to do.
    pub advice: String,
}

impl Cause {
    /// Repeating cannot help. `exit` is the row of the exit codes' table.
    pub fn never(class: &'static str, exit: u8, sentence: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { failure: Failure { class, retry: Retry::Never, exit }, sentence: sentence.into(), advice: advice.into() }
    }

    /// It may pass by itself.
    pub fn passing(class: &'static str, exit: u8, sentence: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            failure: Failure { class, retry: Retry::Backoff, exit },
            sentence: sentence.into(),
            advice: advice.into(),
        }
    }

    /// A limit of this process or of the machine, where the error is one: it stands in the way of everything, and may
    /// be lifted while we run. `what` could not be done because of it.
    pub fn of_a_limit(what: &str, error: &io::Error) -> Option<Self> {
        let (limit, advice) = match error.raw_os_error()? {
            libc::EAGAIN => ("a limit on processes is reached", "Look at TasksMax, pids.max and ulimit -u."),
            libc::EMFILE => ("a limit on open files is reached", "Look at LimitNOFILE and ulimit -n."),
            libc::ENFILE => ("the machine's limit on open files is reached", "Look at fs.file-max."),
            libc::ENOMEM => ("there is no memory for it", "Look at MemoryMax, memory.max and what else runs here."),
            _ => return None,
        };
        let sentence = format!("{what}: {limit} ({error}).");
        Some(Self::passing("no_resources", Exit::Engine.code(), sentence, advice))
    }

    /// Writes it into the log.
    pub fn log(&self) {
        tracing::error!("{}{}{}", self.sentence, if self.advice.is_empty() { "" } else { " " }, self.advice);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn j07_each_limit_is_named_may_pass_and_has_its_advice() {
        for (code, named, advised) in [
            (libc::EAGAIN, "limit on processes", "TasksMax"),
            (libc::EMFILE, "limit on open files", "LimitNOFILE"),
            (libc::ENFILE, "machine's limit on open files", "file-max"),
            (libc::ENOMEM, "no memory", "memory.max"),
        ] {
            let error = io::Error::from_raw_os_error(code);
            let cause = Cause::of_a_limit("The engine's process could not be started", &error).expect("a limit");
            assert!(cause.sentence.contains(named) && cause.advice.contains(advised), "{cause:?}");
            assert_eq!((cause.failure.class, cause.failure.retry), ("no_resources", Retry::Backoff));
        }
        assert_eq!(Cause::of_a_limit("x", &io::Error::from_raw_os_error(libc::EACCES)), None);
    }
}
