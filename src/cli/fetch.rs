//! `sglangd fetch`: the model onto the disk.

use clap::Args;

use super::exit::Exit;

#[derive(Debug, Args)]
pub struct FetchArgs {}

pub fn run(_args: FetchArgs) -> Exit {
    Exit::Bug
}
