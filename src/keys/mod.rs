//! Named API keys: a file of hashes with what each key is granted, and whether a request shows one.
//!
//! The file never holds a key, only its SHA-256, and a key never reaches a log. This folder decides
//! who somebody is; what that is worth is the proxy's and the admin listener's matter.
//!
//! ```text
//! # NAME  sha256:HEX  and, where wanted,
//! ci      sha256:9f86… concurrency=8 queue=16 priority=low weight=2
//! oncall  sha256:60fb… operator
//! ```

pub mod edit;
mod line;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;
use std::fs::{File, Metadata};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use http::{HeaderMap, HeaderName, header};
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};

use crate::admission::Terms;

/// Where Anthropic's clients show their key.
pub static X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Largest keys file: some ten thousand keys. A larger one is another file, named by mistake.
pub const MAX_FILE: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("the keys file {path} cannot be read: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("the keys file {path} is larger than {MAX_FILE} bytes")]
    TooLarge { path: PathBuf },
    #[error("{path}:{line}:{column}: {what}; {help}")]
    Malformed { path: PathBuf, line: usize, column: usize, what: String, help: String },
    #[error(
        "the keys file {path} holds no client's key: nobody could pass. Add one with `sglangd keys add NAME --file {path}`"
    )]
    Empty { path: PathBuf },
}

/// Whether others than the owner and the group can read the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposure {
    Private,
    /// The hashes of good keys are no secret, those of guessable ones are.
    WorldReadable,
}

/// What a key is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Inference, on the public listener.
    Client,
    /// The engine's operator routes, on the admin listener. Nothing else.
    Operator,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Operator => "operator",
        }
    }
}

/// One key as the file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub name: String,
    digest: [u8; 32],
    pub terms: Terms,
    pub role: Role,
}

impl Key {
    /// The first bytes of the hash: enough to tell keys apart, too few to be worth anything.
    pub fn fingerprint(&self) -> String {
        hex(&self.digest[..4])
    }
}

/// A file as it was when it was looked at; any change makes another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// None: the file is not there, or not for us.
    pub fn at(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().as_ref().map(Self::of)
    }
}

/// All keys of a file, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys(Vec<Key>);

impl Keys {
    pub fn load(path: &Path) -> Result<(Self, Exposure), KeysError> {
        let (text, mode) = read(path)?;
        let exposure = if mode & 0o004 == 0 { Exposure::Private } else { Exposure::WorldReadable };
        Ok((Self::parse(&text, path)?, exposure))
    }

    /// `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self, KeysError> {
        let mut keys: Vec<Key> = Vec::new();
        // Where each name was first said: looking through the list each time would be quadratic.
        let mut named = std::collections::HashMap::<String, usize>::new();
        for (number, line) in text.lines().enumerate() {
            let malformed = |fault: line::Fault| KeysError::Malformed {
                path: path.to_owned(),
                line: number + 1,
                column: fault.column,
                what: fault.what,
                help: fault.help,
            };
            let Some(key) = line::parse(line).map_err(malformed)? else { continue };
            // A name may stand twice, so that a key can be replaced while both still pass.
            if let Some(first) = named.get(&key.name).map(|at| &keys[*at])
                && (first.terms, first.role) != (key.terms, key.role)
            {
                let what = format!("`{}` is granted something else than further up", key.name);
                let help = "a name may have several keys, but only one set of limits".to_owned();
                return Err(malformed(line::Fault { column: 1, what, help }));
            }
            named.entry(key.name.clone()).or_insert(keys.len());
            keys.push(key);
        }
        if !keys.iter().any(|key| key.role == Role::Client) {
            return Err(KeysError::Empty { path: path.to_owned() });
        }
        Ok(Self(keys))
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Key> {
        self.0.iter()
    }

    /// The place of the key that `presented` is. Looks at every key, whatever it finds.
    fn find(&self, presented: &[u8]) -> Option<usize> {
        let digest: [u8; 32] = Sha256::digest(presented).into();
        let mut found = None;
        for (at, key) in self.0.iter().enumerate() {
            let same: Choice = key.digest.ct_eq(&digest);
            if bool::from(same) {
                found = Some(at);
            }
        }
        found
    }

    /// Which key the request shows, as `Authorization: Bearer` or as `x-api-key`. Who shows both must
    /// show the same: nobody can say which of two is meant.
    pub fn check(&self, headers: &HeaderMap) -> Option<(usize, &Key)> {
        let mut bearers = headers.get_all(header::AUTHORIZATION).iter();
        let bearer = match bearers.next() {
            Some(value) => {
                let (scheme, key) = value.as_bytes().split_at_checked(7)?;
                if !scheme.eq_ignore_ascii_case(b"bearer ") {
                    return None;
                }
                Some(self.find(key)?)
            }
            None => None,
        };
        let mut plain = headers.get_all(&X_API_KEY).iter();
        let key = match plain.next() {
            Some(value) => Some(self.find(value.as_bytes())?),
            None => None,
        };
        if bearers.next().is_some() || plain.next().is_some() {
            return None;
        }
        match (bearer, key) {
            (Some(one), Some(other)) if one != other => None,
            (one, other) => one.or(other).map(|at| (at, &self.0[at])),
        }
    }
}

impl<'a> IntoIterator for &'a Keys {
    type Item = &'a Key;
    type IntoIter = std::slice::Iter<'a, Key>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// The file's text and mode.
fn read(path: &Path) -> Result<(String, u32), KeysError> {
    let unreadable = |source| KeysError::Unreadable { path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    let mut text = String::new();
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_FILE {
        return Err(KeysError::TooLarge { path: path.to_owned() });
    }
    Ok((text, metadata.mode()))
}

/// How a key stands in the file.
pub fn hashed(key: &str) -> String {
    let digest: [u8; 32] = Sha256::digest(key.as_bytes()).into();
    format!("sha256:{}", hex(&digest))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing into a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
