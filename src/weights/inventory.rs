//! What lies in the cache: repositories with their snapshots, blobs, leftovers and locks, as the disk shows them.
//! Changes nothing, and says nothing about who uses what.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::plan::Hash;
use super::{RepoCache, name};

/// Levels of folders in a snapshot before it is called a mistake.
const DEEPEST: usize = 64;

/// One repository's part of the cache.
#[derive(Debug, Clone, Serialize)]
pub struct Kept {
    /// `owner/name`.
    pub repo: String,
    pub folder: PathBuf,
    pub snapshots: Vec<Revision>,
    #[serde(skip)]
    pub blobs: Vec<Blob>,
    /// Begun downloads, files of a write that was killed, markers without a snapshot.
    pub leftovers: Vec<Piece>,
    #[serde(skip)]
    pub locks: Vec<PathBuf>,
}

/// One snapshot.
#[derive(Debug, Clone, Serialize)]
pub struct Revision {
    pub commit: String,
    pub folder: PathBuf,
    /// Branches and tags that point to it.
    pub refs: Vec<String>,
    pub files: u64,
    /// Of its files, whoever shares their blobs.
    pub bytes: u64,
    /// When a file of it, or its marker, was last read (seconds since 1970); a disk that notes no times says when it was written.
    #[serde(rename = "last_used_unix")]
    pub last_used: i64,
    #[serde(rename = "fetched_unix")]
    pub fetched: i64,
    /// The blobs that its links lead to, by name; in a cache without links it is the files themselves.
    #[serde(skip)]
    pub blobs: Vec<String>,
    /// Device and inode of every file.
    #[serde(skip)]
    pub inodes: Vec<(u64, u64)>,
}

/// A whole file, named by its hash.
#[derive(Debug, Clone)]
pub struct Blob {
    pub name: String,
    pub piece: Piece,
}

#[derive(Debug, Clone, Serialize)]
pub struct Piece {
    pub path: PathBuf,
    /// On the disk: a file with holes takes less than its length.
    pub bytes: u64,
    #[serde(skip)]
    pub written: i64,
    #[serde(skip)]
    pub inode: (u64, u64),
}

impl Piece {
    fn new(path: PathBuf, meta: &Metadata) -> Self {
        let bytes = if meta.is_dir() { 0 } else { meta.blocks().saturating_mul(512) };
        Self { path, bytes, written: meta.mtime(), inode: (meta.dev(), meta.ino()) }
    }
}

impl Kept {
    /// Bytes of all its blobs and of what lies beside them.
    pub fn bytes(&self) -> u64 {
        let blobs: u64 = self.blobs.iter().map(|blob| blob.piece.bytes).sum();
        let linked = |revision: &&Revision| revision.blobs.is_empty();
        let files: u64 = self.snapshots.iter().filter(linked).map(|revision| revision.bytes).sum();
        blobs + files + self.leftovers.iter().map(|piece| piece.bytes).sum::<u64>()
    }
}

/// All models of the cache, by name. Data sets and spaces are other programs'.
pub fn look(root: &Path) -> std::io::Result<Vec<Kept>> {
    let mut all = Vec::new();
    for (folder, _) in entries(root)? {
        let named = folder.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix("models--"));
        let Some(repo) = named.map(|n| n.replacen("--", "/", 1)).filter(|repo| name::refuse_repo(repo).is_none())
        else {
            continue;
        };
        all.push(look_at(root, &repo)?);
    }
    all.sort_by(|a, b| a.repo.cmp(&b.repo));
    Ok(all)
}

fn look_at(root: &Path, repo: &str) -> std::io::Result<Kept> {
    let cache = RepoCache::new(root, repo);
    let folder = cache.dir();
    let mut refs: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut leftovers = Vec::new();
    walk(&folder.join("refs"), 0, &mut |path, meta| {
        let revision = path.strip_prefix(folder.join("refs")).ok().and_then(Path::to_str).unwrap_or_default();
        match cache.read_ref(revision) {
            Some(commit) => refs.entry(commit).or_default().push(revision.to_owned()),
            None if is_ours(path) => leftovers.push(Piece::new(path.to_owned(), meta)),
            None => {}
        }
    })?;
    let mut snapshots = Vec::new();
    for (path, meta) in entries(&folder.join("snapshots"))? {
        let commit = path.file_name().and_then(|n| n.to_str()).filter(|n| name::is_commit(n)).map(str::to_owned);
        if let Some(commit) = commit.filter(|_| meta.is_dir()) {
            let refs = refs.get(&commit).cloned().unwrap_or_default();
            snapshots.push(revision(&cache, commit, refs, &meta, &mut leftovers)?);
        }
    }
    snapshots.sort_by_key(|revision| revision.fetched);
    let mut blobs = Vec::new();
    for (path, meta) in entries(&folder.join("blobs"))? {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        let piece = Piece::new(path, &meta);
        match Hash::from_hex(&name) {
            Some(_) => blobs.push(Blob { name, piece }),
            None if hash_of(&name).is_some() => leftovers.push(piece),
            // Nothing that a fetcher of models makes.
            None => {}
        }
    }
    for (path, meta) in entries(&folder)? {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let marks = name.strip_prefix(".sglangd-complete-").and_then(|rest| rest.strip_suffix(".json"));
        let stray = marks.is_some_and(|commit| !cache.snapshot(commit).is_dir());
        if meta.is_file() && (stray || marks.is_none() && is_ours(&path)) {
            leftovers.push(Piece::new(path, &meta));
        }
    }
    let locks = cache.lock_folder();
    let locks =
        entries(&locks)?.into_iter().map(|(path, _)| path).filter(|p| p.extension().is_some_and(|e| e == "lock"));
    Ok(Kept { repo: repo.to_owned(), snapshots, blobs, leftovers, locks: locks.collect(), folder })
}

fn revision(
    cache: &RepoCache,
    commit: String,
    refs: Vec<String>,
    own: &Metadata,
    leftovers: &mut Vec<Piece>,
) -> std::io::Result<Revision> {
    let folder = cache.snapshot(&commit);
    let mut found = Revision {
        commit,
        refs,
        files: 0,
        bytes: 0,
        last_used: 0,
        fetched: own.mtime(),
        blobs: Vec::new(),
        inodes: Vec::new(),
        folder: folder.clone(),
    };
    walk(&folder, 0, &mut |path, meta| {
        if is_ours(path) {
            leftovers.push(Piece::new(path.to_owned(), meta));
            return;
        }
        let target = fs::read_link(path).ok();
        // A link without its blob is no file, and no space either.
        let Ok(meta) = fs::metadata(path) else { return };
        found.files += 1;
        found.bytes += meta.len();
        found.last_used = found.last_used.max(meta.atime().max(meta.mtime()));
        found.inodes.push((meta.dev(), meta.ino()));
        found.blobs.extend(target.as_deref().and_then(Path::file_name).and_then(|n| n.to_str()).map(str::to_owned));
    })?;
    if let Ok(marker) = fs::metadata(cache.marker_path(&found.commit)) {
        // Each start reads it.
        found.last_used = found.last_used.max(marker.atime().max(marker.mtime()));
    }
    Ok(found)
}

/// The hash that a file in `blobs` is to become: `HASH.incomplete` and what fetchers note beside it.
pub fn hash_of(name: &str) -> Option<&str> {
    let (hash, _) = name.split_once('.')?;
    Hash::from_hex(hash).map(|_| hash)
}

/// Temporary names of ours; a finished file has another one.
fn is_ours(path: &Path) -> bool {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    name.starts_with(".sglangd-") || (name.starts_with('.') && name.ends_with(".sglangd"))
}

/// Files below `folder`, links as links; a folder that is not there is empty.
fn walk(folder: &Path, depth: usize, found: &mut dyn FnMut(&Path, &Metadata)) -> std::io::Result<()> {
    for (path, meta) in entries(folder)? {
        if meta.is_dir() && depth < DEEPEST {
            walk(&path, depth + 1, found)?;
        } else if !meta.is_dir() {
            found(&path, &meta);
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> std::io::Result<Vec<(PathBuf, Metadata)>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        other => other?,
    };
    let mut all = Vec::new();
    for entry in entries {
        let path = entry?.path();
        // Gone since it was listed: somebody finishes a file.
        if let Ok(meta) = fs::symlink_metadata(&path) {
            all.push((path, meta));
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_become_a_blob_is_told_by_its_hash() {
        let hash = "ab".repeat(32);
        assert_eq!(hash_of(&format!("{hash}.incomplete")), Some(hash.as_str()));
        assert_eq!(hash_of(&format!("{hash}.1f2e.incomplete")), Some(hash.as_str()));
        assert_eq!(hash_of("notes.txt"), None);
        assert_eq!(hash_of(&hash), None, "a whole blob");
    }
}
