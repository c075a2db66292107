//! Cuts a connection's bytes into frames, wherever they were cut in transit, and keeps none of them.
//!
//! Of a payload it shows the settings' numbers and a reset's reason, where it is asked to. It judges
//! nothing.

/// The largest frame that we ask for: the least that may be asked for.
pub const MAX_FRAME: u32 = 16_384;
/// The largest window there may be.
pub const MAX_WINDOW: u32 = (1 << 31) - 1;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const INITIAL_WINDOW_SIZE: u16 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub length: u32,
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
}

impl Head {
    fn parse(bytes: [u8; 9]) -> Self {
        Self {
            length: u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]),
            kind: bytes[3],
            flags: bytes[4],
            stream: u32::from_be_bytes([bytes[5], bytes[6], bytes[7], bytes[8]]) & MAX_WINDOW,
        }
    }

    pub fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// What is gathered next, or passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    Head,
    /// One of the settings of a frame with so many bytes left.
    Setting(u32),
    /// Why we reset a stream.
    Reason,
    Payload(u32),
}

/// Cuts bytes into frames, wherever they were cut in transit.
#[derive(Debug)]
pub struct Frames {
    pub at: At,
    gathered: [u8; 9],
    have: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    Head(Head),
    Setting { id: u16, value: u32 },
    Reason(u32),
}

impl Default for Frames {
    fn default() -> Self {
        Self { at: At::Head, gathered: [0; 9], have: 0 }
    }
}

impl Frames {
    /// The next piece in `bytes`, which are consumed up to its end.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Option<Piece> {
        loop {
            let wanted = match self.at {
                At::Payload(left) => {
                    let passed = bytes.len().min(left as usize);
                    *bytes = &bytes[passed..];
                    let left = left - passed as u32;
                    if left > 0 {
                        self.at = At::Payload(left);
                        return None;
                    }
                    self.at = At::Head;
                    continue;
                }
                At::Head => 9,
                At::Setting(_) => 6,
                At::Reason => 4,
            };
            let taken = bytes.len().min(wanted - self.have);
            self.gathered[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            *bytes = &bytes[taken..];
            if self.have < wanted {
                return None;
            }
            self.have = 0;
            let number = |at: usize| u32::from_be_bytes(std::array::from_fn(|i| self.gathered[at + i]));
            return Some(match self.at {
                At::Head | At::Payload(_) => {
                    let head = Head::parse(self.gathered);
                    self.at = At::Payload(head.length);
                    Piece::Head(head)
                }
                At::Setting(left) => {
                    let left = left - 6;
                    self.at = if left < 6 { At::Payload(left) } else { At::Setting(left) };
                    Piece::Setting { id: (number(0) >> 16) as u16, value: number(2) }
                }
                At::Reason => {
                    self.at = At::Head;
                    Piece::Reason(number(0))
                }
            });
        }
    }
}
