//! Judges a request's head: where it ends, and how its body's end is found.
//!
//! Knows the bytes of one head and nothing of what came before; the body is the checker's.

use http::StatusCode;

use super::{Framing, MAX_HEAD, MAX_LINE, MAX_TARGET, Violation};

/// Most header lines.
pub const MAX_LINES: usize = 100;

/// Judges a head. `None`: it is not whole yet. Else its length and its body's framing.
pub(super) fn head(bytes: &[u8]) -> Result<Option<(usize, Framing)>, Violation> {
    // RFC 9112 §2.2: an empty line before the request line is ignored; one, not a flood.
    let skipped = if bytes.starts_with(b"\r\n") { 2 } else { 0 };
    let mut lines = Lines { bytes, at: skipped };
    let Some(line) = lines.next_line()? else {
        // What can be said of a line that has no end yet.
        if bytes.len() > MAX_LINE {
            return Err(Violation::LONG_TARGET);
        }
        return Ok(None);
    };
    let request = RequestLine::parse(line)?;
    let mut fields = Fields::default();
    loop {
        match lines.next_line()? {
            None if bytes.len() > MAX_HEAD => return Err(Violation::LARGE_HEAD),
            None => return Ok(None),
            Some(b"") => break,
            Some(line) => fields.take(line)?,
        }
    }
    if lines.at > MAX_HEAD {
        return Err(Violation::LARGE_HEAD);
    }
    let framing = fields.verdict(&request)?;
    Ok(Some((lines.at, framing)))
}

struct Lines<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Lines<'a> {
    /// The next line without its CRLF; `None` when it has no end yet.
    fn next_line(&mut self) -> Result<Option<&'a [u8]>, Violation> {
        let rest = &self.bytes[self.at..];
        let end = text_end(rest);
        match (rest.get(end), rest.get(end + 1)) {
            (Some(b'\r'), Some(b'\n')) => {
                self.at += end + 2;
                Ok(Some(&rest[..end]))
            }
            (None, _) | (Some(b'\r'), None) => Ok(None),
            (Some(b'\r'), _) => Err(Violation::bad("a carriage return stands alone in the head")),
            (Some(b'\n'), _) => Err(Violation::bad("a line of the head ends without carriage return")),
            _ => Err(Violation::bad("a control character stands in the head")),
        }
    }
}

/// Where the first byte stands that is neither text nor a tab. Eight are looked at in one step: this sees every
/// byte of every head.
fn text_end(bytes: &[u8]) -> usize {
    const fn each(byte: u8) -> u64 {
        u64::from_ne_bytes([byte; 8])
    }
    let mut at = 0;
    while let Some(&eight) = bytes[at..].first_chunk() {
        // The lowest high bit that is set stands in a byte that was below the subtracted one; what a borrow sets
        // beside it stands above.
        let word = u64::from_le_bytes(eight);
        let control = word.wrapping_sub(each(b' ')) & !word;
        let unlike = word ^ each(0x7f);
        let delete = unlike.wrapping_sub(each(1)) & !unlike;
        let found = (control | delete) & each(0x80);
        if found == 0 {
            at += 8;
            continue;
        }
        at += found.trailing_zeros() as usize / 8;
        if bytes[at] != b'\t' {
            return at;
        }
        at += 1;
    }
    at + bytes[at..].iter().position(|&byte| is_control(byte)).unwrap_or(bytes.len() - at)
}

fn is_control(byte: u8) -> bool {
    byte < b' ' && byte != b'\t' || byte == 0x7f
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    Http10,
    Http11,
}

struct RequestLine<'a> {
    method: &'a [u8],
    target: &'a [u8],
    version: Version,
}

impl<'a> RequestLine<'a> {
    fn parse(line: &'a [u8]) -> Result<Self, Violation> {
        let mut words = line.split(|&byte| byte == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(Violation::bad("the request line is not: method, target, version"));
        };
        let version = match version {
            b"HTTP/1.1" => Version::Http11,
            b"HTTP/1.0" => Version::Http10,
            _ => return Err(Violation::bad("the protocol is not HTTP/1.1 or HTTP/1.0")),
        };
        if target.len() > MAX_TARGET {
            return Err(Violation::LONG_TARGET);
        }
        if target.is_empty() || !target.iter().all(u8::is_ascii_graphic) {
            return Err(Violation::bad("the request's target is not plain ASCII"));
        }
        if !is_known_method(method) {
            return Err(Violation::UNKNOWN_METHOD);
        }
        Ok(Self { method, target, version })
    }

    /// The authority of an absolute-form target.
    fn authority(&self) -> Result<Option<&'a [u8]>, Violation> {
        if self.target[0] == b'/' || self.target == b"*" {
            return Ok(None);
        }
        let rest = [&b"http://"[..], b"https://"]
            .iter()
            .find(|scheme| self.target.get(..scheme.len()).is_some_and(|head| head.eq_ignore_ascii_case(scheme)))
            .map(|scheme| &self.target[scheme.len()..])
            .ok_or(Violation::bad("the request's target is neither a path nor an absolute URL"))?;
        let end = rest.iter().position(|byte| b"/?#".contains(byte)).unwrap_or(rest.len());
        Ok(Some(&rest[..end]))
    }
}

#[derive(Default)]
struct Fields<'a> {
    lines: usize,
    host: Option<&'a [u8]>,
    length: Option<u64>,
    chunked: bool,
}

impl<'a> Fields<'a> {
    fn take(&mut self, line: &'a [u8]) -> Result<(), Violation> {
        self.lines += 1;
        if self.lines > MAX_LINES {
            return Err(Violation::MANY_LINES);
        }
        if matches!(line[0], b' ' | b'\t') {
            return Err(Violation::bad("a header is folded over two lines"));
        }
        let end = line.iter().position(|&byte| !is_token(byte)).ok_or(Violation::bad("a header has no colon"))?;
        let (name, value) = (&line[..end], &line[end + 1..]);
        if name.is_empty() || line[end] != b':' {
            return Err(Violation::bad("a header's name is malformed"));
        }
        // One space is what everybody sends; more freedom is where parsers disagree.
        let value = value.strip_prefix(b" ").unwrap_or(value);
        if name.eq_ignore_ascii_case(b"content-length") {
            if self.length.is_some() {
                return Err(Violation::bad("there are two Content-Length headers"));
            }
            self.length = Some(content_length(value)?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if self.chunked {
                return Err(Violation::bad("there are two Transfer-Encoding headers"));
            }
            transfer_encoding(value)?;
            self.chunked = true;
        } else if name.eq_ignore_ascii_case(b"host") {
            if self.host.replace(value).is_some() {
                return Err(Violation::bad("there are two Host headers"));
            }
        } else if name.eq_ignore_ascii_case(b"expect") && !value.eq_ignore_ascii_case(b"100-continue") {
            return Err(Violation::EXPECTATION);
        }
        Ok(())
    }

    fn verdict(&self, request: &RequestLine<'_>) -> Result<Framing, Violation> {
        match (self.host, request.version) {
            (None, Version::Http11) => return Err(Violation::bad("there is no Host header")),
            (Some(host), _) if !is_authority(host) => return Err(Violation::bad("the Host header is malformed")),
            _ => {}
        }
        if let Some(authority) = request.authority()?
            && !self.host.is_some_and(|host| host.eq_ignore_ascii_case(authority))
        {
            return Err(Violation::bad("the target's authority and the Host header disagree"));
        }
        match (self.length, self.chunked, request.version) {
            (Some(_), true, _) => Err(Violation::bad("there are both Content-Length and Transfer-Encoding")),
            (None, true, Version::Http10) => Err(Violation::bad("Transfer-Encoding is not part of HTTP/1.0")),
            (None, true, Version::Http11) => Ok(Framing::Chunked),
            (Some(length), false, _) => Ok(Framing::Length(length)),
            (None, false, Version::Http10) if matches!(request.method, b"POST" | b"PUT" | b"PATCH") => {
                Err(Violation::with(StatusCode::LENGTH_REQUIRED, "the body has no length"))
            }
            (None, false, _) => Ok(Framing::None),
        }
    }
}

fn content_length(value: &[u8]) -> Result<u64, Violation> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return Err(Violation::bad("the Content-Length is no plain number"));
    }
    Ok(value.iter().fold(0, |length, digit| length * 10 + u64::from(digit - b'0')))
}

fn transfer_encoding(value: &[u8]) -> Result<(), Violation> {
    if value.eq_ignore_ascii_case(b"chunked") {
        return Ok(());
    }
    let codings: Vec<&[u8]> =
        value.split(|&byte| byte == b',').map(|word| word.strip_prefix(b" ").unwrap_or(word)).collect();
    let malformed = codings.iter().any(|coding| coding.is_empty() || !coding.iter().copied().all(is_token));
    let misplaced = codings[..codings.len() - 1].iter().any(|coding| coding.eq_ignore_ascii_case(b"chunked"));
    if malformed || misplaced {
        return Err(Violation::bad("the Transfer-Encoding is malformed"));
    }
    Err(Violation::with(StatusCode::NOT_IMPLEMENTED, "the only transfer coding known here is chunked"))
}

/// RFC 9110 §5.6.2, as a table: names are the larger part of most heads.
const TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let more = b"!#$%&'*+-.^_`|~";
    let mut byte: u8 = 0;
    while byte < 128 {
        table[byte as usize] = byte.is_ascii_alphanumeric();
        byte += 1;
    }
    let mut at = 0;
    while at < more.len() {
        table[more[at] as usize] = true;
        at += 1;
    }
    table
};

fn is_token(byte: u8) -> bool {
    TOKEN[usize::from(byte)]
}

/// Whether the method is one that some route may take.
pub fn is_known_method(method: &[u8]) -> bool {
    matches!(method, b"GET" | b"HEAD" | b"POST" | b"PUT" | b"PATCH" | b"DELETE" | b"OPTIONS")
}

/// Whether the bytes are a host, with or without a port, and nothing else.
pub fn is_authority(host: &[u8]) -> bool {
    !host.is_empty() && host.iter().all(|byte| byte.is_ascii_alphanumeric() || b".-_:[]%~".contains(byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_ends_where_the_first_control_character_stands(
            bytes in prop::collection::vec(prop_oneof![8 => any::<u8>(), 8 => 0x20..=0x7e_u8, 1 => Just(b'\t'), 1 => Just(0x7f)], 0..64),
        ) {
            let expected = bytes.iter().position(|&byte| is_control(byte)).unwrap_or(bytes.len());
            prop_assert_eq!(text_end(&bytes), expected);
        }
    }
}
