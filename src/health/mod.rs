//! Alive, busy or hung: what is known about the engine from outside.
//!
//! `client` asks, `probe` and `loads` know which questions, `figures` what the answers tell, `signs` sees work in
//! what processes do, `watch` remembers all of it, `verdict` judges. Nothing here kills anything:
//! `supervisor::step` decides.

pub mod client;
pub mod figures;
pub mod loads;
pub mod probe;
pub mod signs;
pub mod verdict;
pub mod watch;
