//! `sglangd guard`: ends what a killed supervisor left. Started by `serve`; see `launch::guard`.

use std::io::BufReader;
use std::path::PathBuf;

use clap::Args;

use super::exit::Exit;
use crate::launch::guard::watch;

#[derive(Debug, Args)]
pub struct GuardArgs {
    /// Where the record of the running engine lies.
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: PathBuf,
}

#[allow(clippy::needless_pass_by_value)] // every subcommand is given its arguments whole
pub fn run(args: GuardArgs) -> Exit {
    // The terminal's Ctrl-C does not reach a session of its own; a stray SIGTERM to everything named
    // sglangd must not take the guard before the supervisor.
    match watch(BufReader::new(std::io::stdin().lock()), &args.runtime_dir) {
        Ok(()) => Exit::Ok,
        Err(names) => {
            eprintln!("sglangd guard: not even SIGKILL ended {names}");
            Exit::Bug
        }
    }
}
