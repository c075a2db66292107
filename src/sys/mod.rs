//! The only place with `unsafe`, and what talks to the kernel about processes.
//!
//! Each file with `unsafe` begins with its safety contract. Nothing here knows what an engine is.

pub mod cgroup;
pub mod end;
pub mod fd;
pub mod memory;
pub mod priority;
pub mod proc;
pub mod receive;
pub mod seccomp;
pub mod sha256;
pub mod slab;
pub mod spawn;
pub mod tcp;
