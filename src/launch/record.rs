//! What is written down about a running engine, so that whoever comes after a killed sglangd can end
//! what it left: the guard at once, else the next start.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::leftovers::Leftovers;
use super::tree::{Tree, names};
use crate::sys::proc;

/// How long the processes of an earlier run get to die of SIGKILL.
const END_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Pids and start times mean nothing after a reboot.
    pub boot_id: String,
    pub tree: Tree,
    pub leftovers: Leftovers,
}

impl Record {
    pub fn path(runtime: &Path) -> PathBuf {
        runtime.join("engine.json")
    }

    /// Appears whole or not at all.
    pub fn write(&self, runtime: &Path) -> io::Result<()> {
        let temporary = runtime.join(".engine.json.new");
        fs::write(&temporary, serde_json::to_vec(self)?)?;
        fs::rename(temporary, Self::path(runtime))
    }

    /// The record of an earlier run; `None` where there is none. One that cannot be read is as good as
    /// none, but whoever starts next is told: an engine may still hold the GPUs.
    pub fn read(runtime: &Path) -> Option<Self> {
        let path = Self::path(runtime);
        let read = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => Err(error),
        };
        read.inspect_err(|error| {
            tracing::warn!(
                "{} cannot be read ({error}): what an earlier run may have left is not ended; look for it with ps",
                path.display()
            );
        })
        .ok()
    }

    pub fn remove(runtime: &Path) {
        // Already gone is what was wanted.
        let _ = fs::remove_file(Self::path(runtime));
    }

    /// Ends what this record names and removes its files. Returns the number of processes ended.
    ///
    /// # Errors
    /// The names of processes that not even SIGKILL ended.
    pub fn end_leftovers(&self) -> Result<usize, String> {
        let mut ended = 0;
        if self.boot_id == proc::boot_id() {
            ended = self.tree.members().len();
            let stuck = self.tree.kill_blocking(END_LIMIT);
            if !stuck.is_empty() {
                return Err(names(&stuck));
            }
            self.tree.tidy();
        }
        self.leftovers.sweep();
        Ok(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::tree::Leader;

    #[test]
    fn a_record_survives_being_written_and_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let record = Record {
            boot_id: proc::boot_id(),
            tree: Tree { launch_id: "ab".into(), leader: Some(Leader { pid: 7, start_time: 9 }), cgroup: None },
            leftovers: Leftovers::note(folder.path().join("none")),
        };
        record.write(folder.path()).expect("written");
        assert_eq!(Record::read(folder.path()), Some(record));
        Record::remove(folder.path());
        assert_eq!(Record::read(folder.path()), None);
    }
}
