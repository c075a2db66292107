//! Lines in SGLang's format. A closed pipe is nobody's error here.

use std::fmt::Display;
use std::io::Write;

use jiff::Timestamp;

/// Python's logging: standard error, with the rank where there is one.
pub fn say(rank: Option<u32>, message: impl Display) {
    let now = Timestamp::now().strftime("%Y-%m-%d %H:%M:%S");
    let line = match rank {
        Some(rank) => format!("[{now} TP{rank}] {message}\n"),
        None => format!("[{now}] {message}\n"),
    };
    raw(&line);
}

/// Uvicorn's access lines: standard output.
pub fn access(peer: impl Display, method: &str, path: &str, status: http::StatusCode) {
    let now = Timestamp::now().strftime("%Y-%m-%d %H:%M:%S");
    let reason = status.canonical_reason().unwrap_or("");
    let line = format!("[{now}] INFO:     {peer} - \"{method} {path} HTTP/1.1\" {} {reason}\n", status.as_u16());
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}

/// One write, so that lines of several processes on one pipe do not mix.
pub fn raw(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}
