//! Watches the client's bytes before hyper sees them and says stop where two readers of the same
//! bytes could disagree on where a request ends.
//!
//! hyper repairs what a proxy in front of a second parser must refuse: it drops Content-Length beside
//! Transfer-Encoding, takes a bare LF as a line's end, takes several codings, several Hosts. This
//! checker changes no byte. It does no I/O; [`super::tap`] puts it under hyper.

mod head;

use http::StatusCode;

use head::head;
pub use head::{MAX_LINES, is_authority, is_known_method};

/// Longest head, request line and all.
pub const MAX_HEAD: usize = 64 * 1024;
/// Longest request target.
pub const MAX_TARGET: usize = 8 * 1024;
/// Longest request line: the target, a method and a version around it.
pub const MAX_LINE: usize = MAX_TARGET + 64;
/// Bytes of chunk extensions that one body may carry; nobody uses them but for attacks.
const MAX_EXTENSIONS: u32 = 1024;
/// Bytes of trailers that one body may carry. They are dropped anyway.
const MAX_TRAILERS: u32 = 8 * 1024;

/// Why a request is refused before anybody reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Violation {
    pub status: u16,
    pub reason: &'static str,
}

impl Violation {
    const fn bad(reason: &'static str) -> Self {
        Self { status: StatusCode::BAD_REQUEST.as_u16(), reason }
    }

    const fn with(status: StatusCode, reason: &'static str) -> Self {
        Self { status: status.as_u16(), reason }
    }

    pub const LARGE_HEAD: Self =
        Self::with(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "the request's head is too large");
    pub const MANY_LINES: Self =
        Self::with(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "there are too many header lines");
    pub const LONG_TARGET: Self = Self::with(StatusCode::URI_TOO_LONG, "the request's target is too long");
    pub const UNKNOWN_METHOD: Self = Self::with(StatusCode::METHOD_NOT_ALLOWED, "the method is not known here");
    pub const EXPECTATION: Self = Self::with(StatusCode::EXPECTATION_FAILED, "the expectation is not 100-continue");
    /// The client did not send its head in time.
    pub const SLOW_HEAD: Self = Self::with(StatusCode::REQUEST_TIMEOUT, "the request's head did not arrive in time");
}

/// How a body's end is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    None,
    Length(u64),
    Chunked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    /// `digits` of the size read so far.
    Size {
        value: u64,
        digits: u8,
    },
    Extension,
    SizeLf(u64),
    SizeLfEnd,
    Data(u64),
    DataCr,
    DataLf,
    /// At the start of a trailer line.
    LineStart,
    Line,
    LineLf,
    EndLf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Head,
    /// The head was judged; so many of its bytes have not been passed on.
    Passing(usize, Framing),
    Length(u64),
    Chunk(Chunk),
}

/// What to do with the bytes at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The head is not whole yet: bring more bytes, these included.
    More,
    /// So many bytes from the front may pass.
    Pass(usize),
    /// Nothing of the rest may pass, ever.
    Stop(Violation),
}

/// The checker of one connection.
#[derive(Debug)]
pub struct Checker {
    at: At,
    /// Size of the chunk whose extension is being read.
    size: u64,
    extensions: u32,
    trailers: u32,
}

impl Default for Checker {
    fn default() -> Self {
        Self { at: At::Head, size: 0, extensions: 0, trailers: 0 }
    }
}

impl Checker {
    /// Whether the next byte begins a request.
    pub fn between_requests(&self) -> bool {
        self.at == At::Head
    }

    /// Whether a violation now would fall into a body, whose request has been passed on.
    pub fn in_body(&self) -> bool {
        matches!(self.at, At::Length(_) | At::Chunk(_))
    }

    /// How much is to come of a body with a length: in it there is nothing to judge.
    pub fn left_of_body(&self) -> Option<u64> {
        match self.at {
            At::Length(left) => Some(left),
            _ => None,
        }
    }

    /// So many bytes of a body with a length have passed unseen: no more than [`Self::left_of_body`].
    pub fn passed_of_body(&mut self, passed: usize) {
        if let At::Length(left) = self.at {
            let left = left.saturating_sub(passed as u64);
            self.at = if left == 0 { At::Head } else { At::Length(left) };
        }
    }

    /// Judges `bytes`, of which at most `room` can be passed on now. `Pass(n)` has consumed `n`.
    pub fn step(&mut self, bytes: &[u8], room: usize) -> Step {
        if self.at == At::Head {
            match head(bytes) {
                Ok(Some((length, framing))) => self.at = At::Passing(length, framing),
                Ok(None) => return Step::More,
                Err(violation) => return Step::Stop(violation),
            }
        }
        let visible = &bytes[..bytes.len().min(room)];
        match self.at {
            At::Head => Step::More,
            At::Passing(left, framing) => {
                let passed = left.min(visible.len());
                self.at = match (left - passed, framing) {
                    (0, Framing::None | Framing::Length(0)) => At::Head,
                    (0, Framing::Length(length)) => At::Length(length),
                    (0, Framing::Chunked) => {
                        (self.extensions, self.trailers) = (0, 0);
                        At::Chunk(Chunk::Size { value: 0, digits: 0 })
                    }
                    (left, framing) => At::Passing(left, framing),
                };
                Step::Pass(passed)
            }
            At::Length(left) => {
                let passed = usize::try_from(left).map_or(visible.len(), |left| left.min(visible.len()));
                self.passed_of_body(passed);
                Step::Pass(passed)
            }
            At::Chunk(chunk) => self.chunks(chunk, visible),
        }
    }

    fn chunks(&mut self, mut chunk: Chunk, bytes: &[u8]) -> Step {
        let mut i = 0;
        while i < bytes.len() {
            let byte = bytes[i];
            chunk = match (chunk, byte) {
                (Chunk::Data(left), _) => {
                    let rest = bytes.len() - i;
                    let taken = usize::try_from(left).map_or(rest, |left| left.min(rest));
                    i += taken;
                    let left = left - taken as u64;
                    chunk = if left == 0 { Chunk::DataCr } else { Chunk::Data(left) };
                    continue;
                }
                (Chunk::Size { value, digits }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                    if digits == 15 {
                        return Step::Stop(Violation::bad("a chunk's size has too many digits"));
                    }
                    let digit = (byte as char).to_digit(16).map_or(0, u64::from);
                    Chunk::Size { value: value << 4 | digit, digits: digits + 1 }
                }
                (Chunk::Size { value, digits: 1.. }, b'\r') => after_size(value),
                (Chunk::Size { value, digits: 1.. }, b';') => {
                    self.size = value;
                    Chunk::Extension
                }
                (Chunk::Size { .. }, _) => {
                    return Step::Stop(Violation::bad("a chunk's size is no hexadecimal number"));
                }
                (Chunk::Extension, b'\r') => after_size(self.size),
                (Chunk::Extension, b'\t' | 0x20..=0x7e | 0x80..) => {
                    self.extensions += 1;
                    if self.extensions > MAX_EXTENSIONS {
                        return Step::Stop(Violation::bad("the chunk extensions are too long"));
                    }
                    Chunk::Extension
                }
                (Chunk::SizeLf(size), b'\n') => Chunk::Data(size),
                (Chunk::SizeLfEnd | Chunk::LineLf, b'\n') => Chunk::LineStart,
                (Chunk::DataCr, b'\r') => Chunk::DataLf,
                (Chunk::DataLf, b'\n') => Chunk::Size { value: 0, digits: 0 },
                (Chunk::LineStart, b'\r') => Chunk::EndLf,
                (Chunk::EndLf, b'\n') => {
                    self.at = At::Head;
                    return Step::Pass(i + 1);
                }
                (Chunk::Line, b'\r') => Chunk::LineLf,
                (Chunk::LineStart, b'!'..=b'~') | (Chunk::Line, b'\t' | 0x20..=0x7e | 0x80..) => {
                    self.trailers += 1;
                    if self.trailers > MAX_TRAILERS {
                        return Step::Stop(Violation::with(
                            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                            "the trailers are too long",
                        ));
                    }
                    Chunk::Line
                }
                _ => return Step::Stop(Violation::bad("the chunked body is malformed")),
            };
            i += 1;
        }
        self.at = At::Chunk(chunk);
        Step::Pass(bytes.len())
    }
}

fn after_size(size: u64) -> Chunk {
    if size == 0 { Chunk::SizeLfEnd } else { Chunk::SizeLf(size) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Feeds `bytes` cut at `cuts`; how many bytes passed, and what stopped the rest.
    fn feed(bytes: &[u8], cuts: &[usize], room: usize) -> (usize, Option<Violation>) {
        let mut checker = Checker::default();
        let (mut held, mut passed): (Vec<u8>, usize) = (Vec::new(), 0);
        let mut from = 0;
        let ends = cuts.iter().map(|cut| cut % (bytes.len() + 1)).chain([bytes.len()]);
        let mut ends: Vec<usize> = ends.collect();
        ends.sort_unstable();
        for end in ends {
            held.extend_from_slice(&bytes[from..end]);
            from = end;
            while !held.is_empty() {
                match checker.step(&held, room) {
                    Step::More => break,
                    Step::Stop(violation) => return (passed, Some(violation)),
                    Step::Pass(n) => {
                        passed += n;
                        held.drain(..n);
                    }
                }
            }
        }
        (passed, None)
    }

    fn status(request: &str) -> u16 {
        feed(request.as_bytes(), &[], 4096).1.map_or(200, |violation| violation.status)
    }

    #[test]
    fn ordinary_requests_pass_whole() {
        for request in [
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST /v1/x HTTP/1.1\r\nHost: a:80\r\nContent-Length: 2\r\n\r\n{}GET / HTTP/1.0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: [::1]:80\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nT: v\r\n\r\n",
            "GET http://a/b HTTP/1.1\r\nHost: a\r\n\r\n",
        ] {
            assert_eq!(feed(request.as_bytes(), &[], 4096), (request.len(), None), "{request}");
        }
    }

    #[test]
    fn each_ambiguity_is_refused() {
        let head = |fields: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n");
        for (fields, expected) in [
            ("Content-Length: 1\r\nTransfer-Encoding: chunked", 400),
            ("Content-Length: 1\r\nContent-Length: 1", 400),
            ("Content-Length: 5, 5", 400),
            ("Content-Length: +5", 400),
            ("Content-Length: 0x5", 400),
            ("Content-Length:  5", 400),
            ("Content-Length: 5 ", 400),
            ("Content-Length: 18446744073709551616", 400),
            ("Transfer-Encoding: xchunked", 501),
            ("Transfer-Encoding: gzip, chunked", 501),
            ("Transfer-Encoding: chunked, identity", 400),
            ("Transfer-Encoding: chunked, chunked", 400),
            ("Transfer-Encoding: chunked\x0b", 400),
            ("Transfer-Encoding:\tchunked", 400),
            ("Transfer-Encoding : chunked", 400),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400),
            ("Host: b", 400),
            ("X: a\r\n b", 400),
            ("X: a\nY: b", 400),
            ("X: a\rY: b", 400),
            ("X: a\0", 400),
            ("Expect: 200-maybe", 417),
        ] {
            assert_eq!(status(&head(fields)), expected, "{fields:?}");
        }
        assert_eq!(status("POST / HTTP/1.0\r\n\r\n"), 411);
        assert_eq!(status("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"), 400);
        assert_eq!(status("get / HTTP/1.1\r\nHost: a\r\n\r\n"), 405);
        assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(status("GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n"), 400);
    }

    proptest! {
        #[test]
        fn the_verdict_does_not_depend_on_how_the_bytes_are_cut(
            pick in 0usize..6, cuts in proptest::collection::vec(any::<usize>(), 0..8), room in 1usize..64,
        ) {
            let requests = [
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nA\r\n0123456789\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nA\n0123456789\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;a\rb\r\nx\r\n0\r\n\r\n",
                "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n",
                "GET / HTTP/1.1\r\nHost: a\r\n\r\n\r\nGET / HTTP/1.1\nHost: a\r\n\r\n",
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF0\r\n",
            ];
            let bytes = requests[pick].as_bytes();
            let whole = feed(bytes, &[], usize::MAX).1;
            prop_assert_eq!(feed(bytes, &cuts, room).1, whole);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), cuts in proptest::collection::vec(any::<usize>(), 0..4)) {
            feed(&bytes, &cuts, 16);
        }
    }
}
