//! Which paths lead to the engine: an allow-list, denied until listed.
//!
//! The decision and what is forwarded use the same bytes: a path that two readers could normalise
//! differently (dot segments, doubled or encoded slashes, parameters) is refused, never repaired. It
//! knows no key, no limits and not the engine's state; what the configuration opens and closes is a
//! [`Table`].

mod table;

use http::Method;

pub use table::{Asks, Table};

use crate::link::routes::{CLOSED, COPIES, is_operators};

/// In which shape a stream's error event must be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    OpenAi,
    Anthropic,
    /// `/v1/responses`: `event: error` with a typed object.
    Responses,
    /// Ollama: one JSON object a line.
    Lines,
}

/// What clients may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Bounded: the label in metrics.
    pub name: &'static str,
    pub methods: &'static [Method],
    pub dialect: Dialect,
    pub protocol: Protocol,
}

/// What the connection carries behind the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Http,
    /// Once the engine has agreed.
    WebSocket,
}

/// What is answered here, never by the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Own {
    Live,
    Health,
    Ready,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Own(Own),
    Engine(&'static Route),
    /// Answered with a copy of what the engine says of itself.
    Copy(&'static Route),
    /// A route of the engine that only its operator may use.
    Forbidden,
    /// Not an operator's, and closed all the same.
    Closed,
    Unknown,
    /// The path can be read in two ways.
    Ambiguous,
}

const GET: &[Method] = &[Method::GET, Method::HEAD];
const ONLY_GET: &[Method] = &[Method::GET];
const POST: &[Method] = &[Method::POST];
const POST_PUT: &[Method] = &[Method::POST, Method::PUT];
/// Of what is opened by name, the engine knows the methods.
const ANY: &[Method] = &[Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE];

const fn route(name: &'static str, methods: &'static [Method], dialect: Dialect) -> Route {
    Route { name, methods, dialect, protocol: Protocol::Http }
}

/// Exact paths. A new one of the engine stays closed until it stands here.
static EXACT: [Route; 29] = [
    route("/v1/chat/completions", POST, Dialect::OpenAi),
    route("/v1/completions", POST, Dialect::OpenAi),
    route("/v1/responses", POST, Dialect::Responses),
    route("/v1/messages", POST, Dialect::Anthropic),
    route("/v1/messages/count_tokens", POST, Dialect::Anthropic),
    route("/v1/embeddings", POST, Dialect::OpenAi),
    route("/v1/classify", POST, Dialect::OpenAi),
    route("/v1/score", POST, Dialect::OpenAi),
    route("/v1/decisions", POST, Dialect::OpenAi),
    route("/v1/systemone", POST, Dialect::OpenAi),
    route("/v1/rerank", POST_PUT, Dialect::OpenAi),
    route("/v1/tokenize", POST, Dialect::OpenAi),
    route("/tokenize", POST, Dialect::OpenAi),
    route("/v1/detokenize", POST, Dialect::OpenAi),
    route("/detokenize", POST, Dialect::OpenAi),
    route("/v1/audio/transcriptions", POST, Dialect::OpenAi),
    Route { protocol: Protocol::WebSocket, ..route("/v1/realtime", ONLY_GET, Dialect::OpenAi) },
    route("/v1/models", GET, Dialect::OpenAi),
    route("/generate", POST_PUT, Dialect::OpenAi),
    route("/encode", POST_PUT, Dialect::OpenAi),
    route("/classify", POST_PUT, Dialect::OpenAi),
    route("/api/chat", POST, Dialect::Lines),
    route("/api/generate", POST, Dialect::Lines),
    route("/api/show", POST, Dialect::Lines),
    route("/api/tags", GET, Dialect::Lines),
    route("/invocations", POST, Dialect::OpenAi),
    route("/vertex_generate", POST, Dialect::OpenAi),
    route("/parse_function_call", POST, Dialect::OpenAi),
    route("/separate_reasoning", POST, Dialect::OpenAi),
];

/// Paths with a part that varies.
static MODEL: Route = route("/v1/models/{model}", GET, Dialect::OpenAi);
static RESPONSE: Route = route("/v1/responses/{id}", GET, Dialect::Responses);
static RESPONSE_CANCEL: Route = route("/v1/responses/{id}/cancel", POST, Dialect::Responses);
static VARYING: [&Route; 3] = [&MODEL, &RESPONSE, &RESPONSE_CANCEL];

/// What the engine says of itself, from a copy.
static COPIED: [Route; COPIES.len()] = [
    route(COPIES[0], GET, Dialect::OpenAi),
    route(COPIES[1], GET, Dialect::OpenAi),
    route(COPIES[2], GET, Dialect::OpenAi),
    route(COPIES[3], GET, Dialect::OpenAi),
    route(COPIES[4], GET, Dialect::OpenAi),
];
/// All that `limits.routes` opens and this list does not know: one row in the metrics.
static OPENED: Route = route("(opened)", ANY, Dialect::OpenAi);

/// How many routes there are: the size of a table by [`index`].
pub const COUNT: usize = EXACT.len() + VARYING.len() + COPIED.len() + 1;

fn all() -> impl Iterator<Item = &'static Route> {
    EXACT.iter().chain(VARYING).chain(&COPIED).chain([&OPENED])
}

/// A route's place in tables of [`COUNT`] rows.
pub fn index(route: &'static Route) -> Option<usize> {
    all().position(|known| std::ptr::eq(known, route))
}

/// The label of a row.
pub fn name(index: usize) -> &'static str {
    all().nth(index).map_or("unknown", |route| route.name)
}

/// Where a request for `path` (no query) goes, before anything is opened or closed. Operators' routes are
/// refused by name (403, not 404), so that who asks learns that they exist on the admin side.
fn usual(path: &str) -> Decision {
    if !is_plain(path) {
        return Decision::Ambiguous;
    }
    match path {
        "/live" => return Decision::Own(Own::Live),
        "/health" => return Decision::Own(Own::Health),
        "/ready" => return Decision::Own(Own::Ready),
        _ => {}
    }
    if let Some(route) = EXACT.iter().find(|route| route.name == path) {
        return Decision::Engine(route);
    }
    if let Some(model) = path.strip_prefix("/v1/models/")
        && !model.is_empty()
    {
        return Decision::Engine(&MODEL);
    }
    if let Some(rest) = path.strip_prefix("/v1/responses/") {
        match rest.split_once('/') {
            None if !rest.is_empty() => return Decision::Engine(&RESPONSE),
            Some((id, "cancel")) if !id.is_empty() => return Decision::Engine(&RESPONSE_CANCEL),
            _ => return Decision::Unknown,
        }
    }
    if let Some(route) = COPIED.iter().find(|route| route.name == path) {
        return Decision::Copy(route);
    }
    if is_operators(path) {
        return Decision::Forbidden;
    }
    if CLOSED.contains(&path) { Decision::Closed } else { Decision::Unknown }
}

/// Whether every reader of the path sees the same segments: no dot segment, no empty segment, no
/// parameter, no backslash, and nothing encoded that would mean something else decoded.
fn is_plain(path: &str) -> bool {
    let bytes = path.as_bytes();
    if bytes.first() != Some(&b'/') || bytes.iter().any(|&byte| ODD[byte as usize]) {
        return false;
    }
    let mut segments = bytes[1..].split(|&byte| byte == b'/').peekable();
    while let Some(segment) = segments.next() {
        // An empty one may only stand last: `/v1/`.
        if matches!(segment, b"." | b"..") || (segment.is_empty() && segments.peek().is_some()) {
            return false;
        }
    }
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|&byte| byte == b'%') {
        let digit = |i: usize| rest.get(at + i).and_then(|&byte| (byte as char).to_digit(16));
        let (Some(high), Some(low)) = (digit(1), digit(2)) else { return false };
        let decoded = high * 16 + low;
        // An encoded letter, slash, dot or percent hides a segment; control and 8-bit bytes hide more.
        let harmless = u8::try_from(decoded).is_ok_and(|byte| {
            (0x20..0x7f).contains(&byte) && !byte.is_ascii_alphanumeric() && !b"/\\.%;-_~".contains(&byte)
        });
        if !harmless {
            return false;
        }
        rest = &rest[at + 3..];
    }
    true
}

/// What stands in no path as it is.
static ODD: [bool; 256] = {
    let mut odd = [false; 256];
    let mut byte = 0;
    while byte < odd.len() {
        odd[byte] = !(byte as u8).is_ascii_graphic();
        byte += 1;
    }
    let mut listed: &[u8] = b"\\;\"<>^`{|}#?";
    while let [first, rest @ ..] = listed {
        odd[*first as usize] = true;
        listed = rest;
    }
    odd
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::routes::SERVED;

    fn decide(path: &str) -> Decision {
        Table::default().decide(path).0
    }

    #[test]
    fn the_configuration_knows_the_routes_that_are_served() {
        let served: Vec<&str> = EXACT.iter().chain(VARYING).map(|route| route.name).collect();
        assert_eq!(served, SERVED);
    }

    #[test]
    fn inference_routes_lead_to_the_engine_and_nothing_else_does() {
        for path in
            ["/v1/chat/completions", "/generate", "/v1/models", "/v1/models/org/name", "/v1/responses/r_1/cancel"]
        {
            assert!(matches!(decide(path), Decision::Engine(_)), "{path}");
        }
        for path in ["/flush_cache", "/update_weights_from_disk", "/start_profile", "/metrics", "/metrics/x"] {
            assert_eq!(decide(path), Decision::Forbidden, "{path}");
        }
        for path in ["/server_info", "/v1/loads", "/docs", "/open_session"] {
            assert_eq!(decide(path), Decision::Closed, "{path}");
        }
        for path in ["/", "/nothing", "/v1/responses/", "/v1/responses/a/b", "/v1/models/", "/v1/chat/completions/"] {
            assert_eq!(decide(path), Decision::Unknown, "{path}");
        }
        assert_eq!(decide("/live"), Decision::Own(Own::Live));
    }

    /// The same, said once for each rule and slowly.
    fn is_plain_by_rule(path: &str) -> bool {
        let odd = |c: char| !c.is_ascii_graphic() || "\\;\"<>^`{|}#?".contains(c);
        let hides = |code: &str| {
            let byte = Some(code).filter(|code| code.len() == 2).and_then(|code| u8::from_str_radix(code, 16).ok());
            byte.is_none_or(|byte| {
                !(0x20..0x7f).contains(&byte) || byte.is_ascii_alphanumeric() || b"/\\.%;-_~".contains(&byte)
            })
        };
        let code = |(at, _): (usize, _)| path.get(at + 1..at + 3).unwrap_or("");
        path.starts_with('/')
            && !path.contains(odd)
            && !path.contains("//")
            && !path.split('/').any(|segment| segment == "." || segment == "..")
            && !path.match_indices('%').map(code).any(hides)
    }

    proptest::proptest! {
        #[test]
        fn a_path_is_plain_by_every_rule_or_ambiguous(path in "/?(/|\\.|[aé\u{7f}]|[a-z]|%2[0-9a-fA-F]|%[0-9a-fA-F]{2}|[ -~]){0,6}") {
            proptest::prop_assert_eq!(is_plain(&path), is_plain_by_rule(&path));
        }
    }

    #[test]
    fn a_path_that_can_be_read_in_two_ways_is_refused() {
        for path in [
            "/v1/../flush_cache",
            "/v1/./models",
            "//v1/models",
            "/v1//models",
            "/v1/%2e%2e/flush_cache",
            "/v1%2Fmodels",
            "/%66lush_cache",
            "/v1/models;x",
            "/v1/models/x?y",
            "/v1/models\\x",
            "/v1/models/%",
            "/v1/models/%00",
            "/v1/models/%C3%A9",
            "v1/models",
            "",
        ] {
            assert_eq!(decide(path), Decision::Ambiguous, "{path}");
        }
        assert!(matches!(decide("/v1/models/a%20b"), Decision::Engine(_)));
    }
}
