//! The command line: text in, text out. Each subcommand has a file of its own.

// Printing is this folder's purpose.
#![allow(clippy::print_stdout, clippy::print_stderr)]

pub use crate::exit;
pub mod bundle;
mod certificate;
pub mod fetch;
pub mod guard;
pub mod keys;
pub mod plan;
pub mod probe;
pub mod proxy;
mod public_socket;
pub mod read_ahead;
pub mod restart_engine;
pub mod serve;
pub mod simulate;
pub mod status;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::folders::Folders;
use crate::config::{Sources, WhenMissing};
use exit::Exit;

/// Runs the SGLang engine as a service on one machine.
#[derive(Debug, Parser)]
#[command(name = "sglangd", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fetch the weights, launch the engine, watch it, proxy its traffic, stop it gracefully.
    Serve(serve::ServeArgs),
    /// Say what `serve` would do: files to fetch, argv, environment, YAML, ports, limits.
    Plan(plan::PlanArgs),
    /// Bring a model's snapshot into the Hugging Face cache and check it.
    Fetch(fetch::FetchArgs),
    /// Ask a running server two questions and print the answers as they stream in.
    Probe(probe::ProbeArgs),
    /// Show what a running sglangd is doing.
    Status(status::StatusArgs),
    /// Write down all that can be known of the engine now, and say where it lies.
    Bundle(bundle::BundleArgs),
    /// Replace the engine with a fresh one: open answers end, new requests wait. Leaves `gave_up` too.
    RestartEngine(restart_engine::RestartArgs),
    /// Add, list and remove API keys.
    Keys(keys::KeysArgs),
    /// Only the reverse proxy, in front of an engine that somebody else runs.
    Proxy(proxy::ProxyArgs),
    /// A simulated SGLang engine: takes its arguments, speaks its HTTP, prints its log lines.
    Simulate(simulate::SimulateArgs),
    /// Reads shards into memory ahead of the engine; started by `serve`.
    #[command(hide = true)]
    ReadAhead(read_ahead::ReadAheadArgs),
    /// Ends the engine's session when the supervisor is gone; started by `serve`.
    #[command(hide = true)]
    Guard(guard::GuardArgs),
}

/// Where the configuration comes from; the same for every command that reads one.
#[derive(Debug, Clone, Default, Args)]
pub struct ConfigArgs {
    /// A configuration file; may be repeated, later files win.
    #[arg(long, value_name = "FILE")]
    pub config: Vec<PathBuf>,
    /// Set one key, e.g. `--set limits.max=64`; wins over files and environment.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl ConfigArgs {
    /// These and this process's environment, folder and user.
    pub fn sources(&self, missing: WhenMissing) -> Sources {
        let mut sources = Sources::here(missing);
        sources.files.clone_from(&self.config);
        sources.set.clone_from(&self.set);
        sources
    }
}

/// The folders a daemon lives in; `status` and `probe` find it by them.
#[derive(Debug, Clone, Default, Args)]
pub struct FolderArgs {
    /// Sockets and the engine's YAML [default: systemd's, else /run/sglangd, else XDG].
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// What is kept between runs [default: systemd's, else /var/lib/sglangd, else XDG].
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// What `serve` takes, and `plan` to say what it would do.
#[derive(Debug, Clone, Default, Args)]
pub struct DaemonArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    #[command(flatten)]
    pub folders: FolderArgs,
    /// Where clients connect; the same as `--set listen.public=ADDR`. `unix:PATH`: a Unix socket alone.
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<String>,
    /// Status and metrics; the same as `--set listen.admin=ADDR`.
    #[arg(long, value_name = "ADDR")]
    pub admin: Option<String>,
    /// Flags for the engine, after `--`.
    #[arg(last = true, value_name = "ENGINE FLAGS")]
    pub engine_flags: Vec<String>,
}

impl DaemonArgs {
    pub fn sources(&self, missing: WhenMissing) -> Sources {
        let mut sources = self.config.sources(missing);
        sources.engine_flags.clone_from(&self.engine_flags);
        match self.listen.as_deref().map(|address| (address, address.strip_prefix("unix:"))) {
            Some((_, Some(path))) => {
                sources.set.extend(["listen.public=off".to_owned(), format!("listen.unix={path}")]);
            }
            Some((address, None)) => sources.set.push(format!("listen.public={address}")),
            None => {}
        }
        sources.set.extend(self.admin.iter().map(|address| format!("listen.admin={address}")));
        sources
    }

    pub fn folders(&self, sources: &Sources) -> Folders {
        Folders::find(self.folders.runtime_dir.clone(), self.folders.state_dir.clone(), sources)
    }

    /// The same as words, for a child that is to read the same configuration.
    pub fn words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        let mut flag = |name: &str, value: OsString| words.extend([name.into(), value]);
        for file in &self.config.config {
            flag("--config", file.into());
        }
        for set in &self.config.set {
            flag("--set", set.into());
        }
        for (name, dir) in [("--runtime-dir", &self.folders.runtime_dir), ("--state-dir", &self.folders.state_dir)] {
            if let Some(dir) = dir {
                flag(name, dir.into());
            }
        }
        for (name, address) in [("--listen", &self.listen), ("--admin", &self.admin)] {
            if let Some(address) = address {
                flag(name, address.into());
            }
        }
        if !self.engine_flags.is_empty() {
            words.push("--".into());
            words.extend(self.engine_flags.iter().map(OsString::from));
        }
        words
    }
}

/// A command that asks somebody and prints what it hears needs one thread.
fn on_this_thread(work: impl Future<Output = Exit>) -> Exit {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(work),
        Err(error) => {
            eprintln!("sglangd: cannot start the async runtime: {error}");
            Exit::Bug
        }
    }
}

/// Runs the command line and says how the process ends.
pub fn run(cli: Cli) -> Exit {
    match cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Fetch(args) => fetch::run(args),
        Command::Probe(args) => probe::run(args),
        Command::Status(args) => status::run(args),
        Command::Bundle(args) => bundle::run(args),
        Command::RestartEngine(args) => restart_engine::run(args),
        Command::Keys(args) => keys::run(args),
        Command::Proxy(args) => proxy::run(args),
        Command::Simulate(args) => simulate::run(args),
        Command::ReadAhead(args) => read_ahead::run(args),
        Command::Guard(args) => guard::run(args),
    }
}
