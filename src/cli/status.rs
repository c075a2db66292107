//! `sglangd status`: what a running sglangd is doing.

use clap::Args;

use super::exit::Exit;

#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    pub folders: super::FolderArgs,
}

pub fn run(_args: StatusArgs) -> Exit {
    Exit::Bug
}
