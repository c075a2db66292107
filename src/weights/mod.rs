//! The model onto the disk: what a repository of the hub holds is planned, fetched and verified into
//! the standard Hugging Face cache.
//!
//! Three steps, each a file or two: the **plan** ([`plan`], pure: which files, what is there, how many
//! bytes), the **fetch** (`fetch`, `transfer`, `lane`, `write`: ranges into `.incomplete` blobs, resumed after any kill by their
//! `journal`, renamed when they are whole), the **verification** (`verify`: size and hash of every file against the
//! hub's). A marker in the cache makes the next start instant.
//!
//! Not done here: no signals, no terminal, no reading of environment variables ([`Settings::resolve`] is given a
//! function for it), no launching. The library never removes a snapshot.
//!
//! ```text
//!  Request ─► resolve revision ─► list ─► plan ─► preflight ─► fetch + verify ─► snapshot, ref, marker
//!     │            (1 request)   (paged)  (pure)   (space)      (file by file)        │
//!     └─ marker of that commit is there and every file still has its size and time ───┘
//! ```

pub mod ahead;
mod behind;
mod board;
mod cache;
mod content;
mod direct_io;
mod drivers;
mod error;
mod fetch;
mod hold;
mod hops;
mod hub;
pub mod inventory;
mod journal;
mod lane;
mod left;
mod local;
mod lock;
pub mod name;
mod near;
pub mod plan;
mod prepare;
pub mod progress;
pub mod prune;
mod ranges;
mod rate;
pub mod room;
mod settings;
mod sha256;
mod space;
mod transfer;
mod tree;
mod uses;
mod verify;
mod write;
mod writer;
mod xet;

use std::num::{NonZeroU16, NonZeroU64};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::{self, Config, Download, IoPriority, ModelSource};

pub use cache::Access;
use cache::RepoCache;
pub use drivers::how_many as drivers;
pub use error::{FetchError, Retry, bytes};
pub use fetch::fetch;
pub use hold::Hold;
pub use prepare::{PlannedRepo, prepare};
pub use progress::{Pace, Progress, Snapshot};
pub use settings::{CONNECTIONS, Network, Patience, Settings, Token};
pub use space::Space;
pub use uses::Uses;
pub use verify::Hasher;

/// What is to be on the disk before the engine starts. Crosses from the supervisor to `sglangd fetch`
/// as JSON, so it holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub repos: Vec<RepoRequest>,
    /// The cache folder; none: the standard variables decide.
    pub cache: Option<PathBuf>,
    /// The hub's address; none: `HF_ENDPOINT`, else the public hub.
    pub endpoint: Option<String>,
    #[serde(with = "DownloadAsWord")]
    pub download: Download,
    #[serde(default)]
    pub proof: Proof,
    #[serde(default)]
    pub tuning: Tuning,
}

/// How much of network, memory and CPU a fetch may take; what is not said is the default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tuning {
    pub connections: Option<NonZeroU16>,
    /// Bytes a second.
    pub max_rate: Option<NonZeroU64>,
    /// Bytes of xet's buffers.
    pub xet_memory: Option<u64>,
    pub page_cache: PageCache,
    /// The fetcher's nice value; none: its parent's.
    pub nice: Option<i32>,
    /// Its class of disk access; none: its parent's.
    pub ioprio: Option<IoPriority>,
}

/// Whether what is fetched stays in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PageCache {
    /// Not where the file system knows a way past it: nobody reads it next, and whoever serves keeps what they have there.
    #[default]
    Bypass,
    /// If all of it fits into free memory: an engine reads it next.
    WhatFits,
    Keep,
}

/// What is believed of files that are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proof {
    /// What an earlier run proved and the disk shows unchanged.
    #[default]
    Kept,
    /// Nothing: all is read again (`fetch --verify`).
    Anew,
}

/// One repository at one revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepoRequest {
    /// The engine flag that named it (`speculative-draft-model-path`); none: it is the model.
    pub flag: Option<String>,
    pub repo: String,
    pub revision: String,
    pub files: Wanted,
    /// Patterns: these files and no others; empty: what the engine needs.
    #[serde(default)]
    pub include: Vec<String>,
    /// Patterns: not these.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Pickles run code when they are loaded: refused unless asked for.
    #[serde(default)]
    pub pickles: Pickles,
}

/// Which files of a repository the engine needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    All,
    /// Everything but the weight files: `load-format: dummy`, or a tokenizer's repository.
    NoWeights,
}

/// Whether weights in pickle files (`*.bin`, `*.pt`) may be used where there are no safetensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pickles {
    #[default]
    Refused,
    Allowed,
}

impl From<config::Pickles> for Pickles {
    fn from(said: config::Pickles) -> Self {
        match said {
            config::Pickles::Refuse => Self::Refused,
            config::Pickles::Allow => Self::Allowed,
        }
    }
}

/// `config::Download` as one word on the wire.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Download", rename_all = "kebab-case")]
enum DownloadAsWord {
    Auto,
    Never,
}

impl RepoRequest {
    /// The model itself, all that the engine needs of it.
    pub fn model(repo: impl Into<String>, revision: impl Into<String>) -> Self {
        Self {
            flag: None,
            repo: repo.into(),
            revision: revision.into(),
            files: Wanted::All,
            include: Vec::new(),
            exclude: Vec::new(),
            pickles: Pickles::Refused,
        }
    }
}

/// What the configuration asks for, as far as the model itself goes. None: a local folder, nothing to fetch.
/// Flags of the engine that name other repositories are added by whoever knows the engine's flags.
pub fn request_from_config(config: &Config, files: Wanted) -> Option<Request> {
    let ModelSource::Repo { repo, revision } = &config.model.source else { return None };
    let weights = &config.weights;
    let model = RepoRequest {
        files,
        include: weights.include.clone(),
        exclude: weights.exclude.clone(),
        pickles: weights.pickles.into(),
        ..RepoRequest::model(repo, revision)
    };
    Some(Request {
        repos: vec![model],
        cache: weights.cache.clone(),
        endpoint: weights.endpoint.clone(),
        download: weights.download,
        proof: Proof::Kept,
        tuning: tuning_from_config(config),
    })
}

/// What the configuration says of the fetcher's share of the machine.
pub fn tuning_from_config(config: &Config) -> Tuning {
    let weights = &config.weights;
    Tuning {
        connections: Some(weights.connections),
        max_rate: weights.max_rate,
        xet_memory: weights.xet_memory,
        page_cache: match weights.page_cache {
            config::PageCache::Auto => PageCache::WhatFits,
            config::PageCache::Keep => PageCache::Keep,
            config::PageCache::Bypass => PageCache::Bypass,
        },
        nice: Some(weights.nice),
        ioprio: weights.ioprio,
    }
}
