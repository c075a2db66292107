//! Requests that no proxy should pass on, by the rows of `docs/faults.md`: the tests of group A ask what
//! sglangd answers, the battery whether others pass them.

use super::client::{get, head};

const CHAT: &str = "/v1/chat/completions";

/// Who must refuse it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bar {
    /// Any proxy.
    Any,
    /// sglangd: stricter than the RFC asks for, or sglangd's own routes.
    Ours,
}

#[derive(Debug, Clone)]
pub struct Malformed {
    pub what: String,
    pub bytes: Vec<u8>,
    /// What sglangd answers.
    pub status: u16,
    pub bar: Bar,
}

fn any(what: impl Into<String>, bytes: impl Into<Vec<u8>>, status: u16) -> Malformed {
    Malformed { what: what.into(), bytes: bytes.into(), status, bar: Bar::Any }
}

fn ours(what: impl Into<String>, bytes: impl Into<Vec<u8>>, status: u16) -> Malformed {
    Malformed { bar: Bar::Ours, ..any(what, bytes, status) }
}

fn request(fields: &str, body: &str) -> String {
    format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n{body}")
}

pub fn chunked(body: &str) -> String {
    request("Transfer-Encoding: chunked", body)
}

/// The rows that are nothing but such requests.
pub const ROWS: [&str; 10] = ["A01", "A02", "A03", "A04", "A05", "A08", "A12", "A14", "A17", "A20"];

/// All of one row.
pub fn of(row: &str) -> Vec<Malformed> {
    match row {
        "A01" => both_lengths(),
        "A02" => lengths(),
        "A03" => codings(),
        "A04" => {
            let fields = "Host: a\r\nTransfer-Encoding: chunked\r\n";
            vec![any("chunked on HTTP/1.0", head(&format!("POST {CHAT} HTTP/1.0"), fields) + "0\r\n\r\n", 400)]
        }
        "A05" => {
            vec![any(
                "HTTP/1.0 body without length",
                head(&format!("POST {CHAT} HTTP/1.0"), "Host: a\r\n") + "hello",
                411,
            )]
        }
        "A08" => line_ends(),
        "A12" => hosts(),
        "A14" => paths(),
        "A17" => sizes(),
        "A20" => methods(),
        _ => panic!("row {row} has none"),
    }
}

fn both_lengths() -> Vec<Malformed> {
    let orders = ["Content-Length: 5\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 5"];
    orders.into_iter().map(|fields| any(fields, request(fields, "0\r\n\r\n"), 400)).collect()
}

fn lengths() -> Vec<Malformed> {
    let of = |value: &str| {
        let fields = format!("Content-Length: {value}");
        any(fields.clone(), request(&fields, "hello"), 400)
    };
    let values = ["+5", "0x5", "5, 5", "5\r\nContent-Length: 6", "5\r\nContent-Length: 5", "18446744073709551616", ""];
    let blanks = [" 5", "5 "].map(|value| Malformed { bar: Bar::Ours, ..of(value) });
    values.into_iter().map(of).chain(blanks).collect()
}

fn codings() -> Vec<Malformed> {
    let of = |(line, status): (&str, u16)| any(line, request(line, "0\r\n\r\n"), status);
    let lines = [
        ("Transfer-Encoding: xchunked", 501),
        ("Transfer-Encoding: gzip, chunked", 501),
        ("Transfer-Encoding: chunked, identity", 400),
        ("Transfer-Encoding: chunked, chunked", 400),
        ("Transfer-Encoding: chunked\x0b", 400),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400),
        ("Transfer-Encoding : chunked", 400),
    ];
    let tab = Malformed { bar: Bar::Ours, ..of(("Transfer-Encoding:\tchunked", 400)) };
    lines.into_iter().map(of).chain([tab]).collect()
}

fn line_ends() -> Vec<Malformed> {
    [
        ("bare LF", format!("POST {CHAT} HTTP/1.1\nHost: a\nContent-Length: 0\n\n")),
        ("one bare LF", format!("POST {CHAT} HTTP/1.1\r\nHost: a\nContent-Length: 0\r\n\r\n")),
        ("bare CR", request("X: a\rb\r\nContent-Length: 0", "")),
        ("NUL", request("X: a\0b\r\nContent-Length: 0", "")),
        ("folded", request("X: a\r\n b\r\nContent-Length: 0", "")),
    ]
    .into_iter()
    .map(|(what, bytes)| any(what, bytes, 400))
    .collect()
}

fn hosts() -> Vec<Malformed> {
    let of = |(target, hosts): (&str, &str)| {
        any(format!("{target} {hosts:?}"), head(&format!("GET {target} HTTP/1.1"), hosts), 400)
    };
    let disagree = [
        ("http://b/v1/models", "Host: a\r\n"),
        ("/v1/models", "Host: a\r\nHost: a\r\n"),
        ("/v1/models", ""),
        ("/v1/models", "Host: u@a\r\n"),
        ("/v1/models", "Host: a/b\r\n"),
    ];
    let empty = Malformed { bar: Bar::Ours, ..of(("/v1/models", "Host: \r\n")) };
    disagree.into_iter().map(of).chain([empty]).collect()
}

fn paths() -> Vec<Malformed> {
    let mut found: Vec<Malformed> = [
        "/v1/models/../../flush_cache",
        "/v1/models/%2e%2e/%2e%2e/flush_cache",
        "//v1/models",
        "/v1%2Fmodels",
        "/v1/chat/completions;x",
        "/v1/models/%00",
        "/v1/models/..%2f..%2fflush_cache",
    ]
    .map(|path| any(path, get(path), 400))
    .into();
    found.push(any("8-bit path", b"GET /v1/models/\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400));
    found.extend(
        ["/v1/../flush_cache", "/v1/%2e%2e/flush_cache", "/%66lush_cache"].map(|path| ours(path, get(path), 400)),
    );
    found.push(ours("NUL in a path", b"GET /v1/models/\0 HTTP/1.1\r\nHost: a\r\n\r\n", 400));
    found
}

fn sizes() -> Vec<Malformed> {
    let listed = |fields: &str| head("GET /v1/models HTTP/1.1", &format!("Host: a\r\n{fields}"));
    vec![
        any("101 header lines", listed(&"X: y\r\n".repeat(100)), 431),
        any("64 KiB of head", listed(&format!("X: {}\r\n", "y".repeat(64 * 1024))), 431),
        any("8 KiB of path", head(&format!("GET /v1/models/{} HTTP/1.1", "y".repeat(8 * 1024)), "Host: a\r\n"), 414),
    ]
}

fn methods() -> Vec<Malformed> {
    [
        ("CONNECT a:80 HTTP/1.1", 405),
        ("TRACE /v1/models HTTP/1.1", 405),
        ("get /v1/models HTTP/1.1", 405),
        ("PRI * HTTP/2.0", 400),
        ("GET  /v1/models HTTP/1.1", 400),
    ]
    .map(|(line, status)| any(line, head(line, "Host: a\r\n"), status))
    .into()
}

/// Chunked bodies that must never look whole to an engine (A06).
pub fn bodies() -> Vec<String> {
    vec![
        "FFFFFFFFFFFFFFFF0\r\nx".to_owned(),
        "-1\r\nx".to_owned(),
        "5\nhello\r\n0\r\n\r\n".to_owned(),
        "5;a\rb\r\nhello\r\n0\r\n\r\n".to_owned(),
        format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(64 * 1024)),
        "5\r\nhelloX\r\n0\r\n\r\n".to_owned(),
        "5\r\nhello\r\n0\r\nA: b\nC: d\r\n\r\n".to_owned(),
    ]
}
