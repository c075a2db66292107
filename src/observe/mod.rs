//! What sglangd says about itself: logs, status, metrics.

pub mod admin;
pub mod bundle;
pub mod clock;
pub mod journal;
pub mod logging;
mod operator;
