//! Puts a death into words: from the exit status, the last lines and what was going on.

use std::io;

use super::cause::Cause;
use crate::cli::exit::Exit;
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
        io::ErrorKind::WouldBlock => Cause::passing(
            "no_resources",
            Exit::Engine.code(),
            format!("The engine's process could not be started: a limit on processes is reached ({error})."),
            "Look at TasksMax, pids.max and ulimit -u.",
        ),
        _ => Cause::passing(
            "no_resources",
            Exit::Engine.code(),
            format!("The engine's process could not be started: {error}."),
            "",
        ),
    }
}

/// It died, or was given up.
pub fn examine(ended: Option<Ended>, phase: &str, tail: &[Vec<u8>], verdict: Option<String>) -> Cause {
    if let Some(sentence) = verdict {
        return Cause::passing("hang", Exit::CrashLoop.code(), sentence, "");
    }
    let how = ended.map_or_else(|| "its end was not seen".to_owned(), |ended| ended.to_string());
    let last = tail.last().map(|line| String::from_utf8_lossy(line).into_owned()).unwrap_or_default();
    Cause::passing(
        "crash",
        Exit::CrashLoop.code(),
        format!("The engine died while {phase} ({how}). Last line: {last}"),
        "",
    )
}
