//! Processes that only make a start faster: a gain where they come in time, no loss where they do not. They are ended at
//! any moment, with all that they started, and never waited for longer than a moment.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::{Mutex, oneshot};

use super::leftovers::Leftovers;
use super::reaper::Ended;
use super::tree::{Tree, names};
use crate::sys::proc;

/// A process that reads from a dead network disk ends when that answers; nobody waits for it.
const PATIENCE: Duration = Duration::from_secs(2);

/// Those of one start, until they are ended; then no more begin.
#[derive(Debug, Clone, Default)]
pub struct Beside(Arc<Mutex<Helpers>>);

#[derive(Debug, Default)]
struct Helpers {
    running: Vec<Helper>,
    over: bool,
}

#[derive(Debug)]
struct Helper {
    what: &'static str,
    handle: OwnedFd,
    end: oneshot::Receiver<Ended>,
    /// What it may have started, and left.
    rest: Option<(Tree, Leftovers)>,
}

impl Beside {
    /// Takes charge of one that was just started. Too late, it is ended at once.
    pub async fn add(
        &self,
        what: &'static str,
        handle: OwnedFd,
        end: oneshot::Receiver<Ended>,
        rest: Option<(Tree, Leftovers)>,
    ) {
        let mut helpers = self.0.lock().await;
        let helper = Helper { what, handle, end, rest };
        if helpers.over {
            helper.end().await;
        } else {
            helpers.running.push(helper);
        }
    }

    /// Returns when they are gone, whoever asked first.
    pub async fn end(&self) {
        let mut helpers = self.0.lock().await;
        helpers.over = true;
        for helper in helpers.running.drain(..) {
            helper.end().await;
        }
    }
}

impl Helper {
    /// SIGKILL: nothing that they do is worth a longer word.
    async fn end(self) {
        // Gone already: its work is done.
        let _ = proc::signal(self.handle.as_fd(), Signal::KILL);
        if tokio::time::timeout(PATIENCE, self.end).await.is_err() {
            tracing::warn!("{} was killed and does not end: it hangs in the kernel, mostly in a disk", self.what);
        }
        let Some((tree, leftovers)) = self.rest else { return };
        let left = tree.kill(PATIENCE).await;
        if !left.is_empty() {
            tracing::warn!("of {}, these do not end yet: {}", self.what, names(&left));
        }
        // Files and a look at every process's maps: not on a worker of the runtime.
        let _ = tokio::task::spawn_blocking(move || leftovers.sweep()).await;
    }
}
