//! The simulated engine and hub: what the demo and the tests run in place of SGLang and of a model hub.
//!
//! Nothing of sglangd behaves differently before them: they are told the same words, launched the
//! same way, and asked by the same routes.

pub mod engine;
pub mod hub;
mod hub_answers;
pub mod model;
