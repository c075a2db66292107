//! `GET /status` and `GET /metrics`, for operators: on a loopback listener and on a Unix socket in the
//! runtime folder. Never on the data path. What changes the engine is [`super::operator`]'s.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use prometheus::{Gauge, IntCounter, Opts, Registry, TextEncoder};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

use super::{logging, operator};
use crate::health::client::{self, Target};
use crate::link::status::Status;
use crate::link::{EngineState, EngineView, ProxySettings};
use crate::supervisor::driver::Orderly;
use crate::supervisor::half::Half;

/// The engine gathers its page from files of all ranks; a hung one does not answer at all.
const ENGINE_LIMIT: Duration = Duration::from_secs(3);
const RESTART: &str = "/restart-engine";
const BUNDLE: &str = "/bundle";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the routes read.
#[derive(Debug, Clone)]
pub struct Sources {
    pub status: watch::Receiver<Status>,
    pub engine: watch::Receiver<EngineView>,
    pub settings: watch::Receiver<ProxySettings>,
    pub half: Half,
}

pub fn routes(sources: Sources) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/metrics", get(metrics))
        .fallback(operator::pass)
        .with_state(Arc::new(sources))
}

/// The same and what acts on the engine, for a socket that only this user may open.
pub fn with_orders(routes: Router, orders: Orderly) -> Router {
    let restart = |State(orders): State<Orderly>| async move {
        match orders.restart().await {
            Some(answer) => (StatusCode::ACCEPTED, format!("{answer}\n")),
            None => (StatusCode::SERVICE_UNAVAILABLE, "sglangd is at its end\n".into()),
        }
    };
    let bundle = |State(orders): State<Orderly>| async move {
        match orders.bundle().await {
            Some(Ok(path)) => (StatusCode::OK, format!("{}\n", path.display())),
            Some(Err(what)) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{what}\n")),
            None => (StatusCode::SERVICE_UNAVAILABLE, "sglangd is at its end\n".into()),
        }
    };
    let acting = Router::new().route(RESTART, post(restart)).route(BUNDLE, post(bundle));
    routes.merge(acting.with_state(orders))
}

/// The same, for an address that others may reach.
pub fn without_orders(routes: Router) -> Router {
    let refused = || async {
        (
            StatusCode::FORBIDDEN,
            "only on the Unix socket in the runtime folder: sglangd restart-engine, sglangd bundle\n",
        )
    };
    routes.merge(Router::new().route(RESTART, post(refused)).route(BUNDLE, post(refused)))
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

const STATES: [EngineState; 17] = [
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
    EngineState::Occupied,
    EngineState::Backoff,
    EngineState::GaveUp,
    EngineState::Stopped,
];

/// The supervisor's own page, made for each scrape: a dozen values, so nothing is worth keeping.
fn own(status: &Status) -> String {
    let registry = Registry::new();
    let gauge = |name: &str, help: &str, labels: &[(&str, &str)], value: f64| {
        let options = labels.iter().fold(Opts::new(name, help), |o, (key, value)| o.const_label(*key, *value));
        let gauge = Gauge::with_opts(options).expect("names and labels below are valid");
        gauge.set(value);
        // The same name with other labels is a second sample of one family; prometheus allows that.
        registry.register(Box::new(gauge)).expect("no name and labels appear twice below");
    };
    let engine_version = status.engine.version.as_deref().unwrap_or_default();
    let what =
        [("version", status.version.as_str()), ("model", &status.model.name), ("engine_version", engine_version)];
    gauge("sglangd_info", "Always 1; what runs.", &what, 1.0);
    for state in STATES {
        let is = f64::from(u8::from(state == status.state));
        gauge("sglangd_engine_state", "1 for the state the engine is in.", &[("state", state.name())], is);
    }
    gauge("sglangd_uptime_seconds", "Since sglangd's start.", &[], status.uptime_seconds as f64);
    let suspected = f64::from(u8::from(status.engine.suspected_seconds.is_some()));
    gauge("sglangd_engine_hang_suspected", "1 while a hang of the engine is suspected.", &[], suspected);
    for remark in &status.engine.remarks {
        let help = "1 for each thing that the engine's figures say and nobody meant.";
        gauge("sglangd_engine_remark", help, &[("kind", &remark.kind)], 1.0);
    }
    gauge(
        "sglangd_warnings",
        "Things that are not as they should be, though it works; see status.",
        &[],
        status.warnings.len() as f64,
    );
    if let Some(percent) = status.percent {
        gauge("sglangd_start_percent", "Progress of a start or a download, 0-100.", &[], f64::from(percent));
    }
    if let Some(eta) = status.eta_seconds {
        gauge("sglangd_start_eta_seconds", "Seconds until ready, where an earlier start tells.", &[], eta as f64);
    }
    if let Some(weights) = &status.weights {
        gauge("sglangd_weights_bytes", "Bytes of the weights that are there.", &[], weights.done as f64);
        gauge("sglangd_weights_total_bytes", "Bytes of the weights in all.", &[], weights.total as f64);
        gauge("sglangd_weights_files", "Files of the weights.", &[], weights.files as f64);
        gauge("sglangd_weights_bytes_per_second", "At which the weights arrive.", &[], weights.rate as f64);
        let stalled = f64::from(u8::from(weights.stalled));
        gauge("sglangd_weights_stalled", "1 while no byte of the weights arrives.", &[], stalled);
    }
    if let Some(ahead) = &status.read_ahead {
        let help = "Bytes of the weights read into memory ahead of the engine.";
        gauge("sglangd_weights_read_ahead_bytes", help, &[], ahead.done as f64);
        let help = "Bytes of the weights that are being read into memory ahead of the engine.";
        gauge("sglangd_weights_read_ahead_total_bytes", help, &[], ahead.total as f64);
    }
    for gpu in &status.gpus {
        let (index, uuid) = (gpu.index.to_string(), gpu.uuid.as_str());
        let labels = [("gpu", index.as_str()), ("uuid", uuid)];
        gauge(
            "sglangd_gpu_memory_used_bytes",
            "Memory in use on a GPU, whoever holds it.",
            &labels,
            gpu.memory_used as f64,
        );
        gauge("sglangd_gpu_memory_total_bytes", "Memory of a GPU.", &labels, gpu.memory_total as f64);
    }
    let counter = |name: &str, help: &str, value: u64| {
        let counter = IntCounter::new(name, help).expect("names below are valid");
        counter.inc_by(value);
        registry.register(Box::new(counter)).expect("no name appears twice below");
    };
    counter(
        "sglangd_engine_restarts_total",
        "Engines started again since sglangd's start.",
        u64::from(status.engine.restarts),
    );
    counter(
        "sglangd_log_lines_dropped_total",
        "Lines of the log that nobody took in time.",
        logging::dropped_lines() as u64,
    );
    counter(
        "sglangd_engine_hangs_suspected_total",
        "How often a hang of the engine was suspected.",
        status.engine.suspected_total,
    );
    counter(
        "sglangd_proxy_restarts_total",
        "Proxy processes started again since sglangd's start.",
        status.proxy.restarts,
    );
    // Encoding plain numbers does not fail; an empty page would be the honest answer if it did.
    TextEncoder::new().encode_to_string(&registry.gather()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_one_state_and_escapes_what_people_choose() {
        let json = serde_json::json!({
            "version": "0.1.0", "state": "loading", "phase": "", "percent": 12.5, "eta_seconds": null, "reason": "",
            "advice": "", "model": {"name": "a \"b\"", "repo": null, "revision": null, "commit": null, "path": null},
            "engine": {"pid": null, "version": null, "started_at": null, "restarts": 2, "last_exit": null,
                       "command": [], "port": null, "ranks": [], "suspected_seconds": null},
            "requests": {"in_flight": 0, "queued": 0, "max": 32, "target": 10, "served": 0, "websockets": 0},
            "proxy": {"pid": 7, "restarts": 0}, "weights": null,
            "listen": {"public": "", "admin": "", "admin_socket": null}, "warnings": [], "uptime_seconds": 3,
            "config_files": []
        });
        let page = own(&serde_json::from_value(json).expect("the shape of status"));
        assert_eq!(page.matches("} 1\n").count(), 2, "info and one state: {page}");
        assert!(page.contains("sglangd_engine_state{state=\"loading\"} 1"), "{page}");
        assert!(page.contains(r#"model="a \"b\"""#), "{page}");
        assert!(page.contains("sglangd_engine_restarts_total 2"), "{page}");
        assert!(page.contains("sglangd_start_percent 12.5"), "{page}");
    }
}
