//! Whether bytes are the hub's: hashes over content, and the length a safetensors file says of itself.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use sha1::{Digest as _, Sha1};

use super::plan::Hash;
use super::sha256::Sha256;

/// Large enough that a disk is read at its speed, small enough that eight of them are nothing.
const STEP: usize = 1 << 20;
/// A header beyond this is no header (the safetensors library's own limit).
const LARGEST_HEADER: u64 = 100_000_000;

/// One of the hub's two hashes, fed as the bytes pass.
#[derive(Debug, Clone)]
pub enum Hasher {
    Sha256(Sha256),
    GitBlob(Sha1),
    /// Nothing to compare with.
    Unknown,
}

impl Hasher {
    pub fn new(hash: &Hash, size: u64) -> Self {
        match hash {
            Hash::Sha256(_) => Self::Sha256(Sha256::default()),
            Hash::GitBlob(_) => {
                let mut sha1 = Sha1::new();
                sha1.update(format!("blob {size}\0"));
                Self::GitBlob(sha1)
            }
            Hash::Unknown => Self::Unknown,
        }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::GitBlob(hasher) => hasher.update(bytes),
            Self::Unknown => {}
        }
    }

    /// Feeds both, in less time than one after the other where their kind allows.
    pub fn update_both([a, b]: [&mut Self; 2], [bytes_a, bytes_b]: [&[u8]; 2]) {
        match (a, b) {
            (Self::Sha256(a), Self::Sha256(b)) => Sha256::update_both([a, b], [bytes_a, bytes_b]),
            (a, b) => {
                a.update(bytes_a);
                b.update(bytes_b);
            }
        }
    }

    /// Lower-case hex; empty for the unknown.
    pub fn hex(self) -> String {
        match self {
            Self::Sha256(hasher) => hex(&hasher.finish()),
            Self::GitBlob(hasher) => hex(&hasher.finalize()),
            Self::Unknown => String::new(),
        }
    }
}

pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reads a file and returns its hash, counting bytes into `done`. Blocks.
pub fn hash_file(path: &Path, hash: &Hash, size: u64, done: &AtomicU64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Hasher::new(hash, size);
    feed(&mut file, u64::MAX, |bytes| {
        hasher.update(bytes);
        done.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    })?;
    Ok(hasher.hex())
}

/// Hands at most `most` bytes of `file` to `take`, in steps.
pub fn feed(file: &mut File, most: u64, mut take: impl FnMut(&[u8])) -> std::io::Result<()> {
    let mut buffer = vec![0; STEP];
    let mut left = most;
    while left > 0 {
        let room = usize::try_from(left).unwrap_or(STEP).min(STEP);
        match file.read(&mut buffer[..room]) {
            Ok(0) => break,
            Ok(n) => {
                take(&buffer[..n]);
                left -= n as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The length that a safetensors file's own header promises; none: it has no such header.
/// Without the hub this is what tells a truncated shard from a whole one.
pub fn safetensors_length(path: &Path) -> std::io::Result<Option<u64>> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    if let Err(error) = file.read_exact(&mut length) {
        return if error.kind() == ErrorKind::UnexpectedEof { Ok(None) } else { Err(error) };
    }
    let header = u64::from_le_bytes(length);
    if header > LARGEST_HEADER || header > file.metadata()?.len() {
        return Ok(None);
    }
    let mut text = Vec::new();
    file.take(header).read_to_end(&mut text)?;
    let Ok(serde_json::Value::Object(tensors)) = serde_json::from_slice(&text) else { return Ok(None) };
    let end = tensors.values().filter_map(|tensor| tensor.get("data_offsets")?.get(1)?.as_u64()).max().unwrap_or(0);
    Ok(Some(8 + header + end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(hash: &Hash, bytes: &[u8]) -> String {
        let mut hasher = Hasher::new(hash, bytes.len() as u64);
        hasher.update(bytes);
        hasher.hex()
    }

    #[test]
    fn both_hashes_are_those_of_git_and_of_lfs() {
        // `printf 'hello\n' | git hash-object --stdin` and `| sha256sum`.
        assert_eq!(of(&Hash::GitBlob(String::new()), b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
        assert_eq!(
            of(&Hash::Sha256(String::new()), b"hello\n"),
            "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
        );
    }

    #[test]
    fn h01_a_safetensors_file_says_how_long_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let header = br#"{"__metadata__":{"format":"pt"},"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header);
        bytes.extend_from_slice(b"12345");
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(safetensors_length(&path).unwrap(), Some(bytes.len() as u64));
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(safetensors_length(&path).unwrap(), Some(bytes.len() as u64), "truncated data");
        std::fs::write(&path, &bytes[..20]).unwrap();
        assert_eq!(safetensors_length(&path).unwrap(), None, "truncated header");
        std::fs::write(&path, b"abc").unwrap();
        assert_eq!(safetensors_length(&path).unwrap(), None, "no header");
    }
}
