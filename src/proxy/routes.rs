//! Which paths lead to the engine: an allow-list, denied until listed.
//!
//! The decision and what is forwarded use the same bytes: a path that two readers could normalise
//! differently (dot segments, doubled or encoded slashes, parameters) is refused, never repaired. It
//! knows nothing of keys, limits or the engine's state.

use http::Method;

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

/// Who may ask the engine for this.
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
    /// A route of the engine that only its operator may use.
    Forbidden,
    Unknown,
    /// The path can be read in two ways.
    Ambiguous,
}

const GET: &[Method] = &[Method::GET, Method::HEAD];
const ONLY_GET: &[Method] = &[Method::GET];
const POST: &[Method] = &[Method::POST];
const POST_PUT: &[Method] = &[Method::POST, Method::PUT];

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

/// How many routes lead to the engine: the size of a table by [`index`].
pub const COUNT: usize = EXACT.len() + VARYING.len();

/// A route's place in tables of [`COUNT`] rows.
pub fn index(route: &'static Route) -> Option<usize> {
    EXACT.iter().chain(VARYING).position(|known| std::ptr::eq(known, route))
}

/// The label of a row.
pub fn name(index: usize) -> &'static str {
    EXACT.iter().chain(VARYING).nth(index).map_or("unknown", |route| route.name)
}

/// Operator, debug and leaking routes: refused by name (403, not 404), so that who asks learns that
/// they exist on the admin side. What is neither here nor above is 404; neither is ever forwarded.
static FORBIDDEN: &[&str] = &[
    "/server_info",
    "/get_server_info",
    "/model_info",
    "/get_model_info",
    "/metrics",
    "/v1/loads",
    "/openapi.json",
    "/docs",
    "/redoc",
    "/status",
    "/health_generate",
    "/flush_cache",
    "/abort_request",
    "/pause_generation",
    "/continue_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/begin_weight_update",
    "/end_weight_update",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/get_weights_by_name",
    "/weights_checker",
    "/set_internal_state",
    "/pd_role_switch",
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/slow_down",
    "/freeze_gc",
    "/configure_logging",
    "/set_trace_level",
    "/start_profile",
    "/stop_profile",
    "/open_session",
    "/close_session",
];
static FORBIDDEN_PREFIXES: &[&str] = &[
    "/metrics/",
    "/update_weight",
    "/load_lora_adapter",
    "/unload_lora_adapter",
    "/hicache/",
    "/get_hicache",
    "/dumper/",
    "/send_weights_",
    "/init_weights_",
    "/get_remote_instance_",
    "/remote_instance_",
    "/start_expert_",
    "/stop_expert_",
    "/dump_expert_",
    "/add_external_",
    "/remove_external_",
    "/list_external_",
];

/// Where a request for `path` (no query) goes.
pub fn decide(path: &str) -> Decision {
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
    if FORBIDDEN.contains(&path) || FORBIDDEN_PREFIXES.iter().any(|prefix| path.starts_with(prefix)) {
        return Decision::Forbidden;
    }
    Decision::Unknown
}

/// Whether every reader of the path sees the same segments: no dot segment, no empty segment, no
/// parameter, no backslash, and nothing encoded that would mean something else decoded.
fn is_plain(path: &str) -> bool {
    let bytes = path.as_bytes();
    let odd = |byte: &u8| !byte.is_ascii_graphic() || b"\\;\"<>^`{|}#".contains(byte);
    if bytes.first() != Some(&b'/') || bytes.iter().any(odd) {
        return false;
    }
    if bytes.windows(2).any(|pair| pair == b"//") {
        return false;
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
    !path.split('/').any(|segment| segment == "." || segment == "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inference_routes_lead_to_the_engine_and_nothing_else_does() {
        for path in
            ["/v1/chat/completions", "/generate", "/v1/models", "/v1/models/org/name", "/v1/responses/r_1/cancel"]
        {
            assert!(matches!(decide(path), Decision::Engine(_)), "{path}");
        }
        for path in
            ["/server_info", "/flush_cache", "/update_weights_from_disk", "/start_profile", "/metrics", "/metrics/x"]
        {
            assert_eq!(decide(path), Decision::Forbidden, "{path}");
        }
        for path in ["/", "/nothing", "/v1/responses/", "/v1/responses/a/b", "/v1/models/", "/v1/chat/completions/"] {
            assert_eq!(decide(path), Decision::Unknown, "{path}");
        }
        assert_eq!(decide("/live"), Decision::Own(Own::Live));
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
