//! A node whose GPUs are files: what tests set in NVML's place.
//!
//! `gpus.json` is a [`Sight`]. A file `INDEX-PID` beside it holds so many bytes on that GPU for as long
//! as the process lives; with the pid 0, for as long as the file is there, by nobody who can be seen.

use std::fs;
use std::path::Path;

use super::gpus::{Holder, Look, Sight};
use crate::sys::proc;

pub fn look(folder: &Path) -> Look {
    let file = folder.join("gpus.json");
    let read = fs::read(&file).map_err(|e| e.to_string());
    let mut sight: Sight = match read.and_then(|bytes| serde_json::from_slice(&bytes).map_err(|e| e.to_string())) {
        Ok(sight) => sight,
        Err(error) => return Look::Nothing(format!("{}: {error}", file.display())),
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some((index, pid)) = name.to_str().and_then(|name| name.split_once('-')) else { continue };
        let (Ok(index), Ok(pid)) = (index.parse::<u32>(), pid.parse::<i32>()) else { continue };
        let bytes: u64 = fs::read_to_string(entry.path()).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0);
        let Some(gpu) = sight.gpus.iter_mut().find(|gpu| gpu.index == index) else { continue };
        if pid == 0 {
            gpu.memory_used += bytes;
        } else if proc::stat(pid).is_some_and(|stat| !stat.is_zombie()) {
            gpu.memory_used += bytes;
            gpu.holders.push(Holder { pid, memory: Some(bytes), command: Some(proc::command_line(pid)) });
        }
    }
    Look::Seen(sight)
}
