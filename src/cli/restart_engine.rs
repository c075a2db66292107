//! `sglangd restart-engine`: asks a running sglangd for a fresh engine.
//!
//! Over the runtime folder's Unix socket alone, which only the daemon's own user may open: whoever can
//! reach the admin address may look, not act.

use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use http::{Method, StatusCode};

use super::FolderArgs;
use super::exit::Exit;
use super::status::{runtime_dir, socket};
use crate::health::client::{self, Target};

/// A supervisor answers in milliseconds; one that does not within this is stuck.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub struct RestartArgs {
    #[command(flatten)]
    pub folders: FolderArgs,
}

pub fn run(args: RestartArgs) -> Exit {
    super::on_this_thread(restart(args))
}

async fn restart(args: RestartArgs) -> Exit {
    let path = socket(&runtime_dir(&args.folders));
    let target = Target::Unix(path.clone());
    let asked = client::request(&target, Method::POST, "/restart-engine", None, Bytes::new(), PATIENCE);
    match asked.await {
        Ok(answer) if answer.status == StatusCode::ACCEPTED => {
            println!("{}", String::from_utf8_lossy(&answer.body).trim_end());
            Exit::Ok
        }
        Ok(answer) => {
            eprintln!("sglangd: {}: {}", answer.status, String::from_utf8_lossy(&answer.body).trim_end());
            Exit::Engine
        }
        Err(client::ClientError::Connect(error)) => {
            eprintln!(
                "sglangd: no sglangd that you may command is running at {} ({error}); say where it is with \
                 --runtime-dir",
                path.display()
            );
            Exit::Engine
        }
        Err(error) => {
            eprintln!("sglangd: the sglangd at {} is there but does not answer: {error}", path.display());
            Exit::Engine
        }
    }
}
