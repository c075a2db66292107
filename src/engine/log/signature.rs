//! The words by which a fatal line is known, and what kind of failure each stands for.

use std::sync::LazyLock;

use aho_corasick::AhoCorasick;

/// What kind of failure a line speaks of (contract §f). A line is only a witness: the verdict over
/// all of them is `death`'s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Signature {
    BadConfig,
    /// The image or virtual environment lacks something or has the wrong version of it.
    BadImage,
    /// Weights or access to them are missing.
    Weights,
    CorruptWeights,
    Disk,
    /// The disk, or the network file system, does not give what it holds.
    DiskFails,
    KvDoesNotFit,
    CaptureOom,
    GpuOom,
    /// GPUs have unequal free memory: another process holds some.
    ForeignGpuMemory,
    CudaError,
    Hardware,
    Nccl,
    /// A rank saw its peer's connection close: some *other* rank died first.
    PeerGone,
    Port,
    Hang,
    Warmup,
    /// A rank ended before the model was loaded, with this status (negative: by a signal).
    DiedAtInit {
        status: i32,
    },
    /// `… hit an exception`: the cause is in the traceback that follows.
    Exception,
    /// An exception's own line, of a kind that says nothing by itself.
    PythonError,
    /// `Received sigquit`, `crashed with exit code`: something happened earlier.
    Consequence,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    /// The resolved arguments, keys in clear.
    Secret,
    Signature(Signature),
}

/// What a literal stands for; a few need a second look at the line.
#[derive(Clone, Copy)]
enum Meaning {
    Secret,
    Is(Signature),
    /// Only when this stands in the line too.
    With(&'static [u8], Signature),
    /// Only when this does not.
    Without(&'static [u8], Signature),
    /// Only at the line's beginning.
    AtStart(Signature),
    DiedAtInit,
}

use Meaning::{AtStart, Is, Secret, With, Without};

/// In the order of weight: of several literals in one line the first row counts.
const TABLE: &[(&str, Meaning)] = &[
    ("server_args=", Secret),
    ("error: unrecognized arguments", Is(Signature::BadConfig)),
    ("error: ambiguous option", Is(Signature::BadConfig)),
    ("error: argument ", Is(Signature::BadConfig)),
    ("error: the following arguments are required", Is(Signature::BadConfig)),
    ("Unsupported config option", Is(Signature::BadConfig)),
    ("Config file ", Is(Signature::BadConfig)),
    ("AssertionError", With(b"served_model_name", Signature::BadConfig)),
    ("AssertionError", With(b"tp_size", Signature::BadConfig)),
    ("Please uninstall the old version", Is(Signature::BadImage)),
    ("ModuleNotFoundError:", AtStart(Signature::BadImage)),
    ("ImportError:", AtStart(Signature::BadImage)),
    ("No module named sglang", Is(Signature::BadImage)),
    ("GLIBC_", With(b"not found", Signature::BadImage)),
    ("uncorrectable ECC", Is(Signature::Hardware)),
    ("no CUDA-capable device", Is(Signature::Hardware)),
    ("system not yet initialized", Is(Signature::Hardware)),
    ("fell off the bus", Is(Signature::Hardware)),
    ("Cannot find any model weights with", Is(Signature::Weights)),
    ("LocalEntryNotFoundError", Is(Signature::Weights)),
    ("OfflineModeIsEnabled", Is(Signature::Weights)),
    ("RepositoryNotFoundError", Is(Signature::Weights)),
    ("GatedRepoError", Is(Signature::Weights)),
    ("HFValidationError", Is(Signature::Weights)),
    ("Repo id must be in the form", Is(Signature::Weights)),
    ("Can't load the configuration of", Is(Signature::Weights)),
    ("401 Client Error", Is(Signature::Weights)),
    // Before the reader's own words: it only passes them on.
    ("Input/output error", Is(Signature::DiskFails)),
    ("Stale file handle", Is(Signature::DiskFails)),
    ("SafetensorError", Is(Signature::CorruptWeights)),
    ("HeaderTooLarge", Is(Signature::CorruptWeights)),
    ("IncompleteMetadata", Is(Signature::CorruptWeights)),
    ("size mismatch for ", Is(Signature::CorruptWeights)),
    ("No space left on device", Is(Signature::Disk)),
    ("Please try to increase --mem-fraction-static", Is(Signature::KvDoesNotFit)),
    ("Capture ", With(b"raph failed:", Signature::CaptureOom)),
    ("CUDA out of memory", Is(Signature::GpuOom)),
    ("torch.OutOfMemoryError", Is(Signature::GpuOom)),
    ("The memory capacity is unbalanced", Is(Signature::ForeignGpuMemory)),
    ("CUDA error: ", Is(Signature::CudaError)),
    ("Xid", With(b"NVRM", Signature::CudaError)),
    ("NCCL error", Is(Signature::Nccl)),
    ("ncclSystemError", Is(Signature::Nccl)),
    ("ncclUnhandledCudaError", Is(Signature::Nccl)),
    ("caught collective operation timeout", Is(Signature::Nccl)),
    ("Connection closed by peer [", Is(Signature::PeerGone)),
    ("DistNetworkError", Is(Signature::Port)),
    ("EADDRINUSE", Is(Signature::Port)),
    ("address already in use", Is(Signature::Port)),
    ("[Errno 98]", Is(Signature::Port)),
    ("Port is already in use", Is(Signature::Port)),
    ("is not available in ", With(b" seconds", Signature::Port)),
    ("watchdog timeout (self.watchdog_timeout=", Without(b"self.soft=True", Signature::Hang)),
    ("Initialization failed. warmup error", Is(Signature::Warmup)),
    ("scheduler died during initialization (exit code: ", Meaning::DiedAtInit),
    ("Scheduler hit an exception", Is(Signature::Exception)),
    ("TokenizerManager hit an exception", Is(Signature::Exception)),
    ("DetokenizerManager hit", Is(Signature::Exception)),
    ("DataParallelController hit an exception", Is(Signature::Exception)),
    ("Received sigquit from a child process", Is(Signature::Consequence)),
    ("SIGQUIT received.", Is(Signature::Consequence)),
    ("Subprocess ", With(b" crashed with exit code ", Signature::Consequence)),
];

/// One automaton over all literals: a flood (some 100 MB/s on one core) is searched once,
/// not sixty times.
static WORDS: LazyLock<AhoCorasick> = LazyLock::new(|| {
    AhoCorasick::new(TABLE.iter().map(|(word, _)| word)).expect("sixty short literals always make an automaton")
});

pub(super) fn find(message: &[u8]) -> Found {
    let mut best: Option<(usize, Found)> = None;
    for hit in WORDS.find_overlapping_iter(message) {
        let row = hit.pattern().as_usize();
        if best.is_some_and(|(known, _)| known <= row) {
            continue;
        }
        let found = match TABLE[row].1 {
            Secret => Some(Found::Secret),
            Is(signature) => Some(Found::Signature(signature)),
            With(also, signature) => contains(message, also).then_some(Found::Signature(signature)),
            Without(not, signature) => (!contains(message, not)).then_some(Found::Signature(signature)),
            AtStart(signature) => (hit.start() == 0).then_some(Found::Signature(signature)),
            Meaning::DiedAtInit => {
                status_after(&message[hit.end()..]).map(|status| Found::Signature(Signature::DiedAtInit { status }))
            }
        };
        if let Some(found) = found {
            best = Some((row, found));
        }
    }
    match best {
        Some((_, found)) => found,
        None if is_exception_line(message) => Found::Signature(Signature::PythonError),
        None => Found::Nothing,
    }
}

fn contains(message: &[u8], word: &[u8]) -> bool {
    memchr::memmem::find(message, word).is_some()
}

fn status_after(rest: &[u8]) -> Option<i32> {
    let end = memchr::memchr(b')', rest)?;
    std::str::from_utf8(&rest[..end]).ok()?.trim().parse().ok()
}

/// `RuntimeError: …`, `torch.distributed.DistBackendError: …`: how a traceback ends. Warnings have a
/// path before the class and are none.
fn is_exception_line(message: &[u8]) -> bool {
    let Some(colon) = message.iter().take(80).position(|&c| c == b':') else { return false };
    let class = &message[..colon];
    let last = class.rsplit(|&c| c == b'.').next().unwrap_or(class);
    (last.ends_with(b"Error") || last.ends_with(b"Exception"))
        && last.first().is_some_and(u8::is_ascii_uppercase)
        && class.iter().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_'))
}
