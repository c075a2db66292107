//! Measures the folders of compiled kernels, to see whether they grow, and whether they outlive the machine.
//!
//! A measure is bounded: it looks at so many entries and no more, whatever lies there.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Entries looked at in one measure: some 50 ms on a disk that is warm. Triton's cache of a large model has
/// some thousand.
const MOST: u64 = 20_000;

/// The extent of some folders.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extent {
    pub entries: u64,
    pub bytes: u64,
    /// The newest change, in nanoseconds of the wall clock.
    pub newest: u128,
}

/// Blocking. What cannot be read counts as nothing; links are not followed.
pub fn measure(folders: &[PathBuf]) -> Extent {
    let mut extent = Extent::default();
    let mut open: Vec<PathBuf> = folders.to_vec();
    while let Some(folder) = open.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            if extent.entries == MOST {
                return extent;
            }
            extent.entries += 1;
            let Ok(about) = entry.metadata() else { continue };
            if about.is_dir() {
                open.push(entry.path());
            } else {
                extent.bytes += about.len();
            }
            let changed = about.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
            extent.newest = extent.newest.max(changed.map_or(0, |since| since.as_nanos()));
        }
    }
    extent
}

/// Whether a folder is gone with the container or the next boot, as far as its file system tells.
pub fn is_short_lived(folder: &Path) -> bool {
    const TMPFS: u64 = 0x0102_1994;
    const OVERLAY: u64 = 0x794c_7630;
    const RAMFS: u64 = 0x8584_58f6;
    rustix::fs::statfs(folder).is_ok_and(|about| [TMPFS, OVERLAY, RAMFS].contains(&(about.f_type as u64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_written_down_changes_the_measure() {
        let folder = tempfile::tempdir().unwrap();
        let folders = [folder.path().to_owned(), folder.path().join("nowhere")];
        assert_eq!(measure(&folders), Extent::default());
        let deep = folder.path().join("a/b/c");
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("kernel.cubin"), [0; 100]).unwrap();
        let first = measure(&folders);
        assert_eq!((first.entries, first.bytes), (4, 100));
        assert_eq!(measure(&folders), first, "nothing happened");
        fs::write(deep.join("kernel.cubin"), [0; 101]).unwrap();
        assert_ne!(measure(&folders), first);
        std::os::unix::fs::symlink("/", folder.path().join("away")).unwrap();
        assert_eq!(measure(&folders).entries, 5, "a link leads nowhere");
    }
}
