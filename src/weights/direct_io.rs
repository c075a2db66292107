//! Writes that go past the page cache (`O_DIRECT`, open(2)): the disk takes the bytes from where they lie. Nothing is copied,
//! nothing that a serving engine's files have in memory is pushed out, and the fetcher's own `ioprio` is that of its writes,
//! which are the kernel's else. Measured onto ext4: 0.05 to 0.08 CPU s/GB from memory that lies together ([`crate::sys::slab`]), 0.13 to
//! 0.2 from scattered pages, where the way through the cache takes 0.8.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::OFlag;

use crate::sys::slab::{Part, Slab};

/// One write, from a multiple of it on. A kill loses at most two of them a connection: one that is filled, one that the disk takes.
pub const BLOCK: usize = 512 << 10;

/// The memory of blocks, used again and again: a gigabyte of fresh memory costs more than to hash it.
#[derive(Debug, Default)]
pub struct Blocks(Mutex<Vec<Part>>);

/// Memory of one write, from empty to full.
#[derive(Debug)]
pub struct Block {
    /// None only while it is on its way home.
    memory: Option<Part>,
    filled: usize,
    home: Arc<Blocks>,
}

/// What became of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Past {
    Written,
    /// It must go through the cache, whatever lies at its place now.
    Not,
}

/// A blob's second descriptor.
#[derive(Debug)]
pub struct Direct {
    file: File,
    blocks: Arc<Blocks>,
    /// The file system took it at the opening, and would not at a write.
    refused: AtomicBool,
}

impl Blocks {
    fn free(&self) -> MutexGuard<'_, Vec<Part>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> io::Result<Part> {
        let mut free = self.free();
        if free.is_empty() {
            free.extend(Slab::new()?.cut(BLOCK));
        }
        free.pop().ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }
}

impl Block {
    fn new(home: Arc<Blocks>) -> io::Result<Self> {
        Ok(Self { memory: Some(home.take()?), filled: 0, home })
    }

    /// Takes as many of these bytes as there is room for, and says how many.
    pub fn fill(&mut self, bytes: &[u8]) -> usize {
        let Some(memory) = &mut self.memory else { return 0 };
        let taken = bytes.len().min(BLOCK - self.filled);
        memory[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
        self.filled += taken;
        taken
    }

    pub fn is_full(&self) -> bool {
        self.filled == BLOCK
    }
}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], |memory| &memory[..self.filled])
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.home.free().extend(self.memory.take());
    }
}

impl Direct {
    /// None: this file system does not do it.
    pub fn open(path: &Path, blocks: Arc<Blocks>) -> Option<Self> {
        let opened = OpenOptions::new().write(true).custom_flags(OFlag::O_DIRECT.bits()).open(path);
        let file = opened.inspect_err(|error| tracing::debug!(path = %path.display(), %error, "no direct I/O")).ok()?;
        Some(Self { file, blocks, refused: AtomicBool::new(false) })
    }

    /// An empty block for bytes from here on; none where they must go through the cache, or where there is no memory.
    pub fn block_at(&self, from: u64) -> Option<Block> {
        let takes = from.is_multiple_of(BLOCK as u64) && !self.refused.load(Ordering::Relaxed);
        takes.then(|| Block::new(self.blocks.clone()).ok()).flatten()
    }

    /// Blocks as the disk does.
    pub fn write(&self, block: &Block, from: u64) -> io::Result<Past> {
        if !block.is_full() || self.refused.load(Ordering::Relaxed) {
            return Ok(Past::Not);
        }
        match self.file.write_all_at(block, from) {
            Ok(()) => Ok(Past::Written),
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => {
                // Asks for a larger alignment, or wrote a part and could not go on from there.
                self.refused.store(true, Ordering::Relaxed);
                tracing::debug!(%error, "no direct I/O");
                Ok(Past::Not)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> Direct {
        let path = dir.join("x");
        std::fs::write(&path, b"").unwrap();
        Direct::open(&path, Arc::default())
            .expect("temporary files lie on a file system with direct I/O: ext4, xfs, btrfs, tmpfs of 6.6")
    }

    #[test]
    fn a_block_is_aligned_takes_what_fits_and_its_memory_is_used_again() {
        let blocks = Arc::<Blocks>::default();
        let mut block = Block::new(blocks.clone()).unwrap();
        assert_eq!(block.fill(&[1; 100]), 100);
        assert_eq!(block.fill(&vec![2; BLOCK]), BLOCK - 100);
        assert_eq!(block.fill(&[3]), 0);
        assert!(block.is_full());
        assert_eq!((block.as_ptr() as usize % BLOCK, block[99], block[100], block.len()), (0, 1, 2, BLOCK));
        let memory = block.as_ptr();
        let free = blocks.free().len();
        drop(block);
        let mut again = Block::new(blocks.clone()).unwrap();
        assert!(again.is_empty());
        again.fill(&[3]);
        assert_eq!((again.as_ptr(), blocks.free().len()), (memory, free));
    }

    #[test]
    fn what_is_not_a_whole_block_at_its_place_goes_through_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let direct = open(dir.path());
        assert!(direct.block_at(1).is_none());
        let mut block = direct.block_at(BLOCK as u64).unwrap();
        block.fill(&vec![7; BLOCK - 1]);
        assert_eq!(direct.write(&block, 0).unwrap(), Past::Not);
        block.fill(&[8]);
        assert_eq!(direct.write(&block, BLOCK as u64).unwrap(), Past::Written);
        let content = std::fs::read(dir.path().join("x")).unwrap();
        assert_eq!((content.len(), content[BLOCK], content[2 * BLOCK - 1]), (2 * BLOCK, 7, 8));
    }

    /// As a disk that asks for more than is known would say: EINVAL at each write, not at the opening.
    #[test]
    fn a_file_system_that_refuses_at_a_write_is_not_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let direct = open(dir.path());
        let mut block = direct.block_at(0).unwrap();
        block.fill(&vec![7; BLOCK]);
        assert_eq!(direct.write(&block, 1 << 63).unwrap(), Past::Not, "pwrite(2): a negative place");
        assert!(direct.block_at(0).is_none());
        assert_eq!(direct.write(&block, 0).unwrap(), Past::Not);
    }
}
