//! A blob while it grows: bytes go into `HASH.incomplete` and through the hash, and the file takes its
//! final name only when it is whole and right. Everything here blocks: run it off the runtime.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::plan::{Hash, RemoteFile};
use super::verify::{self, Hasher};

/// Bytes between two pushes to the disk. What is not pushed is lost in a power cut (not in a kill); pushing
/// rarely leaves one long stop at the end of each file.
const SYNC_EACH: u64 = 64 << 20;

#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    file: File,
    hash: Hash,
    hasher: Hasher,
    size: u64,
    len: u64,
    unsynced: u64,
}

/// How a whole file ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Finished {
    Right,
    /// The bytes hash to something else; the file is gone.
    Wrong {
        got: String,
    },
}

impl Partial {
    /// Opens what an earlier run left, hashing it, or begins anew. Whoever calls holds the blob's lock.
    pub fn open(path: &Path, remote: &RemoteFile) -> std::io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut hasher = Hasher::new(&remote.hash, remote.size);
        let mut len = file.metadata()?.len();
        if len > remote.size {
            file.set_len(0)?;
            len = 0;
        }
        verify::feed(&mut file, len, |bytes| hasher.update(bytes))?;
        file.seek(SeekFrom::Start(len))?;
        Ok(Self { path: path.to_owned(), file, hash: remote.hash.clone(), hasher, size: remote.size, len, unsynced: 0 })
    }

    /// Bytes there.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_whole(&self) -> bool {
        self.len == self.size
    }

    /// Bytes that still fit; more than these are not this file's.
    pub fn room(&self) -> u64 {
        self.size - self.len
    }

    pub fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        self.unsynced += bytes.len() as u64;
        if self.unsynced >= SYNC_EACH {
            self.file.sync_data()?;
            self.unsynced = 0;
        }
        Ok(())
    }

    /// Throws the bytes away: the next one is the file's first.
    pub fn restart(&mut self) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hasher = Hasher::new(&self.hash, self.size);
        self.len = 0;
        self.unsynced = 0;
        Ok(())
    }

    /// Compares and, if right, gives the file its final name. Only for a whole one.
    pub fn finish(mut self, blob: &Path) -> std::io::Result<(Finished, Self)> {
        let got = self.hasher.clone().hex();
        if got != self.hash.hex() {
            self.restart()?;
            return Ok((Finished::Wrong { got }, self));
        }
        // Data before name: a power cut must not leave a right name on wrong bytes.
        self.file.sync_all()?;
        std::fs::rename(&self.path, blob)?;
        if let Some(folder) = blob.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok((Finished::Right, self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::plan::Transport;

    fn hello() -> RemoteFile {
        RemoteFile {
            name: "hello.txt".into(),
            size: 6,
            hash: Hash::GitBlob("ce013625030ba8dba906f756967f9e9ca394464a".into()),
            transport: Transport::Http,
        }
    }

    #[test]
    fn h09_what_an_earlier_run_left_is_continued_and_the_name_comes_last() {
        let dir = tempfile::tempdir().unwrap();
        let (part, blob) = (dir.path().join("blobs/x.incomplete"), dir.path().join("blobs/x"));
        let mut partial = Partial::open(&part, &hello()).unwrap();
        partial.write(b"hel").unwrap();
        drop(partial);
        let mut partial = Partial::open(&part, &hello()).unwrap();
        assert_eq!((partial.len(), partial.room()), (3, 3));
        partial.write(b"lo\n").unwrap();
        assert!(!blob.exists(), "half a file under its final name");
        assert_eq!(partial.finish(&blob).unwrap().0, Finished::Right);
        assert_eq!(std::fs::read(&blob).unwrap(), b"hello\n");
        assert!(!part.exists());
    }

    #[test]
    fn h01_a_wrong_file_never_gets_its_name_and_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (part, blob) = (dir.path().join("x.incomplete"), dir.path().join("x"));
        std::fs::write(&part, b"HEL").unwrap();
        let mut partial = Partial::open(&part, &hello()).unwrap();
        partial.write(b"lo\n").unwrap();
        let (finished, mut partial) = partial.finish(&blob).unwrap();
        assert!(matches!(finished, Finished::Wrong { .. }));
        assert!(!blob.exists());
        partial.write(b"hello\n").unwrap();
        assert_eq!(partial.finish(&blob).unwrap().0, Finished::Right);
    }

    #[test]
    fn a_leftover_longer_than_the_file_is_thrown_away() {
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("x.incomplete");
        std::fs::write(&part, b"hello\nhello\n").unwrap();
        assert_eq!(Partial::open(&part, &hello()).unwrap().len(), 0);
    }
}
