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

use http::header::{CONNECTION, CONTENT_LENGTH, EXPECT, TRANSFER_ENCODING};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use tokio::time::{Instant, sleep_until, timeout};

use super::answer::{Answer, Early, Work, head};
use super::call::Call;
use super::copies;
use super::direct::{self, Leave};
use super::error::{Refusal, keep_alive};
use super::headers::{self, BodyFraming, Credentials, Said, X_REQUEST_DEADLINE, X_REQUEST_ID};
use super::line::{Ahead, Line, Upload};
use super::loads;
use super::metrics::Label;
use super::own;
use super::peek::Stream;
use super::routes::{Asks, Decision, Protocol, Route};
use super::state::{Mode, Snapshot, Supervision};
use super::transport::crowd::Standing;
use super::upstream::exchange::{BodyFault, Failure, Outgoing, Upgrade, exchange};
use super::websocket;
use super::wire::Scheme;
use super::worker::Worker;
use crate::admission::{Bound, Caller, Refused, Ticket};
use crate::link::{EngineView, Gate, Upstream};

/// Who asks, and over what.
#[derive(Debug)]
pub struct Peer {
    pub worker: Rc<Worker>,
    pub line: Line,
    /// None: it came over a Unix socket.
    pub address: Option<IpAddr>,
    pub scheme: Scheme,
    pub standing: Standing,
}

/// The client is gone: there is nobody to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client has left")]
pub struct Left;

/// Why a request comes to no answer of the engine.
#[derive(Debug)]
pub enum Stop {
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
    let now = Instant::now();
    let counters = &peer.worker.counters;
    counters.last_request.store(peer.worker.stamp(now), Relaxed);
    peer.worker.shared.rest.stir();
    let (parts, body) = request.into_parts();
    let leave = Leave::after(&parts);
    let id = headers::request_id(&parts);
    let mut label = Label::REFUSED;
    let outcome = match triage(&peer, &parts, &mut label) {
        Ok(Way::Own(response)) => Ok(response),
        Ok(Way::Copy) => copies::answer(&peer.worker.shared, &parts.uri).await.map_err(Stop::from),
        Ok(Way::Engine(route, caller)) => {
            counters.recent.note(&id, route.name, now);
            let call = Call::new(Rc::clone(&peer), route, caller, label, now);
            pursue(call, parts, body, id.clone()).await
        }
        Err(stop) => Err(stop),
    };
    let mut response = match outcome {
        Ok(response) => response,
        Err(Stop::Refused(refusal)) => refusal.into_response().map(|bytes| Answer::Own(Some(bytes))),
        Err(Stop::Left) => {
            counters.left(label);
            return Err(Left);
        }
    };
    counters.answered(label, response.status());
    response.headers_mut().insert(&X_REQUEST_ID, id);
    if peer.standing != Standing::Welcome {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(match leave.with(&response) {
        Leave::Yes => direct::leave(&peer.line, response).await,
        Leave::No => response,
    })
}

/// Where a request goes, by its head alone.
enum Way {
    Own(Response<Answer>),
    Copy,
    Engine(&'static Route, Caller),
}

fn triage(peer: &Peer, parts: &Parts, label: &mut Label) -> Result<Way, Stop> {
    if let Some(violation) = peer.line.refusal() {
        return Err(Refusal::violation(violation).into());
    }
    let path = parts.uri.path();
    let snapshot = peer.worker.shared.snapshot();
    let (decision, asks) = snapshot.routes.decide(path);
    let (route, copied) = match decision {
        Decision::Engine(route) => (route, Copied::No),
        Decision::Copy(route) => (route, Copied::Yes),
        Decision::Own(own) => {
            *label = Label::OWN;
            who(&snapshot, parts, asks)?;
            return own::answer(&peer.worker.shared, own, &parts.method).map(Way::Own);
        }
        Decision::Ambiguous => return Err(Refusal::ambiguous_path().into()),
        Decision::Forbidden => return Err(Refusal::forbidden(path).into()),
        Decision::Closed => return Err(Refusal::closed(path).into()),
        Decision::Unknown => {
            *label = Label::UNKNOWN;
            return Err(Refusal::unknown_route(path).into());
        }
    };
    if let Some(refusal) = peer.standing.refusal() {
        return Err(refusal.into());
    }
    *label = Label::route(route);
    if !route.methods.contains(&parts.method) {
        return Err(Refusal::wrong_method(route.methods).into());
    }
    let caller = who(&snapshot, parts, asks)?;
    *label = label.of(caller.key);
    Ok(match copied {
        Copied::No => Way::Engine(route, caller),
        Copied::Yes => Way::Copy,
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Copied {
    Yes,
    No,
}

/// Who asks, as far as it must be known.
fn who(snapshot: &Snapshot, parts: &Parts, asks: Asks) -> Result<Caller, Stop> {
    let Some(keys) = &snapshot.keys else { return Ok(Caller::ANYBODY) };
    match (keys.caller(&parts.headers), asks) {
        (Some(caller), _) => Ok(caller),
        (None, Asks::Nobody) => Ok(Caller::ANYBODY),
        (None, Asks::Key) => Err(Refusal::unauthorized().into()),
    }
}

/// Waits for the answer; a stream that keeps its client waiting for long is begun without it.
async fn pursue(call: Rc<Call>, parts: Parts, body: Upload, id: HeaderValue) -> Result<Response<Answer>, Stop> {
    // An HTTP/1.0 client could not tell a broken stream from a whole one.
    let may_begin = keep_alive(call.route.dialect).is_some() && parts.version != Version::HTTP_10;
    let begin = call.arrived + call.worker().shared.timings.keep_alive;
    // On the heap: what a connection keeps room for while an answer streams stays small, and the
    // work can go on in the answer's body.
    let mut work: Work = Box::pin(decide(Rc::clone(&call), parts, body, id));
    let mut timer = None;
    let outcome = poll_fn(|cx| {
        if let Poll::Ready(outcome) = work.as_mut().poll(cx) {
            return Poll::Ready(Some(outcome));
        }
        if call.line().has_left() {
            return Poll::Ready(Some(Err(Stop::Left)));
        }
        if !may_begin || call.asks.get() != Stream::Yes {
            return Poll::Pending;
        }
        timer.get_or_insert_with(|| Box::pin(sleep_until(begin))).as_mut().poll(cx).map(|()| None)
    })
    .await;
    outcome.unwrap_or_else(|| {
        let timer = timer.unwrap_or_else(|| Box::pin(sleep_until(begin)));
        Ok(head::early().map(|()| Answer::Early(Box::new(Early::new(call, work, timer)))))
    })
}

async fn decide(call: Rc<Call>, parts: Parts, body: Upload, id: HeaderValue) -> Result<Response<Answer>, Stop> {
    let (peer, parts) = (&*call.peer, &parts);
    let snapshot = peer.worker.shared.snapshot();
    let framing = body_framing(&parts.headers, &body);
    if let BodyFraming::Length(length) = framing
        && length > snapshot.settings.max_body
    {
        return Err(Refusal::too_large(snapshot.settings.max_body).into());
    }
    let websocket = match call.route.protocol {
        Protocol::Http => None,
        Protocol::WebSocket => Some(websocket::asked(&peer.line, parts, framing)?),
    };
    let patience = peer.worker.shared.timings.client.body;
    let mut outgoing = Outgoing::new(Rc::clone(&call), body, framing, snapshot.settings.max_body, patience);
    // Who asks before it sends its body is told to go on only once there is a place.
    if parts.headers.contains_key(EXPECT) {
        outgoing.look_at_end();
    } else {
        outgoing.look().await.map_err(|fault| explain(peer, &snapshot, fault.into()))?;
    }
    let (mut snapshot, mut counted) = (snapshot, 0);
    loop {
        let (ticket, now) = admit(peer, parts, call.caller, snapshot, &mut outgoing).await?;
        loads::keep_looking(&peer.worker);
        let Some(upstream) = now.engine.as_ref().and_then(|engine| engine.upstream.clone()) else {
            ticket.was_not_served();
            return Err(Refusal::engine(now.engine.as_ref()).into());
        };
        let mut head = request_head(peer, parts, &now, &upstream, &id, framing);
        let upgrade = if websocket.is_some() { Upgrade::Asked } else { Upgrade::No };
        if upgrade == Upgrade::Asked {
            head.splice(head.len() - 2.., websocket::FIELDS.iter().copied());
        }
        let worker = &peer.worker;
        let since = Instant::now();
        let asking =
            exchange(&worker.pool, &worker.counters, upstream.addr, (&parts.method, upgrade), &head, &mut outgoing);
        let outcome = watched(peer, asking).await;
        let taken = outgoing.taken();
        worker.counters.bytes_in.fetch_add(taken - std::mem::replace(&mut counted, taken), Relaxed);
        let failure = match outcome {
            Ok(Ok(answered)) => {
                worker.counters.first_byte.observe(since.elapsed());
                return match &websocket {
                    Some(asked) if answered.head.status == StatusCode::SWITCHING_PROTOCOLS => {
                        Ok(websocket::open(&call, asked, answered, ticket)?)
                    }
                    _ => Ok(head::relay(&call, answered, ticket, &upstream)),
                };
            }
            Ok(Err(failure)) => failure,
            Err(stop) => {
                ticket.was_not_served();
                return Err(stop);
            }
        };
        ticket.was_not_served();
        // Nothing of it reached an engine: over a restart it waits like one that came a moment later.
        if !matches!(failure, Failure::Unreachable(_)) || hears_of_its_end(peer, &upstream).await? == Heard::Nothing {
            return Err(explain(peer, &now, failure).into());
        }
        worker.counters.upstream_retries.fetch_add(1, Relaxed);
        snapshot = worker.shared.snapshot();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Yes,
    Nothing,
}

/// An engine that died takes no connection from that moment on, and its supervisor says so a moment later.
async fn hears_of_its_end(peer: &Peer, engine: &Upstream) -> Result<Heard, Stop> {
    let shared = &peer.worker.shared;
    if shared.supervision == Supervision::Alone {
        return Ok(Heard::Nothing);
    }
    let mut changes = shared.changes();
    let is_over = |now: &Arc<Snapshot>| {
        !is_open(now.engine.as_ref()) || now.engine.as_ref().is_some_and(|view| view.upstream.as_ref() != Some(engine))
    };
    let news = timeout(shared.timings.engine_news, changes.wait_for(is_over));
    Ok(if matches!(watched(peer, news).await?, Ok(Ok(_))) { Heard::Yes } else { Heard::Nothing })
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
    caller: Caller,
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
    let mut entry = pin!(shared.admission.enter(deadline, caller, body.peek().sequences));
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
            Refused::KeyFull { retry_after } => Refusal::key_queue_full(retry_after),
            Refused::Displaced { retry_after } => Refusal::displaced(retry_after),
            Refused::Hopeless { retry_after } => Refusal::hopeless(retry_after),
            Refused::Expired { retry_after, .. } if deadline < ours => Refusal::deadline(retry_after),
            Refused::Expired { .. } | Refused::TurnedAway if now.mode != Mode::Serving => Refusal::draining(),
            Refused::Expired { .. } if !is_open(now.engine.as_ref()) => Refusal::engine(now.engine.as_ref()),
            Refused::Expired { retry_after, bound: Bound::Key } => Refusal::key_queue_timeout(retry_after),
            Refused::Expired { retry_after, bound: Bound::Node } => Refusal::queue_timeout(retry_after),
            Refused::TurnedAway => Refusal::engine(now.engine.as_ref()),
        }
        .into()),
    }
}

fn is_open(view: Option<&EngineView>) -> bool {
    view.is_some_and(|view| view.state.gate() == Gate::Open)
}

/// `x-request-deadline`: seconds that the client will wait for its turn. Garbage is no deadline.
fn client_deadline(headers: &HeaderMap) -> Option<Duration> {
    let seconds: f64 = headers.get(&X_REQUEST_DEADLINE)?.to_str().ok()?.trim().parse().ok()?;
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
    headers::write(
        parts,
        &Said { engine: upstream.addr, client: peer.address, scheme: peer.scheme, request_id: id, credentials, body },
    )
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
