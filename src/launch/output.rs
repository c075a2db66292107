//! Drains the engine's standard output and error, always: an engine whose pipe is full stands still.
//!
//! Each line goes to the log with its rank, each fact to the supervisor, and the last lines are kept
//! to say why it died. Nothing here blocks on a slow reader: the log writer is a bounded ring of its
//! own, facts about single batches are dropped when the supervisor is behind.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::engine::log::{Fact, Level, Rank, Signature, Splitter, parse};
use crate::engine::remarks::{Expected, Figures, Remark};

/// Lines kept for the cause of death: a Python traceback of eight ranks is some 300 lines.
const TAIL_LINES: usize = 400;
/// Bytes kept of each of them.
const TAIL_LINE: usize = 1024;
/// Signatures kept; a flood of one says no more than its first hundred.
const MAX_SIGNATURES: usize = 128;
/// One read. Linux pipes hold 64 KiB.
const READ: usize = 64 << 10;
/// Lines logged in one second; more are counted and dropped. A start logs some hundred a second.
const LINES_A_SECOND: u32 = 2_000;
/// How long a fact that must not be lost may wait for a busy supervisor.
const FACT_PATIENCE: Duration = Duration::from_secs(5);

/// What the engine said, as the supervisor needs it.
#[derive(Debug, Clone, PartialEq)]
pub struct Said {
    pub rank: Option<Rank>,
    pub fact: Fact,
}

/// What is remembered of an engine's output while it lives and after.
#[derive(Debug)]
pub struct Heard {
    since: Instant,
    /// When the last "Prefill batch" or "Decode batch" line came, in milliseconds after `since`, plus 1.
    last_batch: AtomicU64,
    tail: Mutex<VecDeque<Vec<u8>>>,
    /// What the log said of failures, oldest first; the first ones count, so it does not roll.
    signatures: Mutex<Vec<Signature>>,
    figures: Mutex<Figures>,
}

impl Heard {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            last_batch: AtomicU64::new(0),
            tail: Mutex::default(),
            signatures: Mutex::default(),
            figures: Mutex::default(),
        }
    }

    /// How long ago a batch was last finished; none: never.
    pub fn last_batch(&self) -> Option<Duration> {
        let at = self.last_batch.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.since.elapsed().saturating_sub(Duration::from_millis(at)))
    }

    /// The last lines, oldest first.
    pub fn tail(&self) -> Vec<Vec<u8>> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// What the log said of failures, oldest first.
    pub fn signatures(&self) -> Vec<Signature> {
        self.signatures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What its figures say that nobody meant.
    pub fn remarks(&self, expected: &Expected) -> Vec<Remark> {
        self.figures.lock().unwrap_or_else(PoisonError::into_inner).remarks(expected)
    }

    fn blame(&self, signature: Signature) {
        let mut signatures = self.signatures.lock().unwrap_or_else(PoisonError::into_inner);
        if signatures.len() < MAX_SIGNATURES {
            signatures.push(signature);
        }
    }

    fn keep(&self, line: &[u8]) {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(line[..line.len().min(TAIL_LINE)].to_vec());
    }
}

/// Reads both pipes until they end. The task ends with the last process that holds them.
pub fn drain(
    streams: Vec<OwnedFd>,
    secrets: Vec<String>,
    facts: &mpsc::Sender<Said>,
) -> std::io::Result<(Arc<Heard>, Vec<JoinHandle<()>>)> {
    let heard = Arc::new(Heard::new());
    let secrets = Arc::new(secrets);
    let mut readers = Vec::new();
    for stream in streams {
        let pipe = pipe::Receiver::from_owned_fd(stream)?;
        readers.push(tokio::spawn(read(pipe, Arc::clone(&heard), Arc::clone(&secrets), facts.clone())));
    }
    Ok((heard, readers))
}

async fn read(mut pipe: pipe::Receiver, heard: Arc<Heard>, secrets: Arc<Vec<String>>, facts: mpsc::Sender<Said>) {
    let mut buffer = vec![0; READ];
    let mut splitter = Splitter::new();
    let mut rate = Rate::new();
    let mut urgent = Vec::new();
    loop {
        let n = match pipe.read(&mut buffer).await {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        splitter.push(&buffer[..n], |line| {
            one(line.bytes, line.dropped, &heard, &secrets, &facts, &mut rate, &mut urgent);
        });
        tell(&facts, &mut urgent).await;
    }
    splitter.finish(|line| one(line.bytes, line.dropped, &heard, &secrets, &facts, &mut rate, &mut urgent));
    tell(&facts, &mut urgent).await;
}

/// Facts that must arrive, within reason: a supervisor that is stuck must not stop the draining.
async fn tell(facts: &mpsc::Sender<Said>, urgent: &mut Vec<Said>) {
    for said in urgent.drain(..) {
        let _ = facts.send_timeout(said, FACT_PATIENCE).await;
    }
}

fn one(
    bytes: &[u8],
    dropped: u64,
    heard: &Heard,
    secrets: &[String],
    facts: &mpsc::Sender<Said>,
    rate: &mut Rate,
    urgent: &mut Vec<Said>,
) {
    let line = parse(bytes);
    let text = redacted(&line.message, secrets);
    let rank = line.rank;
    heard.keep(text.as_bytes());
    if let Some(fact) = line.fact {
        let said = Said { rank, fact };
        if matches!(said.fact, Fact::PrefillBatch { .. } | Fact::DecodeBatch { .. } | Fact::SchedulerReady) {
            heard.figures.lock().unwrap_or_else(PoisonError::into_inner).observe(said.fact, &line.message);
        }
        if let Fact::Fatal(signature) = said.fact {
            heard.blame(signature);
        }
        if matches!(said.fact, Fact::PrefillBatch { .. } | Fact::DecodeBatch { .. }) {
            let at = heard.since.elapsed().as_millis() as u64 + 1;
            heard.last_batch.store(at, Ordering::Relaxed);
        } else if matches!(said.fact, Fact::Ready | Fact::Fatal(_)) {
            urgent.push(said);
        } else {
            // A phase that is not noticed is noticed by the next one.
            let _ = facts.try_send(said);
        }
    }
    if !rate.passes() {
        return;
    }
    if dropped > 0 {
        tracing::warn!(target: "engine", "a line was cut, {dropped} bytes dropped");
    }
    let rank = rank.map(|r| r.to_string()).unwrap_or_default();
    let gap = if rank.is_empty() { "" } else { " " };
    match line.level {
        _ if is_own_question(&line.message) => tracing::debug!(target: "engine", rank, "engine{gap}{rank}: {text}"),
        Level::Debug => tracing::debug!(target: "engine", rank, "engine{gap}{rank}: {text}"),
        Level::Info => tracing::info!(target: "engine", rank, "engine{gap}{rank}: {text}"),
        Level::Warning => tracing::warn!(target: "engine", rank, "engine{gap}{rank}: {text}"),
        Level::Error => tracing::error!(target: "engine", rank, "engine{gap}{rank}: {text}"),
    }
}

/// Access lines of our own polling: ten a second while it warms up.
fn is_own_question(message: &[u8]) -> bool {
    [&b"\"GET /ready HTTP"[..], b"\"GET /health HTTP", b"\"GET /ping HTTP", b"\"GET /v1/loads", b"\"GET /metrics HTTP"]
        .iter()
        .any(|question| memchr::memmem::find(message, question).is_some())
}

fn redacted(message: &[u8], secrets: &[String]) -> String {
    let mut text = String::from_utf8_lossy(message).into_owned();
    for secret in secrets {
        if text.contains(secret.as_str()) {
            text = text.replace(secret.as_str(), "(redacted)");
        }
    }
    text.retain(|c| !c.is_control() || c == '\t');
    text
}

/// A budget of lines a second.
struct Rate {
    since: Instant,
    passed: u32,
    dropped: u64,
}

impl Rate {
    fn new() -> Self {
        Self { since: Instant::now(), passed: 0, dropped: 0 }
    }

    fn passes(&mut self) -> bool {
        if self.since.elapsed() >= Duration::from_secs(1) {
            if self.dropped > 0 {
                tracing::warn!(target: "engine", "{} lines of the engine were not logged: more than {LINES_A_SECOND} a second", self.dropped);
            }
            *self = Self::new();
        }
        self.passed += 1;
        if self.passed > LINES_A_SECOND {
            self.dropped += 1;
        }
        self.passed <= LINES_A_SECOND
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[tokio::test]
    async fn facts_arrive_and_keys_do_not() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let (tx, mut rx) = mpsc::channel(8);
        let (heard, readers) = drain(vec![reader.into()], vec!["k3y".into()], &tx).expect("drained");
        let mut writer = writer;
        writer.write_all(b"[2026-11-23 14:49:03 TP0] key is k3y\n[2026-11-23 14:49:04] The server is fired up and ready to roll!\n").expect("written");
        drop(writer);
        for reader in readers {
            reader.await.expect("no panic");
        }
        assert_eq!(rx.recv().await.map(|said| said.fact), Some(Fact::Ready));
        let tail = heard.tail();
        assert_eq!(String::from_utf8_lossy(&tail[0]), "key is (redacted)");
    }

    #[tokio::test]
    async fn g16_closed_pipes_end_the_task() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(writer);
        let (tx, _rx) = mpsc::channel(8);
        let (_, readers) = drain(vec![reader.into()], Vec::new(), &tx).expect("drained");
        for reader in readers {
            tokio::time::timeout(Duration::from_secs(5), reader).await.expect("no busy loop").expect("no panic");
        }
    }
}
