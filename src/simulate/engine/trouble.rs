//! The faults on request that belong to the main process, by when they strike.

use std::os::fd::AsFd;

use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::knobs::{Fault, Knobs};
use super::scheduler::Order;
use super::strays;

/// The faults that come some time after readiness. Never ends.
pub async fn troubles(knobs: &Knobs, orders: mpsc::Sender<Order>, last: Option<nix::unistd::Pid>) {
    let crash = knobs.find(|f| if let Fault::CrashAfter(after) = f { Some(after) } else { None });
    let stop = knobs.find(|f| if let Fault::StopRank(after) = f { Some(after) } else { None });
    let crash = async {
        if let Some(after) = crash {
            tokio::time::sleep(after).await;
            let _ = orders.send(Order::Raise).await;
        }
    };
    let stop = async {
        if let (Some(after), Some(pid)) = (stop, last) {
            tokio::time::sleep(after).await;
            let _ = nix::sys::signal::kill(pid, Signal::SIGSTOP);
        }
    };
    let eat = async {
        if let Some(after) = knobs.find(|f| if let Fault::EatMemory(after) = f { Some(after) } else { None }) {
            tokio::time::sleep(after).await;
            eat_memory().await;
        }
    };
    tokio::join!(crash, stop, eat);
    std::future::pending::<()>().await;
}

/// Bounded, so that a machine without a limit loses no more than this.
async fn eat_memory() {
    const BITE: usize = 16 << 20;
    let mut eaten = Vec::new();
    for _ in 0..128 {
        eaten.push(vec![1_u8; BITE]);
        tokio::task::yield_now().await;
    }
    std::future::pending::<()>().await;
    drop(eaten);
}

pub fn close_stdio() {
    if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
        // Another file in their place, so that no socket gets their numbers.
        let _ = nix::unistd::dup2_stdout(null.as_fd());
        let _ = nix::unistd::dup2_stderr(null.as_fd());
    }
}

/// The faults that begin with the process.
pub fn nuisances(knobs: &Knobs) {
    for fault in &knobs.faults {
        match *fault {
            Fault::IgnoreSigterm => {
                if let Ok(mut deaf) = signal(SignalKind::terminate()) {
                    tokio::spawn(async move { while deaf.recv().await.is_some() {} });
                }
            }
            Fault::LongLine(mib) => {
                let block = b"a\x1b[31m\0\xff\xfe".repeat((1 << 20) / 9);
                let mut err = std::io::stderr().lock();
                for _ in 0..mib {
                    let _ = std::io::Write::write_all(&mut err, &block);
                }
                let _ = std::io::Write::write_all(&mut err, b"\n");
            }
            Fault::FloodStdout => flood(std::io::stdout()),
            Fault::FloodStderr => flood(std::io::stderr()),
            // Held until the process ends, whichever way.
            Fault::LeakShm => std::mem::forget(strays::litter()),
            _ => {}
        }
    }
}

fn flood(mut to: impl std::io::Write + Send + 'static) {
    let lines = b"[2026-11-23 14:11:43] a line of a flood that says nothing at all\n".repeat(1000);
    // A thread of its own: it blocks whenever the pipe is full. It ends with the process. 65 MB a second are a
    // thousand times what an engine says, and leave the machine's other cores alone.
    let pause = std::time::Duration::from_millis(1);
    let _ = std::thread::Builder::new().name("flood".into()).spawn(move || {
        while to.write_all(&lines).is_ok() {
            #[allow(clippy::disallowed_methods)] // this thread alone
            std::thread::sleep(pause);
        }
    });
}
