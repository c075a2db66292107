//! Watches the frames of one connection, both ways, for what h2 lets a client do at no cost.
//!
//! It reads frame heads (9 bytes) and nothing of a payload but the settings' numbers and the reasons of
//! our own resets. It says stop in two cases: a frame that RFC 9113 answers with another reason than
//! h2 does, and a client that spends a budget: resets, whoever was made to send them (CVE-2023-44487,
//! "MadeYouReset"), and frames that ask for work without being any. It changes no byte and does no
//! I/O; [`super::io`] puts it under h2.

use h2::Reason;
use tokio::time::Instant;

use super::frames::{
    ACK, At, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frames, GOAWAY, HEADERS, Head, INITIAL_WINDOW_SIZE,
    MAX_FRAME, MAX_WINDOW, PING, PRIORITY, PUSH_PROMISE, Piece, RST_STREAM, SETTINGS, WINDOW_UPDATE,
};

/// What every client sends first.
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Resets that a client may cause at once, its own and those that its errors force out of us: twice
/// the streams that may be open, since a gateway may give up all of them in one moment.
pub const RESETS: u32 = 200;
/// And how many a second in the long run.
const RESETS_A_SECOND: u32 = 20;
/// SETTINGS, PING, PRIORITY, GOAWAY, unknown and empty DATA frames at once, and a second.
const CHATTER: u32 = 1000;
const CHATTER_A_SECOND: u32 = 100;
/// What a request may say beside itself: browsers and older libraries send priorities with each.
const CHATTER_A_REQUEST: u32 = 4;
/// WINDOW_UPDATE frames at once, and a second.
const UPDATES: u32 = 1000;
const UPDATES_A_SECOND: u32 = 100;
/// A client may answer each DATA frame with an update of the stream's window and one of the
/// connection's. What it has not answered yet is in its socket, so this credit has no bound.
const UPDATES_A_FRAME: u32 = 2;

/// What may be spent at once, and comes back with time.
#[derive(Debug)]
struct Budget {
    left: u32,
    most: u32,
    a_second: u32,
    filled: Instant,
}

impl Budget {
    fn new(most: u32, a_second: u32, now: Instant) -> Self {
        Self { left: most, most, a_second, filled: now }
    }

    /// The clock is asked only when nothing is left.
    fn spend(&mut self, now: impl Fn() -> Instant) -> Result<(), Reason> {
        if self.left == 0 {
            let now = now();
            let earned = now.saturating_duration_since(self.filled).as_secs_f64() * f64::from(self.a_second);
            self.left = (earned as u32).min(self.most);
            if self.left > 0 {
                self.filled = now;
            }
        }
        self.left = self.left.checked_sub(1).ok_or(Reason::ENHANCE_YOUR_CALM)?;
        Ok(())
    }
}

/// Whether a client is in the middle of saying a request's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Closed,
    /// HEADERS without END_HEADERS has come: CONTINUATION must follow.
    Open,
}

/// The watch over one connection.
#[derive(Debug)]
pub struct Watch {
    /// Bytes of the preface that have not come.
    preface: usize,
    first: First,
    inbound: Frames,
    kind: u8,
    block: Block,
    /// Heads that have begun.
    heads: u64,
    outbound: Frames,
    resets: Budget,
    chatter: Budget,
    updates: Budget,
}

/// Whether the client's SETTINGS, which must come first, have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum First {
    Awaited,
    Come,
}

impl Watch {
    pub fn new(now: Instant) -> Self {
        Self {
            preface: PREFACE.len(),
            first: First::Awaited,
            inbound: Frames::default(),
            kind: DATA,
            block: Block::Closed,
            heads: 0,
            outbound: Frames::default(),
            resets: Budget::new(RESETS, RESETS_A_SECOND, now),
            chatter: Budget::new(CHATTER, CHATTER_A_SECOND, now),
            updates: Budget::new(UPDATES, UPDATES_A_SECOND, now),
        }
    }

    /// The number of the request's head that has begun and is not whole.
    pub fn awaits_head(&self) -> Option<u64> {
        let cut = matches!(self.inbound.at, At::Payload(1..)) && matches!(self.kind, HEADERS | CONTINUATION);
        (cut || self.block == Block::Open).then_some(self.heads)
    }

    /// Judges what the client sent. An error: nothing of it may pass, and the connection ends with it.
    pub fn read(&mut self, mut bytes: &[u8], now: impl Fn() -> Instant) -> Result<(), Reason> {
        let preface = self.preface.min(bytes.len());
        self.preface -= preface;
        bytes = &bytes[preface..];
        while let Some(piece) = self.inbound.next(&mut bytes) {
            match piece {
                Piece::Head(head) => self.judge(head, &now)?,
                Piece::Setting { id: INITIAL_WINDOW_SIZE, value } if value > MAX_WINDOW => {
                    return Err(Reason::FLOW_CONTROL_ERROR);
                }
                Piece::Setting { .. } | Piece::Reason(_) => {}
            }
        }
        Ok(())
    }

    fn judge(&mut self, head: Head, now: impl Fn() -> Instant) -> Result<(), Reason> {
        self.kind = head.kind;
        if self.first == First::Awaited {
            if head.kind != SETTINGS || head.has(ACK) {
                return Err(Reason::PROTOCOL_ERROR);
            }
            self.first = First::Come;
        }
        let fits = match head.kind {
            PRIORITY => head.length == 5,
            RST_STREAM | WINDOW_UPDATE => head.length == 4,
            SETTINGS if head.has(ACK) => head.length == 0,
            SETTINGS => head.length.is_multiple_of(6),
            PING => head.length == 8,
            GOAWAY => head.length >= 8,
            _ => true,
        };
        if !fits || head.length > MAX_FRAME {
            return Err(Reason::FRAME_SIZE_ERROR);
        }
        match head.kind {
            DATA if head.length == 0 && !head.has(END_STREAM) => self.chatter.spend(now),
            DATA => Ok(()),
            HEADERS => {
                self.heads += 1;
                self.block = if head.has(END_HEADERS) { Block::Closed } else { Block::Open };
                self.chatter.left = self.chatter.left.saturating_add(CHATTER_A_REQUEST).min(self.chatter.most);
                Ok(())
            }
            // How many of them may follow each other is h2's to count.
            CONTINUATION => {
                if head.has(END_HEADERS) {
                    self.block = Block::Closed;
                }
                Ok(())
            }
            RST_STREAM => self.resets.spend(now),
            SETTINGS if head.stream != 0 => Err(Reason::PROTOCOL_ERROR),
            SETTINGS => {
                if head.length > 0 {
                    self.inbound.at = At::Setting(head.length);
                }
                self.chatter.spend(now)
            }
            PUSH_PROMISE => Err(Reason::PROTOCOL_ERROR),
            WINDOW_UPDATE => self.updates.spend(now),
            _ => self.chatter.spend(now),
        }
    }

    /// Notes what was sent to the client.
    pub fn wrote(&mut self, mut bytes: &[u8], now: impl Fn() -> Instant) -> Result<(), Reason> {
        while let Some(piece) = self.outbound.next(&mut bytes) {
            match piece {
                Piece::Head(Head { kind: DATA, .. }) => {
                    self.updates.left = self.updates.left.saturating_add(UPDATES_A_FRAME);
                }
                Piece::Head(Head { kind: RST_STREAM, .. }) => self.outbound.at = At::Reason,
                Piece::Reason(reason) if is_the_clients_fault(reason.into()) => self.resets.spend(&now)?,
                Piece::Head(_) | Piece::Setting { .. } | Piece::Reason(_) => {}
            }
        }
        Ok(())
    }
}

/// Whether a stream that we reset for this was broken by the client. A cut or stalled stream and an
/// early answer are not.
fn is_the_clients_fault(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::PROTOCOL_ERROR
            | Reason::FLOW_CONTROL_ERROR
            | Reason::STREAM_CLOSED
            | Reason::FRAME_SIZE_ERROR
            | Reason::REFUSED_STREAM
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn begun(now: Instant) -> Watch {
        let mut watch = Watch::new(now);
        let hello = [PREFACE.as_slice(), &frame(SETTINGS, 0, 0, &[])].concat();
        watch.read(&hello, || now).expect("a good beginning");
        watch
    }

    /// How many of the same frame pass before one does not.
    fn passes(watch: &mut Watch, bytes: &[u8], now: Instant) -> (u32, Reason) {
        for n in 0..1_000_000 {
            if let Err(reason) = watch.read(bytes, || now) {
                return (n, reason);
            }
        }
        panic!("there is no budget");
    }

    #[test]
    fn each_flood_has_its_budget_and_gets_it_back_with_time() {
        let now = Instant::now();
        for (bytes, most, a_second) in [
            (frame(SETTINGS, 0, 0, &[]), CHATTER - 1, CHATTER_A_SECOND),
            (frame(PING, 0, 0, &[0; 8]), CHATTER - 1, CHATTER_A_SECOND),
            (frame(PING, ACK, 0, &[0; 8]), CHATTER - 1, CHATTER_A_SECOND),
            (frame(PRIORITY, 0, 1, &[0; 5]), CHATTER - 1, CHATTER_A_SECOND),
            (frame(0xbe, 0, 1, b"?"), CHATTER - 1, CHATTER_A_SECOND),
            (frame(DATA, 0, 1, &[]), CHATTER - 1, CHATTER_A_SECOND),
            (frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]), UPDATES, UPDATES_A_SECOND),
            (frame(RST_STREAM, 0, 1, &[0; 4]), RESETS, RESETS_A_SECOND),
        ] {
            // Behind an error nothing is read: each end has a watch of its own.
            assert_eq!(passes(&mut begun(now), &bytes, now), (most, Reason::ENHANCE_YOUR_CALM), "{bytes:?}");
            for (later, again) in [(Duration::from_secs(3), 3 * a_second), (Duration::from_hours(1), most)] {
                let mut watch = begun(now);
                for _ in 0..most {
                    watch.read(&bytes, || now).expect("within the budget");
                }
                assert!(passes(&mut watch, &bytes, now + later).0.abs_diff(again) <= 1, "{bytes:?}");
            }
        }
    }

    #[test]
    fn our_resets_and_the_clients_share_one_budget() {
        let now = Instant::now();
        let mut watch = begun(now);
        for _ in 0..RESETS / 2 {
            watch.read(&frame(RST_STREAM, 0, 1, &[0; 4]), || now).expect("within the budget");
            // What an engine's death or a stalled reader costs is not the client's to pay.
            for free in [Reason::NO_ERROR, Reason::INTERNAL_ERROR, Reason::CANCEL] {
                watch.wrote(&frame(RST_STREAM, 0, 1, &u32::from(free).to_be_bytes()), || now).expect("free");
            }
            let forced = u32::from(Reason::PROTOCOL_ERROR).to_be_bytes();
            watch.wrote(&frame(RST_STREAM, 0, 1, &forced), || now).expect("within the budget");
        }
        let one_more = frame(RST_STREAM, 0, 1, &u32::from(Reason::STREAM_CLOSED).to_be_bytes());
        assert_eq!(watch.wrote(&one_more, || now), Err(Reason::ENHANCE_YOUR_CALM));
    }

    #[test]
    fn who_is_sent_much_may_update_its_windows_as_often() {
        let now = Instant::now();
        let mut watch = begun(now);
        for _ in 0..50_000 {
            watch.wrote(&frame(DATA, 0, 1, b"data: x\n\n"), || now).expect("no limit");
        }
        let update = frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 9]);
        assert_eq!(passes(&mut watch, &update, now).0, UPDATES + 100_000);
    }

    #[test]
    fn a_head_is_awaited_from_its_first_byte_to_its_last() {
        let now = Instant::now();
        let mut watch = begun(now);
        let mut read = |bytes: &[u8]| {
            watch.read(bytes, || now).expect("good frames");
            watch.awaits_head().is_some()
        };
        let headers = frame(HEADERS, 0, 1, b"abc");
        assert!(read(&headers[..10]));
        assert!(read(&headers[10..]));
        let rest = frame(CONTINUATION, END_HEADERS, 1, b"def");
        assert!(read(&rest[..9]));
        assert!(!read(&rest[9..]));
        assert!(!read(&frame(HEADERS, END_HEADERS, 3, b"abc")));
        assert!(!read(&frame(DATA, 0, 3, b"abc")[..10]));
    }

    proptest! {
        #[test]
        fn the_verdict_does_not_depend_on_how_the_bytes_are_cut(
            frames in proptest::collection::vec((0u8..12, any::<u8>(), 0u32..4, proptest::collection::vec(any::<u8>(), 0..20)), 0..12),
            cuts in proptest::collection::vec(any::<usize>(), 0..12),
        ) {
            let now = Instant::now();
            let mut bytes = PREFACE.to_vec();
            bytes.extend(frame(SETTINGS, 0, 0, &[]));
            for (kind, flags, stream, payload) in &frames {
                bytes.extend(frame(*kind, *flags, *stream, payload));
            }
            let whole = Watch::new(now).read(&bytes, || now);
            let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % bytes.len()).chain([bytes.len()]).collect();
            ends.sort_unstable();
            let mut watch = Watch::new(now);
            let (mut from, mut cut) = (0, Ok(()));
            for end in ends {
                cut = cut.and_then(|()| watch.read(&bytes[from..end], || now));
                from = end;
            }
            prop_assert_eq!(cut, whole);
        }
    }
}
