//! What an earlier run left of a blob: its own file with gaps and the journal of them, or another tool's beginning.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::journal;
use super::ranges::Ranges;

/// Where a blob lies while it grows.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Ours, with gaps: a name that huggingface_hub does not take for the beginning of a file.
    pub data: PathBuf,
    pub journal: PathBuf,
    /// huggingface_hub's and hf-hub's: always a beginning. Taken over when there is none of ours.
    pub foreign: PathBuf,
}

impl Paths {
    /// Of the blob that is to lie there.
    pub fn beside(blob: &Path) -> Self {
        let beside = |end: &str| {
            let mut path = blob.as_os_str().to_owned();
            path.push(end);
            PathBuf::from(path)
        };
        Self {
            data: beside(".sglangd.incomplete"),
            journal: beside(".sglangd.ranges.incomplete"),
            foreign: beside(".incomplete"),
        }
    }
}

/// Bytes of a file that an earlier run left; none: it left nothing.
pub fn left(paths: &Paths, size: u64) -> Option<u64> {
    let counted = counted(paths, size, &journal::boot()).map(|done| done.total());
    counted.or_else(|| std::fs::metadata(&paths.foreign).ok().map(|meta| meta.len()).filter(|len| *len <= size))
}

pub(super) fn counted(paths: &Paths, size: u64, boot: &str) -> Option<Ranges> {
    let len = std::fs::metadata(&paths.data).ok()?.len();
    journal::read(&paths.journal, size, len, boot)
}

/// Makes another tool's beginning ours.
pub(super) fn take_over(paths: &Paths, size: u64) -> std::io::Result<Option<Ranges>> {
    let len = match std::fs::metadata(&paths.foreign) {
        Ok(meta) => meta.len(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if len > size {
        return Ok(None);
    }
    std::fs::rename(&paths.foreign, &paths.data)?;
    Ok(Some(Ranges::one(0..len)))
}
