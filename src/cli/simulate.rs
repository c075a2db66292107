//! `sglangd simulate`: the simulated engine, and, as `sglangd simulate hub`, the simulated hub.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

use clap::{Args, Parser};

use super::exit::Exit;
use crate::simulate::engine::{self, Ended};
use crate::simulate::hub::{Content, Hub, Options};

#[derive(Debug, Args)]
pub struct SimulateArgs {
    /// SGLang's launch arguments, e.g. `--model-path DIR --port 30000 --tp-size 8 --config FILE`;
    /// or `hub --listen ADDR [--folder DIR]`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ENGINE FLAGS")]
    pub words: Vec<String>,
}

/// A simulated Hugging Face hub.
#[derive(Debug, Parser)]
#[command(name = "sglangd simulate hub")]
pub struct HubArgs {
    /// Where to listen; port 0 takes a free one and prints it.
    #[arg(long, value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Serve the repositories of this folder in place of the built-in small model.
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// Bytes a second, of all answers together.
    #[arg(long, value_name = "BYTES")]
    pub rate: Option<u64>,
}

// Subcommands own their arguments; that this one only reads them is chance.
#[allow(clippy::needless_pass_by_value)]
pub fn run(args: SimulateArgs) -> Exit {
    if args.words.first().is_some_and(|word| word == "hub") {
        return match HubArgs::try_parse_from(&args.words) {
            Ok(args) => hub(&args),
            Err(error) => {
                // Nothing to do about a closed terminal.
                let _ = error.print();
                if error.use_stderr() { Exit::Usage } else { Exit::Ok }
            }
        };
    }
    match engine::run(&args.words) {
        Ended::Code(0) => Exit::Ok,
        // The codes are SGLang's (1: a traceback, 2: argparse …), not those of sglangd's own table.
        #[allow(clippy::exit)]
        Ended::Code(code) => std::process::exit(i32::from(code)),
        Ended::By(signal) => Exit::Signal(signal as i32),
    }
}

/// Serves until it is killed.
fn hub(args: &HubArgs) -> Exit {
    let content = args.folder.clone().map_or_else(Content::default, Content::Folder);
    let serve = async {
        let hub = Hub::serve(
            TcpListener::bind(args.listen)?,
            content,
            Options { rate: args.rate, cdn: Some(TcpListener::bind((args.listen.ip(), 0))?), ..Options::default() },
        )
        .await?;
        println!("{}", hub.endpoint());
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        std::io::Result::Ok(())
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.and_then(|runtime| runtime.block_on(serve)) {
        Ok(()) => Exit::Ok,
        Err(error) => {
            eprintln!("sglangd simulate hub: {error}");
            Exit::Usage
        }
    }
}
