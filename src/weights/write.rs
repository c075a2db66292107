//! A blob while it grows, from several connections at once: bytes go to their places in a file beside it, the hash
//! follows over what is there without a gap, and the file takes its final name only when it is whole and right.
//!
//! A writer that stands where the hash stands hashes its own bytes while they are in the CPU's cache; what arrived out
//! of order is read back from the page cache by a thread of its own, one a file. Writing blocks as disks do.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::journal::{self, Journal};
use super::plan::{Hash, RemoteFile};
use super::ranges::Ranges;
use super::verify::Hasher;

/// Bytes between two pushes to the disk. What is not pushed is lost in a power cut (not in a kill); pushing
/// rarely leaves one long stop at the end of each file.
const PUSH_EACH: u64 = 32 << 20;
/// Bytes of one connection between two lines in the journal: the most it loses to a kill.
const NOTE_EACH: u64 = 32 << 10;
/// One step of reading back. Small enough to stay in the CPU's cache while it is hashed.
const STEP: usize = 256 << 10;

/// Where a blob lies while it grows.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Ours, with gaps: a name that huggingface_hub does not take for the beginning of a file.
    pub data: PathBuf,
    pub journal: PathBuf,
    /// huggingface_hub's and hf-hub's: always a beginning. Taken over when there is none of ours.
    pub foreign: PathBuf,
}

/// How a whole file ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Finished {
    Right,
    /// The bytes hash to something else; none of them counts any more.
    Wrong {
        got: String,
    },
}

#[derive(Debug)]
pub struct Partial {
    paths: Paths,
    file: File,
    hash: Hash,
    size: u64,
    boot: String,
    state: Mutex<State>,
    /// Rings when the hash got further or a push ended.
    moved: Notify,
}

#[derive(Debug)]
struct State {
    done: Ranges,
    journal: Journal,
    /// None while somebody feeds it.
    hasher: Option<Hasher>,
    /// The hasher has seen the file up to here.
    hashed: u64,
    unpushed: u64,
    push: Push,
    /// What went wrong off the writers' path.
    trouble: Option<std::io::Error>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Push {
    Idle,
    Running,
}

/// One connection's place in the file.
#[derive(Debug)]
pub struct Writer {
    partial: Arc<Partial>,
    range: usize,
    at: u64,
    noted: u64,
}

/// Bytes of a file that an earlier run left; none: it left nothing.
pub fn left(paths: &Paths, size: u64) -> Option<u64> {
    let counted = counted(paths, size, &journal::boot()).map(|done| done.total());
    counted.or_else(|| std::fs::metadata(&paths.foreign).ok().map(|meta| meta.len()).filter(|len| *len <= size))
}

fn counted(paths: &Paths, size: u64, boot: &str) -> Option<Ranges> {
    let len = std::fs::metadata(&paths.data).ok()?.len();
    journal::read(&paths.journal, size, len, boot)
}

impl Partial {
    /// Opens what an earlier run left, or begins anew. Blocks. Whoever calls holds the blob's lock.
    pub fn open(paths: Paths, remote: &RemoteFile) -> std::io::Result<Arc<Self>> {
        if let Some(folder) = paths.data.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let boot = journal::boot();
        let mut done = counted(&paths, remote.size, &boot);
        if done.is_none() {
            done = take_over(&paths, remote.size)?;
        }
        let done = done.unwrap_or_default();
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&paths.data)?;
        if done.total() == 0 {
            file.set_len(0)?;
        } else {
            // From here on the journal may say of these bytes that the disk has them.
            file.sync_data()?;
        }
        let state = State {
            journal: Journal::begin(&paths.journal, remote.size, &boot, &done)?,
            done,
            hasher: Some(Hasher::new(&remote.hash, remote.size)),
            hashed: 0,
            unpushed: 0,
            push: Push::Idle,
            trouble: None,
        };
        let partial = Arc::new(Self {
            paths,
            file,
            hash: remote.hash.clone(),
            size: remote.size,
            boot,
            state: Mutex::new(state),
            moved: Notify::new(),
        });
        Ok(partial)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Ranges and counters stay true whatever thread died holding them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes there.
    pub fn have(&self) -> u64 {
        self.state().done.total()
    }

    pub fn is_whole(&self) -> bool {
        self.have() == self.size
    }

    pub fn gaps(&self) -> Vec<Range<u64>> {
        self.state().done.gaps(self.size)
    }

    /// A place to write from. Nobody else writes the bytes that follow.
    pub fn writer(self: &Arc<Self>, from: u64) -> std::io::Result<Writer> {
        let range = self.state().journal.open_range(from)?;
        Ok(Writer { partial: self.clone(), range, at: from, noted: from })
    }

    /// Throws all bytes away. Nobody may be writing. Blocks.
    pub fn restart(&self) -> std::io::Result<()> {
        let mut state = self.state();
        self.file.set_len(0)?;
        state.done = Ranges::default();
        state.journal = Journal::begin(&self.paths.journal, self.size, &self.boot, &state.done)?;
        state.hasher = Some(self.fresh_hasher());
        state.hashed = 0;
        state.unpushed = 0;
        Ok(())
    }

    fn fresh_hasher(&self) -> Hasher {
        Hasher::new(&self.hash, self.size)
    }

    /// Feeds the hash with what is there beyond it, in a thread of its own, if nobody does yet.
    pub fn follow(self: &Arc<Self>) {
        let mut state = self.state();
        if state.done.prefix() > state.hashed
            && let Some(hasher) = state.hasher.take()
        {
            drop(state);
            let partial = self.clone();
            tokio::task::spawn_blocking(move || partial.read_back(hasher));
        }
    }

    fn read_back(&self, mut hasher: Hasher) {
        let mut buffer = vec![0; STEP];
        loop {
            let (from, to) = {
                let mut state = self.state();
                if state.done.prefix() <= state.hashed || state.trouble.is_some() {
                    state.hasher = Some(hasher);
                    break;
                }
                (state.hashed, state.done.prefix())
            };
            let step = usize::try_from(to - from).unwrap_or(STEP).min(STEP);
            let read = read_at(&self.file, &mut buffer[..step], from);
            let mut state = self.state();
            match read {
                Ok(n) => {
                    drop(state);
                    hasher.update(&buffer[..n]);
                    self.state().hashed = from + n as u64;
                }
                Err(error) => state.trouble = Some(error),
            }
        }
        self.moved.notify_waiters();
    }

    /// Pushes to the disk what was written, in a thread of its own, if enough came since the last time.
    fn push(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        if state.unpushed < PUSH_EACH || state.push == Push::Running {
            return;
        }
        state.push = Push::Running;
        state.unpushed = 0;
        let pushed = state.journal.before_push();
        drop(state);
        let partial = self.clone();
        tokio::task::spawn_blocking(move || {
            let outcome = partial.file.sync_data();
            let mut state = partial.state();
            let noted = outcome.and_then(|()| state.journal.after_push(&pushed));
            state.push = Push::Idle;
            if let Err(error) = noted {
                state.trouble = Some(error);
            }
            drop(state);
            partial.moved.notify_waiters();
        });
    }

    /// Waits until all is hashed; then compares and, if right, gives the file its final name. Only for a whole file that
    /// nobody writes.
    pub async fn finish(self: &Arc<Self>, blob: &Path) -> std::io::Result<Finished> {
        let hasher = loop {
            let moved = self.moved.notified();
            tokio::pin!(moved);
            // Before the look: a ring between look and wait must not be missed.
            moved.as_mut().enable();
            self.follow();
            {
                let mut state = self.state();
                if let Some(error) = state.trouble.take() {
                    return Err(error);
                }
                // A push that still runs would note its end in the journal of a file begun anew.
                if state.hashed == self.size
                    && state.push == Push::Idle
                    && let Some(hasher) = state.hasher.take()
                {
                    break hasher;
                }
            }
            moved.await;
        };
        let got = hasher.hex();
        let (partial, blob) = (self.clone(), blob.to_owned());
        let ending = tokio::task::spawn_blocking(move || {
            if got != partial.hash.hex() {
                partial.restart()?;
                return Ok(Finished::Wrong { got });
            }
            partial.name(&blob)?;
            Ok(Finished::Right)
        });
        ending.await.unwrap_or_else(|join| Err(std::io::Error::other(join)))
    }

    fn name(&self, blob: &Path) -> std::io::Result<()> {
        // Data before name: a power cut must not leave a right name on wrong bytes.
        self.file.sync_all()?;
        std::fs::rename(&self.paths.data, blob)?;
        if let Some(folder) = blob.parent() {
            File::open(folder)?.sync_all()?;
        }
        for rest in [&self.paths.journal, &self.paths.foreign] {
            remove(rest)?;
        }
        Ok(())
    }
}

impl Writer {
    /// Where the next byte goes.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Writes and, where the hash stands here, hashes. Blocks as the disk does.
    pub fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let partial = self.partial.clone();
        partial.file.write_all_at(bytes, self.at)?;
        let (from, to) = (self.at, self.at + bytes.len() as u64);
        let mine = {
            let mut state = partial.state();
            if state.hashed == from { state.hasher.take() } else { None }
        };
        let mut state = match mine {
            Some(mut hasher) => {
                hasher.update(bytes);
                let mut state = partial.state();
                state.hasher = Some(hasher);
                state.hashed = to;
                state
            }
            None => partial.state(),
        };
        state.done.add(from..to);
        state.unpushed += to - from;
        self.at = to;
        if to - self.noted >= NOTE_EACH {
            state.journal.note(self.range, to)?;
            self.noted = to;
        }
        if let Some(error) = state.trouble.take() {
            return Err(error);
        }
        let behind = state.hasher.is_some() && state.done.prefix() > state.hashed;
        partial.push(state);
        if behind {
            partial.follow();
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.at > self.noted {
            // Without it these few bytes are fetched again.
            let _ = self.partial.state().journal.note(self.range, self.at);
        }
    }
}

/// Makes another tool's beginning ours.
fn take_over(paths: &Paths, size: u64) -> std::io::Result<Option<Ranges>> {
    let len = match std::fs::metadata(&paths.foreign) {
        Ok(meta) => meta.len(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if len > size {
        return Ok(None);
    }
    std::fs::rename(&paths.foreign, &paths.data)?;
    Ok(Some(Ranges::one(0..len)))
}

fn read_at(file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
    loop {
        match file.read_at(buffer, at) {
            Ok(0) => return Err(std::io::Error::new(ErrorKind::UnexpectedEof, "the file was cut by somebody else")),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // one gap is a list of one
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

    fn paths(dir: &Path) -> Paths {
        Paths {
            data: dir.join("blobs/x.sglangd.incomplete"),
            journal: dir.join("blobs/x.sglangd.ranges.incomplete"),
            foreign: dir.join("blobs/x.incomplete"),
        }
    }

    fn put(partial: &Arc<Partial>, from: u64, bytes: &[u8]) {
        partial.writer(from).unwrap().write(bytes).unwrap();
    }

    fn names(dir: &Path) -> Vec<String> {
        std::fs::read_dir(dir.join("blobs")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[tokio::test]
    async fn h09_what_an_earlier_run_left_is_continued_and_the_name_comes_last() {
        let dir = tempfile::tempdir().unwrap();
        let blob = dir.path().join("blobs/x");
        let partial = Partial::open(paths(dir.path()), &hello()).unwrap();
        put(&partial, 4, b"o\n");
        put(&partial, 0, b"he");
        drop(partial);
        assert_eq!(left(&paths(dir.path()), 6), Some(4));
        let partial = Partial::open(paths(dir.path()), &hello()).unwrap();
        assert_eq!(partial.gaps(), [2..4]);
        put(&partial, 2, b"ll");
        assert!(partial.is_whole());
        assert!(!blob.exists(), "half a file under its final name");
        assert_eq!(partial.finish(&blob).await.unwrap(), Finished::Right);
        assert_eq!(std::fs::read(&blob).unwrap(), b"hello\n");
        assert_eq!(names(dir.path()), ["x"]);
    }

    #[tokio::test]
    async fn h01_a_wrong_file_never_gets_its_name_and_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let blob = dir.path().join("blobs/x");
        let partial = Partial::open(paths(dir.path()), &hello()).unwrap();
        put(&partial, 3, b"lo\n");
        put(&partial, 0, b"HEL");
        assert!(matches!(partial.finish(&blob).await.unwrap(), Finished::Wrong { .. }));
        assert!(!blob.exists());
        assert_eq!(partial.gaps(), [0..6]);
        put(&partial, 0, b"hello\n");
        assert_eq!(partial.finish(&blob).await.unwrap(), Finished::Right);
    }

    #[tokio::test]
    async fn another_tools_beginning_is_taken_over_and_one_longer_than_the_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let there = paths(dir.path());
        std::fs::create_dir(dir.path().join("blobs")).unwrap();
        std::fs::write(&there.foreign, b"hello\nhello\n").unwrap();
        assert_eq!(left(&there, 6), None);
        assert_eq!(Partial::open(there.clone(), &hello()).unwrap().have(), 0);
        std::fs::remove_file(&there.data).unwrap();
        std::fs::write(&there.foreign, b"hel").unwrap();
        assert_eq!(left(&there, 6), Some(3));
        let partial = Partial::open(there, &hello()).unwrap();
        assert_eq!(partial.gaps(), [3..6]);
        put(&partial, 3, b"lo\n");
        assert_eq!(partial.finish(&dir.path().join("blobs/x")).await.unwrap(), Finished::Right);
        assert_eq!(names(dir.path()), ["x"]);
    }

    /// Data without its journal says nothing about gaps: a file as long as the right one may be full of zeros.
    #[tokio::test]
    async fn bytes_without_a_journal_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let there = paths(dir.path());
        std::fs::create_dir(dir.path().join("blobs")).unwrap();
        std::fs::write(&there.data, b"\0\0\0\0\0\n").unwrap();
        assert_eq!(Partial::open(there, &hello()).unwrap().gaps(), [0..6]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn many_writers_out_of_order_make_the_right_file() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..(8u32 << 20)).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let hash = Hash::Sha256(String::new());
        let mut hasher = Hasher::new(&hash, 0);
        hasher.update(&content);
        let remote = RemoteFile { hash: Hash::Sha256(hasher.hex()), size: content.len() as u64, ..hello() };
        let partial = Partial::open(paths(dir.path()), &remote).unwrap();
        let content = Arc::new(content);
        let mut writers = tokio::task::JoinSet::new();
        for n in 0..8u64 {
            let (partial, content) = (partial.clone(), content.clone());
            writers.spawn(async move {
                let mut writer = partial.writer(n << 20).unwrap();
                // Steps of many lengths; a pause so that the writers really mix.
                while writer.at() < (n + 1) << 20 {
                    let at = usize::try_from(writer.at()).unwrap();
                    let end = (at + 10_007 + 40_009 * (at % 7)).min(usize::try_from((n + 1) << 20).unwrap());
                    writer.write(&content[at..end]).unwrap();
                    tokio::task::yield_now().await;
                }
            });
        }
        writers.join_all().await;
        let blob = dir.path().join("blobs/x");
        assert_eq!(partial.finish(&blob).await.unwrap(), Finished::Right);
        assert!(std::fs::read(&blob).unwrap() == *content);
    }
}
