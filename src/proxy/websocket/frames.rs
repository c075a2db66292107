//! Follows one direction of a WebSocket by its frames' headers (RFC 6455 §5.2).
//!
//! Payloads are skipped, not read, and nothing is judged: both ends do that. It only has to know where
//! a frame ends and of which kind it was.

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Part of a message.
    Data,
    /// A heartbeat.
    Ping,
    Close,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between two frames.
    Start,
    /// The first byte is read.
    Length,
    /// So many bytes of a long length are missing.
    LongLength {
        missing: u8,
        value: u64,
        masked: Masked,
    },
    Mask {
        missing: u8,
        length: u64,
    },
    Payload(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Masked {
    Yes,
    No,
}

#[derive(Debug)]
pub struct Frames {
    state: State,
    /// Of the frame that passes, or passed last.
    kind: Kind,
}

impl Default for Frames {
    fn default() -> Self {
        Self { state: State::Start, kind: Kind::Data }
    }
}

impl Frames {
    /// Takes what belongs to the frame that passes, or to the next one. Returns how many bytes; the
    /// rest is another frame's.
    pub fn pass(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let rest = bytes.len() - at;
            if let State::Payload(left) = self.state {
                let taken = usize::try_from(left).map_or(rest, |left| left.min(rest));
                at += taken;
                self.state = payload(left - taken as u64);
            } else {
                self.header(bytes[at]);
                at += 1;
            }
            if self.is_between() {
                break;
            }
        }
        at
    }

    fn header(&mut self, byte: u8) {
        self.state = match self.state {
            State::Start | State::Payload(_) => {
                self.kind = match byte & 0x0f {
                    0..8 => Kind::Data,
                    8 => Kind::Close,
                    _ => Kind::Ping,
                };
                State::Length
            }
            State::Length => {
                let masked = if byte & 0x80 == 0 { Masked::No } else { Masked::Yes };
                match byte & 0x7f {
                    126 => State::LongLength { missing: 2, value: 0, masked },
                    127 => State::LongLength { missing: 8, value: 0, masked },
                    length => behind_length(u64::from(length), masked),
                }
            }
            State::LongLength { missing, value, masked } => {
                let value = value << 8 | u64::from(byte);
                match missing - 1 {
                    0 => behind_length(value, masked),
                    missing => State::LongLength { missing, value, masked },
                }
            }
            State::Mask { missing: 1, length } => payload(length),
            State::Mask { missing, length } => State::Mask { missing: missing - 1, length },
        };
    }

    /// Whether one frame is whole and the next has not begun.
    pub fn is_between(&self) -> bool {
        self.state == State::Start
    }

    /// Of which kind the frame is that passes, or passed last.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

fn behind_length(length: u64, masked: Masked) -> State {
    match masked {
        Masked::Yes => State::Mask { missing: 4, length },
        Masked::No => payload(length),
    }
}

fn payload(left: u64) -> State {
    if left == 0 { State::Start } else { State::Payload(left) }
}

/// Why a server ends a WebSocket (RFC 6455 §7.4.1 and its registry).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goodbye {
    /// Nothing but heartbeats came for long.
    Idle,
    EngineLost,
    /// Come again, to this server or the next.
    Restart,
}

impl Goodbye {
    /// The closing frame, as a server sends it.
    pub fn frame(self) -> Vec<u8> {
        let (code, reason): (u16, &str) = match self {
            Self::Idle => (1001, "nothing was said for long"),
            Self::EngineLost => (1011, "the engine's connection broke off"),
            Self::Restart => (1012, "the server is stopping"),
        };
        let [high, low] = code.to_be_bytes();
        // A control frame's length is one byte below 126; the reasons are short.
        let mut frame = vec![0x88, 2 + reason.len() as u8, high, low];
        frame.extend_from_slice(reason.as_bytes());
        frame
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(opcode: u8, length: usize, masked: bool) -> Vec<u8> {
        let mask = if masked { 0x80 } else { 0 };
        let mut frame = vec![0x80 | opcode];
        match length {
            0..126 => frame.push(mask | length as u8),
            126..65536 => frame.extend([&[mask | 0x7e][..], &(length as u16).to_be_bytes()].concat()),
            _ => frame.extend([&[mask | 0x7f][..], &(length as u64).to_be_bytes()].concat()),
        }
        if masked {
            frame.extend([1, 2, 3, 4]);
        }
        frame.resize(frame.len() + length, 0x88);
        frame
    }

    /// The kinds of the frames that end in `wire`, cut into such pieces, and whether it ends between two.
    fn kinds(wire: &[u8], cuts: &[usize]) -> (Vec<Kind>, bool) {
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (wire.len() + 1)).chain([wire.len()]).collect();
        ends.sort_unstable();
        let (mut frames, mut found, mut from) = (Frames::default(), Vec::new(), 0);
        for end in ends {
            while from < end {
                let passed = frames.pass(&wire[from..end]);
                assert!(passed > 0, "no progress");
                from += passed;
                if frames.is_between() {
                    found.push(frames.kind());
                }
            }
        }
        (found, frames.is_between())
    }

    proptest! {
        #[test]
        fn frames_are_found_however_they_are_cut(
            sent in proptest::collection::vec((prop_oneof![Just(0u8), Just(1), Just(2), Just(8), Just(9), Just(10)],
                prop_oneof![0usize..130, Just(65_535), Just(65_536), Just(70_000)], any::<bool>()), 0..6),
            cuts in proptest::collection::vec(any::<usize>(), 0..40),
        ) {
            let wire: Vec<u8> = sent.iter().flat_map(|&(opcode, length, masked)| frame(opcode, length, masked)).collect();
            let expected: Vec<Kind> = sent.iter().map(|(opcode, ..)| match opcode {
                0..3 => Kind::Data,
                8 => Kind::Close,
                _ => Kind::Ping,
            }).collect();
            prop_assert_eq!(kinds(&wire, &cuts), (expected, true));
            if let Some(short) = wire.len().checked_sub(1) {
                prop_assert!(!kinds(&wire[..short], &cuts).1);
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), cuts in proptest::collection::vec(any::<usize>(), 0..9)) {
            let _ = kinds(&bytes, &cuts);
        }
    }

    #[test]
    fn goodbyes_are_whole_frames() {
        for goodbye in [Goodbye::Idle, Goodbye::EngineLost, Goodbye::Restart] {
            assert_eq!(kinds(&goodbye.frame(), &[]), (vec![Kind::Close], true));
        }
        assert_eq!(Goodbye::Restart.frame()[..4], [0x88, 24, 0x03, 0xf4]);
    }
}
