//! Values that are each fine and exclude each other.

use std::time::Duration;

use super::Config;
use super::build::Builder;
use super::error::Mistake;

impl Builder<'_> {
    pub(super) fn cross_check(&mut self, config: &Config) {
        self.same_port(config);
        let mut warn = |text: String| self.warnings.push(text);
        if config.limits.target > config.limits.max {
            warn(format!(
                "limits.target {} is above limits.max {}: the scaling signal can never reach it",
                config.limits.target, config.limits.max
            ));
        }
        if config.start.stall > config.start.limit {
            warn("start.stall is longer than start.limit: a stalled start ends at the limit".to_owned());
        }
        if config.health.probe_interval < Duration::from_secs(30) {
            warn("health.probe_interval is below 30s: each probe is a request to the scheduler".to_owned());
        }
        if config.health.probe_timeout < Duration::from_secs(21) {
            warn("health.probe_timeout is below 21s: the engine itself answers 503 only after 20s".to_owned());
        }
        if config.shutdown.grace < Duration::from_secs(10) {
            warn(format!(
                "shutdown.grace is {} s: open streams are cut 8 s before its end, so they get next to no time",
                config.shutdown.grace.as_secs()
            ));
        }
        if config.restart.backoff > config.restart.backoff_max {
            let mut mistake = Mistake::new(
                "`restart.backoff` is longer than `restart.backoff_max`",
                "the first wait doubles up to the longest: make the longest longer",
            );
            if let Some(place) = self.value_place("restart.backoff").or(self.value_place("restart.backoff_max")) {
                mistake = mistake.at(&place, "here");
            }
            self.mistakes.push(mistake);
        }
        self.devices(config);
    }

    fn same_port(&mut self, config: &Config) {
        let (Some(public), admin) = (config.listen.public, config.listen.admin) else { return };
        let overlap = public.ip() == admin.ip() || public.ip().is_unspecified() || admin.ip().is_unspecified();
        if public.port() != admin.port() || public.port() == 0 || !overlap {
            return;
        }
        let mut mistake = Mistake::new(
            format!("`listen.public` ({public}) and `listen.admin` ({admin}) are the same port"),
            "give one of them another port (the defaults are 8000 and 8001)",
        );
        let places = (self.value_place("listen.public"), self.value_place("listen.admin"));
        match places {
            (Some(public), Some(admin)) => {
                mistake = mistake.at(&admin, "this port").also(&public, "is taken by this");
            }
            (Some(place), None) | (None, Some(place)) => mistake = mistake.at(&place, "this port"),
            (None, None) => {}
        }
        self.mistakes.push(mistake);
    }

    /// `tp` 8 with four visible GPUs cannot start; the engine would say so after a minute.
    fn devices(&mut self, config: &Config) {
        let said = config.engine.env.get("CUDA_VISIBLE_DEVICES").or(self.bases.visible_devices.as_ref());
        let one_node = !config.engine.flags.0.iter().any(|flag| flag.name == "nnodes");
        let Some(devices) = said.filter(|_| one_node) else { return };
        let visible =
            devices.split(',').map(str::trim).take_while(|device| !device.starts_with('-')).filter(|d| !d.is_empty());
        let visible = visible.count();
        // None at all: an engine on a CPU.
        if visible == 0 || visible >= config.engine.tp as usize {
            return;
        }
        let mut mistake = Mistake::new(
            format!("`engine.tp` is {} but CUDA_VISIBLE_DEVICES names {visible} GPUs ({devices})", config.engine.tp),
            "name as many GPUs as `engine.tp`, or lower `engine.tp`",
        );
        if let Some(place) = self.value_place("engine.tp") {
            mistake = mistake.at(&place, "more than there are");
        }
        if let Some(said) = self.layers.env.get("CUDA_VISIBLE_DEVICES").and_then(|said| said.last()) {
            let place = said.node.place();
            mistake =
                if mistake.place.is_some() { mistake.also(place, "the GPUs") } else { mistake.at(place, "the GPUs") };
        }
        self.mistakes.push(mistake);
    }
}
