//! One look at an engine's processes from outside: who it is, who is stopped, who works.
//!
//! Blocking (`/proc`, the kernel caches), and judges nothing: `health` does.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::health::signs::{Caches, Millis, Sample, is_compiler};
use crate::launch::caches;
use crate::launch::tree::Tree;
use crate::link::status::RankStatus;
use crate::sys::proc::{self, Stat};

/// What was seen.
#[derive(Debug)]
pub struct Look {
    /// The main process that was looked at: another engine may be here when this arrives.
    pub of: i32,
    /// Its ranks, by title.
    pub ranks: Vec<(RankStatus, Stat)>,
    /// The first of them, or the main process, that is stopped.
    pub stopped: Option<Stat>,
    /// All of its processes.
    pub members: Vec<i32>,
    /// Bytes that they have read from disks since they live; none: not ours to see.
    pub stored: Option<u64>,
    pub sample: Sample,
}

/// Looks at all of it. `caches`: the folders of compiled kernels; none: not this time.
pub fn look(tree: &Tree, at: Millis, caches: &[PathBuf]) -> Look {
    let members = tree.members();
    let of = tree.leader.map_or(0, |leader| leader.pid);
    let mut sample = Sample { at, ..Sample::default() };
    let mut stored = None;
    for member in &members {
        let id = (member.pid, member.start_time);
        // Not ours to read (another user, hidepid), or gone: no evidence.
        if let Some(bytes) = proc::bytes_read(member.pid) {
            sample.read.insert(id, bytes.sum());
            *stored.get_or_insert(0) += bytes.stored;
        }
        if is_compiler(&member.comm)
            && !member.is_stopped()
            && let Some(ticks) = proc::cpu_ticks(member.pid)
        {
            sample.compilers.insert(id, ticks);
        }
    }
    if !caches.is_empty() {
        let caches::Extent { entries, bytes, newest } = caches::measure(caches);
        sample.caches = Some(Caches { entries, bytes, newest });
    }
    let ranks = ranks(&members);
    let mut needed = members.iter().filter(|member| member.pid == of).chain(ranks.iter().map(|(_, stat)| stat));
    let stopped = needed.find(|stat| stat.is_stopped()).cloned();
    Look { of, ranks, stopped, members: members.iter().map(|member| member.pid).collect(), stored, sample }
}

/// The engine's processes by their titles, in the titles' order.
pub fn ranks(members: &[Stat]) -> Vec<(RankStatus, Stat)> {
    let mut ranks: BTreeMap<(String, i32), Stat> = BTreeMap::new();
    for stat in members {
        let title = proc::command_line(stat.pid);
        if let Some(name) = title.split_whitespace().next().filter(|name| name.starts_with("sglang::")) {
            ranks.insert((name.to_owned(), stat.pid), stat.clone());
        }
    }
    ranks.into_iter().map(|((name, pid), stat)| (RankStatus { name, pid }, stat)).collect()
}
