//! The opening handshake (RFC 6455 §4.2): what a client must say, and what the engine must answer to it.

use http::header::{
    CONNECTION, CONTENT_LENGTH, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version};
use sha1::{Digest as _, Sha1};

use crate::proxy::error::Refusal;
use crate::proxy::headers::BodyFraming;
use crate::proxy::line::Line;
use crate::proxy::service::Stop;
use crate::proxy::upstream::head::Head;

const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");
const VERSION: &[u8] = b"13";
/// What a key is joined with (RFC 6455 §1.3).
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// A WebSocket that a client may ask the engine for.
#[derive(Debug)]
pub struct Asked {
    /// What the engine must answer.
    accept: [u8; 28],
}

/// Whether the request asks for a WebSocket, in the only way there is.
pub fn asked(line: &Line, request: &Parts, body: BodyFraming) -> Result<Asked, Stop> {
    let headers = &request.headers;
    if request.version != Version::HTTP_11 || !matches!(line, Line::Http1(_)) {
        return Err(Refusal::no_websocket("a WebSocket is opened over HTTP/1.1 here").into());
    }
    if !has_option(headers, &CONNECTION, "upgrade") || !has_option(headers, &UPGRADE, "websocket") {
        return Err(Refusal::upgrade_required("this path is a WebSocket's: Upgrade: websocket is missing").into());
    }
    if only(headers, &SEC_WEBSOCKET_VERSION).map(HeaderValue::as_bytes) != Some(VERSION) {
        return Err(Refusal::upgrade_required("Sec-WebSocket-Version is not 13").into());
    }
    if !matches!(body, BodyFraming::None | BodyFraming::Length(0)) {
        return Err(Refusal::no_websocket("a request for a WebSocket has no body").into());
    }
    match only(headers, &SEC_WEBSOCKET_KEY) {
        Some(key) if is_key(key.as_bytes()) => Ok(Asked { accept: accept(key.as_bytes()) }),
        _ => Err(Refusal::no_websocket("Sec-WebSocket-Key is not 16 bytes in base64").into()),
    }
}

/// The field's value, where it is said once.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    values.next().is_none().then_some(value)
}

/// Whether one of the field's comma-separated words is this one.
fn has_option(headers: &HeaderMap, name: &HeaderName, option: &str) -> bool {
    let mut words = headers.get_all(name).iter().flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    words.any(|word| word.trim_ascii().eq_ignore_ascii_case(option.as_bytes()))
}

fn is_key(key: &[u8]) -> bool {
    key.len() == 24
        && key.ends_with(b"==")
        && key[..22].iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/'))
}

fn accept(key: &[u8]) -> [u8; 28] {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digest: [u8; 20] = Sha1::new().chain_update(key).chain_update(GUID).finalize().into();
    let mut text = [b'='; 28];
    for (group, out) in digest.chunks(3).zip(text.chunks_mut(4)) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for (at, out) in out.iter_mut().enumerate().take(group.len() + 1) {
            *out = DIGITS[(bits >> (18 - 6 * at)) as usize & 63];
        }
    }
    text
}

impl Asked {
    /// The 101 for the client, where the engine's is an answer to its request.
    pub fn answered(&self, head: Head) -> Result<Response<()>, Stop> {
        let accepts = only(&head.headers, &SEC_WEBSOCKET_ACCEPT).map(HeaderValue::as_bytes) == Some(&self.accept[..]);
        let upgrades =
            head.upgrade.as_ref().is_some_and(|what| what.as_bytes().eq_ignore_ascii_case(WEBSOCKET.as_bytes()));
        if !accepts || !upgrades {
            return Err(Refusal::broken_engine("it opened no WebSocket of ours").into());
        }
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        *response.headers_mut() = head.headers;
        let headers = response.headers_mut();
        headers.remove(CONTENT_LENGTH);
        headers.insert(UPGRADE, WEBSOCKET);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_of_a_key_is_that_of_the_rfc() {
        assert_eq!(accept(b"dGhlIHNhbXBsZSBub25jZQ=="), *b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn a_key_is_sixteen_bytes_in_base64() {
        assert!(is_key(b"dGhlIHNhbXBsZSBub25jZQ=="));
        for odd in
            ["", "dGhlIHNhbXBsZSBub25jZQ=", "dGhlIHNhbXBsZSBub25jZQ===", "dGhlIHNhbXBsZSBub25j-Q==", "ZGhlIHNhbXBsZQ=="]
        {
            assert!(!is_key(odd.as_bytes()), "{odd:?}");
        }
    }
}
