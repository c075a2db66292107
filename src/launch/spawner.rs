//! Starts processes on the main thread and tells whoever asked how they ended.
//!
//! A parent-death signal belongs to the thread that forked; a tokio worker may end before the
//! process does, the main thread does not. So the main thread does nothing but fork. The exit
//! status goes to whoever asked for the process; everything else that ends is an adopted orphan.

use std::collections::HashMap;
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::reaper::{self, Ended};
use crate::sys::proc::{self, Stat};
use crate::sys::spawn::{Spawned, Spec};

/// Processes are started one by one by few tasks: some slack, no more.
const BOUND: usize = 8;

type Waiting = HashMap<i32, oneshot::Sender<Ended>>;
type Started = (Spawned, oneshot::Receiver<Ended>);
type Order = (Spec, oneshot::Sender<io::Result<Started>>);

/// Asks the main thread to start processes. The main thread ends when all of these are gone.
#[derive(Debug, Clone)]
pub struct Spawner {
    orders: SyncSender<Order>,
    waiting: Arc<Mutex<Waiting>>,
}

/// The main thread's side.
#[derive(Debug)]
pub struct MainThread {
    orders: Receiver<Order>,
    waiting: Arc<Mutex<Waiting>>,
}

pub fn pair() -> (Spawner, MainThread) {
    let (to, from) = sync_channel(BOUND);
    let waiting = Arc::new(Mutex::new(Waiting::new()));
    (Spawner { orders: to, waiting: Arc::clone(&waiting) }, MainThread { orders: from, waiting })
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    // A map of channels is whole at every point where a panic could happen.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Spawner {
    /// Starts it; the receiver gets its end, once.
    pub async fn spawn(&self, spec: Spec) -> io::Result<Started> {
        let (reply, answer) = oneshot::channel();
        let gone = || io::Error::other("the thread that starts processes is gone or overrun");
        self.orders.try_send((spec, reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Orphans that came to us and live: children that nobody here started. As PID 1 we inherit everybody's,
    /// also what an operator started beside us; then none is taken for the engine's.
    pub fn adopted(&self) -> Vec<Stat> {
        let own = i32::try_from(std::process::id()).unwrap_or(-1);
        if own == 1 {
            return Vec::new();
        }
        // Held over fork and registration: a child that is just being started is not an orphan.
        let waiting = lock(&self.waiting);
        let all = proc::all();
        all.into_iter().filter(|p| p.ppid == own && !p.is_zombie() && !waiting.contains_key(&p.pid)).collect()
    }

    /// Collects children that have ended and tells their waiters. Call on SIGCHLD, until it returns
    /// less than [`reaper::BATCH`]. Orphans that nobody waits for are only counted.
    pub fn reap(&self) -> usize {
        // Held over the waiting, as it is over fork and registration below: an exit can never be
        // collected before its waiter is known.
        let mut waiting = lock(&self.waiting);
        let ended = reaper::collect();
        for (pid, how) in &ended {
            if let Some(waiter) = waiting.remove(pid) {
                // Whoever asked may have lost interest.
                let _ = waiter.send(*how);
            }
        }
        ended.len()
    }
}

impl MainThread {
    /// Serves until every [`Spawner`] is dropped. Call on the main thread.
    pub fn serve(self) {
        while let Ok((spec, reply)) = self.orders.recv() {
            let mut waiting = lock(&self.waiting);
            let started = spec.spawn().map(|spawned| {
                let (tell, end) = oneshot::channel();
                waiting.insert(spawned.pid, tell);
                (spawned, end)
            });
            drop(waiting);
            // Whoever asked may have been cancelled; then the process is an orphan that its mark or
            // its parent-death signal ends.
            let _ = reply.send(started);
        }
    }
}
