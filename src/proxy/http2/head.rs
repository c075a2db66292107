//! Judges a request's head: what h2 lets through and the engine must not get as HTTP/1 text.
//!
//! h2 itself refuses upper case, control characters, connection fields, `te` but `trailers`, unknown,
//! doubled and late pseudo-headers. What HTTP/1 is refused by [`super::super::framing`] is refused
//! here in the same words; what RFC 9113 calls malformed is a reset stream.

use http::header::{CONTENT_LENGTH, COOKIE, EXPECT, HOST};
use http::request::Parts;
use http::{HeaderMap, HeaderValue};

use super::super::framing::{self, MAX_LINES, MAX_TARGET, Violation};

/// RFC 9113 §8.1.1: no answer, but a stream error of type PROTOCOL_ERROR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// What is to be done with a request. `Some`: it is answered with a refusal.
pub fn judge(parts: &mut Parts) -> Result<Option<Violation>, Malformed> {
    let method = parts.method.as_str().as_bytes();
    if !framing::is_known_method(method) {
        return Ok(Some(Violation::UNKNOWN_METHOD));
    }
    authority(parts)?;
    let target = parts.uri.path_and_query().map_or("", |target| target.as_str()).as_bytes();
    let rooted = target.first() == Some(&b'/') || (target == b"*" && method == b"OPTIONS");
    if !rooted || !target.iter().all(u8::is_ascii_graphic) {
        return Err(Malformed);
    }
    if target.len() > MAX_TARGET {
        return Ok(Some(Violation::LONG_TARGET));
    }
    let headers = &mut parts.headers;
    // RFC 9113 §8.2.1: neither begins nor ends with a space. h2 has seen to the rest.
    let padded = |value: &HeaderValue| value.as_bytes().trim_ascii().len() != value.len();
    if headers.values().any(padded) || headers.get_all(CONTENT_LENGTH).iter().count() > 1 {
        return Err(Malformed);
    }
    if headers.len() > MAX_LINES {
        return Ok(Some(Violation::MANY_LINES));
    }
    if headers.get_all(EXPECT).iter().any(|value| !value.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        return Ok(Some(Violation::EXPECTATION));
    }
    join_cookies(headers);
    Ok(None)
}

/// RFC 9113 §8.3.1: `:authority`, `host` or both, not empty, the same, and without a user's name.
fn authority(parts: &Parts) -> Result<(), Malformed> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let host = hosts.next().map(HeaderValue::as_bytes);
    let said = parts.uri.authority().map(|authority| authority.as_str().as_bytes());
    let same = match (said, host) {
        (Some(said), Some(host)) => said.eq_ignore_ascii_case(host),
        (None, None) => false,
        _ => true,
    };
    let good = [said, host].into_iter().flatten().all(framing::is_authority);
    if same && good && hosts.next().is_none() { Ok(()) } else { Err(Malformed) }
}

/// RFC 9113 §8.2.3: the pieces are one field again before anybody reads them as HTTP/1.
fn join_cookies(headers: &mut HeaderMap) {
    let mut cookies = headers.get_all(COOKIE).iter();
    if let (Some(first), Some(_)) = (cookies.next(), cookies.next()) {
        let mut joined = first.as_bytes().to_vec();
        for cookie in headers.get_all(COOKIE).iter().skip(1) {
            joined.extend_from_slice(b"; ");
            joined.extend_from_slice(cookie.as_bytes());
        }
        let joined = HeaderValue::from_bytes(&joined).expect("values joined by visible characters are a value");
        headers.insert(COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn judged(uri: &str, fields: &[(&str, &str)]) -> Result<Option<u16>, Malformed> {
        let mut request = Request::post(uri);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let mut parts = request.body(()).expect("a request").into_parts().0;
        judge(&mut parts).map(|violation| violation.map(|violation| violation.status))
    }

    #[test]
    fn an_authority_is_said_once_or_twice_the_same() {
        assert_eq!(judged("http://a:80/x", &[]), Ok(None));
        assert_eq!(judged("http://a:80/x", &[("host", "A:80")]), Ok(None));
        assert_eq!(judged("/x", &[("host", "a")]), Ok(None));
        for (uri, fields) in [
            ("/x", &[][..]),
            ("http://a/x", &[("host", "b")]),
            ("http://a/x", &[("host", "")]),
            ("http://a/x", &[("host", "a"), ("host", "a")]),
            ("http://user@a/x", &[]),
            ("/x", &[("host", "a/b")]),
        ] {
            assert_eq!(judged(uri, fields), Err(Malformed), "{uri} {fields:?}");
        }
    }

    #[test]
    fn what_http1_refuses_is_refused_alike() {
        let long = format!("http://a/{}", "x".repeat(MAX_TARGET));
        assert_eq!(judged(&long, &[]), Ok(Some(414)));
        assert_eq!(judged("http://a/", &[("expect", "200-maybe")]), Ok(Some(417)));
        assert_eq!(judged("http://a/", &[("x", "y"); MAX_LINES + 1]), Ok(Some(431)));
        assert_eq!(judged("http://a/", &[("content-length", "1"), ("content-length", "1")]), Err(Malformed));
        assert_eq!(judged("http://a/", &[("x", " y")]), Err(Malformed));
        assert_eq!(judged("http://a/ä", &[]), Err(Malformed));
    }

    #[test]
    fn cookies_are_one_field_again() {
        let request = Request::get("http://a/").header("cookie", "a=1").header("cookie", "b=2").header("cookie", "c=3");
        let mut parts = request.body(()).expect("a request").into_parts().0;
        assert_eq!(judge(&mut parts), Ok(None));
        assert_eq!(parts.headers.get_all(COOKIE).iter().collect::<Vec<_>>(), ["a=1; b=2; c=3"]);
    }
}
