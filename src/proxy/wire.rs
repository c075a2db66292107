//! One client's socket: what its tap, its service and its answer know together.
//!
//! That the client has left while its answer is still being made (seen without reading ahead, so a
//! pipelined second request hides nothing), that what was written is really out, and how to end a
//! connection so that the last answer is read. It parses nothing.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use http::Response;
use tokio::time::Instant;

use super::answer::Answer;
use super::framing::Violation;
use super::transport::counts::Turned;
use super::transport::socket::Socket;
use super::transport::tls::Tls;

thread_local! {
    /// The one read buffer of a worker, for clients and engine alike: nothing stays in it between
    /// two polls, so no stream needs its own.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BUFFER].into_boxed_slice());
}

/// Size of a worker's read buffer: some socket buffers' worth, still within the L2 cache.
pub const READ_BUFFER: usize = 64 * 1024;

/// Runs `reader` on the worker's buffer. Not to be nested.
pub fn with_buffer<R>(reader: impl FnOnce(&mut [u8]) -> R) -> R {
    BUFFER.with_borrow_mut(|buffer| reader(buffer))
}

/// What lies between HTTP and the socket.
#[derive(Debug)]
enum Layer {
    None,
    Tls(Box<Tls>),
}

/// How a client's connection is called in `X-Forwarded-Proto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Http,
    Https,
}

impl Scheme {
    pub fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

type Leaving = Pin<Box<dyn Future<Output = ()>>>;

/// What the service, the answer and the tap of one connection know together.
pub struct Wire {
    socket: Rc<Socket>,
    layer: Layer,
    refusal: Cell<Option<Violation>>,
    /// How often everything written so far was handed on.
    flushes: Cell<u64>,
    flush_waker: Cell<Option<Waker>>,
    leaving: RefCell<Option<Leaving>>,
    upload: Upload,
    /// The client has closed its side.
    ended: Cell<bool>,
    /// A request has come.
    asked: Cell<bool>,
    /// What was read, where it turned out to be HTTP/2.
    http2: Cell<Option<Vec<u8>>>,
    /// An answer that is not for hyper to write.
    handed_over: Cell<Option<Box<Response<Answer>>>>,
    /// It is no HTTP that comes.
    turned: Cell<Option<Turned>>,
    /// Since when no request of it is open.
    idle: Cell<Option<Instant>>,
    stay: Cell<Stay>,
}

/// Whether more of a request's body is wanted.
#[derive(Default)]
struct Upload {
    held: Cell<bool>,
    reader: Cell<Option<Waker>>,
}

/// For as long as this lives, nothing more is read: what was read last is still to be taken by the engine.
pub struct Held<'a>(&'a Wire);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.upload.held.set(false);
        if let Some(reader) = self.0.upload.reader.take() {
            reader.wake();
        }
    }
}

/// Whether a connection may go on being idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stay {
    Welcome,
    /// Its place is needed, unless it gets something to do in this very moment.
    LetGo,
    /// It is one too many, stays only until it was told so, and is nobody's place.
    Briefly,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Wire {
    pub fn plain(socket: Rc<Socket>) -> Rc<Self> {
        Self::new(socket, Layer::None)
    }

    pub fn encrypted(socket: Rc<Socket>, tls: Tls) -> Rc<Self> {
        Self::new(socket, Layer::Tls(Box::new(tls)))
    }

    fn new(socket: Rc<Socket>, layer: Layer) -> Rc<Self> {
        Rc::new(Self {
            socket,
            layer,
            refusal: Cell::new(None),
            flushes: Cell::new(0),
            flush_waker: Cell::new(None),
            leaving: RefCell::new(None),
            upload: Upload::default(),
            ended: Cell::new(false),
            asked: Cell::new(false),
            http2: Cell::new(None),
            handed_over: Cell::new(None),
            turned: Cell::new(None),
            idle: Cell::new(None),
            stay: Cell::new(Stay::Welcome),
        })
    }

    pub fn scheme(&self) -> Scheme {
        match &self.layer {
            Layer::None => Scheme::Http,
            Layer::Tls(_) => Scheme::Https,
        }
    }

    /// What client and proxy agreed to speak (ALPN), where they did.
    pub fn protocol(&self) -> Option<Vec<u8>> {
        match &self.layer {
            Layer::None => None,
            Layer::Tls(tls) => tls.protocol(),
        }
    }

    /// Reads once what has come.
    pub fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        match &self.layer {
            Layer::None => self.socket.poll_read(cx, buffer),
            Layer::Tls(tls) => tls.poll_read(cx, buffer),
        }
    }

    /// The socket, where its bytes are the client's own.
    pub fn in_clear(&self) -> Option<&Rc<Socket>> {
        match &self.layer {
            Layer::None => Some(&self.socket),
            Layer::Tls(_) => None,
        }
    }

    /// Who is to be woken where the kernel does not take what was written.
    pub fn wakes(&self, cx: &Context<'_>) {
        self.socket.wakes(cx);
    }

    /// Whether the kernel took all that it was given.
    pub fn is_written(&self) -> bool {
        self.socket.is_written()
    }

    pub fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &self.layer {
            Layer::None => self.socket.poll_write(cx, bytes),
            Layer::Tls(tls) => tls.poll_write(cx, bytes),
        }
    }

    pub fn poll_write_vectored(&self, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match &self.layer {
            Layer::None => self.socket.poll_write_vectored(cx, slices),
            Layer::Tls(tls) => tls.poll_write_vectored(cx, slices),
        }
    }

    /// Hands on what was written, to be called when the writer has nothing left itself. What is posted is with the kernel
    /// before the worker's turn ends.
    pub fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.layer {
            Layer::None => {}
            Layer::Tls(tls) => ready!(tls.poll_flush(cx))?,
        }
        ready!(self.socket.poll_unwritten(cx))?;
        self.flushed();
        Poll::Ready(Ok(()))
    }

    /// Says that the last byte was written, as the layer says it. A connection that breaks off is not
    /// to be shut down: over TLS the missing goodbye tells the client that something is missing.
    pub fn poll_shutdown(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.layer {
            Layer::None => self.socket.poll_shut(cx),
            Layer::Tls(tls) => tls.poll_shutdown(cx),
        }
    }

    /// Reads no more until what is returned is dropped. The client's leaving is seen all the same.
    pub fn hold(&self) -> Held<'_> {
        self.upload.held.set(true);
        Held(self)
    }

    /// Ready where more may be read.
    pub fn poll_wanted(&self, cx: &Context<'_>) -> Poll<()> {
        if self.upload.held.get() {
            self.upload.reader.set(Some(cx.waker().clone()));
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    /// Nothing that comes is to be taken for HTTP.
    pub fn turn_away(&self, why: Turned) {
        self.turned.set(Some(why));
    }

    pub fn turned(&self) -> Option<Turned> {
        self.turned.get()
    }

    /// Ends the connection so that the client can read the last answer.
    pub async fn close(&self) {
        close(Rc::clone(&self.socket)).await;
    }

    /// The request that comes next must be refused: see [`Self::refusal`].
    pub fn refuse(&self, violation: Violation) {
        self.refusal.set(Some(violation));
    }

    /// The client's end was read.
    pub fn end(&self) {
        self.ended.set(true);
    }

    /// Why the request now in the service's hands must be refused, if it must.
    pub fn refusal(&self) -> Option<Violation> {
        self.refusal.get()
    }

    /// Ready when the client has closed or reset its side, whatever it sent before. Nothing is read.
    pub fn poll_left(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.ended.get() {
            return Poll::Ready(());
        }
        let mut leaving = self.leaving.borrow_mut();
        let future = leaving.get_or_insert_with(|| {
            let socket = Rc::clone(&self.socket);
            Box::pin(async move { socket.left().await })
        });
        ready!(future.as_mut().poll(cx));
        self.ended.set(true);
        Poll::Ready(())
    }

    pub fn ask(&self) {
        self.asked.set(true);
    }

    /// For whoever drives the connection: see [`super::direct`].
    pub fn hand_over(&self, response: Response<Answer>) {
        self.handed_over.set(Some(Box::new(response)));
    }

    pub fn handed_over(&self) -> Option<Box<Response<Answer>>> {
        self.handed_over.take()
    }

    /// Whether a request ever came.
    pub fn was_asked(&self) -> bool {
        self.asked.get()
    }

    /// Whether the client was seen to have closed its side.
    pub fn has_ended(&self) -> bool {
        self.ended.get()
    }

    /// This is no HTTP/1: its first bytes, for who speaks HTTP/2.
    pub fn begin_http2(&self, early: Vec<u8>) {
        self.http2.set(Some(early));
    }

    pub fn http2(&self) -> Option<Vec<u8>> {
        self.http2.take()
    }

    /// No request is open. Who sends one byte of a head each minute is idle all the while.
    pub fn rest(&self, since: Instant) {
        if self.idle.get().is_none() {
            self.idle.set(Some(since));
        }
    }

    /// A request has come.
    pub fn work(&self) {
        self.idle.set(None);
        if self.stay.get() != Stay::Briefly {
            self.stay.set(Stay::Welcome);
        }
    }

    /// Since when it is idle, if it is and was not let go.
    pub fn idle_since(&self) -> Option<Instant> {
        self.idle.get().filter(|_| self.stay.get() == Stay::Welcome)
    }

    /// Its place is needed.
    pub fn let_go(&self) {
        self.stay.set(Stay::LetGo);
    }

    /// It is told something and goes: it never counts as idle, and nobody's place is made from it.
    pub fn goes_anyway(&self) {
        self.stay.set(Stay::Briefly);
    }

    /// Whether it is to end now.
    pub fn is_let_go(&self) -> bool {
        self.stay.get() == Stay::LetGo && self.idle.get().is_some()
    }

    pub fn flushes(&self) -> u64 {
        self.flushes.get()
    }

    /// Ready once all that was written after the `since`th flush is with the kernel.
    pub fn poll_flushed(&self, cx: &mut Context<'_>, since: u64) -> Poll<()> {
        if self.flushes.get() > since {
            self.socket.settle();
            // Where it fails, there is nobody to read it.
            return self.socket.poll_unwritten(cx).map(drop);
        }
        self.flush_waker.set(Some(cx.waker().clone()));
        Poll::Pending
    }

    fn flushed(&self) {
        self.flushes.set(self.flushes.get() + 1);
        if let Some(waker) = self.flush_waker.take() {
            waker.wake();
        }
    }
}

/// How long and how much a client may go on sending after its refusal.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1 << 20;

/// Ends a connection so that the client can read the last answer: FIN first, then what it still
/// sends is thrown away for a moment. Closing with unread bytes would be RST, which takes the answer
/// out of the client's hands.
pub async fn close(socket: Rc<Socket>) {
    let drain = async {
        if std::future::poll_fn(|cx| socket.poll_shut(cx)).await.is_err() {
            return;
        }
        let mut left = LINGER_BYTES;
        while left > 0 {
            let read = std::future::poll_fn(|cx| with_buffer(|buffer| socket.poll_read(cx, buffer))).await;
            match read {
                Ok(n) if n > 0 => left = left.saturating_sub(n),
                _ => return,
            }
        }
    };
    let _ = tokio::time::timeout(LINGER, drain).await;
}
