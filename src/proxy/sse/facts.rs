//! The few values of an answer that are counted: tokens and why it ended, found by their keys.

use std::sync::LazyLock;

use memchr::memmem::Finder;

/// Why the engine said that it stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Stop,
    Length,
    ToolCalls,
    ContentFilter,
    Abort,
    Other,
}

impl Reason {
    pub const ALL: [Self; 6] =
        [Self::Stop, Self::Length, Self::ToolCalls, Self::ContentFilter, Self::Abort, Self::Other];

    /// The label in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::ContentFilter => "content_filter",
            Self::Abort => "abort",
            Self::Other => "other",
        }
    }

    /// In the words of any dialect.
    fn of(word: &[u8]) -> Self {
        match word {
            b"stop" | b"end_turn" | b"stop_sequence" => Self::Stop,
            b"length" | b"max_tokens" => Self::Length,
            b"tool_calls" | b"tool_use" | b"function_call" => Self::ToolCalls,
            b"content_filter" | b"refusal" => Self::ContentFilter,
            b"abort" => Self::Abort,
            _ => Self::Other,
        }
    }
}

/// Whose words an answer is told in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Words {
    /// OpenAI's, Anthropic's and SGLang's own.
    #[default]
    Common,
    Ollama,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Prompt,
    Completion,
    Reason,
}

/// Keys that end alike are searched for together: most events hold none, and each search costs.
struct Search {
    ending: LazyLock<Finder<'static>>,
    beginnings: &'static [(&'static [u8], Key)],
}

static COMMON_COUNTS: Search = Search {
    ending: LazyLock::new(|| Finder::new(b"_tokens\":")),
    beginnings: &[
        (b"\"completion", Key::Completion),
        (b"\"output", Key::Completion),
        (b"\"prompt", Key::Prompt),
        (b"\"input", Key::Prompt),
    ],
};
static OLLAMA_COUNTS: Search = Search {
    ending: LazyLock::new(|| Finder::new(b"eval_count\":")),
    beginnings: &[(b"\"prompt_", Key::Prompt), (b"\"", Key::Completion)],
};
static REASONS: Search = Search {
    ending: LazyLock::new(|| Finder::new(b"_reason\":")),
    beginnings: &[(b"\"finish", Key::Reason), (b"\"stop", Key::Reason), (b"\"done", Key::Reason)],
};

/// A key, its value and the byte behind it are shorter than this.
const LONGEST: usize = 64;

/// What was found so far. Of several counts of one key the largest holds, since usage grows; so it
/// does no harm to find one twice.
#[derive(Debug)]
pub struct Facts {
    words: Words,
    pub prompt: Option<u64>,
    pub completion: Option<u64>,
    pub reason: Option<Reason>,
    /// The last bytes of what is not at its end.
    tail: [u8; LONGEST],
    tail_length: u8,
}

impl Facts {
    pub fn new(words: Words) -> Self {
        Self { words, prompt: None, completion: None, reason: None, tail: [0; LONGEST], tail_length: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.prompt.is_none() && self.completion.is_none() && self.reason.is_none()
    }

    pub fn scan(&mut self, piece: &[u8]) {
        let known = usize::from(self.tail_length);
        if known > 0 {
            // What began before this piece.
            let new = piece.len().min(LONGEST);
            let mut joint = [0; 2 * LONGEST];
            joint[..known].copy_from_slice(&self.tail[..known]);
            joint[known..known + new].copy_from_slice(&piece[..new]);
            self.search(&joint[..known + new]);
        }
        if known == 0 || piece.len() > LONGEST {
            self.search(piece);
        }
        let new = piece.len().min(LONGEST);
        let old = known.min(LONGEST - new);
        self.tail.copy_within(known - old..known, 0);
        self.tail[old..old + new].copy_from_slice(&piece[piece.len() - new..]);
        // At most LONGEST, which fits.
        self.tail_length = (old + new) as u8;
    }

    /// What comes next does not go on with what came last.
    pub fn forget(&mut self) {
        self.tail_length = 0;
    }

    fn search(&mut self, text: &[u8]) {
        let counts = match self.words {
            Words::Common => &COMMON_COUNTS,
            Words::Ollama => &OLLAMA_COUNTS,
        };
        for Search { ending, beginnings } in [counts, &REASONS] {
            let ending: &Finder<'_> = ending;
            for at in ending.find_iter(text) {
                let (before, rest) = text.split_at(at);
                let Some((_, key)) = beginnings.iter().find(|(beginning, _)| before.ends_with(beginning)) else {
                    continue;
                };
                let value = rest[ending.needle().len()..].trim_ascii_start();
                match key {
                    Key::Prompt => self.prompt = self.prompt.max(count(value)),
                    Key::Completion => self.completion = self.completion.max(count(value)),
                    Key::Reason => self.reason = reason(value).or(self.reason),
                }
            }
        }
    }
}

/// A number with a byte behind it: without one it may go on.
fn count(value: &[u8]) -> Option<u64> {
    let digits = value.iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(&value[..digits]).ok()?.parse().ok()
}

/// A word, or SGLang's own object around it; `null` is none.
fn reason(value: &[u8]) -> Option<Reason> {
    let word = match value.split_first()? {
        (b'"', rest) => rest,
        (b'{', rest) => {
            let rest = rest.trim_ascii_start().strip_prefix(b"\"type\":")?;
            rest.trim_ascii_start().strip_prefix(b"\"")?
        }
        _ => return None,
    };
    let end = memchr::memchr(b'"', word)?;
    Some(Reason::of(&word[..end]))
}
