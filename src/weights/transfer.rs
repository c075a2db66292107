//! One file from the hub into its blob: pieces of it over as many connections as are free, each piece attempt after
//! attempt where the last one broke, until the bytes are right or patience ends. Decides nothing about which files.
//!
//! ```text
//! bring ─► lock ─► there and right? ─► done
//!            └─► open what is left ─► fill (lanes take pieces, lowest first) ─► finish: hash, name
//!                                       ▲   └─ ranges are ignored: one lane, the whole file ─┤
//!                                       └──────────────── arrived wrong: anew ◄──────────────┘
//! ```

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use rand::Rng;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::board::{Board, Slot};
use super::cache::RepoCache;
use super::content::{Ask, Found};
use super::error::FetchError;
use super::hub::{ByteStream, Fault, Hub, Scope};
use super::lock;
use super::plan::{RemoteFile, Transport};
use super::ranges::{Pieces, Ranges};
use super::rate::Rate;
use super::settings::Settings;
use super::verify;
use super::write::{Finished, Partial, Writer};
use super::xet::Xet;

/// One request's bytes: large enough that its round trip is nothing, small enough that several connections finish a
/// file together and that it is hashed out of the page cache.
const SMALLEST_PIECE: u64 = 8 << 20;
const LARGEST_PIECE: u64 = 64 << 20;
/// xet fetches in parallel within a stream, and asks for the plan of each anew.
const XET_PIECE: u64 = 1 << 30;
/// Answers without the range asked for, before the whole file is asked for. One may be a cache's mistake.
const IGNORED_RANGES: u32 = 2;
/// Longest stand-still of a xet stream, in stalls of one connection: xet watches its connections itself (each by the
/// same limit) and hands out bytes block by block.
const XET_STALLS: u32 = 4;

/// Attempts in a row that bring nothing from the xet store before it is left alone.
const XET_FRUITLESS: u32 = 2;

/// Where a piece comes from.
#[derive(Clone, Copy)]
enum Way<'a> {
    Http,
    /// The store's name for the file.
    Xet(&'a str),
}

/// All that the files of one repository share.
#[derive(Debug)]
pub struct Repo {
    pub id: String,
    pub commit: String,
    pub cache: RepoCache,
    pub hub: Hub,
    pub xet: Xet,
    pub settings: Settings,
    pub board: Arc<Board>,
    pub rate: Arc<Rate>,
    /// One for each connection.
    pub places: Arc<Semaphore>,
}

/// One file while its bytes come.
#[derive(Debug)]
struct Work {
    repo: Arc<Repo>,
    file: RemoteFile,
    slot: Slot,
    partial: Arc<Partial>,
    pieces: Mutex<Pieces>,
    ask: Ask,
    found: Arc<Found>,
    ignored: AtomicU32,
}

/// Why the last attempt did not do, for the message at the end.
#[derive(Debug)]
struct Attempts {
    fruitless: u32,
    made: u32,
    scope: Scope,
}

impl Repo {
    /// Fetches `file` and gives it its name. Whoever else fetches it is waited for.
    pub async fn bring(
        self: &Arc<Self>,
        file: &RemoteFile,
        slot: &Slot,
        place: OwnedSemaphorePermit,
    ) -> Result<(), FetchError> {
        let mut place = Some(place);
        let lock_path = self.cache.lock(&file.hash);
        let held = lock::acquire(lock_path, |holder| {
            self.board.waiting(&file.name, holder);
            // Who holds the lock may need this connection to finish: another name of the same content.
            place = None;
        });
        let _lock = held.await?;
        // Another process may have finished it while this one waited.
        if self.keep_if_right(file, slot).await? {
            return Ok(());
        }
        let paths = self.cache.growing(&file.hash);
        let (path, blob) = (paths.data.clone(), self.cache.blob(&file.hash));
        let disk = |source| FetchError::disk(&path, &file.name, source);
        let remote = file.clone();
        let partial = off_runtime(move || Partial::open(paths, &remote)).await.map_err(disk)?;
        let found = Arc::new(Found::default());
        let (mut ask, mut wrong) = (Ask::Range, 0);
        loop {
            slot.set(partial.have());
            while !partial.is_whole() {
                let first = match place.take() {
                    Some(place) => place,
                    None => self.place().await,
                };
                // What an earlier run left is hashed beside the network.
                partial.follow();
                ask = self.fill(file, slot, &partial, &found, ask, first).await?;
            }
            place = None;
            let Finished::Wrong { got } = partial.finish(&blob).await.map_err(disk)? else { return Ok(()) };
            wrong += 1;
            tracing::warn!(file = %file.name, %got, expected = file.hash.hex(), "arrived wrong: fetching it anew");
            if wrong >= self.settings.patience.corrupt {
                return Err(FetchError::Corrupt {
                    repo: self.id.clone(),
                    file: file.name.clone(),
                    attempts: wrong,
                    expected: file.hash.hex().to_owned(),
                    got,
                });
            }
            // Another host may have it right; then again, a cache on the way that spoils ranges may serve the whole right.
            found.forget();
            if wrong > 1 && file.transport == Transport::Http {
                ask = Ask::Whole;
            }
        }
    }

    async fn place(&self) -> OwnedSemaphorePermit {
        self.places.clone().acquire_owned().await.expect("the semaphore is never closed")
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

    /// Fetches all that is missing, or as much as there is before ranges turn out not to be served. Says how to ask on.
    async fn fill(
        self: &Arc<Self>,
        file: &RemoteFile,
        slot: &Slot,
        partial: &Arc<Partial>,
        found: &Arc<Found>,
        ask: Ask,
        first: OwnedSemaphorePermit,
    ) -> Result<Ask, FetchError> {
        let (gaps, piece) = match ask {
            Ask::Range => (partial.gaps(), self.piece(file)),
            Ask::Whole => (Ranges::default().gaps(file.size), file.size),
        };
        let work = Arc::new(Work {
            repo: self.clone(),
            file: file.clone(),
            slot: slot.clone(),
            partial: partial.clone(),
            pieces: Mutex::new(Pieces::new(gaps, piece)),
            ask,
            found: found.clone(),
            ignored: AtomicU32::new(0),
        });
        let mut lanes = JoinSet::new();
        lanes.spawn(work.clone().lane(first));
        loop {
            tokio::select! {
                ended = lanes.join_next() => match ended {
                    None => break,
                    Some(Ok(outcome)) => outcome?,
                    // Dropping the others stops them where they are; what they wrote counts.
                    Some(Err(join)) => {
                        let path = self.cache.blob(&file.hash);
                        return Err(FetchError::Disk { path, source: std::io::Error::other(join) });
                    }
                },
                another = self.spare_place(), if work.has_more() => {
                    lanes.spawn(work.clone().lane(another));
                }
            }
        }
        if ask == Ask::Range && work.gives_up_ranges() {
            tracing::warn!(file = %file.name, "the server ignores ranges: this file begins anew");
            return Ok(Ask::Whole);
        }
        Ok(ask)
    }

    /// A connection that no other file wants.
    async fn spare_place(&self) -> OwnedSemaphorePermit {
        self.board.until_all_begun().await;
        self.place().await
    }

    fn piece(&self, file: &RemoteFile) -> u64 {
        match file.transport {
            Transport::Http => {
                (file.size / (2 * self.settings.connections.max(1) as u64)).clamp(SMALLEST_PIECE, LARGEST_PIECE)
            }
            Transport::Xet { .. } => XET_PIECE,
        }
    }
}

impl Work {
    fn take(&self) -> Option<Range<u64>> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn has_more(&self) -> bool {
        !self.pieces.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    fn gives_up_ranges(&self) -> bool {
        self.ignored.load(Ordering::Relaxed) >= IGNORED_RANGES
    }

    /// One connection: piece after piece, until none is left.
    async fn lane(self: Arc<Self>, _place: OwnedSemaphorePermit) -> Result<(), FetchError> {
        let path = self.repo.cache.growing(&self.file.hash).data;
        let disk = |source| FetchError::disk(&path, &self.file.name, source);
        let mut attempts = Attempts { fruitless: 0, made: 0, scope: Scope::Stream };
        while let Some(piece) = self.take() {
            let mut best = piece.start;
            let mut writer = self.partial.writer(piece.start).map_err(disk)?;
            while writer.at() < piece.end {
                if self.ask == Ask::Range && self.gives_up_ranges() {
                    return Ok(());
                }
                if self.ask == Ask::Whole {
                    drop(writer);
                    let partial = self.partial.clone();
                    off_runtime(move || partial.restart()).await.map_err(disk)?;
                    self.slot.set(0);
                    writer = self.partial.writer(0).map_err(disk)?;
                }
                self.repo.board.hub_open().await;
                attempts.made += 1;
                let way = self.way();
                let fault = match self.open(way, writer.at()..piece.end).await {
                    Ok(stream) => self.pump(way, &mut writer, piece.end, stream).await.map_err(disk)?.err(),
                    Err(fault) => Some(fault),
                };
                // A whole file asked for again gains only what the earlier attempts did not have.
                let gained = writer.at() > best;
                best = best.max(writer.at());
                // What is there stays: the same bytes come by plain HTTP.
                if let (Way::Xet(_), Some(fault)) = (way, &fault)
                    && (attempts.fruitless >= XET_FRUITLESS || matches!(fault, Fault::Fatal(_)))
                {
                    self.repo.xet.give_up(&self.repo.id, &fault.to_string());
                    attempts.fruitless = 0;
                    continue;
                }
                match fault {
                    None => {}
                    Some(Fault::Fatal(error)) => return Err(error),
                    Some(Fault::RangeIgnored) => {
                        self.ignored.fetch_add(1, Ordering::Relaxed);
                    }
                    Some(Fault::Again { cause, after, scope }) => {
                        attempts.scope = scope;
                        tracing::debug!(file = %self.file.name, at = writer.at(), %cause, "broken off");
                        self.wait(&mut attempts, gained, cause, after).await?;
                    }
                }
            }
        }
        Ok(())
    }

    fn way(&self) -> Way<'_> {
        match &self.file.transport {
            Transport::Xet { hash } if self.repo.xet.is_of_use() => Way::Xet(hash),
            Transport::Xet { .. } | Transport::Http => Way::Http,
        }
    }

    async fn open(&self, way: Way<'_>, range: Range<u64>) -> Result<ByteStream, Fault> {
        let Repo { id, commit, hub, xet, .. } = &*self.repo;
        match way {
            Way::Http => hub.open(id, commit, &self.file, &self.found, range, self.ask).await,
            Way::Xet(hash) => xet.open(hub, id, commit, hash, self.file.size, range).await,
        }
    }

    /// Moves bytes from the network to the disk up to `end`, or until the stream ends, breaks or stalls.
    async fn pump(
        &self,
        way: Way<'_>,
        writer: &mut Writer,
        end: u64,
        mut stream: ByteStream,
    ) -> std::io::Result<Result<(), Fault>> {
        let stall = match way {
            Way::Http => self.repo.settings.patience.stall,
            Way::Xet(_) => self.repo.settings.patience.stall * XET_STALLS,
        };
        loop {
            let left = end - writer.at();
            let chunk = match timeout(stall, stream.next()).await {
                Ok(Some(Ok(chunk))) => chunk,
                Ok(Some(Err(fault))) => return Ok(Err(fault)),
                Ok(None) if left > 0 => return Ok(Err(Fault::again(format!("the body ended {left} bytes early")))),
                Ok(None) => return Ok(Ok(())),
                Err(_) => {
                    // Anew, and elsewhere if the hub names another place.
                    self.found.forget();
                    return Ok(Err(Fault::again(format!("stalled: no byte for {} s", stall.as_secs_f32()))));
                }
            };
            if chunk.len() as u64 > left {
                return Ok(Err(Fault::again("more bytes than the file has")));
            }
            self.repo.rate.take(chunk.len() as u64).await;
            writer.write(&chunk)?;
            self.slot.add(chunk.len() as u64);
        }
    }

    /// Waits before the next attempt, or says why there is none.
    async fn wait(
        &self,
        attempts: &mut Attempts,
        gained: bool,
        cause: String,
        after: Option<Duration>,
    ) -> Result<(), FetchError> {
        let repo = &self.repo;
        let patience = &repo.settings.patience;
        attempts.fruitless = if gained { 0 } else { attempts.fruitless + 1 };
        let endpoint = || repo.settings.endpoint.clone();
        if after.is_some_and(|after| after > patience.limit) {
            return Err(FetchError::RateLimited { endpoint: endpoint(), after });
        }
        if attempts.fruitless >= patience.attempts || repo.board.since_gain() >= patience.limit {
            return Err(match attempts.scope {
                Scope::Network => FetchError::Unreachable { endpoint: endpoint(), cause },
                _ => FetchError::File {
                    repo: repo.id.clone(),
                    file: self.file.name.clone(),
                    attempts: attempts.made,
                    cause,
                },
            });
        }
        let pause = match after {
            Some(after) => after,
            None => backoff(patience.backoff, patience.backoff_max, attempts.fruitless),
        };
        match attempts.scope {
            // A hub that is too busy for one file is too busy for all.
            Scope::Hub => repo.board.hold_hub(pause),
            // What just gave bytes is asked on at once.
            Scope::Stream if gained => {}
            Scope::Stream | Scope::Network => tokio::time::sleep(pause).await,
        }
        Ok(())
    }
}

/// Doubles with each fruitless attempt; between half and all of it, so that eight streams do not knock together.
pub fn backoff(first: Duration, most: Duration, fruitless: u32) -> Duration {
    let whole = first.saturating_mul(1 << fruitless.saturating_sub(1).min(16)).min(most);
    whole.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// Runs what blocks where it may.
async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|join| Err(std::io::Error::other(join)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h03_the_wait_doubles_with_jitter_and_is_bounded() {
        let (first, most) = (Duration::from_millis(500), Duration::from_secs(30));
        for n in 1..40 {
            let whole = first.saturating_mul(1 << (n - 1).min(16)).min(most);
            let pause = backoff(first, most, n);
            assert!(pause >= whole / 2 && pause <= whole, "{n}: {pause:?}");
        }
    }
}
