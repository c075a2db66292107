//! Puts a death into words: from the exit status, the last lines and what was going on.

use std::io;

use super::cause::Cause;
use super::step::{Failure, Retry};
use crate::engine::death::{self, Evidence, ExitRow, How, Reached};
use crate::engine::log::Signature;
use crate::exit::Exit;
use crate::launch::reaper::Ended;

/// The program could not be started at all.
pub fn not_started(program: &str, error: &io::Error) -> Cause {
    match error.kind() {
        io::ErrorKind::NotFound => Cause::never(
            "bad_config",
            Exit::Config.code(),
            format!("The engine's program {program} does not exist."),
            "Correct engine.command, or install it.",
        ),
        io::ErrorKind::PermissionDenied => Cause::never(
            "bad_config",
            Exit::Config.code(),
            format!("The engine's program {program} may not be executed."),
            "Correct engine.command, or its permissions (chmod +x).",
        ),
        _ => {
            let what = "The engine's process could not be started";
            Cause::of_a_limit(what, error)
                .unwrap_or_else(|| Cause::passing("no_resources", Exit::Engine.code(), format!("{what}: {error}."), ""))
        }
    }
}

/// Why the supervisor ends an engine whose main process lives, in a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judged {
    Hung(String),
    /// A rank died, of something that the log may tell.
    RankDied(String),
}

/// What was found with a dead or hung engine.
#[derive(Debug)]
pub struct Found {
    pub ended: Option<Ended>,
    pub reached: Reached,
    pub tail: Vec<Vec<u8>>,
    pub signatures: Vec<Signature>,
    /// The supervisor's own judgement, where it ended a living engine.
    pub verdict: Option<Judged>,
    pub node: NodeFound,
}

/// What the machine said of the time in which it lived.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFound {
    /// Whether the kernel killed one of its processes for memory; none: nobody could look.
    pub oom_kill: Option<bool>,
    /// A GPU's failure, in the driver's words.
    pub hardware: Option<String>,
    /// An error of a GPU that a program may cause.
    pub gpu_fault: Option<String>,
}

impl NodeFound {
    /// Whether this class is what the machine, and not the engine, said.
    fn tells(&self, class: death::Class) -> bool {
        match class {
            death::Class::HostOom => self.oom_kill == Some(true),
            death::Class::Hardware => self.hardware.is_some(),
            death::Class::CudaError => self.gpu_fault.is_some(),
            _ => false,
        }
    }
}

/// What is told while nothing was found yet: a machine under load may take longer to look than a restart may wait.
pub fn unexamined(ended: Option<Ended>, verdict: Option<&Judged>) -> Cause {
    let sentence = match (verdict, ended) {
        (Some(Judged::Hung(sentence) | Judged::RankDied(sentence)), _) => sentence.clone(),
        (None, Some(how)) => format!("The engine's main process ended: {how}."),
        (None, None) => "The engine failed.".into(),
    };
    let advice = "Why is still being looked for; the log and the incident's bundle will say it.";
    Cause::passing("unknown", Exit::CrashLoop.code(), sentence, advice)
}

/// One class, one sentence, one piece of advice. `before`: the class of the start before this one, if
/// no engine was ready in between.
pub fn examine(found: &Found, before: Option<&'static str>) -> Cause {
    let how = match (found.ended, &found.verdict) {
        (Some(Ended::Exited(code)), _) => How::Exited(code),
        (Some(Ended::Signaled(signal)), _) => How::Signaled(signal),
        (None, Some(Judged::RankDied(_))) => How::RankDied,
        (None, _) => How::Hung,
    };
    let evidence = Evidence {
        how,
        reached: found.reached,
        tail: &found.tail,
        signatures: &found.signatures,
        oom_kill: found.node.oom_kill,
        hardware: found.node.hardware.as_deref(),
        gpu_fault: found.node.gpu_fault.as_deref(),
    };
    let cause = death::classify(&evidence);
    let exit = match cause.exit {
        ExitRow::Weights => Exit::Weights,
        ExitRow::Engine => Exit::Engine,
        ExitRow::CrashLoop => Exit::CrashLoop,
    };
    let class = cause.class.name();
    let retry = match cause.retry {
        death::Retry::Never => Retry::Never,
        death::Retry::Once if before == Some(class) => Retry::Never,
        death::Retry::Once | death::Retry::Backoff => Retry::Backoff,
    };
    let sentence = match &found.verdict {
        // What was seen from outside, and why, where the machine knows more than that.
        Some(Judged::Hung(sentence) | Judged::RankDied(sentence)) if found.node.tells(cause.class) => {
            format!("{sentence} {}", cause.sentence)
        }
        Some(Judged::Hung(sentence)) => sentence.clone(),
        // The engine's own words say more, where it had any.
        Some(Judged::RankDied(sentence)) if found.signatures.is_empty() => sentence.clone(),
        Some(Judged::RankDied(_)) | None => cause.sentence,
    };
    Cause { failure: Failure { class, retry, exit: exit.code() }, sentence, advice: cause.advice.to_owned() }
}

#[cfg(test)]
mod tests;
