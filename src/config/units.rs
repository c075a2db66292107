//! Durations and sizes as people write them: `25s`, `10min`, `1h30min`, `64MiB`.

use std::fmt::Write;
use std::time::Duration;

/// Longest duration that makes sense here: a year.
const MAX_SECONDS: f64 = 365.0 * 86_400.0;

/// Reads `25s`, `10min`, `3h`, `1h30min`, `500ms`, or plain seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let units = [("ms", 0.001), ("s", 1.0), ("min", 60.0), ("h", 3600.0), ("d", 86_400.0)];
    let seconds = quantity(text, 1.0, &units).ok_or_else(|| "a duration, like 25s, 10min, 3h or 500ms".to_owned())?;
    if seconds > MAX_SECONDS {
        return Err("a duration of at most 365d".to_owned());
    }
    Ok(Duration::from_millis((seconds * 1000.0).round() as u64))
}

/// Reads `64MiB`, `1GB`, or plain bytes.
pub fn size(text: &str) -> Result<u64, String> {
    let units = [
        ("B", 1.0),
        ("KiB", 1024.0),
        ("MiB", 1_048_576.0),
        ("GiB", 1_073_741_824.0),
        ("KB", 1e3),
        ("MB", 1e6),
        ("GB", 1e9),
    ];
    let bytes = quantity(text, 1.0, &units).ok_or_else(|| "a size, like 64MiB, 1GB or plain bytes".to_owned())?;
    if bytes > 1e15 { Err("a size below 1 PB".to_owned()) } else { Ok(bytes.round() as u64) }
}

/// One or more `NUMBER UNIT` after each other; one bare number counts in `bare`.
fn quantity(text: &str, bare: f64, units: &[(&str, f64)]) -> Option<f64> {
    let mut rest = text.trim();
    let mut total = 0.0;
    let mut first = true;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..digits].parse().ok()?;
        rest = rest[digits..].trim_start();
        let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let factor = match &rest[..letters] {
            "" if first && rest.is_empty() => bare,
            unit => units.iter().find(|(name, _)| *name == unit)?.1,
        };
        rest = rest[letters..].trim_start();
        total += number * factor;
        first = false;
    }
    (!first && total.is_finite()).then_some(total)
}

/// As `duration` reads it back: `10min`, `1h30min`, `2s500ms`.
pub fn show_duration(duration: Duration) -> String {
    let mut ms = duration.as_millis() as u64;
    if ms == 0 {
        return "0s".to_owned();
    }
    let mut out = String::new();
    for (unit, size) in [("h", 3_600_000), ("min", 60_000), ("s", 1000), ("ms", 1)] {
        if ms >= size {
            // Writing to a String cannot fail.
            let _ = write!(out, "{}{unit}", ms / size);
            ms %= size;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, ms) in [
            ("25s", 25_000),
            ("10min", 600_000),
            ("3h", 10_800_000),
            ("25", 25_000),
            ("0", 0),
            ("0.5", 500),
            ("1h30min", 5_400_000),
            ("250ms", 250),
            ("1.5h", 5_400_000),
            ("2 s", 2000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "5m", "1:30", "-5s", "5 parsecs", "1..5s", "1h 30", "999999d", "inf", "NaN"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_shown_duration_reads_back_the_same() {
        for ms in [0, 1, 999, 1000, 61_000, 3_600_000, 5_430_250, 90_000_000] {
            let value = Duration::from_millis(ms);
            assert_eq!(duration(&show_duration(value)), Ok(value));
        }
    }

    #[test]
    fn sizes_tell_kib_from_kb() {
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("64MB"), Ok(64_000_000));
        assert_eq!(size("1024"), Ok(1024));
        assert!(size("64M").is_err());
        assert!(size("-1").is_err());
    }
}
