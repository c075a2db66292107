//! `sglangd proxy`: the data plane alone, or as the half that `serve` starts.

use clap::Args;

use super::exit::Exit;

#[derive(Debug, Args)]
pub struct ProxyArgs {
    #[command(flatten)]
    pub config: super::ConfigArgs,
}

pub fn run(_args: ProxyArgs) -> Exit {
    Exit::Bug
}
