//! What comes under HTTP on the public side: the client's socket, whatever kind it is.
//!
//! [`listener`] is where it comes from, [`socket`] the byte stream; [`super::wire`] is what tap, service and answer know of it together.
//! Nothing here parses HTTP.

pub mod listener;
pub mod socket;
