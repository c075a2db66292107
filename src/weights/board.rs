//! What the streams of one fetch tell each other and the one who reports: bytes a file, a hub that asks for a pause,
//! and when anything was last gained. Counters only; no I/O.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::plan::{Action, FetchPlan, RemoteFile};
use super::progress::{FileProgress, Meter, Progress};

/// Most a stream waits beyond the hub's pause, so that not all of them knock at once.
const SCATTER_MS: u64 = 250;

#[derive(Debug)]
pub struct Board {
    total: u64,
    done: AtomicU64,
    /// Bytes that were there and are read once, and how many of finished files were.
    to_prove: AtomicU64,
    proved: AtomicU64,
    /// Those that somebody is at just now: a repository may have 100,000.
    files: Mutex<Vec<Arc<FileBoard>>>,
    begun: watch::Sender<Begun>,
    /// No request to the hub before this.
    open_at: Mutex<Instant>,
    gained: Mutex<Instant>,
    notes: mpsc::Sender<(String, String)>,
}

/// Whether a file waits that nobody is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    Some,
    All,
}

#[derive(Debug)]
struct FileBoard {
    name: String,
    size: u64,
    done: AtomicU64,
    /// Bytes read to prove a file that was there.
    proved: Arc<AtomicU64>,
    to_prove: AtomicU64,
}

/// One file's place on the board.
#[derive(Debug, Clone)]
pub struct Slot {
    file: Arc<FileBoard>,
    board: Arc<Board>,
}

/// While it lives, the file is among those shown.
#[derive(Debug)]
pub struct Shown(Slot);

impl Drop for Shown {
    fn drop(&mut self) {
        let Slot { file, board } = &self.0;
        locked(&board.files).retain(|other| !Arc::ptr_eq(other, file));
        board.proved.fetch_add(file.proved.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl Board {
    pub fn new<'a>(notes: mpsc::Sender<(String, String)>, plans: impl Iterator<Item = &'a FetchPlan>) -> Self {
        let now = Instant::now();
        let (mut total, mut done, mut to_prove) = (0, 0, 0);
        for plan in plans {
            total += plan.bytes_total();
            done += plan.bytes_present();
            to_prove += plan.files.iter().filter(|f| f.action == Action::Verify).map(|f| f.file.size).sum::<u64>();
        }
        Self {
            total,
            done: AtomicU64::new(done),
            to_prove: AtomicU64::new(to_prove),
            proved: AtomicU64::new(0),
            files: Mutex::default(),
            begun: watch::Sender::new(Begun::Some),
            open_at: Mutex::new(now),
            gained: Mutex::new(now),
            notes,
        }
    }

    /// Somebody is at this file from now on, until the second one is dropped.
    pub fn slot(self: &Arc<Self>, remote: &RemoteFile, action: Action) -> (Slot, Shown) {
        let done = match action {
            Action::Keep | Action::Verify => remote.size,
            Action::Fetch { from } => from,
        };
        let file = Arc::new(FileBoard {
            name: remote.name.clone(),
            size: remote.size,
            done: AtomicU64::new(done),
            proved: Arc::default(),
            to_prove: AtomicU64::new(if action == Action::Verify { remote.size } else { 0 }),
        });
        locked(&self.files).push(file.clone());
        let slot = Slot { file, board: self.clone() };
        (slot.clone(), Shown(slot))
    }

    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    /// The report of this moment.
    pub fn bytes(&self, meter: &mut Meter) -> Progress {
        let now = Instant::now();
        let done = self.done();
        meter.note(now, done, self.read());
        let (rate_bytes_per_s, eta_seconds, pace) = meter.read(now, done);
        let files = locked(&self.files)
            .iter()
            .filter(|f| f.done.load(Ordering::Relaxed) < f.size)
            .map(|f| FileProgress { name: f.name.clone(), done: f.done.load(Ordering::Relaxed), total: f.size })
            .collect();
        Progress::Bytes { done, total: self.total(), rate_bytes_per_s, eta_seconds, pace, files }
    }

    /// What is to be said now: what is read and proved, what is fetched, or both.
    pub fn reports(&self, meter: &mut Meter) -> impl Iterator<Item = Progress> {
        let bytes = self.bytes(meter);
        let fetching = matches!(&bytes, Progress::Bytes { files, .. } if !files.is_empty());
        let verifying = self.verifying();
        // Where all that happens is reading, all bytes are there and "100 % fetched" says nothing.
        let bytes = (fetching || verifying.is_none()).then_some(bytes);
        verifying.into_iter().chain(bytes)
    }

    /// Bytes read so far to prove what was there.
    fn read(&self) -> u64 {
        let now: u64 = locked(&self.files).iter().map(|f| f.proved.load(Ordering::Relaxed)).sum();
        self.proved.load(Ordering::Relaxed) + now
    }

    /// How far the reading of what was there is; none: nothing is read.
    pub fn verifying(&self) -> Option<Progress> {
        let files = locked(&self.files);
        let read = |f: &FileBoard| f.proved.load(Ordering::Relaxed);
        let file = files.iter().find(|f| read(f) < f.to_prove.load(Ordering::Relaxed))?.name.clone();
        let done = self.proved.load(Ordering::Relaxed) + files.iter().map(|f| read(f)).sum::<u64>();
        Some(Progress::Verifying { done, total: self.to_prove.load(Ordering::Relaxed), file })
    }

    /// Somebody else holds the file's lock.
    pub fn waiting(&self, file: &str, holder: &str) {
        // A full channel means that nobody reads just now; the bar says enough.
        let _ = self.notes.try_send((file.to_owned(), holder.to_owned()));
    }

    /// No file waits any more: what is free now may help where others are at it.
    pub fn all_begun(&self) {
        self.begun.send_replace(Begun::All);
    }

    /// Passes when no file waits that nobody is at.
    pub async fn until_all_begun(&self) {
        // The sender is ours and lives as long as we do.
        let _ = self.begun.subscribe().wait_for(|begun| *begun == Begun::All).await;
    }

    /// Passes when the hub may be asked.
    pub async fn hub_open(&self) {
        loop {
            let at = *locked(&self.open_at);
            if at <= Instant::now() {
                return;
            }
            sleep_until(at + Duration::from_millis(rand::random_range(0..=SCATTER_MS))).await;
        }
    }

    /// Nobody asks the hub for this long; a longer pause that is on already stays.
    pub fn hold_hub(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut at = locked(&self.open_at);
        *at = (*at).max(until);
    }

    /// Since anything was gained by any file.
    pub fn since_gain(&self) -> Duration {
        locked(&self.gained).elapsed()
    }
}

impl Slot {
    pub fn set(&self, done: u64) {
        let before = self.file.done.swap(done, Ordering::Relaxed);
        // Wraps where the file lost bytes: the sum is right all the same.
        self.board.done.fetch_add(done.wrapping_sub(before), Ordering::Relaxed);
        if before < done {
            self.gain();
        }
    }

    pub fn add(&self, bytes: u64) {
        self.file.done.fetch_add(bytes, Ordering::Relaxed);
        self.board.done.fetch_add(bytes, Ordering::Relaxed);
        self.gain();
    }

    fn gain(&self) {
        *locked(&self.board.gained) = Instant::now();
    }

    /// The counter of a reading that proves this file.
    pub fn verifying(&self) -> Arc<AtomicU64> {
        self.file.proved.store(0, Ordering::Relaxed);
        let before = self.file.to_prove.swap(self.file.size, Ordering::Relaxed);
        self.board.to_prove.fetch_add(self.file.size - before, Ordering::Relaxed);
        self.file.proved.clone()
    }
}

/// Counters stay true whatever thread died holding them.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::plan::{Hash, Transport};

    fn board() -> Arc<Board> {
        Arc::new(Board::new(mpsc::channel(1).0, std::iter::empty()))
    }

    #[tokio::test(start_paused = true)]
    async fn h03_one_streams_pause_holds_all_and_the_longest_wins() {
        let board = board();
        board.hold_hub(Duration::from_secs(20));
        board.hold_hub(Duration::from_secs(1));
        let begun = Instant::now();
        board.hub_open().await;
        let waited = begun.elapsed();
        assert!(waited >= Duration::from_secs(20) && waited < Duration::from_secs(21), "{waited:?}");
    }

    #[tokio::test]
    async fn h13_a_file_is_on_the_board_only_while_somebody_is_at_it_and_its_bytes_stay_counted() {
        let board = board();
        let remote = RemoteFile { name: "a".into(), size: 100, hash: Hash::Unknown, transport: Transport::Http };
        let (slot, shown) = board.slot(&remote, Action::Fetch { from: 0 });
        slot.add(60);
        slot.set(0);
        slot.add(100);
        slot.verifying().store(100, Ordering::Relaxed);
        assert_eq!(locked(&board.files).len(), 1);
        drop(shown);
        assert_eq!((locked(&board.files).len(), board.done()), (0, 100));
        assert_eq!(board.proved.load(Ordering::Relaxed), board.to_prove.load(Ordering::Relaxed));
    }
}
