//! `sglangd` runs the SGLang engine as a service on one machine.
//!
//! The folders follow the order of the program's life; `docs/design.md` tells the whole. The library
//! binds nothing and traps nothing: listeners, signals and the spawner are passed in by `cli`.
#![deny(unsafe_code)] // allowed in `sys` alone, whose files begin with their safety contract

pub mod admission;
pub mod cli;
pub mod config;
pub mod engine;
pub mod exit;
pub mod health;
pub mod keys;
pub mod launch;
pub mod link;
pub mod node;
pub mod observe;
pub mod proxy;
pub mod shutdown;
pub mod simulate;
pub mod supervisor;
pub mod sys;
pub mod weights;
