//! `sglangd serve`: the supervisor.

use clap::Args;

use super::exit::Exit;

#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub config: super::ConfigArgs,
    #[command(flatten)]
    pub folders: super::FolderArgs,
    /// Flags for the engine, after `--`.
    #[arg(last = true, value_name = "ENGINE FLAGS")]
    pub engine_flags: Vec<String>,
}

pub fn run(_args: ServeArgs) -> Exit {
    Exit::Bug
}
