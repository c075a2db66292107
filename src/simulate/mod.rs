//! (being written)

pub mod hub;
mod hub_answers;
pub mod model;
