//! The first part of each start: which flags the installed engine takes, and the weights on the disk.

use std::collections::BTreeMap;
use std::ffi::OsString;

use tokio::sync::mpsc;

use super::cause::Cause;
use super::fetcher::{self, Current};
use crate::config::folders::Folders;
use crate::config::{Config, Loaded};
use crate::engine::env::Env;
use crate::engine::flags::FlagTable;
use crate::engine::inspect;
use crate::engine::resolve::{Resolved, resolve};
use crate::exit::Exit;
use crate::launch::spawner::Spawner;
use crate::weights::{Progress, Proof, RepoRequest, Request, Snapshot, Wanted, request_from_config};

/// What the later steps of a start need from this one.
#[derive(Debug, Clone)]
pub struct Acquired {
    pub resolved: Resolved,
    pub snapshots: Vec<Snapshot>,
    /// Of the engine whose table the flags were checked against; none for the bundled table.
    pub engine_version: Option<String>,
}

/// What it is done with.
#[derive(Debug, Clone)]
pub struct Means {
    pub loaded: Loaded,
    pub folders: Folders,
    pub own_env: Env,
    /// The daemon's own arguments, as `sglangd plan --inspect` takes them.
    pub inspect_arguments: Vec<OsString>,
}

/// Checks the flags and fetches the weights.
pub async fn acquire(
    means: &Means,
    spawner: &Spawner,
    current: &Current,
    progress: &mpsc::Sender<Progress>,
    phase: &mpsc::Sender<String>,
) -> Result<Acquired, Cause> {
    let engine = &means.loaded.config.engine;
    let asks = matches!(inspect::interpreter(engine), Ok(Some(_)));
    let mut table = inspect::cached_table(engine, means.folders.inspect_cache());
    if asks && table.is_none() {
        let _ = phase.try_send("asking the installed engine for its flags".into());
        // The hub's token is for the fetcher alone.
        let without_token = means.own_env.iter().filter(|(name, _)| !crate::engine::env::is_hub_token(name));
        let env = without_token.map(|(name, value)| (name.clone(), value.clone())).collect();
        fetcher::inspect(spawner, current, means.inspect_arguments.clone(), env).await?;
        table = inspect::cached_table(engine, means.folders.inspect_cache());
    }
    let engine_version = table.as_ref().map(|table| table.version.clone());
    let table = table.unwrap_or_else(|| FlagTable::bundled().clone());
    let resolved = resolve(&means.loaded.config, &table).map_err(|errors| {
        let text = errors.explain(&means.loaded).render(crate::config::Color::Plain);
        Cause::never("bad_config", Exit::Config.code(), text, "Correct the configuration, then start again.")
    })?;
    let snapshots = match request(&means.loaded.config, &resolved) {
        None => Vec::new(),
        Some(request) => {
            let _ = phase.try_send("looking at what is there and what the hub has".into());
            let env = fetcher_env(&means.loaded.config, &means.own_env);
            fetcher::fetch(spawner, current, &request, env, progress).await?
        }
    };
    Ok(Acquired { resolved, snapshots, engine_version })
}

fn fetcher_env(config: &Config, own: &Env) -> BTreeMap<OsString, OsString> {
    crate::engine::env::fetcher(config, own)
}

/// Everything that has to be on the disk; none: nothing.
pub fn request(config: &Config, resolved: &Resolved) -> Option<Request> {
    let wanted = if resolved.load_format.as_deref() == Some("dummy") { Wanted::NoWeights } else { Wanted::All };
    let extra: Vec<RepoRequest> = resolved
        .extra_repos
        .iter()
        .map(|extra| RepoRequest {
            flag: Some(extra.flag.clone()),
            files: if extra.flag.contains("tokenizer") { Wanted::NoWeights } else { wanted },
            pickles: config.weights.pickles.into(),
            ..RepoRequest::model(&extra.repo, &extra.revision)
        })
        .collect();
    match request_from_config(config, wanted) {
        Some(mut request) => {
            request.repos.extend(extra);
            Some(request)
        }
        None if extra.is_empty() => None,
        None => Some(Request {
            repos: extra,
            cache: config.weights.cache.clone(),
            endpoint: config.weights.endpoint.clone(),
            download: config.weights.download,
            proof: Proof::Kept,
        }),
    }
}
