//! What an engine can leave behind: a process that fled its session, files in shared memory.

use std::process::{Command, Stdio};

use super::{Ended, logline};

pub const ROLE: &str = "::stray";

/// Starts a process that will be in nobody's session and nobody's child.
pub fn release() {
    let Ok(own) = super::own_program() else { return };
    if let Ok(mut first) = Command::new(own).args(["simulate", ROLE, "first"]).stdin(Stdio::null()).spawn() {
        let _ = first.wait();
    }
}

pub fn run(words: &[String]) -> Ended {
    if words.first().map(String::as_str) == Some("first") {
        // A group leader cannot lead a session; a fresh child is none.
        if let Err(error) = nix::unistd::setsid() {
            logline::raw(&format!("stray: setsid: {error}\n"));
        }
        if let Ok(own) = super::own_program() {
            // Not waited for: this process ends at once, which is the point.
            let _ = Command::new(own).args(["simulate", ROLE, "second"]).spawn();
        }
        return Ended::Code(0);
    }
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Ended::Code(70);
    };
    runtime.block_on(async {
        let kind = tokio::signal::unix::SignalKind::terminate();
        let Ok(mut deaf) = tokio::signal::unix::signal(kind) else { return };
        while deaf.recv().await.is_some() {}
    });
    Ended::Code(0)
}

/// Files of the names that killed engines leave, in `/dev/shm` and `TMPDIR`. Held open while the
/// engine lives: a semaphore of multiprocessing is unnamed only by a clean exit.
pub fn litter() -> Vec<std::fs::File> {
    let pid = std::process::id();
    let shm = std::path::Path::new("/dev/shm");
    let temp = std::env::temp_dir();
    let files = [
        shm.join(format!("sem.mp-sim{pid}")),
        shm.join(format!("sgl_shm_mq_{pid}_sim")),
        shm.join(format!("sglang_loads_{pid}_sim.shm")),
        shm.join(format!("nccl-sim{pid}")),
        temp.join(format!("tmp{pid}sim")),
    ];
    files
        .iter()
        .filter_map(|path| {
            std::fs::write(path, [0u8; 32]).ok()?;
            std::fs::File::open(path).ok()
        })
        .collect()
}
