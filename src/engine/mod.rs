//! What the engine is told: its flags, its YAML, its command line and its environment.
//!
//! Knows SGLang's words, not its process (that is `launch`) and not its health (`health`).

pub mod argv;
pub mod env;
pub mod flags;
pub mod inspect;
pub mod legacy;
mod owned;
pub mod redact;
pub mod resolve;
mod words;
pub mod yaml;
