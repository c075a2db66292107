//! Who said what: each source is one layer, laid over those before it, key by key.
//!
//! Values are not understood here (that is `build`); only their keys are.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::document::{self, Entry, Node, Style};
use super::error::{Mistake, nearest};
use super::keys::{self, KEYS, Key, Shape};
use super::source::{Place, Source, SourceKind};
use super::{Flag, FlagValue};

/// Variables that begin like keys and are none.
const NOT_KEYS: [&str; 4] = ["SGLANGD_RUNTIME_DIR", "SGLANGD_STATE_DIR", "SGLANGD_CONFIG", "SGLANGD_LAUNCH_ID"];
/// Prefixes that the tests, the simulated engine and sglangd's own children use.
const NOT_KEY_PREFIXES: [&str; 4] = ["SGLANGD_TEST_", "SGLANGD_SIM", "SGLANGD_INTERNAL_", "SGLANGD_LINK"];
const FLAG_VARIABLE: &str = "SGLANGD_ENGINE_FLAGS_";

/// One saying of one value.
#[derive(Debug, Clone)]
pub struct Said {
    pub node: Node,
    /// The key, for "said twice" and the like.
    pub key_place: Place,
    /// Which layer, counted from 0.
    pub layer: usize,
}

/// What was said of a flag: a value, or that it is to be removed.
#[derive(Debug, Clone)]
pub struct FlagSaid {
    pub name: String,
    /// None: `null`, take it away.
    pub value: Option<FlagValue>,
    pub origin: String,
    /// None: after `--`.
    pub place: Option<Place>,
}

#[derive(Debug, Default)]
pub struct Layers {
    /// For each key all that was said, the last wins.
    pub said: BTreeMap<&'static str, Vec<Said>>,
    pub flags: Vec<FlagSaid>,
    pub env: BTreeMap<String, Vec<Said>>,
    pub mistakes: Vec<Mistake>,
    pub warnings: Vec<String>,
    /// A text could not be read as YAML: what it said is unknown, so nothing can be called missing.
    pub unread: bool,
    layer: usize,
}

impl Layers {
    /// A configuration file, already read.
    pub fn file(&mut self, source: &Arc<Source>) {
        match document::parse(source) {
            Ok(root) => self.root(&root),
            Err(mistakes) => {
                self.unread = true;
                self.mistakes.extend(mistakes);
            }
        }
        self.layer += 1;
    }

    /// A native SGLang YAML: a flat map of flags.
    pub fn native(&mut self, source: &Arc<Source>) {
        match document::parse(source) {
            Ok(Node::Map(entries, _)) => entries.iter().for_each(|entry| self.flag(entry, &entry.key)),
            Ok(node) if node.is_null() => {}
            Ok(node) => self.mistakes.push(
                Mistake::new(
                    format!("{} is {}, not a map of flags", source.name, node.describe()),
                    "write `flag: value` lines",
                )
                .at(node.place(), "here"),
            ),
            Err(mistakes) => {
                self.unread = true;
                self.mistakes.extend(mistakes);
            }
        }
        self.layer += 1;
    }

    fn root(&mut self, root: &Node) {
        let Node::Map(entries, _) = root else {
            if !root.is_null() {
                self.mistakes.push(
                    Mistake::new(
                        format!("a configuration is made of sections, not {}", root.describe()),
                        format!("begin with one of: {}", keys::sections().join(", ")),
                    )
                    .at(root.place(), "here"),
                );
            }
            return;
        };
        for section in entries {
            if keys::sections().contains(&section.key.as_str()) {
                self.section(&section.key, section);
            } else {
                self.mistakes.push(unknown_section(section));
            }
        }
    }

    /// A section, or a part of one: `path` is its name in full.
    fn section(&mut self, path: &str, section: &Entry) {
        let Node::Map(entries, _) = &section.value else {
            if !section.value.is_null() {
                let example = keys::of_section(path).next().unwrap_or_default();
                self.mistakes.push(
                    Mistake::new(
                        format!("`{path}` is a section, not {}", section.value.describe()),
                        format!("write its keys below it, indented: `{example}: …`"),
                    )
                    .at(section.value.place(), "not a section"),
                );
            }
            return;
        };
        for entry in entries {
            let full = format!("{path}.{}", entry.key);
            match keys::find(&full) {
                Some(key) => self.assign(key, entry),
                None if keys::is_part(&full) => self.section(&full, entry),
                None => self.mistakes.push(unknown_key(path, entry)),
            }
        }
    }

    fn assign(&mut self, key: &'static Key, entry: &Entry) {
        match key.shape {
            Shape::Scalar | Shape::Words => {
                let said = Said { node: entry.value.clone(), key_place: entry.key_place.clone(), layer: self.layer };
                self.said.entry(key.path).or_default().push(said);
            }
            Shape::Flags | Shape::Environment => {
                let Node::Map(entries, _) = &entry.value else {
                    if !entry.value.is_null() {
                        self.mistakes.push(
                            Mistake::new(
                                format!("`{}` is a section, not {}", key.path, entry.value.describe()),
                                format!("write {} below it", key.is),
                            )
                            .at(entry.value.place(), "not a section"),
                        );
                    }
                    return;
                };
                for entry in entries {
                    if key.shape == Shape::Flags {
                        self.flag(entry, &entry.key);
                    } else {
                        self.variable(entry, &entry.key);
                    }
                }
            }
        }
    }

    fn variable(&mut self, entry: &Entry, name: &str) {
        let said = Said { node: entry.value.clone(), key_place: entry.key_place.clone(), layer: self.layer };
        self.env.entry(name.to_owned()).or_default().push(said);
    }

    fn flag(&mut self, entry: &Entry, name: &str) {
        let origin = entry.key_place.to_string();
        match flag_value(&entry.value, name) {
            Ok(value) => {
                let place = Some(entry.key_place.clone());
                self.flags.push(FlagSaid { name: name.to_owned(), value, origin, place });
            }
            Err(mistake) => self.mistakes.push(*mistake),
        }
    }

    /// `SGLANGD_LIMITS_MAX=8` and the like. Unknown names are warned about: they may belong to
    /// another version.
    pub fn environment<'a>(&mut self, variables: impl IntoIterator<Item = (&'a str, &'a str)>) {
        for (name, value) in variables {
            if !name.starts_with("SGLANGD_")
                || NOT_KEYS.contains(&name)
                || NOT_KEY_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
            {
                continue;
            }
            let known = KEYS
                .iter()
                .find(|key| matches!(key.shape, Shape::Scalar | Shape::Words) && keys::variable(key.path) == name);
            if let Some(key) = known {
                self.text(key.path, SourceKind::Environment, name, value);
            } else if let Some(flag) = name.strip_prefix(FLAG_VARIABLE).filter(|rest| !rest.is_empty()) {
                let path = format!("engine.flags.{}", flag.to_lowercase().replace('_', "-"));
                self.text(&path, SourceKind::Environment, name, value);
            } else {
                let all: Vec<String> = KEYS.iter().map(|key| keys::variable(key.path)).collect();
                let hint = nearest(name, all.iter().map(String::as_str))
                    .map_or(String::new(), |near| format!(": did you mean {near}?"));
                self.warnings.push(format!("the environment's {name} names no setting and is ignored{hint}"));
            }
        }
        self.layer += 1;
    }

    /// `--set key=value`, in order.
    pub fn set(&mut self, args: &[String]) {
        for arg in args {
            let Some((path, value)) = arg.split_once('=') else {
                self.mistakes.push(Mistake::new(
                    format!("--set {arg} has no `=`"),
                    "write --set KEY=VALUE, e.g. --set limits.max=64",
                ));
                continue;
            };
            self.text(path.trim(), SourceKind::CommandLine, &format!("--set {}", path.trim()), value);
            // Each --set is a layer of its own: of two for one key the later wins without a word.
            self.layer += 1;
        }
    }

    /// One value as text, from a variable or `--set`.
    fn text(&mut self, path: &str, kind: SourceKind, name: &str, value: &str) {
        let prefixed = |prefix: &str| path.strip_prefix(prefix).filter(|rest| !rest.is_empty());
        let shape = match (keys::find(path), prefixed("engine.flags."), prefixed("engine.env.")) {
            (Some(key), ..) => key.shape,
            (None, Some(_), _) | (None, None, Some(_)) => Shape::Scalar,
            (None, None, None) => {
                self.mistakes.push(unknown_path(path));
                return;
            }
        };
        let source = Source::new(kind, name, value);
        let place = Place::whole(&source);
        // `[::]:8000` looks like a list to YAML.
        let is_address = value.trim().parse::<std::net::SocketAddr>().is_ok();
        let structured =
            !is_address && (shape != Shape::Scalar || value.trim_start().starts_with(['[', '{', '"', '\'']));
        let node = if structured {
            match document::parse(&source) {
                Ok(node) => node,
                Err(mistakes) => {
                    self.mistakes.extend(mistakes);
                    return;
                }
            }
        } else {
            Node::Scalar { text: value.to_owned(), style: Style::Plain, place: place.clone() }
        };
        let entry = Entry { key: path.to_owned(), key_place: place, value: node };
        if let Some(key) = keys::find(path) {
            self.assign(key, &entry);
        } else if let Some(flag) = prefixed("engine.flags.") {
            self.flag(&entry, flag);
        } else if let Some(variable) = prefixed("engine.env.") {
            self.variable(&entry, variable);
        }
    }

    /// What stood after `--`: `--flag`, `--flag value …`, `--flag=value`.
    pub fn engine_flags(&mut self, args: &[String]) {
        const ORIGIN: &str = "command line";
        let mut rest = args.iter().peekable();
        while let Some(arg) = rest.next() {
            let Some(flag) = arg.strip_prefix("--").filter(|flag| !flag.is_empty()) else {
                let help = if arg.starts_with('-') {
                    "SGLang's flags are written in full: --flag VALUE"
                } else {
                    "after `--` stand flags of SGLang: --flag VALUE or --flag=VALUE"
                };
                self.mistakes.push(Mistake::new(format!("`{arg}` after `--` is no flag"), help));
                continue;
            };
            let (name, value) = if let Some((name, value)) = flag.split_once('=') {
                (name, FlagValue::Word(value.to_owned()))
            } else {
                let mut words = Vec::new();
                while let Some(word) = rest.next_if(|next| !next.starts_with('-') || is_negative_number(next)) {
                    words.push(word.clone());
                }
                let value = match words.len() {
                    0 => FlagValue::On,
                    1 => FlagValue::Word(words.remove(0)),
                    _ => FlagValue::Words(words),
                };
                (flag, value)
            };
            self.flags.push(FlagSaid {
                name: name.to_owned(),
                value: Some(value),
                origin: ORIGIN.to_owned(),
                place: None,
            });
        }
        self.layer += 1;
    }

    /// The flags that are left: for each name the last saying, in the order of the last sayings.
    pub fn final_flags(&self) -> Vec<Flag> {
        let mut out: Vec<Flag> = Vec::new();
        for said in &self.flags {
            out.retain(|flag| flag.name != said.name);
            if let Some(value) = &said.value {
                out.push(Flag { name: said.name.clone(), value: value.clone(), origin: said.origin.clone() });
            }
        }
        out
    }
}

/// As Python's argparse tells a negative number from a flag.
pub fn is_negative_number(word: &str) -> bool {
    word.strip_prefix('-').is_some_and(|rest| {
        let (whole, fraction) = rest.split_once('.').map_or((rest, None), |(a, b)| (a, Some(b)));
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        digits(whole) && fraction.map_or(!whole.is_empty(), |f| digits(f) && !f.is_empty())
    })
}

/// A flag's value by its own words. `Ok(None)`: remove the flag.
fn flag_value(node: &Node, name: &str) -> Result<Option<FlagValue>, Box<Mistake>> {
    if node.is_null() {
        return Ok(None);
    }
    Ok(Some(match node {
        Node::Scalar { text, style: Style::Plain, .. } => match text.as_str() {
            "true" | "True" | "TRUE" => FlagValue::On,
            "false" | "False" | "FALSE" => FlagValue::Off,
            _ => FlagValue::Word(text.clone()),
        },
        Node::Scalar { text, style: Style::Quoted, .. } => FlagValue::Word(text.clone()),
        Node::List(items, _) => {
            let words = items.iter().map(|item| match item {
                Node::Scalar { text, .. } if !item.is_null() => Ok(text.clone()),
                Node::Map(..) => Ok(json(item).to_string()),
                _ => Err(Box::new(
                    Mistake::new(
                        format!("`{name}` has {} in its list", item.describe()),
                        "a list of a flag holds words",
                    )
                    .at(item.place(), "not a word"),
                )),
            });
            FlagValue::Words(words.collect::<Result<_, _>>()?)
        }
        Node::Map(..) => FlagValue::Json(json(node)),
    }))
}

/// A section under a flag as JSON. A bare scalar that is a JSON literal keeps its type, all else is
/// a string: `012`, `0x10`, `yes` and `12:30` stay words.
fn json(node: &Node) -> serde_json::Value {
    use serde_json::Value;
    match node {
        _ if node.is_null() => Value::Null,
        Node::Scalar { text, style: Style::Plain, .. } => match serde_json::from_str::<Value>(text) {
            Ok(value @ (Value::Bool(_) | Value::Number(_))) => value,
            _ => Value::String(text.clone()),
        },
        Node::Scalar { text, .. } => Value::String(text.clone()),
        Node::List(items, _) => Value::Array(items.iter().map(json).collect()),
        Node::Map(entries, _) => {
            Value::Object(entries.iter().map(|entry| (entry.key.clone(), json(&entry.value))).collect())
        }
    }
}

fn unknown_section(entry: &Entry) -> Mistake {
    let sections = keys::sections();
    let help = if let Some((section, key)) = entry.key.split_once('.').filter(|_| keys::find(&entry.key).is_some()) {
        format!("write it as `{section}:` and below it, indented, `{key}: …`")
    } else if let Some(near) = nearest(&entry.key, sections.iter().copied()) {
        format!("did you mean `{near}`?")
    } else if entry.key.contains('-') {
        "flags of SGLang stand under `engine:`, `flags:`; APP_LOCAL_CONFIG_PATH names a file of flags alone".to_owned()
    } else {
        format!("the sections are: {}", sections.join(", "))
    };
    Mistake::new(format!("there is no section `{}`", entry.key), help).at(&entry.key_place, "unknown")
}

fn unknown_key(section: &str, entry: &Entry) -> Mistake {
    let elsewhere = KEYS.iter().find(|key| key.path.rsplit('.').next() == Some(&entry.key));
    let help = if let Some(near) = nearest(&entry.key, keys::of_section(section)) {
        format!("did you mean `{near}`?")
    } else if let Some(key) = elsewhere {
        format!("did you mean `{}`?", key.path)
    } else if section == "engine" && entry.key.contains('-') {
        "a flag of SGLang stands one level deeper, under `flags:`".to_owned()
    } else {
        format!("the keys of `{section}` are: {}", keys::of_section(section).collect::<Vec<_>>().join(", "))
    };
    Mistake::new(format!("there is no key `{section}.{}`", entry.key), help).at(&entry.key_place, "unknown")
}

fn unknown_path(path: &str) -> Mistake {
    let help = nearest(path, KEYS.iter().map(|key| key.path)).map_or_else(
        || "keys are written SECTION.KEY; flags of the engine engine.flags.NAME".to_owned(),
        |near| format!("did you mean `{near}`?"),
    );
    Mistake::new(format!("there is no key `{path}` (--set)"), help)
}
