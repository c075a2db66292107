//! The simulated engine's HTTP side: connections, keys, access lines. Routes are in `routes`.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::knobs::Fault;
use super::requests::Engine;
use super::{logline, realtime, routes};

/// Uvicorn's keep-alive: idle connections are closed after this.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// An answer's body: whole, or in pieces as they are made.
#[derive(Debug)]
pub enum Answer {
    Whole(Option<Bytes>),
    Pieces(mpsc::Receiver<Bytes>),
}

impl Body for Answer {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().filter(|b| !b.is_empty()).map(|b| Ok(Frame::data(b)))),
            Self::Pieces(pieces) => pieces.poll_recv(cx).map(|piece| piece.map(|b| Ok(Frame::data(b)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Self::Whole(bytes) => hyper::body::SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Pieces(_) => hyper::body::SizeHint::default(),
        }
    }
}

/// Binds as asyncio does: `SO_REUSEADDR`, a backlog of 2048.
pub fn bind(host: &str, port: u16) -> std::io::Result<TcpListener> {
    let host = if host == "localhost" { "127.0.0.1" } else { host };
    let ip = host.parse().map_err(|_| std::io::Error::other(format!("{host} is no address")))?;
    let addr = SocketAddr::new(ip, port);
    let socket = if addr.is_ipv4() { tokio::net::TcpSocket::new_v4() } else { tokio::net::TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(2048)
}

/// Accepts until `stop` says so (the listener closes at once), then waits for the connections that
/// still carry an answer, however long that takes.
pub async fn serve(listener: TcpListener, engine: Arc<Engine>, mut stop: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    connections.spawn(connection(stream, peer, Arc::clone(&engine), stop.clone()));
                }
                // Out of descriptors, most likely: asyncio waits a second, too.
                Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            _ = stop.changed() => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connection(mut stream: TcpStream, peer: SocketAddr, engine: Arc<Engine>, mut stop: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    if engine.knobs.has(Fault::GarbageHttp) {
        let _ = stream.write_all(b"\x16\x03\x01 this is no HTTP\r\n\r\n\0\0").await;
        return;
    }
    let service = service_fn(move |request: Request<Incoming>| {
        let engine = Arc::clone(&engine);
        async move { Ok::<_, std::convert::Infallible>(answer(&engine, peer, request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(KEEP_ALIVE)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => {}
        _ = stop.changed() => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

async fn answer(engine: &Arc<Engine>, peer: SocketAddr, request: Request<Incoming>) -> Response<Answer> {
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    // The real engine's keys are asked for by a middleware that sees no WebSocket.
    if realtime::is_asked(&request) {
        let response = realtime::open(engine, request);
        let outcome = if response.status() == StatusCode::SWITCHING_PROTOCOLS { "[accepted]" } else { "403" };
        logline::say(None, format!("INFO:     {peer} - \"WebSocket {path}\" {outcome}"));
        return response;
    }
    let mut response = match guard(engine, &method, &path, request.headers().get(header::AUTHORIZATION)) {
        Ok(()) => routes::route(engine, request).await,
        Err(refusal) => *refusal,
    };
    response.headers_mut().insert(header::SERVER, HeaderValue::from_static("uvicorn"));
    logline::access(peer, method.as_str(), &path, response.status());
    response
}

/// Who may call what: three prefixes are public, operators' routes ask for the admin key where there
/// is one.
fn guard(
    engine: &Engine,
    method: &Method,
    path: &str,
    sent: Option<&HeaderValue>,
) -> Result<(), Box<Response<Answer>>> {
    let public = ["/health", "/ready", "/metrics"].iter().any(|prefix| path.starts_with(prefix));
    if public || method == Method::OPTIONS {
        return Ok(());
    }
    let operators = routes::OPERATORS.contains(&path);
    let api_key = engine.args.one("api-key");
    let wanted = match engine.args.one("admin-api-key") {
        Some(admin) if operators => Some(admin),
        _ => api_key,
    };
    let Some(wanted) = wanted else { return Ok(()) };
    let bearer = sent.and_then(|value| value.to_str().ok()).and_then(|value| value.strip_prefix("Bearer "));
    if bearer == Some(wanted) {
        Ok(())
    } else {
        Err(Box::new(json(StatusCode::UNAUTHORIZED, &serde_json::json!({"error": "Unauthorized"}))))
    }
}

pub fn empty(status: StatusCode) -> Response<Answer> {
    let mut response = Response::new(Answer::Whole(None));
    *response.status_mut() = status;
    response
}

pub fn json(status: StatusCode, value: &serde_json::Value) -> Response<Answer> {
    let mut response = Response::new(Answer::Whole(Some(Bytes::from(value.to_string()))));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

pub fn text(status: StatusCode, text: String, kind: &'static str) -> Response<Answer> {
    let mut response = Response::new(Answer::Whole(Some(Bytes::from(text))));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

pub fn events(pieces: mpsc::Receiver<Bytes>) -> Response<Answer> {
    let mut response = Response::new(Answer::Pieces(pieces));
    let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
