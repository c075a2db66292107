//! One line of the keys file: `NAME sha256:HEX [concurrency=N] [queue=N] [priority=P] [weight=N] [operator]`.

use std::num::NonZeroU32;

use super::{Key, Role};
use crate::admission::{Priority, Terms};

/// Longest name: it stands in metrics and logs.
pub const MAX_NAME: usize = 64;

/// What is wrong with a line, where in it (from 1), and the way out.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    pub column: usize,
    pub what: String,
    pub help: String,
}

/// None: nothing but a comment.
pub fn parse(line: &str) -> Result<Option<Key>, Fault> {
    let said = line.split('#').next().unwrap_or_default();
    let column = |word: &str| word.as_ptr() as usize - line.as_ptr() as usize + 1;
    let fault = |column, what: String, help: &str| Fault { column, what, help: help.to_owned() };
    let mut words = said.split_whitespace();
    let Some(name) = words.next() else { return Ok(None) };
    if name.len() > MAX_NAME || name.chars().any(char::is_control) {
        let what = format!("a name of {} bytes", name.len());
        return Err(fault(column(name), what, &format!("at most {MAX_NAME}, without control characters")));
    }
    let shape = "expected `NAME sha256:HEX` (64 hexadecimal digits)";
    let Some(hash) = words.next() else {
        let what = format!("`{name}` has no hash");
        return Err(fault(said.trim_end().len() + 1, what, shape));
    };
    let Some(digest) = hash.strip_prefix("sha256:").and_then(unhex) else {
        // Not the word itself: it may be a key in clear.
        return Err(fault(column(hash), format!("the second word of `{name}` is no hash"), shape));
    };
    let mut key = Key { name: name.to_owned(), digest, terms: Terms::DEFAULT, role: Role::Client };
    let mut said: Vec<&str> = Vec::new();
    for word in words {
        let attribute = word.split('=').next().unwrap_or_default();
        if said.contains(&attribute) {
            return Err(fault(column(word), format!("`{attribute}` is said twice"), "keep one of the two"));
        }
        said.push(attribute);
        grant(&mut key, word).map_err(|(what, help)| fault(column(word), what, help))?;
    }
    Ok(Some(key))
}

fn grant(key: &mut Key, word: &str) -> Result<(), (String, &'static str)> {
    const PLACES: &str = "a number from 1 to 100000";
    let positive = |text: &str| text.parse().ok().filter(|n: &NonZeroU32| n.get() <= 100_000);
    let terms = &mut key.terms;
    match word.split_once('=') {
        None if word == "operator" => key.role = Role::Operator,
        Some((name @ "concurrency", value)) => {
            terms.concurrency = Some(positive(value).ok_or_else(|| (wrong(name, value), PLACES))?);
        }
        Some((name @ "weight", value)) => {
            terms.weight = positive(value).ok_or_else(|| (wrong(name, value), PLACES))?;
        }
        Some((name @ "queue", value)) => {
            let queue = value.parse().ok().filter(|n: &u32| *n <= 1_000_000);
            terms.queue = Some(queue.ok_or_else(|| (wrong(name, value), "a number from 0 to 1000000"))?);
        }
        Some((name @ "priority", value)) => {
            let found = Priority::ALL.into_iter().find(|priority| priority.name() == value);
            terms.priority = found.ok_or_else(|| (wrong(name, value), "`high`, `normal` or `low`"))?;
        }
        _ => {
            let known = "known are concurrency=N, queue=N, priority=high|normal|low, weight=N and operator";
            return Err((format!("`{word}` is not something a key can be granted"), known));
        }
    }
    Ok(())
}

fn wrong(name: &str, value: &str) -> String {
    format!("`{name}` cannot be `{value}`")
}

/// What is granted, as the file says it; empty for the defaults.
pub fn grants(terms: &Terms, role: Role) -> String {
    let mut words = Vec::new();
    words.extend(terms.concurrency.map(|places| format!("concurrency={places}")));
    words.extend(terms.queue.map(|waiting| format!("queue={waiting}")));
    if terms.priority != Priority::Normal {
        words.push(format!("priority={}", terms.priority.name()));
    }
    if terms.weight != NonZeroU32::MIN {
        words.push(format!("weight={}", terms.weight));
    }
    if role == Role::Operator {
        words.push(role.name().to_owned());
    }
    words.join(" ")
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks(2)) {
        let digit = |at: usize| (pair[at] as char).to_digit(16);
        *byte = u8::try_from(digit(0)? * 16 + digit(1)?).ok()?;
    }
    Some(digest)
}
