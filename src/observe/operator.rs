//! The engine's operator routes, on the admin listener alone and only for who shows an operator's key.
//!
//! The engine's admin key is put in here: it is made anew at each start, and nobody else ever sees it.
//! What a route does is the engine's matter; what would kill the engine is refused.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::admin::Sources;
use crate::keys::{Keys, KeysError, Role};
use crate::link::Upstream;
use crate::link::routes;

/// A loopback connect takes microseconds.
const CONNECT: Duration = Duration::from_secs(1);

/// Fields of an operator's request that the engine is told: what the body is and what is wanted for it.
const PASSED: [header::HeaderName; 4] =
    [header::CONTENT_TYPE, header::CONTENT_LENGTH, header::ACCEPT, header::CONTENT_ENCODING];
/// Fields of the engine's answer that belong to its connection.
const HOP_BY_HOP: [header::HeaderName; 3] = [header::CONNECTION, header::TRANSFER_ENCODING, header::UPGRADE];

/// Why an operator's request does not pass.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(
        "sglangd's admin listener answers GET /status, GET /metrics and, with an operator's key, the engine's operator \
         routes; {0} is none of them"
    )]
    Unknown(String),
    #[error("{path} takes {}", methods.iter().map(Method::as_str).collect::<Vec<_>>().join(", "))]
    Method { path: String, methods: &'static [Method] },
    #[error(
        "operator routes need an operator's key: set auth.keys_file and make one with `sglangd keys add NAME --operator`"
    )]
    NoKeys,
    #[error("an operator's key is asked for, as Authorization: Bearer KEY or x-api-key: KEY; a client's is none")]
    Key,
    #[error("nobody can be let in: {0}")]
    Keys(#[from] KeysError),
    #[error("the engine is not serving: {0}")]
    Away(&'static str),
    #[error(
        "{path} with {open} requests open would end the engine: it asserts that nothing runs. Stop the traffic first, and \
         let POST /pause_generation {{\"mode\":\"retract\"}} hold what comes after"
    )]
    Busy { path: String, open: usize },
    #[error("the engine does not take connections: {0}")]
    Unreachable(io::Error),
    #[error("the engine did not answer: {0}")]
    Broken(#[from] hyper::Error),
}

impl Refused {
    fn status(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Unknown(_) => (StatusCode::NOT_FOUND, "unknown_route"),
            Self::Method { .. } => (StatusCode::METHOD_NOT_ALLOWED, "wrong_method"),
            Self::NoKeys => (StatusCode::FORBIDDEN, "no_operator_keys"),
            Self::Key => (StatusCode::UNAUTHORIZED, "invalid_operator_key"),
            Self::Keys(_) => (StatusCode::SERVICE_UNAVAILABLE, "keys_unreadable"),
            Self::Away(_) => (StatusCode::SERVICE_UNAVAILABLE, "engine_away"),
            Self::Busy { .. } => (StatusCode::CONFLICT, "engine_busy"),
            Self::Unreachable(_) | Self::Broken(_) => (StatusCode::BAD_GATEWAY, "engine_broken"),
        }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let (status, code) = self.status();
        let body =
            json!({"error": {"message": self.to_string(), "type": "operator_error", "param": null, "code": code}});
        let mut response = (status, axum::Json(body)).into_response();
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// Whatever is asked of the admin listener beside its own pages.
pub async fn pass(State(sources): State<Arc<Sources>>, request: Request) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    match admit(&sources, &method, &path, request.headers()).await {
        Ok((operator, engine)) => {
            let outcome = ask(&engine, request).await;
            let response = outcome.unwrap_or_else(IntoResponse::into_response);
            tracing::info!(operator, %method, path, status = response.status().as_u16(), "an operator's request");
            response
        }
        Err(refused) => {
            if matches!(refused, Refused::Key) {
                tracing::warn!(%method, path, "a request for an operator's route shows no operator's key");
            }
            refused.into_response()
        }
    }
}

/// Who asks, and the engine that may be asked.
async fn admit(
    sources: &Sources,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
) -> Result<(String, Upstream), Refused> {
    let methods = routes::operators(path).ok_or_else(|| Refused::Unknown(path.to_owned()))?;
    let file = sources.settings.borrow().keys_file.clone().ok_or(Refused::NoKeys)?;
    let operator = operator(file, headers.clone()).await?;
    if !methods.contains(method) {
        return Err(Refused::Method { path: path.to_owned(), methods });
    }
    let view = sources.engine.borrow().clone();
    let engine = view.upstream.ok_or_else(|| Refused::Away(view.state.name()))?;
    // SGLang asserts in the scheduler that it is idle: the whole engine dies of it (contract §h).
    if path == "/release_memory_occupation" {
        match open_requests(sources).await {
            0 => {}
            open => return Err(Refused::Busy { path: path.to_owned(), open }),
        }
    }
    Ok((operator, engine))
}

/// Requests open towards the engine at this moment: asked of the proxy, since the status is a moment old.
async fn open_requests(sources: &Sources) -> usize {
    let told = sources.status.borrow().requests.in_flight;
    let page = sources.half.scrape().await.unwrap_or_default();
    let now = page.lines().find_map(|line| line.strip_prefix("sglangd_requests_in_flight ")?.parse().ok());
    now.unwrap_or(told)
}

/// The name of the key that is shown. The file is read for each request: they are few, and what was taken
/// out of it opens nothing from that moment on.
async fn operator(file: PathBuf, headers: HeaderMap) -> Result<String, Refused> {
    let looked = tokio::task::spawn_blocking(move || {
        let (keys, _) = Keys::load(&file)?;
        if !keys.iter().any(|key| key.role == Role::Operator) {
            return Err(Refused::NoKeys);
        }
        let shown = keys.check(&headers).filter(|(_, key)| key.role == Role::Operator);
        shown.map(|(_, key)| key.name.clone()).ok_or(Refused::Key)
    });
    looked.await.unwrap_or(Err(Refused::Key))
}

/// Passes the request and its answer, bodies and all, as they come.
async fn ask(engine: &Upstream, request: Request) -> Result<Response, Refused> {
    let (parts, body) = request.into_parts();
    let target = parts.uri.path_and_query().map_or("/", |target| target.as_str()).to_owned();
    let mut outgoing = axum::http::Request::new(body);
    *outgoing.method_mut() = parts.method;
    // Was parsed from such a text a moment ago.
    *outgoing.uri_mut() = target.parse().unwrap_or_default();
    let headers = outgoing.headers_mut();
    for name in PASSED {
        if let Some(value) = parts.headers.get(&name) {
            headers.insert(name, value.clone());
        }
    }
    let host = HeaderValue::from_str(&engine.addr.to_string()).expect("an address is plain text");
    headers.insert(header::HOST, host);
    if let Some(key) = engine.admin_key.as_ref().or(engine.api_key.as_ref()) {
        let mut value = HeaderValue::from_str(&format!("Bearer {key}")).expect("keys are hexadecimal digits");
        value.set_sensitive(true);
        headers.insert(header::AUTHORIZATION, value);
    }
    let stream = match timeout(CONNECT, TcpStream::connect(engine.addr)).await {
        Ok(stream) => stream.map_err(Refused::Unreachable)?,
        Err(_) => return Err(Refused::Unreachable(io::ErrorKind::TimedOut.into())),
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the answer's body, or with the operator who leaves: either drops the other end of it.
    tokio::spawn(connection);
    let mut answer = sender.send_request(outgoing).await?;
    for name in HOP_BY_HOP {
        answer.headers_mut().remove(name);
    }
    Ok(answer.map(Body::new))
}
