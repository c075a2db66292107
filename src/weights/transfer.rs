//! One file from the hub into its blob: attempt after attempt, each going on where the last one broke,
//! until the bytes are right or patience ends. Decides nothing about which files.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::split_id;
use rand::Rng;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::board::{Board, Slot};
use super::cache::RepoCache;
use super::error::FetchError;
use super::hub::{ByteStream, Fault, Hub, Scope};
use super::lock;
use super::plan::{RemoteFile, Transport};
use super::settings::Settings;
use super::verify;
use super::write::{Finished, Partial};

/// Chunks between the network and the disk: enough that neither waits for a hiccup of the other, and at
/// some 16–64 KiB each no memory to speak of with eight files.
const CHUNKS: usize = 32;

/// All that the files of one repository share.
#[derive(Debug)]
pub struct Repo {
    pub id: String,
    pub commit: String,
    pub cache: RepoCache,
    pub hub: Hub,
    pub settings: Settings,
    pub board: Arc<Board>,
}

/// Why the last attempt did not do, for the message at the end.
#[derive(Debug)]
struct Attempts {
    fruitless: u32,
    made: u32,
    wrong: u32,
    scope: Scope,
}

impl Repo {
    /// Fetches `file` and gives it its name. Whoever else fetches it is waited for.
    pub async fn bring(&self, file: &RemoteFile, slot: &Slot) -> Result<(), FetchError> {
        let lock_path = self.cache.lock(&file.hash);
        let lock = lock::acquire(lock_path, |holder| self.board.waiting(&file.name, holder)).await?;
        // Another process may have finished it while this one waited.
        if self.keep_if_right(file, slot).await? {
            return Ok(());
        }
        match file.transport {
            Transport::Http => self.bring_ranges(file, slot).await,
            Transport::Xet => {
                // hf-hub takes the same lock itself.
                drop(lock);
                self.bring_xet(file, slot).await
            }
        }
    }

    /// Whether the file is there and right; what is there and wrong is removed.
    pub async fn keep_if_right(&self, file: &RemoteFile, slot: &Slot) -> Result<bool, FetchError> {
        let Some(path) = self.cache.whole(&self.commit, file) else { return Ok(false) };
        let got = self.hash(&path, file, slot).await?;
        if got.as_deref() == Some(file.hash.hex()) {
            slot.set(file.size);
            return Ok(true);
        }
        tracing::warn!(file = %file.name, path = %path.display(), "the cached file is not what the hub has: fetching it anew");
        self.cache.discard(&self.commit, file)?;
        slot.set(0);
        Ok(false)
    }

    /// The hash of what lies at `path`; none when its size alone is wrong.
    async fn hash(&self, path: &std::path::Path, file: &RemoteFile, slot: &Slot) -> Result<Option<String>, FetchError> {
        let disk = |source| FetchError::Disk { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(disk)?.len() != file.size {
            return Ok(None);
        }
        let (path_there, hash, size, read) = (path.to_owned(), file.hash.clone(), file.size, slot.verifying());
        off_runtime(move || verify::hash_file(&path_there, &hash, size, &read)).await.map_err(disk).map(Some)
    }

    async fn bring_ranges(&self, file: &RemoteFile, slot: &Slot) -> Result<(), FetchError> {
        let path = self.cache.incomplete(&file.hash);
        let blob = self.cache.blob(&file.hash);
        let disk = |source| FetchError::disk(&path, &file.name, source);
        let (opened, remote) = (path.clone(), file.clone());
        let mut partial = off_runtime(move || Partial::open(&opened, &remote)).await.map_err(disk)?;
        let mut attempts = Attempts { fruitless: 0, made: 0, wrong: 0, scope: Scope::Stream };
        let mut ranges = Ranges::Served;
        loop {
            slot.set(partial.len());
            if partial.is_whole() {
                let name = blob.clone();
                let (finished, begun) = off_runtime(move || partial.finish(&name)).await.map_err(disk)?;
                let Finished::Wrong { got } = finished else { return Ok(()) };
                partial = begun;
                attempts.wrong += 1;
                tracing::warn!(file = %file.name, %got, expected = file.hash.hex(), "arrived wrong: fetching it anew");
                if attempts.wrong >= self.settings.patience.corrupt {
                    return Err(FetchError::Corrupt {
                        repo: self.id.clone(),
                        file: file.name.clone(),
                        attempts: attempts.wrong,
                        expected: file.hash.hex().to_owned(),
                        got,
                    });
                }
                // A cache on the way that spoils ranges may serve the whole right.
                ranges = Ranges::Ignored;
                continue;
            }
            if ranges == Ranges::Ignored && partial.len() > 0 {
                partial = off_runtime(move || partial.restart().map(|()| partial)).await.map_err(disk)?;
                slot.set(0);
            }
            self.board.hub_open().await;
            let before = partial.len();
            attempts.made += 1;
            let fault = match self.hub.open(&self.id, &self.commit, file, before).await {
                Ok(stream) => {
                    let (back, pumped) = self.pump(partial, stream, slot).await;
                    partial = back.map_err(disk)?;
                    pumped.err()
                }
                Err(fault) => Some(fault),
            };
            let gained = partial.len() > before;
            match fault {
                None => {}
                Some(Fault::Fatal(error)) => return Err(error),
                Some(Fault::RangeIgnored) => {
                    tracing::warn!(file = %file.name, "the server ignores ranges: this file begins anew");
                    ranges = Ranges::Ignored;
                }
                Some(Fault::Again { cause, after, scope }) => {
                    attempts.scope = scope;
                    tracing::debug!(file = %file.name, at = partial.len(), %cause, "broken off");
                    self.wait(file, &mut attempts, gained, cause, after).await?;
                }
            }
        }
    }

    /// Moves bytes from the network to the disk until the stream ends, breaks or stalls. The file comes back
    /// in either case, with what arrived.
    async fn pump(
        &self,
        mut partial: Partial,
        mut stream: ByteStream,
        slot: &Slot,
    ) -> (std::io::Result<Partial>, Result<(), Fault>) {
        let (to_disk, mut from_net) = mpsc::channel::<Bytes>(CHUNKS);
        let mut room = partial.room();
        let writer = tokio::task::spawn_blocking(move || {
            while let Some(chunk) = from_net.blocking_recv() {
                partial.write(&chunk)?;
            }
            Ok(partial)
        });
        let stall = self.settings.patience.stall;
        let outcome = loop {
            match timeout(stall, stream.next()).await {
                Ok(Some(Ok(chunk))) => {
                    let Some(left) = room.checked_sub(chunk.len() as u64) else {
                        break Err(Fault::again("more bytes than the file has"));
                    };
                    room = left;
                    slot.add(chunk.len() as u64);
                    // The writer is gone only when the disk failed; its own error says how.
                    if to_disk.send(chunk).await.is_err() {
                        break Ok(());
                    }
                }
                Ok(Some(Err(fault))) => break Err(fault),
                Ok(None) if room > 0 => break Err(Fault::again(format!("the body ended {room} bytes early"))),
                Ok(None) => break Ok(()),
                Err(_) => break Err(Fault::again(format!("stalled: no byte for {} s", stall.as_secs_f32()))),
            }
        };
        drop(to_disk);
        let written = match writer.await {
            Ok(written) => written,
            Err(join) => Err(std::io::Error::other(join)),
        };
        (written, outcome)
    }

    /// Whole files through hf-hub's xet client, which writes, renames and links; verified here all the same.
    async fn bring_xet(&self, file: &RemoteFile, slot: &Slot) -> Result<(), FetchError> {
        let (owner, short) = split_id(&self.id);
        let model = self.hub.client().model(owner, short);
        let mut attempts = Attempts { fruitless: 0, made: 0, wrong: 0, scope: Scope::Stream };
        loop {
            self.board.hub_open().await;
            attempts.made += 1;
            let before = slot.get();
            let asked = model
                .download_file()
                .filename(&*file.name)
                .revision(self.commit.clone())
                .progress(XetProgress { slot: slot.clone(), size: file.size })
                .send();
            let asked = until_stalled(asked, slot, self.settings.patience.stall);
            let (cause, after) = match asked.await {
                Some(Ok(_)) => {
                    if self.keep_if_right(file, slot).await? {
                        return Ok(());
                    }
                    attempts.wrong += 1;
                    if attempts.wrong >= self.settings.patience.corrupt {
                        return Err(FetchError::Corrupt {
                            repo: self.id.clone(),
                            file: file.name.clone(),
                            attempts: attempts.wrong,
                            expected: file.hash.hex().to_owned(),
                            got: "other bytes".to_owned(),
                        });
                    }
                    ("arrived wrong".to_owned(), None)
                }
                Some(Err(hf_hub::HFError::CacheLockTimeout { path })) => {
                    // Its wait ends after 10 s; ours does not.
                    drop(lock::acquire(path, |holder| self.board.waiting(&file.name, holder)).await?);
                    continue;
                }
                Some(Err(hf_hub::HFError::Io(source))) => {
                    return Err(FetchError::disk(&self.cache.blob(&file.hash), &file.name, source));
                }
                Some(Err(error)) => match self.hub.fault(&self.id, &self.commit, error) {
                    Fault::Fatal(error) => return Err(error),
                    Fault::RangeIgnored => continue,
                    Fault::Again { cause, after, scope } => {
                        attempts.scope = scope;
                        (cause, after)
                    }
                },
                None => (format!("stalled: no byte for {} s", self.settings.patience.stall.as_secs_f32()), None),
            };
            let gained = slot.get() > before;
            self.wait(file, &mut attempts, gained, cause, after).await?;
        }
    }

    /// Waits before the next attempt, or says why there is none.
    async fn wait(
        &self,
        file: &RemoteFile,
        attempts: &mut Attempts,
        gained: bool,
        cause: String,
        after: Option<Duration>,
    ) -> Result<(), FetchError> {
        let patience = &self.settings.patience;
        attempts.fruitless = if gained { 0 } else { attempts.fruitless + 1 };
        let endpoint = || self.settings.endpoint.clone();
        if after.is_some_and(|after| after > patience.limit) {
            return Err(FetchError::RateLimited { endpoint: endpoint(), after });
        }
        if attempts.fruitless >= patience.attempts || self.board.since_gain() >= patience.limit {
            return Err(match attempts.scope {
                Scope::Network => FetchError::Unreachable { endpoint: endpoint(), cause },
                _ => {
                    FetchError::File { repo: self.id.clone(), file: file.name.clone(), attempts: attempts.made, cause }
                }
            });
        }
        let pause = match after {
            Some(after) => after,
            None => backoff(patience.backoff, patience.backoff_max, attempts.fruitless),
        };
        match attempts.scope {
            // A hub that is too busy for one file is too busy for all.
            Scope::Hub => self.board.hold_hub(pause),
            Scope::Stream | Scope::Network => tokio::time::sleep(pause).await,
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ranges {
    Served,
    Ignored,
}

/// Doubles with each fruitless attempt; between half and all of it, so that eight streams do not knock together.
pub fn backoff(first: Duration, most: Duration, fruitless: u32) -> Duration {
    let whole = first.saturating_mul(1 << fruitless.min(16)).min(most);
    whole.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// Runs what blocks where it may.
async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|join| Err(std::io::Error::other(join)))
}

/// Drives `work` as long as `slot` moves; none: it stood still for `limit`.
async fn until_stalled<T>(work: impl Future<Output = T>, slot: &Slot, limit: Duration) -> Option<T> {
    tokio::pin!(work);
    let mut seen = slot.get();
    let mut deadline = Instant::now() + limit;
    loop {
        tokio::select! {
            done = &mut work => return Some(done),
            () = sleep_until(deadline) => {
                let now = slot.get();
                if now == seen {
                    return None;
                }
                seen = now;
                deadline = Instant::now() + limit;
            }
        }
    }
}

/// hf-hub's progress, into ours.
struct XetProgress {
    slot: Slot,
    size: u64,
}

impl ProgressHandler for XetProgress {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        match event {
            DownloadEvent::Progress { files } => {
                for file in files {
                    self.slot.set(file.bytes_completed.min(self.size));
                }
            }
            DownloadEvent::AggregateProgress { bytes_completed, .. } => {
                self.slot.set((*bytes_completed).min(self.size));
            }
            DownloadEvent::Start { .. } | DownloadEvent::Complete => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h03_the_wait_doubles_with_jitter_and_is_bounded() {
        let (first, most) = (Duration::from_millis(500), Duration::from_secs(30));
        for n in 0..40 {
            let whole = first.saturating_mul(1 << n.min(16)).min(most);
            let pause = backoff(first, most, n);
            assert!(pause >= whole / 2 && pause <= whole, "{n}: {pause:?}");
        }
    }
}
