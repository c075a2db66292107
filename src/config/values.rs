//! Single values as they are written: numbers, names, repositories, addresses.

pub fn whole(text: &str, min: u64, max: u64) -> Result<u64, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    // `012` is ten in one YAML version and twelve in another: neither is guessed.
    let plain = digits && (text == "0" || !text.starts_with('0'));
    match text.parse::<u64>() {
        Ok(n) if plain && (min..=max).contains(&n) => Ok(n),
        _ => Err(format!("a whole number from {min} to {max}")),
    }
}

pub fn model_name(text: &str) -> Result<String, String> {
    let fine = !text.is_empty() && !text.contains(':') && !text.starts_with('-') && !text.contains(char::is_control);
    if fine { Ok(text.to_owned()) } else { Err("a name without `:` (SGLang keeps that for adapters)".to_owned()) }
}

pub fn repo(text: &str) -> Result<String, String> {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['-', '.'])
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    let parts: Vec<&str> = text.split('/').collect();
    if (1..=2).contains(&parts.len()) && parts.iter().all(|p| part(p)) {
        Ok(text.to_owned())
    } else {
        Err("ORGANISATION/NAME (a local folder is `model.path`)".to_owned())
    }
}

pub fn endpoint(text: &str) -> Result<String, String> {
    let host = text.strip_prefix("https://").or(text.strip_prefix("http://"));
    match host {
        Some(host) if !host.is_empty() && !host.contains(char::is_whitespace) => {
            Ok(text.trim_end_matches('/').to_owned())
        }
        _ => Err("an address: https://HOST".to_owned()),
    }
}
