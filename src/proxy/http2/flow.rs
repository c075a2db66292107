//! One stream, as its request, its body, its answer and its connection know it together.
//!
//! Each piece of an answer that is given to h2 counts itself until its last byte has gone to the
//! socket: so it is known how much waits, whether anything moves, and when the last words are out.
//! It sends nothing itself.

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;
use std::task::Waker;

use bytes::{Buf, Bytes};

use super::super::framing::Violation;

/// Bytes of an answer that may wait in h2 before no more is read from the engine. With the piece that
/// is over it and no larger than a worker's read buffer, a reader that stalls costs 128 KiB.
pub const MOST_UNSENT: usize = 64 * 1024;

/// Looks (beats of the connection) at a stream that does not move before it is cut.
pub const STILL: u32 = 4;

/// What is to become of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Open,
    /// The client has reset it, or is gone.
    Left,
    /// The client has taken nothing for too long.
    Stalled,
}

/// What the stream's task waits for of the bytes that h2 holds. Nobody is woken for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    Nothing,
    /// Less than [`MOST_UNSENT`].
    Room,
    /// None.
    End,
}

/// Whether the request's body was asked for: who expects a 100 gets it then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    NotYet,
    Yes,
}

pub struct Flow {
    fate: Cell<Fate>,
    wanted: Cell<Wanted>,
    refusal: Cell<Option<Violation>>,
    /// Bytes that h2 holds for the client.
    unsent: Cell<usize>,
    /// All bytes that ever went out.
    sent: Cell<u64>,
    /// `sent` at the last look, and how many looks found it unchanged with bytes waiting.
    seen: Cell<(u64, u32)>,
    awaited: Cell<Awaited>,
    waker: Cell<Option<Waker>>,
}

impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flow").field("fate", &self.fate).field("unsent", &self.unsent).finish_non_exhaustive()
    }
}

impl Flow {
    pub fn new(refusal: Option<Violation>) -> Rc<Self> {
        Rc::new(Self {
            fate: Cell::new(Fate::Open),
            wanted: Cell::new(Wanted::NotYet),
            refusal: Cell::new(refusal),
            unsent: Cell::new(0),
            sent: Cell::new(0),
            seen: Cell::new((0, 0)),
            awaited: Cell::new(Awaited::Nothing),
            waker: Cell::new(None),
        })
    }

    pub fn fate(&self) -> Fate {
        self.fate.get()
    }

    pub fn has_left(&self) -> bool {
        self.fate.get() == Fate::Left
    }

    /// The client no longer waits.
    pub fn leave(&self) {
        self.fate.set(Fate::Left);
    }

    pub fn refusal(&self) -> Option<Violation> {
        self.refusal.get()
    }

    pub fn wanted(&self) -> Wanted {
        self.wanted.get()
    }

    /// The request's body is asked for.
    pub fn want(&self) {
        self.wanted.set(Wanted::Yes);
    }

    pub fn unsent(&self) -> usize {
        self.unsent.get()
    }

    /// To be woken when enough went out.
    pub fn wait(&self, awaited: Awaited) {
        self.awaited.set(awaited);
    }

    /// The task to wake for what it waits for, or when the stream's fate has changed.
    pub fn register(&self, waker: &Waker) {
        let kept = self.waker.take().filter(|kept| kept.will_wake(waker));
        self.waker.set(Some(kept.unwrap_or_else(|| waker.clone())));
    }

    pub fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Looks whether the client still takes what is for it.
    pub fn look(&self) {
        let (sent, still) = self.seen.get();
        let still = if self.unsent.get() > 0 && sent == self.sent.get() { still + 1 } else { 0 };
        self.seen.set((self.sent.get(), still));
        if still >= STILL && self.fate.get() == Fate::Open {
            self.fate.set(Fate::Stalled);
            self.wake();
        }
    }

    fn went_out(&self, count: usize) {
        let unsent = self.unsent.get().saturating_sub(count);
        self.unsent.set(unsent);
        self.sent.set(self.sent.get() + count as u64);
        let enough = match self.awaited.get() {
            Awaited::Nothing => false,
            Awaited::Room => unsent < MOST_UNSENT,
            Awaited::End => unsent == 0,
        };
        if enough {
            self.awaited.set(Awaited::Nothing);
            self.wake();
        }
    }
}

/// A piece of an answer in h2's hands.
#[derive(Debug)]
pub struct Piece {
    bytes: Bytes,
    flow: Rc<Flow>,
}

impl Piece {
    pub fn new(bytes: Bytes, flow: &Rc<Flow>) -> Self {
        flow.unsent.set(flow.unsent.get() + bytes.len());
        Self { bytes, flow: Rc::clone(flow) }
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.bytes
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        self.flow.went_out(count);
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // Thrown away with its stream.
        if !self.bytes.is_empty() {
            self.flow.went_out(self.bytes.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_counts_until_its_last_byte_is_out() {
        let flow = Flow::new(None);
        let mut first = Piece::new(Bytes::from_static(b"12345"), &flow);
        let second = Piece::new(Bytes::from_static(b"678"), &flow);
        assert_eq!(flow.unsent(), 8);
        first.advance(3);
        assert_eq!(flow.unsent(), 5);
        drop(second);
        assert_eq!(flow.unsent(), 2);
        first.advance(2);
        drop(first);
        assert_eq!(flow.unsent(), 0);
    }

    #[test]
    fn only_a_stream_with_bytes_that_do_not_move_is_cut() {
        let flow = Flow::new(None);
        for _ in 0..10 {
            flow.look();
        }
        let mut piece = Piece::new(Bytes::from_static(b"1234567890"), &flow);
        for _ in 0..8 {
            flow.look();
            piece.advance(1);
        }
        assert_eq!(flow.fate(), Fate::Open);
        for _ in 0..STILL {
            assert_eq!(flow.fate(), Fate::Open);
            flow.look();
        }
        // The first of them saw the last byte go.
        assert_eq!(flow.fate(), Fate::Open);
        flow.look();
        assert_eq!(flow.fate(), Fate::Stalled);
    }
}
