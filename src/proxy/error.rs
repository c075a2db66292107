//! The one place where a refusal becomes HTTP, and a broken stream its last event.
//!
//! Every body is JSON in OpenAI's shape; Anthropic's clients find their `type: error` in the same
//! object. It decides nothing: status, code and message come from who refuses.

use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, Response, StatusCode};
use serde_json::{Map, Value, json};

use super::framing::Violation;
use super::routes::Dialect;
use crate::link::EngineView;

mod events;

pub use events::{engines_error, keep_alive, last_event};

/// What becomes of the client's connection behind the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connection {
    Keep,
    /// What the client sends next cannot be trusted, or is not wanted.
    Close,
}

/// A request that gets no answer of the engine, and why.
#[derive(Debug, Clone)]
pub struct Refusal {
    status: StatusCode,
    kind: &'static str,
    code: String,
    message: String,
    retry_after: Option<u64>,
    connection: Connection,
    allow: Option<&'static [Method]>,
    fields: &'static [(&'static str, &'static str)],
    /// Beside `error` in the body.
    extra: Map<String, Value>,
}

/// Seconds of `Retry-After` while an engine starts: at least the next look, at most a minute, since
/// an ETA is a guess and a client that comes early costs little.
const ENGINE_RETRY: std::ops::RangeInclusive<u64> = 1..=60;

impl Refusal {
    fn new(status: StatusCode, kind: &'static str, code: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            code: code.into(),
            message: message.into(),
            retry_after: None,
            connection: Connection::Keep,
            allow: None,
            fields: &[],
            extra: Map::new(),
        }
    }

    fn retry(mut self, after: Duration) -> Self {
        self.retry_after = Some((after.as_millis().div_ceil(1000) as u64).max(1));
        self
    }

    fn closing(mut self) -> Self {
        self.connection = Connection::Close;
        self
    }

    pub fn violation(violation: Violation) -> Self {
        let status = StatusCode::from_u16(violation.status).unwrap_or(StatusCode::BAD_REQUEST);
        Self::new(status, "invalid_request_error", "malformed_request", violation.reason).closing()
    }

    pub fn ambiguous_path() -> Self {
        let message = "the path can be read in more than one way (dot segments, doubled or encoded slashes)";
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", "ambiguous_path", message).closing()
    }

    pub fn unknown_route(path: &str) -> Self {
        let message = format!("there is no {path} here");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", "unknown_route", message)
    }

    pub fn forbidden(path: &str) -> Self {
        let message = format!("{path} is not served on the public listener");
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", "operator_route", message)
    }

    /// No operator's route, but not one that clients may have here.
    pub fn closed(path: &str) -> Self {
        let message = format!("{path} is closed here: the operator opens routes with limits.routes");
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", "closed_route", message)
    }

    pub fn unknown_query() -> Self {
        let message = "these parameters are not known here: include, dp_rank and format, each once";
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", "unknown_query", message)
    }

    /// The engine did not answer, and never has.
    pub fn no_copy() -> Self {
        let message = "the engine does not answer that at present";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", "engine_silent", message)
            .retry(Duration::from_secs(1))
    }

    /// Of the node: another server may have room.
    pub fn crowded() -> Self {
        let message = "as many connections are open as may; come again later";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded_error", "too_many_connections", message)
            .retry(Duration::from_secs(1))
            .closing()
    }

    /// Of the peer: another server would say the same.
    pub fn peer_crowded() -> Self {
        let message = "as many connections are open from your address as may; use those";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "too_many_connections", message)
            .retry(Duration::from_secs(1))
            .closing()
    }

    pub fn wrong_method(methods: &'static [Method]) -> Self {
        let message = "this path does not take that method";
        let mut refusal = Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", "wrong_method", message);
        refusal.allow = Some(methods);
        refusal
    }

    pub fn unauthorized() -> Self {
        let message = "an API key is asked for: Authorization: Bearer KEY, or x-api-key: KEY";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", "invalid_api_key", message)
    }

    pub fn too_large(limit: u64) -> Self {
        let message = format!("the request's body is larger than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", "body_too_large", message).closing()
    }

    pub fn slow_body() -> Self {
        let message = "the request's body stopped coming";
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", "body_timeout", message).closing()
    }

    pub fn broken_body() -> Self {
        let message = "the request's body broke off or is malformed";
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", "broken_body", message).closing()
    }

    /// A request that should have asked for a WebSocket, and did not, or for another version.
    pub fn upgrade_required(message: &str) -> Self {
        let mut refusal = Self::new(StatusCode::UPGRADE_REQUIRED, "invalid_request_error", "upgrade_required", message);
        refusal.fields = &[("upgrade", "websocket"), ("connection", "upgrade"), ("sec-websocket-version", "13")];
        refusal
    }

    /// A request for a WebSocket that is not one.
    pub fn no_websocket(message: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", "malformed_request", message).closing()
    }

    pub fn queue_full(retry_after: Duration) -> Self {
        let message = "as many requests wait already as may; come again later";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded_error", "queue_full", message).retry(retry_after)
    }

    pub fn queue_timeout(retry_after: Duration) -> Self {
        let message = "no place became free in time; come again later";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded_error", "queue_timeout", message).retry(retry_after)
    }

    /// 429: it is the key's own limit, and another server would say the same.
    fn of_key(code: &str, message: &str, retry_after: Duration) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", code, message).retry(retry_after)
    }

    pub fn key_queue_full(retry_after: Duration) -> Self {
        Self::of_key(
            "key_queue_full",
            "as many requests wait already with this key as may; come again later",
            retry_after,
        )
    }

    pub fn displaced(retry_after: Duration) -> Self {
        let message =
            "this key held more of the full queue than its share, and another key needed it; come again later";
        Self::of_key("key_queue_full", message, retry_after)
    }

    pub fn key_queue_timeout(retry_after: Duration) -> Self {
        let message = "as many requests were open with this key as may, for as long as one waits; come again later";
        Self::of_key("key_queue_timeout", message, retry_after)
    }

    pub fn deadline(retry_after: Duration) -> Self {
        let message = "the request's own deadline passed before its turn came";
        Self::new(StatusCode::GATEWAY_TIMEOUT, "overloaded_error", "deadline_exceeded", message).retry(retry_after)
    }

    pub fn hopeless(retry_after: Duration) -> Self {
        let message = "the request's deadline is nearer than its turn; come again later";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded_error", "deadline_too_short", message).retry(retry_after)
    }

    pub fn draining() -> Self {
        let message = "this server is stopping; another one, or the next start, will answer";
        let after = Duration::from_secs(5);
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", "draining", message).retry(after).closing()
    }

    pub fn cut(reason: &str) -> Self {
        let mut refusal = Self::draining();
        refusal.message = format!("the request was ended: {reason}");
        refusal
    }

    /// The engine is not serving, or (none) not even its state is known yet.
    pub fn engine(view: Option<&EngineView>) -> Self {
        let (state, phase) = view.map_or(("starting", ""), |view| (view.state.name(), view.phase.as_str()));
        let mut message = format!("the engine is not serving: {state}");
        for part in [phase, view.map_or("", |view| &view.reason)] {
            if !part.is_empty() {
                message.push_str(", ");
                message.push_str(part);
            }
        }
        let eta = view.and_then(|view| view.eta_seconds);
        let unknown = if view.is_some() { 5 } else { *ENGINE_RETRY.start() };
        let after = eta.unwrap_or(unknown).clamp(*ENGINE_RETRY.start(), *ENGINE_RETRY.end());
        let mut refusal =
            Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", format!("engine_{state}"), message)
                .retry(Duration::from_secs(after));
        refusal.extra.insert("state".into(), state.into());
        refusal.extra.insert("phase".into(), phase.into());
        refusal.extra.insert("percent".into(), json!(view.and_then(|view| view.percent)));
        refusal.extra.insert("eta_seconds".into(), json!(eta));
        if let Some(range) = view.and_then(|view| view.eta_range_seconds) {
            refusal.extra.insert("eta_range_seconds".into(), json!(range));
        }
        refusal
    }

    /// The engine runs, but is about to be replaced or under suspicion: for `/ready` alone.
    pub fn suspected(view: &EngineView) -> Self {
        let mut refusal = Self::engine(Some(view));
        refusal.code = "engine_suspected".into();
        refusal.message = "the engine has shown no sign of life for a while".into();
        refusal
    }

    pub fn unreachable() -> Self {
        let message = "the engine does not take connections";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", "engine_unreachable", message)
            .retry(Duration::from_secs(1))
    }

    pub fn broken_engine(what: &str) -> Self {
        let message = format!("the engine ended the connection before its answer: {what}");
        Self::new(StatusCode::BAD_GATEWAY, "bad_gateway", "engine_broken", message).retry(Duration::from_secs(1))
    }

    pub fn stuck_supervisor() -> Self {
        let message = "the supervisor has not been heard of";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", "supervisor_silent", message)
    }

    /// The same as the last event of a stream that has begun already.
    pub fn into_event(self, dialect: Dialect) -> Bytes {
        events::error_event(dialect, self.kind, &self.code.into(), &self.message)
    }

    /// The answer. `closing` wins over the refusal's own wish to keep the connection.
    pub fn into_response(self) -> Response<Bytes> {
        let mut body = Map::new();
        body.insert("type".into(), "error".into());
        body.insert("error".into(), error_object(&self.message, self.kind, &self.code.into()));
        body.extend(self.extra);
        let mut response = Response::new(Bytes::from(Value::Object(body).to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.connection == Connection::Close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        for (name, value) in self.fields {
            headers.append(*name, HeaderValue::from_static(value));
        }
        if let Some(methods) = self.allow {
            let names: Vec<&str> = methods.iter().map(Method::as_str).collect();
            headers.insert(ALLOW, HeaderValue::from_str(&names.join(", ")).expect("methods are tokens"));
        }
        response
    }
}

fn error_object(message: &str, kind: &str, code: &Value) -> Value {
    json!({ "message": message, "type": kind, "param": null, "code": code })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::EngineState;

    fn shape(refusal: Refusal) -> String {
        let response = refusal.into_response();
        let fields = response.headers().iter();
        let fields: Vec<String> =
            fields.map(|(name, value)| format!("{name}: {}\n", value.to_str().expect("text"))).collect();
        format!("{}\n{}", response.status(), fields.concat()) + std::str::from_utf8(response.body()).expect("text")
    }

    #[test]
    fn a_starting_engine_says_how_far_it_is() {
        let view = EngineView {
            state: EngineState::Loading,
            phase: "loading weights 3/64".into(),
            percent: Some(12.5),
            eta_seconds: Some(240),
            eta_range_seconds: None,
            reason: String::new(),
            upstream: None,
            suspected: false,
            will_return: true,
            hold_ms: 0,
        };
        insta::assert_snapshot!(shape(Refusal::engine(Some(&view))), @r#"
        503 Service Unavailable
        content-type: application/json
        cache-control: no-store
        retry-after: 60
        {"type":"error","error":{"message":"the engine is not serving: loading, loading weights 3/64","type":"service_unavailable","param":null,"code":"engine_loading"},"state":"loading","phase":"loading weights 3/64","percent":12.5,"eta_seconds":240}
        "#);
    }

    #[test]
    fn refusals_keep_their_shape() {
        insta::assert_snapshot!(shape(Refusal::unauthorized()), @r#"
        401 Unauthorized
        content-type: application/json
        cache-control: no-store
        www-authenticate: Bearer
        {"type":"error","error":{"message":"an API key is asked for: Authorization: Bearer KEY, or x-api-key: KEY","type":"authentication_error","param":null,"code":"invalid_api_key"}}
        "#);
        insta::assert_snapshot!(shape(Refusal::wrong_method(&[Method::GET, Method::HEAD])), @r#"
        405 Method Not Allowed
        content-type: application/json
        cache-control: no-store
        allow: GET, HEAD
        {"type":"error","error":{"message":"this path does not take that method","type":"invalid_request_error","param":null,"code":"wrong_method"}}
        "#);
        insta::assert_snapshot!(shape(Refusal::queue_full(Duration::from_millis(1200))), @r#"
        503 Service Unavailable
        content-type: application/json
        cache-control: no-store
        retry-after: 2
        {"type":"error","error":{"message":"as many requests wait already as may; come again later","type":"overloaded_error","param":null,"code":"queue_full"}}
        "#);
    }
}
