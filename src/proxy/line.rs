//! What carries one request: a turn on a connection of HTTP/1, or a stream of HTTP/2.
//!
//! The service and the answer ask it whether their client still waits and whether the last event is
//! out; they do not know the protocol. It moves no byte.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame};
use hyper::body::Incoming;

use super::framing::Violation;
use super::headers::BodyFraming;
use super::http2;
use super::wire::{Held, Wire};

/// One request's way to its client.
#[derive(Debug, Clone)]
pub enum Line {
    /// The connection is the request's alone until its answer's end.
    Http1(Rc<Wire>),
    /// One of many; the connection's own end ends them all.
    Http2(Rc<http2::Flow>),
}

/// What may be read of a request that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ahead {
    Body,
    Nothing,
}

impl Line {
    /// A request has come.
    pub fn ask(&self) {
        match self {
            Self::Http1(wire) => wire.ask(),
            Self::Http2(_) => {}
        }
    }

    /// Why the request must be refused, if it must.
    pub fn refusal(&self) -> Option<Violation> {
        match self {
            Self::Http1(wire) => wire.refusal(),
            Self::Http2(flow) => flow.refusal(),
        }
    }

    /// Whether the client is known to have left. Costs nothing, and asks nobody.
    pub fn has_left(&self) -> bool {
        match self {
            Self::Http1(wire) => wire.has_ended(),
            Self::Http2(flow) => flow.has_left(),
        }
    }

    /// Ready when the client no longer waits for this answer. A stream's task is polled when it is
    /// reset, and sees it first.
    pub fn poll_left(&self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Http1(wire) => wire.poll_left(cx),
            Self::Http2(flow) if flow.has_left() => Poll::Ready(()),
            Self::Http2(_) => Poll::Pending,
        }
    }

    /// A body left in the socket's buffer hides that the client of HTTP/1 is gone. A stream's reset is
    /// seen beside its body, and what its window holds is enough to begin with.
    pub fn ahead(&self) -> Ahead {
        match self {
            Self::Http1(_) => Ahead::Body,
            Self::Http2(_) => Ahead::Nothing,
        }
    }

    /// Reads no more of the request's body until what is returned is dropped. A stream has its window for that.
    pub fn hold(&self) -> Option<Held<'_>> {
        match self {
            Self::Http1(wire) => Some(wire.hold()),
            Self::Http2(_) => None,
        }
    }

    /// To be given to [`Self::poll_flushed`] later.
    pub fn flushes(&self) -> u64 {
        match self {
            Self::Http1(wire) => wire.flushes(),
            Self::Http2(_) => 0,
        }
    }

    /// Ready once an answer that breaks off now loses nothing of what was said before. A stream waits
    /// for that itself.
    pub fn poll_flushed(&self, cx: &mut Context<'_>, since: u64) -> Poll<()> {
        match self {
            Self::Http1(wire) => wire.poll_flushed(cx, since),
            Self::Http2(_) => Poll::Ready(()),
        }
    }
}

/// The body of a request, as its client sends it.
#[derive(Debug)]
pub enum Upload {
    Http1(Incoming),
    Http2(http2::Upload),
}

/// The rest of a body that will not come.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    #[error(transparent)]
    Http1(#[from] hyper::Error),
    #[error(transparent)]
    Http2(#[from] h2::Error),
}

impl Upload {
    /// How the engine is told the end of a body whose client told no length.
    pub fn unmeasured(&self) -> BodyFraming {
        match self {
            Self::Http1(_) => BodyFraming::None,
            Self::Http2(body) if body.is_end_stream() => BodyFraming::None,
            Self::Http2(_) => BodyFraming::Chunked,
        }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = Lost;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Lost>>> {
        match self.get_mut() {
            Self::Http1(body) => Pin::new(body).poll_frame(cx).map_err(Lost::Http1),
            Self::Http2(body) => Pin::new(body).poll_frame(cx).map_err(Lost::Http2),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(body) => body.is_end_stream(),
        }
    }
}
