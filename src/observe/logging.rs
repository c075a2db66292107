//! Where log lines go: text for people or one JSON object a line, to standard error, so that standard
//! output stays for answers; or entries of the journal.
//!
//! Whoever logs never waits for whoever reads: lines pass through a bounded ring, and a reader that
//! stands still (a paused terminal, a stuck journal) costs lines, which are counted, and nothing else.

use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::debug_fn;
use tracing_subscriber::fmt::time::FormatTime;

use super::journal::{Entry, Journal};
use crate::config::LogFormat;

/// Lines that may wait to be written: some MiB at worst, minutes of normal logging. Half a MiB without a line.
pub const RING: usize = 16_384;
/// The same for the proxy, which says little: a sixteenth of the room.
pub const SMALL_RING: usize = 1024;

/// h2 warns of what clients do wrong, a line a frame: nobody may fill a log from outside. What is said
/// behind it wins, so that `h2=debug` can still be asked for.
const QUIET: &str = "h2=off";

/// Lines that the ring had no room for.
static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// Lines lost so far because nobody took them.
pub fn dropped_lines() -> usize {
    DROPPED.get().map_or(0, ErrorCounter::dropped_lines)
}

/// RFC 3339 without a date library in the way of `tracing`.
#[derive(Debug)]
struct Clock;

impl FormatTime for Clock {
    fn format_time(&self, w: &mut tracing_subscriber::fmt::format::Writer<'_>) -> std::fmt::Result {
        w.write_str(&super::clock::now())
    }
}

fn filter(level: &str) -> EnvFilter {
    EnvFilter::try_new(format!("{QUIET},{level}")).unwrap_or_else(|_| EnvFilter::new(format!("{QUIET},info")))
}

/// Installs the logger of this process. Called once, by a subcommand, before anything logs; a second
/// call changes nothing. What is still in the ring is written when the guard is dropped.
#[must_use = "lines still in the ring are lost when the guard is dropped early"]
pub fn init(format: LogFormat, level: &str, lines: usize) -> WorkerGuard {
    // Without a journal, people may still read the lines.
    let journal = (format == LogFormat::Journald).then(Journal::open);
    let ring = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(lines).thread_name("log");
    let (missing, (writer, guard)) = match journal {
        Some(Ok(journal)) => (None, ring.finish(journal)),
        Some(Err(error)) => (Some(error), ring.finish(std::io::stderr())),
        None => (None, ring.finish(std::io::stderr())),
    };
    let format = if missing.is_some() { LogFormat::Text } else { format };
    // A second call of a process keeps the first one's.
    let _ = DROPPED.set(writer.error_counter());
    let filter = filter(level);
    let base = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_timer(Clock);
    // An error here means that a logger is already there, which is all that was wanted.
    let _ = match format {
        LogFormat::Text => base
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            // The engine's rank stands in the message; as a field of its own it is for machines.
            .fmt_fields(debug_fn(|writer, field, value| match field.name() {
                "message" => write!(writer, "{value:?}"),
                "rank" => Ok(()),
                name => write!(writer, " {name}={value:?}"),
            }))
            .try_init(),
        LogFormat::Json => base.json().flatten_event(true).try_init(),
        LogFormat::Journald => base.event_format(Entry).try_init(),
    };
    if let Some(error) = missing {
        tracing::warn!("observe.log is `journald`, but there is no journal ({error}): logging text");
    }
    guard
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_do_wrong_is_logged_only_where_it_is_asked_for() {
        for (level, expected) in [("info", "h2=off"), ("nonsense=[", "h2=off"), ("info,h2=debug", "h2=debug")] {
            let filter = filter(level).to_string();
            let h2: Vec<&str> = filter.split(',').filter(|directive| directive.starts_with("h2")).collect();
            assert_eq!(h2, [expected], "{level}: {filter}");
        }
    }
}
