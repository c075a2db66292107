//! The flags that are sglangd's to set, and who decides about each instead.

/// Flags that sglangd sets itself, by their usual names, and who decides instead.
pub const OWNED: &[(&str, &str)] = &[
    ("host", "clients connect to listen.public; the engine listens on the loopback alone"),
    ("port", "clients connect to listen.public; the engine's port is chosen at each start"),
    ("model-path", "model.repo or model.path says it"),
    ("revision", "model.revision says it"),
    ("served-model-name", "model.name says it"),
    ("tp-size", "engine.tp says it"),
    ("api-key", "clients' keys belong in auth.keys_file; the engine's key is made at each start"),
    ("admin-api-key", "the engine's admin key is made at each start"),
    ("ssl-keyfile", OWN_TLS),
    ("ssl-certfile", OWN_TLS),
    ("ssl-ca-certs", OWN_TLS),
    ("ssl-keyfile-password", OWN_TLS),
    ("enable-ssl-refresh", OWN_TLS),
    ("grpc-port", OWN_HTTP),
    ("grpc-mode", OWN_HTTP),
    ("smg-grpc-mode", OWN_HTTP),
    ("smg-http-sidecar-port", OWN_HTTP),
    ("enable-http2", OWN_HTTP),
    ("tokenizer-worker-num", "with more than one the engine serves from processes that cannot be watched"),
    ("enable-http-worker-reuseport", OWN_HTTP),
    ("config", "sglangd writes the engine's YAML: put the flags under engine.flags"),
    ("help", "see `python3 -m sglang.launch_server --help`"),
];
const OWN_TLS: &str = "the engine is reached over the loopback in clear";
const OWN_HTTP: &str = "the proxy speaks HTTP/1.1 to the engine";
