//! The engine's routes by who may use them: what a client may ask for, what only an operator may.
//!
//! Both halves live by it: the proxy refuses operators' routes by name, the admin listener passes them
//! to who shows an operator's key, the configuration refuses to open them. It moves no byte.

use http::Method;
use serde::{Deserialize, Serialize};

/// What a client may ask for unless `limits.routes` says otherwise. Parts in braces vary.
pub const SERVED: [&str; 32] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/v1/classify",
    "/v1/score",
    "/v1/decisions",
    "/v1/systemone",
    "/v1/rerank",
    "/v1/tokenize",
    "/tokenize",
    "/v1/detokenize",
    "/detokenize",
    "/v1/audio/transcriptions",
    "/v1/realtime",
    "/v1/models",
    "/generate",
    "/encode",
    "/classify",
    "/api/chat",
    "/api/generate",
    "/api/show",
    "/api/tags",
    "/invocations",
    "/vertex_generate",
    "/parse_function_call",
    "/separate_reasoning",
    "/v1/models/{model}",
    "/v1/responses/{id}",
    "/v1/responses/{id}/cancel",
];

/// What the engine says of itself. `limits.routes` opens copies without secrets.
pub const COPIES: [&str; 5] = ["/server_info", "/get_server_info", "/model_info", "/get_model_info", "/v1/loads"];

/// Routes of the engine that are nobody's operator's, and closed unless `limits.routes` opens them: they
/// tell about the engine, or hold its memory from one request to the next.
pub const CLOSED: [&str; 5] = ["/openapi.json", "/docs", "/redoc", "/open_session", "/close_session"];

/// What sglangd answers itself on the public listener, always.
pub const OWN: [&str; 3] = ["/live", "/health", "/ready"];

/// What the admin listener has, or nobody: never a client's.
const ADMIN: [&str; 3] = ["/metrics", "/status", "/health_generate"];

const POST: &[Method] = &[Method::POST];
const GET: &[Method] = &[Method::GET];
const GET_POST: &[Method] = &[Method::GET, Method::POST];
const POST_PUT: &[Method] = &[Method::POST, Method::PUT];
const STORE: &[Method] = &[Method::GET, Method::POST, Method::PUT, Method::DELETE];

/// The routes that the engine's admin key opens, with the methods that the engine takes.
const OPERATOR: [(&str, &[Method]); 44] = [
    ("/flush_cache", GET_POST),
    ("/abort_request", POST),
    ("/pause_generation", POST),
    ("/continue_generation", POST),
    ("/release_memory_occupation", GET_POST),
    ("/resume_memory_occupation", GET_POST),
    ("/update_weights_from_disk", POST),
    ("/update_weights_from_tensor", POST),
    ("/update_weights_from_distributed", POST),
    ("/update_weights_from_ipc", POST),
    ("/begin_weight_update", POST),
    ("/end_weight_update", POST),
    ("/update_weight_version", POST),
    ("/init_weights_update_group", POST),
    ("/destroy_weights_update_group", POST),
    ("/init_weights_send_group_for_remote_instance", POST),
    ("/send_weights_to_remote_instance", POST),
    ("/get_weights_by_name", GET_POST),
    ("/weights_checker", GET_POST),
    ("/remote_instance_transfer_engine_info", GET),
    ("/get_remote_instance_transfer_engine_info", GET),
    ("/set_internal_state", POST_PUT),
    ("/load_lora_adapter", POST),
    ("/load_lora_adapter_from_tensors", POST),
    ("/unload_lora_adapter", POST),
    ("/hicache/storage-backend", STORE),
    ("/hicache/storage-backend/clear", POST),
    ("/pd_role_switch", POST),
    ("/scale_elastic_ep", POST),
    ("/slow_down", GET_POST),
    ("/freeze_gc", GET_POST),
    ("/configure_logging", GET_POST),
    ("/set_trace_level", GET_POST),
    ("/start_profile", GET_POST),
    ("/stop_profile", GET_POST),
    ("/start_expert_distribution_record", GET_POST),
    ("/stop_expert_distribution_record", GET_POST),
    ("/dump_expert_distribution_record", GET_POST),
    ("/add_external_corpus", POST),
    ("/remove_external_corpus", POST),
    ("/list_external_corpora", GET),
    ("/get_hicache_l3_cache_layout", GET),
    ("/is_scaling_elastic_ep", GET),
    ("/dumper/{method}", POST),
];

/// What routes of tomorrow that change the engine are likely to be called: closed to clients like those
/// of today.
const OPERATOR_PREFIXES: [&str; 16] = [
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
];

/// Whether a path is an operator's: never a client's, whatever is opened.
pub fn is_operators(path: &str) -> bool {
    ADMIN.contains(&path)
        || OPERATOR.iter().any(|(known, _)| *known == path)
        || OPERATOR_PREFIXES.iter().any(|prefix| path.starts_with(prefix))
}

/// The methods that the engine takes for an operator's route; none: there is no such route.
pub fn operators(path: &str) -> Option<&'static [Method]> {
    let dumper = |path: &str| {
        let method = path.strip_prefix("/dumper/")?;
        let plain = !method.is_empty() && method.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        plain.then_some(POST)
    };
    let exact = OPERATOR.iter().find(|(known, _)| *known == path).map(|(_, methods)| *methods);
    exact.filter(|_| !path.contains('{')).or_else(|| dumper(path))
}

/// A route's way into a set, or out of it: `/path`, or `-/path`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    pub path: String,
    pub way: Way,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    In,
    Out,
}

/// Longest path in a rule.
const MAX_PATH: usize = 256;

impl Rule {
    /// The error says what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (way, path) = text.strip_prefix('-').map_or((Way::In, text), |path| (Way::Out, path));
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/_-.~{}:".contains(&byte);
        let one_reading = !path.contains("//") && !path.split('/').any(|part| part == "." || part == "..");
        if !path.starts_with('/') || path.len() > MAX_PATH || !path.bytes().all(plain) || !one_reading {
            return Err("a path like /server_info, or -/generate to take it out".to_owned());
        }
        Ok(Self { path: path.to_owned(), way })
    }
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sign = if self.way == Way::Out { "-" } else { "" };
        write!(f, "{sign}{}", self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_route_is_both_a_clients_and_an_operators() {
        for path in SERVED.iter().chain(&COPIES).chain(&OWN) {
            assert!(!is_operators(path) && operators(path).is_none(), "{path}");
        }
        for (path, _) in OPERATOR {
            assert!(is_operators(path), "{path}");
        }
        assert!(is_operators("/metrics") && operators("/metrics").is_none(), "the listener has a page of its own");
    }

    #[test]
    fn an_operators_route_is_known_by_its_whole_name() {
        assert_eq!(operators("/flush_cache"), Some(GET_POST));
        assert_eq!(operators("/dumper/step_1"), Some(POST));
        for path in
            ["/flush_cache/", "/dumper/", "/dumper/a/b", "/dumper/{method}", "/update_weights", "/generate", "/"]
        {
            assert_eq!(operators(path), None, "{path}");
        }
    }

    #[test]
    fn a_rule_is_a_path_with_or_without_a_sign() {
        for text in ["/server_info", "-/v1/models/{model}"] {
            assert_eq!(Rule::parse(text).map(|rule| rule.to_string()).as_deref(), Ok(text));
        }
        for text in [
            "server_info",
            "",
            "-",
            "--/x",
            "/a b",
            "/a//b",
            "/a/../b",
            "/a?b",
            "/a*",
            &format!("/{}", "x".repeat(256)),
        ] {
            assert!(Rule::parse(text).is_err(), "{text}");
        }
    }
}
