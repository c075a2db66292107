//! The simulated engine: what the demo and the tests run in place of SGLang.
//!
//! Nothing of sglangd behaves differently before it: it is told the same words, launched the same
//! way, and asked by the same routes.

pub mod engine;
