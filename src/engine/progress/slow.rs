//! Why a start takes long, in words, where that is known.

use std::fmt;

/// Why a start takes long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slow {
    /// The weights are not in the page cache: so many bytes a second come from the disk.
    ColdWeights(u64),
    Compiling,
    Tuning,
}

impl fmt::Display for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ColdWeights(rate) => write!(
                f,
                "the weights are not in the page cache: they come from the disk at {:.2} GB/s",
                *rate as f64 / 1e9
            ),
            Self::Compiling => {
                f.write_str("kernels are compiled, which takes 10 to 20 minutes where DeepGEMM's cache is cold")
            }
            Self::Tuning => f.write_str("FlashInfer tries which kernels are the fastest"),
        }
    }
}
