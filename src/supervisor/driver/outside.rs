//! What the driver is given, and what it gives others to read and to ask.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::Report;
use crate::config::folders::Folders;
use crate::config::{Config, Loaded, OnGiveUp};
use crate::engine::env::Env;
use crate::launch::guard::Guarded;
use crate::launch::spawner::Spawner;
use crate::link::status::{Listening, Status};
use crate::link::{EngineView, ProxySettings};
use crate::shutdown::Signals;
use crate::supervisor::half::Half;
use crate::supervisor::oversight::Patience;
use crate::supervisor::step::{GiveUp, Millis, Policy, Terms};

/// Reads the configuration anew, for SIGHUP; the error is ready to be shown.
pub struct Reload(pub Box<dyn Fn() -> Result<Loaded, String> + Send>);

impl std::fmt::Debug for Reload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reload")
    }
}

/// Everything that is passed in: the driver opens and catches nothing itself.
#[derive(Debug)]
pub struct Outside {
    pub loaded: Loaded,
    pub folders: Folders,
    pub own_env: Env,
    pub inspect_arguments: Vec<OsString>,
    pub spawner: Spawner,
    pub listeners: Arc<Vec<OwnedFd>>,
    pub listen: Listening,
    pub guard: Option<Guarded<std::process::ChildStdin>>,
    pub signals: Signals,
    pub reload: Reload,
}

/// What an operator may ask for; answered with what follows, in words.
#[derive(Debug)]
pub enum Order {
    /// A fresh engine.
    Restart(oneshot::Sender<String>),
    /// Write down what can be known now; the answer is where it lies, or why it does not.
    Bundle(oneshot::Sender<Result<PathBuf, String>>),
}

/// Takes operators' orders.
#[derive(Debug, Clone)]
pub struct Orderly(pub(super) mpsc::Sender<Report>);

impl Orderly {
    /// None: the driver is at its end.
    pub async fn restart(&self) -> Option<String> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Report::Order(Order::Restart(reply))).await.ok()?;
        answer.await.ok()
    }

    /// None: the driver is at its end.
    pub async fn bundle(&self) -> Option<Result<PathBuf, String>> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Report::Order(Order::Bundle(reply))).await.ok()?;
        answer.await.ok()
    }
}

/// What others may read and ask while the driver runs.
#[derive(Debug, Clone)]
pub struct Outlook {
    pub status: watch::Receiver<Status>,
    pub engine: watch::Receiver<EngineView>,
    /// What the proxy lives by, keys and all.
    pub settings: watch::Receiver<ProxySettings>,
    pub half: Half,
    pub orders: Orderly,
}

/// What of the configuration the machine lives by.
pub(super) fn policy(config: &Config) -> Policy {
    let ms = |d: Duration| d.as_millis() as Millis;
    Policy {
        restart: Terms {
            max_failures: config.restart.max,
            window: ms(config.restart.window),
            backoff: ms(config.restart.backoff),
            backoff_max: ms(config.restart.backoff_max),
        },
        give_up: match config.restart.on_give_up {
            OnGiveUp::Serve => GiveUp::Serve,
            OnGiveUp::Exit => GiveUp::Exit,
        },
        grace: ms(config.shutdown.grace),
        start_stall: ms(config.start.stall),
        start_limit: ms(config.start.limit),
    }
}

pub(super) fn patience(config: &Config) -> Patience {
    Patience {
        hang_after: config.health.hang_after,
        probe_interval: config.health.probe_interval,
        start_stall: config.start.stall,
    }
}
