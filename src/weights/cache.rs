//! The standard Hugging Face cache on the disk: where things are, what is there, and how a finished file
//! takes its place. Writes nothing but links, refs and the marker; blobs are written by `write`.
//!
//! ```text
//! models--owner--name/blobs/HASH                     the bytes, named by the hub's hash
//! models--owner--name/blobs/HASH.incomplete          its first bytes, by another tool
//! models--owner--name/blobs/HASH.sglangd.incomplete  bytes of it, and beside it (.ranges.incomplete) which
//! models--owner--name/snapshots/COMMIT/FILE          -> ../../blobs/HASH
//! models--owner--name/refs/main                      COMMIT
//! models--owner--name/.sglangd-complete-COMMIT.json  ours: what was proved, and when
//! .locks/models--owner--name/HASH.lock               huggingface_hub's lock
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ahead::{self, Place};
use super::error::FetchError;
use super::left::{Paths, left};
use super::name;
use super::plan::{Hash, Present, RemoteFile};

/// Whether the cache may be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    ReadWrite,
    ReadOnly,
}

/// One repository's part of the cache.
#[derive(Debug, Clone)]
pub struct RepoCache {
    /// The cache's root.
    pub root: PathBuf,
    /// `models--owner--name`.
    folder: String,
}

/// What an earlier run proved about one commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// Raised when the meaning of a field changes; another one is no marker.
    version: u32,
    pub files: BTreeMap<String, Proved>,
    /// Weight files the repository has and the run did not want: a run that wants them is not served by this marker.
    pub skipped: Vec<String>,
    pub listing: Listing,
}

/// Whose list of files a marker is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Listing {
    /// The hub's: all there are.
    Hub,
    /// Of what the cache had: the hub may have more.
    Cache,
}

/// One proved file: unchanged as long as the disk shows the same size, time and inode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proved {
    pub size: u64,
    pub hash: Hash,
    mtime_ns: i64,
    inode: u64,
}

const MARKER_VERSION: u32 = 1;

impl RepoCache {
    pub fn new(root: &Path, repo: &str) -> Self {
        Self { root: root.to_owned(), folder: format!("models--{}", repo.replace('/', "--")) }
    }

    /// `models--owner--name`.
    pub fn dir(&self) -> PathBuf {
        self.root.join(&self.folder)
    }

    pub fn blob(&self, hash: &Hash) -> PathBuf {
        self.dir().join("blobs").join(hash.hex())
    }

    /// Where a blob grows.
    pub fn growing(&self, hash: &Hash) -> Paths {
        Paths::beside(&self.dir().join("blobs").join(hash.hex()))
    }

    pub fn lock(&self, hash: &Hash) -> PathBuf {
        self.lock_folder().join(format!("{}.lock", hash.hex()))
    }

    pub fn lock_folder(&self) -> PathBuf {
        self.root.join(".locks").join(&self.folder)
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.dir().join("snapshots").join(commit)
    }

    pub fn marker_path(&self, commit: &str) -> PathBuf {
        self.dir().join(format!(".sglangd-complete-{commit}.json"))
    }

    /// The commit that a branch or tag pointed to when it was last fetched.
    pub fn read_ref(&self, revision: &str) -> Option<String> {
        if name::is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = fs::read_to_string(self.dir().join("refs").join(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| name::is_commit(commit))
    }

    /// Writes the ref, if it says something else: a read-only cache that is right stays untouched.
    pub fn write_ref(&self, revision: &str, commit: &str) -> Result<(), FetchError> {
        if name::is_commit(revision) || self.read_ref(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write_whole(&self.dir().join("refs").join(revision), commit.as_bytes())
    }

    /// What is there of one file of the hub's listing.
    pub fn present(&self, commit: &str, file: &RemoteFile, marker: Option<&Marker>) -> Present {
        let pointer = self.snapshot(commit).join(&file.name);
        if let (Some(proved), Ok(meta)) = (marker.and_then(|m| m.files.get(&file.name)), fs::metadata(&pointer))
            && proved.hash == file.hash
            && proved.size == file.size
            && proved.matches(&meta)
        {
            return Present::Verified;
        }
        // The pointer's own target wins over the blob of that name: without symlinks the pointer is the file.
        for path in [pointer, self.blob(&file.hash)] {
            if let Ok(meta) = fs::metadata(&path)
                && meta.is_file()
            {
                return Present::Whole(meta.len());
            }
        }
        left(&self.growing(&file.hash), file.size).map_or(Present::No, Present::Part)
    }

    /// Where the bytes of a file that is there are: the snapshot's, else the blob's.
    pub fn whole(&self, commit: &str, file: &RemoteFile) -> Option<PathBuf> {
        [self.snapshot(commit).join(&file.name), self.blob(&file.hash)].into_iter().find(|path| path.is_file())
    }

    /// Puts a finished blob into the snapshot under each of its names.
    pub fn link_all(&self, commit: &str, file: &RemoteFile, names: &[String]) -> Result<(), FetchError> {
        self.link_each(commit, file, names, |target, link| std::os::unix::fs::symlink(target, link))
    }

    fn link_each(
        &self,
        commit: &str,
        file: &RemoteFile,
        names: &[String],
        symlink: impl Fn(&Path, &Path) -> std::io::Result<()>,
    ) -> Result<(), FetchError> {
        for name in names {
            self.link(commit, &RemoteFile { name: name.clone(), ..file.clone() }, &symlink)?;
        }
        // Without links the blob is now the last name's file; the others can only be copies of it.
        let of = |name: &String| self.snapshot(commit).join(name);
        let Some(whole) = names.iter().map(of).find(|path| path.is_file()) else { return Ok(()) };
        for pointer in names.iter().map(of).filter(|path| !path.is_file()) {
            fs::copy(&whole, &pointer).map_err(|source| FetchError::disk(&pointer, &file.name, source))?;
        }
        Ok(())
    }

    /// Puts a finished blob into the snapshot. Where links do not work, the blob itself moves there:
    /// huggingface_hub does the same, and a copy would double 800 GB.
    fn link(
        &self,
        commit: &str,
        file: &RemoteFile,
        symlink: impl Fn(&Path, &Path) -> std::io::Result<()>,
    ) -> Result<(), FetchError> {
        let pointer = self.snapshot(commit).join(&file.name);
        let blob = self.blob(&file.hash);
        let depth = 1 + file.name.matches('/').count();
        let target = Path::new(&"../".repeat(depth + 1)).join("blobs").join(file.hash.hex());
        if !blob.exists() && pointer.is_file() {
            return Ok(());
        }
        if fs::read_link(&pointer).is_ok_and(|now| now == target) {
            return Ok(());
        }
        let disk = |source| FetchError::disk(&pointer, &file.name, source);
        if let Some(folder) = pointer.parent() {
            fs::create_dir_all(folder).map_err(disk)?;
        }
        // Made beside and renamed over, so that the name is never absent while somebody reads.
        let fresh = pointer.with_file_name(format!(".{}.sglangd", file.hash.hex()));
        remove(&fresh).map_err(disk)?;
        match symlink(&target, &fresh) {
            Ok(()) => fs::rename(&fresh, &pointer).map_err(disk),
            // Another of the file's names has it already.
            Err(error) if no_links_here(&error) && !blob.exists() => Ok(()),
            Err(error) if no_links_here(&error) => fs::rename(&blob, &pointer).map_err(disk),
            Err(error) => Err(disk(error)),
        }
    }

    /// Removes what stands where a right file is to come: a blob that is wrong, or the pointer that is one itself.
    pub fn discard(&self, commit: &str, file: &RemoteFile) -> Result<(), FetchError> {
        for path in [self.snapshot(commit).join(&file.name), self.blob(&file.hash)] {
            remove(&path).map_err(|source| FetchError::disk(&path, &file.name, source))?;
        }
        Ok(())
    }

    pub fn read_marker(&self, commit: &str) -> Option<Marker> {
        let text = fs::read(self.marker_path(commit)).ok()?;
        serde_json::from_slice::<Marker>(&text).ok().filter(|marker| marker.version == MARKER_VERSION)
    }

    /// Notes that `files` of `commit` are proved. Keeps what an earlier run proved of other files.
    pub fn write_marker(
        &self,
        commit: &str,
        files: &[RemoteFile],
        skipped: &[String],
        listing: Listing,
    ) -> Result<(), FetchError> {
        let before = self.read_marker(commit);
        let fresh = || Marker { version: MARKER_VERSION, files: BTreeMap::new(), skipped: vec![], listing };
        let mut marker = before.clone().unwrap_or_else(fresh);
        for file in files {
            let path = self.snapshot(commit).join(&file.name);
            let meta = fs::metadata(&path).map_err(|source| FetchError::Disk { path, source })?;
            marker.files.insert(file.name.clone(), Proved::new(file, &meta));
        }
        let proved = &marker.files;
        // The hub's list of a commit never changes; the cache's own says nothing against it.
        if listing == Listing::Hub || marker.listing == Listing::Cache {
            marker.skipped = skipped.iter().filter(|name| !proved.contains_key(*name)).cloned().collect();
            marker.listing = listing;
        }
        if before.as_ref() == Some(&marker) {
            return Ok(());
        }
        let text = serde_json::to_vec(&marker).expect("maps of strings and numbers always serialize");
        write_whole(&self.marker_path(commit), &text)
    }

    /// Whether the cache may be written to, without trying.
    pub fn access(&self) -> Access {
        use nix::unistd::{AccessFlags, access};
        // The nearest folder that exists decides: it is where the first mkdir would happen. Another user's cache may
        // be closed in one place and open in the other.
        let writable = |folder: PathBuf| {
            let nearest = folder.ancestors().find(|dir| dir.exists()).unwrap_or(&self.root);
            access(nearest, AccessFlags::W_OK).is_ok()
        };
        let mut all =
            ["blobs", "snapshots", "refs"].map(|part| self.dir().join(part)).into_iter().chain([self.lock_folder()]);
        if all.all(writable) { Access::ReadWrite } else { Access::ReadOnly }
    }

    /// Bytes free for this user on the cache's disk.
    pub fn free_space(&self) -> Result<u64, FetchError> {
        let nearest = self.nearest();
        let stat = nix::sys::statvfs::statvfs(nearest)
            .map_err(|errno| FetchError::Disk { path: nearest.to_owned(), source: errno.into() })?;
        Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
    }

    /// Whether its disk is this machine's own. What cannot be asked is none.
    pub fn is_on_own_disk(&self) -> bool {
        ahead::place(self.nearest()).is_ok_and(|place| place == Place::Local)
    }

    /// The lowest folder on its way that there is.
    fn nearest(&self) -> &Path {
        self.root.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"))
    }
}

impl Proved {
    fn new(file: &RemoteFile, meta: &fs::Metadata) -> Self {
        Self { size: file.size, hash: file.hash.clone(), mtime_ns: mtime_ns(meta), inode: meta.ino() }
    }

    /// Whether the disk still shows what was proved.
    pub fn matches(&self, meta: &fs::Metadata) -> bool {
        self.size == meta.len() && self.mtime_ns == mtime_ns(meta) && self.inode == meta.ino()
    }
}

fn mtime_ns(meta: &fs::Metadata) -> i64 {
    meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec())
}

/// FAT, some network and FUSE file systems.
fn no_links_here(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::Unsupported
        || matches!(error.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS))
}

fn remove(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes a small file that appears whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), FetchError> {
    let attempt = || -> std::io::Result<()> {
        let folder = path.parent().ok_or_else(|| std::io::Error::other("no folder"))?;
        fs::create_dir_all(folder)?;
        let mut file = tempfile::Builder::new().prefix(".sglangd-").tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        // Private by default; a shared cache is read by other users.
        file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        file.persist(path)?;
        Ok(())
    };
    attempt().map_err(|source| FetchError::disk(path, &path.display().to_string(), source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::plan::Transport;

    const COMMIT: &str = "5f0b02c75b57c5855da9ae460ce51323ea669d8a";

    fn file(name: &str) -> RemoteFile {
        RemoteFile { name: name.into(), size: 3, hash: Hash::GitBlob("ab".repeat(20)), transport: Transport::Http }
    }

    #[test]
    fn a_file_in_a_subfolder_links_to_the_blob() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(root.path(), "a/b");
        let file = file("sub/deeper/x.json");
        fs::create_dir_all(cache.blob(&file.hash).parent().unwrap()).unwrap();
        fs::write(cache.blob(&file.hash), "abc").unwrap();
        let names = [file.name.clone()];
        cache.link_all(COMMIT, &file, &names).unwrap();
        cache.link_all(COMMIT, &file, &names).unwrap();
        assert_eq!(fs::read_to_string(cache.snapshot(COMMIT).join("sub/deeper/x.json")).unwrap(), "abc");
        assert_eq!(cache.present(COMMIT, &file, None), Present::Whole(3));
    }

    #[test]
    fn h11_without_symlinks_the_blob_becomes_the_file_and_only_a_second_name_costs_a_copy() {
        for refusal in [libc::EPERM, libc::EOPNOTSUPP, libc::ENOSYS] {
            let root = tempfile::tempdir().unwrap();
            let cache = RepoCache::new(root.path(), "a/b");
            let file = file("x.json");
            fs::create_dir_all(cache.blob(&file.hash).parent().unwrap()).unwrap();
            fs::write(cache.blob(&file.hash), "abc").unwrap();
            let names = ["x.json", "sub/y.json"].map(ToOwned::to_owned);
            let no_links = |_: &Path, _: &Path| Err(std::io::Error::from_raw_os_error(refusal));
            cache.link_each(COMMIT, &file, &names, no_links).unwrap();
            for name in &names {
                assert_eq!(fs::read_to_string(cache.snapshot(COMMIT).join(name)).unwrap(), "abc", "{name}");
            }
            assert!(!cache.blob(&file.hash).exists(), "the weights lie there twice");
            assert_eq!(cache.present(COMMIT, &file, None), Present::Whole(3));
            // Again, as the next start would: nothing is lost.
            cache.link_each(COMMIT, &file, &names, no_links).unwrap();
            assert_eq!(fs::read_to_string(cache.snapshot(COMMIT).join("x.json")).unwrap(), "abc");
        }
    }

    #[test]
    fn h01_a_marker_stops_proving_a_file_that_was_touched() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(root.path(), "a/b");
        let file = file("x.json");
        fs::create_dir_all(cache.blob(&file.hash).parent().unwrap()).unwrap();
        fs::write(cache.blob(&file.hash), "abc").unwrap();
        cache.link_all(COMMIT, &file, std::slice::from_ref(&file.name)).unwrap();
        cache.write_marker(COMMIT, std::slice::from_ref(&file), &[], Listing::Hub).unwrap();
        let marker = cache.read_marker(COMMIT);
        assert_eq!(cache.present(COMMIT, &file, marker.as_ref()), Present::Verified);
        fs::remove_file(cache.blob(&file.hash)).unwrap();
        fs::write(cache.blob(&file.hash), "abd").unwrap();
        assert_eq!(cache.present(COMMIT, &file, marker.as_ref()), Present::Whole(3));
    }

    #[test]
    fn a_ref_is_written_once_and_a_broken_one_is_no_ref() {
        let root = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(root.path(), "a/b");
        assert_eq!(cache.read_ref("refs/pr/1"), None);
        cache.write_ref("refs/pr/1", COMMIT).unwrap();
        assert_eq!(cache.read_ref("refs/pr/1").as_deref(), Some(COMMIT));
        fs::write(cache.dir().join("refs/main"), "garbage").unwrap();
        assert_eq!(cache.read_ref("main"), None);
    }
}
