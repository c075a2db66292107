//! Whether the engine's GPUs are free enough for the next engine: one pure function of what is seen.
//!
//! A driver frees a dead process's memory 120 to 170 ms after its exit (measured, one H100). So first the
//! memory is to come back to what was held before any engine of ours lived. What does not come back within
//! the wait is somebody else's, and stands in the way only where the rest is too small.

use std::collections::BTreeMap;

use super::gpus::{Gpu, Holder};

/// Used memory moves by this much without anybody's doing (contexts of the driver, `nvidia-smi`); the
/// smallest CUDA context that stays behind is twice as large.
const NOISE: u64 = 256 << 20;
/// What the driver keeps for itself does not count against a share of nearly all the memory.
const DRIVERS: u64 = 1 << 30;

/// Bytes used on each GPU, by uuid, while no engine of ours lived: the least that was ever seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Baseline(BTreeMap<String, u64>);

impl Baseline {
    /// Call only while no engine lives.
    pub fn learn(&mut self, gpus: &[Gpu]) {
        for gpu in gpus {
            let least = self.0.entry(gpu.uuid.clone()).or_insert(gpu.memory_used);
            *least = (*least).min(gpu.memory_used);
        }
    }

    /// What living processes are seen to hold is no dead engine's: nothing of ours lives.
    fn near(&self, gpu: &Gpu) -> bool {
        let strangers = gpu.holders.iter().filter(|holder| holder.command.is_some()).filter_map(|holder| holder.memory);
        let unexplained = gpu.memory_used.saturating_sub(strangers.sum());
        self.0.get(&gpu.uuid).is_none_or(|before| unexplained <= before + NOISE)
    }
}

/// Whether there is still hope that memory comes back by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    Still,
    Over,
}

/// A GPU in the way of the next start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub index: u32,
    pub free: u64,
    pub total: u64,
    /// Bytes that the engine will take; none: it has enough, but the memory is not back yet.
    pub needed: Option<u64>,
    pub holders: Vec<Holder>,
}

/// `share`: what part of a GPU's memory the engine will take (`mem-fraction-static`). Nobody: go.
pub fn in_the_way(gpus: &[Gpu], before: &Baseline, share: f64, wait: Wait) -> Vec<Held> {
    let held = |gpu: &Gpu| {
        let needed = ((gpu.memory_total as f64 * share) as u64).min(gpu.memory_total.saturating_sub(DRIVERS));
        let small = gpu.memory_free() < needed;
        let late = wait == Wait::Still && !before.near(gpu);
        (small || late).then(|| Held {
            index: gpu.index,
            free: gpu.memory_free(),
            total: gpu.memory_total,
            needed: small.then_some(needed),
            holders: gpu.holders.clone(),
        })
    };
    gpus.iter().filter_map(held).collect()
}

/// In one sentence, for people. `shown` makes a command line presentable.
pub fn sentence(held: &[Held], shown: impl Fn(&str) -> String) -> String {
    let one = |gpu: &Held| {
        let who = if gpu.holders.is_empty() {
            "by a process that is not visible from here (another container's, most likely)".to_owned()
        } else {
            let names: Vec<String> = gpu.holders.iter().map(|holder| named(holder, &shown)).collect();
            format!("by {}", names.join(" and "))
        };
        let used = gib(gpu.total.saturating_sub(gpu.free));
        match gpu.needed {
            Some(needed) => format!(
                "GPU {} has {} free and the engine needs {}: {used} of its memory are held {who}",
                gpu.index,
                gib(gpu.free),
                gib(needed)
            ),
            None => format!("GPU {}'s memory is not free yet: {used} are held {who}", gpu.index),
        }
    };
    let all: Vec<String> = held.iter().map(one).collect();
    format!("{}.", all.join("; "))
}

fn named(holder: &Holder, shown: &impl Fn(&str) -> String) -> String {
    const LONGEST: usize = 80;
    let memory = holder.memory.map_or_else(String::new, |bytes| format!(", {}", gib(bytes)));
    match &holder.command {
        Some(command) => {
            let command = shown(command);
            let short: String = command.chars().take(LONGEST).collect();
            let dots = if short.len() < command.len() { "…" } else { "" };
            format!("pid {} ({short}{dots}{memory})", holder.pid)
        }
        None => format!("pid {} (not visible from this container{memory})", holder.pid),
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn gpu(index: u32, used: u64) -> Gpu {
        Gpu {
            index,
            uuid: format!("GPU-{index}"),
            name: "NVIDIA H100".into(),
            memory_total: 80 * GIB,
            memory_used: used,
            holders: Vec::new(),
            parts: Vec::new(),
        }
    }

    fn baseline(gpus: &[Gpu]) -> Baseline {
        let mut before = Baseline::default();
        before.learn(gpus);
        before
    }

    fn blocked(gpus: &[Gpu], before: &Baseline, wait: Wait) -> Vec<u32> {
        in_the_way(gpus, before, 0.8, wait).iter().map(|held| held.index).collect()
    }

    #[test]
    fn memory_is_to_come_back_to_what_was_before() {
        let before = baseline(&[gpu(0, 600 << 20), gpu(1, 600 << 20)]);
        assert_eq!(blocked(&[gpu(0, 50 * GIB), gpu(1, 620 << 20)], &before, Wait::Still), [0]);
        assert_eq!(blocked(&[gpu(0, 1100 << 20), gpu(1, 0)], &before, Wait::Still), [0], "one context is left");
        assert_eq!(blocked(&[gpu(0, 700 << 20), gpu(1, 0)], &before, Wait::Still), [0; 0]);
    }

    #[test]
    fn a_stranger_is_in_the_way_only_where_the_rest_is_too_small() {
        let before = baseline(&[gpu(0, 0)]);
        // 80 % of 80 GiB are 64: 10 GiB may be anybody's.
        assert_eq!(blocked(&[gpu(0, 10 * GIB)], &before, Wait::Still), [0], "it may be the dead engine's own");
        assert_eq!(blocked(&[gpu(0, 10 * GIB)], &before, Wait::Over), [0; 0]);
        assert_eq!(blocked(&[gpu(0, 40 * GIB)], &before, Wait::Over), [0]);
        // One that was there before the first launch is no less in the way.
        assert_eq!(blocked(&[gpu(0, 40 * GIB)], &baseline(&[gpu(0, 40 * GIB)]), Wait::Over), [0]);
    }

    #[test]
    fn what_a_living_stranger_is_seen_to_hold_is_not_waited_for() {
        let before = baseline(&[gpu(0, 0)]);
        let mut seen = gpu(0, 10 * GIB);
        seen.holders = vec![Holder { pid: 1, memory: Some(10 * GIB), command: None }];
        assert_eq!(blocked(&[seen.clone()], &before, Wait::Still), [0], "it may be the dead engine's rank");
        seen.holders[0].command = Some("python".into());
        assert_eq!(blocked(&[seen], &before, Wait::Still), [0; 0]);
    }

    #[test]
    fn a_share_of_all_the_memory_does_not_wait_for_the_drivers_own() {
        let seen = [gpu(0, 700 << 20)];
        assert!(in_the_way(&seen, &baseline(&seen), 0.995, Wait::Over).is_empty());
    }

    #[test]
    fn the_least_that_was_seen_is_the_baseline() {
        let mut before = baseline(&[gpu(0, 50 * GIB)]);
        before.learn(&[gpu(0, GIB)]);
        before.learn(&[gpu(0, 9 * GIB)]);
        assert_eq!(blocked(&[gpu(0, 9 * GIB)], &before, Wait::Still), [0]);
    }

    #[test]
    fn the_holder_is_named_or_said_to_be_out_of_sight() {
        let mut gpu = gpu(3, 40 * GIB);
        let said = |gpu: &Gpu| {
            let held = in_the_way(std::slice::from_ref(gpu), &Baseline::default(), 0.9, Wait::Over);
            sentence(&held, |command| command.replace("s3cret", "(redacted)"))
        };
        assert_eq!(
            said(&gpu),
            "GPU 3 has 40.0 GiB free and the engine needs 72.0 GiB: 40.0 GiB of its memory are held by a process \
             that is not visible from here (another container's, most likely)."
        );
        gpu.holders = vec![
            Holder { pid: 4711, memory: Some(39 * GIB), command: Some("python train.py --key s3cret".into()) },
            Holder { pid: 9, memory: None, command: None },
        ];
        assert_eq!(
            said(&gpu),
            "GPU 3 has 40.0 GiB free and the engine needs 72.0 GiB: 40.0 GiB of its memory are held by pid 4711 \
             (python train.py --key (redacted), 39.0 GiB) and pid 9 (not visible from this container)."
        );
    }
}
