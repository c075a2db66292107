//! The machine around the engine, as far as it tells: its GPUs, the kernel's log, its cgroups' memory.
//!
//! Only facts, and what follows from them alone. When an engine may start is the supervisor's to say.

pub mod gpus;
pub mod kernel_log;
mod nvml;
pub mod room;
pub mod visible;
mod written;
