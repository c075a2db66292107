//! Group I of `docs/faults.md`: what may be wrong with a configuration, through the library's door.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sglangd::config::{
    Color, Config, ConfigError, FlagValue, Loaded, ModelSource, Needs, Sources, User, WhenMissing, load,
};
use sglangd::engine::flags::FlagTable;
use sglangd::engine::resolve::{YamlValue, resolve};

/// A machine of its own: a folder, an empty environment, nobody's home.
struct Machine {
    folder: tempfile::TempDir,
    sources: Sources,
}

impl Machine {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cwd = folder.path().join("work");
        std::fs::create_dir(&cwd).unwrap();
        let home = folder.path().join("home");
        std::fs::create_dir(&home).unwrap();
        let sources = Sources {
            files: Vec::new(),
            set: Vec::new(),
            engine_flags: Vec::new(),
            env: BTreeMap::from([("HOME".into(), home.into_os_string())]),
            cwd,
            user: User::Other(1000),
            system_config: folder.path().join("etc/config.yaml"),
            missing: WhenMissing::BuiltIn,
            needs: Needs::Engine,
        };
        Self { folder, sources }
    }

    fn with(text: &str) -> Self {
        Self::new().file("config.yaml", text.as_bytes())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.sources.cwd.join(name)
    }

    /// A file named by `--config`.
    fn file(mut self, name: &str, bytes: &[u8]) -> Self {
        std::fs::write(self.path(name), bytes).unwrap();
        self.sources.files.push(PathBuf::from(name));
        self
    }

    fn set(mut self, text: &str) -> Self {
        self.sources.set.push(text.to_owned());
        self
    }

    fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.sources.env.insert(name.into(), value.into());
        self
    }

    fn flags(mut self, words: &[&str]) -> Self {
        self.sources.engine_flags.extend(words.iter().map(|&word| word.to_owned()));
        self
    }

    fn load(&self) -> Result<Loaded, ConfigError> {
        load(&self.sources)
    }

    fn config(&self) -> Config {
        match self.load() {
            Ok(loaded) => loaded.config,
            Err(error) => panic!("{}", error.render(Color::Plain)),
        }
    }

    /// The rendering of what is wrong.
    fn refused(&self) -> String {
        match self.load() {
            Ok(loaded) => panic!("it was accepted: {:#?}", loaded.config),
            Err(error) => error.render(Color::Plain),
        }
    }
}

const MODEL: &str = "model:\n  repo: a/b\n";

#[test]
fn the_shipped_configuration_is_the_set_up_of_the_model_and_else_the_defaults() {
    let shipped = Machine::new().config();
    assert_eq!(shipped, Config::shipped());
    assert_eq!(
        shipped.model.source,
        ModelSource::Repo { repo: "deepseek-ai/DeepSeek-V4-Pro".into(), revision: "main".into() }
    );
    assert_eq!(shipped.engine.tp, 8);
    assert_eq!(shipped.engine.flags.0.len(), 16);
    assert_eq!(shipped.engine.env["CUDA_VISIBLE_DEVICES"], "0,1,2,3,4,5,6,7");
    let mut plain = Machine::with(MODEL).config();
    plain.model = shipped.model.clone();
    plain.engine = shipped.engine.clone();
    assert_eq!(plain, shipped);
    assert_eq!(shipped.shutdown.grace, Duration::from_secs(25));
    assert_eq!((shipped.limits.max, shipped.limits.target, shipped.limits.hold), (32, 10, Duration::ZERO));

    let resolved = resolve(&shipped, FlagTable::bundled()).unwrap();
    assert_eq!(resolved.argv, Vec::<String>::new());
    assert_eq!(resolved.log_level, "debug");
    assert!(resolved.yaml.contains(&("cuda-graph-max-bs-decode".into(), YamlValue::Word("32".into()))));
    assert!(resolved.yaml.contains(&("trust-remote-code".into(), YamlValue::True)));
    assert!(!resolved.yaml.iter().any(|(name, _)| name == "collect-tokens-histogram"));
    insta::assert_snapshot!(resolved.warnings.join("\n"));
}
