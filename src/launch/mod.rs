//! Brings the engine's process to life and to its end: port, record, output, process tree, leftovers.
//!
//! It does not decide when: `supervisor::step` does. It knows nothing of the engine's flags or log.

pub mod beside;
pub mod caches;
pub mod guard;
pub mod leftovers;
pub mod output;
pub mod port;
pub mod reaper;
pub mod record;
pub mod spawner;
pub mod tree;
pub mod warm;
