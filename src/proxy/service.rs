//! One request from head to answer: refused here, answered here, or passed to the engine.
//!
//! The order is the order of cost: framing, path, key, length, the engine's state, a place, and only
//! then the engine. The body is not touched before there is a place. How an answer's bytes flow is
//! [`super::answer`]'s.

use std::future::{Future, poll_fn};
use std::net::IpAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::Duration;

use http::header::{CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, TRANSFER_ENCODING};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use tokio::time::Instant;

use super::answer::{Answer, Relay, Shape, Source};
use super::error::Refusal;
use super::headers::{self, BodyFraming, Credentials, Said};
use super::line::{Ahead, Line, Upload};
use super::metrics::Label;
use super::routes::{self, Decision, Own, Route};
use super::state::{Mode, Snapshot, Supervision};
use super::upstream::decode::Framing;
use super::upstream::exchange::{Answered, BodyFault, Failure, Outgoing, Sent, exchange};
use super::upstream::head::Reuse;
use super::worker::Worker;
use crate::admission::{Refused, Ticket};
use crate::link::{EngineView, Gate, Upstream};

/// Who asks, and over what.
#[derive(Debug)]
pub struct Peer {
    pub worker: Rc<Worker>,
    pub line: Line,
    /// None: it came over a Unix socket.
    pub address: Option<IpAddr>,
}

/// The client is gone: there is nobody to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client has left")]
pub struct Left;

/// Why a request comes to no answer of the engine.
enum Stop {
    Left,
    Refused(Box<Refusal>),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

/// The service under hyper and h2.
pub async fn answer(peer: Rc<Peer>, request: Request<Upload>) -> Result<Response<Answer>, Left> {
    peer.line.ask();
    let counters = &peer.worker.counters;
    counters.last_request.store(peer.worker.stamp(Instant::now()), Relaxed);
    let (parts, body) = request.into_parts();
    let id = headers::request_id(&parts);
    let mut label = Label::REFUSED;
    let outcome = decide(&peer, &parts, body, &id, &mut label).await;
    let mut response = match outcome {
        Ok(response) => response,
        Err(Stop::Refused(refusal)) => refusal.into_response().map(|bytes| Answer::Own(Some(bytes))),
        Err(Stop::Left) => {
            counters.left(label);
            return Err(Left);
        }
    };
    counters.answered(label, response.status());
    response.headers_mut().insert("x-request-id", id);
    Ok(response)
}

async fn decide(
    peer: &Rc<Peer>,
    parts: &Parts,
    body: Upload,
    id: &HeaderValue,
    label: &mut Label,
) -> Result<Response<Answer>, Stop> {
    if let Some(violation) = peer.line.refusal() {
        return Err(Refusal::violation(violation).into());
    }
    let path = parts.uri.path();
    let route = match routes::decide(path) {
        Decision::Engine(route) => route,
        Decision::Own(own) => {
            *label = Label::OWN;
            return own_answer(peer, own, &parts.method);
        }
        Decision::Ambiguous => return Err(Refusal::ambiguous_path().into()),
        Decision::Forbidden => return Err(Refusal::forbidden(path).into()),
        Decision::Unknown => {
            *label = Label::UNKNOWN;
            return Err(Refusal::unknown_route(path).into());
        }
    };
    *label = Label::route(route);
    if !route.methods.contains(&parts.method) {
        return Err(Refusal::wrong_method(route.methods).into());
    }
    let snapshot = peer.worker.shared.snapshot();
    if let Some(keys) = &snapshot.keys
        && keys.check(&parts.headers).is_none()
    {
        return Err(Refusal::unauthorized().into());
    }
    let framing = body_framing(&parts.headers, &body);
    if let BodyFraming::Length(length) = framing
        && length > snapshot.settings.max_body
    {
        return Err(Refusal::too_large(snapshot.settings.max_body).into());
    }
    let patience = peer.worker.shared.timings.client.body;
    let mut outgoing = Outgoing::new(body, framing, snapshot.settings.max_body, patience);
    let (ticket, snapshot) = admit(peer, parts, snapshot, &mut outgoing).await?;
    let Some(upstream) = snapshot.engine.as_ref().and_then(|engine| engine.upstream.clone()) else {
        ticket.was_not_served();
        return Err(Refusal::engine(snapshot.engine.as_ref()).into());
    };
    let head = request_head(peer, parts, &snapshot, &upstream, id, framing);
    let worker = &peer.worker;
    let since = Instant::now();
    let asking = exchange(&worker.pool, &worker.counters, upstream.addr, &parts.method, &head, &mut outgoing);
    let outcome = watched(peer, asking).await;
    worker.counters.bytes_in.fetch_add(outgoing.taken(), Relaxed);
    match outcome {
        Ok(Ok(answered)) => {
            worker.counters.first_byte.observe(since.elapsed());
            Ok(relay(peer, route, answered, ticket, &upstream))
        }
        Ok(Err(failure)) => {
            ticket.was_not_served();
            Err(explain(peer, &snapshot, failure).into())
        }
        Err(stop) => {
            ticket.was_not_served();
            Err(stop)
        }
    }
}

/// Runs `future` for as long as the client is there and nothing is cut.
async fn watched<F: Future>(peer: &Peer, future: F) -> Result<F::Output, Stop> {
    let mut future = pin!(future);
    poll_fn(|cx| {
        // A place that becomes free for one who has left is not to be taken to the engine.
        if peer.line.has_left() {
            return Poll::Ready(Err(Stop::Left));
        }
        if let Poll::Ready(outcome) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(outcome));
        }
        if peer.line.poll_left(cx).is_ready() {
            return Poll::Ready(Err(Stop::Left));
        }
        match peer.worker.cut() {
            Some(reason) => Poll::Ready(Err(Refusal::cut(&reason).into())),
            None => Poll::Pending,
        }
    })
    .await
}

/// Waits for a place, and says what is known of the engine by then.
async fn admit(
    peer: &Peer,
    parts: &Parts,
    snapshot: Arc<Snapshot>,
    body: &mut Outgoing,
) -> Result<(Ticket, Arc<Snapshot>), Stop> {
    let shared = &peer.worker.shared;
    if snapshot.mode != Mode::Serving {
        return Err(Refusal::draining().into());
    }
    let settings = &snapshot.settings;
    let patience = match snapshot.engine.as_ref() {
        Some(view) if view.state.gate() == Gate::Open => settings.queue_timeout_ms,
        Some(view) if view.will_return && view.hold_ms > 0 => view.hold_ms,
        view => return Err(Refusal::engine(view).into()),
    };
    let since = Instant::now();
    let ours = since + Duration::from_millis(patience);
    let theirs = client_deadline(&parts.headers).and_then(|wait| since.checked_add(wait));
    let deadline = theirs.map_or(ours, |theirs| theirs.min(ours));
    // Who asks before it sends its body is told to go on only once there is a place.
    let read = if parts.headers.contains_key(EXPECT) { Ahead::Nothing } else { peer.line.ahead() };
    let mut entry = pin!(shared.admission.enter(deadline));
    let waiting = poll_fn(|cx| {
        if let Poll::Ready(outcome) = entry.as_mut().poll(cx) {
            return Poll::Ready(Ok(outcome));
        }
        match read {
            Ahead::Body => body.poll_ahead(cx).map(Err),
            Ahead::Nothing => Poll::Pending,
        }
    });
    let outcome = match watched(peer, waiting).await? {
        Ok(outcome) => outcome,
        Err(fault) => return Err(explain(peer, &snapshot, fault.into()).into()),
    };
    peer.worker.counters.wait.observe(since.elapsed());
    let now = shared.snapshot();
    match outcome {
        Ok(ticket) => Ok((ticket, now)),
        Err(refused) => Err(match refused {
            Refused::Full { retry_after } => Refusal::queue_full(retry_after),
            Refused::Hopeless { retry_after } => Refusal::hopeless(retry_after),
            Refused::Expired { retry_after } if deadline < ours => Refusal::deadline(retry_after),
            Refused::Expired { .. } | Refused::TurnedAway if now.mode != Mode::Serving => Refusal::draining(),
            Refused::Expired { retry_after } if is_open(now.engine.as_ref()) => Refusal::queue_timeout(retry_after),
            Refused::Expired { .. } | Refused::TurnedAway => Refusal::engine(now.engine.as_ref()),
        }
        .into()),
    }
}

fn is_open(view: Option<&EngineView>) -> bool {
    view.is_some_and(|view| view.state.gate() == Gate::Open)
}

/// `x-request-deadline`: seconds that the client will wait for its turn. Garbage is no deadline.
fn client_deadline(headers: &HeaderMap) -> Option<Duration> {
    let seconds: f64 = headers.get("x-request-deadline")?.to_str().ok()?.trim().parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

fn body_framing(headers: &HeaderMap, body: &Upload) -> BodyFraming {
    if headers.contains_key(TRANSFER_ENCODING) {
        return BodyFraming::Chunked;
    }
    // The framing checker, or h2, has seen that it is one plain number.
    let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    length.map_or_else(|| body.unmeasured(), BodyFraming::Length)
}

fn request_head(
    peer: &Peer,
    parts: &Parts,
    snapshot: &Snapshot,
    upstream: &Upstream,
    id: &HeaderValue,
    body: BodyFraming,
) -> Vec<u8> {
    let credentials = match (&upstream.api_key, &snapshot.keys) {
        (None, None) => Credentials::Client,
        (key, _) => Credentials::Engine(key.as_deref()),
    };
    headers::write(parts, &Said { engine: upstream.addr, client: peer.address, request_id: id, credentials, body })
}

fn explain(peer: &Peer, snapshot: &Snapshot, failure: Failure) -> Refusal {
    let limit = snapshot.settings.max_body;
    match failure {
        Failure::Body(BodyFault::TooLarge) => return Refusal::too_large(limit),
        Failure::Body(BodyFault::Slow) => return Refusal::slow_body(),
        Failure::Body(BodyFault::Broken(_)) => {
            return peer.line.refusal().map_or_else(Refusal::broken_body, Refusal::violation);
        }
        _ => {}
    }
    peer.worker.counters.upstream_errors.fetch_add(1, Relaxed);
    tracing::debug!(error = %failure, "the engine did not answer");
    match failure {
        Failure::Unreachable(_) => Refusal::unreachable(),
        failure => Refusal::broken_engine(&failure.to_string()),
    }
}

/// The engine's answer, for the client.
fn relay(peer: &Peer, route: &Route, answered: Answered, ticket: Ticket, upstream: &Upstream) -> Response<Answer> {
    let Answered { stream, head, rest, sent } = answered;
    let worker = &peer.worker;
    let mut response = Response::new(Answer::Own(None));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    let headers = response.headers_mut();
    if let Some(ahead) = ticket.waited_behind() {
        headers.insert("x-sglangd-queue-position", HeaderValue::from(ahead as u64 + 1));
    }
    if sent == Sent::Partly {
        // What the client still sends belongs to a request that is over.
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    let Some(framing) = head.framing else {
        worker.counters.served.fetch_add(1, Relaxed);
        if head.reuse == Reuse::Yes && rest.is_empty() {
            worker.pool.keep(stream, upstream.addr);
        }
        return response;
    };
    let events = is_stream(headers);
    if events {
        headers.entry("x-accel-buffering").or_insert(HeaderValue::from_static("no"));
        headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache"));
    }
    // Within a length there is no room for an event that the engine did not count.
    let shape = if events && !matches!(framing, Framing::Length(_)) { Shape::Stream } else { Shape::Whole };
    let source = Source { engine: upstream.addr, framing, reuse: head.reuse, rest, shape, dialect: route.dialect };
    let relay = Relay::new(Rc::clone(worker), peer.line.clone(), stream, source, ticket);
    *response.body_mut() = Answer::Engine(Box::new(relay));
    response
}

fn is_stream(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(CONTENT_TYPE) else { return false };
    let kind = kind.as_bytes();
    [&b"text/event-stream"[..], b"application/x-ndjson"]
        .iter()
        .any(|stream| kind.get(..stream.len()).is_some_and(|head| head.eq_ignore_ascii_case(stream)))
}

const GET: &[Method] = &[Method::GET, Method::HEAD];

/// Liveness, health and readiness: never the engine's word.
fn own_answer(peer: &Peer, own: Own, method: &Method) -> Result<Response<Answer>, Stop> {
    if !GET.contains(method) {
        return Err(Refusal::wrong_method(GET).into());
    }
    let shared = &peer.worker.shared;
    if own == Own::Live {
        if shared.supervision == Supervision::Linked && shared.silence() > shared.timings.supervisor_silence {
            return Err(Refusal::stuck_supervisor().into());
        }
        return Ok(ok(r#"{"live":true}"#.to_owned()));
    }
    let snapshot = shared.snapshot();
    let view = snapshot.engine.as_ref();
    if own == Own::Ready && snapshot.mode != Mode::Serving {
        return Err(Refusal::draining().into());
    }
    match view {
        Some(view) if own == Own::Ready && view.suspected => Err(Refusal::suspected(view).into()),
        Some(view) if view.state.gate() == Gate::Open => Ok(ok(format!(r#"{{"state":"{}"}}"#, view.state.name()))),
        view => Err(Refusal::engine(view).into()),
    }
}

fn ok(body: String) -> Response<Answer> {
    let mut response = Response::new(Answer::Own(Some(body.into())));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
