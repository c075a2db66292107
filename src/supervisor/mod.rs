//! The core: what state the engine is in, and what is done about it.
//!
//! `step` decides (pure), with `restart`'s word on whether a start is tried again; `driver` carries out and reports back (the only async file).

pub mod acquire;
pub mod ahead;
pub mod autopsy;
pub mod cause;
pub mod driver;
pub mod fetcher;
pub mod findings;
pub mod half;
pub mod loading;
pub mod look;
pub mod oversight;
pub mod prepare;
pub mod releasing;
pub mod report;
pub mod restart;
pub mod running;
pub mod step;
pub mod warmth;
#[cfg(test)]
mod worlds;
