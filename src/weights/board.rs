//! What the streams of one fetch tell each other and the one who reports: bytes a file, a hub that asks for a pause,
//! and when anything was last gained. Counters only; no I/O.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::plan::{Action, RemoteFile};
use super::progress::{FileProgress, Meter, Progress};

/// Most a stream waits beyond the hub's pause, so that not all of them knock at once.
const SCATTER_MS: u64 = 250;

#[derive(Debug)]
pub struct Board {
    files: Mutex<Vec<Arc<FileBoard>>>,
    /// No request to the hub before this.
    open_at: Mutex<Instant>,
    gained: Mutex<Instant>,
    notes: mpsc::Sender<(String, String)>,
}

#[derive(Debug)]
struct FileBoard {
    name: String,
    size: u64,
    done: AtomicU64,
    /// Bytes read to prove a file that was there.
    proved: Arc<AtomicU64>,
    to_prove: AtomicU64,
    /// How many tasks are at it just now.
    shown: AtomicU64,
}

/// One file's place on the board.
#[derive(Debug, Clone)]
pub struct Slot {
    file: Arc<FileBoard>,
    board: Arc<Board>,
}

/// While it lives, the file is among those shown.
#[derive(Debug)]
pub struct Shown(Arc<FileBoard>);

impl Drop for Shown {
    fn drop(&mut self) {
        self.0.shown.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Board {
    pub fn new(notes: mpsc::Sender<(String, String)>) -> Self {
        let now = Instant::now();
        Self { files: Mutex::default(), open_at: Mutex::new(now), gained: Mutex::new(now), notes }
    }

    pub fn slot(self: &Arc<Self>, remote: &RemoteFile, action: Action) -> Slot {
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
            shown: AtomicU64::new(0),
        });
        locked(&self.files).push(file.clone());
        Slot { file, board: self.clone() }
    }

    pub fn done(&self) -> u64 {
        locked(&self.files).iter().map(|f| f.done.load(Ordering::Relaxed)).sum()
    }

    pub fn total(&self) -> u64 {
        locked(&self.files).iter().map(|f| f.size).sum()
    }

    /// The report of this moment.
    pub fn bytes(&self, meter: &mut Meter) -> Progress {
        let now = Instant::now();
        let done = self.done();
        meter.note(now, done, self.read());
        let (rate_bytes_per_s, eta_seconds, pace) = meter.read(now, done);
        let files = locked(&self.files)
            .iter()
            .filter(|f| f.shown.load(Ordering::Relaxed) > 0 && f.done.load(Ordering::Relaxed) < f.size)
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
        locked(&self.files).iter().map(|f| f.proved.load(Ordering::Relaxed)).sum()
    }

    /// How far the reading of what was there is; none: nothing is read.
    pub fn verifying(&self) -> Option<Progress> {
        let files = locked(&self.files);
        let at_it = |f: &&Arc<FileBoard>| {
            let read = f.proved.load(Ordering::Relaxed);
            f.shown.load(Ordering::Relaxed) > 0 && read < f.to_prove.load(Ordering::Relaxed)
        };
        let file = files.iter().find(at_it)?.name.clone();
        let done = files.iter().map(|f| f.proved.load(Ordering::Relaxed)).sum();
        let total = files.iter().map(|f| f.to_prove.load(Ordering::Relaxed)).sum();
        Some(Progress::Verifying { done, total, file })
    }

    /// Somebody else holds the file's lock.
    pub fn waiting(&self, file: &str, holder: &str) {
        // A full channel means that nobody reads just now; the bar says enough.
        let _ = self.notes.try_send((file.to_owned(), holder.to_owned()));
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
    pub fn get(&self) -> u64 {
        self.file.done.load(Ordering::Relaxed)
    }

    pub fn set(&self, done: u64) {
        if self.file.done.swap(done, Ordering::Relaxed) < done {
            self.gain();
        }
    }

    pub fn add(&self, bytes: u64) {
        self.file.done.fetch_add(bytes, Ordering::Relaxed);
        self.gain();
    }

    fn gain(&self) {
        *locked(&self.board.gained) = Instant::now();
    }

    /// The counter of a reading that proves this file.
    pub fn verifying(&self) -> Arc<AtomicU64> {
        self.file.proved.store(0, Ordering::Relaxed);
        self.file.to_prove.store(self.file.size, Ordering::Relaxed);
        self.file.proved.clone()
    }

    pub fn shown(&self) -> Shown {
        self.file.shown.fetch_add(1, Ordering::Relaxed);
        Shown(self.file.clone())
    }
}

/// Counters stay true whatever thread died holding them.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn h03_one_streams_pause_holds_all_and_the_longest_wins() {
        let board = Board::new(mpsc::channel(1).0);
        board.hold_hub(Duration::from_secs(20));
        board.hold_hub(Duration::from_secs(1));
        let begun = Instant::now();
        board.hub_open().await;
        let waited = begun.elapsed();
        assert!(waited >= Duration::from_secs(20) && waited < Duration::from_secs(21), "{waited:?}");
    }
}
