//! Whose request it is, and what is granted to whoever asks with that key.

use std::num::NonZeroU32;

/// Whose requests wait in one line and share limits: a key's, or everybody's where no key is asked.
/// Numbers are given out by who knows the names, densely from 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub u32);

impl KeyId {
    /// Nobody was asked for a key.
    pub const ANYBODY: Self = Self(0);
}

/// Who goes first when not all can. Lower ones keep a share: see [`super::queue`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    High,
    #[default]
    Normal,
    Low,
}

impl Priority {
    pub const ALL: [Self; 3] = [Self::High, Self::Normal, Self::Low];

    pub fn name(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Normal => "normal",
            Self::Low => "low",
        }
    }
}

/// What one key is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Places its requests may hold at once; none: as many as there are.
    pub concurrency: Option<NonZeroU32>,
    /// Its requests that may wait; none: as many as may wait at all.
    pub queue: Option<u32>,
    pub priority: Priority,
    /// Its share beside the others of its priority.
    pub weight: NonZeroU32,
}

impl Terms {
    /// What a key is granted of which nothing is said.
    pub const DEFAULT: Self =
        Self { concurrency: None, queue: None, priority: Priority::Normal, weight: NonZeroU32::MIN };
}

impl Default for Terms {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Who asks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Caller {
    pub key: KeyId,
    pub terms: Terms,
}

impl Caller {
    pub const ANYBODY: Self = Self { key: KeyId::ANYBODY, terms: Terms::DEFAULT };
}
