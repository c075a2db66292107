//! The end of an answer that is not whole: its last event, and then an abnormal end.

use std::fmt;
use std::future::Future as _;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Sleep, sleep};

use super::Interrupted;
use crate::proxy::call::Call;

/// How long the last event may take to reach a slow reader.
const PATIENCE: Duration = Duration::from_secs(5);

/// An error breaks the connection at once, so it comes only when all that was said is out.
pub struct Parting {
    call: Rc<Call>,
    event: Option<Bytes>,
    since_flush: u64,
    timer: Pin<Box<Sleep>>,
    why: Interrupted,
}

impl fmt::Debug for Parting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parting").field("why", &self.why).finish_non_exhaustive()
    }
}

impl Parting {
    /// `event` is empty where none can be said.
    pub fn new(call: Rc<Call>, event: Bytes, why: Interrupted) -> Self {
        Self {
            since_flush: call.line().flushes(),
            call,
            event: (!event.is_empty()).then_some(event),
            timer: Box::pin(sleep(PATIENCE)),
            why,
        }
    }

    /// The event, then the error.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, Interrupted>> {
        if let Some(event) = self.event.take() {
            return Poll::Ready(Ok(event));
        }
        if self.call.line().poll_flushed(cx, self.since_flush).is_pending() {
            ready!(self.timer.as_mut().poll(cx));
        }
        Poll::Ready(Err(std::mem::replace(&mut self.why, Interrupted::Left)))
    }
}
