//! A connected socket as a byte stream: TCP or Unix, read and written without a lock or an allocation.
//!
//! Methods take `&self`, so that who reads, who writes and who waits for the client's leaving can
//! share one socket within a thread.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::task::{Context, Poll, ready};

use hyper::rt::ReadBufCursor;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

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

/// A client's socket.
#[derive(Debug)]
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    pub fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => poll_read_once(stream, cx, buffer),
            Self::Unix(stream) => poll_read_once(stream, cx, buffer),
        }
    }

    /// Reads once, at most `most` bytes, into memory that nobody has written to.
    pub fn poll_receive(
        &self,
        cx: &mut Context<'_>,
        out: &mut ReadBufCursor<'_>,
        most: usize,
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => poll_read_with(stream, cx, most, |stream| stream.try_receive(out, most)),
            Self::Unix(stream) => poll_read_with(stream, cx, most, |stream| stream.try_receive(out, most)),
        }
    }

    pub fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => poll_write_with(stream, cx, |stream| stream.try_write(bytes)),
            Self::Unix(stream) => poll_write_with(stream, cx, |stream| stream.try_write(bytes)),
        }
    }

    /// As much as the kernel takes at once. Who gets less back asks [`Self::poll_write`], which is woken and tells errors.
    pub fn write_now(&self, bytes: &[u8]) -> usize {
        let written = match self {
            Self::Tcp(stream) => stream.try_write(bytes),
            Self::Unix(stream) => stream.try_write(bytes),
        };
        written.unwrap_or(0)
    }

    pub fn poll_write_vectored(&self, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => poll_write_with(stream, cx, |stream| stream.try_write_vectored(slices)),
            Self::Unix(stream) => poll_write_with(stream, cx, |stream| stream.try_write_vectored(slices)),
        }
    }

    /// Waits for a byte and leaves it where it is; none: the other side has closed.
    pub async fn peek(&self) -> io::Result<Option<u8>> {
        fn peek(socket: RawFd) -> io::Result<Option<u8>> {
            let mut byte = [0];
            let read = recv(socket, &mut byte, MsgFlags::MSG_PEEK)?;
            Ok((read > 0).then_some(byte[0]))
        }
        match self {
            Self::Tcp(stream) => stream.async_io(Interest::READABLE, || peek(stream.as_raw_fd())).await,
            Self::Unix(stream) => stream.async_io(Interest::READABLE, || peek(stream.as_raw_fd())).await,
        }
    }

    /// Says that nothing more will be written (FIN).
    pub fn shut_write(&self) -> io::Result<()> {
        let socket = match self {
            Self::Tcp(stream) => socket2::SockRef::from(stream),
            Self::Unix(stream) => socket2::SockRef::from(stream),
        };
        match socket.shutdown(Shutdown::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            outcome => outcome,
        }
    }

    /// Waits until the other side has closed or reset its end, whatever it sent before. Nothing is
    /// read: EPOLLRDHUP comes without data, and tokio reports it to who waits for priority readiness.
    pub async fn left(&self) {
        let _ = match self {
            Self::Tcp(stream) => stream.ready(Interest::PRIORITY).await,
            Self::Unix(stream) => stream.ready(Interest::PRIORITY).await,
        };
    }
}
