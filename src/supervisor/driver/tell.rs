//! What the driver tells the world: status page, proxy, systemd, log.

use std::io::IsTerminal as _;

use super::{Config, Driver, Env, Facts, headline};
use crate::link::EngineState;

impl Driver {
    pub(super) fn publish(&mut self) {
        let stuck = self.stuck.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let half = self.half_view.borrow().clone();
        let phase = self.loading.phase(self.state());
        let gpus = self.gpu_status();
        let in_the_way = self.room.in_the_way.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let slow = self.loading.slow(self.state());
        let facts = Facts {
            machine: &self.oversight.machine,
            config: &self.means.loaded.config,
            config_files: &self.means.loaded.files,
            importing: self.loading.is_importing(),
            phase: &phase,
            percent: self.loading.percent(self.state(), self.weights.as_ref()),
            eta_seconds: self.loading.eta_seconds(self.state()),
            eta_range_seconds: self.loading.eta_range_seconds(self.state()),
            slow: &slow,
            cause: self.cause.as_ref(),
            stuck: &stuck,
            engine: self.engine.as_ref(),
            ranks: &self.ranks,
            engine_version: self.acquired.as_ref().and_then(|a| a.engine_version.as_deref()),
            last_exit: self.last_exit.as_deref(),
            snapshots: self.acquired.as_ref().map_or(&[], |a| &a.snapshots),
            weights: self.weights.as_ref(),
            read_ahead: self.read_ahead,
            half: &half,
            listen: &self.listen,
            warnings: &self.warnings,
            uptime: self.born.elapsed(),
            gpus: &gpus,
            in_the_way: &in_the_way,
            bundle: self.bundle.as_deref(),
            suspicion: self.vigil.suspicion.as_ref(),
            suspicions: self.suspicions,
            remarks: &self.vigil.remarks,
        };
        let (status, view) = (facts.status(), facts.view());
        self.systemd.step(&status);
        let line = headline(&status);
        // The percentage moves four times a second; the log gets a line when something happens.
        let moves = |c: char| c.is_ascii_digit() || "./ %".contains(c);
        let gist = format!(
            "{}{}{}{}",
            status.slow.replace(moves, ""),
            status.state.name(),
            status.phase.trim_end_matches(moves),
            status.reason
        );
        if gist != self.headline {
            self.headline = gist;
            if status.weights.is_some() && status.state == EngineState::Fetching && std::io::stderr().is_terminal() {
                // The fetcher draws its bars there, and a line in between would leave half of them behind.
                tracing::debug!("{line}");
            } else {
                tracing::info!("{line}");
            }
        }
        self.engine_view.send_if_modified(|old| {
            let changed = *old != view;
            *old = view;
            changed
        });
        self.status.send_replace(status);
    }
}

/// The proxy parses untrusted bytes: it gets nothing it could lose, no token and no key.
pub(super) fn proxy_env(own: &Env, config: &Config) -> Env {
    let keep = ["PATH", "HOME", "LANG", "LC_ALL", "TZ", "RUST_BACKTRACE", "TERM", "NO_COLOR"];
    let mut env: Env =
        own.iter().filter(|(name, _)| keep.iter().any(|k| name == k)).map(|(n, v)| (n.clone(), v.clone())).collect();
    env.insert("SGLANGD_OBSERVE_LEVEL".into(), config.observe.level.clone().into());
    let format = match config.observe.format {
        crate::config::LogFormat::Text => "text",
        crate::config::LogFormat::Json => "json",
        crate::config::LogFormat::Journald => "journald",
    };
    env.insert("SGLANGD_OBSERVE_LOG".into(), format.into());
    env
}
