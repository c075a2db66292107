//! The shape of `GET /status`: what sglangd says it is doing, for people and programs.
//!
//! Names and meanings are an interface: changing one is a breaking change.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{EngineLoad, EngineState};

/// `GET /status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// sglangd's own version.
    pub version: String,
    pub state: EngineState,
    /// What happens within the state, in words ("loading weights 12/64"); empty when nothing does.
    pub phase: String,
    /// Progress of a start or a download, 0–100.
    pub percent: Option<f32>,
    /// Seconds until ready, as far as anybody can say.
    pub eta_seconds: Option<u64>,
    /// The least and the most seconds until ready, where nothing tells more (a first start).
    #[serde(default)]
    pub eta_range_seconds: Option<[u64; 2]>,
    /// Why a start takes long at present, where that is known; empty where it is not.
    #[serde(default)]
    pub slow: String,
    /// Why it does not serve, in one sentence; empty when it does.
    pub reason: String,
    /// What to do about it; empty when nothing is to be done.
    pub advice: String,
    pub model: ModelStatus,
    pub engine: EngineStatus,
    pub requests: Requests,
    pub proxy: ProxyStatus,
    /// Progress of the weights, while they are fetched.
    pub weights: Option<WeightsStatus>,
    /// The machine's GPUs; empty where nothing tells of them.
    #[serde(default)]
    pub gpus: Vec<GpuStatus>,
    /// What was found at the last death or hang, as a folder; see `sglangd bundle`.
    #[serde(default)]
    pub bundle: Option<PathBuf>,
    /// How much of the weights was read into memory ahead of the engine, while that is done.
    #[serde(default)]
    pub read_ahead: Option<ReadAhead>,
    pub listen: Listening,
    /// What is not as it should be, though it works.
    pub warnings: Vec<String>,
    /// Since sglangd's start.
    pub uptime_seconds: u64,
    /// The files the configuration came from; empty: the built-in one.
    pub config_files: Vec<PathBuf>,
}

/// A range of seconds in words; nobody needs the seconds of minutes.
pub fn between(least: u64, most: u64) -> String {
    match (least, most) {
        (_, 0..=120) => format!("{least} to {most} s"),
        (0..=59, _) => format!("{least} s to {} min", most.div_ceil(60)),
        _ => format!("{} to {} min", least / 60, most.div_ceil(60)),
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// The name clients use.
    pub name: String,
    pub repo: Option<String>,
    pub revision: Option<String>,
    /// The commit that `revision` stood for.
    pub commit: Option<String>,
    /// The snapshot's folder.
    pub path: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineStatus {
    pub pid: Option<i32>,
    /// The engine's version, once it is known.
    pub version: Option<String>,
    /// RFC 3339.
    pub started_at: Option<String>,
    /// Engines started again since sglangd's start.
    pub restarts: u32,
    /// How the last one ended ("exit status 1", "killed by SIGKILL") and why.
    pub last_exit: Option<String>,
    pub command: Vec<String>,
    /// The private port.
    pub port: Option<u16>,
    /// Its processes by title, as far as they can be seen (`sglang::scheduler_TP3`).
    pub ranks: Vec<RankStatus>,
    /// A hang is suspected since this many seconds.
    pub suspected_seconds: Option<u64>,
    /// The engine's own cgroup, where it has one.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// Why; empty when none is suspected.
    #[serde(default)]
    pub suspicion: String,
    /// How often a hang was suspected since sglangd's start.
    #[serde(default)]
    pub suspected_total: u64,
    /// What its own figures say that nobody meant; in `warnings` too.
    #[serde(default)]
    pub remarks: Vec<RemarkStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemarkStatus {
    /// `speculation_idle`, `kv_cache_small`, `prefix_cache_idle` or `kernels_cold`.
    pub kind: String,
    pub text: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuStatus {
    /// As `nvidia-smi` counts.
    pub index: u32,
    pub uuid: String,
    pub name: String,
    /// The driver's version.
    pub driver: String,
    /// Bytes.
    pub memory_total: u64,
    pub memory_used: u64,
    /// Whether the engine uses it (`CUDA_VISIBLE_DEVICES`, `tp`); none: not known before its flags are.
    pub engine: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankStatus {
    pub name: String,
    pub pid: i32,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requests {
    /// Open towards the engine.
    pub in_flight: usize,
    /// Waiting for a place or for the engine.
    pub queued: usize,
    pub max: usize,
    /// The scaling signal: requests this node should carry.
    pub target: usize,
    /// Answered by the engine since the proxy's start.
    pub served: u64,
    /// Of those in flight: open WebSockets.
    #[serde(default)]
    pub websockets: usize,
    /// That may be open at present: `max`, or less while the engine can take no more.
    #[serde(default)]
    pub room: usize,
    /// What the engine says of itself, while requests are open; none: it was not asked yet, or does not
    /// tell.
    #[serde(default)]
    pub engine: Option<EngineLoad>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyStatus {
    pub pid: Option<u32>,
    pub restarts: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct WeightsStatus {
    pub files: u64,
    /// Bytes there.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes a second.
    pub rate: u64,
    /// Nothing has come for a while.
    pub stalled: bool,
}

/// Bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadAhead {
    pub done: u64,
    pub total: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listening {
    /// Where clients connect: an address, or `unix:PATH` where there is none.
    pub public: String,
    /// The Unix socket where they connect too, or alone.
    #[serde(default)]
    pub unix: Option<PathBuf>,
    /// Whether they speak TLS there.
    #[serde(default)]
    pub tls: bool,
    /// Status and metrics.
    pub admin: String,
    /// The same on a Unix socket.
    pub admin_socket: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::between;

    #[test]
    fn a_range_is_told_in_the_unit_of_its_end() {
        let told = [(1, 120), (12, 121), (59, 900), (60, 901), (600, 3_600)].map(|(a, b)| between(a, b));
        assert_eq!(told, ["1 to 120 s", "12 s to 3 min", "59 s to 15 min", "1 to 16 min", "10 to 60 min"]);
    }
}
