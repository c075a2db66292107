//! Verbs that the tests are written in.
#![allow(dead_code)]

pub mod alone;
pub mod client;
pub mod daemon;
pub mod engine;
pub mod front;
pub mod hpack;
pub mod http2;
pub mod hub;
pub mod malformed;
pub mod pki;
pub mod processes;
pub mod scene;
pub mod setup;
pub mod xet;
