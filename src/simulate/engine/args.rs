//! SGLang's command line: the words, the `--config` file merged before them, and argparse's errors.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde_json::{Map, Value};

/// The resolved arguments, by canonical name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Args(BTreeMap<String, Vec<String>>);

/// Why the engine would not start: what it prints, and its exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// argparse: usage and one line, exit 2.
    Usage(String),
    /// An exception in Python: a traceback that ends with this line, exit 1.
    Raised(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(what) => write!(f, "usage: sglang serve [-h] [options]\nsglang serve: error: {what}"),
            Self::Raised(what) => write!(f, "Traceback (most recent call last):\n{FRAMES}{what}"),
        }
    }
}

const FRAMES: &str = "  File \"sglang/launch_server.py\", line 80, in <module>\n    \
                      server_args = prepare_server_args(sys.argv[1:])\n";

/// The table of SGLang 0.5.23's own parser.
static TABLE: &str = include_str!("../../engine/flags-0.5.23.json");

#[derive(Deserialize)]
struct Table {
    flags: Vec<Flag>,
}

#[derive(Deserialize)]
struct Flag {
    name: String,
    #[serde(default)]
    aliases: Vec<String>,
    #[serde(rename = "type", default)]
    kind: Option<String>,
    action: String,
    choices: Option<Vec<Value>>,
    nargs: Option<Value>,
    #[serde(default = "yes")]
    yaml_supported: bool,
}

fn yes() -> bool {
    true
}

/// How many words a flag takes.
#[derive(PartialEq, Eq, Clone, Copy)]
enum Takes {
    None,
    One,
    AtMostOne,
    Some,
    Any,
}

impl Flag {
    fn takes(&self) -> Takes {
        match (self.action.as_str(), &self.nargs) {
            ("store_true" | "boolean_optional" | "DeprecatedStoreTrueAction", _) => Takes::None,
            (_, Some(Value::String(n))) if n == "+" => Takes::Some,
            (_, Some(Value::String(n))) if n == "*" => Takes::Any,
            (_, Some(Value::String(n))) if n == "?" => Takes::AtMostOne,
            (_, Some(Value::Number(n))) if n.as_u64() == Some(0) => Takes::None,
            _ => Takes::One,
        }
    }
}

impl Args {
    /// `words` is everything after the program's name.
    pub fn resolve(words: &[String]) -> Result<Self, Refusal> {
        let table: Table = serde_json::from_str(TABLE).map_err(|e| Refusal::Raised(format!("flag table: {e}")))?;
        let merged = merge(&table, words)?;
        let args = Self::parse(&table, &merged)?;
        if args.one("model-path").is_none() {
            return Err(Refusal::Usage("the following arguments are required: --model-path/--model".into()));
        }
        if args.served_name().contains(':') {
            return Err(Refusal::Raised(
                "AssertionError: served_model_name cannot contain a colon (':') character.".into(),
            ));
        }
        Ok(args)
    }

    fn parse(table: &Table, words: &[String]) -> Result<Self, Refusal> {
        let mut args = BTreeMap::new();
        let mut unknown = Vec::new();
        let mut rest = words.iter().peekable();
        while let Some(word) = rest.next() {
            let Some(name) = word.strip_prefix("--").filter(|name| !name.is_empty()) else {
                unknown.push(word.clone());
                continue;
            };
            let (name, inline) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            let Some((flag, negated)) = find(table, name)? else {
                unknown.push(word.clone());
                continue;
            };
            let takes = flag.takes();
            let shown = || format!("argument --{}", flag.name);
            let mut values: Vec<String> = inline.iter().cloned().collect();
            match takes {
                Takes::None if inline.is_some() => {
                    return Err(Refusal::Usage(format!(
                        "{}: ignored explicit argument {:?}",
                        shown(),
                        inline.unwrap_or_default()
                    )));
                }
                Takes::None => values.push(if negated { "False" } else { "True" }.into()),
                _ if inline.is_some() => {}
                Takes::One | Takes::AtMostOne => {
                    values.extend(rest.next_if(|next| is_value(next)).cloned());
                    if values.is_empty() && takes == Takes::One {
                        return Err(Refusal::Usage(format!("{}: expected one argument", shown())));
                    }
                }
                Takes::Some | Takes::Any => {
                    while let Some(value) = rest.next_if(|next| is_value(next)) {
                        values.push(value.clone());
                    }
                    if values.is_empty() && takes == Takes::Some {
                        return Err(Refusal::Usage(format!("{}: expected at least one argument", shown())));
                    }
                }
            }
            if takes != Takes::None {
                check(flag, &values)?;
            }
            args.insert(flag.name.clone(), values);
        }
        if unknown.is_empty() {
            Ok(Self(args))
        } else {
            Err(Refusal::Usage(format!("unrecognized arguments: {}", unknown.join(" "))))
        }
    }

    pub fn one(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.first().map(String::as_str)
    }

    pub fn on(&self, name: &str) -> bool {
        self.one(name) == Some("True")
    }

    pub fn number(&self, name: &str) -> Option<u64> {
        self.one(name)?.parse().ok()
    }

    pub fn model_path(&self) -> &str {
        self.one("model-path").unwrap_or_default()
    }

    pub fn served_name(&self) -> &str {
        self.one("served-model-name").unwrap_or_else(|| self.model_path())
    }

    pub fn tp(&self) -> u32 {
        self.number("tp-size").and_then(|n| u32::try_from(n).ok()).unwrap_or(1).max(1)
    }

    /// As `/server_info` and the `server_args=` line show them: keys in clear, as the real ones do.
    pub fn as_json(&self) -> Map<String, Value> {
        self.0
            .iter()
            .map(|(name, values)| {
                let value = match values.as_slice() {
                    [one] if TEXTS.contains(&name.as_str()) => Value::from(one.clone()),
                    [one] => match one.as_str() {
                        "True" => Value::Bool(true),
                        "False" => Value::Bool(false),
                        text => text.parse::<i64>().map_or_else(|_| Value::from(text), Value::from),
                    },
                    many => Value::from(many.to_vec()),
                };
                (name.replace('-', "_"), value)
            })
            .collect()
    }
}

/// Flags whose value is text even where it looks like a number.
const TEXTS: [&str; 4] = ["api-key", "admin-api-key", "served-model-name", "model-path"];

/// A word that argparse takes as a value: no flag, or a negative number.
fn is_value(word: &str) -> bool {
    !word.starts_with('-') || word == "-" || word.parse::<f64>().is_ok()
}

/// The flag of this spelling: exact, an alias, or an unambiguous beginning.
fn find<'t>(table: &'t Table, name: &str) -> Result<Option<(&'t Flag, bool)>, Refusal> {
    let spellings = || {
        table.flags.iter().flat_map(|flag| {
            let negated = (flag.action == "boolean_optional").then(|| (format!("no-{}", flag.name), flag, true));
            std::iter::once(&flag.name)
                .chain(&flag.aliases)
                .map(move |spelling| (spelling.clone(), flag, false))
                .chain(negated)
        })
    };
    if let Some((_, flag, negated)) = spellings().find(|(spelling, ..)| spelling == name) {
        return Ok(Some((flag, negated)));
    }
    let candidates: Vec<_> = spellings().filter(|(spelling, ..)| spelling.starts_with(name)).collect();
    match candidates.as_slice() {
        [] => Ok(None),
        [(_, flag, negated)] => Ok(Some((flag, *negated))),
        many => {
            let names: Vec<String> = many.iter().map(|(spelling, ..)| format!("--{spelling}")).collect();
            Err(Refusal::Usage(format!("ambiguous option: --{name} could match {}", names.join(", "))))
        }
    }
}

fn check(flag: &Flag, values: &[String]) -> Result<(), Refusal> {
    let kind = flag.kind.as_deref().unwrap_or("str");
    for value in values {
        let fits = match kind {
            "int" => value.replace('_', "").parse::<i64>().is_ok(),
            "float" => value.parse::<f64>().is_ok(),
            _ => true,
        };
        if !fits {
            return Err(Refusal::Usage(format!("argument --{}: invalid {kind} value: '{value}'", flag.name)));
        }
        if let Some(choices) = &flag.choices {
            let texts: Vec<String> =
                choices.iter().map(|c| c.as_str().map_or_else(|| c.to_string(), str::to_owned)).collect();
            if !texts.contains(value) {
                return Err(Refusal::Usage(format!(
                    "argument --{}: invalid choice: '{value}' (choose from {})",
                    flag.name,
                    texts.join(", ")
                )));
            }
        }
    }
    Ok(())
}

/// Only the literal word `--config` is seen; its file's pairs become words before the others, so
/// that the command line wins.
fn merge(table: &Table, words: &[String]) -> Result<Vec<String>, Refusal> {
    let raised = |what: String| Refusal::Raised(what);
    let at: Vec<usize> = words.iter().enumerate().filter(|(_, w)| *w == "--config").map(|(i, _)| i).collect();
    let at = match at.as_slice() {
        [] => return Ok(words.to_vec()),
        [at] => *at,
        _ => return Err(raised("ValueError: Multiple config files specified! Only one allowed.".into())),
    };
    let Some(path) = words.get(at + 1) else {
        return Err(raised("ValueError: No config file specified after --config flag!".into()));
    };
    if !matches!(std::path::Path::new(path).extension().and_then(|e| e.to_str()), Some("yaml" | "yml")) {
        return Err(raised(format!("ValueError: Config file must be YAML format, got: {path}")));
    }
    let text = std::fs::read_to_string(path)
        .map_err(|_| raised(format!("ValueError: Config file not found or unreadable: {path}")))?;
    let pairs: Map<String, Value> = if text.trim().is_empty() {
        Map::new()
    } else {
        serde_saphyr::from_str(&text)
            .map_err(|error| raised(format!("yaml.scanner.ScannerError: while reading {path}: {error}")))?
    };
    let mut merged = Vec::new();
    for (key, value) in &pairs {
        let flag = table.flags.iter().find(|f| f.name == *key || f.aliases.contains(key));
        if flag.is_some_and(|flag| !flag.yaml_supported) {
            return Err(raised(format!("ValueError: Unsupported config option '{key}'")));
        }
        let store_true = flag.is_some_and(|flag| flag.action == "store_true");
        words_of(key, value, store_true, &mut merged);
    }
    merged.extend(words.iter().take(at).chain(words.iter().skip(at + 2)).cloned());
    Ok(merged)
}

fn words_of(key: &str, value: &Value, store_true: bool, out: &mut Vec<String>) {
    let flag = format!("--{key}");
    match value {
        Value::Bool(true) if store_true => out.push(flag),
        Value::Bool(false) if store_true => {}
        Value::Array(items) if items.is_empty() => {}
        Value::Array(items) => {
            out.push(flag);
            out.extend(items.iter().map(plain));
        }
        value => out.extend([flag, plain(value)]),
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(yaml: Option<&str>, words: &[&str]) -> Result<Args, Refusal> {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut all: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        if let Some(yaml) = yaml {
            let file = dir.path().join("engine.yaml");
            std::fs::write(&file, yaml).expect("write");
            all.extend(["--config".to_owned(), file.display().to_string()]);
        }
        Args::resolve(&all)
    }

    fn usage(result: Result<Args, Refusal>) -> String {
        match result {
            Err(Refusal::Usage(text)) => text,
            other => panic!("argparse should have refused this: {other:?}"),
        }
    }

    #[test]
    fn the_command_line_wins_over_the_file_wherever_it_stands() {
        let args = resolve(
            Some("model-path: /m\nport: 1\ntp-size: \"8\"\ntrust-remote-code: true\napi-key: \"123\"\n"),
            &["--port", "2"],
        )
        .expect("all known");
        assert_eq!((args.number("port"), args.tp(), args.on("trust-remote-code")), (Some(2), 8, true));
        assert_eq!(args.one("api-key"), Some("123"));
    }

    #[test]
    fn i04_quoted_scalars_are_words_and_plain_ones_have_a_type() {
        let args = resolve(Some("model-path: /m\nserved-model-name: \"no\"\n"), &[]).expect("known");
        assert_eq!(args.one("served-model-name"), Some("no"));
        let refused = usage(resolve(Some("model-path: /m\ntrust-remote-code: \"true\"\n"), &[]));
        assert_eq!(refused, "unrecognized arguments: true");
        let args = resolve(Some("model-path: /m\ntrust-remote-code: false\n"), &[]).expect("known");
        assert!(!args.on("trust-remote-code"));
    }

    #[test]
    fn argparse_refuses_what_it_refuses() {
        assert_eq!(
            usage(resolve(None, &["--model-path", "/m", "--tp_size", "8"])),
            "unrecognized arguments: --tp_size 8"
        );
        assert!(
            usage(resolve(None, &["--model-path", "/m", "--cuda-graph-max-bs", "1"])).starts_with("ambiguous option")
        );
        assert!(usage(resolve(None, &["--port", "x"])).contains("invalid int value: 'x'"));
        assert!(usage(resolve(None, &["--port"])).contains("expected one argument"));
        assert!(usage(resolve(None, &["--port", "1"])).contains("--model-path"));
        assert!(
            usage(resolve(Some("model-path: /m\nmem-fraction-statik: 1\n"), &[])).contains("--mem-fraction-statik 1")
        );
    }

    #[test]
    fn i06_the_config_flag_is_read_only_as_a_word_of_its_own() {
        // argparse takes `--config=…`, the merger does not see it: the file is never opened.
        let args = Args::resolve(&["--model-path".into(), "/m".into(), "--config=/nonexistent.yaml".into()]);
        assert!(args.is_ok(), "{args:?}");
        let twice = Args::resolve(&["--config".into(), "a.yaml".into(), "--config".into(), "b.yaml".into()]);
        assert!(matches!(twice, Err(Refusal::Raised(_))));
    }

    #[test]
    fn unambiguous_beginnings_are_enough() {
        let args = resolve(None, &["--model", "/m", "--tensor-par", "2"]).expect("both are accepted");
        assert_eq!((args.model_path(), args.tp()), ("/m", 2));
    }
}
