//! `sglangd probe`: two questions, streamed.

use clap::Args;

use super::exit::Exit;

#[derive(Debug, Args)]
pub struct ProbeArgs {}

pub fn run(_args: ProbeArgs) -> Exit {
    Exit::Bug
}
