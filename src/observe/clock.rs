//! The wall clock, for timestamps that people read. Never for durations: it jumps.

use jiff::Timestamp;

/// Now, in RFC 3339 with milliseconds, UTC.
pub fn now() -> String {
    format!("{:.3}", Timestamp::now())
}

/// Seconds since 1970 with a fraction, as Python's `time.time()`.
pub fn unix_time() -> f64 {
    Timestamp::now().as_microsecond() as f64 / 1e6
}

/// Seconds since 1970, for file names and records.
pub fn unix_seconds() -> i64 {
    Timestamp::now().as_second()
}
