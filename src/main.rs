//! Arguments, dispatch, exit code; nothing else.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use sglangd::cli::{Cli, exit::Exit, run};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let exit = if error.use_stderr() { Exit::Usage } else { Exit::Ok };
            // Nothing to do about a closed terminal.
            let _ = error.print();
            return ExitCode::from(exit.code());
        }
    };
    ExitCode::from(run(cli).code())
}
