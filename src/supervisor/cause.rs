//! Why a start or an engine ended: one class for the machine, one sentence and one piece of advice
//! for people.

use super::step::{Failure, Retry};

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
}
