//! Where log lines go: text for people, or one JSON object a line; always standard error, so that
//! standard output stays for answers.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::FormatTime;

use crate::config::LogFormat;

/// RFC 3339 without a date library in the way of `tracing`.
#[derive(Debug)]
struct Clock;

impl FormatTime for Clock {
    fn format_time(&self, w: &mut tracing_subscriber::fmt::format::Writer<'_>) -> std::fmt::Result {
        w.write_str(&super::clock::now())
    }
}

/// Installs the logger of this process. `role` tells the processes of one sglangd apart.
/// Called once, by a subcommand, before anything logs; a second call changes nothing.
pub fn init(format: LogFormat, level: &str) {
    let filter = EnvFilter::try_new(level).unwrap_or_else(|_| EnvFilter::new("info"));
    let base = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_timer(Clock);
    // An error here means that a logger is already there, which is all that was wanted.
    let _ = match format {
        LogFormat::Text => base.with_ansi(std::io::stderr().is_terminal()).with_target(false).try_init(),
        LogFormat::Json => base.json().flatten_event(true).try_init(),
    };
}
