//! A stream that was begun before the engine answered, so that nobody on the way takes the
//! connection for dead while its request waits or is read by the model.
//!
//! Once begun, there is no status to say any more: whatever the request comes to but the engine's
//! own stream is an event, and an abnormal end.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body::Body as _;
use tokio::time::{Instant, Sleep};

use super::{Answer, Interrupted, Next, head};
use crate::proxy::call::Call;
use crate::proxy::error::{engines_error, keep_alive, last_event};
use crate::proxy::routes::Dialect;
use crate::proxy::service::Stop;

/// A request on its way to an answer.
pub type Work = Pin<Box<dyn Future<Output = Result<Response<Answer>, Stop>>>>;

/// Longest answer of the engine with an error that is read for its message.
const LONGEST: usize = 16 * 1024;

enum Stage {
    Waiting(Work),
    /// The engine said no; what it says is gathered.
    Refused(Box<Gathering>),
    Over,
}

pub struct Early {
    call: Rc<Call>,
    stage: Stage,
    timer: Pin<Box<Sleep>>,
}

impl fmt::Debug for Early {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Early").field("call", &self.call).finish_non_exhaustive()
    }
}

impl Early {
    /// `timer` is the one that has come due: the first word is said at once.
    pub fn new(call: Rc<Call>, work: Work, timer: Pin<Box<Sleep>>) -> Self {
        call.begin();
        call.worker().counters.early.fetch_add(1, Relaxed);
        Self { call, stage: Stage::Waiting(work), timer }
    }

    pub fn call(&self) -> &Rc<Call> {
        &self.call
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        loop {
            match &mut self.stage {
                Stage::Waiting(work) => match work.as_mut().poll(cx) {
                    Poll::Ready(Ok(response)) => match self.take(response) {
                        Some(next) => return Poll::Ready(next),
                        None => continue,
                    },
                    Poll::Ready(Err(Stop::Left)) => {
                        self.stage = Stage::Over;
                        self.call.worker().counters.client_aborts.fetch_add(1, Relaxed);
                        return Poll::Ready(Next::Left);
                    }
                    Poll::Ready(Err(Stop::Refused(refusal))) => {
                        return Poll::Ready(self.refuse(refusal.into_event(self.call.route.dialect)));
                    }
                    Poll::Pending => {}
                },
                Stage::Refused(gathering) => {
                    if let Poll::Ready(event) = gathering.poll(cx, self.call.route.dialect) {
                        return Poll::Ready(self.refuse(event));
                    }
                }
                Stage::Over => return Poll::Ready(Next::End),
            }
            ready!(self.timer.as_mut().poll(cx));
            let interval = self.call.worker().shared.timings.keep_alive;
            self.timer.as_mut().reset(Instant::now() + interval);
            if let Some(word) = keep_alive(self.call.route.dialect) {
                return Poll::Ready(Next::Bytes(word));
            }
        }
    }

    /// The engine's answer: its stream goes on here, anything else must become an event.
    fn take(&mut self, response: Response<Answer>) -> Option<Next> {
        let (said, body) = response.into_parts();
        match body {
            Answer::Engine(mut relay) if said.status == StatusCode::OK && head::goes_on_in_events(&said.headers) => {
                relay.go_on_in_events();
                self.stage = Stage::Over;
                Some(Next::Becomes(Answer::Engine(relay)))
            }
            body => {
                self.stage = Stage::Refused(Box::new(Gathering { status: said.status, body, text: Vec::new() }));
                None
            }
        }
    }

    fn refuse(&mut self, event: Bytes) -> Next {
        self.stage = Stage::Over;
        self.call.worker().counters.interrupted.fetch_add(1, Relaxed);
        Next::Breaks(event, Interrupted::Refused)
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        if !matches!(self.stage, Stage::Over) {
            self.call.worker().counters.client_aborts.fetch_add(1, Relaxed);
        }
    }
}

struct Gathering {
    status: StatusCode,
    body: Answer,
    text: Vec<u8>,
}

impl Gathering {
    /// What the engine says, as far as it is wanted, as an event.
    fn poll(&mut self, cx: &mut Context<'_>, dialect: Dialect) -> Poll<Bytes> {
        while self.text.len() < LONGEST {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => self.text.extend(frame.into_data().unwrap_or_default()),
                Some(Err(_)) | None => break,
            }
        }
        Poll::Ready(if self.status.is_success() {
            last_event(dialect, "the engine answered with something else than a stream of events")
        } else {
            engines_error(dialect, self.status, &self.text)
        })
    }
}
