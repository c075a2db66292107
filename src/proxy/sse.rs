//! What an answer's bytes tell in passing: where events end, how many tokens came, why it ended.
//!
//! Fed with the payload as it comes, cut anywhere; nothing is kept but some bytes of what is not at
//! its end, and nothing is changed. It is no JSON parser: an object's key cannot stand unescaped in a
//! string, so a key that is found by its bytes is a key. It does no I/O and knows no clock.

mod facts;

pub use facts::{Facts, Reason, Words};

/// How events follow each other in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grammar {
    /// `text/event-stream`.
    Events,
    /// One JSON object a line.
    Lines,
    /// One JSON document: no events.
    Document,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Position {
    /// Between two events: one of our own may stand here.
    Between,
    Inside,
}

/// What the last line that was not empty said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    Nothing,
    Data,
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum LastByte {
    #[default]
    Other,
    /// A line feed that comes next belongs to it.
    CarriageReturn,
}

const BOM: &[u8] = b"\xef\xbb\xbf";
/// As much of a line's beginning as tells `data: [DONE]`, a BOM before it, from a longer one.
const HEAD: usize = 16;
/// Of a document only the end of each piece is looked at: that is where usage stands, and the text
/// before it may be large.
const DOCUMENT_TAIL: usize = 2 * 1024;

#[derive(Debug)]
pub struct Scanner {
    grammar: Grammar,
    facts: Facts,
    events: u64,
    position: Position,
    last_byte: LastByte,
    /// In the event that is not at its end.
    said: Said,
    /// The beginning of the line that is not at its end.
    head: [u8; HEAD],
    head_length: u8,
    /// A BOM may stand before the first line.
    line: Line,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    First,
    Later,
}

impl Scanner {
    pub fn new(grammar: Grammar, words: Words) -> Self {
        Self {
            grammar,
            facts: Facts::new(words),
            events: 0,
            position: Position::Between,
            last_byte: LastByte::Other,
            said: Said::Nothing,
            head: [0; HEAD],
            head_length: 0,
            line: Line::First,
        }
    }

    /// The next bytes of the payload. Returns how many events with data ended in them.
    pub fn scan(&mut self, piece: &[u8]) -> u64 {
        let before = self.events;
        match self.grammar {
            Grammar::Document => {
                let skipped = piece.len().saturating_sub(DOCUMENT_TAIL);
                if skipped > 0 {
                    self.facts.forget();
                }
                self.facts.scan(&piece[skipped..]);
            }
            Grammar::Events | Grammar::Lines => {
                self.lines(piece);
                self.facts.scan(piece);
                if self.position == Position::Between {
                    self.facts.forget();
                }
            }
        }
        self.events - before
    }

    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Events with data so far, `[DONE]` not counted.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Whether an event of our own would stand by itself here.
    pub fn is_between_events(&self) -> bool {
        self.grammar == Grammar::Events && self.position == Position::Between
    }

    /// Whether `data: [DONE]` was the last that was said.
    pub fn is_done(&self) -> bool {
        let line = self.line();
        self.grammar == Grammar::Events && (line.is_empty() && self.said == Said::Done || is_done(line))
    }

    fn line(&self) -> &[u8] {
        let line = self.head.get(..usize::from(self.head_length)).unwrap_or_default();
        if self.line == Line::First { line.strip_prefix(BOM).unwrap_or(line) } else { line }
    }

    fn lines(&mut self, mut rest: &[u8]) {
        while let Some(&first) = rest.first() {
            if std::mem::take(&mut self.last_byte) == LastByte::CarriageReturn && first == b'\n' {
                rest = &rest[1..];
                continue;
            }
            let end = memchr::memchr2(b'\n', b'\r', rest);
            self.extend(&rest[..end.unwrap_or(rest.len())]);
            let Some(end) = end else { return };
            self.end_line();
            if rest[end] == b'\r' {
                self.last_byte = LastByte::CarriageReturn;
            }
            rest = &rest[end + 1..];
        }
    }

    /// More of a line.
    fn extend(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.position = Position::Inside;
        let from = usize::from(self.head_length);
        let taken = bytes.len().min(HEAD - from);
        self.head[from..from + taken].copy_from_slice(&bytes[..taken]);
        // At most HEAD, which fits.
        self.head_length += taken as u8;
    }

    fn end_line(&mut self) {
        let line = self.line();
        match self.grammar {
            Grammar::Events if line.is_empty() => {
                if self.said == Said::Data {
                    self.events += 1;
                    self.said = Said::Nothing;
                }
                self.position = Position::Between;
            }
            Grammar::Events if is_done(line) => self.said = Said::Done,
            Grammar::Events if line.starts_with(b"data:") || line == b"data" => self.said = Said::Data,
            Grammar::Events => {
                if self.said == Said::Done {
                    self.said = Said::Nothing;
                }
            }
            Grammar::Lines | Grammar::Document => {
                self.events += u64::from(!line.is_empty());
                self.position = Position::Between;
            }
        }
        self.line = Line::Later;
        self.head_length = 0;
    }
}

fn is_done(line: &[u8]) -> bool {
    line.strip_prefix(b"data:").is_some_and(|data| data.strip_prefix(b" ").unwrap_or(data) == b"[DONE]")
}

#[cfg(test)]
#[path = "sse/tests.rs"]
mod tests;
