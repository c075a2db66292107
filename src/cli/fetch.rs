//! `sglangd fetch`: the model onto the disk. A person's command and the child process of `serve` alike: the only
//! process that holds the hub's token.

mod care;
mod show;

use std::num::{NonZeroU16, NonZeroU64};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use super::exit::Exit;
use crate::config::folders::Folders;
use crate::config::{Color, Download, IoPriority, LogFormat, WhenMissing, load, units};
use crate::engine::flags::FlagTable;
use crate::engine::inspect;
use crate::engine::resolve::resolve;
use crate::observe::logging;
use crate::supervisor::acquire;
use crate::sys::priority::{self, DiskClass};
use crate::weights::{
    self, FetchError, PageCache, Pickles, Progress, Proof, RepoRequest, Request, Retry, Settings, Snapshot, Space,
    Tuning, Wanted, name,
};

use care::Deed;
use show::Show;

/// Workers of the runtime beside one for each task that drives connections: those hash where they stand, and write into the page
/// cache, while others must go on. More than these wait in turn.
const SPARE_WORKERS: usize = 2;
const MOST_WORKERS: usize = 16;

#[allow(clippy::struct_excessive_bools)] // each is a flag of the command line
#[derive(Debug, Args)]
pub struct FetchArgs {
    /// The repository, e.g. deepseek-ai/DeepSeek-V4-Pro [default: the configuration's].
    pub repo: Option<String>,
    /// A branch, a tag or a commit [default: main].
    #[arg(long, value_name = "R", requires = "repo")]
    pub revision: Option<String>,
    /// The Hugging Face cache folder [default: HF_HUB_CACHE, HF_HOME/hub, ~/.cache/huggingface/hub].
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// The hub's address [default: HF_ENDPOINT, else the public hub].
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Connections at once [default: 8].
    #[arg(long, value_name = "N")]
    pub connections: Option<NonZeroU16>,
    /// Most bytes a second of all connections together, like 500MB.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub max_rate: Option<NonZeroU64>,
    /// Whether fetched bytes stay in memory [default: bypass, unless the configuration says keep].
    #[arg(long, value_name = "WORD")]
    pub page_cache: Option<PageCacheWord>,
    /// Files to fetch, as a pattern; may be repeated [default: what the engine needs].
    #[arg(long, value_name = "PATTERN", requires = "repo")]
    pub include: Vec<String>,
    /// Files not to fetch, as a pattern; may be repeated.
    #[arg(long, value_name = "PATTERN", requires = "repo")]
    pub exclude: Vec<String>,
    /// Whether weights in pickle files, which run code when they are loaded, may be fetched [default: refuse].
    #[arg(long, value_name = "WORD", requires = "repo")]
    pub pickles: Option<PicklesWord>,
    /// Only say what would be fetched, and whether there is room for it.
    #[arg(long, group = "mode")]
    pub plan: bool,
    /// Read everything again, whatever was proved before, and mend what is wrong.
    #[arg(long, group = "mode")]
    pub verify: bool,
    /// Show what the cache holds: snapshots, sizes, last use.
    #[arg(long, group = "mode")]
    pub list: bool,
    /// Show what of the cache nobody needs: old snapshots, orphaned blobs, leftovers.
    #[arg(long, group = "mode")]
    pub prune: bool,
    /// With --prune: remove it.
    #[arg(long, requires = "prune")]
    pub yes: bool,
    /// Answer in JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub config: super::ConfigArgs,
    /// A whole request, as `serve` makes it.
    #[arg(long, value_name = "JSON", hide = true, conflicts_with_all = ["repo", "cache", "endpoint"])]
    pub request: Option<String>,
    /// Report progress as JSON lines on this inherited descriptor, a pipe.
    #[arg(long, value_name = "N", hide = true)]
    pub progress_fd: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PicklesWord {
    Refuse,
    Allow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PageCacheWord {
    Keep,
    Bypass,
}

/// How a fetch ended.
enum Ended {
    Fetched(Vec<Snapshot>),
    Planned(Vec<weights::PlannedRepo>, Space),
    Failed(FetchError),
    Signal(i32),
}

#[allow(clippy::needless_pass_by_value)] // every subcommand is given its arguments whole
pub fn run(args: FetchArgs) -> Exit {
    if args.list || args.prune {
        return care(&args);
    }
    let mut show = match Show::new(args.progress_fd) {
        Ok(show) => show,
        Err(error) => {
            eprintln!("sglangd fetch: --progress-fd: {error}");
            return Exit::Usage;
        }
    };
    let request = match request(&args) {
        Ok(request) => request,
        Err((message, exit)) => {
            eprintln!("sglangd fetch: {message}");
            return exit;
        }
    };
    crate::sys::memory::share_heap();
    let stepped_back = step_back(&request.tuning);
    let _log = logging::init(LogFormat::Text, show.log_level(), logging::RING);
    if let Err(error) = stepped_back {
        // Fetching matters more than how politely.
        tracing::warn!(%error, "weights.nice or weights.ioprio could not be set");
    }
    let connections = request.tuning.connections.map_or(weights::CONNECTIONS, |n| n.get().into());
    let workers = (weights::drivers(connections) + SPARE_WORKERS).min(MOST_WORKERS);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("sglangd fetch: no threads: {error}");
            return Exit::Bug;
        }
    };
    let only_plan = args.plan;
    let ended = runtime.block_on(async {
        let settings = match Settings::resolve(&request, |name| std::env::var(name).ok()) {
            Ok(settings) => settings,
            Err(error) => return Ended::Failed(error),
        };
        let work = async {
            if only_plan {
                let planned = weights::prepare(&request, &settings).await?;
                let space = Space::look(&planned, &settings)?;
                return Ok(Ended::Planned(planned, space));
            }
            let mut report = |progress: Progress| {
                // Gigabytes are to come: what planning them needed is let go of.
                if matches!(progress, Progress::Plan { bytes_total, bytes_present, .. } if bytes_present < bytes_total)
                {
                    crate::sys::memory::let_go_of_start();
                }
                show.progress(progress);
            };
            weights::fetch(&request, &settings, &mut report).await.map(Ended::Fetched)
        };
        tokio::select! {
            ended = work => ended.unwrap_or_else(Ended::Failed),
            number = stopped() => Ended::Signal(number),
        }
    });
    // A thread that hashes or waits for the disk is not waited for: what it writes is a resumable beginning.
    runtime.shutdown_background();
    show.clear();
    conclude(ended, &mut show, args.json)
}

/// Behind an engine that serves on the same node. Before there are threads: each has a priority of its own.
fn step_back(tuning: &Tuning) -> std::io::Result<()> {
    let nice = tuning.nice.map_or(Ok(()), priority::set_nice);
    let disk = tuning.ioprio.map_or(Ok(()), |class| {
        priority::set_disk_class(match class {
            IoPriority::BestEffort => DiskClass::LastOfBestEffort,
            IoPriority::Idle => DiskClass::Idle,
        })
    });
    nice.and(disk)
}

fn rate(text: &str) -> Result<NonZeroU64, String> {
    NonZeroU64::new(units::size(text)?).ok_or_else(|| "at least 1 byte a second".to_owned())
}

fn conclude(ended: Ended, show: &mut Show, json: bool) -> Exit {
    match ended {
        Ended::Fetched(snapshots) => {
            if json {
                println!("{}", serde_json::json!(snapshots));
            } else {
                for snapshot in &snapshots {
                    println!("{}", snapshot.path.display());
                }
            }
            Exit::Ok
        }
        Ended::Planned(planned, space) => {
            show::plan(&planned, &space, json);
            match space.enough() {
                Ok(()) => Exit::Ok,
                Err(error) => {
                    eprintln!("sglangd fetch: {error}");
                    Exit::Weights
                }
            }
        }
        Ended::Failed(error) => {
            let retry_after_seconds = match error.class() {
                Retry::Yes { after } => Some(after.as_secs()),
                Retry::No => None,
            };
            show.progress(Progress::Failed {
                class: error.name().to_owned(),
                retry_after_seconds,
                message: error.to_string(),
            });
            if !show.tells_a_supervisor() {
                eprintln!("sglangd fetch: {error}");
            }
            Exit::Weights
        }
        Ended::Signal(number) => {
            if !show.tells_a_supervisor() {
                eprintln!("sglangd fetch: stopped by a signal; what was fetched is kept, the next fetch goes on there");
            }
            Exit::Signal(number)
        }
    }
}

/// The number of the signal that asks to stop; never, where signals cannot be had.
async fn stopped() -> i32 {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => libc::SIGTERM,
        _ = int.recv() => libc::SIGINT,
    }
}

/// What is asked for: `--request`, the repository named, else the configuration's model.
fn request(args: &FetchArgs) -> Result<Request, (String, Exit)> {
    if let Some(json) = &args.request {
        return serde_json::from_str(json).map_err(|error| (format!("--request is no request: {error}"), Exit::Usage));
    }
    let proof = if args.verify { Proof::Anew } else { Proof::Kept };
    let Some(repo) = &args.repo else { return configured(args).map(|request| Request { proof, ..request }) };
    let model = RepoRequest {
        include: args.include.clone(),
        exclude: args.exclude.clone(),
        pickles: match args.pickles {
            Some(PicklesWord::Allow) => Pickles::Allowed,
            Some(PicklesWord::Refuse) | None => Pickles::Refused,
        },
        ..RepoRequest::model(repo, args.revision.as_deref().unwrap_or("main"))
    };
    Ok(Request {
        repos: vec![model],
        cache: args.cache.clone(),
        endpoint: args.endpoint.clone(),
        download: Download::Auto,
        tuning: Tuning {
            connections: args.connections,
            max_rate: args.max_rate,
            page_cache: page_cache(args, PageCache::Bypass),
            ..Tuning::default()
        },
        proof,
    })
}

/// `--list` and `--prune`: of the cache alone, the hub is not asked.
fn care(args: &FetchArgs) -> Exit {
    let loaded = load(&args.config.sources(WhenMissing::BuiltIn));
    let configured = loaded.as_ref().ok().map(|loaded| &loaded.config);
    let mut request =
        configured.and_then(|config| weights::request_from_config(config, Wanted::All)).unwrap_or_else(|| Request {
            repos: vec![],
            cache: None,
            endpoint: None,
            download: Download::Never,
            proof: Proof::Kept,
            tuning: Tuning::default(),
        });
    // A commit that the configuration names stays, though nothing in the cache points to it.
    let wanted: Vec<String> =
        request.repos.iter().map(|repo| repo.revision.clone()).filter(|revision| name::is_commit(revision)).collect();
    if args.cache.is_some() {
        request.cache.clone_from(&args.cache);
    } else if let Some(config) = configured {
        request.cache.clone_from(&config.weights.cache);
    }
    let settings = match Settings::resolve(&request, |name| std::env::var(name).ok()) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("sglangd fetch: {error}");
            return Exit::Weights;
        }
    };
    if args.list {
        return care::list(&settings.cache, args.repo.as_deref(), args.json);
    }
    if let Err(error) = loaded {
        // Which commit must stay is not known.
        eprintln!("sglangd fetch: the configuration is wrong\n{}", error.render(Color::Plain));
        return Exit::Config;
    }
    let deed = if args.yes { Deed::Remove } else { Deed::Show };
    care::prune(&settings.cache, args.repo.as_deref(), &wanted, deed, args.json)
}

/// What `serve` would fetch: the configuration's model and what its flags name besides.
fn configured(args: &FetchArgs) -> Result<Request, (String, Exit)> {
    let wrong = |message: String| (message, Exit::Config);
    let sources = args.config.sources(WhenMissing::BuiltIn);
    let loaded =
        load(&sources).map_err(|error| wrong(format!("the configuration is wrong\n{}", error.render(Color::Plain))))?;
    let folders = Folders::find(None, None, &sources);
    // What the installed engine's parser said, if it was ever asked; which repositories a flag names
    // does not depend on its version.
    let kept = inspect::cached_table(&loaded.config.engine, folders.inspect_cache());
    let resolved = resolve(&loaded.config, kept.as_ref().unwrap_or(FlagTable::bundled())).map_err(|errors| {
        wrong(format!("the engine's flags are wrong\n{}", errors.explain(&loaded).render(Color::Plain)))
    })?;
    let mut request = acquire::request(&loaded.config, &resolved)
        .ok_or_else(|| (format!("nothing to fetch: {} is a local folder", loaded.config.model.name), Exit::Usage))?;
    if args.cache.is_some() {
        request.cache.clone_from(&args.cache);
    }
    if args.endpoint.is_some() {
        request.endpoint.clone_from(&args.endpoint);
    }
    request.tuning.connections = args.connections.or(request.tuning.connections);
    request.tuning.max_rate = args.max_rate.or(request.tuning.max_rate);
    request.tuning.page_cache = page_cache(args, request.tuning.page_cache);
    Ok(request)
}

fn page_cache(args: &FetchArgs, configured: PageCache) -> PageCache {
    match (args.page_cache, configured) {
        (Some(PageCacheWord::Keep), _) | (None, PageCache::Keep) => PageCache::Keep,
        // By hand: no engine reads it next, as one does after `serve`'s own fetch.
        (Some(PageCacheWord::Bypass), _) | (None, PageCache::Bypass | PageCache::WhatFits) => PageCache::Bypass,
    }
}
