//! One request and its answer's head: the body streams out while the head may come in.
//!
//! It ends with the head; the answer's body is [`crate::proxy::answer`]'s. A request is said again
//! only on a fresh connection, once, when a reused one ended before the first byte of an answer and
//! every byte that was sent is still held: the engine closed it while we wrote.

use std::collections::VecDeque;
use std::future::{Future as _, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use http_body::Body as _;
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::head::{self, BadHead, Head, Reuse};
use super::sending::{Fault as SendFault, send};
use super::{Connection, History, Pool, Repeat, connect};
use crate::proxy::call::Call;
use crate::proxy::headers::BodyFraming;
use crate::proxy::line::{Line, Lost, Upload};
use crate::proxy::metrics::Counters;
use crate::proxy::peek::{self, Peek, Stream};
use crate::proxy::transport::socket::Socket;
use crate::proxy::wire::with_buffer;

/// Bytes of a body that are kept so that the request can be said again.
const KEPT: usize = 64 * 1024;
/// Bytes of a body that are read while its request waits for a place. A client's FIN stands behind
/// its bytes: a body left in the socket's buffer hides that the client is gone.
const AHEAD: usize = 256 * 1024;
/// An engine that closes an idle connection does it in the moment we write. One that thought for
/// longer died of something, perhaps of this request: it is not given it again.
const RACE: Duration = Duration::from_secs(1);
/// After a write failed, how long an answer that explains it may take to be read.
const EXPLANATION: Duration = Duration::from_millis(500);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("the engine does not take connections: {0}")]
    Unreachable(io::Error),
    #[error("{0}")]
    Broken(io::Error),
    #[error("{0}")]
    BadHead(#[from] BadHead),
    #[error("{0}")]
    Body(#[from] BodyFault),
}

/// What is wrong with the client's body.
#[derive(Debug, thiserror::Error)]
pub enum BodyFault {
    #[error("the body grew beyond the limit")]
    TooLarge,
    #[error("the body stopped coming")]
    Slow,
    #[error("the body broke off: {0}")]
    Broken(Lost),
}

/// The client's body on its way to the engine.
#[derive(Debug)]
pub struct Outgoing {
    /// Is told whether it asks for a stream.
    call: Rc<Call>,
    body: Upload,
    pub(super) framing: BodyFraming,
    max: u64,
    patience: Duration,
    taken: u64,
    /// Bytes that went towards the engine at least once.
    passed: usize,
    timer: Option<Pin<Box<Sleep>>>,
    /// What was taken so far; none once it was too much to keep.
    kept: Option<Vec<Bytes>>,
    /// How many of `kept` have been sent on the present connection.
    replayed: usize,
    /// Read while the request waited, in order.
    ahead: VecDeque<Bytes>,
    ahead_bytes: usize,
    end: End,
    peek: Peek,
    /// The last bytes of a body whose beginning did not tell whether it asks for a stream.
    last: Option<Vec<u8>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Open,
    Reached,
}

impl Outgoing {
    pub fn new(call: Rc<Call>, body: Upload, framing: BodyFraming, max: u64, patience: Duration) -> Self {
        let end = if framing == BodyFraming::None { End::Reached } else { End::Open };
        Self {
            call,
            body,
            framing,
            max,
            patience,
            taken: 0,
            passed: 0,
            timer: None,
            kept: Some(Vec::new()),
            replayed: 0,
            ahead: VecDeque::new(),
            ahead_bytes: 0,
            end,
            peek: Peek::NOTHING,
            last: None,
        }
    }

    /// Who sends it.
    pub(super) fn client(&self) -> Line {
        self.call.line().clone()
    }

    /// Looks at what the client sent with its head. It never waits for more: hyper hands over what it
    /// holds in the turn after it was first asked, which then goes out with our head in one write.
    pub async fn look(&mut self) -> Result<(), BodyFault> {
        let mut asked = false;
        let first = poll_fn(|cx| match self.poll_body(cx) {
            Poll::Pending if !std::mem::replace(&mut asked, true) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Poll::Pending => Poll::Ready(None),
            ready @ Poll::Ready(_) => ready,
        })
        .await;
        if let Some(data) = first.transpose()? {
            self.peek = peek::peek(&data);
            if self.peek.stream == Stream::Unknown && self.end == End::Open {
                self.last = Some(Vec::new());
                self.keep_last(&data);
            }
            self.tell();
            self.ahead_bytes += data.len();
            self.ahead.push_back(data);
        }
        Ok(())
    }

    /// Looks at the body's end alone, once it has passed.
    pub fn look_at_end(&mut self) {
        self.last = Some(Vec::new());
    }

    /// What the body says about the request, as far as it was looked at.
    pub fn peek(&self) -> Peek {
        self.peek
    }

    /// Says whether the client asks for a stream, as far as is known by now: a prompt may hide it until
    /// the whole body has passed.
    fn tell(&self) {
        self.call.asks.set(match (self.peek.stream, &self.last) {
            (Stream::Unknown, Some(last)) if self.end == End::Reached => peek::stream_at_end(last),
            (known, _) => known,
        });
    }

    fn keep_last(&mut self, data: &[u8]) {
        let Some(last) = &mut self.last else { return };
        let data = &data[data.len().saturating_sub(peek::END)..];
        let surplus = (last.len() + data.len()).saturating_sub(peek::END);
        last.drain(..surplus);
        last.extend_from_slice(data);
    }

    /// Whether the whole request can be said again, however much of it is sent by then.
    fn repeat(&self) -> Repeat {
        match self.framing {
            BodyFraming::None => Repeat::Possible,
            BodyFraming::Length(length) if length <= KEPT as u64 => Repeat::Possible,
            BodyFraming::Length(_) | BodyFraming::Chunked => Repeat::No,
        }
    }

    /// Starts over on another connection, if nothing that was sent is lost.
    fn rewind(&mut self) -> Option<()> {
        self.kept.as_ref()?;
        self.replayed = 0;
        Some(())
    }

    /// Reads ahead, up to a bound. Ready only when something is wrong with the body.
    pub fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<BodyFault> {
        while self.ahead_bytes < AHEAD {
            match ready!(self.poll_body(cx)) {
                None => return Poll::Pending,
                Some(Err(fault)) => return Poll::Ready(fault),
                Some(Ok(data)) => {
                    self.ahead_bytes += data.len();
                    self.ahead.push_back(data);
                }
            }
        }
        Poll::Pending
    }

    /// The next piece for the present connection, with a clock on the client.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyFault>>> {
        if let Some(kept) = &self.kept
            && let Some(piece) = kept.get(self.replayed)
        {
            self.replayed += 1;
            return Poll::Ready(Some(Ok(piece.clone())));
        }
        let piece = match self.ahead.pop_front() {
            Some(data) => Some(Ok(data)),
            None => match self.poll_body(cx) {
                Poll::Ready(piece) => piece,
                Poll::Pending => {
                    let patience = self.patience;
                    let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(patience)));
                    ready!(timer.as_mut().poll(cx));
                    return Poll::Ready(Some(Err(BodyFault::Slow)));
                }
            },
        };
        self.timer = None;
        if let Some(Ok(data)) = &piece {
            self.passed += data.len();
            if self.passed > KEPT {
                self.kept = None;
            }
            if let Some(kept) = &mut self.kept {
                kept.push(data.clone());
                self.replayed += 1;
            }
        }
        Poll::Ready(piece)
    }

    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyFault>>> {
        loop {
            if self.end == End::Reached {
                return Poll::Ready(None);
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => {
                    self.end = End::Reached;
                    self.tell();
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(BodyFault::Broken(error)))),
                // Trailers are dropped: merged into headers they could forge them.
                Some(Ok(frame)) => {
                    let Ok(data) = frame.into_data() else { continue };
                    if data.is_empty() {
                        continue;
                    }
                    self.taken += data.len() as u64;
                    if self.taken > self.max {
                        return Poll::Ready(Some(Err(BodyFault::TooLarge)));
                    }
                    self.keep_last(&data);
                    if self.body.is_end_stream() && self.framing != BodyFraming::Chunked {
                        self.end = End::Reached;
                        self.tell();
                    }
                    return Poll::Ready(Some(Ok(data)));
                }
            }
        }
    }

    /// Whether nothing is left to send on the present connection.
    pub(super) fn is_sent(&self) -> bool {
        self.end == End::Reached
            && self.ahead.is_empty()
            && self.kept.as_ref().is_none_or(|kept| self.replayed >= kept.len())
    }

    /// Bytes of the client's body so far.
    pub fn taken(&self) -> u64 {
        self.taken
    }
}

/// An answer that has begun.
#[derive(Debug)]
pub struct Answered {
    pub engine: Rc<Socket>,
    pub head: Head,
    /// What came behind the head in the same read: the body's first bytes, still framed.
    pub rest: Vec<u8>,
    pub sent: Sent,
}

/// Whether the engine took the whole request before it answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    Whole,
    /// It answered early: neither connection can carry another request.
    Partly,
}

/// Whether the engine may answer 101, which makes something else of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upgrade {
    Asked,
    No,
}

/// Says the request and waits for the answer's head, however long the engine thinks.
pub async fn exchange(
    pool: &Pool,
    counters: &Counters,
    engine: SocketAddr,
    (method, upgrade): (&Method, Upgrade),
    head: &[u8],
    body: &mut Outgoing,
) -> Result<Answered, Failure> {
    let mut connection = pool.take(engine, body.repeat());
    let since = Instant::now();
    loop {
        let Connection { socket, history } = if let Some(connection) = connection.take() {
            connection
        } else {
            counters.upstream_connects.fetch_add(1, Relaxed);
            let stream = connect(engine).await.map_err(Failure::Unreachable)?;
            Connection { socket: Rc::new(Socket::from(stream)), history: History::Fresh }
        };
        match attempt(socket, history, (method, upgrade), head, body).await {
            Ok(answered) => return Ok(answered),
            Err(Broke { failure: Failure::Broken(_), answer: Begun::No })
                if history == History::Reused && since.elapsed() < RACE && body.rewind().is_some() =>
            {
                counters.upstream_retries.fetch_add(1, Relaxed);
            }
            Err(Broke { failure, .. }) => return Err(failure),
        }
    }
}

/// Whether a byte of an answer had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    Yes,
    No,
}

#[derive(Debug)]
struct Broke {
    failure: Failure,
    answer: Begun,
}

impl From<BodyFault> for Broke {
    fn from(fault: BodyFault) -> Self {
        Self { failure: fault.into(), answer: Begun::No }
    }
}

async fn attempt(
    socket: Rc<Socket>,
    history: History,
    asked: (&Method, Upgrade),
    head: &[u8],
    body: &mut Outgoing,
) -> Result<Answered, Broke> {
    let mut answer = Answer { bytes: Vec::new(), begun: Begun::No };
    let (outcome, sent) = {
        let mut reading = pin!(poll_fn(|cx| answer.poll_head(&socket, cx, asked)));
        let sending = pin!(send(&socket, history, head, body));
        tokio::select! {
            biased;
            sent = sending => match sent {
                Ok(()) => (reading.await, Sent::Whole),
                Err(SendFault::Client(fault)) => return Err(fault.into()),
                Err(SendFault::Engine(error)) => match timeout(EXPLANATION, reading.as_mut()).await {
                    Ok(Ok(found)) => (Ok(found), Sent::Partly),
                    Ok(Err(failure)) => (Err(failure), Sent::Partly),
                    Err(_) => (Err(Failure::Broken(error)), Sent::Partly),
                },
            },
            outcome = reading.as_mut() => (outcome, Sent::Partly),
        }
    };
    let begun = answer.begun;
    let (mut head, rest) = outcome.map_err(|failure| Broke { failure, answer: begun })?;
    if sent == Sent::Partly {
        head.reuse = Reuse::No;
    }
    Ok(Answered { engine: socket, head, rest, sent })
}

/// The answer's head while it is not whole: nearly always it is, in the first read.
struct Answer {
    bytes: Vec<u8>,
    begun: Begun,
}

impl Answer {
    fn poll_head(
        &mut self,
        socket: &Socket,
        cx: &mut Context<'_>,
        asked: (&Method, Upgrade),
    ) -> Poll<Result<(Head, Vec<u8>), Failure>> {
        loop {
            let found = ready!(with_buffer(|buffer| {
                let read = ready!(socket.poll_read(cx, buffer)).map_err(Failure::Broken)?;
                if read == 0 {
                    return Poll::Ready(Err(Failure::Broken(io::ErrorKind::UnexpectedEof.into())));
                }
                self.begun = Begun::Yes;
                if self.bytes.is_empty() {
                    let found = whole(&buffer[..read], asked)?;
                    if found.is_none() {
                        self.bytes.extend_from_slice(&buffer[..read]);
                    }
                    return Poll::Ready(Ok(found));
                }
                self.bytes.extend_from_slice(&buffer[..read]);
                Poll::Ready(whole(&self.bytes, asked).map_err(Failure::from))
            }))?;
            if let Some(found) = found {
                return Poll::Ready(Ok(found));
            }
        }
    }
}

/// The final head in `bytes` and what stands behind it; interim answers are skipped.
fn whole(mut bytes: &[u8], (method, upgrade): (&Method, Upgrade)) -> Result<Option<(Head, Vec<u8>)>, BadHead> {
    loop {
        let Some(head) = head::parse(bytes, method)? else { return Ok(None) };
        let rest = &bytes[head.length..];
        match head.status.as_u16() {
            // Nobody asked for an upgrade: what follows would be tunnelled unseen (CVE-2026-2833).
            101 if upgrade == Upgrade::No => return Err(BadHead::Field("status (an upgrade that nobody asked for)")),
            100 | 102..200 => bytes = rest,
            _ => return Ok(Some((head, rest.to_vec()))),
        }
    }
}
