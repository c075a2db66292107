//! What was said: YAML files, environment and command line become one [`Config`].
//!
//! Parsing never acts: nothing here opens a socket, starts a process or writes a file (but the
//! shipped `config.yaml`, once, where there is none). Every value here is already checked: what is
//! impossible cannot be represented or is refused by `load`, with file, line, column and the way out.

mod build;
mod cross;
mod document;
mod error;
pub mod folders;
pub mod keys;
mod layers;
mod listen;
mod load;
pub mod redact;
mod routes;
mod source;
pub mod units;
mod values;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::{NonZeroU16, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

pub use crate::link::SizedBy;
pub use error::{Color, ConfigError, Mistake, nearest};
pub use layers::is_negative_number;
pub use load::{Loaded, Lost, Needs, Origin, SHIPPED, Sources, User, WhenMissing, flag_text, load};
pub use source::{MAX_FILE, Place};

use crate::link::routes::Rule;
use crate::link::{Http2, ListenSettings, ProxyProtocol, TlsFiles};

/// Everything sglangd was told, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub model: Model,
    pub weights: Weights,
    pub engine: Engine,
    pub listen: Listen,
    pub limits: Limits,
    pub auth: Auth,
    pub start: Start,
    pub health: Health,
    pub restart: Restart,
    pub shutdown: Shutdown,
    pub observe: Observe,
}

/// Which model is served.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    pub source: ModelSource,
    /// The name clients see (`--served-model-name`). Never contains `:` (SGLang asserts that).
    pub name: String,
}

#[derive(Debug, Clone, PartialEq)]
pub enum ModelSource {
    /// A repository of the hub (`model.repo`, `model.revision`).
    Repo { repo: String, revision: String },
    /// A local folder (`model.path`); nothing is fetched.
    Folder(PathBuf),
}

/// How the weights come onto the disk.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    pub download: Download,
    /// The Hugging Face cache folder; none: `HF_HUB_CACHE`, `HF_HOME/hub`, `~/.cache/huggingface/hub`.
    pub cache: Option<PathBuf>,
    /// The hub's address; none: `HF_ENDPOINT`, else the public hub.
    pub endpoint: Option<String>,
    /// Open at once, over all files.
    pub connections: NonZeroU16,
    /// Bytes a second, of all connections together.
    pub max_rate: Option<NonZeroU64>,
    /// Bytes of xet's buffers; none: a share of the machine's memory.
    pub xet_memory: Option<u64>,
    pub page_cache: PageCache,
    /// Of the fetcher alone.
    pub nice: i32,
    pub ioprio: Option<IoPriority>,
    /// Patterns of the model's files; empty: what the engine needs.
    pub include: Vec<String>,
    /// Patterns of files that are left out, whoever needs them.
    pub exclude: Vec<String>,
    pub pickles: Pickles,
    pub prefetch: Prefetch,
}

/// Whether fetched weights stay in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageCache {
    /// What `serve` fetches, if all of it fits; not what `fetch` brings.
    Auto,
    Keep,
    Bypass,
}

/// A process's class of disk access, as far as anybody may lower it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoPriority {
    /// The lowest of the usual class.
    BestEffort,
    /// Only when nobody else wants the disk.
    Idle,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Download {
    /// Fetch what is missing.
    Auto,
    /// Use only what is cached; missing files are an error.
    Never,
}

/// Whether weights in pickle files (`*.bin`, `*.pt`), which run code when they are loaded, may be used where
/// there are no safetensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pickles {
    Refuse,
    Allow,
}

/// Whether the disk's files are read into memory ahead of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefetch {
    /// Where it helps: not what lies in memory already, and no more than memory is free for.
    Auto,
    /// All of it, whatever memory is free.
    Always,
    Never,
}

/// What the engine is and what it is told.
#[derive(Debug, Clone, PartialEq)]
pub struct Engine {
    /// The command before the flags, never through a shell: `[python3, -m, sglang.launch_server]`.
    pub command: Vec<String>,
    /// Tensor parallelism: the number of GPUs.
    pub tp: u32,
    /// What becomes the engine's YAML, in the order it was said, before any check against the engine.
    pub flags: Flags,
    /// What becomes of flags that the engine's parser does not know.
    pub unknown_flags: UnknownFlags,
    /// Environment of the engine, on top of sglangd's own `SGL_*`, `SGLANG_*` and the usual ones.
    pub env: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownFlags {
    /// An error with "did you mean".
    Refuse,
    /// Handed to the engine as said, with a warning: for an engine newer than the table.
    Pass,
}

/// `engine.flags` (or the native YAML of `APP_LOCAL_CONFIG_PATH`, or what stood after `--`).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Flags(pub Vec<Flag>);

#[derive(Debug, Clone, PartialEq)]
pub struct Flag {
    /// With dashes, without the leading `--`.
    pub name: String,
    pub value: FlagValue,
    /// Where it was said, for messages: `config.yaml:31:5`, `command line`, `SGLANGD_…`.
    pub origin: String,
}

#[derive(Debug, Clone, PartialEq)]
pub enum FlagValue {
    /// A bare flag that is present (`true`).
    On,
    /// A bare flag that is absent (`false`).
    Off,
    /// One word, exactly as the engine is to see it.
    Word(String),
    /// Several words after one flag.
    Words(Vec<String>),
    /// A JSON object as one word.
    Json(serde_json::Value),
}

#[derive(Debug, Clone, PartialEq)]
pub struct Listen {
    /// Where clients connect; none: over the Unix socket alone.
    pub public: Option<SocketAddr>,
    /// A Unix socket, beside the address or in its place.
    pub unix: Option<PathBuf>,
    /// Who may connect to it: the file's mode.
    pub unix_mode: u32,
    /// What a connection to `public` begins with.
    pub proxy_protocol: ProxyProtocol,
    /// Status and metrics.
    pub admin: SocketAddr,
    pub http2: Http2,
    /// None: plain HTTP.
    pub tls: Option<TlsFiles>,
}

impl Listen {
    /// What clients may speak on the public port, in words.
    pub fn spoken(&self) -> &'static str {
        match self.http2 {
            Http2::On => "HTTP/1.1 and HTTP/2",
            Http2::Off => "HTTP/1.1",
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Requests open towards the engine at once.
    pub max: usize,
    /// Requests in flight the node should carry; the scaling signal.
    pub target: usize,
    /// Requests that may wait for a place.
    pub queue: usize,
    /// What bounds the open requests beside `max`.
    pub sizing: SizedBy,
    pub queue_timeout: Duration,
    /// How long a request is held while the engine starts; zero: answered 503 at once.
    pub hold: Duration,
    /// Largest request body, bytes.
    pub max_body: u64,
    /// Worker threads of the proxy; none: one a core.
    pub workers: Option<usize>,
    /// Clients' connections; none: as many as descriptors allow.
    pub connections: Option<usize>,
    /// Of one client's address; none: any number.
    pub connections_per_peer: Option<usize>,
    /// Routes that clients may ask for beside the usual ones, and those that they may not.
    pub routes: Vec<Rule>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Auth {
    /// File of API keys, one a line: `NAME sha256:HEX`, `#` begins a comment. None: no key asked.
    pub keys_file: Option<PathBuf>,
    /// Routes that ask for a key beside the usual ones, and those that do not.
    pub routes: Vec<Rule>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Start {
    /// A start without any progress for this long is a hang.
    pub stall: Duration,
    /// A start that takes longer than this is given up, progress or not.
    pub limit: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Health {
    /// Between two liveness probes, at least 30 s: a probe is a request to the scheduler.
    pub probe_interval: Duration,
    /// `/health` always takes 1 s and answers 503 after 20 s itself.
    pub probe_timeout: Duration,
    /// No sign of life for this long while requests wait: hung.
    pub hang_after: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Restart {
    /// Failures in `window` after which sglangd gives up.
    pub max: u32,
    pub window: Duration,
    /// First wait before a restart; doubles each time.
    pub backoff: Duration,
    pub backoff_max: Duration,
    pub on_give_up: OnGiveUp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnGiveUp {
    /// Go on answering 503 with the reason.
    Serve,
    /// Exit with the class's code.
    Exit,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Shutdown {
    /// From SIGTERM to the end of everything.
    pub grace: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Observe {
    pub format: LogFormat,
    /// A `tracing` filter: `info`, `sglangd=debug,warn`.
    pub level: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text for people (coloured on a terminal).
    Text,
    /// One JSON object a line.
    Json,
    /// Entries of systemd's journal.
    Journald,
}

impl Config {
    /// That strangers may use the engine, where they may.
    pub fn exposure(&self) -> Option<String> {
        let public = self.listen.public.filter(|public| !public.ip().is_loopback())?;
        self.auth.keys_file.is_none().then(|| {
            format!(
                "everybody who reaches {public} may use the engine: no API key is asked for. Make one with `sglangd \
                 keys add NAME --file FILE` and set auth.keys_file, or listen on 127.0.0.1"
            )
        })
    }
}

/// Which keys differ: what a reload cannot make live. `running` is what is lived by, and where it was said.
pub fn needs_restart(running: &Loaded, said: &Loaded) -> Vec<String> {
    let mut keys = Vec::new();
    let mut differs = |section: &str, differs: bool| {
        if differs {
            let before = keys.len();
            keys.extend(load::changed(&running.origins, &said.origins, section));
            if keys.len() == before {
                // A secret: its value is not kept where origins are.
                keys.push(section.to_owned());
            }
        }
    };
    let (running, said) = (&running.config, &said.config);
    differs("model", running.model != said.model);
    differs("weights", running.weights != said.weights);
    differs("engine", running.engine != said.engine);
    differs("listen", running.listen != said.listen);
    differs("limits", running.limits != said.limits);
    differs("auth", running.auth != said.auth);
    differs("start", running.start != said.start);
    differs("health", running.health != said.health);
    differs("restart", running.restart != said.restart);
    differs("shutdown", running.shutdown != said.shutdown);
    differs("observe", running.observe != said.observe);
    keys
}

impl From<&Config> for crate::link::ProxySettings {
    /// What of the configuration the proxy lives by.
    fn from(config: &Config) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            max: config.limits.max,
            target: config.limits.target,
            queue: config.limits.queue,
            sizing: config.limits.sizing,
            queue_timeout_ms: config.limits.queue_timeout.as_millis() as u64,
            max_body: config.limits.max_body,
            keys_file: config.auth.keys_file.clone(),
            workers: config.limits.workers.unwrap_or(cores),
            connections: config.limits.connections,
            connections_per_peer: config.limits.connections_per_peer,
            routes: config.limits.routes.clone(),
            auth_routes: config.auth.routes.clone(),
            listen: ListenSettings {
                tls: config.listen.tls.clone(),
                proxy_protocol: config.listen.proxy_protocol,
                http2: config.listen.http2,
            },
        }
    }
}
