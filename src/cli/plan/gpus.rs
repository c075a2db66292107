//! What `plan` says of the GPUs: which the engine would use, and what they hold now.

use std::ffi::OsStr;
use std::fmt::Write;

use serde::Serialize;

use crate::config::{Config, redact};
use crate::engine::env::Env;
use crate::engine::resolve::Resolved;
use crate::node::gpus::{Gpu, Look, Source, look_once};
use crate::supervisor::releasing::Uses;

/// The GPUs that the engine would use, in the order of its ranks.
#[derive(Debug, Serialize)]
pub(super) struct GpuView {
    driver: Option<String>,
    engine: Vec<Gpu>,
    others: Vec<Gpu>,
    /// Why there are none.
    nothing: Option<String>,
}

impl GpuView {
    pub fn look(config: &Config, resolved: &Resolved, own: &Env, warnings: &mut Vec<String>) -> Self {
        let sight = match look_once(&Source::from_env(|name| own.get(OsStr::new(name)).cloned())) {
            Look::Seen(sight) => sight,
            Look::Nothing(why) => {
                return Self { driver: None, engine: Vec::new(), others: Vec::new(), nothing: Some(why) };
            }
        };
        let chosen = Uses::of(config, resolved, own).choose(&sight.gpus);
        warnings.extend(chosen.complaint);
        warnings.extend(sight.lost.iter().map(|lost| format!("the driver does not reach {lost}")));
        let shown = |mut gpu: Gpu| {
            for holder in &mut gpu.holders {
                holder.command = holder.command.as_deref().map(redact::text);
            }
            gpu
        };
        let others = sight.gpus.into_iter().filter(|gpu| chosen.gpus.iter().all(|one| one.index != gpu.index));
        Self {
            driver: Some(sight.driver),
            others: others.map(shown).collect(),
            engine: chosen.gpus.into_iter().map(shown).collect(),
            nothing: None,
        }
    }

    pub fn write_text(&self, out: &mut String) -> std::fmt::Result {
        if let Some(why) = &self.nothing {
            return writeln!(out, "  GPUs           {why}");
        }
        if let Some(driver) = &self.driver {
            writeln!(out, "  GPU driver     {driver}")?;
        }
        let lines = self.engine.iter().map(|gpu| (gpu, "")).chain(self.others.iter().map(|gpu| (gpu, ", not used")));
        for (gpu, whose) in lines {
            let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            let (used, total) = (gib(gpu.memory_used), gib(gpu.memory_total));
            writeln!(
                out,
                "  {:<15}{} ({}), {used:.1} of {total:.1} GiB used{whose}",
                format!("GPU {}", gpu.index),
                gpu.name,
                gpu.uuid
            )?;
        }
        Ok(())
    }
}
