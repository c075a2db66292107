//! This process behind others: for CPU and for the disk.
//!
//! # Safety contract
//! One system call with three numbers and no pointer.
#![allow(unsafe_code)]

use std::io;

use nix::libc;
use rustix::process::{Pid, setpriority_process};

/// `IOPRIO_WHO_PROCESS`, and zero for the caller.
const OURSELVES: [libc::c_long; 2] = [1, 0];
/// A priority's class lies above its level.
const CLASS_SHIFT: u32 = 13;

/// The disk's scheduling classes that need no rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskClass {
    /// The lowest level of the usual class.
    LastOfBestEffort,
    Idle,
}

/// For this thread and those it starts from now on. Call it before there are others.
pub fn set_nice(nice: i32) -> io::Result<()> {
    Ok(setpriority_process(None::<Pid>, nice)?)
}

/// The same for the disk; a disk without such a scheduler ignores it.
pub fn set_disk_class(class: DiskClass) -> io::Result<()> {
    let value: libc::c_long = match class {
        DiskClass::LastOfBestEffort => (2 << CLASS_SHIFT) | 7,
        DiskClass::Idle => 3 << CLASS_SHIFT,
    };
    // SAFETY: three numbers; the kernel reads no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, OURSELVES[0], OURSELVES[1], value) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
