//! Single words as the engine's parser takes them: what Python's `int` and `float` read, what is JSON,
//! what is a repository and not a folder.

use super::flags::FlagSpec;
use crate::config::nearest;

/// Whether a path names a repository of the hub and not a folder. Folders begin with `/`, `.` or `~`.
pub fn names_repository(path: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    !path.starts_with(['/', '.', '~']) && path.split('/').count() <= 2 && path.split('/').all(part)
}

/// Why a word cannot be this flag's value: what is wrong, and the way out.
pub fn wrong_word(spec: &FlagSpec, word: &str) -> Option<(String, String)> {
    if word.contains('\0') {
        return Some(("holds a NUL byte".to_owned(), "remove it".to_owned()));
    }
    match spec.element_type.as_deref() {
        Some("int") if python_int(word).is_none() => {
            return Some((format!("is `{word}`, which is not a whole number"), "write a whole number".to_owned()));
        }
        Some("float") if python_float(word).is_none() => {
            return Some((format!("is `{word}`, which is not a number"), "write a number, like 0.8".to_owned()));
        }
        Some("loads") if serde_json::from_str::<serde_json::Value>(word).is_err() => {
            return Some((
                format!("is `{word}`, which is not JSON"),
                "write it as a section, or as JSON in quotes".to_owned(),
            ));
        }
        _ => {}
    }
    let choices = spec.choice_words()?;
    let same = |choice: &String| {
        if spec.element_type.as_deref() == Some("int") {
            python_int(word) == choice.parse().ok()
        } else {
            choice == word
        }
    };
    if choices.iter().any(same) {
        return None;
    }
    let help = nearest(word, choices.iter().map(String::as_str)).map_or_else(
        || format!("choose one of: {}", choices.join(", ")),
        |near| format!("did you mean `{near}`? (one of: {})", choices.join(", ")),
    );
    Some((format!("is `{word}`, which the engine does not offer"), help))
}

/// Digits, with single underscores between them, as Python reads them.
fn python_digits(text: &str) -> Option<String> {
    let fine = !text.is_empty()
        && !text.starts_with('_')
        && !text.ends_with('_')
        && !text.contains("__")
        && text.bytes().all(|b| b.is_ascii_digit() || b == b'_');
    fine.then(|| text.replace('_', ""))
}

/// What Python's `int(word)` takes (in ASCII).
pub fn python_int(word: &str) -> Option<i128> {
    let trimmed = word.trim();
    let digits = trimmed.strip_prefix(['+', '-']).unwrap_or(trimmed);
    let value: i128 = python_digits(digits)?.parse().ok()?;
    Some(if trimmed.starts_with('-') { -value } else { value })
}

/// What Python's `float(word)` takes (in ASCII).
pub fn python_float(word: &str) -> Option<f64> {
    let trimmed = word.trim();
    let bare = trimmed.strip_prefix(['+', '-']).unwrap_or(trimmed).to_lowercase();
    if matches!(bare.as_str(), "inf" | "infinity" | "nan") {
        return trimmed.parse().ok();
    }
    if !bare.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'+' | b'-' | b'_')) {
        return None;
    }
    // An underscore stands between two digits or not at all.
    let underscores = bare.bytes().enumerate().all(|(at, b)| {
        let digit = |at: Option<usize>| at.and_then(|at| bare.as_bytes().get(at)).is_some_and(u8::is_ascii_digit);
        b != b'_' || (digit(at.checked_sub(1)) && digit(Some(at + 1)))
    });
    underscores.then(|| trimmed.replace('_', "").parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_that_python_reads() {
        for (word, value) in [("12", 12), ("-1", -1), ("+3", 3), ("012", 12), ("1_000", 1000), (" 7 ", 7)] {
            assert_eq!(python_int(word), Some(value), "{word}");
        }
        for word in ["", "-", "0x10", "1e3", "1__0", "_1", "1_", "1.0", "ten", "--1"] {
            assert_eq!(python_int(word), None, "{word}");
        }
        for (word, value) in [("0.82", 0.82), ("1e-3", 1e-3), (".5", 0.5), ("1.", 1.0), ("1_0.5", 10.5), ("-2", -2.0)] {
            assert_eq!(python_float(word), Some(value), "{word}");
        }
        for word in ["", "0.8.2", "0x1", "1_.5", "_1", "e", "12:30", "half", "infinite"] {
            assert_eq!(python_float(word), None, "{word}");
        }
        assert!(python_float("inf").is_some_and(f64::is_infinite));
    }

    #[test]
    fn a_folder_is_told_from_a_repository_by_how_it_begins() {
        for repo in ["org/name", "gpt2", "Qwen/Qwen2.5-0.5B"] {
            assert!(names_repository(repo), "{repo}");
        }
        for folder in ["/models/x", "./x", "../x", "~/x", "a/b/c", "", "s3://x/y", "a b"] {
            assert!(!names_repository(folder), "{folder}");
        }
    }
}
