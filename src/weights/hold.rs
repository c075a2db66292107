//! Says that a folder of the cache is in use: a shared lock on it, which the kernel drops with its holder. Who tidies the
//! cache asks for it. A fetcher holds the repository while it fetches, `serve` the snapshot for as long as it may start
//! an engine on it.
//!
//! An open folder shows in `/proc` besides, for file systems without locks.

use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

/// Between two looks at a lock that somebody holds; removing takes moments.
const LOOK: Duration = Duration::from_millis(50);

/// Held until dropped.
#[derive(Debug)]
pub struct Hold {
    _folder: File,
}

impl Hold {
    /// Waits for nobody.
    pub fn take(folder: &Path) -> std::io::Result<Self> {
        let file = File::open(folder)?;
        match file.try_lock_shared() {
            // Where there are no locks, the open folder has to do.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Self { _folder: file }),
            Err(TryLockError::WouldBlock) => Err(std::io::Error::from(ErrorKind::WouldBlock)),
        }
    }

    /// Waits until nobody tidies there.
    pub async fn wait(folder: &Path) -> std::io::Result<Self> {
        loop {
            match Self::take(folder) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => tokio::time::sleep(LOOK).await,
                other => return other,
            }
        }
    }
}

/// The right to remove a folder: nobody holds it, and nobody can while this lives. None: somebody does.
pub fn claim(folder: &Path) -> std::io::Result<Option<File>> {
    let file = File::open(folder)?;
    match file.try_lock() {
        Ok(()) | Err(TryLockError::Error(_)) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_cannot_be_claimed_and_two_may_hold() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (Hold::take(folder.path()).unwrap(), Hold::take(folder.path()).unwrap());
        drop(one);
        assert!(claim(folder.path()).unwrap().is_none());
        drop(two);
        let claimed = claim(folder.path()).unwrap().unwrap();
        assert!(Hold::take(folder.path()).is_err());
        drop(claimed);
        Hold::take(folder.path()).unwrap();
    }
}
