//! One lock a blob, the same file and the same `flock` as huggingface_hub's and hf-hub's, so that two
//! fetchers of any make never write one blob together. The kernel drops it when its holder dies: there
//! is no stale lock.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::FetchError;
use super::uses;

/// Between two looks at a lock that somebody holds. `flock` has no wait that could be given up, and a
/// thread stuck in it would outlive a stop.
const LOOK: Duration = Duration::from_millis(200);

/// Held until dropped.
#[derive(Debug)]
pub struct BlobLock {
    _file: Option<File>,
}

/// Waits for the lock; `waiting` hears who holds it, each time that is somebody else.
pub async fn acquire(path: PathBuf, mut waiting: impl FnMut(&str)) -> Result<BlobLock, FetchError> {
    let disk = |source| FetchError::Disk { path: path.clone(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(disk)?;
    }
    let mut file = open(&path).map_err(disk)?;
    let mut told = None;
    loop {
        match file.try_lock() {
            // Who tidies the cache removes locks: one that lost its name keeps nobody else out.
            Ok(()) if !is_named(&file, &path) => {
                file = open(&path).map_err(disk)?;
                continue;
            }
            Ok(()) => return Ok(BlobLock { _file: Some(file) }),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) if no_locks_here(&error) => {
                tracing::warn!(path = %path.display(), "this file system has no locks: do not fetch twice at once");
                return Ok(BlobLock { _file: None });
            }
            Err(TryLockError::Error(error)) => return Err(disk(why(error))),
        }
        let holder = holder(&path).unwrap_or_else(|| "a process this one cannot see".to_owned());
        if told.as_deref() != Some(&*holder) {
            waiting(&holder);
            told = Some(holder);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    // Group-writable like huggingface_hub's: users who share a cache share its locks.
    for_writing(OpenOptions::new().create(true).truncate(false).mode(0o664), path)
}

/// Over NFS only who may write may have a lock for itself (flock(2), "NFS details").
fn for_writing(options: &mut OpenOptions, path: &Path) -> std::io::Result<File> {
    match options.write(true).open(path) {
        // Another user's, or a file system that is read only: elsewhere `flock` asks for no right to write.
        Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
            File::open(path)
        }
        other => other,
    }
}

/// The kernel says no more than EBADF.
fn why(error: std::io::Error) -> std::io::Error {
    if error.raw_os_error() != Some(libc::EBADF) {
        return error;
    }
    let why = "another user's lock, and this file system (NFS) gives it only to who may write to it: share the cache's group, \
               or use a cache of your own";
    std::io::Error::new(ErrorKind::PermissionDenied, why)
}

fn is_named(file: &File, path: &Path) -> bool {
    let place = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
    matches!((file.metadata().map(place), std::fs::metadata(path).map(place)), (Ok(own), Ok(named)) if own == named)
}

/// Takes the lock where nobody holds it, without waiting; none: somebody does.
pub fn try_acquire(path: &Path) -> std::io::Result<Option<BlobLock>> {
    let file = for_writing(&mut OpenOptions::new(), path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(BlobLock { _file: Some(file) })),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) if no_locks_here(&error) => Ok(Some(BlobLock { _file: None })),
        Err(TryLockError::Error(error)) => Err(why(error)),
    }
}

/// NFS without a lock daemon, some FUSE file systems.
fn no_locks_here(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP))
}

/// Who holds the lock, from the kernel's table: `python3 (pid 4711)`.
pub fn holder(path: &Path) -> Option<String> {
    let inode = std::fs::metadata(path).ok()?.ino().to_string();
    let table = std::fs::read_to_string("/proc/locks").ok()?;
    let pid = pid_of(&table, &inode)?;
    Some(uses::named(&std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default(), pid))
}

/// `1: FLOCK  ADVISORY  WRITE 4711 fd:01:1234 0 EOF`; a line with `->` waits and holds nothing.
fn pid_of(table: &str, inode: &str) -> Option<u32> {
    table.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (_, kind) = (words.next()?, words.next()?);
        if kind != "FLOCK" {
            return None;
        }
        let (_, _, pid, place) = (words.next()?, words.next()?, words.next()?, words.next()?);
        (place.rsplit(':').next()? == inode).then(|| pid.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h08_the_holder_is_read_from_the_kernels_table() {
        let table = "1: FLOCK  ADVISORY  WRITE 11 fd:01:99 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 12 fd:01:1234 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 13 fd:01:1234 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 14 fd:01:1234 0 EOF\n";
        assert_eq!(pid_of(table, "1234"), Some(14));
        assert_eq!(pid_of(table, "7"), None);
    }

    #[test]
    fn h10_over_nfs_a_lock_of_another_users_says_more_than_the_kernel_does() {
        let said = why(std::io::Error::from_raw_os_error(libc::EBADF));
        assert_eq!(said.kind(), ErrorKind::PermissionDenied);
        assert!(said.to_string().contains("NFS") && said.to_string().contains("group"), "{said}");
        assert_eq!(why(std::io::Error::from_raw_os_error(libc::EIO)).raw_os_error(), Some(libc::EIO));
    }

    #[tokio::test]
    async fn h08_the_second_waits_says_for_whom_and_goes_on_when_the_first_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("locks/x.lock");
        let first = acquire(path.clone(), |_| panic!("nobody holds it")).await.unwrap();
        let (tell, mut told) = tokio::sync::mpsc::channel(4);
        let second = tokio::spawn(acquire(path, move |holder| tell.try_send(holder.to_owned()).unwrap()));
        let holder = told.recv().await.unwrap();
        assert!(holder.contains(&std::process::id().to_string()), "{holder}");
        drop(first);
        second.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn h08_a_lock_that_was_tidied_away_while_somebody_waited_keeps_the_next_one_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        let tidying = acquire(path.clone(), |_| ()).await.unwrap();
        let (tell, mut told) = tokio::sync::mpsc::channel(4);
        let waits = tokio::spawn(acquire(path.clone(), move |_| tell.try_send(()).unwrap()));
        told.recv().await.unwrap();
        std::fs::remove_file(&path).unwrap();
        drop(tidying);
        let _held = waits.await.unwrap().unwrap();
        assert!(try_acquire(&path).unwrap().is_none(), "two hold one lock");
    }
}
