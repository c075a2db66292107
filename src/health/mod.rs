//! Alive, busy or hung: what is known about the engine from outside.
//!
//! `client` asks, `probe` knows which questions tell what, `verdict` judges (pure). Nothing here
//! kills anything: `supervisor::step` decides.

pub mod client;
pub mod probe;
pub mod verdict;
