//! `sglangd simulate`: the simulated engine.

use clap::Args;

use super::exit::Exit;

#[derive(Debug, Args)]
pub struct SimulateArgs {}

pub fn run(_args: SimulateArgs) -> Exit {
    Exit::Bug
}
