//! Writes the YAML that SGLang reads, so that it reads what was meant.
//!
//! SGLang reads with PyYAML (YAML 1.1), where bare `no`, `12:30`, `0x10`, `1_000`, `012` and `~` change
//! their meaning. So every word is double-quoted, a bare `true` stands only after flags that take no
//! value, and nothing else is ever bare. ASCII only: the engine opens the file in its locale's encoding.

use std::fmt::Write;

use super::resolve::YamlValue;

/// The whole file. Deterministic: the same flags give the same bytes.
pub fn render(flags: &[(String, YamlValue)]) -> String {
    let mut out = String::new();
    for (name, value) in flags {
        quote(name, &mut out);
        out.push_str(": ");
        match value {
            YamlValue::True => out.push_str("true"),
            YamlValue::Word(word) => quote(word, &mut out),
            YamlValue::Words(words) => {
                out.push('[');
                for (nth, word) in words.iter().enumerate() {
                    if nth > 0 {
                        out.push_str(", ");
                    }
                    quote(word, &mut out);
                }
                out.push(']');
            }
        }
        out.push('\n');
    }
    if out.is_empty() {
        // An empty file is an empty map too, but looks like a mistake.
        out.push_str("{}\n");
    }
    out
}

/// In double quotes, everything but printable ASCII escaped.
fn quote(word: &str, out: &mut String) {
    out.push('"');
    for c in word.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                let code = u32::from(c);
                // Writing to a String cannot fail.
                let _ = match code {
                    0..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_true_is_ever_bare() {
        let flags = vec![
            ("trust-remote-code".to_owned(), YamlValue::True),
            ("revision".to_owned(), YamlValue::Word("no".to_owned())),
            ("x".to_owned(), YamlValue::Words(vec!["012".to_owned(), "a\"b\\c".to_owned()])),
            ("é".to_owned(), YamlValue::Word("line\nbreak\u{1f600}\u{85}".to_owned())),
        ];
        assert_eq!(
            render(&flags),
            "\"trust-remote-code\": true\n\"revision\": \"no\"\n\"x\": [\"012\", \"a\\\"b\\\\c\"]\n\
             \"\\xe9\": \"line\\nbreak\\U0001f600\\x85\"\n"
        );
    }

    proptest::proptest! {
        /// Read back by another YAML reader; the real PyYAML is asked in tests/config_proof.rs.
        #[test]
        fn any_word_reads_back_the_same(words in proptest::collection::vec("\\PC*|[ -~]*|\\s*", 1..4)) {
            let file = render(&[("k".to_owned(), YamlValue::Words(words.clone()))]);
            proptest::prop_assert!(file.is_ascii());
            proptest::prop_assert_eq!(file.lines().count(), 1);
            let back: std::collections::BTreeMap<String, Vec<String>> = serde_saphyr::from_str(&file).unwrap();
            proptest::prop_assert_eq!(&back["k"], &words);
        }
    }
}
