//! A connected socket as a byte stream: TCP or Unix, read and written without a lock or an allocation.
//!
//! Methods take `&self`, so that who reads, who writes and who waits for the other side's leaving can
//! share one socket within a thread. Few bytes go through the [`outbox`]: they are with the kernel before the
//! worker's turn ends, and nothing that is written later overtakes them. What the kernel does not take of them is
//! kept here, and goes out before anything else.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use hyper::rt::ReadBufCursor;
use nix::sys::socket::{MsgFlags, recv};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

use super::outbox;
use crate::sys::receive::receive;

/// What tokio's sockets have in common and no trait of tokio's says.
pub trait Ends {
    fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
    fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize>;
    /// The same, at most `most` bytes, into memory that nobody has written to.
    fn try_receive(&self, out: &mut ReadBufCursor<'_>, most: usize) -> io::Result<usize>;
    /// Forgets the readiness to be read, until the kernel reports it again.
    fn forget_readiness(&self);
}

macro_rules! ends {
    ($($stream:ty),*) => {$(
        impl Ends for $stream {
            fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                <$stream>::poll_read_ready(self, cx)
            }
            fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                <$stream>::poll_write_ready(self, cx)
            }
            fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
                <$stream>::try_read(self, buffer)
            }
            fn try_receive(&self, out: &mut ReadBufCursor<'_>, most: usize) -> io::Result<usize> {
                self.try_io(Interest::READABLE, || receive(self.as_fd(), out, most))
            }
            fn forget_readiness(&self) {
                let _: io::Result<()> = self.try_io(Interest::READABLE, || Err(io::ErrorKind::WouldBlock.into()));
            }
        }
    )*};
}
ends!(TcpStream, UnixStream);

/// Reads once into `buffer`. After a short read the readiness is given back at once: the socket is
/// empty then, and asking it again would be a system call for nothing (edge-triggered epoll reports
/// whatever comes later).
pub fn poll_read_once(stream: &impl Ends, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
    let most = buffer.len();
    poll_read_with(stream, cx, most, |stream| stream.try_read(buffer))
}

fn poll_read_with<S: Ends>(
    stream: &S,
    cx: &mut Context<'_>,
    most: usize,
    mut read: impl FnMut(&S) -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        ready!(stream.poll_read_ready(cx))?;
        match read(stream) {
            Ok(read) => {
                if read > 0 && read < most {
                    stream.forget_readiness();
                }
                return Poll::Ready(Ok(read));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Poll::Ready(Err(error)),
        }
    }
}

fn poll_write_with<S: Ends>(
    stream: &S,
    cx: &mut Context<'_>,
    mut write: impl FnMut(&S) -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        ready!(stream.poll_write_ready(cx))?;
        match write(stream) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            outcome => return Poll::Ready(outcome),
        }
    }
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A client's socket, or the engine's.
pub struct Socket {
    stream: Stream,
    /// Something of it is in the outbox.
    posted: Cell<bool>,
    /// What the kernel did not take of what was posted.
    unwritten: RefCell<Vec<u8>>,
    /// Who is to write that.
    writer: Cell<Option<Waker>>,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket").field("stream", &self.stream).finish_non_exhaustive()
    }
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        Self::new(Stream::Tcp(stream))
    }
}

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        Self::new(Stream::Unix(stream))
    }
}

impl Socket {
    fn new(stream: Stream) -> Self {
        Self { stream, posted: Cell::new(false), unwritten: RefCell::default(), writer: Cell::new(None) }
    }

    pub fn is_tcp(&self) -> bool {
        matches!(self.stream, Stream::Tcp(_))
    }

    pub fn option(&self) -> SockRef<'_> {
        match &self.stream {
            Stream::Tcp(stream) => SockRef::from(stream),
            Stream::Unix(stream) => SockRef::from(stream),
        }
    }

    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.stream {
            Stream::Tcp(stream) => stream.poll_read_ready(cx),
            Stream::Unix(stream) => stream.poll_read_ready(cx),
        }
    }

    pub fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        match &self.stream {
            Stream::Tcp(stream) => poll_read_once(stream, cx, buffer),
            Stream::Unix(stream) => poll_read_once(stream, cx, buffer),
        }
    }

    /// Reads once, at most `most` bytes, into memory that nobody has written to.
    pub fn poll_receive(
        &self,
        cx: &mut Context<'_>,
        out: &mut ReadBufCursor<'_>,
        most: usize,
    ) -> Poll<io::Result<usize>> {
        match &self.stream {
            Stream::Tcp(stream) => poll_read_with(stream, cx, most, |stream| stream.try_receive(out, most)),
            Stream::Unix(stream) => poll_read_with(stream, cx, most, |stream| stream.try_receive(out, most)),
        }
    }

    /// Hands these bytes on, as many as are taken. Ready does not say that the kernel has them: see [`Self::poll_sent`].
    pub fn poll_write(self: &Rc<Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    pub fn poll_write_vectored(
        self: &Rc<Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_unwritten(cx))?;
        let length = slices.iter().map(|slice| slice.len()).sum();
        if length == 0 {
            return Poll::Ready(Ok(0));
        }
        if length <= outbox::LONGEST {
            self.wakes(cx);
            outbox::post(self, slices);
            return Poll::Ready(Ok(length));
        }
        self.settle();
        ready!(self.poll_unwritten(cx))?;
        match &self.stream {
            Stream::Tcp(stream) => poll_write_with(stream, cx, |stream| stream.try_write_vectored(slices)),
            Stream::Unix(stream) => poll_write_with(stream, cx, |stream| stream.try_write_vectored(slices)),
        }
    }

    /// The first bytes on a connection that has just been made: tokio has not heard yet that it may be written to, and would
    /// wait a turn to hear it.
    pub fn write_first(&self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.option().send_vectored(slices)
    }

    /// Who is to be woken where the kernel does not take what is posted.
    pub fn wakes(&self, cx: &Context<'_>) {
        let known = self.writer.take().filter(|known| known.will_wake(cx.waker()));
        self.writer.set(Some(known.unwrap_or_else(|| cx.waker().clone())));
    }

    /// A piece is in the outbox.
    pub fn posted(&self) {
        self.posted.set(true);
    }

    /// Hands to the kernel what comes out of the outbox.
    pub fn deliver(&self, bytes: &[u8]) {
        self.posted.set(false);
        self.hand_over(bytes);
    }

    /// Hands these bytes to the kernel, behind those that it did not take before. Nothing may be posted.
    pub fn hand_over(&self, bytes: &[u8]) {
        let mut unwritten = self.unwritten.borrow_mut();
        let written = if unwritten.is_empty() { self.write_now(bytes) } else { 0 };
        if written < bytes.len() {
            unwritten.extend_from_slice(&bytes[written..]);
            if let Some(writer) = self.writer.take() {
                writer.wake();
            }
        }
    }

    /// As much as the kernel takes at once. An error comes again, to who writes the rest.
    fn write_now(&self, bytes: &[u8]) -> usize {
        let written = match &self.stream {
            Stream::Tcp(stream) => stream.try_write(bytes),
            Stream::Unix(stream) => stream.try_write(bytes),
        };
        written.unwrap_or(0)
    }

    /// Whether the kernel took all that it was given.
    pub fn is_written(&self) -> bool {
        self.unwritten.borrow().is_empty()
    }

    /// Ready once the kernel took all that it was given; what is posted, it is given later.
    pub fn poll_unwritten(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut unwritten = self.unwritten.borrow_mut();
        while !unwritten.is_empty() {
            let written = ready!(match &self.stream {
                Stream::Tcp(stream) => poll_write_with(stream, cx, |stream| stream.try_write(&unwritten)),
                Stream::Unix(stream) => poll_write_with(stream, cx, |stream| stream.try_write(&unwritten)),
            })?;
            if written == unwritten.len() {
                // Its memory goes too: it is seldom needed.
                *unwritten = Vec::new();
            } else if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            } else {
                unwritten.drain(..written);
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Ready once the kernel has all. Nobody is woken when what is posted is delivered, for that is done within this turn: it
    /// is for who is woken by something else then, and must know where it failed.
    pub fn poll_sent(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_unwritten(cx))?;
        if self.posted.get() {
            self.wakes(cx);
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    /// Nothing that comes may overtake what is posted: it is delivered now.
    pub fn settle(&self) {
        if self.posted.get() {
            outbox::deliver();
        }
    }

    /// Waits for a byte and leaves it where it is; none: the other side has closed.
    pub async fn peek(&self) -> io::Result<Option<u8>> {
        fn peek(socket: RawFd) -> io::Result<Option<u8>> {
            let mut byte = [0];
            let read = recv(socket, &mut byte, MsgFlags::MSG_PEEK)?;
            Ok((read > 0).then_some(byte[0]))
        }
        match &self.stream {
            Stream::Tcp(stream) => stream.async_io(Interest::READABLE, || peek(stream.as_raw_fd())).await,
            Stream::Unix(stream) => stream.async_io(Interest::READABLE, || peek(stream.as_raw_fd())).await,
        }
    }

    /// Says that nothing more will be written (FIN), behind all that was.
    pub fn poll_shut(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.settle();
        ready!(self.poll_unwritten(cx))?;
        Poll::Ready(match self.option().shutdown(Shutdown::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            outcome => outcome,
        })
    }

    /// Waits until the other side has closed or reset its end, whatever it sent before. Nothing is
    /// read: EPOLLRDHUP comes without data, and tokio reports it to who waits for priority readiness.
    pub async fn left(&self) {
        let _ = match &self.stream {
            Stream::Tcp(stream) => stream.ready(Interest::PRIORITY).await,
            Stream::Unix(stream) => stream.ready(Interest::PRIORITY).await,
        };
    }
}
