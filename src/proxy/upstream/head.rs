//! The engine's answer's head: parsed with httparse, stripped of what belongs to the connection.

use std::mem::MaybeUninit;

use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use httparse::ParserConfig;

use super::decode::Framing;
use crate::proxy::headers;

/// Longest head that the engine may send.
pub const MAX_HEAD: usize = 64 * 1024;
const MAX_LINES: usize = 128;

/// Whether the connection may carry another request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    Yes,
    No,
}

#[derive(Debug)]
pub struct Head {
    pub status: StatusCode,
    pub headers: HeaderMap,
    /// None: there is no body (HEAD, 204, 304), whatever the headers say.
    pub framing: Option<Framing>,
    pub reuse: Reuse,
    /// What the connection is to become.
    pub upgrade: Option<HeaderValue>,
    /// Length of the head in bytes.
    pub length: usize,
}

/// The bytes are no answer of an HTTP/1 server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadHead {
    #[error("the engine's answer is no HTTP/1 ({0})")]
    Garbled(httparse::Error),
    #[error("the engine's answer has a head of more than {MAX_HEAD} bytes")]
    TooLong,
    #[error("the engine's answer has a malformed {0}")]
    Field(&'static str),
}

/// Parses the head of the answer to `method`. `None`: it is not whole yet.
pub fn parse(bytes: &[u8], method: &Method) -> Result<Option<Head>, BadHead> {
    let mut lines = [const { MaybeUninit::uninit() }; MAX_LINES];
    let mut response = httparse::Response::new(&mut []);
    let parsed = ParserConfig::default().parse_response_with_uninit_headers(&mut response, bytes, &mut lines);
    let length = match parsed.map_err(BadHead::Garbled)? {
        httparse::Status::Complete(length) if length <= MAX_HEAD => length,
        httparse::Status::Partial if bytes.len() <= MAX_HEAD => return Ok(None),
        _ => return Err(BadHead::TooLong),
    };
    let status = response.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(BadHead::Field("status"))?;
    let mut reuse = if response.version == Some(1) { Reuse::Yes } else { Reuse::No };
    let mut body_length = None;
    let mut coding = None;
    let mut upgrade = None;
    let mut headers = HeaderMap::with_capacity(response.headers.len() + 4);
    for line in response.headers.iter() {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| BadHead::Field("header name"))?;
        if name == CONNECTION {
            for option in line.value.split(|&byte| byte == b',') {
                if option.trim_ascii().eq_ignore_ascii_case(b"close") {
                    reuse = Reuse::No;
                }
            }
        } else if name == TRANSFER_ENCODING {
            coding = Some(line.value.trim_ascii());
        } else if name == CONTENT_LENGTH {
            let digits =
                std::str::from_utf8(line.value).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
            let length: u64 = digits.and_then(|text| text.parse().ok()).ok_or(BadHead::Field("Content-Length"))?;
            if body_length.replace(length).is_some_and(|other| other != length) {
                return Err(BadHead::Field("Content-Length"));
            }
        }
        let value = || HeaderValue::from_bytes(line.value).map_err(|_| BadHead::Field("header value"));
        if name == UPGRADE {
            upgrade = Some(value()?);
        }
        // Said twice, the first one counts: see docs/security.md.
        let again = headers::is_single(&name) && headers.contains_key(&name);
        if !headers::is_hop_by_hop(&name) && name != CONTENT_LENGTH && !again {
            headers.append(name, value()?);
        }
    }
    let bodiless = *method == Method::HEAD
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED | StatusCode::SWITCHING_PROTOCOLS);
    let framing = match (coding, body_length) {
        (Some(coding), _) if coding.eq_ignore_ascii_case(b"chunked") => Framing::Chunked,
        (Some(_), _) => return Err(BadHead::Field("Transfer-Encoding")),
        (None, Some(length)) => Framing::Length(length),
        (None, None) => Framing::Close,
    };
    if framing == Framing::Close && !bodiless {
        reuse = Reuse::No;
    }
    // A length is said again to the client, but for an event stream with one, which may end early.
    if let Framing::Length(length) = framing
        && status != StatusCode::NO_CONTENT
    {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(Some(Head { status, headers, framing: (!bodiless).then_some(framing), reuse, upgrade, length }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(bytes: &[u8]) -> Result<Option<Head>, BadHead> {
        parse(bytes, &Method::GET)
    }

    #[test]
    fn each_framing_is_found() {
        let framing = |fields: &str| {
            get(format!("HTTP/1.1 200 OK\r\n{fields}\r\n").as_bytes()).unwrap().map(|head| (head.framing, head.reuse))
        };
        assert_eq!(framing("Content-Length: 3\r\n"), Some((Some(Framing::Length(3)), Reuse::Yes)));
        assert_eq!(framing("Transfer-Encoding: chunked\r\n"), Some((Some(Framing::Chunked), Reuse::Yes)));
        assert_eq!(framing(""), Some((Some(Framing::Close), Reuse::No)));
        assert_eq!(
            framing("Content-Length: 3\r\nConnection: x, Close\r\n"),
            Some((Some(Framing::Length(3)), Reuse::No))
        );
    }

    #[test]
    fn head_and_204_have_no_body_whatever_they_say() {
        let head = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", &Method::HEAD).unwrap().unwrap();
        assert_eq!((head.framing, head.headers[CONTENT_LENGTH].as_bytes()), (None, &b"9"[..]));
        let head = get(b"HTTP/1.1 204 No Content\r\nContent-Length: 9\r\n\r\n").unwrap().unwrap();
        assert!(head.framing.is_none() && head.headers.get(CONTENT_LENGTH).is_none());
    }

    #[test]
    fn what_a_client_reads_once_is_said_once() {
        let head = get(b"HTTP/1.1 200 OK\r\nServer: a\r\nServer: b\r\nSet-Cookie: x\r\nSet-Cookie: y\r\n\r\n");
        let headers = head.unwrap().unwrap().headers;
        assert_eq!(headers.get_all("server").iter().collect::<Vec<_>>(), ["a"]);
        assert_eq!(headers.get_all("set-cookie").iter().collect::<Vec<_>>(), ["x", "y"]);
    }

    #[test]
    fn garbage_half_heads_and_http_09_are_told_apart() {
        assert!(get(b"HTTP/1.1 200 OK\r\nA: b\r\n").unwrap().is_none());
        assert!(matches!(get(b"hello\r\n"), Err(BadHead::Garbled(_))));
        assert!(matches!(get(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"), Err(BadHead::Field(_))));
        assert!(matches!(
            get(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"),
            Err(BadHead::Field(_))
        ));
        assert!(matches!(get(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n"), Err(BadHead::Field(_))));
    }
}
