//! What an engine's processes did between two looks that only a working engine does. Pure.
//!
//! A start says nothing for minutes while it reads 800 GB or compiles kernels, and a served engine
//! compiles for tens of seconds when a shape is new. So work is seen from outside: bytes read, compilers
//! that run, kernel caches and GPU memory that grow. A rank's own CPU use is none of it: ranks spin in a
//! rendezvous that never comes about (sglang#29073), and an idle scheduler spins too.

use std::collections::BTreeMap;

pub use super::watch::Millis;

/// A process for ever: its pid and its start time.
pub type Id = (i32, u64);

/// What one look at the engine's processes found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sample {
    pub at: Millis,
    /// Bytes that each process has read so far, from disks, caches of the kernel and pipes.
    pub read: BTreeMap<Id, u64>,
    /// The compilers among them, with the CPU time that each has used.
    pub compilers: BTreeMap<Id, u64>,
    /// The kernel caches; none: not measured this time.
    pub caches: Option<Caches>,
    /// GPU memory that the engine holds; none: not known.
    pub gpu_bytes: Option<u64>,
}

/// The extent of the folders of compiled kernels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Caches {
    pub entries: u64,
    pub bytes: u64,
    /// The newest change in it, in nanoseconds of the wall clock.
    pub newest: u128,
}

/// Work that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// Weights, or the program itself, are being read.
    Reading,
    /// A compiler ran.
    Compiling,
    /// A compiled kernel was written down.
    Caching,
    /// GPU memory filled.
    Filling,
}

impl Work {
    /// Whether this happens in an engine that serves, too. Reading does (requests come through sockets),
    /// but it proves nothing there.
    pub fn is_compilation(self) -> bool {
        matches!(self, Self::Compiling | Self::Caching)
    }
}

/// Slower than this is no load: watchdogs, polls and logs read that much for ever.
const READ_A_SECOND: u64 = 256 << 10;
/// A step of GPU memory smaller than this may be another program's.
const GPU_STEP: u64 = 16 << 20;

/// Compares each look with the one before it.
#[derive(Debug, Clone, Default)]
pub struct Signs {
    last: Option<Sample>,
    /// The most GPU memory seen: what is freed and taken again is no progress.
    gpu_most: u64,
}

impl Signs {
    /// What was done since the last look. Of the first one only compilers tell: they were not there for ever.
    pub fn take(&mut self, sample: Sample) -> Vec<Work> {
        let mut work = Vec::new();
        let last = self.last.as_ref();
        if last.is_some_and(|last| sample.has_read_since(last)) {
            work.push(Work::Reading);
        }
        if sample.has_compiled_since(last) {
            work.push(Work::Compiling);
        }
        let caches = sample.caches.or(last.and_then(|last| last.caches));
        if let (Some(now), Some(before)) = (sample.caches, last.and_then(|last| last.caches))
            && now != before
        {
            work.push(Work::Caching);
        }
        if let Some(bytes) = sample.gpu_bytes {
            if last.is_some() && bytes >= self.gpu_most + GPU_STEP {
                work.push(Work::Filling);
            }
            self.gpu_most = self.gpu_most.max(bytes);
        }
        self.last = Some(Sample { caches, ..sample });
        work
    }
}

impl Sample {
    fn has_read_since(&self, last: &Self) -> bool {
        // A process that was not there before has read all that it has since then.
        let grown: u64 = self
            .read
            .iter()
            .map(|(process, bytes)| bytes.saturating_sub(last.read.get(process).copied().unwrap_or(0)))
            .sum();
        let allowed = READ_A_SECOND.saturating_mul(self.at.saturating_sub(last.at)) / 1000;
        grown > allowed.max(READ_A_SECOND)
    }

    /// A compiler that is there and does nothing (stopped, waiting for a lock that nobody frees) is no sign.
    fn has_compiled_since(&self, last: Option<&Self>) -> bool {
        self.compilers.iter().any(|(process, ticks)| match last.and_then(|last| last.compilers.get(process)) {
            Some(before) => ticks > before,
            None => true,
        })
    }
}

/// Whether a process of this name compiles. The kernel keeps 15 bytes of a name.
pub fn is_compiler(name: &str) -> bool {
    const NAMES: [&str; 18] = [
        "nvcc",
        "cicc",
        "ptxas",
        "fatbinary",
        "nvlink",
        "cudafe++",
        "ninja",
        "cc1plus",
        "cc1",
        "c++",
        "g++",
        "gcc",
        "cc",
        "clang",
        "clang++",
        "ld",
        "lld",
        "as",
    ];
    NAMES.contains(&name)
        // Triton brings its own: ptxas-blackwell.
        || name.starts_with("ptxas-")
        || name.starts_with("x86_64-linux-gn")
        || name.starts_with("aarch64-linux-g")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn sample(at: Millis) -> Sample {
        Sample { at, ..Sample::default() }
    }

    fn reading(at: Millis, bytes: &[u64]) -> Sample {
        let read = (1..).zip(bytes).map(|(pid, bytes)| ((pid, 1), *bytes)).collect();
        Sample { read, ..sample(at) }
    }

    #[test]
    fn a_rank_that_reads_its_weights_works_and_one_that_polls_does_not() {
        let mut signs = Signs::default();
        assert_eq!(signs.take(reading(0, &[40 * MIB, 0])), [], "nothing to compare it with");
        assert_eq!(signs.take(reading(5_000, &[90 * MIB, 0])), [Work::Reading]);
        assert_eq!(signs.take(reading(10_000, &[90 * MIB + 4096, 5000])), [], "a trickle");
        assert_eq!(signs.take(reading(15_000, &[90 * MIB + 4096, 5000, 8 * MIB])), [Work::Reading], "a new process");
        // A trickle stays one however long it runs.
        for n in 0..1000 {
            assert_eq!(signs.take(reading(20_000 + n * 5_000, &[90 * MIB + n * MIB, 5000, 8 * MIB])), []);
        }
    }

    #[test]
    fn what_watchdogs_and_logs_may_read_in_that_time_is_no_load_and_a_byte_more_is() {
        for (more, work) in [(0, vec![]), (1, vec![Work::Reading])] {
            let mut signs = Signs::default();
            signs.take(reading(0, &[0]));
            assert_eq!(signs.take(reading(4_000, &[MIB + more])), work, "256 KiB a second, and {more}");
        }
    }

    #[test]
    fn a_process_that_ended_takes_nothing_back() {
        let mut signs = Signs::default();
        signs.take(reading(0, &[40 * MIB, 40 * MIB]));
        assert_eq!(signs.take(reading(5_000, &[44 * MIB])), [Work::Reading]);
    }

    fn compiling(at: Millis, compilers: &[(Id, u64)]) -> Sample {
        Sample { compilers: compilers.iter().copied().collect(), ..sample(at) }
    }

    #[test]
    fn compilers_are_a_sign_of_life_while_they_work() {
        let mut signs = Signs::default();
        assert_eq!(signs.take(compiling(0, &[((7, 1), 10)])), [Work::Compiling]);
        assert_eq!(signs.take(compiling(5_000, &[((7, 1), 400)])), [Work::Compiling]);
        assert_eq!(signs.take(compiling(10_000, &[((7, 1), 400)])), [], "it is stopped, or waits for ever");
        assert_eq!(signs.take(compiling(15_000, &[((7, 2), 0)])), [Work::Compiling], "another one of that pid");
        assert_eq!(signs.take(compiling(20_000, &[])), []);
    }

    #[test]
    fn a_cache_that_grows_is_a_sign_of_life_and_one_that_was_not_measured_is_none() {
        let caches = |entries| Sample { caches: Some(Caches { entries, ..Caches::default() }), ..Sample::default() };
        let mut signs = Signs::default();
        assert_eq!(signs.take(caches(10)), []);
        assert_eq!(signs.take(caches(10)), []);
        assert_eq!(signs.take(sample(0)), []);
        assert_eq!(signs.take(caches(10)), []);
        assert_eq!(signs.take(caches(11)), [Work::Caching]);
        assert_eq!(signs.take(sample(0)), []);
        assert_eq!(signs.take(caches(12)), [Work::Caching], "the last measure is remembered");
    }

    #[test]
    fn only_gpu_memory_that_was_never_held_before_is_progress() {
        let gpu = |bytes| Sample { gpu_bytes: Some(bytes), ..Sample::default() };
        let mut signs = Signs::default();
        assert_eq!(signs.take(gpu(500 * MIB)), []);
        assert_eq!(signs.take(gpu(600 * MIB)), [Work::Filling]);
        assert_eq!(signs.take(gpu(300 * MIB)), []);
        assert_eq!(signs.take(gpu(600 * MIB)), [], "freed and taken again, as a stuck allocator may for ever");
        assert_eq!(signs.take(gpu(620 * MIB)), [Work::Filling]);
    }

    #[test]
    fn only_compilation_is_a_sign_of_life_of_an_engine_that_serves() {
        let counts = [Work::Reading, Work::Compiling, Work::Caching, Work::Filling].map(Work::is_compilation);
        assert_eq!(counts, [false, true, true, false]);
    }

    #[test]
    fn compilers_are_known_by_name_and_ranks_are_none() {
        for name in ["nvcc", "cicc", "ptxas", "ptxas-blackwell", "ninja", "cc1plus", "x86_64-linux-gn", "clang"] {
            assert!(is_compiler(name), "{name}");
        }
        for name in ["sglang::schedul", "python3", "sh", "sglangd", "nvidia-smi", ""] {
            assert!(!is_compiler(name), "{name}");
        }
    }
}
