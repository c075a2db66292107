//! The one table of exit codes (sysexits where they fit).

/// How the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Ok,
    /// The command line was wrong.
    Usage,
    /// The configuration was wrong.
    Config,
    /// The weights are missing or corrupt.
    Weights,
    /// The engine cannot start, and repeating would not help.
    Engine,
    /// A defect of sglangd, or of the machine under it (no permission, no descriptors).
    Bug,
    /// The engine failed again and again.
    CrashLoop,
    /// Ended by this signal.
    Signal(i32),
}

impl Exit {
    /// Whose code this is, of those that a start may end with; a code that is nobody's is a defect.
    pub fn of(code: u8) -> Self {
        [Self::Ok, Self::Usage, Self::Config, Self::Weights, Self::Engine, Self::CrashLoop]
            .into_iter()
            .find(|exit| exit.code() == code)
            .unwrap_or(Self::Bug)
    }

    pub fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Usage => 64,
            Self::Config => 65,
            Self::Weights => 66,
            Self::Engine => 69,
            Self::Bug => 70,
            Self::CrashLoop => 75,
            Self::Signal(n) => 128u8.saturating_add(u8::try_from(n).unwrap_or(0)),
        }
    }
}
