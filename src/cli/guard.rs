//! `sglangd guard`: ends what a killed supervisor left.

use clap::Args;

use super::exit::Exit;

#[derive(Debug, Args)]
pub struct GuardArgs {}

pub fn run(_args: GuardArgs) -> Exit {
    Exit::Bug
}
