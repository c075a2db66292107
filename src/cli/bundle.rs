//! `sglangd bundle`: all that can be known of the engine at this moment, in a folder. A running sglangd
//! makes it; without one there is what the last run left and what the machine says.

use std::path::Path;
use std::time::Duration;

use clap::Args;
use http::Method;

use super::FolderArgs;
use super::exit::Exit;
use super::status::{runtime_dir, socket};
use crate::config::folders::Folders;
use crate::config::{Sources, WhenMissing};
use crate::health::client::{ClientError, Target, request};
use crate::node::gpus::{self, Look, Source};
use crate::observe::bundle::{self, Page};

/// Stacks take 3 s and `nvidia-smi` 10 s at most, a disk 20 s.
const PATIENCE: Duration = Duration::from_secs(40);

#[derive(Debug, Args)]
pub struct BundleArgs {
    #[command(flatten)]
    pub folders: FolderArgs,
}

pub fn run(args: BundleArgs) -> Exit {
    super::on_this_thread(make(args))
}

async fn make(args: BundleArgs) -> Exit {
    let at = socket(&runtime_dir(&args.folders));
    let target = Target::Unix(at.clone());
    let asked = request(&target, Method::POST, "/bundle", None, bytes::Bytes::new(), PATIENCE);
    match asked.await {
        Ok(answer) if answer.status.is_success() => {
            print!("{}", String::from_utf8_lossy(&answer.body));
            Exit::Ok
        }
        Ok(answer) => {
            eprint!("sglangd: {}", String::from_utf8_lossy(&answer.body));
            Exit::Engine
        }
        Err(ClientError::Connect(error)) => {
            eprintln!("sglangd: nothing runs at {} ({error}); this is what the machine says", at.display());
            alone(&args.folders)
        }
        Err(error) => {
            eprintln!("sglangd: the sglangd at {} is there but does not answer: {error}", at.display());
            alone(&args.folders)
        }
    }
}

/// Without a running sglangd.
fn alone(folders: &FolderArgs) -> Exit {
    let sources = Sources::here(WhenMissing::BuiltIn);
    let folders = Folders::find(folders.runtime_dir.clone(), folders.state_dir.clone(), &sources);
    let gpus = match gpus::look_once(&Source::from_env(|name| std::env::var_os(name))) {
        Look::Seen(sight) => serde_json::to_string_pretty(&sight).unwrap_or_else(|error| error.to_string()),
        Look::Nothing(why) => format!("({why})"),
    };
    let pages = [
        Page::new("gpus.json", gpus),
        Page::new("last-engine", last_engine(&folders.runtime)),
        Page::new(
            "bundle-before",
            bundle::newest(&folders.state).map_or_else(String::new, |p| p.display().to_string()),
        ),
    ];
    match bundle::write(&folders.state, "asked", &pages) {
        Ok(path) => {
            println!("{}", path.display());
            Exit::Ok
        }
        Err(error) => {
            eprintln!("sglangd: {}: {error}", bundle::folder(&folders.state).display());
            Exit::Bug
        }
    }
}

/// What a killed sglangd wrote of its engine; it holds no secret.
fn last_engine(runtime: &Path) -> String {
    std::fs::read_to_string(crate::launch::record::Record::path(runtime)).unwrap_or_else(|_| "(none)".into())
}
