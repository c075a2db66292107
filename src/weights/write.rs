//! A blob while it grows, from several connections at once: bytes go to their places in a file beside it, the hash
//! follows over what is there without a gap, and the file takes its final name only when it is whole and right.
//!
//! A `writer` that stands where the hash stands hashes its own bytes while they are in the CPU's cache; what arrived out
//! of order is read back from the page cache beside them (`behind`). What an earlier run left is `left`'s.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::direct_io::{Block, Blocks, Direct};
use super::journal::{self, Journal};
use super::left::{Paths, counted, take_over};
use super::plan::{Hash, RemoteFile};
use super::ranges::Ranges;
use super::verify::Hasher;
use super::writer::{StepBytes, Writer};

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
    pub(super) file: File,
    /// The way past the page cache, where there is one.
    direct: Option<Direct>,
    hash: Hash,
    size: u64,
    boot: String,
    state: Mutex<State>,
    /// Rings when the hash got further or a push ended.
    pub(super) moved: Notify,
}

#[derive(Debug)]
pub(super) struct State {
    pub done: Ranges,
    pub journal: Journal,
    /// None while somebody feeds it.
    pub hasher: Option<Hasher>,
    /// The hasher has seen the file up to here.
    pub hashed: u64,
    /// How often all bytes were thrown away: who reads them back or pushes them may still be at those of before.
    pub life: u32,
    pub unpushed: u64,
    pub push: Push,
    /// What went wrong off the writers' path.
    pub trouble: Option<std::io::Error>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Push {
    Idle,
    Running,
}

impl Partial {
    /// Opens what an earlier run left, or begins anew; with memory for them, bytes go past the page cache. Blocks. Whoever calls holds the blob's lock.
    pub fn open(paths: Paths, remote: &RemoteFile, past: Option<Arc<Blocks>>) -> std::io::Result<Arc<Self>> {
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
            life: 0,
            unpushed: 0,
            push: Push::Idle,
            trouble: None,
        };
        let direct = past.and_then(|blocks| Direct::open(&paths.data, blocks));
        let partial = Arc::new(Self {
            paths,
            file,
            direct,
            hash: remote.hash.clone(),
            size: remote.size,
            boot,
            state: Mutex::new(state),
            moved: Notify::new(),
        });
        Ok(partial)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Ranges and counters stay true whatever thread died holding them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, if the file has not begun anew since it was in `life`.
    pub(super) fn state_in(&self, life: u32) -> Option<MutexGuard<'_, State>> {
        Some(self.state()).filter(|state| state.life == life)
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
        Ok(Writer::new(self.clone(), range, from))
    }

    /// Memory for bytes from here on that go past the page cache: where they are hashed on their way. Others are read back out of it.
    pub(super) fn block_at(&self, from: u64) -> Option<Block> {
        self.direct.as_ref().filter(|_| self.hash_stands_at(from))?.block_at(from)
    }

    /// The hash, if it stands there: to be fed with the bytes from there on and brought back to `written`.
    pub(super) fn hasher_at(&self, from: u64) -> Option<Hasher> {
        let mut state = self.state();
        if state.hashed == from { state.hasher.take() } else { None }
    }

    /// Whether bytes that belong there are hashed on their way.
    pub(super) fn hash_stands_at(&self, from: u64) -> bool {
        let state = self.state();
        state.hashed == from && state.hasher.is_some()
    }

    /// The hash that was handed out is not brought back: it has bytes that are not at their place.
    pub(super) fn hash_anew(&self) {
        let mut state = self.state();
        state.hasher = Some(self.fresh_hasher());
        state.hashed = 0;
    }

    /// Puts these bytes to their place. Blocks as the disk does.
    pub(super) fn write(&self, from: u64, bytes: &StepBytes) -> std::io::Result<()> {
        if let (Some(direct), StepBytes::Block(block)) = (&self.direct, bytes)
            && direct.write(block, from)?
        {
            return Ok(());
        }
        self.file.write_all_at(bytes, from)
    }

    /// These bytes, which belong to `range`, are at their place, and in the hash if that is brought back.
    pub(super) fn written(
        self: &Arc<Self>,
        range: usize,
        bytes: Range<u64>,
        hasher: Option<Hasher>,
    ) -> std::io::Result<()> {
        let Range { start: from, end: to } = bytes;
        let mut state = self.state();
        if hasher.is_some() {
            state.hasher = hasher;
            state.hashed = to;
        }
        state.done.add(from..to);
        state.unpushed += to - from;
        state.journal.note(range, to)?;
        if let Some(error) = state.trouble.take() {
            return Err(error);
        }
        let behind = state.hasher.is_some() && state.done.prefix() > state.hashed;
        self.push(state);
        if behind {
            self.follow();
        }
        Ok(())
    }

    /// Throws all bytes away. Nobody may be writing. Blocks.
    pub fn restart(&self) -> std::io::Result<()> {
        let mut state = self.state();
        state.life += 1;
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

fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // one gap is a list of one
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::weights::left::left;
    use crate::weights::plan::Transport;

    fn hello() -> RemoteFile {
        RemoteFile {
            name: "hello.txt".into(),
            size: 6,
            hash: Hash::GitBlob("ce013625030ba8dba906f756967f9e9ca394464a".into()),
            transport: Transport::Http,
        }
    }

    /// A file of so many bytes, and what a hub says of it.
    fn noise(bytes: u32) -> (Vec<u8>, RemoteFile) {
        let content: Vec<u8> = (0..bytes).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let mut hasher = Hasher::new(&Hash::Sha256(String::new()), 0);
        hasher.update(&content);
        let remote = RemoteFile { hash: Hash::Sha256(hasher.hex()), size: bytes.into(), ..hello() };
        (content, remote)
    }

    fn paths(dir: &Path) -> Paths {
        Paths {
            data: dir.join("blobs/x.sglangd.incomplete"),
            journal: dir.join("blobs/x.sglangd.ranges.incomplete"),
            foreign: dir.join("blobs/x.incomplete"),
        }
    }

    fn put(partial: &Arc<Partial>, from: u64, bytes: &[u8]) {
        let mut writer = partial.writer(from).unwrap();
        put_all(&mut writer, bytes);
        writer.flush().unwrap();
    }

    fn put_all(writer: &mut Writer, bytes: &[u8]) {
        let mut bytes = Bytes::copy_from_slice(bytes);
        while let Some(step) = writer.next(&mut bytes) {
            step.hash().write().unwrap();
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        std::fs::read_dir(dir.join("blobs")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[tokio::test]
    async fn h09_what_an_earlier_run_left_is_continued_and_the_name_comes_last() {
        let dir = tempfile::tempdir().unwrap();
        let blob = dir.path().join("blobs/x");
        let partial = Partial::open(paths(dir.path()), &hello(), None).unwrap();
        put(&partial, 4, b"o\n");
        put(&partial, 0, b"he");
        drop(partial);
        assert_eq!(left(&paths(dir.path()), 6), Some(4));
        let partial = Partial::open(paths(dir.path()), &hello(), None).unwrap();
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
        let partial = Partial::open(paths(dir.path()), &hello(), None).unwrap();
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
        assert_eq!(Partial::open(there.clone(), &hello(), None).unwrap().have(), 0);
        std::fs::remove_file(&there.data).unwrap();
        std::fs::write(&there.foreign, b"hel").unwrap();
        assert_eq!(left(&there, 6), Some(3));
        let partial = Partial::open(there, &hello(), None).unwrap();
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
        assert_eq!(Partial::open(there, &hello(), None).unwrap().gaps(), [0..6]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn many_writers_out_of_order_make_the_right_file() {
        many_writers(None).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn many_writers_of_whom_some_go_past_the_page_cache_make_the_right_file() {
        many_writers(Some(Arc::default())).await;
    }

    async fn many_writers(past: Option<Arc<Blocks>>) {
        let dir = tempfile::tempdir().unwrap();
        let (content, remote) = noise((8 << 20) + 5);
        let partial = Partial::open(paths(dir.path()), &remote, past).unwrap();
        let content = Arc::new(content);
        let mut writers = tokio::task::JoinSet::new();
        for n in 0..8u64 {
            let (partial, content) = (partial.clone(), content.clone());
            writers.spawn(async move {
                let mut writer = partial.writer(n << 20).unwrap();
                // Steps of many lengths; a pause so that the writers really mix.
                let end_of_all = if n == 7 { content.len() } else { usize::try_from((n + 1) << 20).unwrap() };
                while writer.at() < end_of_all as u64 {
                    let at = usize::try_from(writer.at()).unwrap();
                    let end = (at + 10_007 + 40_009 * (at % 7)).min(end_of_all);
                    put_all(&mut writer, &content[at..end]);
                    tokio::task::yield_now().await;
                }
                writer.flush().unwrap();
            });
        }
        writers.join_all().await;
        let blob = dir.path().join("blobs/x");
        assert_eq!(partial.finish(&blob).await.unwrap(), Finished::Right);
        assert!(std::fs::read(&blob).unwrap() == *content);
    }

    /// A write that fails, of a full disk: its bytes were hashed and are not there.
    #[tokio::test]
    async fn h02_a_hash_that_is_not_brought_back_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let partial = Partial::open(paths(dir.path()), &hello(), None).unwrap();
        put(&partial, 0, b"he");
        partial.hasher_at(2).unwrap().update(b"XX");
        assert!(!partial.hash_stands_at(2));
        partial.hash_anew();
        put(&partial, 2, b"llo\n");
        assert_eq!(partial.finish(&dir.path().join("blobs/x")).await.unwrap(), Finished::Right);
    }

    /// A hub that turns out not to serve ranges: what reads back and what pushes may still be at the file of before.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn h04_a_file_that_begins_anew_has_nothing_of_its_life_before() {
        let dir = tempfile::tempdir().unwrap();
        let (content, remote) = noise(1 << 20);
        let half = content.len() / 2;
        for turn in 0..100 {
            let partial = Partial::open(paths(dir.path()), &remote, None).unwrap();
            // Out of order, so that it is read back in another thread.
            put(&partial, half as u64, &content[half..]);
            put(&partial, 0, &vec![0xee; half]);
            if turn % 2 == 0 {
                tokio::task::yield_now().await;
            }
            partial.restart().unwrap();
            put(&partial, 0, &content);
            assert_eq!(partial.finish(&dir.path().join("blobs/x")).await.unwrap(), Finished::Right, "turn {turn}");
        }
    }
}
