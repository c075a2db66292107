//! An answer's body on its way to the client: ours in one piece, or the engine's as it comes.
//!
//! Bytes are handed on in the poll in which they are read and kept nowhere. An answer whose engine
//! dies, or that is cut, ends in one error event where it is a stream, and always abnormally: hyper
//! sees an error after the event is out, so the last chunk and `[DONE]` never come and a cut answer
//! cannot look complete.
//!
//! ```text
//!  Early ── the engine's stream begins ──► Engine ── all passed ──► (end)
//!    └── refused, engine lost ─► Parting ◄── cut, engine lost ──┘
//!                                   └── the last event is out ──► (broken)
//! ```

mod door;
mod early;
pub mod head;
mod parting;
mod relay;

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

pub use door::Door;
pub use early::{Early, Work};
use parting::Parting;
pub use relay::{Relay, Shape, Source};

use super::websocket::Tunnel;

/// Why hyper is told to break the connection.
#[derive(Debug, thiserror::Error)]
pub enum Interrupted {
    #[error("the client has left")]
    Left,
    #[error("the engine's answer broke off: {0}")]
    Engine(io::Error),
    #[error("the answer was cut: {0}")]
    Cut(String),
    #[error("the answer was refused after it had begun")]
    Refused,
}

/// The body of any answer.
#[derive(Debug)]
pub enum Answer {
    Own(Option<Bytes>),
    /// A stream that was begun before the engine answered.
    Early(Box<Early>),
    Engine(Box<Relay>),
    /// Will not be whole; its last event is on its way.
    Parting(Box<Parting>),
    /// No answer of HTTP: see [`super::websocket`].
    Tunnel(Box<Tunnel>),
    Broken,
}

/// What an answer comes to next.
pub enum Next {
    Bytes(Bytes),
    /// A piece that has gone through the door.
    Passed,
    End,
    /// The rest is told by another.
    Becomes(Answer),
    /// The client is gone: there is nobody to tell.
    Left,
    /// It will not be whole: the last event (empty: there is none to say) and why.
    Breaks(Bytes, Interrupted),
}

impl Answer {
    /// Whether the engine sends it piece by piece, to an end that nobody knows yet.
    pub fn is_endless(&self) -> bool {
        matches!(self, Self::Engine(relay) if relay.is_stream())
    }

    /// The next piece: nothing is in it where it went through the door.
    pub fn poll_piece(
        &mut self,
        cx: &mut Context<'_>,
        door: Option<Door<'_>>,
    ) -> Poll<Option<Result<Bytes, Interrupted>>> {
        loop {
            let (next, call) = match self {
                Self::Own(body) => return Poll::Ready(body.take().map(Ok)),
                Self::Broken | Self::Tunnel(_) => return Poll::Ready(None),
                Self::Parting(parting) => match ready!(parting.poll(cx)) {
                    Ok(event) => return Poll::Ready(Some(Ok(event))),
                    Err(why) => {
                        *self = Self::Broken;
                        return Poll::Ready(Some(Err(why)));
                    }
                },
                Self::Engine(relay) => (ready!(relay.poll(cx, door)), relay.call()),
                Self::Early(early) => (ready!(early.poll(cx)), early.call()),
            };
            match next {
                Next::Passed => return Poll::Ready(Some(Ok(Bytes::new()))),
                Next::Bytes(bytes) => return Poll::Ready(Some(Ok(bytes))),
                Next::End => return Poll::Ready(None),
                Next::Becomes(answer) => *self = answer,
                Next::Breaks(event, why) => {
                    let parting = Parting::new(Rc::clone(call), event, why);
                    *self = Self::Parting(Box::new(parting));
                }
                Next::Left => {
                    *self = Self::Broken;
                    return Poll::Ready(Some(Err(Interrupted::Left)));
                }
            }
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Interrupted;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Interrupted>>> {
        self.get_mut().poll_piece(cx, None).map_ok(Frame::data)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(body) => body.is_none(),
            Self::Engine(relay) => relay.is_complete(),
            Self::Early(_) | Self::Parting(_) | Self::Tunnel(_) | Self::Broken => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(body) => SizeHint::with_exact(body.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Engine(relay) => relay.size_hint(),
            Self::Early(_) | Self::Parting(_) | Self::Tunnel(_) | Self::Broken => SizeHint::default(),
        }
    }
}
