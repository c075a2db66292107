//! Who asks: the keys file in use, and a number for each name that stays through all reloads.
//!
//! A file that cannot be used never replaces one that could: keys that passed go on passing, and the
//! complaint is told. How a file and a key look is [`crate::keys`]' matter.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use http::HeaderMap;

use crate::admission::{Caller, KeyId};
use crate::keys::{Exposure, Keys, KeysError, Role, Stamp};

/// All names that keys ever had since the proxy's start. A key that is renewed, or that comes back,
/// keeps its counts and its place in line.
#[derive(Debug, Default)]
pub struct Roster(Mutex<HashMap<String, KeyId>>);

impl Roster {
    fn number(&self, name: &str) -> KeyId {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Numbers are as dense as names are: a file holds some ten thousand at most.
        let next = KeyId(u32::try_from(known.len() + 1).unwrap_or(u32::MAX));
        *known.entry(name.to_owned()).or_insert(next)
    }

    /// The names by number, for who shows counts. Number 0 is nobody's.
    pub fn names(&self) -> Vec<String> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut names = vec![String::new(); known.len() + 1];
        for (name, id) in known.iter() {
            names[id.0 as usize].clone_from(name);
        }
        names
    }
}

/// The keys that open the public listener.
#[derive(Debug)]
pub struct KeyRing {
    keys: Keys,
    /// The numbers of `keys`, in order.
    ids: Vec<KeyId>,
}

impl KeyRing {
    /// Who shows a good key.
    pub fn caller(&self, headers: &HeaderMap) -> Option<Caller> {
        let (at, key) = self.keys.check(headers)?;
        (key.role == Role::Client).then(|| Caller { key: self.ids[at], terms: key.terms })
    }
}

/// A keys file, and how it was when it was read last.
#[derive(Debug)]
pub struct KeysFile {
    stamp: Option<Stamp>,
}

impl KeysFile {
    /// Reads the file, and remembers this state of it whether it is of use or not: a broken file is
    /// complained of once.
    pub fn read(path: &Path, roster: &Roster) -> (Self, Result<KeyRing, KeysError>) {
        // Before the text: a change in between is then a change since.
        let file = Self { stamp: Stamp::at(path) };
        let ring = Keys::load(path).map(|(keys, exposure)| {
            if exposure == Exposure::WorldReadable {
                tracing::warn!(path = %path.display(), "everybody on this machine can read the keys file: chmod o-r");
            }
            let ids = keys.iter().map(|key| roster.number(&key.name)).collect();
            KeyRing { keys, ids }
        });
        (file, ring)
    }

    /// Whether it is another one by now, or gone.
    pub fn has_changed(&self, path: &Path) -> bool {
        Stamp::at(path) != self.stamp
    }
}
