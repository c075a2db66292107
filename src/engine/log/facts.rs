//! The milestones: which line states which fact. Every one of them begins its message, so a line is
//! rejected by its first bytes.

use super::{Fact, Graphs};

pub(super) fn read(message: &[u8]) -> Option<Fact> {
    match message.first()? {
        b'I' => {
            if starts(message, &[b"Init parallel begin", b"Init torch distributed begin"]) {
                Some(Fact::DistInitBegin)
            } else if starts(message, &[b"Init parallel ends", b"Init torch distributed ends"]) {
                Some(Fact::DistInitEnd)
            } else {
                None
            }
        }
        b'L' => {
            if message.starts_with(b"Load weight begin") {
                Some(Fact::LoadBegin)
            } else if message.starts_with(b"Load weight end") {
                Some(Fact::LoadEnd { elapsed_ms: seconds_ms(after(message, b"elapsed=")?)? })
            } else if starts(message, &[b"Loading safetensors checkpoint shards:", b"Loading pt checkpoint shards:"]) {
                shards(message)
            } else {
                None
            }
        }
        b'M' => {
            if starts(message, &[b"Multi-thread loading shards:", b"Multi-thread loading pt checkpoint shards:"]) {
                shards(message)
            } else {
                message.starts_with(b"Memory pool end").then_some(Fact::MemoryPoolEnd)
            }
        }
        b'K' if starts(message, &[b"KV Cache is allocated", b"KV Cache VA upper bound"]) => {
            Some(Fact::KvPool { tokens: number(after(message, b"#tokens: ")?)? })
        }
        b'C' => capture(message),
        b'E' => {
            if message.starts_with(b"Entering DeepGEMM JIT") {
                Some(Fact::JitCompile { percent: None })
            } else {
                message.starts_with(b"Engine startup timings").then_some(Fact::EngineTimings)
            }
        }
        b'T' => {
            if message.starts_with(b"The server is fired up and ready to roll!") {
                Some(Fact::Ready)
            } else {
                message.starts_with(b"Try DeepGEMM JIT").then_some(Fact::JitCompile { percent: None })
            }
        }
        b'D' => {
            if message.starts_with(b"DeepGEMM warmup:") {
                Some(Fact::JitCompile { percent: percent(message) })
            } else if message.starts_with(b"Decode batch") {
                let (running, queued) = batch(message)?;
                Some(Fact::DecodeBatch { running, queued })
            } else {
                None
            }
        }
        b'R' => message.starts_with(b"Running FlashInfer autotune").then_some(Fact::AutotuneBegin),
        b'F' => message.starts_with(b"FlashInfer autotune completed").then_some(Fact::AutotuneEnd),
        b'm' => message.starts_with(b"max_total_num_tokens=").then_some(Fact::SchedulerReady),
        b'U' => starts(message, &[b"Uvicorn running on http", b"Uvicorn running on socket"]).then_some(Fact::HttpUp),
        b'P' => {
            let (running, queued) = message.starts_with(b"Prefill batch").then(|| batch(message))??;
            Some(Fact::PrefillBatch { running, queued })
        }
        b'S' => message.starts_with(b"SIGTERM received.").then_some(Fact::Draining),
        b'G' => {
            let rest = message.strip_prefix(b"Gracefully exiting... Remaining number of requests ")?;
            Some(Fact::GracefulExit { remaining: u32::try_from(number(rest)?).ok()? })
        }
        b'H' => {
            let begins = b"Health check failed. Server couldn't get a response from detokenizer";
            message.starts_with(begins).then_some(Fact::HealthTimedOut)
        }
        // An access line of uvicorn: `127.0.0.1:59288 - "POST /generate HTTP/1.1" 200 OK`. The only
        // callers of these two from loopback before readiness are the engine's own warm-up.
        b'1' if message.starts_with(b"127.0.0.1:") => {
            let warm =
                contains(message, b"\"POST /generate HTTP/1.1\" 200") || contains(message, b"\"POST /freeze_gc HTTP");
            warm.then_some(Fact::WarmupDone)
        }
        _ => None,
    }
}

/// `Capture target decode CUDA graph begin.`, its `end.`, the older `Capture cuda graph begin.`, and
/// the bars `Capturing batches (bs=…)`, `Capturing num tokens (num_tokens=…)`.
fn capture(message: &[u8]) -> Option<Fact> {
    if message.starts_with(b"Capturing ") {
        let (done, total) = ratio(message)?;
        let of = if message.starts_with(b"Capturing batches (bs=") {
            Graphs::Decode
        } else if starts(message, &[b"Capturing num tokens", b"Capturing batches (prefill"]) {
            Graphs::Prefill
        } else {
            Graphs::Unsaid
        };
        return Some(Fact::Capture { of, done, total });
    }
    let rest = message.strip_prefix(b"Capture ")?;
    let head = &rest[..rest.len().min(96)];
    let of = if contains(head, b"draft") || contains(head, b"verify") {
        Graphs::Draft
    } else if contains(head, b"prefill") || contains(head, b"extend") {
        Graphs::Prefill
    } else if contains(head, b"raph") {
        Graphs::Decode
    } else {
        return None;
    };
    if contains(head, b" begin.") {
        Some(Fact::CaptureBegin(of))
    } else if contains(head, b" end.") {
        Some(Fact::CaptureEnd(of))
    } else {
        None
    }
}

fn shards(message: &[u8]) -> Option<Fact> {
    let (done, total) = ratio(message)?;
    Some(Fact::Shards { done, total })
}

/// `1/3` of a tqdm bar: the pair that stands before ` [`.
fn ratio(message: &[u8]) -> Option<(u32, u32)> {
    let end = memchr::memmem::rfind(message, b" [")?;
    let pair = message[..end].rsplit(|&c| c == b' ' || c == b'|').next()?;
    let slash = memchr::memchr(b'/', pair)?;
    let done = u32::try_from(number(&pair[..slash])?).ok()?;
    let total = u32::try_from(number(&pair[slash + 1..])?).ok()?;
    (total > 0 && done <= total).then_some((done, total))
}

/// The number before the first `%`.
fn percent(message: &[u8]) -> Option<u8> {
    let sign = memchr::memchr(b'%', message)?;
    let digits = message[..sign].iter().rev().take_while(|c| c.is_ascii_digit()).count();
    u8::try_from(number(&message[sign - digits..sign])?).ok().filter(|percent| *percent <= 100)
}

fn batch(message: &[u8]) -> Option<(u32, u32)> {
    let of = |name| u32::try_from(number(after(message, name)?)?).ok();
    Some((of(b"#running-req: ".as_slice())?, of(b"#queue-req: ".as_slice())?))
}

/// The leading decimal digits as a number.
pub(super) fn number(bytes: &[u8]) -> Option<u64> {
    let digits = bytes.iter().take_while(|c| c.is_ascii_digit()).count();
    std::str::from_utf8(&bytes[..digits]).ok()?.parse().ok()
}

/// `1.49 s` in milliseconds.
fn seconds_ms(bytes: &[u8]) -> Option<u64> {
    let end = bytes.iter().take_while(|c| c.is_ascii_digit() || **c == b'.').count();
    let seconds: f64 = std::str::from_utf8(&bytes[..end]).ok()?.trim_end_matches('.').parse().ok()?;
    Some((seconds * 1000.0).round() as u64)
}

fn starts(message: &[u8], words: &[&[u8]]) -> bool {
    words.iter().any(|word| message.starts_with(word))
}

fn contains(message: &[u8], word: &[u8]) -> bool {
    memchr::memmem::find(message, word).is_some()
}

fn after<'a>(message: &'a [u8], word: &[u8]) -> Option<&'a [u8]> {
    let at = memchr::memmem::find(message, word)?;
    Some(&message[at + word.len()..])
}
