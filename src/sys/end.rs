//! Waits for the end of a process that is not our child, by a handle on it.
//!
//! # Safety contract
//! The descriptor that is registered belongs to an [`OwnedFd`] which the registration owns: it stays open
//! and stays the same until the registration is dropped.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Returns with the end of the process, collected by its parent or not. Inside a runtime.
pub async fn of(process: OwnedFd) -> io::Result<()> {
    // SAFETY: the contract at the top; `OwnedFd` names one descriptor for its whole life.
    let registered = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) };
    let process = registered.map_err(|error| error.into_parts().1)?;
    // A pidfd becomes readable with the end of the process, and stays so.
    process.readable().await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::sys::proc;

    #[tokio::test]
    async fn the_end_is_told_before_anybody_collects_it_and_not_sooner() {
        let mut child = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().expect("cat");
        let pid = i32::try_from(child.id()).expect("a pid");
        let handle = proc::open(pid, proc::stat(pid).expect("it lives").start_time).expect("a handle");
        let mut end = tokio::spawn(of(handle));
        assert!(tokio::time::timeout(Duration::from_millis(20), &mut end).await.is_err(), "it lives");
        drop(child.stdin.take());
        tokio::time::timeout(Duration::from_secs(20), end).await.expect("told").expect("no panic").expect("no error");
        assert!(proc::stat(pid).is_some_and(|stat| stat.is_zombie()), "nobody has collected it");
        child.wait().expect("collected");
    }
}
