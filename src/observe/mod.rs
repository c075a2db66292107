//! What sglangd says about itself: logs, status, metrics.

pub mod admin;
pub mod clock;
pub mod logging;
mod operator;
