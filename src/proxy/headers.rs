//! Which header fields cross the proxy, and the request's head as the engine reads it.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};

use http::header::{self, HeaderName, HeaderValue};
use http::request::Parts;

use super::wire::Scheme;
use crate::keys::X_API_KEY;

pub static X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub static X_REQUEST_DEADLINE: HeaderName = HeaderName::from_static("x-request-deadline");

/// Whether the field belongs to one connection. The list is fixed: what a client names in its
/// `Connection` header is not stripped, or it could strip `authorization` (RFC 9110 §7.6.1 abuse).
pub fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "http2-settings"
    )
}

/// Whether an answer's field has one value: browsers refuse two of CORS' own, and of two dates, types or
/// servers every reader takes another one. Lists (`vary`, `set-cookie`, …) may be said in several lines.
pub fn is_single(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "date"
            | "server"
            | "content-type"
            | "content-encoding"
            | "content-disposition"
            | "etag"
            | "last-modified"
            | "location"
            | "retry-after"
            | "access-control-allow-origin"
            | "access-control-allow-credentials"
            | "access-control-max-age"
    )
}

/// Fields that a client may not say to the engine: they steer it (`x-override-*` sets a request's
/// rank and priority), or the proxy says them itself.
fn is_ours(name: &str) -> bool {
    matches!(
        name,
        "host"
            | "expect"
            | "content-length"
            | "forwarded"
            | "x-forwarded-for"
            | "x-forwarded-proto"
            | "x-forwarded-host"
            | "x-forwarded-port"
            | "x-real-ip"
            | "x-request-id"
            | "x-request-deadline"
            | "x-data-parallel-rank"
            | "x-body-compressed"
    ) || ["x-override-", "x-smg-", "x-sglext-"].iter().any(|prefix| name.starts_with(prefix))
}

/// What the client's own `Authorization` and `x-api-key` are worth to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credentials<'a> {
    /// The proxy asked for no key and has none: the engine decides.
    Client,
    /// The proxy checked them; the engine gets its own key, or none.
    Engine(Option<&'a str>),
}

/// How the body's end is told to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyFraming {
    None,
    Length(u64),
    Chunked,
}

/// What the proxy says of a request beside what the client said.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    pub engine: SocketAddr,
    /// None: it came over a Unix socket.
    pub client: Option<IpAddr>,
    pub scheme: Scheme,
    pub request_id: &'a HeaderValue,
    pub credentials: Credentials<'a>,
    pub body: BodyFraming,
}

/// The request's head, ready to be sent.
pub fn write(request: &Parts, said: &Said<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    let target = request.uri.path_and_query().map_or("/", |target| target.as_str());
    out.extend_from_slice(request.method.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(target.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    for (name, value) in &request.headers {
        let credential = *name == header::AUTHORIZATION || *name == X_API_KEY;
        let kept = if credential {
            said.credentials == Credentials::Client
        } else if name.as_str() == "traceparent" {
            is_traceparent(value.as_bytes()) && request.headers.get_all(name).iter().nth(1).is_none()
        } else {
            !is_hop_by_hop(name) && !is_ours(name.as_str())
        };
        if kept {
            field(&mut out, name.as_str(), value.as_bytes());
        }
    }
    out.extend_from_slice(b"host: ");
    host(&mut out, said.engine);
    if let Some(client) = said.client {
        out.extend_from_slice(b"\r\nx-forwarded-for: ");
        ip(&mut out, client);
    }
    out.extend_from_slice(b"\r\nx-forwarded-proto: ");
    out.extend_from_slice(said.scheme.name().as_bytes());
    match said.body {
        BodyFraming::None => {}
        BodyFraming::Length(length) => {
            out.extend_from_slice(b"\r\ncontent-length: ");
            number(&mut out, length);
        }
        BodyFraming::Chunked => out.extend_from_slice(b"\r\ntransfer-encoding: chunked"),
    }
    out.extend_from_slice(b"\r\n");
    if let Credentials::Engine(Some(key)) = said.credentials {
        out.extend_from_slice(b"authorization: Bearer ");
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    field(&mut out, "x-request-id", said.request_id.as_bytes());
    out.extend_from_slice(b"\r\n");
    out
}

/// Whether it is `VERSION-TRACE-SPAN-FLAGS` as W3C's Trace Context, level 1, has it. What is not must be
/// thrown away by whoever reads it; readers that do not would put a client's text into traces.
fn is_traceparent(value: &[u8]) -> bool {
    let hex = |part: &[u8]| part.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let some = |part: &[u8]| part.iter().any(|&byte| byte != b'0');
    let parts: Vec<&[u8]> = value.split(|&byte| byte == b'-').collect();
    let [version, trace, span, flags] = parts[..] else { return false };
    (version.len(), trace.len(), span.len(), flags.len()) == (2, 32, 16, 2)
        && parts.iter().all(|part| hex(part))
        && version != b"ff"
        && some(trace)
        && some(span)
}

fn field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// By hand, as all numbers here: `core::fmt` took 3,000 instructions of a request's 46,000.
fn host(out: &mut Vec<u8>, address: SocketAddr) {
    match address {
        SocketAddr::V4(address) => {
            ip(out, IpAddr::V4(*address.ip()));
            out.push(b':');
            number(out, address.port());
        }
        // Writing into a Vec does not fail.
        SocketAddr::V6(_) => drop(write!(out, "{address}")),
    }
}

fn ip(out: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => {
            let [first, rest @ ..] = address.octets();
            number(out, first);
            for octet in rest {
                out.push(b'.');
                number(out, octet);
            }
        }
        IpAddr::V6(_) => drop(write!(out, "{address}")),
    }
}

fn number(out: &mut Vec<u8>, number: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// Longest `x-request-id` kept.
const MAX_REQUEST_ID: usize = 128;

/// The client's id where it is short and plain, else one of our own.
pub fn request_id(request: &Parts) -> HeaderValue {
    let kept = request.headers.get(&X_REQUEST_ID).filter(|id| {
        (1..=MAX_REQUEST_ID).contains(&id.len())
            && id.as_bytes().iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte))
    });
    kept.cloned().unwrap_or_else(|| {
        let digits = hex(rand::random::<u128>());
        HeaderValue::from_bytes(&digits).expect("hexadecimal digits are a header's value")
    })
}

fn hex(number: u128) -> [u8; 32] {
    let mut digits = [0; 32];
    for (i, digit) in digits.iter_mut().enumerate() {
        let nibble = (number >> (i * 4)) & 0xf;
        *digit = b"0123456789abcdef"[usize::try_from(nibble).unwrap_or(0)];
    }
    digits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(fields: &[(&str, &str)]) -> Parts {
        let mut request = http::Request::post("/v1/x?a=b");
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a request").into_parts().0
    }

    fn written(fields: &[(&str, &str)], credentials: Credentials<'_>) -> String {
        let id = HeaderValue::from_static("id-1");
        let said = Said {
            engine: "127.0.0.1:3000".parse().expect("an address"),
            client: Some("10.0.0.9".parse().expect("an address")),
            scheme: Scheme::Http,
            request_id: &id,
            credentials,
            body: BodyFraming::Length(3),
        };
        String::from_utf8(write(&request(fields), &said)).expect("text")
    }

    #[test]
    fn a_client_cannot_steer_the_engine_or_forge_where_it_comes_from() {
        let text = written(
            &[
                ("x-override-priority", "9"),
                ("x-data-parallel-rank", "1"),
                ("x-smg-routing-key", "k"),
                ("x-sglext-ids-framed", "1"),
                ("x-forwarded-for", "1.1.1.1"),
                ("forwarded", "for=1.1.1.1"),
                ("connection", "x-kept, authorization"),
                ("x-kept", "yes"),
                ("te", "trailers"),
                ("authorization", "Bearer client"),
            ],
            Credentials::Engine(Some("engine")),
        );
        assert_eq!(
            text,
            "POST /v1/x?a=b HTTP/1.1\r\nx-kept: yes\r\nhost: 127.0.0.1:3000\r\nx-forwarded-for: 10.0.0.9\r\n\
             x-forwarded-proto: http\r\ncontent-length: 3\r\nauthorization: Bearer engine\r\nx-request-id: id-1\r\n\r\n"
        );
    }

    #[test]
    fn credentials_pass_only_where_nobody_asks_for_a_key() {
        let fields = [("authorization", "Bearer client"), ("x-api-key", "k"), ("connection", "authorization")];
        assert!(written(&fields, Credentials::Client).contains("authorization: Bearer client\r\nx-api-key: k\r\n"));
        let checked = written(&fields, Credentials::Engine(None));
        assert!(!checked.contains("client") && !checked.contains("x-api-key"));
    }

    #[test]
    fn request_ids_are_kept_only_when_short_and_plain() {
        assert_eq!(request_id(&request(&[("x-request-id", "a.B_9-z")])).as_bytes(), b"a.B_9-z");
        for odd in ["", "a b", "a\u{7f}b".trim_end_matches('b'), &"x".repeat(129)] {
            if let Ok(value) = HeaderValue::from_str(odd) {
                let mut parts = request(&[]);
                parts.headers.insert("x-request-id", value);
                assert_eq!(request_id(&parts).len(), 32, "{odd:?}");
            }
        }
        assert_ne!(request_id(&request(&[])), request_id(&request(&[])));
    }
}
