//! Whether what is to come fits: free bytes of the cache's disk against bytes to fetch, before the first of them.

use std::path::PathBuf;

use serde::Serialize;

use super::error::FetchError;
use super::prepare::PlannedRepo;
use super::settings::Settings;

/// Room that is left free beside the bytes to fetch: folders, refs, the marker, other writers.
const SLACK: u64 = 64 << 20;

/// Room on the cache's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Space {
    pub folder: PathBuf,
    /// Bytes still to come, and some slack; zero where all is there.
    pub needed: u64,
    pub free: u64,
    /// For whom, in a message.
    #[serde(skip)]
    pub repo: String,
}

impl Space {
    /// Asks the disk.
    pub fn look(planned: &[PlannedRepo], settings: &Settings) -> Result<Self, FetchError> {
        let wants = |repo: &&PlannedRepo| repo.plan.bytes_to_fetch() > 0;
        let first = planned.iter().find(wants);
        let bytes: u64 = planned.iter().map(|repo| repo.plan.bytes_to_fetch()).sum();
        let free = match (settings.free_space, first.or(planned.first())) {
            (Some(figure), _) => figure,
            (None, Some(repo)) => repo.cache().free_space()?,
            (None, None) => 0,
        };
        Ok(Self {
            folder: settings.cache.clone(),
            needed: if first.is_some() { bytes.saturating_add(SLACK) } else { 0 },
            free,
            repo: first.map(|repo| repo.request.repo.clone()).unwrap_or_default(),
        })
    }

    /// Refuses, with numbers, what does not fit.
    pub fn enough(&self) -> Result<(), FetchError> {
        if self.free >= self.needed {
            return Ok(());
        }
        let (need, free) = (self.needed, self.free);
        Err(FetchError::NoSpace { path: self.folder.clone(), repo: self.repo.clone(), need, free })
    }
}
