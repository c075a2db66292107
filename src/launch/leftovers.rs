//! Removes what a killed engine leaves: its TMPDIR, and its files in `/dev/shm`.
//!
//! After some 25 starts that ended in every way, 36 files lay there (`sem.mp-*`, `sgl_shm_mq_*`,
//! `sglang_loads_*`); a container's 64 MiB fill up. A file is removed only if its name is one of the
//! engine's, it appeared after the launch, it is ours, and no living process has it mapped or open.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::sys::proc;

const SHM: &str = "/dev/shm";
const ENGINE_NAMES: [&str; 4] = ["sem.mp-", "sgl_shm_mq_", "sglang_loads_", "nccl-"];

/// What a launch may leave behind, noted before it began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leftovers {
    /// The launch's own TMPDIR.
    pub tmpdir: PathBuf,
    /// Files with the engine's names that were in `/dev/shm` before: other programs'.
    pub shm_before: BTreeSet<String>,
}

impl Leftovers {
    /// Call before the launch.
    pub fn note(tmpdir: PathBuf) -> Self {
        Self { tmpdir, shm_before: engine_files(Path::new(SHM)) }
    }

    /// Removes everything; call when no process of the engine is left. Returns what was removed.
    pub fn sweep(&self) -> Vec<PathBuf> {
        let mut removed = Vec::new();
        if fs::remove_dir_all(&self.tmpdir).is_ok() {
            removed.push(self.tmpdir.clone());
        }
        let new: BTreeSet<String> = engine_files(Path::new(SHM)).difference(&self.shm_before).cloned().collect();
        if new.is_empty() {
            return removed;
        }
        let in_use: BTreeSet<String> = proc::all().iter().flat_map(|process| proc::mapped_shm(process.pid)).collect();
        for name in new.difference(&in_use) {
            let path = Path::new(SHM).join(name);
            if fs::remove_file(&path).is_ok() {
                removed.push(path);
            }
        }
        removed
    }
}

fn engine_files(folder: &Path) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir(folder) else { return BTreeSet::new() };
    let own = nix::unistd::geteuid().as_raw();
    entries
        .flatten()
        .filter(|entry| entry.metadata().is_ok_and(|m| m.is_file() && m.uid() == own))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| ENGINE_NAMES.iter().any(|prefix| name.starts_with(prefix)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_engines_names_count() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["sem.mp-abc", "sgl_shm_mq_42_x", "sglang_loads_1", "nccl-7", "sem.other", "mine"] {
            fs::write(folder.path().join(name), b"").expect("written");
        }
        let names: Vec<String> = engine_files(folder.path()).into_iter().collect();
        assert_eq!(names, ["nccl-7", "sem.mp-abc", "sgl_shm_mq_42_x", "sglang_loads_1"]);
    }

    #[test]
    fn a_file_that_somebody_maps_or_that_was_there_before_stays() {
        let name = |n: &str| format!("sem.mp-sglangd-test-{}-{n}", std::process::id());
        let (before, held, left) = (name("before"), name("held"), name("left"));
        fs::write(Path::new(SHM).join(&before), b"x").expect("written");
        let folder = tempfile::tempdir().expect("a folder");
        let tmpdir = folder.path().join("tmp");
        fs::create_dir(&tmpdir).expect("made");
        let leftovers = Leftovers::note(tmpdir.clone());
        fs::write(Path::new(SHM).join(&left), b"x").expect("written");
        let open = fs::File::create(Path::new(SHM).join(&held)).expect("made");
        let removed = leftovers.sweep();
        assert!(removed.contains(&tmpdir) && removed.contains(&Path::new(SHM).join(&left)), "{removed:?}");
        assert!(Path::new(SHM).join(&before).exists(), "it was there before the launch");
        assert!(Path::new(SHM).join(&held).exists(), "this process has it open");
        drop(open);
        for n in [before, held] {
            fs::remove_file(Path::new(SHM).join(n)).expect("cleaned up");
        }
    }
}
