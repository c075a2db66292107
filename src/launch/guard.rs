//! Ends the engine when the supervisor was killed, in plain use: there neither systemd's cgroup nor a
//! container's PID namespace does it, and the engine's children arm their parent-death signal only
//! after 10 to 40 s of imports.
//!
//! The guard is a process of its own in a session of its own. Its standard input is a pipe that only
//! the supervisor holds open; each line on it is the [`Record`] of the engine that runs now (an empty
//! line: none). When the pipe ends without the word `bye`, the supervisor is dead.

use std::io::{BufRead, Write};
use std::path::Path;

use tokio::sync::oneshot;

use super::reaper::Ended;
use super::record::Record;

/// The last line of a supervisor that ended in order.
const BYE: &str = "bye";

/// Runs until the pipe ends; then ends what the last record names. Returns what is still there.
pub fn watch(input: impl BufRead, runtime: &Path) -> Result<(), String> {
    let mut last: Option<Record> = None;
    for line in input.lines() {
        let Ok(line) = line else { break };
        if line == BYE {
            return Ok(());
        }
        last = serde_json::from_str(&line).ok();
    }
    let Some(record) = last else { return Ok(()) };
    record.end_leftovers()?;
    Record::remove(runtime);
    Ok(())
}

/// The supervisor's end of the pipe.
#[derive(Debug)]
pub struct Guarded<W: Write> {
    pipe: W,
    end: oneshot::Receiver<Ended>,
}

impl<W: Write> Guarded<W> {
    pub fn new(pipe: W, end: oneshot::Receiver<Ended>) -> Self {
        Self { pipe, end }
    }

    /// From now on this engine dies with us.
    pub fn tell(&mut self, record: Option<&Record>) -> std::io::Result<()> {
        let mut line = match record {
            Some(record) => serde_json::to_vec(record)?,
            None => Vec::new(),
        };
        line.push(b'\n');
        self.pipe.write_all(&line)?;
        self.pipe.flush()
    }

    /// Everything was ended in order; nothing is left to guard. The guard's own end comes next.
    pub fn bye(mut self) -> oneshot::Receiver<Ended> {
        // A guard that is gone needs no farewell.
        let _ = self.pipe.write_all(format!("{BYE}\n").as_bytes());
        self.end
    }
}
