//! One request on its stream: the service at work, then its answer on the way out.
//!
//! A stream that the client resets ends its request as a closed connection of HTTP/1 does. One that is
//! cut ends in RST_STREAM, once its last event is out. It holds no buffer of its own.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::header::{CONNECTION, CONTENT_LENGTH, DATE, EXPECT, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Body as _;
use tokio::time::{Sleep, sleep};

use super::super::answer::{Answer, Interrupted};
use super::super::date;
use super::super::line::{self, Line};
use super::super::service::{self, Left, Peer};
use super::flow::{Awaited, Fate, Flow, MOST_UNSENT, Piece, Wanted};
use super::upload::Upload;
use super::{Client, head};

/// How long the last event may take to reach a slow reader.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Whether a client asked for a 100 before it sends its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interim {
    NotAsked,
    Due,
}

/// Whether the request is one whose answer has a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    HeadAlone,
    Whole,
}

type Answering = Pin<Box<dyn Future<Output = Result<Response<Answer>, Left>>>>;

enum State {
    /// Boxed, so that a stream whose answer flows does not hold the room for making it.
    Asking {
        answering: Answering,
        reply: SendResponse<Piece>,
        asked: Asked,
        interim: Interim,
    },
    Answering {
        body: Answer,
        out: SendStream<Piece>,
    },
    /// All was given to h2, and is on its way.
    Ending {
        out: SendStream<Piece>,
    },
    /// The answer will not be whole: reset, once what was said is out, or at the latest then.
    Breaking {
        out: SendStream<Piece>,
        reason: Reason,
        latest: Pin<Box<Sleep>>,
    },
    Over,
}

/// A request and its answer, to be polled until it is over.
pub struct Stream {
    client: Rc<Client>,
    flow: Rc<Flow>,
    state: State,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("flow", &self.flow).finish_non_exhaustive()
    }
}

impl Stream {
    pub fn new(client: &Rc<Client>, request: Request<RecvStream>, mut reply: SendResponse<Piece>) -> Self {
        let (mut parts, body) = request.into_parts();
        let client = Rc::clone(client);
        let Ok(refusal) = head::judge(&mut parts) else {
            reply.send_reset(Reason::PROTOCOL_ERROR);
            return Self { client, flow: Flow::new(None), state: State::Over };
        };
        let flow = Flow::new(refusal);
        let asked = if parts.method == Method::HEAD { Asked::HeadAlone } else { Asked::Whole };
        let interim = if parts.headers.contains_key(EXPECT) { Interim::Due } else { Interim::NotAsked };
        let upload = line::Upload::Http2(Upload::new(body, Rc::clone(&flow)));
        let peer = Peer {
            worker: Rc::clone(&client.worker),
            line: Line::Http2(Rc::clone(&flow)),
            address: client.address,
            scheme: client.scheme,
            standing: client.standing,
        };
        let answering = Box::pin(service::answer(Rc::new(peer), Request::from_parts(parts, upload)));
        Self { client, flow, state: State::Asking { answering, reply, asked, interim } }
    }

    /// Looks whether the client still takes what is for it.
    pub fn look(&self) {
        self.flow.look();
    }

    /// Something has changed that the stream must see.
    pub fn wake(&self) {
        self.flow.wake();
    }

    fn poll_asking(&mut self, cx: &mut Context<'_>) -> Poll<State> {
        let State::Asking { answering, reply, asked, interim } = &mut self.state else { return Poll::Pending };
        if reply.poll_reset(cx).is_ready() {
            self.flow.leave();
        }
        let Poll::Ready(outcome) = answering.as_mut().poll(cx) else {
            if self.flow.has_left() {
                return Poll::Ready(State::Over);
            }
            if *interim == Interim::Due && self.flow.wanted() == Wanted::Yes {
                *interim = Interim::NotAsked;
                let mut carry_on = Response::new(());
                *carry_on.status_mut() = StatusCode::CONTINUE;
                // Fails only for a stream that was reset, which the next poll sees.
                let _ = reply.send_informational(carry_on);
            }
            return Poll::Pending;
        };
        let Ok(response) = outcome else {
            reply.send_reset(Reason::CANCEL);
            return Poll::Ready(State::Over);
        };
        let (mut parts, body) = response.into_parts();
        finish(&mut parts.headers, &body);
        let bodiless = *asked == Asked::HeadAlone || matches!(parts.status.as_u16(), 204 | 304) || body.is_end_stream();
        let sent = reply.send_response(Response::from_parts(parts, ()), bodiless);
        Poll::Ready(match sent {
            Ok(out) if bodiless => State::Ending { out },
            Ok(out) => State::Answering { body, out },
            // Reset in this very moment.
            Err(_) => State::Over,
        })
    }

    fn poll_answering(&mut self, cx: &mut Context<'_>) -> Poll<State> {
        let State::Answering { body, out } = &mut self.state else { return Poll::Pending };
        let mut body = Pin::new(body);
        loop {
            if out.poll_reset(cx).is_ready() {
                return Poll::Ready(State::Over);
            }
            if self.flow.fate() == Fate::Stalled {
                out.send_reset(Reason::CANCEL);
                return Poll::Ready(State::Over);
            }
            // An answer that is cut says so even to who does not listen: it has some seconds.
            if self.flow.unsent() >= MOST_UNSENT && self.client.worker.cut().is_none() {
                self.flow.wait(Awaited::Room);
                return Poll::Pending;
            }
            let data = match ready!(body.as_mut().poll_frame(cx)) {
                Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
                None => Bytes::new(),
                Some(Err(why)) => {
                    let reason = match why {
                        Interrupted::Left => Reason::CANCEL,
                        Interrupted::Engine(_) | Interrupted::Cut(_) | Interrupted::Refused => Reason::INTERNAL_ERROR,
                    };
                    let State::Answering { out, .. } = std::mem::replace(&mut self.state, State::Over) else {
                        return Poll::Pending;
                    };
                    return Poll::Ready(State::Breaking { out, reason, latest: Box::pin(sleep(LAST_WORDS)) });
                }
            };
            let last = body.is_end_stream() || data.is_empty();
            if out.send_data(Piece::new(data, &self.flow), last).is_err() {
                return Poll::Ready(State::Over);
            }
            if last {
                let State::Answering { out, .. } = std::mem::replace(&mut self.state, State::Over) else {
                    return Poll::Pending;
                };
                return Poll::Ready(State::Ending { out });
            }
        }
    }
}

impl Future for Stream {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        this.flow.register(cx.waker());
        loop {
            let next = match &mut this.state {
                State::Asking { .. } => ready!(this.poll_asking(cx)),
                State::Answering { .. } => ready!(this.poll_answering(cx)),
                State::Ending { out } => {
                    if this.flow.fate() == Fate::Stalled {
                        out.send_reset(Reason::CANCEL);
                    } else if this.flow.unsent() > 0 && out.poll_reset(cx).is_pending() {
                        this.flow.wait(Awaited::End);
                        return Poll::Pending;
                    }
                    State::Over
                }
                State::Breaking { out, reason, latest } => {
                    let waits = this.flow.unsent() > 0 && this.flow.fate() == Fate::Open;
                    if waits && out.poll_reset(cx).is_pending() && latest.as_mut().poll(cx).is_pending() {
                        this.flow.wait(Awaited::End);
                        return Poll::Pending;
                    }
                    out.send_reset(*reason);
                    State::Over
                }
                State::Over => return Poll::Ready(()),
            };
            this.state = next;
        }
    }
}

/// What hyper does for HTTP/1: fields of a connection are left out, length and date are said.
fn finish(headers: &mut HeaderMap, body: &Answer) {
    for name in [CONNECTION, TRANSFER_ENCODING, UPGRADE, TE] {
        headers.remove(name);
    }
    if let Some(length) = body.size_hint().exact() {
        headers.entry(CONTENT_LENGTH).or_insert_with(|| HeaderValue::from(length));
    }
    headers.entry(DATE).or_insert_with(date::now);
}
