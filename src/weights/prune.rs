//! Which parts of the cache nobody needs any more, and their removal: old snapshots, blobs that no snapshot leads to,
//! leftovers of fetches, locks that nobody holds. What is used, held, fetched or young stays, with the reason.
//!
//! ```text
//! inventory ─► plan (pure but for the locks asked) ─► shown ─► remove, each part under its lock
//! ```

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::inventory::{Kept, Piece, Revision, hash_of};
use super::uses::Uses;
use super::{RepoCache, hold, lock};

/// Seconds. What was written this lately may be somebody's who is at work without a lock, as between two files.
const YOUNG: i64 = 3600;

/// What is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A revision that no branch or tag points to, older than another one.
    Snapshot,
    /// Content that no snapshot leads to.
    Blob,
    /// A download that was begun and left, or another file of a fetch that was killed.
    Leftover,
    /// A lock that nobody holds.
    Lock,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Removal {
    pub repo: String,
    pub kind: Kind,
    pub path: PathBuf,
    /// What it frees by itself; a snapshot's blobs have lines of their own.
    pub bytes: u64,
}

/// What would be removed, were it not for `why`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Spared {
    pub repo: String,
    pub path: PathBuf,
    pub why: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Tidying {
    pub removals: Vec<Removal>,
    pub spared: Vec<Spared>,
}

impl Tidying {
    pub fn bytes(&self) -> u64 {
        self.removals.iter().map(|removal| removal.bytes).sum()
    }
}

/// Decides about one repository at `now`, in seconds since 1970. `wanted` are commits that stay whatever points to them.
pub fn plan(kept: &Kept, uses: &Uses, wanted: &[String], now: i64) -> Tidying {
    let mut tidying = Tidying::default();
    let spare = |path: &Path, why: String| Spared { repo: kept.repo.clone(), path: path.to_owned(), why };
    if let Some(who) = fetching(kept) {
        tidying.spared.push(spare(&kept.folder, format!("is being fetched by {who}")));
        return tidying;
    }
    let remove = |kind, path: &Path, bytes| Removal { repo: kept.repo.clone(), kind, path: path.to_owned(), bytes };
    let mut needed: HashSet<&str> = HashSet::new();
    let newest = kept.snapshots.iter().max_by_key(|revision| revision.fetched).map(|revision| &revision.commit);
    for revision in &kept.snapshots {
        let stays = !revision.refs.is_empty() || wanted.contains(&revision.commit) || newest == Some(&revision.commit);
        let used = user(revision, uses);
        if stays || used.is_some() || is_young(revision.fetched, now) {
            needed.extend(revision.blobs.iter().map(String::as_str));
        }
        if stays {
            continue;
        }
        match used {
            Some(who) => tidying.spared.push(spare(&revision.folder, format!("is used by {who}"))),
            None if is_young(revision.fetched, now) => tidying.spared.push(spare(&revision.folder, young())),
            None => {
                let own = if revision.blobs.is_empty() { revision.bytes } else { 0 };
                tidying.removals.push(remove(Kind::Snapshot, &revision.folder, own));
            }
        }
    }
    let loose = kept.blobs.iter().filter(|blob| !needed.contains(blob.name.as_str()));
    let loose = loose.map(|blob| (Kind::Blob, &blob.piece));
    for (kind, piece) in loose.chain(kept.leftovers.iter().map(|piece| (Kind::Leftover, piece))) {
        match in_the_way(piece, uses, now) {
            Some(why) => tidying.spared.push(spare(&piece.path, why)),
            None => tidying.removals.push(remove(kind, &piece.path, piece.bytes)),
        }
    }
    for path in &kept.locks {
        let written = fs::metadata(path).map_or(now, |meta| meta.mtime());
        if !is_young(written, now) {
            tidying.removals.push(remove(Kind::Lock, path, 0));
        }
    }
    tidying
}

/// Who fetches into this repository just now.
pub fn fetching(kept: &Kept) -> Option<String> {
    let holder = |path: &Path| lock::holder(path).unwrap_or_else(|| "a process this one cannot see".to_owned());
    let held = |path: &&PathBuf| matches!(lock::try_acquire(path), Ok(None));
    if let Some(path) = kept.locks.iter().find(held) {
        return Some(holder(path));
    }
    matches!(hold::claim(&kept.folder), Ok(None)).then(|| holder(&kept.folder))
}

/// Who needs this snapshot: by a lock, an open folder, an open or mapped file, or a command line.
pub fn user(revision: &Revision, uses: &Uses) -> Option<String> {
    if matches!(hold::claim(&revision.folder), Ok(None)) {
        return Some(lock::holder(&revision.folder).unwrap_or_else(|| "a process this one cannot see".to_owned()));
    }
    let file = || revision.inodes.iter().find_map(|inode| uses.of_file(Path::new(""), *inode));
    uses.of_folder(&revision.folder).or_else(file).map(str::to_owned)
}

fn in_the_way(piece: &Piece, uses: &Uses, now: i64) -> Option<String> {
    let used = uses.of_file(&piece.path, piece.inode).map(|who| format!("is used by {who}"));
    used.or_else(|| is_young(piece.written, now).then(young))
}

/// A clock that was set back makes a file young, which only spares it.
fn is_young(written: i64, now: i64) -> bool {
    now - written < YOUNG
}

fn young() -> String {
    "was written less than an hour ago: somebody may be at it".to_owned()
}

/// Removes it all; what could not be removed comes back with the reason. Whoever comes meanwhile is seen: each part is
/// removed under the lock that its users take.
pub fn remove(root: &Path, tidying: &Tidying) -> Vec<(PathBuf, std::io::Error)> {
    let mut failed = Vec::new();
    let mut at = 0;
    while let Some(first) = tidying.removals.get(at) {
        let end =
            tidying.removals[at..].iter().position(|r| r.repo != first.repo).map_or(tidying.removals.len(), |n| at + n);
        let cache = RepoCache::new(root, &first.repo);
        // Fetchers hold it while they fetch, and wait while somebody tidies.
        match hold::claim(&cache.dir()) {
            Ok(Some(_claimed)) => {
                for removal in &tidying.removals[at..end] {
                    if let Err(error) = remove_one(&cache, removal) {
                        failed.push((removal.path.clone(), error));
                    }
                }
            }
            Ok(None) => failed.push((cache.dir(), std::io::Error::other("somebody began to fetch it"))),
            Err(error) => failed.push((cache.dir(), error)),
        }
        at = end;
    }
    failed
}

fn remove_one(cache: &RepoCache, removal: &Removal) -> std::io::Result<()> {
    let busy = || std::io::Error::other("somebody began to use it");
    match removal.kind {
        Kind::Snapshot => {
            let _claimed = hold::claim(&removal.path)?.ok_or_else(busy)?;
            if let Some(commit) = removal.path.file_name().and_then(|n| n.to_str()) {
                // The marker first: a snapshot that is half gone is not to be called complete.
                gone(fs::remove_file(cache.marker_path(commit)))?;
                gone(fs::remove_dir_all(cache.dir().join(".no_exist").join(commit)))?;
                // What huggingface_hub keeps of its listing.
                gone(fs::remove_file(cache.dir().join("trees").join(format!("{commit}.json"))))?;
            }
            gone(fs::remove_dir_all(&removal.path))
        }
        Kind::Blob | Kind::Leftover => {
            let name = removal.path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let lock = cache.lock_folder().join(format!("{}.lock", hash_of(name).unwrap_or(name)));
            let _locked = match lock::try_acquire(&lock) {
                Ok(locked) => Some(locked.ok_or_else(busy)?),
                Err(error) if error.kind() == ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
            gone(fs::remove_file(&removal.path))
        }
        Kind::Lock => {
            // Who waits for it sees that it lost its name, and makes a new one.
            let Some(_held) = lock::try_acquire(&removal.path)? else { return Err(busy()) };
            gone(fs::remove_file(&removal.path))
        }
    }
}

/// Gone already is what was wished.
fn gone(removed: std::io::Result<()>) -> std::io::Result<()> {
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
