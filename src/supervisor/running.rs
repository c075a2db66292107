//! One engine that was started: its process, what it says, who watches it, and how it is ended.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::Instant;

use super::fetcher::Current;
use super::look;
use super::prepare::Prepared;
use crate::engine::argv::LaunchSpec;
use crate::health::probe::{Look, Pace, look};
use crate::launch::leftovers::Leftovers;
use crate::launch::output::{self, Heard, Said};
use crate::launch::port::HeldPort;
use crate::launch::reaper::Ended;
use crate::launch::record::Record;
use crate::launch::spawner::Spawner;
use crate::launch::tree::{Leader, Tree, names};
use crate::link::Upstream;
use crate::link::status::RankStatus;
use crate::observe::clock;
use crate::sys::cgroup::Cgroup;
use crate::sys::proc::{self, Stat};
use crate::sys::spawn::{Spec, Stream};

/// How long the last lines may take to come through the pipes once the main process is dead; its
/// children may hold them open for longer.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// A main process that is killed takes its ranks with it, and they may be seen to end before it is.
const SETTLE: Duration = Duration::from_millis(100);
/// Between two rounds of SIGKILL.
const KILL_ROUND: Duration = Duration::from_millis(200);
/// While something still lives.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

#[derive(Debug)]
pub struct Running {
    pub pid: i32,
    pub tree: Tree,
    pub upstream: Upstream,
    pub started_at: String,
    pub since: Instant,
    pub heard: Arc<Heard>,
    pub spec: LaunchSpec,
    /// How it ended, once it did.
    pub ended: Option<Ended>,
    /// The ranks seen when it became ready: one that is gone is a dead engine.
    ranks: Vec<(RankStatus, Stat)>,
    /// Tell when one of them ends.
    endings: JoinSet<()>,
    notices: mpsc::Sender<Notice>,
    handle: OwnedFd,
    leftovers: Leftovers,
    readers: Vec<JoinHandle<()>>,
    watch: Option<AbortHandle>,
    /// Kept for the engine's whole life: nobody else may take the port between two of its binds.
    _port: HeldPort,
}

/// What the supervisor is told about a running engine by its watchers.
#[derive(Debug)]
pub enum Notice {
    LooksReady,
    /// A rank ended, and the main process did not.
    RankEnded(RankStatus),
    Ended(Ended),
}

/// Starts the engine. The error is the kernel's word about the program.
pub async fn launch(
    prepared: Prepared,
    spawner: &Spawner,
    runtime: &Path,
    facts: mpsc::Sender<Said>,
    notices: mpsc::Sender<Notice>,
) -> std::io::Result<(Running, Record)> {
    let Prepared { spec, upstream, port, mut tree, leftovers, secrets, .. } = prepared;
    let group = own_group(&tree.launch_id);
    let order = Spec {
        stdout: Stream::Piped,
        stderr: Stream::Piped,
        cgroup: group.as_ref().and_then(|group| group.door().ok()),
        ..Spec::quiet(spec.argv.clone(), spec.env.clone())
    };
    let started = spawner.spawn(order).await;
    let (mut child, end) = match started {
        Ok(started) => started,
        Err(error) => {
            leftovers.sweep();
            if let Some(group) = group {
                group.remove();
            }
            return Err(error);
        }
    };
    // Without `/proc` there is no time of start, and no way to tell a reused pid either.
    let start_time = proc::stat(child.pid).map_or(0, |stat| stat.start_time);
    tree.leader = Some(Leader { pid: child.pid, start_time });
    // An engine that is dead by now was in it, too.
    tree.cgroup = group.filter(|group| is_inside(group, child.pid)).map(|group| group.path().to_owned());
    let record = Record { boot_id: proc::boot_id(), tree: tree.clone(), leftovers: leftovers.clone() };
    if let Err(error) = record.write(runtime) {
        tracing::warn!(
            "{} could not be written ({error}): should sglangd be killed, the next start will not know this engine",
            Record::path(runtime).display()
        );
    }
    let streams = [child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from)];
    let (heard, readers) = output::drain(streams.into_iter().flatten().collect(), secrets, &facts);
    let watch = tokio::spawn(watch_readiness(upstream.clone(), tree.clone(), notices.clone())).abort_handle();
    let also = notices.clone();
    tokio::spawn(async move {
        let how = end.await.unwrap_or(Ended::Exited(-1));
        // The supervisor is gone: nobody to tell.
        let _ = notices.send(Notice::Ended(how)).await;
    });
    let running = Running {
        pid: child.pid,
        tree,
        upstream,
        started_at: clock::now(),
        since: Instant::now(),
        heard,
        spec,
        ended: None,
        ranks: Vec::new(),
        endings: JoinSet::new(),
        notices: also,
        handle: child.pidfd,
        leftovers,
        readers,
        watch: Some(watch),
        _port: port,
    };
    Ok((running, record))
}

/// A cgroup for this launch, where we may make one; else the engine's processes are found by other means.
fn own_group(launch_id: &str) -> Option<Cgroup> {
    static SAID: std::sync::Once = std::sync::Once::new();
    Cgroup::create(&format!("sglangd-engine-{launch_id}"))
        .inspect_err(|why| {
            SAID.call_once(|| {
                tracing::info!(
                    "the engine gets no cgroup of its own ({why}): its processes are found by session, descent and mark"
                );
            });
        })
        .ok()
}

/// Whether the engine was born in its group; where the kernel refused, the group goes.
fn is_inside(group: &Cgroup, pid: i32) -> bool {
    let inside = group.holds(pid) || !proc::is_there() || proc::stat(pid).is_none_or(|stat| stat.is_zombie());
    if !inside {
        group.remove();
    }
    inside
}

async fn watch_readiness(upstream: Upstream, tree: Tree, notices: mpsc::Sender<Notice>) {
    let mut pace = Pace::default();
    let mut trusted = false;
    let mut told = false;
    loop {
        // Nobody gets the key before it is known who listens.
        let key = upstream.api_key.as_deref().filter(|_| trusted);
        let mut seen = look(upstream.addr, key).await;
        if seen != Look::Closed && !trusted {
            match stranger(&tree, upstream.addr).await {
                None => {
                    trusted = true;
                    continue;
                }
                Some(who) => {
                    seen = Look::Closed;
                    if !std::mem::replace(&mut told, true) {
                        tracing::error!("{who}; it is not listened to, and the engine will not get its port");
                    }
                }
            }
        }
        if seen == Look::Ready && notices.send(Notice::LooksReady).await.is_err() {
            return;
        }
        tokio::time::sleep(pace.after(seen)).await;
    }
}

/// Who answers in the engine's place, as a sentence.
pub async fn stranger(tree: &Tree, addr: SocketAddr) -> Option<String> {
    let tree = tree.clone();
    // A look at every process: not on a worker of the runtime.
    let found = tokio::task::spawn_blocking(move || tree.stranger_on(addr)).await.ok()??;
    Some(format!("{addr} is answered by pid {} ({}), no process of the engine", found.pid, found.comm))
}

impl Running {
    /// Nobody needs to look for readiness any more.
    pub fn stop_watching(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.abort();
        }
    }

    /// SIGTERM to the main process alone: sent to the group it would kill the ranks, which the main
    /// process takes for a crash (sglang PR #35202).
    pub fn terminate(&self) {
        // Gone already: its end is on its way.
        let _ = proc::signal(self.handle.as_fd(), Signal::TERM);
    }

    /// Waits a little for the last lines of a dead engine.
    pub fn take_last_words(&mut self) -> impl Future<Output = Vec<Vec<u8>>> + Send + 'static {
        let readers = std::mem::take(&mut self.readers);
        let heard = Arc::clone(&self.heard);
        async move {
            let all = async {
                for reader in readers {
                    // It ended by itself or was cancelled: either way there is nothing more.
                    let _ = reader.await;
                }
            };
            let _ = tokio::time::timeout(LAST_WORDS, all).await;
            heard.tail()
        }
    }

    /// Knows its ranks by what they are now, and tells of each that ends from now on.
    pub fn note_ranks(&mut self) -> Vec<RankStatus> {
        self.ranks = look::ranks(&self.tree.members());
        self.endings = JoinSet::new();
        for (rank, stat) in &self.ranks {
            // Gone already, or no handle to be had: whoever looks each second sees that.
            if let Some(handle) = proc::open(stat.pid, stat.start_time) {
                self.endings.spawn(tell_its_end(handle, rank.clone(), self.pid, self.notices.clone()));
            }
        }
        self.ranks.iter().map(|(rank, _)| rank.clone()).collect()
    }

    /// A rank that was there when it became ready and is not any more.
    pub fn dead_rank(&self) -> Option<&RankStatus> {
        let dead = |(_, then): &&(RankStatus, Stat)| {
            proc::stat(then.pid).is_none_or(|now| now.start_time != then.start_time || now.is_zombie())
        };
        self.ranks.iter().find(dead).map(|(rank, _)| rank)
    }

    /// A rank, or the main process, that somebody has stopped.
    pub fn stopped(&self) -> Option<RankStatus> {
        let is_stopped = |pid: i32| proc::stat(pid).is_some_and(|now| now.is_stopped());
        let rank = self.ranks.iter().map(|(rank, _)| rank).find(|rank| is_stopped(rank.pid));
        rank.cloned()
            .or_else(|| is_stopped(self.pid).then(|| RankStatus { name: "its main process".into(), pid: self.pid }))
    }

    /// How to end it and everything it started.
    pub fn end(&self) -> End {
        End { tree: Some((self.tree.clone(), self.leftovers.clone())) }
    }
}

/// Waits for a rank's end: a handle on a process becomes readable with it, collected or not.
async fn tell_its_end(handle: OwnedFd, rank: RankStatus, main: i32, notices: mpsc::Sender<Notice>) {
    if crate::sys::end::of(handle).await.is_err() {
        return;
    }
    tokio::time::sleep(SETTLE).await;
    // A main process that went first, or with it, tells its own end.
    if proc::stat(main).is_some_and(|main| !main.is_zombie()) {
        let _ = notices.send(Notice::RankEnded(rank)).await;
    }
}

/// Ends an engine's tree, or only the child that fetches or checks.
#[derive(Debug, Default)]
pub struct End {
    tree: Option<(Tree, Leftovers)>,
}

/// Processes that not even SIGKILL has ended so far; empty when there are none.
pub type Stuck = Arc<Mutex<String>>;

impl End {
    /// Returns when nothing is left; names what stays meanwhile.
    pub async fn run(self, current: Current, stuck: Stuck, spawner: Spawner) {
        current.end().await;
        let Some((tree, leftovers)) = self.tree else { return };
        loop {
            let mut left = tree.kill(KILL_ROUND).await;
            // What fled session, parent, environment and group came to us as an orphan.
            let orphans = spawner.adopted();
            for orphan in &orphans {
                if let Some(handle) = proc::open(orphan.pid, orphan.start_time) {
                    let _ = proc::signal(handle, Signal::KILL);
                }
            }
            let nobody = left.is_empty() && orphans.is_empty();
            left.extend(orphans);
            *stuck.lock().unwrap_or_else(PoisonError::into_inner) = names(&left);
            if nobody {
                break;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        // Files and a look at every process's maps: not on a worker of the runtime.
        let sweep = move || {
            tree.tidy();
            leftovers.sweep()
        };
        let swept = tokio::task::spawn_blocking(sweep).await.unwrap_or_default();
        tracing::debug!("removed {} leftovers of the engine", swept.len());
    }
}
