//! `GET /status` and `GET /metrics`, for operators: on a loopback listener and on a Unix socket in the
//! runtime folder. Never on the data path.

use std::fmt::Write;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

use crate::health::client::{self, Target};
use crate::link::status::Status;
use crate::link::{EngineState, EngineView};
use crate::supervisor::half::Half;

/// The engine gathers its page from files of all ranks; a hung one does not answer at all.
const ENGINE_LIMIT: Duration = Duration::from_secs(3);
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the routes read.
#[derive(Debug, Clone)]
pub struct Sources {
    pub status: watch::Receiver<Status>,
    pub engine: watch::Receiver<EngineView>,
    pub half: Half,
}

pub fn routes(sources: Sources) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/metrics", get(metrics))
        .fallback(|| async {
            (StatusCode::NOT_FOUND, "sglangd's admin listener answers GET /status and GET /metrics\n")
        })
        .with_state(Arc::new(sources))
}

/// Serves until the process ends.
pub async fn serve_tcp(listener: TcpListener, routes: Router) -> io::Result<()> {
    axum::serve(listener, routes).await
}

/// The same on a socket that only this user may open.
pub async fn serve_unix(listener: UnixListener, routes: Router) -> io::Result<()> {
    axum::serve(listener, routes).await
}

/// Binds the socket, in place of one that a killed run left. The runtime folder's lock is held: no
/// living sglangd owns it.
pub fn bind_unix(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn status(State(sources): State<Arc<Sources>>) -> Json<Status> {
    Json(sources.status.borrow().clone())
}

/// Our own, the proxy's, and the engine's `sglang:*` as they are.
async fn metrics(State(sources): State<Arc<Sources>>) -> Response {
    let mut page = own(&sources.status.borrow());
    let engine = async {
        let upstream = sources.engine.borrow().upstream.clone()?;
        let answer = client::get(&Target::Tcp(upstream.addr), "/metrics", upstream.api_key.as_deref(), ENGINE_LIMIT)
            .await
            .ok()?;
        (answer.status == StatusCode::OK).then(|| String::from_utf8_lossy(&answer.body).into_owned())
    };
    let (proxy, engine) = tokio::join!(sources.half.scrape(), engine);
    for part in [proxy, engine].into_iter().flatten() {
        page.push_str(&part);
        if !page.ends_with('\n') {
            page.push('\n');
        }
    }
    ([(header::CONTENT_TYPE, PROMETHEUS)], page).into_response()
}

const STATES: [EngineState; 16] = [
    EngineState::Fetching,
    EngineState::Preparing,
    EngineState::Launching,
    EngineState::Loading,
    EngineState::Ready,
    EngineState::Busy,
    EngineState::Asleep,
    EngineState::Failing,
    EngineState::Draining,
    EngineState::Stopping,
    EngineState::Reaping,
    EngineState::Releasing,
    EngineState::Unkillable,
    EngineState::Backoff,
    EngineState::GaveUp,
    EngineState::Stopped,
];

fn own(status: &Status) -> String {
    let mut page = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, samples: &[(String, f64)]| {
        // Writing to a String does not fail.
        let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(page, "{name}{labels} {value}");
        }
    };
    let one = |value: f64| vec![(String::new(), value)];
    metric(
        "sglangd_info",
        "gauge",
        "Always 1; what runs.",
        &[(
            format!(
                "{{version=\"{}\",model=\"{}\",engine_version=\"{}\"}}",
                status.version,
                escaped(&status.model.name),
                escaped(status.engine.version.as_deref().unwrap_or(""))
            ),
            1.0,
        )],
    );
    let states: Vec<(String, f64)> = STATES
        .iter()
        .map(|state| (format!("{{state=\"{}\"}}", state.name()), f64::from(u8::from(*state == status.state))))
        .collect();
    metric("sglangd_engine_state", "gauge", "1 for the state the engine is in.", &states);
    metric(
        "sglangd_engine_restarts_total",
        "counter",
        "Engines started again since sglangd's start.",
        &one(f64::from(status.engine.restarts)),
    );
    metric(
        "sglangd_proxy_restarts_total",
        "counter",
        "Proxy processes started again since sglangd's start.",
        &one(status.proxy.restarts as f64),
    );
    metric("sglangd_uptime_seconds", "gauge", "Since sglangd's start.", &one(status.uptime_seconds as f64));
    metric(
        "sglangd_engine_hang_suspected",
        "gauge",
        "1 while a hang of the engine is suspected.",
        &one(f64::from(u8::from(status.engine.suspected_seconds.is_some()))),
    );
    if let Some(percent) = status.percent {
        metric("sglangd_start_percent", "gauge", "Progress of a start or a download, 0-100.", &one(f64::from(percent)));
    }
    if let Some(weights) = &status.weights {
        metric("sglangd_weights_bytes", "gauge", "Bytes of the weights that are there.", &one(weights.done as f64));
        metric("sglangd_weights_total_bytes", "gauge", "Bytes of the weights in all.", &one(weights.total as f64));
    }
    page
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
