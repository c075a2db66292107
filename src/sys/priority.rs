//! Puts this process behind others, for processor and disk.
//!
//! # Safety contract
//! `ioprio_set` takes three integers and touches no memory of ours; libc has no wrapper for it, so it is called by
//! number. It concerns the calling thread and the threads that it starts afterwards.
#![allow(unsafe_code)]

use std::io;

use nix::libc;

/// A priority's class lies above its level.
const CLASS_SHIFT: u32 = 13;
const WHO_PROCESS: libc::c_int = 1;
const NICE: i32 = 10;

/// The disk's scheduling classes that need no rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskClass {
    /// The lowest level of the usual class.
    LastOfBestEffort,
    /// Only when nobody else wants the disk.
    Idle,
}

/// Best effort: where the kernel refuses, we only disturb more.
pub fn give_way() {
    let _ = set_nice(NICE);
    let _ = set_disk_class(DiskClass::LastOfBestEffort);
}

/// For this thread and those it starts from now on: to be called before there are others.
pub fn set_nice(nice: i32) -> io::Result<()> {
    Ok(rustix::process::setpriority_process(None, nice)?)
}

/// The same for the disk; a disk without such a scheduler ignores it.
pub fn set_disk_class(class: DiskClass) -> io::Result<()> {
    // SAFETY: see the contract at the top.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, class.number()) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl DiskClass {
    fn number(self) -> libc::c_int {
        match self {
            Self::LastOfBestEffort => (2 << CLASS_SHIFT) | 7,
            Self::Idle => 3 << CLASS_SHIFT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_gives_way_is_behind_the_others_and_so_are_its_own() {
        // In a thread: the test's process keeps its place.
        std::thread::spawn(|| {
            let of = || {
                // SAFETY: integers only.
                unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, 0) }
            };
            give_way();
            assert_eq!(of(), i64::from(DiskClass::LastOfBestEffort.number()));
            assert_eq!(std::thread::spawn(of).join().unwrap(), i64::from(DiskClass::LastOfBestEffort.number()));
            set_disk_class(DiskClass::Idle).unwrap();
            assert_eq!(of(), i64::from(DiskClass::Idle.number()));
        })
        .join()
        .unwrap();
    }
}
