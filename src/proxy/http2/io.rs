//! The client's socket as h2 sees it: every byte that comes or goes passes the watch.
//!
//! Bytes are never changed. When the watch says stop, what has come is thrown away and nothing more is
//! read: the connection then ends with the reason. It also keeps the clock of a reader that has
//! stopped reading.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::super::wire::{Wire, with_buffer};
use super::watch::Watch;

/// What the connection asks of its own bytes.
#[derive(Debug)]
pub struct Seen {
    pub watch: RefCell<Watch>,
    verdict: Cell<Option<Reason>>,
    /// Bytes that have come.
    read: Cell<u64>,
}

impl Seen {
    pub fn new() -> Rc<Self> {
        let watch = RefCell::new(Watch::new(Instant::now()));
        Rc::new(Self { watch, verdict: Cell::new(None), read: Cell::new(0) })
    }

    /// Why the connection must end, if it must.
    pub fn verdict(&self) -> Option<Reason> {
        self.verdict.get()
    }

    pub fn read(&self) -> u64 {
        self.read.get()
    }
}

/// The I/O under h2.
pub struct Io {
    wire: Rc<Wire>,
    seen: Rc<Seen>,
    /// Read before it was known that this is HTTP/2.
    early: Vec<u8>,
    patience: Duration,
    write_timer: Option<Pin<Box<Sleep>>>,
}

impl fmt::Debug for Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Io").field("wire", &self.wire).field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl Io {
    pub fn new(wire: Rc<Wire>, seen: Rc<Seen>, early: Vec<u8>, patience: Duration) -> Self {
        Self { wire, seen, early, patience, write_timer: None }
    }

    /// A write went through or not: keeps the clock of a reader that stalls.
    fn poll_stall<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.write_timer = None;
            return written;
        }
        let patience = self.patience;
        let timer = self.write_timer.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl Seen {
    /// Judges `bytes` before h2 gets them.
    fn judge(&self, bytes: &[u8]) -> Result<(), Reason> {
        self.read.set(self.read.get() + bytes.len() as u64);
        let verdict = self.watch.borrow_mut().read(bytes, Instant::now);
        self.verdict.set(verdict.err());
        verdict
    }

    fn wrote(&self, slices: &[io::IoSlice<'_>], mut count: usize) {
        let mut watch = self.watch.borrow_mut();
        for slice in slices {
            let out = slice.len().min(count);
            count -= out;
            if let Err(reason) = watch.wrote(&slice[..out], Instant::now) {
                self.verdict.set(Some(reason));
            }
        }
    }
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.seen.verdict.get().is_some() {
            // The connection, in whose poll this is, sees the verdict next.
            return Poll::Pending;
        }
        if !this.early.is_empty() {
            let taken = this.early.len().min(out.remaining());
            let early: Vec<u8> = this.early.drain(..taken).collect();
            return match this.seen.judge(&early) {
                Ok(()) => {
                    out.put_slice(&early);
                    Poll::Ready(Ok(()))
                }
                Err(_) => Poll::Pending,
            };
        }
        with_buffer(|buffer| {
            let room = out.remaining().min(buffer.len());
            let read = ready!(this.wire.poll_read(cx, &mut buffer[..room]))?;
            if read == 0 {
                this.wire.end();
            } else if this.seen.judge(&buffer[..read]).is_err() {
                return Poll::Pending;
            }
            out.put_slice(&buffer[..read]);
            Poll::Ready(Ok(()))
        })
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = this.wire.poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = &written {
            this.seen.wrote(&[io::IoSlice::new(bytes)], *count);
        }
        this.poll_stall(cx, written)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = this.wire.poll_flush(cx);
        this.poll_stall(cx, flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire.poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = this.wire.poll_write_vectored(cx, slices);
        if let Poll::Ready(Ok(count)) = &written {
            this.seen.wrote(slices, *count);
        }
        this.poll_stall(cx, written)
    }
}
