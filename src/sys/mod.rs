//! (being written)

pub mod fd;
