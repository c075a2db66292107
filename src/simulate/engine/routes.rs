//! The routes of the simulated engine, and the shapes of their answers and errors as measured.

use std::sync::Arc;

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};

use super::generate::{Shape, count_tokens, generate};
use super::http::{Answer, empty, json as answer_json, text};
use super::knobs::Fault;
use super::requests::{Engine, Status};
use super::{loads, logline};

/// Routes for operators: the admin key, where there is one.
pub const OPERATORS: [&str; 4] = ["/flush_cache", "/abort_request", "/pause_generation", "/continue_generation"];

pub async fn route(engine: &Arc<Engine>, request: Request<Incoming>) -> Response<Answer> {
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    let get = method == Method::GET;
    let post = method == Method::POST;
    let either = get || post;
    match path.as_str() {
        "/health" | "/health_generate" => match allowed(get, "GET") {
            Some(refused) => refused,
            None => health(engine).await,
        },
        "/ready" | "/ping" => allowed(get, "GET").unwrap_or_else(|| {
            empty(if engine.status() == Status::Up { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE })
        }),
        "/v1/models" => allowed(get, "GET").unwrap_or_else(|| ok(&json!({"object": "list", "data": [card(engine)]}))),
        "/model_info" | "/get_model_info" => allowed(get, "GET").unwrap_or_else(|| ok(&loads::model_info(engine))),
        "/server_info" | "/get_server_info" => {
            if let Some(refused) = allowed(get, "GET") {
                return refused;
            }
            // It asks the scheduler, and hangs with it.
            if engine.probe().await { ok(&loads::server_info(engine)) } else { std::future::pending().await }
        }
        "/v1/loads" => allowed(get, "GET").unwrap_or_else(|| ok(&loads::loads(engine))),
        "/metrics" if engine.args.on("enable-metrics") => allowed(get, "GET")
            .unwrap_or_else(|| text(StatusCode::OK, loads::metrics(engine), "text/plain; version=0.0.4")),
        "/v1/chat/completions" => match allowed(post, "POST") {
            Some(refused) => refused,
            None => generate(engine, request, Shape::Chat).await,
        },
        "/v1/messages" => match allowed(post, "POST") {
            Some(refused) => refused,
            None => generate(engine, request, Shape::Messages).await,
        },
        "/v1/messages/count_tokens" => match allowed(post, "POST") {
            Some(refused) => refused,
            None => count_tokens(request).await,
        },
        "/v1/completions" => match allowed(post, "POST") {
            Some(refused) => refused,
            None => generate(engine, request, Shape::Text).await,
        },
        "/generate" => match allowed(post || method == Method::PUT, "POST") {
            Some(refused) => refused,
            None => generate(engine, request, Shape::Native).await,
        },
        "/abort_request" => match allowed(post, "POST") {
            Some(refused) => refused,
            None => abort(engine, request).await,
        },
        "/flush_cache" => allowed(either, "GET, POST").unwrap_or_else(|| {
            if engine.remaining().is_empty() {
                text(StatusCode::OK, "Cache flushed.\n".into(), "text/plain; charset=utf-8")
            } else {
                text(
                    StatusCode::BAD_REQUEST,
                    "Cache not flushed: requests are running.\n".into(),
                    "text/plain; charset=utf-8",
                )
            }
        }),
        other => match other.strip_prefix("/v1/models/") {
            Some(name) if name == engine.args.served_name() => ok(&card(engine)),
            Some(name) => answer_json(
                StatusCode::NOT_FOUND,
                &json!({"error": {"message": format!("The model '{name}' does not exist"),
                    "type": "invalid_request_error", "param": "model", "code": "model_not_found"}}),
            ),
            None => answer_json(StatusCode::NOT_FOUND, &json!({"detail": "Not Found"})),
        },
    }
}

fn ok(value: &Value) -> Response<Answer> {
    answer_json(StatusCode::OK, value)
}

/// None, or the refusal of a wrong method.
fn allowed(right: bool, allow: &'static str) -> Option<Response<Answer>> {
    (!right).then(|| {
        let mut response = answer_json(StatusCode::METHOD_NOT_ALLOWED, &json!({"detail": "Method Not Allowed"}));
        response.headers_mut().insert(header::ALLOW, http::HeaderValue::from_static(allow));
        response
    })
}

fn card(engine: &Engine) -> Value {
    json!({"id": engine.args.served_name(), "object": "model", "created": crate::observe::clock::unix_seconds(),
        "owned_by": "sglang", "root": engine.args.served_name(), "parent": null, "max_model_len": super::generate::CONTEXT})
}

async fn health(engine: &Arc<Engine>) -> Response<Answer> {
    if engine.knobs.has(Fault::HealthLies) {
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        return empty(StatusCode::OK);
    }
    if matches!(engine.status(), Status::Starting | Status::Draining) {
        return empty(StatusCode::SERVICE_UNAVAILABLE);
    }
    if engine.probe().await {
        engine.set_status(Status::Up);
        return empty(StatusCode::OK);
    }
    let seconds = engine.knobs.health_timeout.as_secs();
    logline::say(
        None,
        format!("Health check failed. Server couldn't get a response from detokenizer for last {seconds} seconds."),
    );
    engine.set_status(Status::UnHealthy);
    empty(StatusCode::SERVICE_UNAVAILABLE)
}

async fn abort(engine: &Arc<Engine>, request: Request<Incoming>) -> Response<Answer> {
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Abort {
        rid: String,
        abort_all: bool,
    }
    let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let abort: Abort = serde_json::from_slice(&body).unwrap_or_default();
    if abort.abort_all {
        engine.abort(None);
    } else if !abort.rid.is_empty() {
        engine.abort(Some(&abort.rid));
    }
    empty(StatusCode::OK)
}
