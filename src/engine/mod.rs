//! What the engine is told and what it says: flags, YAML, environment; log grammar, progress, death.
//!
//! Knows SGLang's words, not its process (that is `launch`) and not its health (`health`).

pub mod argv;
pub mod death;
pub mod env;
pub mod flags;
pub mod inspect;
pub mod legacy;
pub mod log;
mod owned;
pub mod progress;
pub mod remarks;
pub mod resolve;
mod words;
pub mod yaml;
