//! The grammar of the engine's log: bytes in, lines and the facts they state out.
//!
//! SGLang says nothing about its start but in its log (no port is bound before the model is loaded),
//! so phases, progress and the cause of a death are read here. Wordings are those of 0.5.15 and
//! 0.5.23; a line that is not known has no fact, never a guessed one.
//!
//! Pure: no clock, no I/O, no memory of earlier lines (that is `progress` and `death`).

mod facts;
mod signature;
mod splitter;

use std::borrow::Cow;
use std::fmt;

pub use signature::Signature;
pub use splitter::{MAX_LINE, RawLine, Splitter};

/// One line of the engine's log, understood as far as it can be.
#[derive(Debug, Clone, PartialEq)]
pub struct Line<'a> {
    /// The rank that wrote it; none for the main process and for what bypasses Python's logging.
    pub rank: Option<Rank>,
    pub level: Level,
    /// What was said, without time stamp, rank and colours. Of a line that holds the engine's keys,
    /// only the fact that there was one.
    pub message: Cow<'a, [u8]>,
    pub fact: Option<Fact>,
}

/// How loud a line is. SGLang's own format carries no level: most lines are `Info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Debug,
    Info,
    Warning,
    Error,
}

/// A rank as the log names it: any of data, pipeline, tensor and expert parallelism.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rank {
    pub dp: Option<u16>,
    pub pp: Option<u16>,
    pub tp: Option<u16>,
    pub ep: Option<u16>,
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut gap = "";
        for (name, number) in [("DP", self.dp), ("PP", self.pp), ("TP", self.tp), ("EP", self.ep)] {
            if let Some(number) = number {
                write!(f, "{gap}{name}{number}")?;
                gap = " ";
            }
        }
        Ok(())
    }
}

/// Which set of CUDA graphs is being captured; a start captures several, one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Graphs {
    Prefill,
    Decode,
    /// Of the speculative draft model, or the verification of its tokens.
    Draft,
    /// A progress bar that does not say.
    Unsaid,
}

/// What a line states.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fact {
    /// The arguments are resolved and the ranks are being started. The line holds the keys.
    ArgsResolved,
    DistInitBegin,
    DistInitEnd,
    LoadBegin,
    Shards {
        done: u32,
        total: u32,
    },
    LoadEnd {
        elapsed_ms: u64,
    },
    KvPool {
        tokens: u64,
    },
    MemoryPoolEnd,
    /// Kernels are being compiled: minutes, when the cache is cold.
    JitCompile {
        percent: Option<u8>,
    },
    AutotuneBegin,
    AutotuneEnd,
    CaptureBegin(Graphs),
    Capture {
        of: Graphs,
        done: u32,
        total: u32,
    },
    CaptureEnd(Graphs),
    SchedulerReady,
    EngineTimings,
    HttpUp,
    WarmupDone,
    Ready,
    PrefillBatch {
        running: u32,
        queued: u32,
    },
    DecodeBatch {
        running: u32,
        queued: u32,
    },
    /// SIGTERM was seen.
    Draining,
    GracefulExit {
        remaining: u32,
    },
    /// The engine's own `/health` gave up. Alone it proves nothing: a long prefill does it too.
    HealthTimedOut,
    Fatal(Signature),
}

/// Shown in place of a line that holds the engine's keys.
pub const WITHHELD: &[u8] = b"server_args= (withheld: the line holds the engine's keys)";

/// Reads one line, as [`Splitter`] gives it.
pub fn parse(line: &[u8]) -> Line<'_> {
    let plain = without_ansi(line);
    match plain {
        Cow::Borrowed(bytes) => parse_plain(bytes),
        Cow::Owned(bytes) => {
            let Line { rank, level, message, fact } = parse_plain(&bytes);
            Line { rank, level, message: Cow::Owned(message.into_owned()), fact }
        }
    }
}

fn parse_plain(bytes: &[u8]) -> Line<'_> {
    let (rank, message) = match prefix(bytes) {
        Some((rank, rest)) => (rank, rest),
        None => (None, bytes),
    };
    let signature = signature::find(message);
    if signature == signature::Found::Secret {
        return Line { rank, level: Level::Info, message: Cow::Borrowed(WITHHELD), fact: Some(Fact::ArgsResolved) };
    }
    let (level, message) = level_of(message);
    let fact = match signature {
        signature::Found::Signature(signature) => Some(Fact::Fatal(signature)),
        _ => facts::read(message),
    };
    let level = if matches!(fact, Some(Fact::Fatal(_))) { Level::Error } else { level };
    Line { rank, level, message: Cow::Borrowed(message), fact }
}

/// `[2026-11-23 14:10:14 DP0 TP3] rest`: the rank and the rest. `SGLANG_LOG_MS` adds a fraction.
fn prefix(line: &[u8]) -> Option<(Option<Rank>, &[u8])> {
    const STAMP: &[u8] = b"[dddd-dd-dd dd:dd:dd";
    let stamp = line.get(..STAMP.len())?;
    let fits =
        stamp.iter().zip(STAMP).all(|(&c, &wanted)| if wanted == b'd' { c.is_ascii_digit() } else { c == wanted });
    if !fits {
        return None;
    }
    let rest = line.get(STAMP.len()..)?;
    let end = memchr::memchr(b']', rest)?;
    let (inside, after) = (rest.get(..end)?, rest.get(end + 1..)?);
    let inside = match inside.first() {
        Some(b'.' | b',') => {
            let digits = inside[1..].iter().take_while(|c| c.is_ascii_digit()).count();
            &inside[1 + digits..]
        }
        _ => inside,
    };
    let mut rank = Rank::default();
    for word in inside.split(|&c| c == b' ').filter(|w| !w.is_empty()) {
        let letters = word.iter().take_while(|c| c.is_ascii_uppercase() || **c == b'_').count();
        let (name, number) = word.split_at(letters);
        let number = facts::number(number).and_then(|n| u16::try_from(n).ok())?;
        match name {
            b"DP" => rank.dp = Some(number),
            b"PP" => rank.pp = Some(number),
            b"TP" => rank.tp = Some(number),
            b"EP" => rank.ep = Some(number),
            // ATTN_CP, MOE_DP and what is yet to come say more, but do not tell two ranks apart.
            _ if !name.is_empty() => {}
            _ => return None,
        }
    }
    let rank = (rank != Rank::default()).then_some(rank);
    Some((rank, after.strip_prefix(b" ").unwrap_or(after)))
}

/// Uvicorn's `INFO:     …` and the few other ways in which a line tells how loud it is.
fn level_of(message: &[u8]) -> (Level, &[u8]) {
    const NAMED: [(&[u8], Level); 5] = [
        (b"INFO:", Level::Info),
        (b"DEBUG:", Level::Debug),
        (b"WARNING:", Level::Warning),
        (b"ERROR:", Level::Error),
        (b"CRITICAL:", Level::Error),
    ];
    for (name, level) in NAMED {
        if let Some(rest) = message.strip_prefix(name) {
            return (level, rest.trim_ascii_start());
        }
    }
    let level = if message.starts_with(b"Traceback (most recent call last)") || message.starts_with(b"[E") {
        Level::Error
    } else if memchr::memmem::find(message, b"Warning: ").is_some() {
        Level::Warning
    } else {
        Level::Info
    };
    (level, message)
}

/// The line without escape sequences (colours, cursor movements, window titles).
fn without_ansi(line: &[u8]) -> Cow<'_, [u8]> {
    const ESC: u8 = 0x1b;
    let Some(first) = memchr::memchr(ESC, line) else { return Cow::Borrowed(line) };
    let mut out = Vec::with_capacity(line.len());
    out.extend_from_slice(&line[..first]);
    let mut rest = &line[first..];
    while let Some((&c, tail)) = rest.split_first() {
        if c != ESC {
            let plain = memchr::memchr(ESC, rest).unwrap_or(rest.len());
            out.extend_from_slice(&rest[..plain]);
            rest = &rest[plain..];
            continue;
        }
        rest = match tail.split_first() {
            // CSI: parameters, then one final byte of 0x40–0x7e.
            Some((b'[', tail)) => match tail.iter().position(|c| (0x40..=0x7e).contains(c)) {
                Some(end) => &tail[end + 1..],
                None => &[],
            },
            // OSC: up to BEL, or the string terminator ESC \.
            Some((b']', tail)) => match tail.iter().position(|&c| c == 0x07 || c == ESC) {
                Some(end) if tail[end] == ESC => tail.get(end + 2..).unwrap_or(&[]),
                Some(end) => &tail[end + 1..],
                None => &[],
            },
            Some((_, tail)) => tail,
            None => &[],
        };
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests;
