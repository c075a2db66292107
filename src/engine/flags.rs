//! The table of flags that one version of SGLang's parser takes.
//!
//! Comes from the bundled table or from the installed engine (`inspect`). Says what a flag is, not
//! what is to be done with one (that is `resolve`).

use std::collections::HashMap;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

/// All of SGLang 0.5.23's flags, dumped from its own parser.
const BUNDLED: &str = include_str!("flags-0.5.23.json");

#[derive(Debug, Clone)]
pub struct FlagTable {
    /// The engine's version.
    pub version: String,
    pub origin: TableOrigin,
    flags: Vec<FlagSpec>,
    /// Every spelling, to its place in `flags`.
    by_spelling: HashMap<String, usize>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TableOrigin {
    /// Shipped with sglangd: the engine was not asked.
    Bundled,
    /// The parser of the engine that will run.
    Installed {
        /// Its `server_args.py`.
        path: String,
    },
}

/// One flag, in the words of its parser.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FlagSpec {
    /// The usual spelling, without `--`.
    pub name: String,
    #[serde(default)]
    pub aliases: Vec<String>,
    /// `store`, `store_true`, `boolean_optional`, or the name of a class of SGLang's.
    pub action: String,
    /// What each word must be: `int`, `float`, `str`, or the name of a function.
    #[serde(default)]
    pub element_type: Option<String>,
    #[serde(default)]
    pub choices: Option<Vec<serde_json::Value>>,
    /// `0`, `?`, `+`, `*`, a number, or nothing for one word.
    #[serde(default)]
    pub nargs: Option<serde_json::Value>,
    /// Whether the engine's YAML reader takes it.
    pub yaml_supported: bool,
    #[serde(default)]
    pub deprecated: bool,
    #[serde(default)]
    pub replacement: Option<String>,
    /// Retired: the engine ends with these words.
    #[serde(default)]
    pub error_message: Option<String>,
}

/// How many words stand after a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// None: present or absent.
    Nothing,
    /// None; `--no-NAME` turns it off.
    OnOrOff,
    One,
    OneOrNone,
    Many,
}

/// The JSON that the bundled file and `inspect.py` share.
#[derive(Debug, Serialize, Deserialize)]
pub struct TableFile {
    pub version: String,
    pub flags: Vec<FlagSpec>,
}

impl FlagSpec {
    pub fn takes(&self) -> Takes {
        match (self.action.as_str(), &self.nargs) {
            ("boolean_optional", _) => Takes::OnOrOff,
            ("store_true" | "store_false" | "store_const", _) => Takes::Nothing,
            (_, None) => Takes::One,
            (_, Some(serde_json::Value::String(text))) if text == "?" => Takes::OneOrNone,
            (_, Some(serde_json::Value::Number(n))) if n.as_u64() == Some(0) => Takes::Nothing,
            _ => Takes::Many,
        }
    }

    /// The choices as words.
    pub fn choice_words(&self) -> Option<Vec<String>> {
        self.choices.as_ref().map(|choices| {
            choices.iter().map(|choice| choice.as_str().map_or_else(|| choice.to_string(), ToOwned::to_owned)).collect()
        })
    }
}

impl FlagTable {
    pub fn new(file: TableFile, origin: TableOrigin) -> Self {
        let mut by_spelling = HashMap::new();
        for (at, flag) in file.flags.iter().enumerate() {
            for spelling in std::iter::once(&flag.name).chain(&flag.aliases) {
                by_spelling.entry(spelling.clone()).or_insert(at);
            }
        }
        Self { version: file.version, origin, flags: file.flags, by_spelling }
    }

    /// The table shipped with sglangd, parsed once.
    pub fn bundled() -> &'static Self {
        static TABLE: OnceLock<FlagTable> = OnceLock::new();
        TABLE.get_or_init(|| {
            let file = serde_json::from_str(BUNDLED).expect("the bundled table is read by a test");
            Self::new(file, TableOrigin::Bundled)
        })
    }

    pub fn find(&self, spelling: &str) -> Option<&FlagSpec> {
        self.by_spelling.get(spelling).map(|&at| &self.flags[at])
    }

    pub fn has(&self, spelling: &str) -> bool {
        self.by_spelling.contains_key(spelling)
    }

    pub fn spellings(&self) -> impl Iterator<Item = &str> {
        self.flags.iter().flat_map(|flag| std::iter::once(&flag.name).chain(&flag.aliases)).map(String::as_str)
    }

    pub fn flags(&self) -> &[FlagSpec] {
        &self.flags
    }

    /// `SGLang 0.5.23 (bundled table)`, for messages.
    pub fn describe(&self) -> String {
        match &self.origin {
            TableOrigin::Bundled => format!("SGLang {} (the table shipped with sglangd)", self.version),
            TableOrigin::Installed { path } => format!("SGLang {} ({path})", self.version),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_table_holds_all_flags_and_spellings() {
        let table = FlagTable::bundled();
        assert_eq!(table.flags().len(), 531);
        assert_eq!(table.spellings().count(), 559);
        assert_eq!(table.find("tensor-parallel-size").unwrap().name, "tp-size");
        assert_eq!(table.find("trust-remote-code").unwrap().takes(), Takes::Nothing);
        assert_eq!(table.find("no-dllm-fdfo").unwrap().takes(), Takes::OnOrOff);
        assert_eq!(table.find("model-checksum").unwrap().takes(), Takes::OneOrNone);
        assert_eq!(table.find("cuda-graph-bs-decode").unwrap().takes(), Takes::Many);
        assert_eq!(table.find("log-requests-level").unwrap().choice_words().unwrap(), ["0", "1", "2", "3"]);
    }
}
