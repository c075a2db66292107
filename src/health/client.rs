//! A small HTTP/1.1 client for sglangd's own questions: probes of the engine, `status` over the
//! admin socket. One connection a request, one time-out for all of it, bodies bounded.
//!
//! Not for clients' traffic: that is `proxy`'s.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// Largest answer taken. The engine's metrics page of eight ranks is some 300 KiB.
const MAX_BODY: usize = 8 << 20;

/// Where to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: StatusCode,
    pub body: Bytes,
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("nobody listens there: {0}")]
    Connect(std::io::Error),
    #[error("no answer within {} s", .0.as_secs())]
    TimedOut(Duration),
    #[error("the answer broke off or was not HTTP: {0}")]
    Http(#[from] hyper::Error),
    #[error("the answer's body broke off or was longer than {MAX_BODY} bytes: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
}

/// `GET path`.
pub async fn get(target: &Target, path: &str, bearer: Option<&str>, limit: Duration) -> Result<Answer, ClientError> {
    request(target, Method::GET, path, bearer, Bytes::new(), limit).await
}

/// Any method, with a JSON body where there is one.
pub async fn request(
    target: &Target,
    method: Method,
    path: &str,
    bearer: Option<&str>,
    body: Bytes,
    limit: Duration,
) -> Result<Answer, ClientError> {
    let exchange = async {
        match target {
            Target::Tcp(addr) => {
                let stream = TcpStream::connect(addr).await.map_err(ClientError::Connect)?;
                // Best effort: a small question should not wait for Nagle.
                let _ = stream.set_nodelay(true);
                exchange(stream, method, path, bearer, body).await
            }
            Target::Unix(at) => {
                let stream = UnixStream::connect(at).await.map_err(ClientError::Connect)?;
                exchange(stream, method, path, bearer, body).await
            }
        }
    };
    match tokio::time::timeout(limit, exchange).await {
        Ok(result) => result,
        Err(_) => Err(ClientError::TimedOut(limit)),
    }
}

async fn exchange<S>(
    stream: S,
    method: Method,
    path: &str,
    bearer: Option<&str>,
    body: Bytes,
) -> Result<Answer, ClientError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut request = Request::builder().method(method).uri(path).header("host", "localhost");
    if let Some(key) = bearer {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    if !body.is_empty() {
        request = request.header("content-type", "application/json");
    }
    let request = request.body(Full::new(body)).expect("method, path and header values are ours and valid");
    // The connection is driven beside the exchange, in this task: dropping the future closes it.
    tokio::pin!(connection);
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await.map_err(ClientError::Body)?.to_bytes();
        Ok(Answer { status, body })
    };
    tokio::pin!(answer);
    let mut driven = false;
    loop {
        tokio::select! {
            done = &mut answer => return done,
            ended = &mut connection, if !driven => { driven = true; ended?; }
        }
    }
}
