//! From all places where configuration is said to one [`Config`], and who said what.
//!
//! The only thing ever written is the shipped `config.yaml`, once, where there is none.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::build::{Bases, Builder, scalar_defaults};
use super::document::Node;
use super::error::{ConfigError, Mistake};
use super::layers::Layers;
use super::source::{self, Place, Source, SourceKind};
use super::{Config, FlagValue};
use crate::config::redact;

/// The shipped configuration: DeepSeek-V4-Pro on eight GPUs.
pub const SHIPPED: &str = include_str!("../../config.yaml");
const SHIPPED_NAME: &str = "config.yaml (built in)";

/// Everything a configuration is made from. Nothing else is read, so a test can say it all.
#[derive(Debug, Clone)]
pub struct Sources {
    /// `--config`, in order.
    pub files: Vec<PathBuf>,
    /// `--set KEY=VALUE`, in order.
    pub set: Vec<String>,
    /// What stood after `--`.
    pub engine_flags: Vec<String>,
    /// The process's environment.
    pub env: BTreeMap<OsString, OsString>,
    pub cwd: PathBuf,
    pub user: User,
    /// The machine's own file: root's place for the shipped one, and the last that is looked for.
    pub system_config: PathBuf,
    pub missing: WhenMissing,
    pub needs: Needs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    Root,
    Other(u32),
}

/// What becomes of a machine without any configuration file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenMissing {
    /// The shipped one is written out and used.
    WriteOut,
    /// The shipped one is used from memory.
    BuiltIn,
}

/// What the configuration is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// A model must be named.
    Engine,
    /// Only limits, keys and listeners matter (`sglangd proxy`): the shipped model stands in.
    ProxyOnly,
}

#[derive(Debug, Clone)]
pub struct Loaded {
    pub config: Config,
    /// The files that were read, in order; empty: the built-in text.
    pub files: Vec<PathBuf>,
    pub warnings: Vec<String>,
    /// What was done or left out, worth a line in the log.
    pub notices: Vec<String>,
    /// Who said each value, and who lost.
    pub origins: Vec<Origin>,
    /// Where each flag was said, for carets under what only the engine's table can tell to be wrong.
    flag_places: Vec<(String, String, Place)>,
}

impl Loaded {
    /// Where a flag of this name and origin was said.
    pub fn flag_place(&self, name: &str, origin: &str) -> Option<&Place> {
        self.flag_places.iter().find(|(n, o, _)| n == name && o == origin).map(|(.., place)| place)
    }
}

/// One value, who said it, and who said otherwise before.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Origin {
    pub key: String,
    /// As written; secrets redacted.
    pub value: String,
    pub from: String,
    /// Earlier sayings that lost, the latest first.
    pub lost: Vec<Lost>,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Lost {
    pub value: String,
    pub from: String,
}

impl Sources {
    /// This process's own: its environment, folder and user.
    pub fn here(missing: WhenMissing) -> Self {
        Self {
            files: Vec::new(),
            set: Vec::new(),
            engine_flags: Vec::new(),
            env: std::env::vars_os().collect(),
            cwd: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
            user: if nix::unistd::geteuid().is_root() {
                User::Root
            } else {
                User::Other(nix::unistd::geteuid().as_raw())
            },
            system_config: PathBuf::from("/etc/sglangd/config.yaml"),
            missing,
            needs: Needs::Engine,
        }
    }

    /// A variable that is set, not empty, and text.
    pub(super) fn var(&self, name: &str) -> Option<&str> {
        self.env.get(OsStr::new(name)).and_then(|value| value.to_str()).filter(|value| !value.is_empty())
    }

    pub(super) fn path_var(&self, name: &str) -> Option<PathBuf> {
        self.env.get(OsStr::new(name)).filter(|value| !value.is_empty()).map(PathBuf::from)
    }

    /// XDG says that relative paths are to be ignored.
    pub(super) fn absolute_var(&self, name: &str) -> Option<PathBuf> {
        self.path_var(name).filter(|path| path.is_absolute())
    }

    pub(super) fn home(&self) -> Option<PathBuf> {
        self.absolute_var("HOME")
    }

    fn user_config(&self) -> Option<PathBuf> {
        let base = self.absolute_var("XDG_CONFIG_HOME").or_else(|| Some(self.home()?.join(".config")))?;
        Some(base.join("sglangd/config.yaml"))
    }
}

/// Reads, merges and checks. All mistakes are reported at once.
pub fn load(sources: &Sources) -> Result<Loaded, ConfigError> {
    let mut notices = Vec::new();
    let mut layers = Layers::default();
    let mut files = Vec::new();

    let texts = base_texts(sources, &mut layers.warnings, &mut notices)?;
    if sources.needs == Needs::ProxyOnly && texts.iter().all(|(path, _)| path.is_some()) {
        // Their file may say limits alone; the model is not theirs to name.
        layers.file(&built_in());
        layers.flags.clear();
    }
    for (path, source) in texts {
        layers.file(&source);
        files.extend(path);
    }
    native_flags(sources, &mut layers, &mut files, &mut notices)?;
    layers.environment(sources.env.iter().filter_map(|(name, value)| Some((name.to_str()?, value.to_str()?))));
    layers.set(&sources.set);
    layers.engine_flags(&sources.engine_flags);

    let bases = Bases {
        cwd: sources.cwd.clone(),
        home: sources.home(),
        visible_devices: sources.var("CUDA_VISIBLE_DEVICES").map(ToOwned::to_owned),
    };
    let mut builder = Builder::new(&layers, &bases);
    let config = builder.config();
    let (mistakes, warnings) = (builder.mistakes, builder.warnings);
    let mistakes: Vec<Mistake> = layers.mistakes.iter().cloned().chain(mistakes).collect();
    if !mistakes.is_empty() {
        let kept = if layers.unread { layers.mistakes } else { mistakes };
        return Err(ConfigError { mistakes: kept });
    }
    let origins = origins(&layers, &config);
    let flag_places = layers
        .flags
        .iter()
        .filter_map(|said| Some((said.name.clone(), said.origin.clone(), said.place.clone()?)))
        .collect();
    let warnings = layers.warnings.into_iter().chain(warnings).collect();
    Ok(Loaded { config, files, warnings, notices, origins, flag_places })
}

impl Config {
    /// The shipped configuration.
    pub fn shipped() -> Self {
        let mut layers = Layers::default();
        layers.file(&built_in());
        let bases = Bases { cwd: PathBuf::from("/"), home: None, visible_devices: None };
        Builder::new(&layers, &bases).config()
    }
}

fn built_in() -> std::sync::Arc<Source> {
    Source::new(SourceKind::BuiltIn, SHIPPED_NAME, SHIPPED)
}

type Text = (Option<PathBuf>, std::sync::Arc<Source>);

/// The files named, else the first one found, else the shipped one.
fn base_texts(
    sources: &Sources,
    warnings: &mut Vec<String>,
    notices: &mut Vec<String>,
) -> Result<Vec<Text>, ConfigError> {
    let mut named = sources.files.clone();
    if named.is_empty() {
        named.extend(sources.path_var("SGLANGD_CONFIG"));
    }
    if named.is_empty() {
        let places =
            [Some(sources.cwd.join("config.yaml")), sources.user_config(), Some(sources.system_config.clone())];
        // A dangling link counts as there: it was meant.
        named.extend(places.into_iter().flatten().find(|path| path.symlink_metadata().is_ok()));
    }
    if !named.is_empty() {
        let mut texts = Vec::new();
        let mut mistakes = Vec::new();
        for path in named {
            let full = sources.cwd.join(&path);
            match source::read(&full, &source::shown(&full, &sources.cwd)) {
                Ok(text) => texts.push((Some(full), text)),
                Err(mistake) => mistakes.push(*mistake),
            }
        }
        return if mistakes.is_empty() { Ok(texts) } else { Err(ConfigError { mistakes }) };
    }
    if sources.missing == WhenMissing::BuiltIn {
        notices.push("no configuration file was found: the built-in one is used".to_owned());
        return Ok(vec![(None, built_in())]);
    }
    let place = match sources.user {
        User::Root => Some(sources.system_config.clone()),
        User::Other(_) => sources.user_config(),
    };
    let Some(place) = place else {
        warnings.push("HOME is not set: the built-in configuration is used and not written out".to_owned());
        return Ok(vec![(None, built_in())]);
    };
    match write_out(&place) {
        Ok(()) => {
            notices.push(format!("no configuration was found: the shipped one is now in {}", place.display()));
            let text = source::read(&place, &place.display().to_string())?;
            Ok(vec![(Some(place), text)])
        }
        Err(error) => {
            warnings.push(format!(
                "the shipped configuration cannot be written to {}: {error}; the built-in one is used",
                place.display()
            ));
            Ok(vec![(None, built_in())])
        }
    }
}

/// Whole or not at all, and never over a file that another process has just put there.
fn write_out(place: &Path) -> std::io::Result<()> {
    let folder = place.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::Builder::new().prefix(".config.yaml.").tempfile_in(folder)?;
    file.write_all(SHIPPED.as_bytes())?;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    file.as_file().sync_all()?;
    match file.persist_noclobber(place) {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error.error),
    }
}

/// `APP_LOCAL_CONFIG_PATH`: a native SGLang YAML in place of the files' `engine.flags`.
fn native_flags(
    sources: &Sources,
    layers: &mut Layers,
    files: &mut Vec<PathBuf>,
    notices: &mut Vec<String>,
) -> Result<(), ConfigError> {
    const VARIABLE: &str = "APP_LOCAL_CONFIG_PATH";
    let Some(path) = sources.path_var(VARIABLE).filter(|_| sources.needs == Needs::Engine) else { return Ok(()) };
    let full = sources.cwd.join(&path);
    let source = source::read(&full, &source::shown(&full, &sources.cwd)).map_err(|mut mistake| {
        mistake.help = format!("{VARIABLE} names it: give a SGLang YAML, or unset the variable");
        mistake
    })?;
    let dropped = layers.flags.len();
    layers.flags.clear();
    layers.native(&source);
    notices.push(format!(
        "{VARIABLE}: the engine's flags come from {} ({dropped} flags of engine.flags are left out)",
        source.name
    ));
    files.push(full);
    Ok(())
}

// ---------------------------------------------------------------------- who said what

/// The keys below `section` that were said otherwise, or only before, or only now.
pub fn changed(before: &[Origin], now: &[Origin], section: &str) -> BTreeSet<String> {
    let within = |origins: &[Origin]| -> BTreeSet<(String, String)> {
        let within = origins.iter().filter(|origin| origin.key.split('.').next() == Some(section));
        within.map(|origin| (origin.key.clone(), origin.value.clone())).collect()
    };
    within(before).symmetric_difference(&within(now)).map(|(key, _)| key.clone()).collect()
}

fn origins(layers: &Layers, config: &Config) -> Vec<Origin> {
    let mut out = Vec::new();
    for (path, default) in scalar_defaults() {
        let said = layers.said.get(path).map(Vec::as_slice).unwrap_or_default();
        let mut all: Vec<Lost> = said
            .iter()
            .map(|said| Lost { value: shown(path, &node_text(&said.node)), from: said.node.place().to_string() })
            .collect();
        if all.is_empty() && path == "model.name" {
            all.push(Lost { value: config.model.name.clone(), from: "default".to_owned() });
        } else if all.is_empty() {
            all.push(Lost { value: default.to_owned(), from: "default".to_owned() });
        }
        out.extend(origin(path.to_owned(), all));
    }
    for flag in &config.engine.flags.0 {
        let all = layers.flags.iter().filter(|said| said.name == flag.name).map(|said| Lost {
            value: shown(&said.name, &said.value.as_ref().map_or("null".to_owned(), flag_text)),
            from: said.origin.clone(),
        });
        out.extend(origin(format!("engine.flags.{}", flag.name), all.collect()));
    }
    for name in config.engine.env.keys() {
        let said = layers.env.get(name).map(Vec::as_slice).unwrap_or_default();
        let all = said
            .iter()
            .map(|said| Lost { value: shown(name, &node_text(&said.node)), from: said.node.place().to_string() });
        out.extend(origin(format!("engine.env.{name}"), all.collect()));
    }
    out
}

fn origin(key: String, mut all: Vec<Lost>) -> Option<Origin> {
    let Lost { value, from } = all.pop()?;
    all.reverse();
    Some(Origin { key, value, from, lost: all })
}

fn shown(name: &str, value: &str) -> String {
    if redact::is_secret_name(name) { redact::MASK.to_owned() } else { value.to_owned() }
}

fn node_text(node: &Node) -> String {
    match node {
        Node::Scalar { text, .. } => text.clone(),
        Node::List(items, _) => format!("[{}]", items.iter().map(node_text).collect::<Vec<_>>().join(", ")),
        Node::Map(entries, _) => format!(
            "{{{}}}",
            entries.iter().map(|e| format!("{}: {}", e.key, node_text(&e.value))).collect::<Vec<_>>().join(", ")
        ),
    }
}

/// A flag's value as `plan` shows it.
pub fn flag_text(value: &FlagValue) -> String {
    match value {
        FlagValue::On => "true".to_owned(),
        FlagValue::Off => "false".to_owned(),
        FlagValue::Word(word) => word.clone(),
        FlagValue::Words(words) => format!("[{}]", words.join(", ")),
        FlagValue::Json(value) => value.to_string(),
    }
}
