//! What the first bytes of a request's body say about how it is to be served: whether it asks for a
//! stream, and how many sequences it makes the engine compute.
//!
//! A scanner over bytes that are held anyway: no copy, no tree, no recursion, each byte once. It
//! judges nothing and refuses nothing: on doubt (no JSON object, another encoding, a name said twice,
//! deeper than [`MAX_DEPTH`]) it knows nothing, and the engine gets the bytes as they came.
//!
//! Clients mostly write `stream` last, behind the prompt. Where the prompt is longer than what is
//! looked at, [`stream_at_end`] reads the body's last bytes, backwards.

use memchr::memchr2;

/// How far a body is looked into. A prompt beyond it hides what follows, but not what
/// [`stream_at_end`] finds.
pub const WINDOW: usize = 16 * 1024;
/// How much of a body's end is enough for some scalars behind the prompt.
pub const END: usize = 512;
/// Deepest nesting that is followed; the kind of each level is one bit.
const MAX_DEPTH: u32 = 128;

/// Whether the answer is to be an event stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stream {
    Yes,
    /// Said `false`, or the whole body was seen and says nothing.
    No,
    #[default]
    Unknown,
}

/// What was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peek {
    pub stream: Stream,
    /// Sequences that the engine computes for it at least: prompts times choices.
    pub sequences: u32,
}

impl Peek {
    pub const NOTHING: Self = Self { stream: Stream::Unknown, sequences: 1 };
}

/// Why the scan ends before the object does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// The bytes end: what was seen so far counts.
    Truncated,
    /// Not what a client of the engine sends, or not readable in one way only.
    Doubt,
}

type Scanned<T> = Result<T, Stop>;

/// The members that are looked for, each at most once.
#[derive(Debug, Default)]
struct Found {
    stream: Option<Stream>,
    n: Option<u32>,
    best_of: Option<u32>,
    prompts: Option<u32>,
    sampled: Option<()>,
}

/// Looks at a body's first bytes.
pub fn peek(body: &[u8]) -> Peek {
    let mut scan = Scan { bytes: &body[..body.len().min(WINDOW)], at: 0 };
    let mut found = Found::default();
    let outcome = scan.document(&mut found);
    let absent = match outcome {
        Ok(()) if body.len() <= WINDOW => Stream::No,
        Ok(()) | Err(Stop::Truncated) => Stream::Unknown,
        Err(Stop::Doubt) => return Peek::NOTHING,
    };
    let choices = found.n.unwrap_or(1).max(found.best_of.unwrap_or(1)).max(1);
    let prompts = found.prompts.unwrap_or(1).max(1);
    Peek { stream: found.stream.unwrap_or(absent), sequences: choices.saturating_mul(prompts) }
}

/// Puts `value` where nothing was before.
fn once<T>(slot: &mut Option<T>, value: T) -> Scanned<()> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(Stop::Doubt),
    }
}

struct Scan<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Scan<'a> {
    fn byte(&self) -> Scanned<u8> {
        self.bytes.get(self.at).copied().ok_or(Stop::Truncated)
    }

    /// The next byte that is no white space; stays on it.
    fn next(&mut self) -> Scanned<u8> {
        loop {
            match self.byte()? {
                b' ' | b'\n' | b'\r' | b'\t' => self.at += 1,
                byte => return Ok(byte),
            }
        }
    }

    fn expect(&mut self, what: u8) -> Scanned<()> {
        if self.next()? != what {
            return Err(Stop::Doubt);
        }
        self.at += 1;
        Ok(())
    }

    /// One object and nothing behind it.
    fn document(&mut self, found: &mut Found) -> Scanned<()> {
        self.object(|scan, name| match name {
            b"stream" => {
                let said = match scan.word()? {
                    Some(b"true") => Stream::Yes,
                    Some(b"false") => Stream::No,
                    // The engine makes something of "true" and 1; what, is its business.
                    _ => Stream::Unknown,
                };
                once(&mut found.stream, said)
            }
            b"n" => {
                let n = scan.count()?;
                once(&mut found.n, n)
            }
            b"best_of" => {
                let n = scan.count()?;
                once(&mut found.best_of, n)
            }
            b"prompt" | b"text" | b"input_ids" | b"input" => {
                let before = found.prompts.replace(1);
                let outcome = scan.batch(&mut found.prompts);
                if before.is_some() { Err(Stop::Doubt) } else { outcome }
            }
            b"sampling_params" if scan.next()? == b'{' => {
                once(&mut found.sampled, ())?;
                scan.object(|scan, name| match name {
                    b"n" => {
                        let n = scan.count()?;
                        once(&mut found.n, n)
                    }
                    _ => scan.skip(),
                })
            }
            _ => scan.skip(),
        })?;
        match self.next() {
            Err(Stop::Truncated) => Ok(()),
            _ => Err(Stop::Doubt),
        }
    }

    fn object(&mut self, mut member: impl FnMut(&mut Self, &'a [u8]) -> Scanned<()>) -> Scanned<()> {
        self.expect(b'{')?;
        if self.next()? == b'}' {
            self.at += 1;
            return Ok(());
        }
        loop {
            if self.next()? != b'"' {
                return Err(Stop::Doubt);
            }
            let name = self.string()?;
            if name.contains(&b'\\') {
                // It may spell any name.
                return Err(Stop::Doubt);
            }
            self.expect(b':')?;
            member(self, name)?;
            match self.next()? {
                b',' => self.at += 1,
                b'}' => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return Err(Stop::Doubt),
            }
        }
    }

    /// The bytes between the quotes, escapes as they stand.
    fn string(&mut self) -> Scanned<&'a [u8]> {
        let from = self.at + 1;
        let mut at = from;
        loop {
            let rest = self.bytes.get(at..).ok_or(Stop::Truncated)?;
            at += memchr2(b'"', b'\\', rest).ok_or(Stop::Truncated)?;
            if self.bytes[at] == b'"' {
                self.at = at + 1;
                return Ok(&self.bytes[from..at]);
            }
            at += 2;
        }
    }

    /// A number, `true`, `false` or `null`, whole; none: something else, skipped.
    fn word(&mut self) -> Scanned<Option<&'a [u8]>> {
        let first = self.next()?;
        if !is_word(first) {
            self.skip()?;
            return Ok(None);
        }
        let from = self.at;
        while is_word(self.byte()?) {
            self.at += 1;
        }
        Ok(Some(&self.bytes[from..self.at]))
    }

    /// A plain whole number; 1 for everything else.
    fn count(&mut self) -> Scanned<u32> {
        let word = self.word()?.and_then(|word| std::str::from_utf8(word).ok());
        Ok(word.and_then(|word| word.parse().ok()).unwrap_or(1))
    }

    /// Counts the texts, or the lists of tokens, of an array into `count`. A list of numbers is one
    /// prompt, and of objects the parts of one.
    fn batch(&mut self, count: &mut Option<u32>) -> Scanned<()> {
        if self.next()? != b'[' {
            return self.skip();
        }
        let opened = self.at;
        self.at += 1;
        if !matches!(self.next()?, b'"' | b'[') {
            self.at = opened;
            return self.skip();
        }
        let mut items = 0u32;
        loop {
            self.skip()?;
            items += 1;
            *count = Some(items);
            match self.next()? {
                b',' => self.at += 1,
                b']' => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return Err(Stop::Doubt),
            }
        }
    }

    /// Steps over one value of any kind.
    fn skip(&mut self) -> Scanned<()> {
        // The kinds of the levels that are open, the innermost in the lowest bit: 1 is an object.
        let (mut kinds, mut depth) = (0u128, 0u32);
        loop {
            match self.next()? {
                b'"' => drop(self.string()?),
                opens @ (b'{' | b'[') => {
                    if depth == MAX_DEPTH {
                        return Err(Stop::Doubt);
                    }
                    kinds = kinds << 1 | u128::from(opens == b'{');
                    depth += 1;
                    self.at += 1;
                    continue;
                }
                closes @ (b'}' | b']') if depth > 0 => {
                    if (kinds & 1 == 1) != (closes == b'}') {
                        return Err(Stop::Doubt);
                    }
                    kinds >>= 1;
                    depth -= 1;
                    self.at += 1;
                }
                b',' | b':' if depth > 0 => {
                    self.at += 1;
                    continue;
                }
                byte if is_word(byte) => {
                    while is_word(self.byte()?) {
                        self.at += 1;
                    }
                }
                _ => return Err(Stop::Doubt),
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }
}

/// Bytes of numbers and of the three literals.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.')
}

/// Looks for `stream` among the scalars at the end of a body, of which `end` are the last bytes.
///
/// Backwards a string is found as surely as forwards: within it every quote has an odd number of
/// backslashes before it, the one that opens it has none. A list or an object ends the look.
pub fn stream_at_end(end: &[u8]) -> Stream {
    look_back(end).unwrap_or_default()
}

fn look_back(end: &[u8]) -> Option<Stream> {
    let mut rest = end.trim_ascii_end().strip_suffix(b"}")?;
    loop {
        rest = rest.trim_ascii_end();
        let value;
        (rest, value) = match rest.last()? {
            b'"' => (string_back(rest)?.0, None),
            byte if is_word(*byte) => {
                let from = rest.iter().rposition(|byte| !is_word(*byte))? + 1;
                (&rest[..from], Some(&rest[from..]))
            }
            _ => return None,
        };
        let (before, name) = string_back(rest.trim_ascii_end().strip_suffix(b":")?.trim_ascii_end())?;
        match (name, value) {
            (b"stream", Some(b"true")) => return Some(Stream::Yes),
            (b"stream", Some(b"false")) => return Some(Stream::No),
            (b"stream", _) => return None,
            (name, _) if name.contains(&b'\\') => return None,
            _ => {}
        }
        rest = before.trim_ascii_end().strip_suffix(b",")?;
    }
}

/// The string that ends `bytes`, and what stands before it.
fn string_back(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let inner = bytes.strip_suffix(b"\"")?;
    let mut open = inner.len();
    loop {
        open = memchr::memrchr(b'"', &inner[..open])?;
        let slashes = inner[..open].iter().rev().take_while(|byte| **byte == b'\\').count();
        if slashes % 2 == 0 {
            return Some((&inner[..open], &inner[open + 1..]));
        }
    }
}

#[cfg(test)]
mod tests;
