//! The heavy tests: the real engine, a real systemd, a real container. All are `#[ignore]`d so that
//! `cargo nextest run` stays quick; `tests/run` prepares what they need and runs them one at a time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, clippy::print_stdout)]

mod harness;

mod config_proof;
mod container;
mod crowds;
mod degraded;
mod hub_cache;
mod real_clients;
mod real_engine;
mod systemd;
