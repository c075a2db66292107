//! The core: what state the engine is in, and what is done about it.
//!
//! `step` decides (pure); `driver` carries out and reports back (the only async file).

pub mod acquire;
pub mod autopsy;
pub mod cause;
pub mod driver;
pub mod fetcher;
pub mod findings;
pub mod half;
pub mod loading;
pub mod prepare;
pub mod releasing;
pub mod report;
pub mod running;
pub mod step;
#[cfg(test)]
mod worlds;
