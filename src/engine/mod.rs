//! What the engine is told and says.

pub mod log;
