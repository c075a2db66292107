//! What comes under HTTP on the public side: from a bound listener to a byte stream on which HTTP may
//! begin.
//!
//! ```text
//!  listener ── accept ─► socket ── arrival (PROXY, TLS; bounded) ─► wire ─► HTTP
//!                                     ▲
//!  files ── renewal ─► identity ──────┘
//! ```
//!
//! [`super::wire`] is what tap, service and answer know of a connection together. Nothing here parses
//! HTTP.

pub mod arrival;
pub mod counts;
pub mod crowd;
pub mod identity;
pub mod listener;
pub mod outbox;
pub mod proxy_header;
pub mod renewal;
pub mod seldom;
pub mod socket;
pub mod tls;
