//! The `Date` of answers that hyper does not write.

use std::cell::RefCell;
use std::time::Duration;

use http::HeaderValue;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimePrinter;
use tokio::time::Instant;

thread_local! {
    static LAST: RefCell<Option<(Instant, HeaderValue)>> = const { RefCell::new(None) };
}

/// The time as answers say it, made once a second a worker.
pub fn now() -> HeaderValue {
    LAST.with_borrow_mut(|last| {
        let now = Instant::now();
        match last {
            Some((made, date)) if now.saturating_duration_since(*made) < Duration::from_secs(1) => date.clone(),
            _ => {
                // Only years beyond 9999 cannot be written.
                let text = DateTimePrinter::new().timestamp_to_rfc9110_string(&Timestamp::now()).unwrap_or_default();
                let date = HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""));
                *last = Some((now, date.clone()));
                date
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_date_is_in_the_form_of_rfc_9110() {
        let text = now().to_str().expect("text").to_owned();
        let words: Vec<&str> = text.split(' ').collect();
        assert_eq!((words.len(), words[5], words[1].len()), (6, "GMT", 2), "{text}");
    }
}
