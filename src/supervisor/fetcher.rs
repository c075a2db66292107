//! What runs before the engine, as children: the check of the flags against the installed engine, and
//! `sglangd fetch`, the only process that holds the hub's token.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use super::cause::Cause;
use crate::exit::Exit;
use crate::launch::reaper::Ended;
use crate::launch::spawner::Spawner;
use crate::sys::proc;
use crate::sys::spawn::{Spec, Stream};
use crate::weights::{Progress, Request, Snapshot};

/// Longest line of progress; a plan of 100,000 files is one number, not a list.
const MAX_LINE: usize = 1 << 20;
/// What a child that is told to stop may take; a fetcher keeps its partial files within this.
const STOP_PATIENCE: Duration = Duration::from_millis(1_500);
/// Kept of what a failed check printed.
const MAX_OUTPUT: u64 = 64 << 10;

/// The child that runs at the moment, so that a stop can end it.
#[derive(Debug, Clone, Default)]
pub struct Current(Arc<Mutex<Child>>);

#[derive(Debug, Default)]
struct Child {
    handle: Option<OwnedFd>,
    /// Nothing is wanted any more: what is only now being started is ended at once.
    unwanted: bool,
}

impl Current {
    fn lock(&self) -> MutexGuard<'_, Child> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new start: its children are wanted.
    pub fn begin(&self) {
        self.lock().unwanted = false;
    }

    fn set(&self, handle: Option<OwnedFd>) {
        let mut child = self.lock();
        child.handle = handle;
        if let (Some(handle), true) = (&child.handle, child.unwanted) {
            // Gone already: as it is to be.
            let _ = proc::signal(handle.as_fd(), Signal::KILL);
        }
    }

    fn signal(&self, signal: Signal) -> bool {
        self.lock().handle.as_ref().is_some_and(|child| proc::signal(child.as_fd(), signal).is_ok())
    }

    fn is_running(&self) -> bool {
        self.lock().handle.is_some()
    }

    /// SIGTERM, then SIGKILL; returns when the child is gone. What starts after this is ended at once.
    pub async fn end(&self) {
        self.lock().unwanted = true;
        if !self.signal(Signal::TERM) {
            return;
        }
        let end = tokio::time::Instant::now() + STOP_PATIENCE;
        while self.is_running() {
            if tokio::time::Instant::now() >= end {
                self.signal(Signal::KILL);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Runs `sglangd plan --inspect` with the daemon's own arguments: asks the installed engine's parser
/// for its flags (some 20 s, no GPU) and caches the answer.
pub async fn inspect(
    spawner: &Spawner,
    current: &Current,
    arguments: Vec<OsString>,
    env: BTreeMap<OsString, OsString>,
) -> Result<(), Cause> {
    let words = ["plan", "--inspect"].into_iter().map(OsString::from).chain(arguments);
    let spec = Spec { stderr: Stream::Piped, ..Spec::ourselves(words, env) };
    let no_check = |error: io::Error| no_resources("the check of the engine's flags", &error);
    let (mut child, end) = spawner.spawn(spec).await.map_err(no_check)?;
    current.set(Some(child.pidfd));
    let mut said = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        let reader = pipe::Receiver::from_owned_fd(stderr.into()).map_err(no_check)?;
        // A broken pipe leaves what came before it.
        let _ = reader.take(MAX_OUTPUT).read_to_end(&mut said).await;
    }
    let how = end.await.unwrap_or(Ended::Exited(-1));
    current.set(None);
    match how {
        Ended::Exited(0) => Ok(()),
        Ended::Exited(code) if code == i32::from(Exit::Config.code()) => {
            let said = String::from_utf8_lossy(&said).trim().trim_start_matches("sglangd: ").to_owned();
            Err(Cause::never("bad_config", Exit::Config.code(), said, ""))
        }
        how => {
            // Not worth a start: the bundled table stands in, and the engine has the last word.
            tracing::warn!("the installed engine's flags could not be read ({how}); the bundled table is used");
            Ok(())
        }
    }
}

/// Brings everything the request names onto the disk.
pub async fn fetch(
    spawner: &Spawner,
    current: &Current,
    request: &Request,
    env: BTreeMap<OsString, OsString>,
    progress: &mpsc::Sender<Progress>,
) -> Result<Vec<Snapshot>, Cause> {
    let request = serde_json::to_string(request).expect("plain data");
    let (reader, writer) = io::pipe().map_err(|error| no_resources("a pipe", &error))?;
    let reader = pipe::Receiver::from_owned_fd(reader.into()).map_err(|error| no_resources("a pipe", &error))?;
    let number = writer.as_raw_fd().to_string();
    let words = ["fetch", "--progress-fd", &number, "--request", &request].map(OsString::from);
    // Its bars are drawn on our terminal, over the standard error that it shares with us.
    let spec = Spec { keep: vec![writer.as_raw_fd()], ..Spec::ourselves(words, env) };
    let (child, end) = spawner.spawn(spec).await.map_err(|error| no_resources("the fetcher", &error))?;
    drop(writer);
    current.set(Some(child.pidfd));
    let mut outcome: Option<Result<Vec<Snapshot>, Cause>> = None;
    let mut lines = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut lines).take(MAX_LINE as u64).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        match serde_json::from_slice::<Progress>(&line) {
            Ok(Progress::Done { snapshots }) => outcome = Some(Ok(snapshots)),
            Ok(Progress::Failed { class, retry_after_seconds, message }) => {
                outcome = Some(Err(failed(&class, retry_after_seconds, message)));
            }
            // A supervisor that is behind loses a step of the bar.
            Ok(step) => drop(progress.try_send(step)),
            Err(error) => tracing::warn!("the fetcher said something that was not understood: {error}"),
        }
    }
    let how = end.await.unwrap_or(Ended::Exited(-1));
    current.set(None);
    match (outcome, how) {
        (Some(Ok(snapshots)), Ended::Exited(0)) => Ok(snapshots),
        (Some(Err(cause)), _) => Err(cause),
        (_, how) => Err(Cause::passing(
            "fetcher_died",
            Exit::Weights.code(),
            format!("The fetcher ended without a result ({how})."),
            "What was fetched is kept; the next try goes on from there.",
        )),
    }
}

fn failed(class: &str, retry_after: Option<u64>, message: String) -> Cause {
    // Which failures may pass is the fetcher's knowledge; it says so by naming a time to wait.
    if retry_after.is_some() {
        Cause::passing("weights_unreachable", Exit::Weights.code(), message, "")
    } else {
        let class = if matches!(class, "no-space" | "disk-full" | "disk") { "disk" } else { "weights" };
        Cause::never(class, Exit::Weights.code(), message, "")
    }
}

fn no_resources(what: &str, error: &io::Error) -> Cause {
    let what = format!("{what} could not be started");
    Cause::of_a_limit(&what, error).unwrap_or_else(|| {
        let advice = "Look at the limits on processes, descriptors and memory (ulimit -a, pids.max).";
        Cause::passing("no_resources", Exit::Bug.code(), format!("{what}: {error}"), advice)
    })
}
