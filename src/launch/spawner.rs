//! Starts processes on the main thread, for tasks that run elsewhere.
//!
//! A parent-death signal belongs to the thread that forked; a tokio worker may end before the
//! process does, the main thread does not. So the main thread does nothing but fork.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use tokio::sync::oneshot;

use crate::sys::spawn::{Spawned, Spec};

/// Processes are started one by one by a single task: one in flight, some slack.
const BOUND: usize = 8;

type Order = (Spec, oneshot::Sender<io::Result<Spawned>>);

/// Asks the main thread to start processes. The main thread ends when all of these are gone.
#[derive(Debug, Clone)]
pub struct Spawner(SyncSender<Order>);

/// The main thread's side.
#[derive(Debug)]
pub struct MainThread(Receiver<Order>);

pub fn pair() -> (Spawner, MainThread) {
    let (to, from) = sync_channel(BOUND);
    (Spawner(to), MainThread(from))
}

impl Spawner {
    pub async fn spawn(&self, spec: Spec) -> io::Result<Spawned> {
        let (reply, answer) = oneshot::channel();
        let gone = || io::Error::other("the thread that starts processes is gone");
        self.0.try_send((spec, reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

impl MainThread {
    /// Serves until every [`Spawner`] is dropped. Call on the main thread.
    pub fn serve(self) {
        while let Ok((spec, reply)) = self.0.recv() {
            // Whoever asked may have been cancelled; then the process is an orphan that its own
            // mark or parent-death signal ends.
            let _ = reply.send(spec.spawn());
        }
    }
}
