//! Alive, busy or hung: what is known about the engine from outside.

pub mod client;
