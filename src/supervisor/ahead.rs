//! Has the shards read into memory while the engine's ranks start, by a process of its own (`sglangd read-ahead`).
//!
//! Not while the engine imports: whose files are not in memory either, and come in small pieces that wait behind the large
//! ones. Measured on an H100 with cold caches: 17 s of reading made 26 s of imports 45.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::loading::LONGEST_IMPORT;
use crate::config::Prefetch;
use crate::engine::env::Env;
use crate::launch::beside::Beside;
use crate::launch::spawner::Spawner;
use crate::sys::spawn::{Spec, Stream};
use crate::weights::ahead::{Ahead, Outcome, shards};
use crate::weights::bytes;

/// Less than this is read by the engine itself as fast as by anybody.
const WORTH_IT: u64 = 256 << 20;
/// Longest line it says: an outcome with the names of files that could not be read.
const MAX_LINE: u64 = 1 << 20;
/// What its pipe may take to close once it was killed.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The load formats that read the files through the page cache; others fetch or map them in ways of their own.
pub fn reads_files(load_format: Option<&str>) -> bool {
    !matches!(
        load_format,
        Some(
            "dummy"
                | "remote"
                | "remote_instance"
                | "runai_streamer"
                | "runai_streamer_sharded"
                | "flash_rl"
                | "private"
        )
    )
}

/// What is to be read, and how.
#[derive(Debug)]
pub struct Order {
    pub folders: Vec<PathBuf>,
    pub prefetch: Prefetch,
    pub env: Env,
}

/// The reading for one engine.
#[derive(Debug)]
pub struct Reading {
    /// Sent: the engine has imported. Dropped: nothing is to be read any more.
    begin: Option<oneshot::Sender<()>>,
    beside: Beside,
    task: JoinHandle<()>,
    over: bool,
}

impl Reading {
    /// To begin when it is told to, or when no engine imports any more.
    pub fn of(order: Order, spawner: Spawner, hear: mpsc::Sender<Ahead>) -> Self {
        let (begin, told) = oneshot::channel();
        let beside = Beside::default();
        let task = tokio::spawn({
            let beside = beside.clone();
            async move {
                if !matches!(timeout(LONGEST_IMPORT, told).await, Ok(Err(_))) {
                    run(order, spawner, beside, hear).await;
                }
            }
        });
        Self { begin: Some(begin), beside, task, over: false }
    }

    /// The engine has imported.
    pub fn begin(&mut self) {
        if let Some(begin) = self.begin.take() {
            // It began by itself.
            let _ = begin.send(());
        }
    }

    pub fn is_over(&self) -> bool {
        self.over
    }

    /// The engine has its weights, or is gone.
    pub fn stop(&mut self) {
        if !std::mem::replace(&mut self.over, true) {
            self.begin = None;
            let beside = self.beside.clone();
            tokio::spawn(async move { beside.end().await });
        }
    }

    /// Returns when nothing of it is left.
    pub async fn end(self) {
        drop(self.begin);
        self.beside.end().await;
        // Only a process that hangs in the kernel keeps its pipe open now.
        let _ = timeout(LAST_WORDS, self.task).await;
    }
}

/// Starts it and hears how far it is until it ends.
async fn run(order: Order, spawner: Spawner, beside: Beside, hear: mpsc::Sender<Ahead>) {
    let Order { folders, prefetch, env } = order;
    let always = prefetch == Prefetch::Always;
    if !always {
        let looked = folders.clone();
        let size = move || looked.iter().flat_map(|f| shards(f).unwrap_or_default()).map(|s| s.bytes).sum::<u64>();
        // A folder on a disk that hangs: the engine will say so.
        if tokio::task::spawn_blocking(size).await.unwrap_or(0) < WORTH_IT {
            return;
        }
    }
    let words = std::iter::once(OsString::from("read-ahead"))
        .chain(always.then(|| "--always".into()))
        .chain(folders.into_iter().map(OsString::from));
    let spec = Spec { stdout: Stream::Piped, ..Spec::ourselves(words, env) };
    let (mut child, end) = match spawner.spawn(spec).await {
        Ok(started) => started,
        Err(error) => return tracing::warn!("the shards are not read ahead: {error}"),
    };
    beside.add("the reading ahead of the shards", child.pidfd, end, None).await;
    let stdout = child.stdout.take().map(|stdout| pipe::Receiver::from_owned_fd(stdout.into()));
    let Some(Ok(stdout)) = stdout else { return };
    let mut lines = BufReader::new(stdout);
    let mut line = Vec::new();
    // Its end, by itself or by us, is the pipe's.
    while (&mut lines).take(MAX_LINE).read_until(b'\n', &mut line).await.is_ok_and(|n| n > 0) {
        if let Ok(ahead) = serde_json::from_slice(&line) {
            // The supervisor is gone, and so are we soon.
            let _ = hear.send(ahead).await;
        }
        line.clear();
    }
}

/// What it came to, as a line of the log.
pub fn told(outcome: &Outcome) -> String {
    let Outcome { files, read, there, left, seconds, failed } = outcome;
    let rate = if *seconds > 0.0 { (*read as f64 / seconds) as u64 } else { 0 };
    // Writing to a String cannot fail.
    let mut text = format!("read {} of {files} weight files ahead in {seconds:.1} s ({}/s)", bytes(*read), bytes(rate));
    if *there > 0 {
        let _ = write!(text, ", {} lay in memory already", bytes(*there));
    }
    if *left > 0 {
        let _ = write!(text, ", no room in memory for {}", bytes(*left));
    }
    if let Some(first) = failed.first() {
        let _ =
            write!(text, "; {} could not be read, the first {first}: this is the disk, not the engine", failed.len());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h16_what_reading_ahead_came_to_names_the_disk_where_it_failed() {
        let outcome = Outcome {
            files: 3,
            read: 2 << 30,
            there: 1 << 30,
            left: 4 << 30,
            seconds: 2.0,
            failed: vec!["/m/a: Stale file handle (os error 116)".into()],
        };
        assert_eq!(
            told(&outcome),
            "read 2.0 GiB of 3 weight files ahead in 2.0 s (1.0 GiB/s), 1.0 GiB lay in memory already, no room in memory for \
             4.0 GiB; 1 could not be read, the first /m/a: Stale file handle (os error 116): this is the disk, not the engine"
        );
    }

    #[test]
    fn formats_that_read_no_files_are_left_alone() {
        assert!(reads_files(None) && reads_files(Some("auto")) && reads_files(Some("safetensors")));
        assert!(!reads_files(Some("dummy")) && !reads_files(Some("runai_streamer")));
    }
}
