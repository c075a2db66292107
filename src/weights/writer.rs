//! One connection's place in a growing blob: what it brings is cut and gathered into whole steps of the file, so that each is
//! one write and is hashed while it is in the CPU's cache, however small the network's pieces are (TLS: 16 KiB). A step that
//! may go past the page cache is a block of its own memory (`direct_io`).

use std::ops::Deref;
use std::sync::Arc;

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::task::JoinHandle;

use super::direct_io::Block;
use super::verify::Hasher;
use super::write::{Partial, Taken};

/// What is written at once through the page cache, from a multiple of it on: whole large folios. Measured on ext4: 0.31 CPU
/// s/GB (256 KiB: 0.28), where steps of 32 KiB take 0.42 and of 4 KiB 1.2.
const STEP: usize = 128 << 10;

#[derive(Debug)]
pub struct Writer {
    partial: Arc<Partial>,
    range: usize,
    /// Handed out up to here.
    cut: u64,
    /// What follows on its way past the page cache; never a whole block.
    block: Option<Block>,
    /// What follows, where there is no block, on its way through it; never a whole step.
    held: BytesMut,
    /// The block that the disk is taking. One at a time: of a range counts what is there from its beginning on.
    writing: Option<JoinHandle<std::io::Result<()>>>,
}

/// Bytes of a blob that are to be hashed, if the hash stands there, and written.
#[derive(Debug)]
#[must_use = "bytes that nobody writes are lost"]
pub struct Step {
    partial: Arc<Partial>,
    range: usize,
    from: u64,
    bytes: StepBytes,
}

#[derive(Debug)]
pub(super) enum StepBytes {
    Loose(Bytes),
    Block(Block),
}

/// A step whose bytes are in the hash, if that stood there.
#[derive(Debug)]
#[must_use = "bytes that nobody writes are lost"]
pub struct Hashed(Step);

impl Deref for StepBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Loose(bytes) => bytes,
            Self::Block(block) => block,
        }
    }
}

impl Writer {
    pub(super) fn new(partial: Arc<Partial>, range: usize, from: u64) -> Self {
        Self { partial, range, cut: from, block: None, held: BytesMut::new(), writing: None }
    }

    /// Where the next byte goes.
    pub fn at(&self) -> u64 {
        self.cut + self.block.as_ref().map_or(self.held.len(), |block| block.len()) as u64
    }

    /// The next whole step, with bytes from the beginning of these; none: all of them are taken. A step must be hashed and
    /// put before the next one is asked for.
    pub fn next(&mut self, bytes: &mut Bytes) -> Option<Step> {
        if self.at() == self.cut && !bytes.is_empty() {
            self.block = self.partial.block_at(self.cut);
        }
        if let Some(block) = &mut self.block {
            bytes.advance(block.fill(bytes));
            return block.is_full().then(|| self.rest());
        }
        let room = STEP - (self.at() % STEP as u64) as usize;
        if self.held.is_empty() && bytes.len() >= room {
            return Some(self.step(StepBytes::Loose(bytes.split_to(room))));
        }
        if self.held.capacity() < STEP {
            // The memory of the step before, once that is written.
            self.held.reserve(STEP);
        }
        let first = bytes.split_to(bytes.len().min(room));
        self.held.extend_from_slice(&first);
        (first.len() == room).then(|| self.rest())
    }

    /// Writes a step behind the one that was put before. A block is on its way to the disk when this returns, anything else is
    /// in the page cache, which blocks as that does.
    pub async fn put(&mut self, step: Hashed) -> std::io::Result<()> {
        self.settled().await?;
        if matches!(step.0.bytes, StepBytes::Block(_)) {
            self.writing = Some(tokio::task::spawn_blocking(move || step.write()));
            Ok(())
        } else {
            step.write()
        }
    }

    /// Waits until what was put is at its place.
    async fn settled(&mut self) -> std::io::Result<()> {
        let Some(writing) = &mut self.writing else { return Ok(()) };
        let written = writing.await;
        self.writing = None;
        written.unwrap_or_else(|join| Err(std::io::Error::other(join)))
    }

    /// Writes what is held.
    pub async fn flush(&mut self) -> std::io::Result<()> {
        self.settled().await?;
        self.write_held()
    }

    fn write_held(&mut self) -> std::io::Result<()> {
        if self.at() == self.cut { Ok(()) } else { self.rest().hash().write() }
    }

    fn rest(&mut self) -> Step {
        let rest = match self.block.take() {
            Some(block) => StepBytes::Block(block),
            None => StepBytes::Loose(self.held.split().freeze()),
        };
        self.step(rest)
    }

    fn step(&mut self, bytes: StepBytes) -> Step {
        let from = self.cut;
        self.cut += bytes.len() as u64;
        Step { partial: self.partial.clone(), range: self.range, from, bytes }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Stopped half-way: without it these few bytes are fetched again. Behind a block that may not be there yet they must be.
        if self.writing.is_none() {
            let _ = self.write_held();
        }
    }
}

impl Step {
    pub fn hash(self) -> Hashed {
        let taken = self.partial.hasher_at(self.from);
        self.feed(taken);
        Hashed(self)
    }

    /// Both, together where both are to be hashed.
    pub fn hash_both([one, other]: [Self; 2]) -> [Hashed; 2] {
        match [&one, &other].map(|step| step.partial.hasher_at(step.from)) {
            [Some(mut a), Some(mut b)] => {
                Hasher::update_both([&mut a.hasher, &mut b.hasher], [&one.bytes, &other.bytes]);
                one.partial.bring_back(a, one.end());
                other.partial.bring_back(b, other.end());
            }
            [a, b] => {
                one.feed(a);
                other.feed(b);
            }
        }
        [Hashed(one), Hashed(other)]
    }

    fn end(&self) -> u64 {
        self.from + self.bytes.len() as u64
    }

    fn feed(&self, taken: Option<Taken>) {
        if let Some(mut taken) = taken {
            taken.hasher.update(&self.bytes);
            self.partial.bring_back(taken, self.end());
        }
    }

    /// Whether both could be hashed, each into a hash of its own.
    pub fn pairs_with(&self, other: &Self) -> bool {
        !Arc::ptr_eq(&self.partial, &other.partial)
            && self.partial.hash_stands_at(self.from)
            && other.partial.hash_stands_at(other.from)
    }
}

impl Hashed {
    /// Blocks as the disk does.
    fn write(self) -> std::io::Result<()> {
        let Self(step) = self;
        let past = step.partial.write(step.from, &step.bytes)?;
        step.partial.written(step.range, step.from..step.end(), past)
    }
}
