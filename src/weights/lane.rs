//! One connection of a fetch: piece after piece of a file, attempt after attempt where the last one broke, until none is
//! left or patience ends. Which files and how many connections is not decided here.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until};

use super::board::Slot;
use super::content::{Ask, Found};
use super::drivers::Steps;
use super::error::FetchError;
use super::hub::{ByteStream, Fault, Scope};
use super::plan::{RemoteFile, Transport};
use super::ranges::Pieces;
use super::transfer::{Repo, backoff, off_runtime};
use super::write::Partial;
use super::writer::Writer;

/// Answers without the range asked for, before the whole file is asked for. One may be a cache's mistake.
const IGNORED_RANGES: u32 = 2;
/// Longest stand-still of a xet stream, in stalls of one connection: xet watches its connections itself (each by the
/// same limit) and hands out bytes block by block.
const XET_STALLS: u32 = 4;
/// Attempts in a row that bring nothing from the xet store before it is left alone.
const XET_FRUITLESS: u32 = 2;
/// Bytes that the network brought and that do not fill a step lie in memory at most about this long.
const HOLD: Duration = Duration::from_secs(1);

/// Where a piece comes from.
#[derive(Clone, Copy)]
enum Way<'a> {
    Http,
    /// The store's name for the file.
    Xet(&'a str),
}

/// One file while its bytes come.
#[derive(Debug)]
pub struct Work {
    pub repo: Arc<Repo>,
    pub file: RemoteFile,
    pub slot: Slot,
    pub partial: Arc<Partial>,
    pub pieces: Mutex<Pieces>,
    pub ask: Ask,
    pub found: Arc<Found>,
    /// Answers so far without the range that was asked for.
    pub ignored: AtomicU32,
}

/// Why the last attempt did not do, for the message at the end.
#[derive(Debug)]
struct Attempts {
    fruitless: u32,
    made: u32,
    scope: Scope,
}

impl Work {
    fn take(&self) -> Option<Range<u64>> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub fn has_more(&self) -> bool {
        !self.pieces.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    pub fn gives_up_ranges(&self) -> bool {
        self.ignored.load(Ordering::Relaxed) >= IGNORED_RANGES
    }

    /// One connection: piece after piece, until none is left.
    pub async fn lane(self: Arc<Self>, _place: OwnedSemaphorePermit, steps: Arc<Steps>) -> Result<(), FetchError> {
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
                    Ok(stream) => self.pump(way, &mut writer, piece.end, stream, &steps).await.map_err(disk)?.err(),
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
        stream: ByteStream,
        steps: &Steps,
    ) -> std::io::Result<Result<(), Fault>> {
        let received = self.receive(way, writer, end, stream, steps).await?;
        writer.flush().await?;
        Ok(received)
    }

    async fn receive(
        &self,
        way: Way<'_>,
        writer: &mut Writer,
        end: u64,
        mut stream: ByteStream,
        steps: &Steps,
    ) -> std::io::Result<Result<(), Fault>> {
        let stall = match way {
            Way::Http => self.repo.settings.patience.stall,
            Way::Xet(_) => self.repo.settings.patience.stall * XET_STALLS,
        };
        let mut last = Instant::now();
        // Rings now and then, whatever comes: to set a timer for each chunk costs more than to look at the time.
        let bell = sleep_until(last + stall.min(HOLD));
        tokio::pin!(bell);
        loop {
            let left = end - writer.at();
            let next = tokio::select! {
                biased;
                next = stream.next() => next,
                () = &mut bell => {
                    let now = Instant::now();
                    if now >= last + stall {
                        // Anew, and elsewhere if the hub names another place.
                        self.found.forget();
                        return Ok(Err(Fault::again(format!("stalled: no byte for {} s", stall.as_secs_f32()))));
                    }
                    writer.flush().await?;
                    bell.as_mut().reset((last + stall).min(now + HOLD));
                    continue;
                }
            };
            let mut chunk = match next {
                Some(Ok(chunk)) => chunk,
                Some(Err(fault)) => return Ok(Err(fault)),
                None if left > 0 => return Ok(Err(Fault::again(format!("the body ended {left} bytes early")))),
                None => return Ok(Ok(())),
            };
            if chunk.len() as u64 > left {
                return Ok(Err(Fault::again("more bytes than the file has")));
            }
            let length = chunk.len() as u64;
            self.repo.rate.take(length).await;
            while let Some(step) = writer.next(&mut chunk) {
                writer.put(steps.hash(step).await?).await?;
            }
            self.slot.add(length);
            last = Instant::now();
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
