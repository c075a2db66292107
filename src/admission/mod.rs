//! Decides who may pass to the engine and when: places, a bounded queue, deadlines, `Retry-After`.
//!
//! [`queue`] is pure: no I/O, no clock, no async, `now` comes in as data. [`gate`] is the async door
//! around it that all workers of the proxy share. Neither knows HTTP: what a refusal looks like on
//! the wire is the proxy's matter.
//!
//! ```text
//!            room and a place                      ┌───────── leave ──────────┐
//!  arrive ──────────────────────────► Admitted ────┘                          ▼
//!     │                                  ▲                                 (gone)
//!     ├── no place, or gate closed ─► Waiting ── deadline ─► Expired          ▲
//!     │                                  ├────── turn_away ► Refused          │
//!     └── queue full, or hopeless ► Refused     └─ cancel ────────────────────┘
//! ```

pub mod gate;
pub mod queue;
pub mod terms;

pub use gate::{Admission, Counts, Refused, Ticket};
pub use queue::Limits;
pub use terms::{Caller, KeyId, Priority, Terms};
