//! One start of the engine in full: its command line, its environment, its YAML.
//!
//! Nothing secret stands in the command line, which every user of the machine can read: the keys go
//! into the YAML (mode 0600, which `launch` sets when it writes the file).

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use super::env::{self, Env};
use super::resolve::{Resolved, YamlValue};
use super::yaml;
use crate::config::Config;
use crate::config::redact::Redactor;

/// What only this start knows.
#[derive(Clone)]
pub struct Placement {
    /// The model as a local folder.
    pub model_path: PathBuf,
    /// Local folders for [`Resolved::extra_repos`], by flag.
    pub extra: BTreeMap<String, PathBuf>,
    /// The engine's private port.
    pub port: u16,
    /// Where the YAML will lie; ends in `.yaml`, or SGLang refuses it.
    pub yaml_path: PathBuf,
    pub tmpdir: PathBuf,
    /// `SGLANG_CACHE_DIR` where nobody said otherwise; kept between starts.
    pub cache_dir: PathBuf,
    pub api_key: Option<String>,
    pub admin_api_key: Option<String>,
    /// Marks the engine's processes.
    pub launch_id: String,
    /// sglangd's own environment.
    pub own_env: Env,
}

impl std::fmt::Debug for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the keys and the environment, which holds tokens.
        f.debug_struct("Placement")
            .field("model_path", &self.model_path)
            .field("port", &self.port)
            .field("yaml_path", &self.yaml_path)
            .finish_non_exhaustive()
    }
}

/// Everything to start the engine with.
#[derive(Clone)]
pub struct LaunchSpec {
    /// The program and its words; never given to a shell.
    pub argv: Vec<OsString>,
    /// The whole environment.
    pub env: Env,
    /// What belongs in `Placement::yaml_path`, mode 0600: it holds keys.
    pub yaml: String,
    /// Knows this start's keys.
    pub redactor: Redactor,
}

impl std::fmt::Debug for LaunchSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LaunchSpec").field("argv", &self.argv).finish_non_exhaustive()
    }
}

/// Puts one start together.
pub fn launch_spec(config: &Config, resolved: &Resolved, placement: &Placement) -> LaunchSpec {
    let mut argv: Vec<OsString> = config.engine.command.iter().map(OsString::from).collect();
    let mut flag = |name: &str, value: &OsStr| {
        argv.push(name.into());
        argv.push(value.into());
    };
    flag("--host", OsStr::new("127.0.0.1"));
    flag("--port", OsStr::new(&placement.port.to_string()));
    flag("--model-path", placement.model_path.as_os_str());
    flag("--served-model-name", OsStr::new(&config.model.name));
    flag("--tp-size", OsStr::new(&config.engine.tp.to_string()));
    // Two words, once: `--config=x` is taken and silently ignored (contract §a).
    flag("--config", placement.yaml_path.as_os_str());
    argv.extend(resolved.argv.iter().map(OsString::from));

    let mut flags = resolved.yaml.clone();
    for (name, folder) in &placement.extra {
        // A path that is not UTF-8 cannot stand in YAML; the command line takes it, and wins there.
        if let Some(text) = folder.to_str() {
            set(&mut flags, name, text);
        } else {
            flags.retain(|(flag, _)| flag != name);
            argv.push(format!("--{name}").into());
            argv.push(folder.into());
        }
    }
    for (name, key) in [("api-key", &placement.api_key), ("admin-api-key", &placement.admin_api_key)] {
        if let Some(key) = key {
            set(&mut flags, name, key);
        }
    }
    let start =
        env::Start { launch_id: &placement.launch_id, tmpdir: &placement.tmpdir, cache_dir: &placement.cache_dir };
    let own = &placement.own_env;
    LaunchSpec {
        argv,
        env: env::engine(config, own, start),
        yaml: yaml::render(&flags),
        redactor: Redactor::new(placement.api_key.iter().chain(&placement.admin_api_key).cloned()),
    }
}

fn set(flags: &mut Vec<(String, YamlValue)>, name: &str, value: &str) {
    let value = YamlValue::Word(value.to_owned());
    match flags.iter_mut().find(|(flag, _)| flag == name) {
        Some((_, old)) => *old = value,
        None => flags.push((name.to_owned(), value)),
    }
}

/// The variables that differ from sglangd's own: set, changed, and taken away. For `plan`.
pub fn env_changes(spec: &LaunchSpec, own: &Env) -> (Vec<(String, String)>, Vec<String>) {
    let text = |text: &OsStr| text.to_string_lossy().into_owned();
    let set = spec.env.iter().filter(|(name, value)| own.get(*name) != Some(value));
    let gone = own.keys().filter(|name| !spec.env.contains_key(*name));
    (set.map(|(name, value)| (text(name), text(value))).collect(), gone.map(|name| text(name)).collect())
}

/// A command line as a person could type it, for showing only.
pub fn shown(argv: &[OsString]) -> String {
    let word = |word: &OsString| {
        let word = word.to_string_lossy();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word.into_owned()
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    };
    argv.iter().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::flags::FlagTable;
    use crate::engine::resolve::resolve;

    #[test]
    fn a_start_is_one_command_line_one_yaml_and_no_secret_in_argv() {
        let config = Config::shipped();
        let resolved = resolve(&config, FlagTable::bundled()).unwrap();
        let placement = Placement {
            model_path: "/models/x".into(),
            extra: BTreeMap::from([("tokenizer-path".to_owned(), PathBuf::from("/models/t"))]),
            port: 20_001,
            yaml_path: "/run/sglangd/engine.yaml".into(),
            tmpdir: "/tmp/a".into(),
            cache_dir: "/var/lib/sglangd/cache".into(),
            api_key: Some("key-of-this-start".into()),
            admin_api_key: Some("admin-of-this-start".into()),
            launch_id: "1".into(),
            own_env: Env::new(),
        };
        let spec = launch_spec(&config, &resolved, &placement);
        assert_eq!(
            shown(&spec.argv),
            "python3 -m sglang.launch_server --host 127.0.0.1 --port 20001 --model-path /models/x \
             --served-model-name deepseek-ai/DeepSeek-V4-Pro --tp-size 8 --config /run/sglangd/engine.yaml"
        );
        assert!(spec.yaml.ends_with(
            "\"tokenizer-path\": \"/models/t\"\n\"api-key\": \"key-of-this-start\"\n\"admin-api-key\": \"admin-of-this-start\"\n"
        ));
        assert!(!format!("{spec:?}{placement:?}").contains("of-this-start"));
        assert!(!spec.redactor.text(&spec.yaml).contains("of-this-start"));
        assert_eq!(spec.redactor.text("log: key-of-this-start!"), "log: [redacted]!");
    }
}
