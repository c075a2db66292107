//! Flags whose values mean something to sglangd itself, and what is wrong with them.

use super::{ExtraRepo, Kept, Resolved, Run};
use crate::config::{Flag, ModelSource};
use crate::engine::words::{names_repository, python_float};

impl Run<'_> {
    pub(super) fn log_level(&mut self, said: &Flag, words: &[String], level: &mut String) {
        let Some(word) = words.first() else { return };
        word.clone_into(level);
        match word.to_lowercase().as_str() {
            "debug" | "info" | "notset" => {}
            "warning" | "warn" | "error" | "critical" | "fatal" => self.warnings.push(format!(
                "{}: `log-level: {word}` hides what sglangd reads from the engine's log: no phases, no \
                 percentage, and a hang is seen later; use info or debug",
                said.origin
            )),
            // `getattr(logging, …)` in the engine: anything else ends in a traceback.
            _ => self.error(
                said,
                format!("`log-level` is `{word}`, which is no level"),
                "write debug, info, warning, error or critical",
            ),
        }
    }

    pub(super) fn fraction(&mut self, said: &Flag, words: &[String]) {
        let inside = words.first().and_then(|word| python_float(word)).is_some_and(|x| x > 0.0 && x < 1.0);
        if !inside {
            self.error(
                said,
                format!("`{}` is `{}`, which is not between 0 and 1", said.name, words.join(" ")),
                "it is a share of the GPU's memory, like 0.82",
            );
        }
    }

    /// Adapters are loaded by the engine itself, which may not reach the hub.
    pub(super) fn lora(&mut self, said: &Flag, words: &[String]) {
        for word in words {
            let path = serde_json::from_str::<serde_json::Value>(word)
                .ok()
                .and_then(|json| json.get("lora_path").and_then(|path| path.as_str()).map(ToOwned::to_owned))
                .or_else(|| word.split_once('=').map(|(_, path)| path.to_owned()))
                .unwrap_or_else(|| word.clone());
            if names_repository(&path) {
                self.error(
                    said,
                    format!("`{}` names the repository `{path}`: the engine runs without the hub", said.name),
                    format!("fetch it (`sglangd fetch {path}`) and name its folder; a relative folder begins with ./"),
                );
            }
        }
    }

    pub(super) fn repository(
        &mut self,
        flag: &Kept<'_>,
        words: &[String],
        revision: Option<String>,
        out: &mut Resolved,
    ) {
        let Some(repo) = words.first().filter(|word| names_repository(word)) else { return };
        let own = match &self.config.model.source {
            ModelSource::Repo { repo: own, revision } if own == repo => Some(revision.clone()),
            _ => None,
        };
        out.extra_repos.push(ExtraRepo {
            flag: flag.name.clone(),
            repo: repo.clone(),
            revision: revision.or(own).unwrap_or_else(|| "main".to_owned()),
        });
    }
}
