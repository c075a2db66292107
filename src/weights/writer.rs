//! One connection's place in a growing blob: what it brings is gathered into whole steps of the file, so that each is
//! one write and is hashed while it is in the CPU's cache, however small the network's pieces are (TLS: 16 KiB).

use std::sync::Arc;

use super::write::Partial;

/// What is written at once, from a multiple of it on: whole large folios of the page cache. Measured on ext4: 0.31 CPU
/// s/GB (256 KiB: 0.28), where steps of 32 KiB take 0.42 and of 4 KiB 1.2. The most that a kill loses of what the
/// fetcher has seen, a connection.
const STEP: usize = 128 << 10;

#[derive(Debug)]
pub struct Writer {
    partial: Arc<Partial>,
    range: usize,
    /// Written up to here.
    written: u64,
    /// What follows and is not written yet; never a whole step.
    held: Vec<u8>,
}

impl Writer {
    pub(super) fn new(partial: Arc<Partial>, range: usize, from: u64) -> Self {
        Self { partial, range, written: from, held: Vec::new() }
    }

    /// Where the next byte goes.
    pub fn at(&self) -> u64 {
        self.written + self.held.len() as u64
    }

    /// Takes bytes, and writes as many steps as are full. Blocks as the disk does.
    pub fn take(&mut self, mut bytes: &[u8]) -> std::io::Result<()> {
        loop {
            let room = STEP - (self.at() % STEP as u64) as usize;
            let Some((first, rest)) = bytes.split_at_checked(room) else { break };
            if self.held.is_empty() {
                self.put(first)?;
            } else {
                self.held.extend_from_slice(first);
                self.flush()?;
            }
            bytes = rest;
        }
        if self.held.capacity() == 0 {
            self.held.reserve_exact(STEP);
        }
        self.held.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes what is held.
    pub fn flush(&mut self) -> std::io::Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        let mut held = std::mem::take(&mut self.held);
        let put = self.put(&held);
        held.clear();
        self.held = held;
        put
    }

    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.partial.put(self.range, self.written, bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Stopped half-way: without it these few bytes are fetched again.
        let _ = self.flush();
    }
}
