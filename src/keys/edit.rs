//! Changes the keys file: one writer at a time, whole or not at all, comments and order kept.
//!
//! The new text is written beside the file and renamed into its place: who reads it meanwhile sees
//! the old one or the new one. It keeps its owner, so that root may edit what the service reads.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::line::{self, Fault, MAX_NAME};
use super::{Keys, KeysError, MAX_FILE, Role, hashed};
use crate::admission::Terms;

/// Of the random part. 62^43 is a little more than 2^256.
const KEY_LENGTH: usize = 43;
/// Tells people and secret scanners what it is.
const KEY_PREFIX: &str = "sgld-";

#[derive(Debug, thiserror::Error)]
pub enum EditError {
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error("`{name}` cannot name a key: 1 to {MAX_NAME} letters, digits, `.`, `_`, `-`, `@` or `+`")]
    Name { name: String },
    #[error("{path} has a key `{name}` already; choose another name, or remove that one first")]
    Exists { path: PathBuf, name: String },
    #[error("{path} has no key `{name}`{known}")]
    Unknown { path: PathBuf, name: String, known: String },
    #[error(
        "`{name}` is the last client's key in {path}: a proxy that finds none goes on with those it has. Add another one first, or take auth.keys_file out of the configuration"
    )]
    Last { path: PathBuf, name: String },
    #[error("{path} cannot be written: {source}")]
    Write { path: PathBuf, source: io::Error },
}

/// A new key. Its text exists here and on the user's screen, nowhere else.
pub fn generate() -> String {
    use rand::Rng as _;
    let mut random = rand::rng();
    let digits = (0..KEY_LENGTH).map(|_| char::from(random.sample(rand::distr::Alphanumeric)));
    KEY_PREFIX.chars().chain(digits).collect()
}

/// Adds a line for `key`; the file is made where there is none.
pub fn add(path: &Path, name: &str, key: &str, terms: &Terms, role: Role) -> Result<(), EditError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-@+".contains(c);
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) {
        return Err(EditError::Name { name: name.to_owned() });
    }
    change(path, |mut text| {
        if lines(&text, path)?.iter().any(|(_, known)| known.as_deref() == Some(name)) {
            return Err(EditError::Exists { path: path.to_owned(), name: name.to_owned() });
        }
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(format!("{name} {} {}", hashed(key), line::grants(terms, role)).trim_end());
        text.push('\n');
        if text.len() as u64 > MAX_FILE {
            return Err(KeysError::TooLarge { path: path.to_owned() }.into());
        }
        Ok(text)
    })
}

/// Removes every line of that name. The last client's key stays.
pub fn remove(path: &Path, name: &str) -> Result<(), EditError> {
    change(path, |text| {
        let lines = lines(&text, path)?;
        if !lines.iter().any(|(_, known)| known.as_deref() == Some(name)) {
            let names: Vec<&str> = lines.iter().filter_map(|(_, known)| known.as_deref()).collect();
            let nearest = names.iter().find(|known| strsim::damerau_levenshtein(known, name) <= 2);
            let known = nearest.map_or(String::new(), |known| format!("; did you mean `{known}`?"));
            return Err(EditError::Unknown { path: path.to_owned(), name: name.to_owned(), known });
        }
        let kept: String =
            lines.iter().filter(|(_, known)| known.as_deref() != Some(name)).map(|(line, _)| *line).collect();
        match Keys::parse(&kept, path) {
            Err(KeysError::Empty { .. }) if Keys::parse(&text, path).is_ok() => {
                Err(EditError::Last { path: path.to_owned(), name: name.to_owned() })
            }
            _ => Ok(kept),
        }
    })
}

/// The lines with their ends, and the names of those that hold a key.
fn lines<'a>(text: &'a str, path: &Path) -> Result<Vec<(&'a str, Option<String>)>, KeysError> {
    let named = text.split_inclusive('\n').enumerate().map(|(number, line)| {
        let key = line::parse(line).map_err(|Fault { column, what, help }| KeysError::Malformed {
            path: path.to_owned(),
            line: number + 1,
            column,
            what,
            help,
        })?;
        Ok((line, key.map(|key| key.name)))
    });
    named.collect()
}

/// Replaces the file's text by what `how` makes of it, under a lock of the folder: the file itself is
/// another one after each change, and a lock on it would hold nobody off.
fn change(path: &Path, how: impl FnOnce(String) -> Result<String, EditError>) -> Result<(), EditError> {
    let failed = |source| EditError::Write { path: path.to_owned(), source };
    // Through a link to the file it names, or the rename would replace the link.
    let target = match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.to_owned(),
        found => found.map_err(failed)?,
    };
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let lock = File::open(folder).map_err(failed)?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
    let (text, old) = match fs::metadata(&target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => (String::new(), None),
        found => (super::read(&target)?.0, Some(found.map_err(failed)?)),
    };
    let text = how(text)?;
    let mut file = tempfile::Builder::new().prefix(".keys-").tempfile_in(folder).map_err(failed)?;
    if let Some(old) = old {
        let mine = file.as_file().metadata().map_err(failed)?;
        if (mine.uid(), mine.gid()) != (old.uid(), old.gid()) {
            std::os::unix::fs::fchown(file.as_file(), Some(old.uid()), Some(old.gid())).map_err(failed)?;
        }
        // The group may be how the service reads it. Others have no business here.
        let mode = 0o600 | (old.mode() & 0o060);
        file.as_file().set_permissions(fs::Permissions::from_mode(mode)).map_err(failed)?;
    }
    file.write_all(text.as_bytes()).and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    file.persist(&target).map_err(|error| failed(error.error))?;
    lock.sync_all().map_err(failed)
}
