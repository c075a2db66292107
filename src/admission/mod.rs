//! Decides who may pass to the engine and when: places, a bounded queue that is fair between keys,
//! deadlines, `Retry-After`.
//!
//! [`queue`] is pure: no I/O, no clock, no async, `now` comes in as data; [`order`] is its part that
//! says who is next. [`gate`] is the async door around it that all workers of the proxy share. None
//! knows HTTP: what a refusal looks like on the wire is the proxy's matter.
//!
//! ```text
//!            room and places                       ┌───────── leave ──────────┐
//!  arrive ──────────────────────────► Admitted ────┘                          ▼
//!     │                                  ▲                                 (gone)
//!     ├── no place, or gate closed ─► Waiting ── deadline ─► Expired          ▲
//!     │                                  ├── a shorter line ► Displaced       │
//!     │                                  ├────── turn_away ► Refused          │
//!     └── queue full, or hopeless ► Refused     └─ cancel ────────────────────┘
//! ```

pub mod gate;
mod order;
pub mod queue;
pub mod sizing;
pub mod terms;

pub use gate::{Admission, Counts, Refused, Ticket};
pub use queue::{Bound, Limits};
pub use terms::{Caller, KeyId, Priority, Terms};
