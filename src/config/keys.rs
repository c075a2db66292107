//! The table of all keys: one row each, with its default. `docs/configuration.md` is checked against it.

/// What may stand after a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Scalar,
    /// A list of words.
    Words,
    /// Flags of the engine, merged name by name.
    Flags,
    /// Environment variables, merged name by name.
    Environment,
}

#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// `section.key`, or `section.part.key`.
    pub path: &'static str,
    pub shape: Shape,
    /// As it would be written; none: not set.
    pub default: Option<&'static str>,
    /// What it is, for "the way out" of a mistake.
    pub is: &'static str,
}

const fn scalar(path: &'static str, default: &'static str, is: &'static str) -> Key {
    Key { path, shape: Shape::Scalar, default: Some(default), is }
}

const fn unset(path: &'static str, is: &'static str) -> Key {
    Key { path, shape: Shape::Scalar, default: None, is }
}

pub const KEYS: &[Key] = &[
    unset("model.repo", "a repository of the hub: ORGANISATION/NAME"),
    scalar("model.revision", "main", "a branch, tag or commit of model.repo"),
    unset("model.path", "a local folder in place of model.repo"),
    unset("model.name", "the served model name, without `:`"),
    scalar("weights.download", "auto", "`auto` or `never`"),
    unset("weights.cache", "a folder: the Hugging Face cache"),
    unset("weights.endpoint", "the hub's address: https://HOST"),
    scalar("weights.connections", "8", "a number from 1 to 256"),
    unset("weights.max_rate", "bytes a second, like 500MB"),
    unset("weights.xet_memory", "a size, like 2GiB"),
    scalar("weights.page_cache", "auto", "`auto`, `keep` or `bypass`"),
    scalar("weights.nice", "10", "a number from 0 to 19"),
    scalar("weights.ioprio", "none", "`none`, `best-effort` or `idle`"),
    Key {
        path: "weights.include",
        shape: Shape::Words,
        default: Some("[]"),
        is: "a list of patterns: ['*.safetensors', '*.json']",
    },
    Key { path: "weights.exclude", shape: Shape::Words, default: Some("[]"), is: "a list of patterns: ['original/*']" },
    scalar("weights.pickles", "refuse", "`refuse` or `allow`"),
    scalar("weights.prefetch", "auto", "`auto`, `always` or `never`"),
    Key {
        path: "engine.command",
        shape: Shape::Words,
        default: Some("[python3, -m, sglang.launch_server]"),
        is: "a list of words: [python3, -m, sglang.launch_server]",
    },
    scalar("engine.tp", "1", "the number of GPUs: 1 to 1024"),
    Key { path: "engine.flags", shape: Shape::Flags, default: None, is: "flags of SGLang, without the leading --" },
    scalar("engine.unknown_flags", "refuse", "`refuse` or `pass`"),
    Key { path: "engine.env", shape: Shape::Environment, default: None, is: "environment variables: NAME: value" },
    scalar("listen.public", "0.0.0.0:8000", "ADDRESS:PORT, or `off` beside listen.unix"),
    unset("listen.unix", "the path of a Unix socket"),
    scalar("listen.unix_mode", "0660", "a mode in octal digits, like 0660"),
    scalar("listen.proxy_protocol", "off", "`off` or `require`"),
    scalar("listen.admin", "127.0.0.1:8001", "ADDRESS:PORT"),
    scalar("listen.http2", "on", "`on` or `off`"),
    unset("listen.tls.cert", "a PEM file: the certificate and those that lead to its authority"),
    unset("listen.tls.key", "a PEM file: the certificate's private key"),
    scalar("listen.tls.strict", "false", "`true` or `false`"),
    scalar("limits.max", "32", "a number from 1 to 100000"),
    scalar("limits.target", "10", "a number from 1 to 100000"),
    scalar("limits.queue", "256", "a number from 0 to 1000000"),
    scalar("limits.sizing", "engine", "`engine` or `fixed`"),
    scalar("limits.queue_timeout", "60s", "a duration, like 60s"),
    scalar("limits.hold", "0s", "a duration, like 30s"),
    scalar("limits.max_body", "64MiB", "a size, like 64MiB"),
    scalar("limits.workers", "auto", "`auto` or a number from 1 to 1024"),
    scalar("limits.connections", "auto", "`auto` or a number from 16 to 1000000"),
    scalar("limits.connections_per_peer", "off", "`off` or a number from 1 to 1000000"),
    Key {
        path: "limits.routes",
        shape: Shape::Words,
        default: Some("[]"),
        is: "a list of paths: [/server_info, -/generate]",
    },
    unset("auth.keys_file", "a file of API keys"),
    Key { path: "auth.routes", shape: Shape::Words, default: Some("[]"), is: "a list of paths: [-/v1/models]" },
    scalar("start.stall", "10min", "a duration, like 10min"),
    scalar("start.limit", "3h", "a duration, like 3h"),
    scalar("health.probe_interval", "30s", "a duration, like 30s"),
    scalar("health.probe_timeout", "25s", "a duration, like 25s"),
    scalar("health.hang_after", "120s", "a duration, like 120s"),
    scalar("restart.max", "3", "a number from 1 to 1000"),
    scalar("restart.window", "10min", "a duration, like 10min"),
    scalar("restart.backoff", "2s", "a duration, like 2s"),
    scalar("restart.backoff_max", "60s", "a duration, like 60s"),
    scalar("restart.on_give_up", "serve", "`serve` or `exit`"),
    scalar("shutdown.grace", "25s", "a duration, like 25s"),
    scalar("observe.log", "text", "`text`, `json` or `journald`"),
    scalar("observe.level", "info", "a filter: info, debug, or sglangd=debug,warn"),
];

pub fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// Whether this names a part of a section that has keys of its own.
pub fn is_part(path: &str) -> bool {
    KEYS.iter().any(|key| key.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
}

/// The sections, in order.
pub fn sections() -> Vec<&'static str> {
    let mut sections: Vec<&'static str> = KEYS.iter().filter_map(|key| key.path.split('.').next()).collect();
    sections.dedup();
    sections
}

/// The keys of one section, without its name.
pub fn of_section(section: &str) -> impl Iterator<Item = &'static str> {
    KEYS.iter().filter_map(move |key| key.path.strip_prefix(section)?.strip_prefix('.'))
}

/// The environment variable of a key: `SGLANGD_LIMITS_QUEUE_TIMEOUT`.
pub fn variable(path: &str) -> String {
    format!("SGLANGD_{}", path.replace('.', "_").to_uppercase())
}
