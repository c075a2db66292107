//! Finds the payload in an answer's bytes: length, chunks, or until the connection ends.
//!
//! Works in place on whatever has just been read, keeps no byte, and does no I/O. The payload comes
//! out byte for byte; chunk boundaries and trailers do not.

use std::ops::Range;

/// Digits of a chunk's size and the byte behind them, for a chunk that may go as it came: no buffer here holds more.
const LONGEST_SIZE: usize = 8;
const CRLF: &[u8] = b"\r\n";

/// How the engine said the body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    Length(u64),
    Chunked,
    /// The connection's end is the body's end.
    Close,
}

/// The bytes are no chunked body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the engine's chunked answer is malformed")]
pub struct Malformed;

/// What one piece of input held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decoded {
    /// The payload now stands in the first so many bytes.
    pub payload: usize,
    /// Bytes after the body's end: nobody asked for them.
    pub surplus: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Length(u64),
    Close,
    Size { value: u64, digits: u8 },
    Extension(u64),
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    TrailerStart,
    Trailer,
    EndLf,
    Done,
}

#[derive(Debug, Clone, Copy)]
pub struct Decoder(State);

impl Decoder {
    pub fn new(framing: Framing) -> Self {
        Self(match framing {
            Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Size { value: 0, digits: 0 },
            Framing::Close => State::Close,
        })
    }

    /// Whether the body is complete.
    pub fn is_done(&self) -> bool {
        self.0 == State::Done
    }

    /// Whether the connection's end is the body's proper end.
    pub fn ends_with_connection(&self) -> bool {
        matches!(self.0, State::Close | State::Done)
    }

    /// Where the payload stands, if these bytes are one whole chunk and nothing else: as engines write an event. Then
    /// nothing changes here, and the bytes may go to another reader of chunks as they are.
    pub fn one_chunk(&self, bytes: &[u8]) -> Option<Range<usize>> {
        if self.0 != (State::Size { value: 0, digits: 0 }) {
            return None;
        }
        let digits = bytes.iter().take(LONGEST_SIZE).position(|byte| !byte.is_ascii_hexdigit())?;
        let digit = |byte: &u8| (*byte as char).to_digit(16).map_or(0, |digit| digit as usize);
        let size = bytes[..digits].iter().fold(0, |size, byte| size << 4 | digit(byte));
        let from = digits + CRLF.len();
        let framed = size > 0 && bytes[digits..].starts_with(CRLF) && bytes.get(from + size..)? == CRLF;
        framed.then_some(from..from + size)
    }

    pub fn decode(&mut self, bytes: &mut [u8]) -> Result<Decoded, Malformed> {
        let mut payload = 0;
        let mut at = 0;
        while at < bytes.len() {
            let rest = bytes.len() - at;
            match self.0 {
                State::Done => break,
                State::Close => {
                    payload = bytes.len();
                    at = bytes.len();
                }
                State::Length(left) => {
                    let taken = usize::try_from(left).map_or(rest, |left| left.min(rest));
                    (payload, at) = (payload + taken, at + taken);
                    let left = left - taken as u64;
                    self.0 = if left == 0 { State::Done } else { State::Length(left) };
                }
                State::Data(left) => {
                    let taken = usize::try_from(left).map_or(rest, |left| left.min(rest));
                    bytes.copy_within(at..at + taken, payload);
                    (payload, at) = (payload + taken, at + taken);
                    let left = left - taken as u64;
                    self.0 = if left == 0 { State::DataCr } else { State::Data(left) };
                }
                state => {
                    self.0 = between(state, bytes[at])?;
                    at += 1;
                }
            }
        }
        Ok(Decoded { payload, surplus: bytes.len() - at })
    }
}

/// The states in which a byte stands for itself.
fn between(state: State, byte: u8) -> Result<State, Malformed> {
    Ok(match (state, byte) {
        (State::Size { value, digits }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') if digits < 15 => {
            State::Size { value: value << 4 | (byte as char).to_digit(16).map_or(0, u64::from), digits: digits + 1 }
        }
        (State::Size { value, digits: 1.. }, b';' | b' ' | b'\t') => State::Extension(value),
        (State::Size { value, digits: 1.. } | State::Extension(value), b'\r') => State::SizeLf(value),
        (State::Extension(value), byte) if byte != b'\n' => State::Extension(value),
        (State::SizeLf(0) | State::Trailer, b'\n') => State::TrailerStart,
        (State::SizeLf(size), b'\n') => State::Data(size),
        (State::DataCr, b'\r') => State::DataLf,
        (State::DataLf, b'\n') => State::Size { value: 0, digits: 0 },
        (State::TrailerStart, b'\r') => State::EndLf,
        (State::EndLf, b'\n') => State::Done,
        (State::TrailerStart | State::Trailer, byte) if byte != b'\n' => State::Trailer,
        _ => return Err(Malformed),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Decodes `wire` cut into pieces; the payload, whether it is complete, and the surplus.
    fn decode(framing: Framing, wire: &[u8], cuts: &[usize]) -> Result<(Vec<u8>, bool, usize), Malformed> {
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (wire.len() + 1)).chain([wire.len()]).collect();
        ends.sort_unstable();
        let (mut decoder, mut payload, mut surplus, mut from) = (Decoder::new(framing), Vec::new(), 0, 0);
        for end in ends {
            let mut piece = wire[from..end].to_vec();
            from = end;
            let decoded = decoder.decode(&mut piece)?;
            payload.extend_from_slice(&piece[..decoded.payload]);
            surplus += decoded.surplus;
        }
        Ok((payload, decoder.is_done(), surplus))
    }

    proptest! {
        #[test]
        fn any_body_in_any_chunks_cut_anywhere_comes_out_the_same(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..12),
            cuts in proptest::collection::vec(any::<usize>(), 0..30),
            trailer in any::<bool>(), extension in any::<bool>(), surplus in 0usize..4,
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                let extension = if extension { ";a=b" } else { "" };
                wire.extend_from_slice(format!("{:x}{extension}\r\n", chunk.len()).as_bytes());
                wire.extend_from_slice(chunk);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(if trailer { b"0\r\nA: b\r\n\r\n" } else { b"0\r\n\r\n" });
            wire.resize(wire.len() + surplus, b'x');
            let expected = (chunks.concat(), true, surplus);
            prop_assert_eq!(decode(Framing::Chunked, &wire, &cuts), Ok(expected));
        }

        #[test]
        fn a_length_takes_exactly_so_many(body in proptest::collection::vec(any::<u8>(), 1..200), cuts in proptest::collection::vec(any::<usize>(), 0..9)) {
            let mut wire = body.clone();
            wire.extend_from_slice(b"more");
            prop_assert_eq!(decode(Framing::Length(body.len() as u64), &wire, &cuts), Ok((body.clone(), true, 4)));
            prop_assert_eq!(decode(Framing::Length(body.len() as u64 + 5), &wire, &cuts), Ok((wire, false, 0)));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), cuts in proptest::collection::vec(any::<usize>(), 0..9)) {
            let _ = decode(Framing::Chunked, &bytes, &cuts);
        }
    }

    proptest! {
        /// Whatever is told to be one chunk is that for the decoder too: its payload, no more, and the next chunk's size awaited.
        #[test]
        fn one_chunk_is_what_the_decoder_takes_for_one(
            size in "[0-9a-fA-F+; ]{0,4}", end in "(\r\n|\n|\r)", body in proptest::collection::vec(any::<u8>(), 0..40),
            tail in "(\r\n){0,2}", matching in any::<bool>(),
        ) {
            let size = if matching { format!("{:x}", body.len()) } else { size };
            let mut wire = [size.as_bytes(), end.as_bytes(), &body, tail.as_bytes()].concat();
            let mut decoder = Decoder::new(Framing::Chunked);
            if let Some(payload) = decoder.one_chunk(&wire) {
                let told = wire[payload].to_vec();
                prop_assert_eq!(&told, &body);
                let decoded = decoder.decode(&mut wire);
                prop_assert_eq!(decoded, Ok(Decoded { payload: told.len(), surplus: 0 }));
                prop_assert_eq!(decoder.0, State::Size { value: 0, digits: 0 });
            } else {
                prop_assert!(!matching || body.is_empty() || end != "\r\n" || tail != "\r\n");
            }
        }
    }

    #[test]
    fn within_another_chunk_nothing_is_one() {
        let mut decoder = Decoder::new(Framing::Chunked);
        decoder.decode(&mut b"a\r\n".to_vec()).unwrap();
        assert_eq!(decoder.one_chunk(b"5\r\nhello\r\n"), None);
        for framing in [Framing::Length(10), Framing::Close] {
            assert_eq!(Decoder::new(framing).one_chunk(b"5\r\nhello\r\n"), None);
        }
    }

    #[test]
    fn what_is_no_chunk_is_refused() {
        for wire in ["x\r\n", "\r\n", "1\na", "1\r\nab", "FFFFFFFFFFFFFFFF0\r\n", "-1\r\n", "1;x\n"] {
            assert_eq!(decode(Framing::Chunked, wire.as_bytes(), &[]), Err(Malformed), "{wire:?}");
        }
    }
}
