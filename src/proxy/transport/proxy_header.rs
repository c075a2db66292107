//! PROXY protocol, version 2: what a load balancer says of a connection before its first byte.
//!
//! Only where it is asked for, and then nothing passes without it: whoever may say where it comes
//! from could say anything. Version 1, a line of text, is not taken. Pure but for [`read`].

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::socket::Socket;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// The signature, version and command, family, length.
const FIXED: usize = 16;
/// Longest rest that is taken: addresses and some fields. Balancers send tens of bytes.
const MAX_REST: usize = 4096;
/// A CRC32c of the whole header.
const FIELD_CRC: u8 = 0x03;

/// What was said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// The balancer speaks for itself (a health check): the connection's own address counts.
    Itself,
    /// For a client; none: the client has no IP address.
    Client(Option<IpAddr>),
}

/// What keeps a header from being taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    #[error("the connection does not begin with the signature of version 2")]
    Signature,
    #[error("version or command is unknown")]
    Command,
    #[error("the address family is unknown or not that of a stream")]
    Family,
    #[error("it is longer than {MAX_REST} bytes")]
    TooLong,
    #[error("its address is cut off")]
    Short,
    #[error("its fields do not fill it")]
    Fields,
    #[error("its checksum is wrong")]
    Checksum,
}

/// How many bytes follow the fixed part.
fn rest(fixed: &[u8; FIXED]) -> Result<usize, BadHeader> {
    if fixed[..12] != SIGNATURE {
        return Err(BadHeader::Signature);
    }
    let length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if length > MAX_REST { Err(BadHeader::TooLong) } else { Ok(length) }
}

/// A whole header.
pub fn parse(header: &[u8]) -> Result<Said, BadHeader> {
    let (fixed, body) = header.split_first_chunk::<FIXED>().ok_or(BadHeader::Short)?;
    if rest(fixed)? != body.len() {
        return Err(BadHeader::Short);
    }
    let is_local = match fixed[12] {
        0x20 => true,
        0x21 => false,
        _ => return Err(BadHeader::Command),
    };
    // Address and port of both sides; for Unix sockets two names.
    let (said, addresses) = match fixed[13] {
        // Nothing can be said of the client: as the specification has it, the connection's own counts.
        0x00 => (Said::Itself, 0),
        0x11 => (Said::Client(body.first_chunk::<4>().map(|a| Ipv4Addr::from(*a).into())), 12),
        0x21 => (Said::Client(body.first_chunk::<16>().map(|a| Ipv6Addr::from(*a).to_canonical())), 36),
        0x31 => (Said::Client(None), 216),
        _ => return Err(BadHeader::Family),
    };
    // LOCAL may name any family: what it says of addresses is to be ignored. Unspecified ones may be
    // followed by anything.
    if is_local || fixed[13] == 0x00 {
        return Ok(Said::Itself);
    }
    let fields = body.get(addresses..).ok_or(BadHeader::Short)?;
    check(header, fields)?;
    Ok(said)
}

/// Type, length, value, and so on to the very end; a checksum among them must be right.
fn check(header: &[u8], mut fields: &[u8]) -> Result<(), BadHeader> {
    while let Some((&[kind, high, low], behind)) = fields.split_first_chunk::<3>() {
        let length = usize::from(u16::from_be_bytes([high, low]));
        let (value, next) = behind.split_at_checked(length).ok_or(BadHeader::Fields)?;
        if kind == FIELD_CRC {
            let said: [u8; 4] = value.try_into().map_err(|_| BadHeader::Fields)?;
            let at = header.len() - behind.len();
            if u32::from_be_bytes(said) != crc32c(header, at..at + 4) {
                return Err(BadHeader::Checksum);
            }
        }
        fields = next;
    }
    if fields.is_empty() { Ok(()) } else { Err(BadHeader::Fields) }
}

/// Castagnoli's CRC, with the bytes of `zeroed` taken for zeros. Bit by bit: once a connection, over
/// some tens of bytes.
fn crc32c(bytes: &[u8], zeroed: std::ops::Range<usize>) -> u32 {
    let mut crc = u32::MAX;
    for (at, byte) in bytes.iter().enumerate() {
        crc ^= if zeroed.contains(&at) { 0 } else { u32::from(*byte) };
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 };
        }
    }
    !crc
}

/// What keeps a connection from beginning.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error(transparent)]
    Bad(#[from] BadHeader),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads a header from the socket, and no byte that stands behind it.
pub async fn read(socket: &Socket) -> Result<Said, Fault> {
    let mut header = vec![0; FIXED];
    let mut have = 0;
    while have < FIXED {
        have += some(socket, &mut header[have..]).await?;
        // Told at once, not when enough has come: a plain client waits for an answer.
        let compared = have.min(SIGNATURE.len());
        if header[..compared] != SIGNATURE[..compared] {
            return Err(BadHeader::Signature.into());
        }
    }
    let fixed = header.first_chunk::<FIXED>().ok_or(BadHeader::Short)?;
    let whole = FIXED + rest(fixed)?;
    header.resize(whole, 0);
    while have < whole {
        have += some(socket, &mut header[have..]).await?;
    }
    Ok(parse(&header)?)
}

async fn some(socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
    match poll_fn(|cx| socket.poll_read(cx, buffer)).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        read => Ok(read),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).expect("short");
        [&SIGNATURE[..], &[command, family], &length.to_be_bytes(), body].concat()
    }

    fn v4(fields: &[u8]) -> Vec<u8> {
        header(0x21, 0x11, &[&[203, 0, 113, 7, 10, 0, 0, 1, 0x30, 0x39, 0x01, 0xbb], fields].concat())
    }

    #[test]
    fn addresses_are_told_as_they_are_said() {
        let client = |text: &str| Ok(Said::Client(Some(text.parse().expect("an address"))));
        assert_eq!(parse(&v4(b"")), client("203.0.113.7"));
        let mut six = vec![0x20, 0x01, 0x0d, 0xb8];
        six.resize(36, 0);
        six[15] = 9;
        assert_eq!(parse(&header(0x21, 0x21, &six)), client("2001:db8::9"));
        let mapped = [&[0; 10][..], &[0xff, 0xff, 192, 0, 2, 5], &[0; 20]].concat();
        assert_eq!(parse(&header(0x21, 0x21, &mapped)), client("192.0.2.5"));
        assert_eq!(parse(&header(0x21, 0x31, &[0; 216])), Ok(Said::Client(None)));
        assert_eq!(parse(&header(0x20, 0x11, &v4(b"")[16..])), Ok(Said::Itself));
        assert_eq!(parse(&header(0x20, 0x00, b"")), Ok(Said::Itself));
        assert_eq!(parse(&header(0x21, 0x00, b"anything")), Ok(Said::Itself));
    }

    #[test]
    fn what_is_not_meant_is_not_guessed() {
        for (wrong, bytes) in [
            (BadHeader::Command, header(0x11, 0x11, &[0; 12])),
            (BadHeader::Command, header(0x22, 0x11, &[0; 12])),
            (BadHeader::Family, header(0x21, 0x12, &[0; 12])),
            (BadHeader::Family, header(0x21, 0x41, &[0; 12])),
            (BadHeader::Short, header(0x21, 0x11, &[0; 11])),
            (BadHeader::Short, header(0x21, 0x21, &[0; 35])),
            (BadHeader::Short, header(0x21, 0x31, &[0; 215])),
            (BadHeader::Fields, v4(&[4, 0])),
            (BadHeader::Fields, v4(&[4, 0, 2, 0])),
            (BadHeader::Fields, v4(&[FIELD_CRC, 0, 3, 0, 0, 0])),
            (BadHeader::TooLong, header(0x21, 0x11, &[0; MAX_REST + 1])),
            (BadHeader::Signature, b"GET / HTTP/1.1\r\n".to_vec()),
            (BadHeader::Signature, b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n".to_vec()),
            (BadHeader::Short, SIGNATURE.to_vec()),
        ] {
            assert_eq!(parse(&bytes), Err(wrong), "{bytes:?}");
        }
    }

    #[test]
    fn a_checksum_is_checked_wherever_it_stands() {
        // The check value of the algorithm itself.
        assert_eq!(crc32c(b"123456789", 0..0), 0xE306_9283);
        let mut good = v4(&[4, 0, 1, 0xaa, FIELD_CRC, 0, 4, 0, 0, 0, 0, 5, 0, 0]);
        let at = good.len() - 7;
        let crc = crc32c(&good, at..at + 4);
        good[at..at + 4].copy_from_slice(&crc.to_be_bytes());
        assert!(parse(&good).is_ok());
        // But for its own type: a field that is no checksum checks nothing.
        for bit in (0..good.len() * 8).filter(|bit| bit / 8 != at - 3) {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let same = parse(&bad) == parse(&good);
            assert!(!same, "bit {bit} may be changed unseen");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
            let mut signed = SIGNATURE.to_vec();
            signed.extend(bytes);
            let _ = parse(&signed);
        }

        #[test]
        fn every_good_header_is_taken_and_nothing_shorter_or_longer(
            address in any::<[u8; 4]>(),
            ports in any::<[u8; 8]>(),
            fields in proptest::collection::vec((4u8..=255, proptest::collection::vec(any::<u8>(), 0..30)), 0..5),
        ) {
            let mut body = [&address[..], &ports].concat();
            for (kind, value) in fields {
                body.push(kind);
                body.extend((value.len() as u16).to_be_bytes());
                body.extend(value);
            }
            let good = header(0x21, 0x11, &body);
            prop_assert_eq!(parse(&good), Ok(Said::Client(Some(Ipv4Addr::from(address).into()))));
            for cut in 0..good.len() {
                prop_assert!(parse(&good[..cut]).is_err());
            }
            prop_assert!(parse(&[&good[..], b"G"].concat()).is_err());
        }
    }
}
