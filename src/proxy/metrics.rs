//! Counts on the hot path: plain atomics of one worker, added up only when somebody asks.
//!
//! Labels are bounded: route names of the allow-list, status classes, and names of the keys file.
//! Nothing that a client says is one.

use std::fmt::Write as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use http::StatusCode;

use super::recent::Recent;
use super::routes;
use crate::admission::KeyId;
use crate::link::EngineLoad;

mod histogram;
mod told;

use histogram::{Histogram, Pick};
use told::Told;

const CLASSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "left"];
/// The routes of the allow-list, then: our own, refused by name, unknown.
const LABELS: usize = routes::COUNT + 3;

/// Keys with counts of their own; any more share one line, named [`OTHERS`]. A page of a thousand keys
/// is as long as anybody wants to scrape.
const KEYS: usize = 1024;
const OTHERS: &str = "(others)";

/// Which line of the requests table a request belongs to: a route, and a key once one was shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    row: usize,
    key: KeyId,
}

impl Label {
    pub const OWN: Self = Self::row(routes::COUNT);
    pub const REFUSED: Self = Self::row(routes::COUNT + 1);
    pub const UNKNOWN: Self = Self::row(routes::COUNT + 2);

    const fn row(row: usize) -> Self {
        Self { row, key: KeyId::ANYBODY }
    }

    pub fn route(route: &'static routes::Route) -> Self {
        routes::index(route).map_or(Self::UNKNOWN, Self::row)
    }

    pub fn of(self, key: KeyId) -> Self {
        Self { key, ..self }
    }

    fn name(row: usize) -> &'static str {
        match row {
            _ if row == Self::OWN.row => "own",
            _ if row == Self::REFUSED.row => "refused",
            _ if row == Self::UNKNOWN.row => "unknown",
            _ => routes::name(row),
        }
    }
}

/// Counts of one key's requests on one worker.
#[derive(Debug)]
pub struct KeyCounts {
    requests: Box<[[AtomicU64; CLASSES.len()]]>,
}

impl Default for KeyCounts {
    fn default() -> Self {
        Self { requests: (0..LABELS).map(|_| Default::default()).collect() }
    }
}

/// The counts of one worker.
#[derive(Debug)]
pub struct Counters {
    /// By key; made when the key is first seen.
    keys: Box<[OnceLock<Box<KeyCounts>>]>,
    pub told: Told,
    pub wait: Histogram,
    pub first_byte: Histogram,
    /// Requests open now: those whose answer is not at its end.
    pub open_answers: AtomicU64,
    pub connections: AtomicU64,
    pub connections_total: AtomicU64,
    pub http2_connections: AtomicU64,
    pub http2_connections_total: AtomicU64,
    /// Connections of HTTP/2 that spent a budget.
    pub http2_floods: AtomicU64,
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    pub upstream_errors: AtomicU64,
    pub upstream_retries: AtomicU64,
    pub upstream_connects: AtomicU64,
    pub client_aborts: AtomicU64,
    pub interrupted: AtomicU64,
    /// Streams begun before the engine's head.
    pub early: AtomicU64,
    pub served: AtomicU64,
    /// Open now.
    pub websockets: AtomicU64,
    pub websockets_total: AtomicU64,
    /// Milliseconds since the proxy's start, plus one; zero: never.
    pub last_byte: AtomicU64,
    pub last_request: AtomicU64,
    /// No count, but kept beside them: by whom the engine was asked last.
    pub recent: Recent,
}

impl Default for Counters {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            keys: (0..=KEYS).map(|_| OnceLock::new()).collect(),
            told: Told::default(),
            wait: Histogram::default(),
            first_byte: Histogram::default(),
            open_answers: zero(),
            connections: zero(),
            connections_total: zero(),
            http2_connections: zero(),
            http2_connections_total: zero(),
            http2_floods: zero(),
            bytes_in: zero(),
            bytes_out: zero(),
            upstream_errors: zero(),
            upstream_retries: zero(),
            upstream_connects: zero(),
            client_aborts: zero(),
            interrupted: zero(),
            early: zero(),
            served: zero(),
            websockets: zero(),
            websockets_total: zero(),
            last_byte: zero(),
            last_request: zero(),
            recent: Recent::default(),
        }
    }
}

impl Counters {
    pub fn key(&self, key: KeyId) -> &KeyCounts {
        self.keys[(key.0 as usize).min(KEYS)].get_or_init(Box::default)
    }

    pub fn answered(&self, label: Label, status: StatusCode) {
        let class = usize::from(status.as_u16() / 100).clamp(1, 5) - 1;
        self.key(label.key).requests[label.row][class].fetch_add(1, Relaxed);
    }

    /// The client was gone before its answer began.
    pub fn left(&self, label: Label) {
        self.key(label.key).requests[label.row][CLASSES.len() - 1].fetch_add(1, Relaxed);
        self.client_aborts.fetch_add(1, Relaxed);
    }
}

/// Numbers that are not a worker's.
#[derive(Debug, Clone)]
pub struct Gauges {
    /// Keys that hold places or wait: places and waiters of each.
    pub busy: Vec<(KeyId, u32, usize)>,
    pub in_flight: usize,
    pub queued: usize,
    pub max: usize,
    pub room: usize,
    /// What the engine last said of itself.
    pub engine: Option<EngineLoad>,
    pub target: usize,
    pub queue: usize,
    pub workers: usize,
    /// 1 while the keys in use are older than their file, which cannot be used.
    pub keys_stale: usize,
}

/// The page in Prometheus' text format. `names` are the keys', by number.
pub fn page(workers: &[std::sync::Arc<Counters>], gauges: &Gauges, names: &[String]) -> String {
    let mut out = String::with_capacity(8 * 1024);
    let sum = |pick: fn(&Counters) -> &AtomicU64| workers.iter().map(|worker| pick(worker).load(Relaxed)).sum::<u64>();
    begin(
        &mut out,
        "requests_total",
        "counter",
        "Requests by route, status class and key; left: the client did not wait.",
    );
    for key in 0..=KEYS {
        let counts: Vec<&KeyCounts> =
            workers.iter().filter_map(|worker| worker.keys[key].get()).map(|b| &**b).collect();
        if counts.is_empty() {
            continue;
        }
        let of_key = key_label(key, KEYS, names);
        for row in 0..LABELS {
            for (class, class_name) in CLASSES.iter().enumerate() {
                let count: u64 = counts.iter().map(|counts| counts.requests[row][class].load(Relaxed)).sum();
                if count > 0 {
                    let route = Label::name(row);
                    let labels = format!("{{route=\"{route}\",status=\"{class_name}\"{of_key}}}");
                    line(&mut out, "requests_total", &labels, count);
                }
            }
        }
    }
    for (name, help, value) in [
        ("requests_in_flight", "Requests open towards the engine.", gauges.in_flight),
        ("requests_queued", "Requests waiting for a place or for the engine.", gauges.queued),
        ("requests_max", "Requests open towards the engine at most (limits.max).", gauges.max),
        ("requests_room", "Requests that may be open at present (limits.max, or what the engine takes).", gauges.room),
        ("requests_target", "Requests in flight that this node should carry (limits.target).", gauges.target),
        ("queue_max", "Requests that may wait (limits.queue).", gauges.queue),
        ("proxy_workers", "Worker threads.", gauges.workers),
        ("keys_stale", "1 while the keys file cannot be used and older keys stay.", gauges.keys_stale),
    ] {
        begin(&mut out, name, "gauge", help);
        line(&mut out, name, "", value as u64);
    }
    if let Some(load) = gauges.engine {
        for (name, help, value) in [
            ("engine_requests_running", "Requests that the engine computes, by its own figures.", load.running as u64),
            ("engine_requests_waiting", "Requests in the engine's own queue.", load.waiting as u64),
            ("engine_kv_percent", "KV cache in use on the fullest rank.", u64::from(load.kv_percent)),
        ] {
            begin(&mut out, name, "gauge", help);
            line(&mut out, name, "", value);
        }
    }
    for (name, help, pick) in
        [("key_places_open", "Places held, by key.", 1), ("key_requests_waiting", "Requests waiting, by key.", 2)]
    {
        begin(&mut out, name, "gauge", help);
        let mut others = 0;
        for (key, open, waiting) in &gauges.busy {
            let value = if pick == 1 { u64::from(*open) } else { *waiting as u64 };
            match key.0 as usize {
                0 => {}
                key if key < KEYS => line(&mut out, name, &format!("{{{}}}", &key_label(key, KEYS, names)[1..]), value),
                _ => others += value,
            }
        }
        if others > 0 {
            line(&mut out, name, &format!("{{key=\"{OTHERS}\"}}"), others);
        }
    }
    for (name, kind, help, value) in [
        ("open_answers", "gauge", "Answers not at their end.", sum(|w| &w.open_answers)),
        ("connections", "gauge", "Client connections open.", sum(|w| &w.connections)),
        ("connections_total", "counter", "Client connections accepted.", sum(|w| &w.connections_total)),
        ("http2_connections", "gauge", "Those that speak HTTP/2.", sum(|w| &w.http2_connections)),
        (
            "http2_connections_total",
            "counter",
            "Client connections that spoke HTTP/2.",
            sum(|w| &w.http2_connections_total),
        ),
        (
            "http2_floods_total",
            "counter",
            "Connections of HTTP/2 ended because their client reset or asked too much.",
            sum(|w| &w.http2_floods),
        ),
        ("request_bytes_total", "counter", "Bytes of request bodies passed on.", sum(|w| &w.bytes_in)),
        ("response_bytes_total", "counter", "Bytes of the engine's answers passed on.", sum(|w| &w.bytes_out)),
        (
            "upstream_errors_total",
            "counter",
            "Connections to the engine refused or broken.",
            sum(|w| &w.upstream_errors),
        ),
        (
            "upstream_retries_total",
            "counter",
            "Requests said again on a fresh connection.",
            sum(|w| &w.upstream_retries),
        ),
        ("upstream_connects_total", "counter", "Connections made to the engine.", sum(|w| &w.upstream_connects)),
        ("client_aborts_total", "counter", "Clients that left before their answer's end.", sum(|w| &w.client_aborts)),
        ("streams_interrupted_total", "counter", "Answers that ended without their end.", sum(|w| &w.interrupted)),
        (
            "streams_begun_early_total",
            "counter",
            "Streams begun before the engine answered, to keep the connection alive.",
            sum(|w| &w.early),
        ),
        ("websockets", "gauge", "WebSockets open.", sum(|w| &w.websockets)),
        ("websockets_total", "counter", "WebSockets opened.", sum(|w| &w.websockets_total)),
        ("requests_served_total", "counter", "Requests answered by the engine to the end.", sum(|w| &w.served)),
    ] {
        begin(&mut out, name, kind, help);
        line(&mut out, name, "", value);
    }
    let histograms: [(&str, &str, Pick<Counters>); 2] = [
        ("queue_wait_seconds", "Wait for a place.", |w| &w.wait),
        ("first_byte_seconds", "From place to the answer's first byte.", |w| &w.first_byte),
    ];
    for (name, help, pick) in histograms {
        begin(&mut out, name, "histogram", help);
        histogram::write(&mut out, name, "", &workers.iter().map(|worker| pick(worker)).collect::<Vec<_>>());
    }
    told::write(&mut out, workers, names);
    out
}

/// `,key="NAME"`; nothing where no key was shown. From `others` on all share one name.
fn key_label(key: usize, others: usize, names: &[String]) -> String {
    let name = match key {
        0 => return String::new(),
        key if key >= others => OTHERS,
        key => names.get(key).map_or("", String::as_str),
    };
    let escaped = name.replace('\\', "\\\\").replace('"', "\\\"");
    format!(",key=\"{escaped}\"")
}

// Writing into a String does not fail.
fn begin(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = write!(out, "# HELP sglangd_{name} {help}\n# TYPE sglangd_{name} {kind}\n");
}

fn line(out: &mut String, name: &str, labels: &str, value: u64) {
    let _ = writeln!(out, "sglangd_{name}{labels} {value}");
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn workers_are_added_up() {
        let workers = [Arc::new(Counters::default()), Arc::new(Counters::default())];
        for worker in &workers {
            worker.answered(Label::OWN, StatusCode::OK);
            worker.wait.observe(Duration::from_millis(7));
        }
        workers[1].left(Label::UNKNOWN);
        for key in [KeyId(1), KeyId(2), KeyId(5000)] {
            workers[1].answered(Label::REFUSED.of(key), StatusCode::TOO_MANY_REQUESTS);
        }
        let busy = vec![(KeyId(0), 1, 1), (KeyId(1), 3, 2), (KeyId(5000), 1, 0)];
        let gauges = Gauges {
            busy,
            room: 30,
            engine: Some(EngineLoad { running: 9, waiting: 2, kv_percent: 41 }),
            in_flight: 1,
            queued: 2,
            max: 32,
            target: 10,
            queue: 64,
            workers: 2,
            keys_stale: 0,
        };
        let text = page(&workers, &gauges, &["", "ci", "a\\\"b"].map(str::to_owned));
        for line in [
            "sglangd_requests_total{route=\"own\",status=\"2xx\"} 2",
            "sglangd_requests_total{route=\"unknown\",status=\"left\"} 1",
            "sglangd_requests_total{route=\"refused\",status=\"4xx\",key=\"ci\"} 1",
            r#"sglangd_requests_total{route="refused",status="4xx",key="a\\\"b"} 1"#,
            "sglangd_requests_total{route=\"refused\",status=\"4xx\",key=\"(others)\"} 1",
            "sglangd_requests_in_flight 1",
            "sglangd_requests_room 30",
            "sglangd_engine_requests_waiting 2",
            "sglangd_engine_kv_percent 41",
            "sglangd_key_places_open{key=\"ci\"} 3",
            "sglangd_key_places_open{key=\"(others)\"} 1",
            "sglangd_key_requests_waiting{key=\"ci\"} 2",
            "sglangd_requests_target 10",
            "sglangd_client_aborts_total 1",
            "sglangd_queue_wait_seconds_bucket{le=\"0.005\"} 0",
            "sglangd_queue_wait_seconds_bucket{le=\"0.01\"} 2",
            "sglangd_queue_wait_seconds_count 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
