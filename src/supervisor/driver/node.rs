//! What the driver knows of the machine: its GPUs now and then, and what it said while an engine lived.

use std::time::Duration;

use tokio::time::Instant;

use super::{Driver, Report, State};
use crate::link::status::{GpuStatus, RankStatus};
use crate::node::gpus::{Blame, Look, Sight, Xid, worst};
use crate::node::kernel_log;
use crate::supervisor::autopsy::NodeFound;
use crate::supervisor::releasing::Uses;
use crate::sys::cgroup;

/// Memory moves while an engine loads; else the figures are for people.
const LOOK_LOADING: Duration = Duration::from_secs(2);
const LOOK_ELSE: Duration = Duration::from_secs(10);
/// Errors kept of one engine's life.
const XIDS: usize = 256;

/// The last look, and where the present engine's life began.
#[derive(Debug, Default)]
pub(super) struct NodeFacts {
    look: Option<Look>,
    asked: Option<Instant>,
    in_flight: bool,
    /// Of the engine that is being prepared or lives.
    pub uses: Option<Uses>,
    born: Born,
    xids: Vec<Xid>,
}

/// The counters at a launch.
#[derive(Debug, Clone, Copy, Default)]
struct Born {
    oom_kills: Option<u64>,
    log: u64,
}

/// What an examination takes along, to ask the machine off the loop.
#[derive(Debug)]
pub(super) struct Witness {
    born: Born,
    xids: Vec<Xid>,
    lost: Vec<String>,
    pids: Vec<i32>,
}

impl NodeFacts {
    /// An engine is being launched: what the machine says from now on is about it.
    pub fn launched(&mut self) {
        self.born = Born { oom_kills: cgroup::oom_kills(), log: kernel_log::now() };
        self.xids.clear();
    }

    pub fn look(&self) -> Option<&Look> {
        self.look.as_ref()
    }

    pub fn sight(&self) -> Option<&Sight> {
        self.look.as_ref().and_then(Look::sight)
    }

    pub fn witness(&self, ranks: &[RankStatus], main: Option<i32>) -> Witness {
        Witness {
            born: self.born,
            xids: self.xids.clone(),
            lost: self.sight().map(|sight| sight.lost.clone()).unwrap_or_default(),
            pids: ranks.iter().map(|rank| rank.pid).chain(main).collect(),
        }
    }
}

impl Witness {
    /// Blocking: the kernel's log, where it may be read.
    pub fn found(mut self) -> NodeFound {
        let records = kernel_log::read().unwrap_or_default();
        self.xids.extend(kernel_log::xids(&records, self.born.log));
        let killed = kernel_log::killed_for_memory(&records, self.born.log);
        let named = self.pids.iter().any(|pid| killed.contains(pid));
        let counted = match (self.born.oom_kills, cgroup::oom_kills()) {
            (Some(before), Some(now)) => Some(now > before),
            _ => None,
        };
        NodeFound {
            oom_kill: if named { Some(true) } else { counted },
            hardware: worst(&self.xids, &self.lost, Blame::Hardware),
            gpu_fault: worst(&self.xids, &[], Blame::Program),
        }
    }
}

impl Driver {
    /// Now and then; never two looks at once, since a driver may hang.
    pub(super) fn look_at_gpus(&mut self) {
        // Memory that fills is progress: seen often enough to count before a start is called stalled.
        let loading = LOOK_LOADING.min(self.config().start.stall / 4);
        let every = if matches!(self.state(), State::Loading { .. }) { loading } else { LOOK_ELSE };
        if self.node.in_flight || self.node.asked.is_some_and(|at| at.elapsed() < every) {
            return;
        }
        (self.node.in_flight, self.node.asked) = (true, Some(Instant::now()));
        let (gpus, reports) = (self.room.gpus.clone(), self.reports.clone());
        tokio::spawn(async move {
            let look = gpus.look().await;
            let _ = reports.send(Report::Gpus(look)).await;
        });
    }

    pub(super) fn saw_gpus(&mut self, look: Look) {
        self.node.in_flight = false;
        match (&self.node.look, &look) {
            (None, Look::Nothing(why)) => tracing::info!("no GPU facts: {why}"),
            (Some(Look::Seen(_)), Look::Nothing(why)) => tracing::warn!("no GPU facts any more: {why}"),
            (None | Some(Look::Nothing(_)), Look::Seen(sight)) => {
                let names: Vec<String> =
                    sight.gpus.iter().map(|gpu| format!("{} {} ({})", gpu.index, gpu.name, gpu.uuid)).collect();
                tracing::info!("GPUs, driver {}: {}", sight.driver, names.join(", "));
            }
            _ => {}
        }
        if let Some(sight) = look.sight() {
            let known = self.node.sight().map(|sight| sight.lost.clone()).unwrap_or_default();
            for lost in sight.lost.iter().filter(|lost| !known.contains(lost)) {
                tracing::error!("the driver does not reach {lost}");
            }
            for xid in &sight.xids {
                let meaning = xid.meaning().map(|(_, words)| format!(" ({words})")).unwrap_or_default();
                tracing::warn!("the driver reports Xid {}{meaning} on {}", xid.number, xid.gpu);
            }
            self.node.xids.extend_from_slice(&sight.xids);
            let over = self.node.xids.len().saturating_sub(XIDS);
            self.node.xids.drain(..over);
        }
        self.node.look = Some(look);
    }

    /// What these processes hold of the engine's GPUs, as far as it can be told from others' memory.
    pub(super) fn gpu_bytes(&self, members: &[i32]) -> Option<u64> {
        let sight = self.node.sight()?;
        let chosen = self.node.uses.as_ref()?.choose(&sight.gpus).gpus;
        (!chosen.is_empty()).then(|| chosen.iter().map(|gpu| gpu.held_by(members)).sum())
    }

    pub(super) fn gpu_status(&self) -> Vec<GpuStatus> {
        let Some(sight) = self.node.sight() else { return Vec::new() };
        let chosen = self.node.uses.as_ref().map(|uses| uses.choose(&sight.gpus).gpus);
        let status = |gpu: &crate::node::gpus::Gpu| GpuStatus {
            index: gpu.index,
            uuid: gpu.uuid.clone(),
            name: gpu.name.clone(),
            driver: sight.driver.clone(),
            memory_total: gpu.memory_total,
            memory_used: gpu.memory_used,
            // A part of it is the engine's, too.
            engine: chosen.as_ref().map(|chosen| chosen.iter().any(|one| one.index == gpu.index)),
        };
        sight.gpus.iter().map(status).collect()
    }
}
