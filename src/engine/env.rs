//! The environment of the engine and of the fetcher: what each inherits, what is taken away, what is
//! set whatever was said.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::config::Config;

pub type Env = BTreeMap<OsString, OsString>;

/// By this the engine's processes are found, whatever they call themselves.
pub const LAUNCH_ID: &str = "SGLANGD_LAUNCH_ID";

/// The hub's token: only the fetcher holds it.
const HUB_TOKENS: &[&str] = &["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HUGGINGFACE_HUB_TOKEN"];

/// Never inherited by the engine: they speak to the supervisor, or break what it reads.
const NOT_INHERITED: &[&str] = &[
    // systemd's words to the supervisor alone.
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LISTEN_FDNAMES",
    "CREDENTIALS_DIRECTORY",
    "FDSTORE",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "RUNTIME_DIRECTORY",
    "STATE_DIRECTORY",
    "CACHE_DIRECTORY",
    "LOGS_DIRECTORY",
    "CONFIGURATION_DIRECTORY",
    "MAINPID",
    "MANAGERPID",
    "MEMORY_PRESSURE_WATCH",
    "MEMORY_PRESSURE_WRITE",
    // Names a file for sglangd; the engine has its YAML.
    "APP_LOCAL_CONFIG_PATH",
    // A folder that must be fresh for each start; the engine makes its own.
    "PROMETHEUS_MULTIPROC_DIR",
    // A scheduler would kill its whole process group before the log is read (contract §b).
    "SGLANG_KILLPG_ON_SCHEDULER_EXCEPTION",
    "SGL_KILLPG_ON_SCHEDULER_EXCEPTION",
    // Replaces the log's format, from which phases and liveness are read.
    "SGLANG_LOGGING_CONFIG_PATH",
    "SGL_LOGGING_CONFIG_PATH",
    // Lets the loader delete cached weights (contract §b).
    "SGLANG_IS_IN_CI",
    "SGL_IS_IN_CI",
];

/// What one start brings.
#[derive(Debug, Clone, Copy)]
pub struct Start<'a> {
    pub launch_id: &'a str,
    /// Private to this start, short (Unix sockets' paths end at 108 bytes).
    pub tmpdir: &'a Path,
    /// Where compiled kernels are kept where nobody said otherwise.
    pub cache_dir: &'a Path,
}

/// The engine's whole environment.
pub fn engine(config: &Config, own: &Env, start: Start<'_>) -> Env {
    let mut env: Env = own.iter().filter(|(name, _)| inherited(name)).map(|(n, v)| (n.clone(), v.clone())).collect();
    for (name, value) in &config.engine.env {
        if !HUB_TOKENS.contains(&name.as_str()) {
            env.insert(name.into(), value.into());
        }
    }
    for (name, value) in owned() {
        env.insert(name.into(), value.into());
    }
    env.insert("TMPDIR".into(), start.tmpdir.into());
    env.insert(LAUNCH_ID.into(), start.launch_id.into());
    let mut unless_said = |name: &str, value: OsString| {
        // SGLang copies each SGL_X to SGLANG_X at its import: either spelling was said.
        let legacy = name.replacen("SGLANG_", "SGL_", 1);
        if !env.contains_key(OsStr::new(name)) && !env.contains_key(OsStr::new(&legacy)) {
            env.insert(name.into(), value);
        }
    };
    unless_said("SGLANG_CACHE_DIR", start.cache_dir.into());
    for (name, value) in defaults() {
        unless_said(name, value.into());
    }
    env
}

/// The fetcher's: sglangd's own, with the tokens, and what `engine.env` says to the downloader.
pub fn fetcher(config: &Config, own: &Env) -> Env {
    let mut env: Env = own
        .iter()
        .filter(|(name, _)| !name.to_str().is_some_and(|name| NOT_INHERITED.contains(&name)))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    for (name, value) in &config.engine.env {
        let hub = name.starts_with("HF_") || HUB_TOKENS.contains(&name.as_str());
        let net = matches!(name.to_lowercase().as_str(), "http_proxy" | "https_proxy" | "no_proxy" | "all_proxy");
        if hub || net {
            env.insert(name.into(), value.into());
        }
    }
    env
}

/// What of `engine.env` is overridden or goes elsewhere, worth a warning.
pub fn warnings(config: &Config) -> Vec<String> {
    let mut out = Vec::new();
    for (name, value) in &config.engine.env {
        if HUB_TOKENS.contains(&name.as_str()) {
            out.push(format!("engine.env.{name} reaches the fetcher alone: the engine never holds the hub's token"));
        } else if let Some((_, owned)) =
            owned().iter().find(|(owned, _)| owned == name).filter(|(_, owned)| owned != value)
        {
            out.push(format!("engine.env.{name} is set to {owned} by sglangd"));
        } else if name == "TMPDIR" || name == LAUNCH_ID {
            out.push(format!("engine.env.{name} is set by sglangd at each start"));
        } else if NOT_INHERITED.contains(&name.as_str()) {
            out.push(format!(
                "engine.env.{name} is handed on as said, though sglangd keeps it from the engine otherwise"
            ));
        }
    }
    out
}

/// The folders in which an engine with this environment keeps compiled kernels.
///
/// SGLang 0.5.23 puts all of them below `SGLANG_CACHE_DIR`; the older ones leave each library its own place.
pub fn kernel_caches(env: &Env) -> Vec<PathBuf> {
    const SAID: [&str; 8] = [
        "SGLANG_CACHE_DIR",
        "SGLANG_DG_CACHE_DIR",
        "DG_JIT_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "TILELANG_CACHE_DIR",
        "CUDA_CACHE_PATH",
        "FLASHINFER_WORKSPACE_BASE",
    ];
    const AT_HOME: [&str; 5] = [".triton", ".cache/deep_gemm", ".cache/flashinfer", ".tilelang", ".nv"];
    let said = SAID.iter().filter_map(|name| env.get(OsStr::new(name))).map(PathBuf::from);
    let home = env.get(OsStr::new("HOME")).map(PathBuf::from);
    let at_home = home.iter().flat_map(|home| AT_HOME.iter().map(move |folder| home.join(folder)));
    let mut folders: Vec<PathBuf> = said.chain(at_home).filter(|folder| folder.is_absolute()).collect();
    folders.sort();
    // One that lies in another is measured with it.
    folders.dedup_by(|later, kept| later.starts_with(&*kept));
    folders
}

/// Whether a variable holds the hub's token.
pub fn is_hub_token(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| HUB_TOKENS.contains(&name))
}

fn inherited(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return true };
    !name.starts_with("SGLANGD_")
        && !name.starts_with("CREDENTIALS_")
        && !name.starts_with("LISTEN_")
        && !HUB_TOKENS.contains(&name)
        && !NOT_INHERITED.contains(&name)
}

/// Set whatever was said.
fn owned() -> [(&'static str, &'static str); 3] {
    [
        // The snapshot was verified; a hub call could fail with 429 or change the files underneath.
        ("HF_HUB_OFFLINE", "1"),
        // The log is read line by line as it comes …
        ("PYTHONUNBUFFERED", "1"),
        // … and files are opened in UTF-8, whatever the locale.
        ("PYTHONUTF8", "1"),
    ]
}

/// Set where nobody said otherwise.
fn defaults() -> [(&'static str, &'static str); 3] {
    [
        // Together they delay the exit of a crashed engine by 65 s (contract §b).
        ("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "0"),
        ("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0"),
        // A client that left before the first token is noticed after 1 s, not 4.
        ("SGLANG_REQUEST_STATE_WAIT_TIMEOUT", "1"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(pairs: &[(&str, &str)]) -> Env {
        pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

    fn get<'a>(env: &'a Env, name: &str) -> Option<&'a str> {
        env.get(OsStr::new(name)).and_then(|value| value.to_str())
    }

    fn engine_env(config: &Config, own: &Env) -> Env {
        let start = Start { launch_id: "id-1", tmpdir: Path::new("/tmp/s"), cache_dir: Path::new("/state/cache") };
        engine(config, own, start)
    }

    #[test]
    fn the_engine_inherits_all_of_sglangs_variables_and_none_of_the_supervisors() {
        let own = own(&[
            ("PATH", "/bin"),
            ("SGL_FORCE_SHUTDOWN", "1"),
            ("SGLANG_ANYTHING_AT_ALL", "x"),
            ("HF_TOKEN", "t"),
            ("HUGGING_FACE_HUB_TOKEN", "t"),
            ("SGLANGD_LIMITS_MAX", "3"),
            ("NOTIFY_SOCKET", "/s"),
            ("LISTEN_FDS", "1"),
            ("CREDENTIALS_DIRECTORY", "/c"),
            ("PROMETHEUS_MULTIPROC_DIR", "/p"),
            ("SGLANG_KILLPG_ON_SCHEDULER_EXCEPTION", "1"),
            ("SGLANG_LOGGING_CONFIG_PATH", "/l"),
            ("SGLANG_IS_IN_CI", "1"),
        ]);
        let env = engine_env(&Config::shipped(), &own);
        for (name, value) in [("PATH", "/bin"), ("SGL_FORCE_SHUTDOWN", "1"), ("SGLANG_ANYTHING_AT_ALL", "x")] {
            assert_eq!(get(&env, name), Some(value));
        }
        for name in own
            .keys()
            .filter(|name| !matches!(name.to_str(), Some("PATH" | "SGL_FORCE_SHUTDOWN" | "SGLANG_ANYTHING_AT_ALL")))
        {
            assert_eq!(env.get(name), None, "{name:?}");
        }
        assert_eq!(get(&env, "SGLANG_JIT_DEEPGEMM_PRECOMPILE"), Some("0"), "engine.env is there");
        assert_eq!(get(&env, LAUNCH_ID), Some("id-1"));
        assert_eq!(get(&env, "TMPDIR"), Some("/tmp/s"));
    }

    #[test]
    fn what_was_said_beats_the_defaults_and_never_what_sglangd_needs() {
        let mut config = Config::shipped();
        config.engine.env.insert("HF_HUB_OFFLINE".into(), "0".into());
        config.engine.env.insert("SGLANG_CACHE_DIR".into(), "/mine".into());
        config.engine.env.insert("HF_TOKEN".into(), "t".into());
        let env = engine_env(&config, &own(&[("SGL_PYSPY_DUMP_BEFORE_CRASH", "1"), ("HF_HUB_OFFLINE", "0")]));
        assert_eq!(get(&env, "HF_HUB_OFFLINE"), Some("1"));
        assert_eq!(get(&env, "SGLANG_CACHE_DIR"), Some("/mine"));
        assert_eq!(get(&env, "SGLANG_PYSPY_DUMP_BEFORE_CRASH"), None, "its old name was said");
        assert_eq!(get(&env, "SGLANG_CUDA_COREDUMP_BEFORE_CRASH"), Some("0"));
        assert_eq!(get(&env, "HF_TOKEN"), None);
        assert_eq!(warnings(&config).len(), 2, "{:?}", warnings(&config));
    }

    #[test]
    fn kernel_caches_are_where_the_environment_says_each_measured_once() {
        let env = own(&[
            ("HOME", "/root"),
            ("SGLANG_CACHE_DIR", "/state/cache"),
            ("TRITON_CACHE_DIR", "/state/cache/triton"),
            ("CUDA_CACHE_PATH", "relative"),
        ]);
        let shown: Vec<String> = kernel_caches(&env).iter().map(|folder| folder.display().to_string()).collect();
        let at_home =
            ["/root/.cache/deep_gemm", "/root/.cache/flashinfer", "/root/.nv", "/root/.tilelang", "/root/.triton"];
        assert_eq!(shown[..5], at_home);
        assert_eq!(shown[5..], ["/state/cache"]);
    }

    #[test]
    fn the_fetcher_alone_holds_the_token_and_hears_what_is_said_to_the_downloader() {
        let mut config = Config::shipped();
        config.engine.env.insert("HF_TOKEN".into(), "new".into());
        let env = fetcher(&config, &own(&[("HF_TOKEN", "old"), ("HF_ENDPOINT", "http://h"), ("NOTIFY_SOCKET", "/s")]));
        assert_eq!(get(&env, "HF_TOKEN"), Some("new"));
        assert_eq!(get(&env, "HF_ENDPOINT"), Some("http://h"));
        assert_eq!(get(&env, "HF_XET_HIGH_PERFORMANCE"), Some("1"));
        assert_eq!(get(&env, "CUDA_VISIBLE_DEVICES"), None);
        assert_eq!(get(&env, "NOTIFY_SOCKET"), None);
    }
}
