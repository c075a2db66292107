//! `sglangd plan`: what `serve` would do, without doing it.

mod gpus;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::exit::Exit;
use crate::config::folders::Folders;
use crate::config::redact;
use crate::config::units::show_duration;
use crate::config::{Color, Config, Loaded, ModelSource, Origin, WhenMissing, load};
use crate::engine::argv::{LaunchSpec, Placement, env_changes, launch_spec, shown};
use crate::engine::env;
use crate::engine::inspect::{Answer, How, TableSource, check, installed_table};
use crate::engine::resolve::{Resolved, resolve};
use crate::link::ProxyProtocol;
use crate::supervisor::acquire;
use crate::weights::{self, PlannedRepo, Settings, Space};
use gpus::GpuView;

/// How long the installed engine's parser may take: imports of torch from a cold disk.
pub(super) const INSPECT_LIMIT: Duration = Duration::from_mins(2);

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub daemon: super::DaemonArgs,
    /// One JSON object.
    #[arg(long)]
    pub json: bool,
    /// Ask the installed engine's own parser what it makes of the result (20 s, no GPU).
    #[arg(long)]
    pub check: bool,
    /// Ask the installed engine for its flags and keep the answer; `serve` runs this.
    #[arg(long, hide = true)]
    pub inspect: bool,
}

/// Everything that is planned, as `--json` shows it.
#[derive(Debug, Serialize)]
struct Plan {
    version: &'static str,
    config_files: Vec<PathBuf>,
    model: ModelView,
    fetch: FetchView,
    engine: EngineView,
    listen: BTreeMap<&'static str, String>,
    /// What clients may speak on the public port.
    spoken: &'static str,
    limits: BTreeMap<&'static str, String>,
    folders: BTreeMap<&'static str, PathBuf>,
    gpus: GpuView,
    /// Who said each value, and who lost.
    values: Vec<Origin>,
    warnings: Vec<String>,
    notices: Vec<String>,
    /// What the engine's own parser answered; only with `--check`.
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<CheckView>,
}

#[derive(Debug, Serialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
enum CheckView {
    Accepted { settings: serde_json::Map<String, serde_json::Value> },
    Refused { why: String },
    NotAsked { why: String },
}

impl From<Answer> for CheckView {
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Accepted(mut settings) => {
                for (name, value) in &mut settings {
                    if redact::is_secret_name(name) {
                        *value = redact::MASK.into();
                    }
                }
                Self::Accepted { settings }
            }
            Answer::Refused(why) => Self::Refused { why: redact::text(&why) },
            Answer::NotAsked(why) => Self::NotAsked { why: redact::text(&why) },
        }
    }
}

#[derive(Debug, Serialize)]
struct ModelView {
    name: String,
    repo: Option<String>,
    revision: Option<String>,
    path: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct EngineView {
    /// Which table the flags were checked against.
    checked_against: String,
    argv: Vec<String>,
    yaml_path: PathBuf,
    yaml: String,
    /// What differs from sglangd's own environment.
    env: BTreeMap<String, String>,
    env_removed: Vec<String>,
}

/// What would be fetched before the engine starts.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum FetchView {
    /// The model is a local folder.
    Nothing,
    /// The repository was asked: how much there is and how much is missing.
    Known { files: u64, bytes: u64, missing_files: u64, missing_bytes: u64, folder: Option<PathBuf> },
    /// The repository was not asked, and why.
    Unknown { reason: String },
}

/// How long the cache and the hub may take to say what is there.
const LIST_LIMIT: Duration = Duration::from_secs(20);

/// Asks the cache and the hub what is there and what is missing. Writes nothing.
fn fetch_view(config: &Config, resolved: &Resolved, own: &env::Env) -> FetchView {
    let Some(request) = acquire::request(config, resolved) else { return FetchView::Nothing };
    let unknown = |reason: String| FetchView::Unknown { reason };
    let env = env::fetcher(config, own);
    let settings = Settings::resolve(&request, |name| env.get(OsStr::new(name))?.to_str().map(str::to_owned));
    let settings = match settings {
        Ok(settings) => settings,
        Err(error) => return unknown(error.to_string()),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return unknown(error.to_string()),
    };
    let planned =
        runtime.block_on(async { tokio::time::timeout(LIST_LIMIT, weights::prepare(&request, &settings)).await });
    runtime.shutdown_background();
    match planned {
        Err(_) => unknown(format!("no answer from {} within {} s", settings.endpoint, LIST_LIMIT.as_secs())),
        Ok(Err(error)) => unknown(error.to_string()),
        Ok(Ok(planned)) if let Err(error) = Space::look(&planned, &settings).and_then(|space| space.enough()) => {
            unknown(error.to_string())
        }
        Ok(Ok(planned)) => FetchView::Known {
            files: planned.iter().map(|repo| repo.plan.files.len() as u64).sum(),
            bytes: planned.iter().map(|repo| repo.plan.bytes_total()).sum(),
            missing_files: planned.iter().map(|repo| repo.plan.missing().len() as u64).sum(),
            missing_bytes: planned.iter().map(|repo| repo.plan.bytes_to_fetch()).sum(),
            folder: planned.iter().find(|repo| repo.request.flag.is_none()).map(PlannedRepo::folder),
        },
    }
}

#[allow(clippy::needless_pass_by_value)] // every subcommand is given its arguments whole
pub fn run(args: PlanArgs) -> Exit {
    let color = if std::io::stderr().is_terminal() { Color::Terminal } else { Color::Plain };
    let sources = args.daemon.sources(WhenMissing::BuiltIn);
    let folders = args.daemon.folders(&sources);
    let loaded = match load(&sources) {
        Ok(loaded) => loaded,
        Err(error) => {
            eprint!("{}", error.render(color));
            return Exit::Config;
        }
    };
    if let Err(error) = super::keys::check(&loaded.config) {
        eprintln!("sglangd: {error}");
        return Exit::Config;
    }
    let certificate = match super::certificate::check(&loaded) {
        Ok(warnings) => warnings,
        Err(complaint) => {
            eprint!("{complaint}");
            return Exit::Config;
        }
    };
    // A plan may be made on another machine than the one that will serve: what is known is shown all the same.
    let (source, no_engine) = match installed_table(&loaded.config.engine, folders.inspect_cache(), INSPECT_LIMIT) {
        Ok(source) => (source, None),
        Err(error) if args.inspect => {
            eprintln!("sglangd: {error}");
            return Exit::Config;
        }
        Err(error) => (TableSource::bundled(None), Some(error)),
    };
    if args.inspect {
        return inspected(&source);
    }
    let resolved = match resolve(&loaded.config, &source.table) {
        Ok(resolved) => resolved,
        Err(errors) => {
            eprint!("{}", errors.explain(&loaded).render(color));
            return Exit::Config;
        }
    };
    let (mut plan, spec) = plan(&loaded, &source, &resolved, &folders, &sources.env);
    plan.warnings.extend(certificate);
    let mut exit = Exit::Ok;
    if args.check {
        let words = &spec.argv[loaded.config.engine.command.len()..];
        let answer =
            no_engine.clone().map_or_else(|| check(&loaded.config.engine, words, &spec.yaml, INSPECT_LIMIT), Err);
        if matches!(answer, Ok(Answer::Refused(_)) | Err(_)) {
            exit = Exit::Config;
        }
        plan.check = Some(answer.map_or_else(|error| CheckView::Refused { why: error.to_string() }, CheckView::from));
    }
    if args.json {
        // A closed pipe is the reader's choice.
        let _ = serde_json::to_writer_pretty(std::io::stdout().lock(), &plan);
        println!();
    } else {
        print!("{}", text(&plan));
    }
    if let Some(CheckView::Refused { why }) = plan.check.as_ref().filter(|_| no_engine.is_none()) {
        eprintln!("sglangd: the engine's parser refuses this: {why}");
    }
    if let Some(error) = no_engine {
        eprintln!("sglangd: here a start would end at once: {error}");
        exit = Exit::Config;
    }
    exit
}

/// One line for the supervisor that ran this.
fn inspected(source: &TableSource) -> Exit {
    if let Some(warning) = &source.warning {
        eprintln!("{warning}");
    }
    let how = match source.how {
        How::Asked => "asked",
        How::Cached => "kept",
        How::Bundled => "shipped",
    };
    println!("{how}: {}, {} flags", source.table.describe(), source.table.flags().len());
    Exit::Ok
}

/// What only a start knows is shown by these words.
const PORT: &str = "PORT";
const PER_START: &str = "(new at each start)";

fn plan(
    loaded: &Loaded,
    source: &TableSource,
    resolved: &Resolved,
    folders: &Folders,
    own: &env::Env,
) -> (Plan, LaunchSpec) {
    let config = &loaded.config;
    let fetch = fetch_view(config, resolved, own);
    let (repo, revision, path) = match &config.model.source {
        ModelSource::Repo { repo, revision } => (Some(repo.clone()), Some(revision.clone()), None),
        ModelSource::Folder(path) => (None, None, Some(path.clone())),
    };
    let snapshot = |repo: &str, revision: &str| PathBuf::from(format!("(snapshot of {repo}@{revision})"));
    let model_path = match (&fetch, &config.model.source) {
        (FetchView::Known { folder: Some(folder), .. }, _) | (_, ModelSource::Folder(folder)) => folder.clone(),
        (_, ModelSource::Repo { repo, revision }) => snapshot(repo, revision),
    };
    let placement = Placement {
        model_path,
        extra: resolved
            .extra_repos
            .iter()
            .map(|extra| (extra.flag.clone(), snapshot(&extra.repo, &extra.revision)))
            .collect(),
        // Shown as PORT; a number that the engine's parser takes.
        port: 30_000,
        yaml_path: folders.engine_yaml(),
        tmpdir: PathBuf::from(PER_START),
        cache_dir: folders.engine_cache(),
        api_key: Some(redact::MASK.to_owned()),
        admin_api_key: Some(redact::MASK.to_owned()),
        launch_id: PER_START.to_owned(),
        own_env: own.clone(),
    };
    let spec = launch_spec(config, resolved, &placement);
    let mut warnings = loaded.warnings.clone();
    warnings.extend(source.warning.clone());
    warnings.extend(resolved.warnings.iter().cloned());
    warnings.extend(env::warnings(config));
    warnings.extend(config.exposure());
    let gpus = GpuView::look(config, resolved, own, &mut warnings);
    let plan = Plan {
        version: env!("CARGO_PKG_VERSION"),
        config_files: loaded.files.clone(),
        model: ModelView { name: config.model.name.clone(), repo, revision, path },
        fetch,
        engine: engine_view(&spec, source, folders, own),
        listen: listen_view(config),
        spoken: config.listen.spoken(),
        limits: BTreeMap::from([
            ("max", config.limits.max.to_string()),
            ("target", config.limits.target.to_string()),
            ("queue", config.limits.queue.to_string()),
            ("queue_timeout", show_duration(config.limits.queue_timeout)),
            ("hold", show_duration(config.limits.hold)),
            ("max_body", config.limits.max_body.to_string()),
        ]),
        folders: BTreeMap::from([("runtime", folders.runtime.clone()), ("state", folders.state.clone())]),
        gpus,
        values: loaded.origins.clone(),
        warnings: warnings.iter().map(|warning| redact::text(warning)).collect(),
        notices: loaded.notices.clone(),
        check: None,
    };
    (plan, spec)
}

fn listen_view(config: &Config) -> BTreeMap<&'static str, String> {
    let listen = &config.listen;
    let public = listen.public.map(|address| {
        let tls = if listen.tls.is_some() { ", TLS" } else { "" };
        let header = match listen.proxy_protocol {
            ProxyProtocol::Off => "",
            ProxyProtocol::Require => ", behind the PROXY protocol",
        };
        ("public", format!("{address}{tls}{header}"))
    });
    let unix = listen.unix.as_ref().map(|path| ("unix", format!("{} (mode {:04o})", path.display(), listen.unix_mode)));
    [("admin", listen.admin.to_string())].into_iter().chain(public).chain(unix).collect()
}

fn engine_view(spec: &LaunchSpec, source: &TableSource, folders: &Folders, own: &env::Env) -> EngineView {
    let mut argv: Vec<String> = spec.argv.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    if let Some(port) = argv.iter().position(|word| word == "--port").and_then(|at| argv.get_mut(at + 1)) {
        PORT.clone_into(port);
    }
    // A flag that nobody knows may carry a secret as the word after it.
    for at in 0..argv.len() {
        argv[at] = match at.checked_sub(1).map(|before| &argv[before]) {
            Some(before) if before.starts_with("--") && redact::is_secret_name(before) => redact::MASK.to_owned(),
            _ => redact::text(&argv[at]),
        };
    }
    let (set, removed) = env_changes(spec, own);
    let hidden = |name: String, value: String| {
        let value = if redact::is_secret_name(&name) { redact::MASK.to_owned() } else { redact::text(&value) };
        (name, value)
    };
    EngineView {
        checked_against: source.table.describe(),
        argv,
        yaml_path: folders.engine_yaml(),
        yaml: redact::text(&spec.yaml),
        env: set.into_iter().map(|(name, value)| hidden(name, value)).collect(),
        env_removed: removed,
    }
}

/// For people.
fn text(plan: &Plan) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_text(plan, &mut out);
    out
}

fn write_text(plan: &Plan, out: &mut String) -> std::fmt::Result {
    let files: Vec<String> = plan.config_files.iter().map(|file| file.display().to_string()).collect();
    let files = if files.is_empty() { "the built-in configuration".to_owned() } else { files.join(", ") };
    writeln!(out, "sglangd {} would serve {}", plan.version, plan.model.name)?;
    writeln!(out, "  configuration  {files}")?;
    match (&plan.model.repo, &plan.model.path) {
        (Some(repo), _) => {
            writeln!(out, "  model          {repo}@{}", plan.model.revision.as_deref().unwrap_or("main"))?;
        }
        (None, Some(path)) => writeln!(out, "  model          {}", path.display())?,
        (None, None) => {}
    }
    match &plan.fetch {
        FetchView::Nothing => writeln!(out, "  fetch          nothing: the model is a local folder")?,
        FetchView::Known { files, bytes, missing_files, missing_bytes, .. } => {
            writeln!(out, "  fetch          {missing_files} of {files} files, {missing_bytes} of {bytes} bytes")?;
        }
        FetchView::Unknown { reason } => writeln!(out, "  fetch          what is missing: {reason}")?,
    }
    for (name, address) in &plan.listen {
        let what = if *name == "unix" { "socket" } else { "port" };
        writeln!(out, "  {:<15}{address}", format!("{name} {what}"))?;
    }
    writeln!(out, "  spoken         {}", plan.spoken)?;
    for (name, folder) in &plan.folders {
        writeln!(out, "  {:<15}{}", format!("{name} folder"), folder.display())?;
    }
    plan.gpus.write_text(out)?;
    writeln!(out, "  flags          checked against {}", plan.engine.checked_against)?;

    writeln!(out, "\nThe engine's command (PORT is private and chosen at the start):")?;
    let argv: Vec<std::ffi::OsString> = plan.engine.argv.iter().map(std::ffi::OsString::from).collect();
    writeln!(out, "  {}", redact::text(&shown(&argv)))?;
    writeln!(out, "\nIts YAML, {} (mode 0600):", plan.engine.yaml_path.display())?;
    for line in plan.engine.yaml.lines() {
        writeln!(out, "  {line}")?;
    }
    writeln!(out, "\nIts environment, beyond sglangd's own:")?;
    for (name, value) in &plan.engine.env {
        writeln!(out, "  {name}={value}")?;
    }
    if !plan.engine.env_removed.is_empty() {
        writeln!(out, "  without {}", plan.engine.env_removed.join(", "))?;
    }
    match &plan.check {
        Some(CheckView::Accepted { settings }) => {
            writeln!(out, "\nThe engine's own parser takes it, and differs from its defaults in:")?;
            for (name, value) in settings {
                writeln!(out, "  {name} = {value}")?;
            }
        }
        Some(CheckView::NotAsked { why }) => writeln!(out, "\nThe engine's own parser was not asked: {why}")?,
        Some(CheckView::Refused { .. }) | None => {}
    }
    writeln!(out, "\nWho said what:")?;
    for value in &plan.values {
        writeln!(out, "  {:<46} {:<28} {}", value.key, value.value, value.from)?;
        for lost in &value.lost {
            writeln!(out, "  {:<46} {:<28} {}", "  wins over", lost.value, lost.from)?;
        }
    }
    for notice in &plan.notices {
        writeln!(out, "\nNote: {notice}")?;
    }
    for warning in &plan.warnings {
        writeln!(out, "\nWarning: {warning}")?;
    }
    Ok(())
}
