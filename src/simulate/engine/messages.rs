//! `/v1/messages` of the simulated engine: the same answers in Anthropic's words, as the real one makes
//! them of its chat's (its `entrypoints/anthropic/serving.py`).

use std::fmt::Write as _;

use bytes::Bytes;
use http::{Response, StatusCode};
use serde_json::{Value, json};

use super::http::{Answer, json as answer_json};

pub fn refuse(message: &str) -> Response<Answer> {
    let error = json!({"type": "invalid_request_error", "message": message});
    answer_json(StatusCode::BAD_REQUEST, &json!({"type": "error", "error": error}))
}

/// What stands before the first token and does not change.
#[derive(Debug, Clone)]
pub struct Head {
    pub id: String,
    pub model: String,
    pub prompt: u64,
}

impl Head {
    fn message(&self, content: &Value, given: u64) -> Value {
        json!({"id": format!("msg_{}", self.id), "type": "message", "role": "assistant", "content": content,
            "model": self.model, "usage": {"input_tokens": self.prompt, "output_tokens": given}})
    }

    /// The answer in one piece.
    pub fn whole(&self, thought: &str, said: &str, given: u64, finish: &str) -> Value {
        let mut content = Vec::new();
        if !thought.is_empty() {
            content.push(json!({"type": "thinking", "thinking": thought}));
        }
        // A message has one block at least, be it empty.
        if !said.is_empty() || content.is_empty() {
            content.push(json!({"type": "text", "text": said}));
        }
        let mut message = self.message(&content.into(), given);
        message["stop_reason"] = stop_reason(finish).into();
        message
    }
}

/// An abort has no word here: the real one says `end_turn` of it too.
fn stop_reason(finish: &str) -> &'static str {
    if finish == "length" { "max_tokens" } else { "end_turn" }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    Thinking,
    Text,
}

impl Block {
    fn kind(self) -> &'static str {
        match self {
            Self::Thinking => "thinking",
            Self::Text => "text",
        }
    }
}

/// A stream's events: the message is opened before its first piece, each block around its own.
#[derive(Debug)]
pub struct Events {
    head: Head,
    open: Option<Block>,
    /// Blocks that were closed: the number of the open one.
    closed: u64,
    begun: bool,
}

impl Events {
    pub fn new(head: Head) -> Self {
        Self { head, open: None, closed: 0, begun: false }
    }

    pub fn piece(&mut self, piece: &str, block: Block) -> Bytes {
        let mut out = self.begin();
        if self.open != Some(block) {
            out.push_str(&self.close());
            self.open = Some(block);
            let content = json!({"type": block.kind(), block.kind(): ""});
            event(&mut out, "content_block_start", &json!({"index": self.closed, "content_block": content}));
        }
        let delta = json!({"type": format!("{}_delta", block.kind()), block.kind(): piece});
        event(&mut out, "content_block_delta", &json!({"index": self.closed, "delta": delta}));
        out.into()
    }

    pub fn end(mut self, given: u64, finish: &str) -> Bytes {
        let mut out = self.begin();
        out.push_str(&self.close());
        let told = json!({"delta": {"stop_reason": stop_reason(finish)}, "usage": {"output_tokens": given}});
        event(&mut out, "message_delta", &told);
        event(&mut out, "message_stop", &json!({}));
        out.into()
    }

    fn begin(&mut self) -> String {
        let mut out = String::new();
        if !std::mem::replace(&mut self.begun, true) {
            event(&mut out, "message_start", &json!({"message": self.head.message(&json!([]), 0)}));
        }
        out
    }

    fn close(&mut self) -> String {
        let mut out = String::new();
        if self.open.take().is_some() {
            event(&mut out, "content_block_stop", &json!({"index": self.closed}));
            self.closed += 1;
        }
        out
    }
}

/// One event, its type both in the name and in the data.
fn event(out: &mut String, kind: &str, fields: &Value) {
    let mut data = json!({"type": kind});
    if let (Some(data), Some(fields)) = (data.as_object_mut(), fields.as_object()) {
        data.extend(fields.clone());
    }
    // Writing into a string cannot fail.
    let _ = write!(out, "event: {kind}\ndata: {data}\n\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_is_opened_and_closed_around_its_pieces() {
        let mut events = Events::new(Head { id: "1".into(), model: "m".into(), prompt: 7 });
        let pieces = [("a", Block::Thinking), ("b", Block::Thinking), ("c", Block::Text)];
        let mut text: Vec<u8> = pieces.into_iter().flat_map(|(piece, block)| events.piece(piece, block)).collect();
        text.extend(events.end(3, "length"));
        let text = String::from_utf8(text).unwrap();
        let kinds: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("event: ")).collect();
        let block = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"];
        let expected = [
            &["message_start"][..],
            &block,
            &["content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"],
        ];
        assert_eq!(kinds, expected.concat());
        assert!(text.contains(r#""index":1,"delta":{"type":"text_delta","text":"c"}"#), "{text}");
        assert!(text.contains(r#""stop_reason":"max_tokens"},"usage":{"output_tokens":3}"#), "{text}");
    }
}
