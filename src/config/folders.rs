//! Where a daemon keeps what lives as long as it runs, and what lives longer.
//!
//! Creates nothing; `status` and `probe` find a running sglangd by the same rules.

use std::path::{Path, PathBuf};

use super::Sources;
use super::load::User;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folders {
    /// Sockets, the engine's YAML: gone with the machine's run.
    pub runtime: PathBuf,
    /// Records, caches, timings of earlier starts.
    pub state: PathBuf,
}

impl Folders {
    /// The flag, then sglangd's own variable, then systemd's, then root's place, then XDG's.
    pub fn find(runtime_dir: Option<PathBuf>, state_dir: Option<PathBuf>, sources: &Sources) -> Self {
        let said = |flag: Option<PathBuf>, own: &str, systemd: &str| {
            flag.or_else(|| sources.path_var(own))
                // systemd lists several folders with colons; the first is the unit's own.
                .or_else(|| {
                    sources
                        .var(systemd)
                        .and_then(|all| all.split(':').next().filter(|f| !f.is_empty()).map(PathBuf::from))
                })
                .map(|folder| sources.cwd.join(folder))
        };
        let (runtime, state) = match sources.user {
            User::Root => (PathBuf::from("/run/sglangd"), PathBuf::from("/var/lib/sglangd")),
            User::Other(uid) => {
                let runtime = sources.absolute_var("XDG_RUNTIME_DIR").map(|dir| dir.join("sglangd"));
                let state =
                    sources.absolute_var("XDG_STATE_HOME").or_else(|| Some(sources.home()?.join(".local/state")));
                let temporary = PathBuf::from(format!("/tmp/sglangd-{uid}"));
                (
                    runtime.unwrap_or_else(|| temporary.clone()),
                    state.map_or_else(|| temporary.join("state"), |dir| dir.join("sglangd")),
                )
            }
        };
        Self {
            runtime: said(runtime_dir, "SGLANGD_RUNTIME_DIR", "RUNTIME_DIRECTORY").unwrap_or(runtime),
            state: said(state_dir, "SGLANGD_STATE_DIR", "STATE_DIRECTORY").unwrap_or(state),
        }
    }

    /// The YAML that the engine reads. The suffix matters: SGLang refuses any other.
    pub fn engine_yaml(&self) -> PathBuf {
        self.runtime.join("engine.yaml")
    }

    /// Compiled kernels; recompiling them costs minutes (sglang#9867).
    pub fn engine_cache(&self) -> PathBuf {
        self.state.join("cache")
    }

    /// What the installed engine's parser said.
    pub fn inspect_cache(&self) -> &Path {
        &self.state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::WhenMissing;

    fn sources(user: User, env: &[(&str, &str)]) -> Sources {
        let env = env.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        Sources { user, env, cwd: "/work".into(), ..Sources::here(WhenMissing::BuiltIn) }
    }

    fn found(user: User, env: &[(&str, &str)]) -> (String, String) {
        let folders = Folders::find(None, None, &sources(user, env));
        (folders.runtime.display().to_string(), folders.state.display().to_string())
    }

    fn pair(runtime: &str, state: &str) -> (String, String) {
        (runtime.to_owned(), state.to_owned())
    }

    #[test]
    fn folders_come_from_the_nearest_that_was_said() {
        let user = User::Other(7);
        assert_eq!(found(User::Root, &[]), pair("/run/sglangd", "/var/lib/sglangd"));
        assert_eq!(found(user, &[]), pair("/tmp/sglangd-7", "/tmp/sglangd-7/state"));
        let xdg = [("HOME", "/h"), ("XDG_RUNTIME_DIR", "/run/user/7")];
        assert_eq!(found(user, &xdg), pair("/run/user/7/sglangd", "/h/.local/state/sglangd"));
        let systemd = [("RUNTIME_DIRECTORY", "/run/a:/run/b"), ("STATE_DIRECTORY", "/var/lib/a")];
        assert_eq!(found(user, &systemd), pair("/run/a", "/var/lib/a"));
        let own = [systemd[0], systemd[1], ("SGLANGD_RUNTIME_DIR", "mine"), ("SGLANGD_STATE_DIR", "/s")];
        assert_eq!(found(User::Root, &own), pair("/work/mine", "/s"));
        let flags = Folders::find(Some("/f".into()), None, &sources(User::Root, &own));
        assert_eq!((flags.runtime, flags.state), ("/f".into(), "/s".into()));
    }
}
