//! What the engine is told and says.

pub mod death;
pub mod log;
pub mod progress;
