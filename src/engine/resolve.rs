//! The flags that were said become the flags that the engine gets: checked against its own parser,
//! translated where it renamed them, without those that sglangd owns.
//!
//! Pure: asks neither the engine nor the disk. All mistakes are reported at once.

mod place;
mod single;

use crate::config::{
    Config, ConfigError, Flag, FlagValue, Loaded, Mistake, ModelSource, UnknownFlags, is_negative_number, nearest,
};
use crate::engine::flags::{FlagSpec, FlagTable, TableOrigin, Takes};
use crate::engine::legacy::{self, Fate};
use crate::engine::owned::OWNED;
use crate::engine::words::wrong_word;
use place::{Checked, place, unknown_argv};

/// One value of the engine's YAML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum YamlValue {
    /// A bare flag that is present; written as a bare `true`.
    True,
    Word(String),
    Words(Vec<String>),
}

/// What the engine is told, but for what only a start knows (paths, port, keys).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// In the order they were said.
    pub yaml: Vec<(String, YamlValue)>,
    /// Flags that the engine's YAML reader refuses, as words of its command line.
    pub argv: Vec<String>,
    pub warnings: Vec<String>,
    /// `load-format`, where it was said.
    pub load_format: Option<String>,
    /// Other repositories that the flags name. Each is fetched and rewritten to a local folder.
    pub extra_repos: Vec<ExtraRepo>,
    /// The engine's log level.
    pub log_level: String,
}

/// A flag that names a repository of the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtraRepo {
    pub flag: String,
    pub repo: String,
    pub revision: String,
}

/// All that is wrong with the flags. Never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct FlagErrors(pub Vec<FlagError>);

/// One flag that the engine would not take, or take for something else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: {message} – {help}")]
pub struct FlagError {
    pub flag: String,
    pub message: String,
    pub help: String,
    /// Where it was said: `config.yaml:31:5`, `command line`.
    pub origin: String,
}

impl FlagErrors {
    /// With the file's lines and carets, where a file said it.
    pub fn explain(&self, loaded: &Loaded) -> ConfigError {
        let mistakes = self.0.iter().map(|error| match loaded.flag_place(&error.flag, &error.origin) {
            Some(place) => Mistake::new(&error.message, &error.help).at(place, "this flag"),
            None => Mistake::new(format!("{}: {}", error.origin, error.message), &error.help),
        });
        ConfigError { mistakes: mistakes.collect() }
    }
}

/// Flags that may name a repository, and the flag of its revision.
const REPOSITORY_FLAGS: &[(&str, Option<&str>)] =
    &[("speculative-draft-model-path", Some("speculative-draft-model-revision")), ("tokenizer-path", None)];

/// Checks every flag against the engine's table.
pub fn resolve(config: &Config, table: &FlagTable) -> Result<Resolved, FlagErrors> {
    let mut run = Run { config, table, warnings: Vec::new(), errors: Vec::new(), kept: Vec::new() };
    for flag in &config.engine.flags.0 {
        run.flag(flag);
    }
    run.finish()
}

/// A flag under its usual name.
struct Kept<'a> {
    name: String,
    said: &'a Flag,
    value: FlagValue,
    spec: Option<&'a FlagSpec>,
    /// Translated from a flag that the engine no longer has.
    translated: bool,
}

struct Run<'a> {
    config: &'a Config,
    table: &'a FlagTable,
    warnings: Vec<String>,
    errors: Vec<FlagError>,
    kept: Vec<Kept<'a>>,
}

impl<'a> Run<'a> {
    fn error(&mut self, said: &Flag, message: impl Into<String>, help: impl Into<String>) {
        self.errors.push(FlagError {
            flag: said.name.clone(),
            message: message.into(),
            help: help.into(),
            origin: said.origin.clone(),
        });
    }

    fn flag(&mut self, said: &'a Flag) {
        let spec = self.table.find(&said.name);
        let name = spec.map_or(said.name.as_str(), |spec| spec.name.as_str());
        // The bundled table knows aliases too, should the installed parser be an older one.
        let usual = FlagTable::bundled().find(name).map_or(name, |spec| spec.name.as_str());
        let usual = if usual == "tp" { "tp-size" } else { usual };
        if let Some((_, instead)) = OWNED.iter().find(|(owned, _)| *owned == usual) {
            self.owned(said, usual, instead);
            return;
        }
        match spec {
            Some(spec) => self.known(said, spec),
            None => self.unknown(said),
        }
    }

    fn owned(&mut self, said: &Flag, usual: &str, instead: &str) {
        let same = |mine: &str| matches!(&said.value, FlagValue::Word(word) if word == mine);
        let agreed = match usual {
            "tp-size" => same(&self.config.engine.tp.to_string()),
            "served-model-name" => same(&self.config.model.name),
            "model-path" => match &self.config.model.source {
                ModelSource::Repo { repo, .. } => same(repo),
                ModelSource::Folder(path) => path.to_str().is_some_and(same),
            },
            _ => said.value == FlagValue::Off,
        };
        if !agreed {
            self.warnings.push(format!("{}: `{}` is set by sglangd and left out: {instead}", said.origin, said.name));
        }
    }

    fn known(&mut self, said: &'a Flag, spec: &'a FlagSpec) {
        let mut value = said.value.clone();
        if let Some(words) = &spec.error_message {
            if value != FlagValue::Off {
                self.error(said, format!("{} refuses `{}`", self.table.describe(), said.name), words.clone());
            }
            return;
        }
        if spec.takes() == Takes::OnOrOff
            && said.name != spec.name
            && said.name.strip_prefix("no-").is_some_and(|rest| rest == spec.name)
        {
            // `no-x: true` is `x: false`.
            value = match value {
                FlagValue::On => FlagValue::Off,
                FlagValue::Off => FlagValue::On,
                other => other,
            };
        }
        if spec.deprecated && value != FlagValue::Off {
            let instead = spec.replacement.as_deref().unwrap_or("nothing");
            self.warnings.push(format!(
                "{}: `{}` is deprecated in {}: use {instead}",
                said.origin,
                said.name,
                self.table.describe()
            ));
        }
        self.keep(Kept { name: spec.name.clone(), said, value, spec: Some(spec), translated: false });
    }

    fn keep(&mut self, kept: Kept<'a>) {
        if let Some(at) = self.kept.iter().position(|other| other.name == kept.name) {
            let other = &self.kept[at];
            // What was said of the flag itself beats what an old name was translated to.
            let (wins, loses) =
                if other.translated == kept.translated || other.translated { (&kept, other) } else { (other, &kept) };
            self.warnings.push(format!(
                "`{}` ({}) and `{}` ({}) are the same flag: the first wins",
                wins.said.name, wins.said.origin, loses.said.name, loses.said.origin
            ));
            if std::ptr::eq(wins, other) {
                return;
            }
            self.kept.remove(at);
        }
        self.kept.push(kept);
    }

    fn unknown(&mut self, said: &'a Flag) {
        match legacy::fate(&said.name) {
            Some(Fate::Renamed(names)) => {
                if let Some(spec) = names.iter().find_map(|name| self.table.find(name)) {
                    self.translated(said, spec, said.value.clone(), &spec.name);
                    return;
                }
            }
            Some(Fate::Became { flag, value }) => {
                if let Some(spec) = self.table.find(flag) {
                    match said.value {
                        FlagValue::On => {
                            self.translated(said, spec, FlagValue::Word(value.to_owned()), &format!("{flag}: {value}"));
                        }
                        FlagValue::Off => {}
                        _ => self.error(
                            said,
                            format!("`{}` takes no value", said.name),
                            format!("write `{flag}: {value}`"),
                        ),
                    }
                    return;
                }
            }
            Some(Fate::Dropped { why }) => {
                self.warnings.push(format!(
                    "{}: `{}` is gone from {} and left out: {why}",
                    said.origin,
                    said.name,
                    self.table.describe()
                ));
                return;
            }
            Some(Fate::Refused { way_out }) => {
                self.error(said, format!("`{}` is gone from {}", said.name, self.table.describe()), way_out);
                return;
            }
            None => {}
        }
        if self.config.engine.unknown_flags == UnknownFlags::Pass {
            self.warnings.push(format!(
                "{}: `{}` is unknown to {} and passed on as said",
                said.origin,
                said.name,
                self.table.describe()
            ));
            self.keep(Kept { name: said.name.clone(), said, value: said.value.clone(), spec: None, translated: false });
            return;
        }
        let help = self.did_you_mean(&said.name);
        self.error(said, format!("{} has no flag `{}`", self.table.describe(), said.name), help);
    }

    fn translated(&mut self, said: &'a Flag, spec: &'a FlagSpec, value: FlagValue, to: &str) {
        self.warnings.push(format!(
            "{}: `{}` is gone from {} and translated to `{to}`",
            said.origin,
            said.name,
            self.table.describe()
        ));
        self.keep(Kept { name: spec.name.clone(), said, value, spec: Some(spec), translated: true });
    }

    fn did_you_mean(&self, name: &str) -> String {
        let dashed = name.replace('_', "-").trim_start_matches('-').to_owned();
        if dashed != name && self.table.has(&dashed) {
            return format!("did you mean `{dashed}`? (SGLang's flags are written with dashes)");
        }
        let mut longer = self.table.spellings().filter(|spelling| spelling.starts_with(&dashed));
        if let (Some(only), None) = (longer.next(), longer.next()) {
            return format!("did you mean `{only}`? (flags are written in full)");
        }
        let near = nearest(&dashed, self.table.spellings());
        near.map_or_else(
            || {
                let newer = "where the engine is newer than the table, `engine.unknown_flags: pass` hands it on";
                if self.table.origin == TableOrigin::Bundled { newer.to_owned() } else { "remove it".to_owned() }
            },
            |near| format!("did you mean `{near}`?"),
        )
    }

    fn finish(mut self) -> Result<Resolved, FlagErrors> {
        let mut out = Resolved {
            yaml: Vec::new(),
            argv: Vec::new(),
            warnings: Vec::new(),
            load_format: None,
            extra_repos: Vec::new(),
            log_level: "info".to_owned(),
        };
        let kept = std::mem::take(&mut self.kept);
        let revisions: Vec<(&str, String)> =
            kept.iter().filter_map(|flag| Some((flag.name.as_str(), one_word(&flag.value)?))).collect();
        for flag in &kept {
            let Some(value) = self.checked(flag) else { continue };
            if flag.spec.is_none() {
                unknown_argv(&flag.name, &value, &mut out.argv);
                continue;
            }
            match (flag.name.as_str(), &value) {
                ("load-format", Checked::Words(words)) => out.load_format = words.first().cloned(),
                ("log-level", Checked::Words(words)) => self.log_level(flag.said, words, &mut out.log_level),
                ("mem-fraction-static", Checked::Words(words)) => self.fraction(flag.said, words),
                ("lora-paths", Checked::Words(words)) => self.lora(flag.said, words),
                (name, Checked::Words(words)) => {
                    if let Some((_, revision)) = REPOSITORY_FLAGS.iter().find(|(flag, _)| *flag == name) {
                        let revision = revision.and_then(|flag| revisions.iter().find(|(name, _)| *name == flag));
                        self.repository(flag, words, revision.map(|(_, word)| word.clone()), &mut out);
                    }
                }
                _ => {}
            }
            if out.extra_repos.iter().any(|extra| revision_flag(&extra.flag) == Some(flag.name.as_str())) {
                // The draft model is given as a folder: its revision has been used by the fetcher.
                continue;
            }
            place(flag, value, &mut out);
        }
        // The revision may have been said before the model it belongs to.
        let used: Vec<&str> = out.extra_repos.iter().filter_map(|extra| revision_flag(&extra.flag)).collect();
        out.yaml.retain(|(name, _)| !used.contains(&name.as_str()));
        out.warnings = self.warnings;
        if self.errors.is_empty() { Ok(out) } else { Err(FlagErrors(self.errors)) }
    }

    /// The value as the parser will take it; none where it is left out or wrong.
    fn checked(&mut self, flag: &Kept<'_>) -> Option<Checked> {
        let said = flag.said;
        let name = &flag.name;
        let takes = flag.spec.map(FlagSpec::takes);
        let value = match (&flag.value, takes) {
            (FlagValue::On, Some(Takes::Nothing | Takes::OnOrOff | Takes::OneOrNone) | None) => Checked::On,
            (FlagValue::Off, Some(Takes::Nothing | Takes::OneOrNone) | None) => return None,
            (FlagValue::Off, Some(Takes::OnOrOff)) => Checked::Off,
            (value, Some(Takes::Nothing | Takes::OnOrOff)) => {
                let word = match value {
                    FlagValue::Word(word) => word.clone(),
                    other => crate::config::flag_text(other),
                };
                let meant = match word.to_lowercase().as_str() {
                    "yes" | "on" | "y" | "1" => {
                        "`yes`, `on` and `1` mean different things to different YAML readers: write `true`"
                    }
                    "no" | "off" | "n" | "0" => {
                        "`no`, `off` and `0` mean different things to different YAML readers: write `false`"
                    }
                    "true" | "false" => "write it without quotes",
                    _ => "write `true`, or remove it",
                };
                self.error(said, format!("`{name}` is present or absent and takes no value, not `{word}`"), meant);
                return None;
            }
            // A word that happens to look like a boolean: `true` is what the engine's reader makes of it too.
            (FlagValue::On, Some(Takes::One)) => Checked::Words(vec!["true".to_owned()]),
            (FlagValue::Off, Some(Takes::One)) => Checked::Words(vec!["false".to_owned()]),
            (FlagValue::On | FlagValue::Off, Some(Takes::Many)) => {
                self.error(said, format!("`{name}` takes words, not true or false"), "write a list: [a, b]");
                return None;
            }
            (FlagValue::Word(word), _) => Checked::Words(vec![word.clone()]),
            (FlagValue::Json(value), _) => Checked::Words(vec![value.to_string()]),
            (FlagValue::Words(words), Some(Takes::Many) | None) => {
                if words.is_empty() {
                    return None;
                }
                Checked::Words(words.clone())
            }
            (FlagValue::Words(words), Some(Takes::One | Takes::OneOrNone)) => {
                let help = match words.as_slice() {
                    [one] => format!("write `{name}: {one}`"),
                    _ => "write one value; a JSON list goes in quotes".to_owned(),
                };
                self.error(said, format!("`{name}` takes one value, not a list of {}", words.len()), help);
                return None;
            }
        };
        if let (Checked::Words(words), Some(spec)) = (&value, flag.spec) {
            let wrong = words.iter().find_map(|word| wrong_word(spec, word));
            if let Some((message, help)) = wrong {
                self.error(said, format!("`{name}` {message}"), help);
                return None;
            }
            let dashed = words.iter().find(|word| word.starts_with('-') && !is_negative_number(word));
            if let Some(word) = dashed
                && (words.len() > 1 || word == "--" || spec.takes() == Takes::Many)
            {
                self.error(
                    said,
                    format!("`{name}` holds the word `{word}`, which the engine's parser would take for a flag"),
                    "SGLang cannot be given such a word here; choose another",
                );
                return None;
            }
        }
        Some(value)
    }
}

fn one_word(value: &FlagValue) -> Option<String> {
    match value {
        FlagValue::Word(word) => Some(word.clone()),
        _ => None,
    }
}

fn revision_flag(flag: &str) -> Option<&'static str> {
    REPOSITORY_FLAGS.iter().find(|(name, _)| *name == flag).and_then(|(_, revision)| *revision)
}
