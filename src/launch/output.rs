//! Drains the engine's standard output and error, always: an engine whose pipe is full stands still.
//!
//! Each line goes to the log with its rank, each fact to the supervisor, and the last lines are kept
//! to say why it died. Nothing here blocks on a slow reader: the log writer is a bounded ring of its
//! own, facts about single batches are dropped when the supervisor is behind. Each pipe has a thread of
//! its own: a flood takes nothing from the runtime, and a runtime that stands still does not stop it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
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
/// One read; and what a pipe is asked to hold, in place of Linux's 64 KiB: fewer turns in a flood.
const READ: usize = 1 << 20;
const PIPE: i32 = 1 << 20;
/// Lines logged in one second; more are counted and dropped. A start logs some hundred a second.
const LINES_A_SECOND: u32 = 2_000;
/// Lines understood in one second; of those beyond, only the last are kept. Twenty times as many as a start
/// of eight ranks says.
const UNDERSTOOD_A_SECOND: u32 = 10_000;
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
        let mut found = self.signatures.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // A line that a flood cut was kept, but not understood; and what comes after the hundredth counts where it is the last.
        let last = self.tail().into_iter().filter_map(|line| match parse(&line).fact {
            Some(Fact::Fatal(signature)) => Some(signature),
            _ => None,
        });
        for signature in last {
            if !found.contains(&signature) {
                found.push(signature);
            }
        }
        found
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
        // A flood allocates nothing.
        let mut kept = if tail.len() == TAIL_LINES { tail.pop_front().unwrap_or_default() } else { Vec::new() };
        kept.clear();
        kept.extend_from_slice(&line[..line.len().min(TAIL_LINE)]);
        tail.push_back(kept);
    }
}

/// Reads both pipes until they end. The task ends with the last process that holds them.
pub fn drain(
    streams: Vec<OwnedFd>,
    secrets: Vec<String>,
    facts: &mpsc::Sender<Said>,
) -> (Arc<Heard>, Vec<JoinHandle<()>>) {
    let heard = Arc::new(Heard::new());
    let secrets = Arc::new(secrets);
    let mut readers = Vec::new();
    for stream in streams {
        // Refused where a user has many such pipes: then it is as large as others.
        let _ = nix::fcntl::fcntl(&stream, nix::fcntl::FcntlArg::F_SETPIPE_SZ(PIPE));
        let (heard, secrets, facts) = (Arc::clone(&heard), Arc::clone(&secrets), facts.clone());
        readers.push(tokio::task::spawn_blocking(move || read(File::from(stream), &heard, &secrets, &facts)));
    }
    (heard, readers)
}

fn read(mut pipe: File, heard: &Heard, secrets: &[String], facts: &mpsc::Sender<Said>) {
    let mut buffer = vec![0; READ];
    let mut splitter = Splitter::new();
    let mut rate = Rate::new();
    let mut urgent = Vec::new();
    loop {
        let n = match pipe.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let mut bytes = &buffer[..n];
        if rate.is_flooded() {
            let (skipped, last) = last_lines(bytes);
            rate.skip(skipped);
            if skipped > 0 {
                // What was begun before ends here; its end is among what is skipped.
                splitter.push(b"\n", |line| heard.keep(line.bytes));
            }
            bytes = last;
        }
        splitter.push(bytes, |line| {
            one(line.bytes, line.dropped, heard, secrets, facts, &mut rate, &mut urgent);
        });
        tell(facts, &mut urgent);
    }
    splitter.finish(|line| one(line.bytes, line.dropped, heard, secrets, facts, &mut rate, &mut urgent));
    tell(facts, &mut urgent);
}

/// Of a piece of a flood, what is worth splitting, and how many lines come before that.
fn last_lines(bytes: &[u8]) -> (u64, &[u8]) {
    let from = memchr::memrchr_iter(b'\n', bytes).nth(TAIL_LINES);
    match from {
        Some(at) => (memchr::memchr_iter(b'\n', &bytes[..=at]).count() as u64, &bytes[at + 1..]),
        None => (0, bytes),
    }
}

/// Facts that must arrive, within reason: a supervisor that is stuck must not stop the draining.
fn tell(facts: &mpsc::Sender<Said>, urgent: &mut Vec<Said>) {
    for said in urgent.drain(..) {
        let _ = Handle::current().block_on(facts.send_timeout(said, FACT_PATIENCE));
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
    let passes = rate.passes();
    if passes == Passes::Unheard {
        // The other pipe's flood may push it out of the last lines before anybody asks.
        if let Some(Fact::Fatal(signature)) = parse(bytes).fact {
            heard.blame(signature);
        }
        if secrets.iter().any(|secret| memchr::memmem::find(bytes, secret.as_bytes()).is_some()) {
            heard.keep(redacted(bytes, secrets).as_bytes());
        } else {
            heard.keep(bytes);
        }
        return;
    }
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
    if passes == Passes::Unlogged {
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

    fn is_flooded(&self) -> bool {
        self.passed >= UNDERSTOOD_A_SECOND && self.since.elapsed() < Duration::from_secs(1)
    }

    fn skip(&mut self, lines: u64) {
        self.dropped += lines;
    }

    fn passes(&mut self) -> Passes {
        if self.since.elapsed() >= Duration::from_secs(1) {
            if self.dropped > 0 {
                tracing::warn!(target: "engine", "{} lines of the engine were not logged: more than {LINES_A_SECOND} a second", self.dropped);
            }
            *self = Self::new();
        }
        self.passed = self.passed.saturating_add(1);
        match self.passed {
            ..=LINES_A_SECOND => Passes::Logged,
            more => {
                self.dropped += 1;
                if more <= UNDERSTOOD_A_SECOND { Passes::Unlogged } else { Passes::Unheard }
            }
        }
    }
}

/// What becomes of one line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passes {
    Logged,
    /// Understood, and not logged.
    Unlogged,
    /// Kept as one of the last lines, and searched for a cause of death, no more.
    Unheard,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[tokio::test]
    async fn facts_arrive_and_keys_do_not() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let (tx, mut rx) = mpsc::channel(8);
        let (heard, readers) = drain(vec![reader.into()], vec!["k3y".into()], &tx);
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
        let (_, readers) = drain(vec![reader.into()], Vec::new(), &tx);
        for reader in readers {
            tokio::time::timeout(Duration::from_secs(5), reader).await.expect("no busy loop").expect("no panic");
        }
    }

    /// Writes as fast as the pipe takes it, from a thread, and returns how many bytes.
    fn flood(mut pipe: std::io::PipeWriter, block: Vec<u8>, times: usize) -> std::thread::JoinHandle<usize> {
        std::thread::spawn(move || {
            for _ in 0..times {
                pipe.write_all(&block).expect("a reader");
            }
            block.len() * times
        })
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn g14_a_flood_on_both_pipes_is_drained_and_what_one_ends_with_is_understood() {
        let block = b"[2026-11-23 14:11:43 TP0] a line of a flood that says nothing at all\n".repeat(4096);
        let (out_reader, mut out) = std::io::pipe().expect("a pipe");
        let (err_reader, mut err) = std::io::pipe().expect("a pipe");
        let (tx, _rx) = mpsc::channel(1);
        let begun = Instant::now();
        let (heard, mut readers) = drain(vec![out_reader.into(), err_reader.into()], Vec::new(), &tx);
        let flooding = [&out, &err].map(|pipe| flood(pipe.try_clone().expect("a copy"), block.clone(), 20));
        let mut bytes: usize = flooding.into_iter().map(|writer| writer.join().expect("no panic")).sum();
        err.write_all(b"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n").expect("a reader");
        drop(err);
        readers.pop().expect("two").await.expect("no panic");
        // The other pipe has more to say than the last lines that are kept.
        out.write_all(&block).expect("a reader");
        bytes += block.len();
        drop(out);
        readers.pop().expect("two").await.expect("no panic");
        let took = begun.elapsed();
        #[allow(clippy::print_stdout)] // a figure for people
        {
            println!("figure: {} MiB drained at {:.0} MiB/s", bytes >> 20, (bytes >> 20) as f64 / took.as_secs_f64());
        }
        assert!(!heard.tail().iter().any(|line| line.starts_with(b"torch.")), "pushed out, as this test needs it");
        assert!(heard.signatures().contains(&Signature::GpuOom), "{:?}", heard.signatures());
        assert!(heard.tail().len() <= TAIL_LINES);
    }

    #[test]
    fn of_a_flood_the_last_lines_are_split_and_the_others_counted() {
        let flood: Vec<u8> = (0..1000).flat_map(|n| format!("line {n}\n").into_bytes()).collect();
        let (skipped, last) = last_lines(&flood);
        assert_eq!(skipped, 600);
        assert!(last.starts_with(b"line 600\n") && last.ends_with(b"line 999\n"));
        assert_eq!(last_lines(b"one\ntwo"), (0, &b"one\ntwo"[..]));
    }

    #[tokio::test]
    async fn g14_what_is_no_text_is_survived() {
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        let (tx, _rx) = mpsc::channel(1);
        let (heard, readers) = drain(vec![reader.into()], Vec::new(), &tx);
        writer.write_all(b"\x1b[31mred\x1b[0m\0\xff\xfe\rbar 1\rbar 2\r\n").expect("written");
        writer.write_all(&vec![b'x'; 1 << 20]).expect("written");
        drop(writer);
        for reader in readers {
            reader.await.expect("no panic");
        }
        let tail: Vec<String> = heard.tail().iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect();
        assert_eq!(tail.len(), 4, "{tail:?}");
        assert!(tail[0].contains("red") && !tail[0].contains(['\0', '\u{1b}']), "{:?}", tail[0]);
        assert_eq!(tail[1..3], ["bar 1", "bar 2"]);
        assert!(tail[3].len() <= TAIL_LINE);
    }
}
