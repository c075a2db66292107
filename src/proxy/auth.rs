//! Named API keys: a file of hashes, and whether a request shows one of them.
//!
//! The file never holds a key, only its SHA-256, and a key never reaches a log. It decides nothing
//! but yes or no.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use http::{HeaderMap, header};
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};

/// Largest keys file: some thousand keys. A larger one is another file, named by mistake.
const MAX_FILE: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("the keys file {path} cannot be read: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("the keys file {path} is larger than {MAX_FILE} bytes")]
    TooLarge { path: PathBuf },
    #[error("{path}:{line}: expected `NAME sha256:HEX` (64 hexadecimal digits), `#` for a comment")]
    Malformed { path: PathBuf, line: usize },
    #[error("the keys file {path} holds no key: nobody could pass")]
    Empty { path: PathBuf },
}

/// Whether others than the owner can read the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposure {
    Private,
    /// The hashes of good keys are no secret, those of guessable ones are.
    WorldReadable,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    name: String,
    digest: [u8; 32],
}

/// The keys that open the public listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys(Vec<Key>);

impl Keys {
    pub fn load(path: &Path) -> Result<(Self, Exposure), KeysError> {
        let unreadable = |source| KeysError::Unreadable { path: path.to_owned(), source };
        let file = File::open(path).map_err(unreadable)?;
        let mode = file.metadata().map_err(unreadable)?.mode();
        let mut text = String::new();
        file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(unreadable)?;
        if text.len() as u64 > MAX_FILE {
            return Err(KeysError::TooLarge { path: path.to_owned() });
        }
        let exposure = if mode & 0o004 == 0 { Exposure::Private } else { Exposure::WorldReadable };
        Ok((Self::parse(&text, path)?, exposure))
    }

    fn parse(text: &str, path: &Path) -> Result<Self, KeysError> {
        let mut keys = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let malformed = || KeysError::Malformed { path: path.to_owned(), line: number + 1 };
            let mut words = line.split_whitespace();
            let (Some(name), Some(hash), None) = (words.next(), words.next(), words.next()) else {
                return Err(malformed());
            };
            let digest = hash.strip_prefix("sha256:").and_then(unhex).ok_or_else(malformed)?;
            keys.push(Key { name: name.to_owned(), digest });
        }
        if keys.is_empty() {
            return Err(KeysError::Empty { path: path.to_owned() });
        }
        Ok(Self(keys))
    }

    /// The name of the key that `presented` is. Looks at every key, whatever it finds.
    fn find(&self, presented: &[u8]) -> Option<&str> {
        let digest: [u8; 32] = Sha256::digest(presented).into();
        let mut found = None;
        for key in &self.0 {
            let same: Choice = key.digest.ct_eq(&digest);
            if bool::from(same) {
                found = Some(key.name.as_str());
            }
        }
        found
    }

    /// The name of the key that the request shows, as `Authorization: Bearer` or as `x-api-key`. Who
    /// shows several must show only good ones: nobody can say which of two the engine's side means.
    pub fn check(&self, headers: &HeaderMap) -> Option<&str> {
        let mut name = None;
        for value in headers.get_all(header::AUTHORIZATION) {
            if name.is_some() {
                return None;
            }
            let (scheme, key) = value.as_bytes().split_at_checked(7)?;
            if !scheme.eq_ignore_ascii_case(b"bearer ") {
                return None;
            }
            name = Some(self.find(key)?);
        }
        let mut shown = headers.get_all("x-api-key").iter();
        if let Some(key) = shown.next() {
            name = Some(self.find(key.as_bytes())?);
        }
        if shown.next().is_some() { None } else { name }
    }
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks(2)) {
        let digit = |at: usize| (pair[at] as char).to_digit(16);
        *byte = u8::try_from(digit(0)? * 16 + digit(1)?).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use http::HeaderValue;

    use super::*;

    fn line(name: &str, key: &str) -> String {
        let digest: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let mut line = format!("{name} sha256:");
        for byte in digest {
            write!(line, "{byte:02x}").unwrap();
        }
        line
    }

    fn parse(text: &str) -> Result<Keys, KeysError> {
        Keys::parse(text, Path::new("keys"))
    }

    fn shows(keys: &Keys, fields: &[(&'static str, &str)]) -> Option<String> {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        keys.check(&headers).map(str::to_owned)
    }

    #[test]
    fn a_good_key_passes_in_either_header_and_nothing_else_does() {
        let keys =
            parse(&format!("# ours\n\n{}\n{} # two\n", line("one", "secret-1"), line("two", "secret-2"))).unwrap();
        assert_eq!(shows(&keys, &[("authorization", "Bearer secret-1")]).as_deref(), Some("one"));
        assert_eq!(shows(&keys, &[("authorization", "bearer secret-2")]).as_deref(), Some("two"));
        assert_eq!(shows(&keys, &[("x-api-key", "secret-2")]).as_deref(), Some("two"));
        for fields in [
            &[][..],
            &[("authorization", "Bearer wrong")],
            &[("authorization", "Bearer ")],
            &[("authorization", "Basic secret-1")],
            &[("authorization", "Bearer secret-1x")],
            &[("authorization", "Bearer secret-1"), ("authorization", "Bearer secret-1")],
            &[("authorization", "Bearer secret-1"), ("x-api-key", "wrong")],
            &[("x-api-key", "secret-1"), ("x-api-key", "secret-1")],
        ] {
            assert_eq!(shows(&keys, fields), None, "{fields:?}");
        }
    }

    #[test]
    fn a_broken_file_is_refused_with_its_line() {
        assert!(matches!(parse("# nothing\n\n"), Err(KeysError::Empty { .. })));
        for text in ["name", "name sha256:abc", "name md5:00", "a b c", &format!("{} x", line("n", "k"))] {
            assert!(matches!(parse(&format!("\n{text}\n")), Err(KeysError::Malformed { line: 2, .. })), "{text}");
        }
    }
}
