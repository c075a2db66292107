//! One file from the hub into its blob: pieces of it over as many connections as are free, each a `lane`, until the bytes
//! are right or patience ends. Decides nothing about which files.
//!
//! ```text
//! bring ─► lock ─► there and right? ─► done
//!            └─► open what is left ─► fill (lanes take pieces, lowest first) ─► finish: hash, name
//!                                       ▲   └─ ranges are ignored: one lane, the whole file ─┤
//!                                       └──────────────── arrived wrong: anew ◄──────────────┘
//! ```

use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use rand::Rng;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::board::{Board, Slot};
use super::cache::RepoCache;
use super::content::{Ask, Found};
use super::direct_io::Blocks;
use super::drivers::Drivers;
use super::error::FetchError;
use super::hub::Hub;
use super::lane::Work;
use super::lock;
use super::plan::{RemoteFile, Transport};
use super::ranges::{Pieces, Ranges};
use super::rate::Rate;
use super::settings::Settings;
use super::verify;
use super::write::{Finished, Partial};
use super::xet::Xet;

/// One request's bytes: large enough that its round trip is nothing, small enough that several connections finish a
/// file together and that it is hashed out of the page cache.
const SMALLEST_PIECE: u64 = 8 << 20;
const LARGEST_PIECE: u64 = 64 << 20;
/// xet fetches in parallel within a stream, and asks for the plan of each anew.
const XET_PIECE: u64 = 1 << 30;

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
    pub drivers: Arc<Drivers>,
    /// Memory of writes past the page cache; none: they go through it.
    pub past_cache: Option<Arc<Blocks>>,
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
        let past = self.past_cache.clone();
        let partial = off_runtime(move || Partial::open(paths, &remote, past)).await.map_err(disk)?;
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
        let lane = |place| self.drivers.drive(|steps| work.clone().lane(place, steps));
        let mut lanes = FuturesUnordered::from_iter([lane(first)]);
        loop {
            tokio::select! {
                ended = lanes.next() => match ended {
                    None => break,
                    Some(Ok(outcome)) => outcome?,
                    // Dropping the others stops them where they are; what they wrote counts.
                    Some(Err(gone)) => {
                        let path = self.cache.blob(&file.hash);
                        return Err(FetchError::Disk { path, source: std::io::Error::other(gone) });
                    }
                },
                another = self.spare_place(), if work.has_more() => {
                    lanes.push(lane(another));
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

/// Doubles with each fruitless attempt; between half and all of it, so that eight streams do not knock together.
pub fn backoff(first: Duration, most: Duration, fruitless: u32) -> Duration {
    let whole = first.saturating_mul(1 << fruitless.saturating_sub(1).min(16)).min(most);
    whole.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// Runs what blocks where it may.
pub async fn off_runtime<T: Send + 'static>(
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
