//! Keeps keys and tokens out of everything that is shown: plan, status, logs, snippets.
//!
//! Two ways that complete each other: values known to be secret are replaced wherever they stand
//! ([`Redactor`]), and whatever follows a name that sounds secret is replaced ([`text`]).

/// What stands in a secret's place.
pub const MASK: &str = "[redacted]";

/// Whether a flag, variable or key of this name holds a secret: `api-key`, `HF_TOKEN`,
/// `ssl-keyfile-password`. `max-total-tokens` and `speculative-token-map` do not.
pub fn is_secret_name(name: &str) -> bool {
    let name = name.rsplit('.').next().unwrap_or(name).trim_start_matches('-').to_lowercase().replace('-', "_");
    name == "token"
        || name.ends_with("_token")
        || name.ends_with("api_key")
        || name.ends_with("access_key")
        || name.ends_with("secret_key")
        || name.contains("password")
        || name.contains("secret")
        || name == "watermark_key"
        || name == "watermark_key_b"
}

/// Replaces what follows a secret name (`api-key: x`, `HF_TOKEN=x`, `'api_key': 'x'`, `--api-key x`).
pub fn text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut copied = 0;
    for (start, end) in secret_spans(text) {
        out.push_str(&text[copied..start]);
        out.push_str(MASK);
        copied = end;
    }
    out.push_str(&text[copied..]);
    out
}

/// The same with as many `*` as the secret has bytes, so that offsets into the text stay true.
pub fn same_length(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut copied = 0;
    for (start, end) in secret_spans(text) {
        out.push_str(&text[copied..start]);
        out.extend(std::iter::repeat_n('*', end - start));
        copied = end;
    }
    out.push_str(&text[copied..]);
    out
}

/// Where the values of secret names stand, in order and apart.
fn secret_spans(text: &str) -> Vec<(usize, usize)> {
    let bytes = text.as_bytes();
    let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    let mut spans = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        if !word(bytes[at]) {
            at += 1;
            continue;
        }
        let start = at;
        while at < bytes.len() && word(bytes[at]) {
            at += 1;
        }
        if !is_secret_name(&text[start..at]) {
            continue;
        }
        if let Some((from, to)) = value_after(bytes, at, text[start..at].starts_with("--")) {
            spans.push((from, to));
            at = to;
        }
    }
    spans
}

/// The value after a name that ends at `at`: behind `:` or `=`, or behind spaces for `--flag value`.
fn value_after(bytes: &[u8], mut at: usize, flag: bool) -> Option<(usize, usize)> {
    let blank = |b: &u8| matches!(b, b' ' | b'\t');
    let skip = |mut at: usize| {
        while bytes.get(at).is_some_and(blank) {
            at += 1;
        }
        at
    };
    if bytes.get(at).is_some_and(|b| matches!(b, b'"' | b'\'')) {
        at += 1;
    }
    let after_blanks = skip(at);
    let from = match bytes.get(after_blanks) {
        Some(b':' | b'=') => skip(after_blanks + 1),
        Some(_) if flag && after_blanks > at => after_blanks,
        // `"--api-key", "x"`: a list of words in JSON.
        Some(b',') if flag => skip(after_blanks + 1),
        _ => return None,
    };
    let quote = *bytes.get(from)?;
    let (from, end) = if matches!(quote, b'"' | b'\'') {
        let mut end = from + 1;
        while end < bytes.len() && bytes[end] != quote && bytes[end] != b'\n' {
            end += if bytes[end] == b'\\' { 2 } else { 1 };
        }
        (from + 1, end.min(bytes.len()))
    } else {
        let len = bytes[from..].iter().position(|b| matches!(b, b' ' | b'\t' | b'\r' | b'\n' | b',' | b'}' | b')'));
        (from, len.map_or(bytes.len(), |len| from + len))
    };
    // An escape may have stepped over a newline into the middle of a character.
    let end = (from..=end).rev().find(|&e| bytes.get(e).is_none_or(|b| (b & 0xC0) != 0x80))?;
    (end > from).then_some((from, end))
}

/// Replaces secrets whose value is known.
#[derive(Clone, Default)]
pub struct Redactor {
    secrets: Vec<String>,
}

impl std::fmt::Debug for Redactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redactor").field("secrets", &self.secrets.len()).finish()
    }
}

impl Redactor {
    /// Values shorter than four bytes are left alone: replacing each `1` would hide everything else.
    pub fn new(secrets: impl IntoIterator<Item = String>) -> Self {
        Self { secrets: secrets.into_iter().filter(|secret| secret.len() >= 4).collect() }
    }

    /// Replaces known values, then what follows secret names.
    pub fn text(&self, shown: &str) -> String {
        let mut out = shown.to_owned();
        for secret in &self.secrets {
            if out.contains(secret.as_str()) {
                out = out.replace(secret.as_str(), MASK);
            }
        }
        text(&out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_hold_secrets_are_told_from_those_that_count_tokens() {
        for name in [
            "api-key",
            "admin_api_key",
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "ssl-keyfile-password",
            "AWS_SECRET_ACCESS_KEY",
            "engine.flags.api-key",
            "--api-key",
        ] {
            assert!(is_secret_name(name), "{name}");
        }
        for name in [
            "max-total-tokens",
            "speculative-num-draft-tokens",
            "tokenizer-path",
            "keys_file",
            "speculative-token-map",
            "disable-tokenizer-batch-decode",
            "num-reserved-decode-tokens",
        ] {
            assert!(!is_secret_name(name), "{name}");
        }
    }

    #[test]
    fn a_secret_is_replaced_however_it_is_written() {
        for (shown, want) in [
            ("api-key: hunter22\nport: 1", "api-key: [redacted]\nport: 1"),
            ("ServerArgs(api_key='hunter22', port=1)", "ServerArgs(api_key='[redacted]', port=1)"),
            ("{'admin_api_key': 'a b', 'x': 1}", "{'admin_api_key': '[redacted]', 'x': 1}"),
            ("{\"api-key\": \"a\\\"b\", x: 1}", "{\"api-key\": \"[redacted]\", x: 1}"),
            ("--api-key hunter22 --port 1", "--api-key [redacted] --port 1"),
            ("--api-key=hunter22 --port 1", "--api-key=[redacted] --port 1"),
            ("[\"--api-key\", \"hunter22\"]", "[\"--api-key\", \"[redacted]\"]"),
            ("HF_TOKEN=hf_abc", "HF_TOKEN=[redacted]"),
            ("nothing here: 3", "nothing here: 3"),
        ] {
            assert_eq!(text(shown), want);
        }
    }

    #[test]
    fn known_values_are_replaced_anywhere() {
        let redactor = Redactor::new(["s3cr3t".to_owned(), "1".to_owned()]);
        assert_eq!(redactor.text("GET /?k=s3cr3t HTTP/1.1"), "GET /?k=[redacted] HTTP/1.1");
    }

    proptest::proptest! {
        #[test]
        fn masking_keeps_every_offset(shown in "(api-key|x)?[:= ]?['\"]?\\PC{0,40}") {
            proptest::prop_assert_eq!(same_length(&shown).len(), shown.len());
        }
    }
}
