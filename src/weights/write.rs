//! A blob while it grows, from several connections at once: bytes go to their places in a file beside it, the hash
//! follows over what is there without a gap, and the file takes its final name only when it is whole and right.
//!
//! A `writer` that stands where the hash stands has its bytes hashed while they are in the CPU's cache, and they may go past
//! the page cache (`direct_io`); what arrived out of order is read back from it beside them (`behind`). What an earlier run
//! left is `left`'s.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::behind;
use super::direct_io::{Block, Blocks, Direct, Past};
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
    /// How often the hash began anew, with all bytes or without: who hashes or pushes bytes may still be at those of before.
    pub life: u32,
    /// Bytes of the page cache that may not be on the disk yet; see [`behind::PAST_CACHE`].
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

/// The hash, handed out.
#[derive(Debug)]
pub(super) struct Taken {
    pub hasher: Hasher,
    life: u32,
}

impl State {
    fn hash_anew(&mut self, fresh: Hasher) {
        self.life += 1;
        self.hasher = Some(fresh);
        self.hashed = 0;
    }
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

    /// The hash, if it stands there: to be fed with the bytes from there on and brought back.
    pub(super) fn hasher_at(&self, from: u64) -> Option<Taken> {
        let mut state = self.state();
        if state.hashed != from {
            return None;
        }
        Some(Taken { hasher: state.hasher.take()?, life: state.life })
    }

    /// Whether bytes that belong there are hashed on their way.
    pub(super) fn hash_stands_at(&self, from: u64) -> bool {
        let state = self.state();
        state.hashed == from && state.hasher.is_some()
    }

    /// It has seen the bytes up to here, of which the last ones need not be at their place yet.
    pub(super) fn bring_back(&self, taken: Taken, to: u64) {
        if let Some(mut state) = self.state_in(taken.life) {
            state.hasher = Some(taken.hasher);
            state.hashed = to;
        }
    }

    /// Puts these bytes to their place, past the page cache or not. Blocks as the disk does.
    pub(super) fn write(&self, from: u64, bytes: &StepBytes) -> std::io::Result<Past> {
        let past = match (&self.direct, bytes) {
            (Some(direct), StepBytes::Block(block)) => direct.write(block, from),
            _ => Ok(Past::Not),
        };
        let written = match past {
            Ok(Past::Not) => self.file.write_all_at(bytes, from).map(|()| Past::Not),
            past => past,
        };
        if written.is_err() {
            // The hash has seen bytes that are not there.
            self.state().hash_anew(self.fresh_hasher());
        }
        written
    }

    /// These bytes, which belong to `range`, are at their place.
    pub(super) fn written(self: &Arc<Self>, range: usize, bytes: Range<u64>, past: Past) -> std::io::Result<()> {
        let Range { start: from, end: to } = bytes;
        let mut state = self.state();
        state.done.add(from..to);
        state.unpushed += match past {
            Past::Written => (to - from) / behind::PAST_CACHE,
            Past::Not => to - from,
        };
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
        state.hash_anew(self.fresh_hasher());
        self.file.set_len(0)?;
        state.done = Ranges::default();
        state.journal = Journal::begin(&self.paths.journal, self.size, &self.boot, &state.done)?;
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
mod tests;
