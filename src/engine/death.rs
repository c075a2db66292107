//! Why an engine died: its exit, its last lines and the node's facts, weighed into one cause.
//!
//! SGLang's normal way to crash is SIGKILL upon itself, so the exit status alone says next to nothing
//! (and what says "crashed with exit code" only follows from something earlier). Pure: what was seen
//! comes in, a verdict goes out. It does not decide when or whether to restart; it says what would help.

use std::fmt::Write;

use super::log::Signature;

/// How the engine's main process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    Exited(i32),
    Signaled(i32),
    /// It did not end: the supervisor found it hung.
    Hung,
    /// It did not end, but one of its ranks did.
    RankDied,
}

/// How far the start had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reached {
    /// No milestone yet: imports, arguments.
    Nothing,
    /// The ranks were being started.
    Ranks,
    /// The weights were being loaded.
    Loading,
    /// The weights were loaded: memory pools, kernels, graphs.
    Loaded,
    /// The port was bound.
    Listening,
    /// It served.
    Ready,
}

/// What is known of a death.
#[derive(Debug, Clone)]
pub struct Evidence<'a, L> {
    pub how: How,
    pub reached: Reached,
    /// The log's last lines, oldest first, without prefix and colours.
    pub tail: &'a [L],
    /// The signatures seen since the start, oldest first, also of lines no longer in the tail.
    pub signatures: &'a [Signature],
    /// Whether the kernel's OOM killer struck in the engine's cgroup; none: nobody could look.
    pub oom_kill: Option<bool>,
    /// A failure of a GPU that the driver reported, in its words.
    pub hardware: Option<&'a str>,
    /// An error of a GPU that a program may cause.
    pub gpu_fault: Option<&'a str>,
}

/// The classes of contract §f.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    BadConfig,
    BadImage,
    Weights,
    CorruptWeights,
    Disk,
    DiskFails,
    KvDoesNotFit,
    CaptureOom,
    GpuOom,
    HostOom,
    ForeignGpuMemory,
    CudaError,
    Hardware,
    Nccl,
    Port,
    Crash,
    Hang,
    Warmup,
    Signal,
    Unknown,
}

/// Whether starting again can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The next start would fail the same way.
    Never,
    /// Once more; a second death of the same class is final.
    Once,
    /// Again and again, with growing pauses, within the restart limits.
    Backoff,
}

/// The row of the exit-code table that giving up on this cause maps to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitRow {
    /// 66
    Weights,
    /// 69
    Engine,
    /// 75
    CrashLoop,
}

/// The verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    pub class: Class,
    /// What happened, in one sentence, with the engine's own words where it had any.
    pub sentence: String,
    /// What to do, in one sentence.
    pub advice: &'static str,
    pub retry: Retry,
    pub exit: ExitRow,
}

impl Class {
    /// For metrics and records.
    pub fn name(self) -> &'static str {
        match self {
            Self::BadConfig => "bad_config",
            Self::BadImage => "bad_image",
            Self::Weights => "weights",
            Self::CorruptWeights => "corrupt_weights",
            Self::Disk => "disk",
            Self::DiskFails => "disk_fails",
            Self::KvDoesNotFit => "kv_does_not_fit",
            Self::CaptureOom => "capture_oom",
            Self::GpuOom => "gpu_oom",
            Self::HostOom => "host_oom",
            Self::ForeignGpuMemory => "foreign_gpu_memory",
            Self::CudaError => "cuda_error",
            Self::Hardware => "hardware",
            Self::Nccl => "nccl",
            Self::Port => "port",
            Self::Crash => "crash",
            Self::Hang => "hang",
            Self::Warmup => "warmup",
            Self::Signal => "signal",
            Self::Unknown => "unknown",
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Self::BadConfig => "Correct the engine's flags; `sglangd plan` shows them as the engine gets them.",
            Self::BadImage => {
                "Check `engine.command` and the Python environment behind it; `import sglang` must work there."
            }
            Self::Weights => "Check `model.repo` or `model.path`; `sglangd fetch` names what is missing.",
            Self::CorruptWeights => {
                "Verify the weights with `sglangd fetch`; it fetches again what does not fit its checksum."
            }
            Self::Disk => "Free disk space in the engine's cache, temporary and shared-memory folders.",
            Self::DiskFails => {
                "Look at the disk or the network mount that holds the weights (the kernel's log, `dmesg`); `sglangd fetch \
                 --verify` reads all of them."
            }
            Self::KvDoesNotFit => "Raise `mem-fraction-static`, or lower `context-length` or `max-running-requests`.",
            Self::CaptureOom => "Lower `mem-fraction-static` or `cuda-graph-max-bs-decode`.",
            Self::GpuOom => {
                "Lower `mem-fraction-static` or `chunked-prefill-size`; see that no other process holds GPU memory."
            }
            Self::HostOom => "Give the service more memory, or load with fewer threads; see the kernel's log.",
            Self::ForeignGpuMemory => "End the process that holds memory on one of the GPUs; `nvidia-smi` names it.",
            Self::CudaError => {
                "If it happens twice in a row, check the GPU (`nvidia-smi -q`, Xid messages in the kernel's log)."
            }
            Self::Hardware => "Take the node out of service and have the GPU checked.",
            Self::Nccl => "If it happens again, check NVLink and network between the GPUs (NCCL_DEBUG=INFO says more).",
            Self::Port => "See which process holds the port; the next start takes another one.",
            Self::Crash => "See the traceback in the log; if it happens again, report it to SGLang with that.",
            Self::Hang => "See the stacks in the log; if it happens again, raise the watchdog's limits or report it.",
            Self::Warmup => "If kernels are still being compiled, raise SGLANG_WARMUP_TIMEOUT; else see the log.",
            Self::Signal => "Nothing is wrong with the engine: somebody ended it.",
            Self::Unknown => "See the engine's last lines.",
        }
    }

    fn retry(self, reached: Reached) -> Retry {
        match self {
            Self::BadConfig
            | Self::BadImage
            | Self::Weights
            | Self::CorruptWeights
            | Self::Disk
            | Self::KvDoesNotFit
            | Self::CaptureOom
            | Self::Hardware => Retry::Never,
            // While it loads, a second try helps only if someone else's memory was in the way.
            Self::GpuOom if reached < Reached::Ready => Retry::Once,
            // A mount may be back, and a file handle fresh, for the next start.
            Self::Warmup | Self::CudaError | Self::DiskFails => Retry::Once,
            Self::GpuOom
            | Self::HostOom
            | Self::ForeignGpuMemory
            | Self::Nccl
            | Self::Port
            | Self::Crash
            | Self::Hang
            | Self::Signal
            | Self::Unknown => Retry::Backoff,
        }
    }

    fn exit(self, retry: Retry) -> ExitRow {
        match (self, retry) {
            (Self::Weights | Self::CorruptWeights, _) => ExitRow::Weights,
            (_, Retry::Never) => ExitRow::Engine,
            _ => ExitRow::CrashLoop,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::BadConfig => "The engine does not accept its flags",
            Self::BadImage => "The engine's Python environment is incomplete",
            Self::Weights => "The engine does not find its model",
            Self::CorruptWeights => "A weight file is corrupt or does not fit the model",
            Self::Disk => "The disk is full",
            Self::DiskFails => "The disk failed, not the engine",
            Self::KvDoesNotFit => "The KV cache does not fit beside the weights",
            Self::CaptureOom => "GPU memory ran out while CUDA graphs were captured",
            Self::GpuOom => "GPU memory ran out",
            Self::HostOom => "The kernel's OOM killer ended the engine",
            Self::ForeignGpuMemory => "Another process holds memory on one of the GPUs",
            Self::CudaError => "A CUDA kernel failed",
            Self::Hardware => "A GPU is broken or not usable",
            Self::Nccl => "Communication between the ranks failed",
            Self::Port => "A port that the engine needs is taken",
            Self::Crash => "The engine crashed",
            Self::Hang => "The engine hung",
            Self::Warmup => "The engine's first request failed",
            Self::Signal => "The engine was ended from outside",
            Self::Unknown => "The engine ended without saying why",
        }
    }
}

/// Weighs the evidence.
pub fn classify<L: AsRef<[u8]>>(evidence: &Evidence<'_, L>) -> Cause {
    let class = class_of(evidence);
    let retry = class.retry(evidence.reached);
    let mut sentence = class.words().to_owned();
    if let Some(quote) = quote(evidence, class) {
        let _ = write!(sentence, ": {quote}");
    } else {
        match evidence.how {
            How::Exited(code) => {
                let _ = write!(sentence, " (exit status {code})");
            }
            How::Signaled(signal) => {
                let _ = write!(sentence, " (by {})", signal_name(signal));
            }
            How::Hung | How::RankDied => {}
        }
    }
    if !sentence.ends_with(['.', '!', '?']) {
        sentence.push('.');
    }
    Cause { class, sentence, advice: class.advice(), retry, exit: class.exit(retry) }
}

/// Which witness is believed before another. A cause stands before what it brings about: a rank that
/// runs out of memory lets the others see NCCL errors and closed connections.
const WEIGHT: [Class; 15] = [
    Class::Hardware,
    Class::DiskFails,
    Class::CorruptWeights,
    Class::Disk,
    Class::KvDoesNotFit,
    Class::CaptureOom,
    Class::ForeignGpuMemory,
    Class::GpuOom,
    Class::CudaError,
    Class::Weights,
    Class::BadImage,
    Class::BadConfig,
    Class::Port,
    Class::Hang,
    Class::Nccl,
];

fn class_of<L: AsRef<[u8]>>(evidence: &Evidence<'_, L>) -> Class {
    if evidence.oom_kill == Some(true) {
        return Class::HostOom;
    }
    if evidence.hardware.is_some() {
        return Class::Hardware;
    }
    if evidence.how == How::Hung {
        return Class::Hang;
    }
    let told: Vec<Class> = evidence.signatures.iter().filter_map(|s| class_of_signature(*s)).collect();
    if let Some(class) = WEIGHT.into_iter().find(|class| told.contains(class)) {
        return class;
    }
    if evidence.gpu_fault.is_some() {
        return Class::CudaError;
    }
    let seen = |wanted: Signature| evidence.signatures.contains(&wanted);
    let killed_at_init =
        evidence.signatures.iter().any(|s| matches!(s, Signature::DiedAtInit { status } if *status == -9));
    if killed_at_init {
        // Nobody else kills a rank in the middle of a load, but nobody could look either.
        return if evidence.oom_kill == Some(false) { Class::Crash } else { Class::HostOom };
    }
    if seen(Signature::Warmup) {
        return Class::Warmup;
    }
    if seen(Signature::PythonError) {
        let last = raised(evidence.tail).unwrap_or_default();
        let in_weights = evidence.tail.iter().any(|line| contains(line.as_ref(), "load_weights"));
        if last.starts_with("KeyError") && in_weights {
            return Class::CorruptWeights;
        }
        if evidence.reached < Reached::Loading && (last.starts_with("ValueError") || last.starts_with("AssertionError"))
        {
            return Class::BadConfig;
        }
        if last.starts_with("FileNotFoundError") && evidence.reached <= Reached::Loading {
            return Class::Weights;
        }
        return Class::Crash;
    }
    if seen(Signature::Exception) || seen(Signature::PeerGone) || seen(Signature::Consequence) {
        return Class::Crash;
    }
    match evidence.how {
        How::Exited(2) if evidence.reached == Reached::Nothing => Class::BadConfig,
        How::Exited(126 | 127) => Class::BadImage,
        // Uvicorn's STARTUP_FAILURE: its application's fault where it says so, else its socket's.
        How::Exited(3) if evidence.tail.iter().any(|l| contains(l.as_ref(), "Application startup failed")) => {
            Class::Crash
        }
        How::Exited(3) => Class::Port,
        How::Signaled(nix::libc::SIGTERM | nix::libc::SIGINT | nix::libc::SIGHUP | nix::libc::SIGKILL) => Class::Signal,
        How::Signaled(_) | How::RankDied => Class::Crash,
        _ => Class::Unknown,
    }
}

fn class_of_signature(signature: Signature) -> Option<Class> {
    Some(match signature {
        Signature::BadConfig => Class::BadConfig,
        Signature::BadImage => Class::BadImage,
        Signature::Weights => Class::Weights,
        Signature::CorruptWeights => Class::CorruptWeights,
        Signature::Disk => Class::Disk,
        Signature::DiskFails => Class::DiskFails,
        Signature::KvDoesNotFit => Class::KvDoesNotFit,
        Signature::CaptureOom => Class::CaptureOom,
        Signature::GpuOom => Class::GpuOom,
        Signature::ForeignGpuMemory => Class::ForeignGpuMemory,
        Signature::CudaError => Class::CudaError,
        Signature::Hardware => Class::Hardware,
        Signature::Nccl => Class::Nccl,
        Signature::Port => Class::Port,
        Signature::Hang => Class::Hang,
        Signature::Warmup
        | Signature::DiedAtInit { .. }
        | Signature::PeerGone
        | Signature::Exception
        | Signature::PythonError
        | Signature::Consequence => return None,
    })
}

/// The engine's own words for it: the line that bears the class, or what a traceback raised.
fn quote<L: AsRef<[u8]>>(evidence: &Evidence<'_, L>, class: Class) -> Option<String> {
    let driver = match class {
        Class::Hardware => evidence.hardware,
        Class::CudaError => evidence.gpu_fault,
        _ => None,
    };
    if let Some(said) = driver {
        return Some(said.to_owned());
    }
    let bearing = evidence.tail.iter().map(AsRef::as_ref).find(|line| {
        let fact = super::log::parse(line).fact;
        matches!(fact, Some(super::log::Fact::Fatal(signature)) if class_of_signature(signature) == Some(class)
            || (class == Class::Warmup && signature == Signature::Warmup)
            || (class == Class::HostOom && matches!(signature, Signature::DiedAtInit { .. })))
    });
    if let Some(line) = bearing {
        return Some(shown(line));
    }
    match class {
        Class::BadConfig | Class::Weights | Class::CorruptWeights | Class::Crash => {
            raised(evidence.tail).or_else(|| consequence(evidence.tail))
        }
        _ => None,
    }
}

/// What the first traceback of the tail raised in the end: chained ones ("During handling of …")
/// belong together, a second rank's own does not.
fn raised<L: AsRef<[u8]>>(tail: &[L]) -> Option<String> {
    let mut found = None;
    let mut inside = false;
    for line in tail.iter().map(AsRef::as_ref) {
        if contains(line, "Traceback (most recent call last):") {
            if found.is_some() && !inside {
                break;
            }
            inside = true;
        } else if line.starts_with(b"During handling of the above exception")
            || line.starts_with(b"The above exception was")
        {
            inside = true;
        } else if inside && !line.starts_with(b" ") && !line.trim_ascii().is_empty() {
            found = Some(shown(line));
            inside = false;
        }
    }
    found
}

/// Where nothing else was said: which process was seen to die.
fn consequence<L: AsRef<[u8]>>(tail: &[L]) -> Option<String> {
    tail.iter().map(AsRef::as_ref).find(|line| contains(line, " crashed with exit code ")).map(|line| {
        let text = shown(line);
        text.split(". Triggering").next().unwrap_or(&text).to_owned()
    })
}

/// One line for people: no control characters, and not longer than a sentence should be.
fn shown(line: &[u8]) -> String {
    const LONGEST: usize = 240;
    let text = String::from_utf8_lossy(&super::log::parse(line).message).into_owned();
    let text: String = text.trim().chars().filter(|c| !c.is_control()).collect();
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

fn contains(line: &[u8], word: &str) -> bool {
    memchr::memmem::find(line, word.as_bytes()).is_some()
}

fn signal_name(signal: i32) -> String {
    nix::sys::signal::Signal::try_from(signal).map_or_else(|_| format!("signal {signal}"), |s| s.as_str().to_owned())
}

#[cfg(test)]
mod tests;
