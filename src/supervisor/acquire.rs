//! The first part of each start: which flags the installed engine takes, and the weights on the disk.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::cause::Cause;
use super::fetcher::{self, Current};
use crate::config::folders::Folders;
use crate::config::{Config, Loaded, ModelSource, Prefetch};
use crate::engine::env::{self, Env};
use crate::engine::flags::FlagTable;
use crate::engine::inspect;
use crate::engine::resolve::{Resolved, resolve};
use crate::exit::Exit;
use crate::launch::beside::Beside;
use crate::launch::spawner::Spawner;
use crate::launch::warm;
use crate::weights::{Hold, Progress, Proof, RepoRequest, Request, Snapshot, Wanted, request_from_config};

/// What the later steps of a start need from this one.
#[derive(Debug, Clone)]
pub struct Acquired {
    pub resolved: Resolved,
    pub snapshots: Vec<Snapshot>,
    /// Of the engine whose table the flags were checked against; none for the bundled table.
    pub engine_version: Option<String>,
    /// Where weights lie, the model's first.
    pub folders: Vec<PathBuf>,
    /// The snapshots, kept from being tidied away.
    pub held: Vec<Arc<Hold>>,
}

/// A fetch that ends within this long needs no import beside it: the engine's own would only be slowed.
const WORTH_IT: Duration = Duration::from_secs(1);
/// Tidying takes moments.
const HOLD_LIMIT: Duration = Duration::from_secs(5);

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
    beside: &Beside,
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
            let begun = CancellationToken::new();
            let warm = tokio::spawn(warm_up(means.clone(), spawner.clone(), beside.clone(), begun.clone()));
            let fetched = fetcher::fetch(spawner, current, &request, env, progress).await;
            // Whether it began or not: nothing of it is left when this step ends, however it ends.
            begun.cancel();
            let _ = warm.await;
            beside.end().await;
            fetched?
        }
    };
    let folders = match &means.loaded.config.model.source {
        ModelSource::Folder(folder) => vec![folder.clone()],
        ModelSource::Repo { .. } => snapshots.iter().map(|snapshot| snapshot.path.clone()).collect(),
    };
    let held = hold(&folders).await;
    Ok(Acquired { resolved, snapshots, engine_version, folders, held })
}

/// Nobody tidies away what an engine was started on, nor what the next one will be.
async fn hold(folders: &[PathBuf]) -> Vec<Arc<Hold>> {
    let mut held = Vec::new();
    for folder in folders {
        match tokio::time::timeout(HOLD_LIMIT, Hold::wait(folder)).await {
            Ok(Ok(hold)) => held.push(Arc::new(hold)),
            // A folder that is not there is the engine's to complain about.
            Ok(Err(_)) => {}
            Err(_) => tracing::warn!("{} is just being tidied away", folder.display()),
        }
    }
    held
}

/// Imports the engine's Python for nobody, if the fetch takes longer than a moment.
async fn warm_up(means: Means, spawner: Spawner, beside: Beside, fetched: CancellationToken) {
    let config = &means.loaded.config;
    let Ok(Some(python)) = inspect::interpreter(&config.engine) else { return };
    if config.weights.prefetch == Prefetch::Never || tokio::time::timeout(WORTH_IT, fetched.cancelled()).await.is_ok() {
        return;
    }
    let folder = means.folders.runtime.join("warm");
    let cache_dir = means.folders.engine_cache();
    let start = env::Start { launch_id: "", tmpdir: &folder, cache_dir: &cache_dir };
    let env = env::engine(config, &means.own_env, start);
    match warm::start(&beside, &spawner, &python, &env, &folder).await {
        Ok(()) => tracing::info!("the engine's Python is imported once ahead, while the weights arrive"),
        Err(error) => tracing::debug!("the engine's Python is not imported ahead: {error}"),
    }
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
