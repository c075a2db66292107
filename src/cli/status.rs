//! `sglangd status`: what a running sglangd is doing, for people or as the JSON it answered.

use std::fmt::Write;
use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::FolderArgs;
use super::exit::Exit;
use crate::health::client::{self, Target};
use crate::link::status::{GpuStatus, Status, between};

/// A supervisor answers in milliseconds; one that does not within this is stuck.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    pub folders: FolderArgs,
    /// Print the answer of `GET /status` as it is.
    #[arg(long)]
    pub json: bool,
    /// The admin listener to ask, e.g. `http://127.0.0.1:8001`, in place of the runtime folder's socket.
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
}

pub fn run(args: StatusArgs) -> Exit {
    super::on_this_thread(look(args))
}

async fn look(args: StatusArgs) -> Exit {
    let target = match &args.url {
        Some(url) => match target_of(url) {
            Ok(target) => target,
            Err(what) => {
                eprintln!("sglangd: --url {url}: {what}");
                return Exit::Usage;
            }
        },
        None => Target::Unix(socket(&runtime_dir(&args.folders))),
    };
    let body = match ask(&target).await {
        Ok(body) => body,
        Err(what) => {
            eprintln!("sglangd: {what}");
            return Exit::Engine;
        }
    };
    if args.json {
        println!("{}", body.trim_end());
        return Exit::Ok;
    }
    match serde_json::from_str::<Status>(&body) {
        Ok(status) => {
            print!("{}", render(&status));
            Exit::Ok
        }
        Err(error) => {
            eprintln!("sglangd: {} answered something else than a status: {error}", shown(&target));
            Exit::Engine
        }
    }
}

/// The runtime folder of a daemon: said, systemd's, root's, or the user's own.
pub fn runtime_dir(folders: &FolderArgs) -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(dir) = folders.runtime_dir.clone().or_else(|| from("SGLANGD_RUNTIME_DIR")) {
        return dir;
    }
    if let Some(dirs) = std::env::var_os("RUNTIME_DIRECTORY").filter(|value| !value.is_empty()) {
        // systemd joins several with colons; the first is the unit's own.
        return std::env::split_paths(&dirs).next().unwrap_or_default();
    }
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return PathBuf::from("/run/sglangd");
    }
    from("XDG_RUNTIME_DIR")
        .map_or_else(|| std::env::temp_dir().join(format!("sglangd-{uid}")), |dir| dir.join("sglangd"))
}

/// The admin socket in a runtime folder.
pub fn socket(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join("admin.sock")
}

/// `GET /status`; an error is a sentence with the way out.
pub async fn ask(target: &Target) -> Result<String, String> {
    let answer = client::get(target, "/status", None, PATIENCE).await.map_err(|error| match error {
        client::ClientError::Connect(_) => format!(
            "no sglangd is running at {} ({error}); start one with `sglangd serve`, or say where it is with \
             --runtime-dir or --url",
            shown(target)
        ),
        error => format!("the sglangd at {} is there but does not answer: {error}", shown(target)),
    })?;
    if !answer.status.is_success() {
        return Err(format!("{} answered {} to GET /status: is it an sglangd?", shown(target), answer.status));
    }
    String::from_utf8(answer.body.to_vec()).map_err(|_| format!("{} answered no text", shown(target)))
}

fn shown(target: &Target) -> String {
    match target {
        Target::Tcp(addr) => addr.to_string(),
        Target::Unix(path) => path.display().to_string(),
    }
}

fn target_of(url: &str) -> Result<Target, String> {
    let rest = match url.split_once("://") {
        Some(("http", rest)) => rest,
        Some((scheme, _)) => return Err(format!("the admin listener speaks plain http, not {scheme}")),
        None => url,
    };
    let authority = rest.split('/').next().unwrap_or_default();
    authority
        .to_socket_addrs()
        .map_err(|error| format!("{error}; it should be like http://127.0.0.1:8001"))?
        .next()
        .map(Target::Tcp)
        .ok_or_else(|| "the name has no address".to_owned())
}

/// One line for each; those that the engine does not use are marked.
fn gpus(gpus: &[GpuStatus]) -> Vec<String> {
    let one = |gpu: &GpuStatus| {
        let whose = if gpu.engine == Some(false) { ", not the engine's" } else { "" };
        let (used, total) = (bytes(gpu.memory_used), bytes(gpu.memory_total));
        format!("{} {}, {used} of {total} used{whose}", gpu.index, gpu.name)
    };
    gpus.iter().map(one).collect()
}

/// The view for people.
fn render(status: &Status) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "sglangd {}  {}  up {}", status.version, headline(status), span(status.uptime_seconds));
    if let Some(percent) = status.percent {
        let filled = (percent.clamp(0.0, 100.0) / 100.0 * 30.0).round() as usize;
        let eta = match (status.eta_seconds, status.eta_range_seconds) {
            (Some(seconds), _) => format!("  ready in about {}", span(seconds)),
            (None, Some([least, most])) => format!("  ready in {}", between(least, most)),
            (None, None) => String::new(),
        };
        let _ = writeln!(out, "[{}{}] {percent:3.0} %{eta}", "#".repeat(filled), "-".repeat(30 - filled));
    }
    let mut row = |name: &str, text: &str| {
        if !text.is_empty() {
            let _ = writeln!(out, "{name:9} {text}");
        }
    };
    row("slow", &status.slow);
    row("reason", &status.reason);
    row("advice", &status.advice);
    row("model", &model(status));
    if let Some(weights) = &status.weights {
        let pace = if weights.stalled { "stalled".to_owned() } else { format!("{}/s", bytes(weights.rate)) };
        row("weights", &format!("{} of {}, {pace}", bytes(weights.done), bytes(weights.total)));
    }
    if let Some(ahead) = &status.read_ahead {
        row("memory", &format!("{} of {} of the weights read ahead", bytes(ahead.done), bytes(ahead.total)));
    }
    row("engine", &engine(status));
    let ranks: Vec<String> = status
        .engine
        .ranks
        .iter()
        .map(|rank| format!("{} {}", rank.name.strip_prefix("sglang::").unwrap_or(&rank.name), rank.pid))
        .collect();
    row("ranks", &ranks.join(", "));
    if let Some(seconds) = status.engine.suspected_seconds {
        let why = match status.engine.suspicion.as_str() {
            "" => format!("no sign of life for {}", span(seconds)),
            why => why.to_owned(),
        };
        row("hang?", &why);
    }
    row("last exit", status.engine.last_exit.as_deref().unwrap_or_default());
    row("found", &status.bundle.as_ref().map(|path| path.display().to_string()).unwrap_or_default());
    for line in gpus(&status.gpus) {
        row("gpu", &line);
    }
    let r = &status.requests;
    row(
        "requests",
        &format!(
            "{} in flight, {} queued (max {}, target {}), {} answered",
            r.in_flight, r.queued, r.max, r.target, r.served
        ),
    );
    if let Some(load) = &r.engine {
        let held = if r.room < r.max { format!("; no more than {} for now", r.room) } else { String::new() };
        let (running, waiting, kv) = (load.running, load.waiting, load.kv_percent);
        row("load", &format!("{running} computed, {waiting} in the engine's own queue, KV cache {kv} %{held}"));
    }
    if let Some(pid) = status.proxy.pid {
        row("proxy", &format!("pid {pid}, {}", times(status.proxy.restarts)));
    }
    let tls = if status.listen.tls { " with TLS" } else { "" };
    let unix = match &status.listen.unix {
        Some(path) if !status.listen.public.starts_with("unix:") => format!(", {}", path.display()),
        _ => String::new(),
    };
    row("listen", &format!("{}{tls}{unix} (admin {})", status.listen.public, status.listen.admin));
    for warning in &status.warnings {
        row("warning", warning);
    }
    out
}

fn headline(status: &Status) -> String {
    if status.phase.is_empty() {
        status.state.name().to_owned()
    } else {
        format!("{}: {}", status.state.name(), status.phase)
    }
}

fn model(status: &Status) -> String {
    let model = &status.model;
    let mut text = model.name.clone();
    if let Some(repo) = model.repo.as_ref().filter(|repo| **repo != model.name) {
        let _ = write!(text, " = {repo}");
    }
    if let Some(revision) = &model.revision {
        let _ = write!(text, " @ {revision}");
    }
    if let Some(commit) = &model.commit {
        let _ = write!(text, " ({})", commit.get(..12).unwrap_or(commit));
    }
    text
}

fn engine(status: &Status) -> String {
    let engine = &status.engine;
    let mut parts = Vec::new();
    parts.extend(engine.pid.map(|pid| format!("pid {pid}")));
    parts.extend(engine.version.as_ref().map(|version| format!("SGLang {version}")));
    parts.extend(engine.port.map(|port| format!("port {port}")));
    parts.extend(engine.started_at.as_ref().map(|at| format!("since {at}")));
    parts.push(times(engine.restarts.into()));
    parts.join(", ")
}

fn times(restarts: u64) -> String {
    match restarts {
        1 => "1 restart".into(),
        n => format!("{n} restarts"),
    }
}

fn span(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

fn bytes(count: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::EngineState;
    use crate::link::status::{EngineStatus, Listening, ModelStatus, ProxyStatus, RankStatus, Requests, WeightsStatus};

    #[test]
    fn the_view_of_a_start_fits_on_a_screen() {
        let gpu = |engine| GpuStatus {
            index: 3,
            uuid: "GPU-3".into(),
            name: "NVIDIA B200".into(),
            driver: "580.95.05".into(),
            memory_total: 180_000_000_000,
            memory_used: 150_000_000_000,
            engine,
        };
        let load = crate::link::EngineLoad { running: 16, waiting: 4, kv_percent: 93 };
        let status = Status {
            version: "0.1.0".into(),
            state: EngineState::Loading,
            phase: "loading weights 12/64".into(),
            percent: Some(15.5),
            eta_seconds: Some(240),
            eta_range_seconds: None,
            slow: "kernels are compiled".into(),
            reason: "The engine is starting.".into(),
            advice: String::new(),
            model: ModelStatus {
                name: "m".into(),
                repo: Some("org/m".into()),
                revision: Some("main".into()),
                commit: Some("0123456789abcdef".into()),
                path: None,
            },
            engine: EngineStatus {
                pid: Some(41),
                version: Some("0.5.23".into()),
                port: Some(20001),
                restarts: 1,
                last_exit: Some("A rank was killed.".into()),
                ranks: ["sglang::scheduler_TP0", "sglang::detokenizer"]
                    .map(|name| RankStatus { name: name.into(), pid: 42 })
                    .into(),
                ..EngineStatus::default()
            },
            requests: Requests {
                in_flight: 1,
                queued: 2,
                max: 32,
                target: 10,
                served: 7,
                websockets: 0,
                room: 20,
                engine: Some(load),
            },
            proxy: ProxyStatus { pid: Some(40), restarts: 0 },
            weights: Some(WeightsStatus { done: 1_500_000_000, total: 3_000_000_000, rate: 500, ..Default::default() }),
            read_ahead: None,
            listen: Listening { public: "0.0.0.0:8000".into(), admin: "127.0.0.1:8001".into(), ..Listening::default() },
            warnings: vec!["one".into(), "two".into()],
            gpus: [Some(true), Some(false)].map(gpu).into(),
            bundle: Some("/var/lib/sglangd/bundles/2026-11-23T141143Z-crash".into()),
            uptime_seconds: 8000,
            config_files: Vec::new(),
        };
        insta::assert_snapshot!(render(&status));
    }

    #[test]
    fn an_address_may_be_said_with_and_without_a_scheme() {
        let target = Ok(Target::Tcp(([127, 0, 0, 1], 8001).into()));
        assert_eq!(target_of("http://127.0.0.1:8001/"), target);
        assert_eq!(target_of("127.0.0.1:8001"), target);
        assert!(target_of("https://127.0.0.1:8001").is_err());
        assert!(target_of("127.0.0.1").is_err());
    }
}
