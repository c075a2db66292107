//! What an answer was: whole, marked as broken, refused. Anything else is what the soak is there to find.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

use crate::harness::client::{Answer, End};

/// How a request went, where nothing is wrong with that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// All that was asked for, and a good end.
    Whole,
    /// Broken, with an error event that says so.
    Told,
    /// Broken, by the connection's abnormal end alone.
    Broken,
    /// An error with this status, in one piece.
    Refused(u16),
    /// The client went.
    Left,
}

impl Outcome {
    /// What only an engine's death may do to a client that did nothing wrong.
    pub fn is_harm(self) -> bool {
        matches!(self, Self::Told | Self::Broken | Self::Refused(_))
    }

    fn name(self) -> String {
        match self {
            Self::Whole => "whole".into(),
            Self::Told => "broken, told by an event".into(),
            Self::Broken => "broken, by its end".into(),
            Self::Refused(status) => format!("refused with {status}"),
            Self::Left => "left".into(),
        }
    }
}

/// What the client had asked for.
#[derive(Debug, Clone, Copy)]
pub enum Asked {
    Stream(u32),
    Whole(u32),
    Messages(u32),
}

/// An answer over HTTP/1.1.
pub fn judge(answer: &Answer, asked: Asked) -> Result<Outcome, String> {
    let complete = answer.end == End::Complete;
    if answer.status != 200 {
        let retry = answer.header("retry-after").is_some();
        return refused(answer.status, complete, retry, &answer.body);
    }
    judge_body(&answer.text(), complete, asked)
}

pub fn refused(status: u16, complete: bool, retry: bool, body: &[u8]) -> Result<Outcome, String> {
    let text = String::from_utf8_lossy(body);
    let told: Value = serde_json::from_slice(body).map_err(|_| format!("{status} without JSON: {text:?}"))?;
    if !complete || !told["error"]["message"].is_string() {
        return Err(format!("{status} that is not whole: {text:?}"));
    }
    if matches!(status, 429 | 503) && !retry {
        return Err(format!("{status} without Retry-After: {text:?}"));
    }
    Ok(Outcome::Refused(status))
}

/// The body of a 200. `complete`: the connection says that it is all.
pub fn judge_body(text: &str, complete: bool, asked: Asked) -> Result<Outcome, String> {
    let wrong = |what: &str| {
        let tail: String = text.chars().rev().take(300).collect::<Vec<_>>().into_iter().rev().collect();
        Err(format!("{what}; asked {asked:?}, complete: {complete}, its end: {tail:?}"))
    };
    let (tokens, wanted, ended) = match asked {
        // One event opens the answer and has no text.
        Asked::Stream(wanted) => {
            (text.matches("\"content\":\"").count().saturating_sub(1), wanted, text.ends_with("data: [DONE]\n\n"))
        }
        Asked::Messages(wanted) => {
            (text.matches("\"text_delta\"").count(), wanted, text.ends_with("{\"type\":\"message_stop\"}\n\n"))
        }
        Asked::Whole(wanted) => {
            let body: Value = serde_json::from_str(text).unwrap_or_default();
            let tokens = body["usage"]["completion_tokens"].as_u64().unwrap_or(0) as usize;
            (tokens, wanted, complete && !body.is_null())
        }
    };
    let error = text.contains("\"error\"");
    match (complete, ended) {
        (true, true) if tokens == wanted as usize && !error => Ok(Outcome::Whole),
        (true, true) => wrong(&format!("{tokens} tokens, and it looks whole")),
        (true, false) => wrong("a short answer that looks complete"),
        // All had come but the last chunk, which is ours to say.
        (false, true) => wrong("an end of the engine's, and then a broken connection"),
        (false, false) if error => Ok(Outcome::Told),
        (false, false) => Ok(Outcome::Broken),
    }
}

/// How often what happened to whom.
#[derive(Debug, Default)]
pub struct Tally(BTreeMap<(&'static str, Outcome), u64>);

impl Tally {
    pub fn count(&mut self, kind: &'static str, outcome: Outcome) {
        *self.0.entry((kind, outcome)).or_default() += 1;
    }

    pub fn of(&self, kind: &str) -> u64 {
        self.0.iter().filter(|((of, _), _)| *of == kind).map(|(_, count)| count).sum()
    }

    pub fn of_outcome(&self, wanted: Outcome) -> u64 {
        self.0.iter().filter(|((_, outcome), _)| *outcome == wanted).map(|(_, count)| count).sum()
    }

    pub fn shown(&self) -> String {
        let mut out = String::new();
        for ((kind, outcome), count) in &self.0 {
            let _ = writeln!(out, "  {kind:<22} {:<26} {count:>8}", outcome.name());
        }
        out
    }
}

#[test]
fn an_answer_that_is_short_and_looks_whole_is_found() {
    let events = |tokens: usize, end: &str| {
        format!("data: {{\"content\":\"\"}}\n\n{}{end}", "data: {\"content\":\"x\"}\n\n".repeat(tokens))
    };
    let done = "data: [DONE]\n\n";
    let told = "data: {\"error\":{}}\n\n";
    let asked = Asked::Stream(3);
    assert_eq!(judge_body(&events(3, done), true, asked), Ok(Outcome::Whole));
    assert_eq!(judge_body(&events(2, told), false, asked), Ok(Outcome::Told));
    assert_eq!(judge_body(&events(2, ""), false, asked), Ok(Outcome::Broken));
    for (text, complete) in [
        (events(2, done), true),
        (events(2, ""), true),
        (events(2, told), true),
        (events(3, &format!("{told}{done}")), true),
        (events(3, done), false),
    ] {
        assert!(judge_body(&text, complete, asked).is_err(), "{text}");
    }
    assert!(judge_body("{\"usage\":{\"completion_tokens\":2}}", true, Asked::Whole(3)).is_err());
    assert!(refused(503, true, false, b"{\"error\":{\"message\":\"m\"}}").is_err());
}
