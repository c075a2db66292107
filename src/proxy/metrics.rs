//! Counts on the hot path: plain atomics of one worker, added up only when somebody asks.
//!
//! Labels are bounded by the code: route names of the allow-list and status classes, nothing that a
//! client says.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use http::StatusCode;

use super::routes;

const CLASSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "left"];
/// The routes of the allow-list, then: our own, refused by name, unknown.
const LABELS: usize = routes::COUNT + 3;

/// Which line of the requests table a request belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label(usize);

impl Label {
    pub const OWN: Self = Self(routes::COUNT);
    pub const REFUSED: Self = Self(routes::COUNT + 1);
    pub const UNKNOWN: Self = Self(routes::COUNT + 2);

    pub fn route(route: &'static routes::Route) -> Self {
        Self(routes::index(route).unwrap_or(Self::UNKNOWN.0))
    }

    fn name(at: usize) -> &'static str {
        match at {
            _ if at == Self::OWN.0 => "own",
            _ if at == Self::REFUSED.0 => "refused",
            _ if at == Self::UNKNOWN.0 => "unknown",
            _ => routes::name(at),
        }
    }
}

/// Upper bounds in seconds. From a fraction of the proxy's own cost to the worst prefill.
const BOUNDS: [f64; 14] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
}

impl Histogram {
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let at = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        self.buckets[at].fetch_add(1, Relaxed);
        self.micros.fetch_add(took.as_micros() as u64, Relaxed);
    }
}

/// The counts of one worker.
#[derive(Debug)]
pub struct Counters {
    requests: Box<[[AtomicU64; CLASSES.len()]]>,
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
    pub served: AtomicU64,
    /// Milliseconds since the proxy's start, plus one; zero: never.
    pub last_byte: AtomicU64,
    pub last_request: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            requests: (0..LABELS).map(|_| Default::default()).collect(),
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
            served: zero(),
            last_byte: zero(),
            last_request: zero(),
        }
    }
}

impl Counters {
    pub fn answered(&self, label: Label, status: StatusCode) {
        let class = usize::from(status.as_u16() / 100).clamp(1, 5) - 1;
        self.requests[label.0][class].fetch_add(1, Relaxed);
    }

    /// The client was gone before its answer began.
    pub fn left(&self, label: Label) {
        self.requests[label.0][CLASSES.len() - 1].fetch_add(1, Relaxed);
        self.client_aborts.fetch_add(1, Relaxed);
    }
}

/// Numbers that are not a worker's.
#[derive(Debug, Clone, Copy)]
pub struct Gauges {
    pub in_flight: usize,
    pub queued: usize,
    pub max: usize,
    pub target: usize,
    pub queue: usize,
    pub workers: usize,
}

/// The page in Prometheus' text format.
pub fn page(workers: &[std::sync::Arc<Counters>], gauges: &Gauges) -> String {
    let mut out = String::with_capacity(8 * 1024);
    let sum = |pick: fn(&Counters) -> &AtomicU64| workers.iter().map(|worker| pick(worker).load(Relaxed)).sum::<u64>();
    begin(&mut out, "requests_total", "counter", "Requests by route and status class; left: the client did not wait.");
    for label in 0..LABELS {
        for (class, class_name) in CLASSES.iter().enumerate() {
            let count: u64 = workers.iter().map(|worker| worker.requests[label][class].load(Relaxed)).sum();
            if count > 0 {
                let route = Label::name(label);
                line(&mut out, "requests_total", &format!("{{route=\"{route}\",status=\"{class_name}\"}}"), count);
            }
        }
    }
    for (name, help, value) in [
        ("requests_in_flight", "Requests open towards the engine.", gauges.in_flight),
        ("requests_queued", "Requests waiting for a place or for the engine.", gauges.queued),
        ("requests_max", "Requests open towards the engine at most (limits.max).", gauges.max),
        ("requests_target", "Requests in flight that this node should carry (limits.target).", gauges.target),
        ("queue_max", "Requests that may wait (limits.queue).", gauges.queue),
        ("proxy_workers", "Worker threads.", gauges.workers),
    ] {
        begin(&mut out, name, "gauge", help);
        line(&mut out, name, "", value as u64);
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
        ("requests_served_total", "counter", "Requests answered by the engine to the end.", sum(|w| &w.served)),
    ] {
        begin(&mut out, name, kind, help);
        line(&mut out, name, "", value);
    }
    histogram(&mut out, "queue_wait_seconds", "Wait for a place.", workers, |w| &w.wait);
    histogram(&mut out, "first_byte_seconds", "From place to the answer's first byte.", workers, |w| &w.first_byte);
    out
}

// Writing into a String does not fail.
fn begin(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = write!(out, "# HELP sglangd_{name} {help}\n# TYPE sglangd_{name} {kind}\n");
}

fn line(out: &mut String, name: &str, labels: &str, value: u64) {
    let _ = writeln!(out, "sglangd_{name}{labels} {value}");
}

fn histogram(
    out: &mut String,
    name: &str,
    help: &str,
    workers: &[std::sync::Arc<Counters>],
    pick: fn(&Counters) -> &Histogram,
) {
    begin(out, name, "histogram", help);
    let mut count = 0;
    for at in 0..=BOUNDS.len() {
        count += workers.iter().map(|worker| pick(worker).buckets[at].load(Relaxed)).sum::<u64>();
        let bound = BOUNDS.get(at).map_or_else(|| "+Inf".to_owned(), f64::to_string);
        line(out, &format!("{name}_bucket"), &format!("{{le=\"{bound}\"}}"), count);
    }
    let micros: u64 = workers.iter().map(|worker| pick(worker).micros.load(Relaxed)).sum();
    let _ = writeln!(out, "sglangd_{name}_sum {}", micros as f64 / 1e6);
    line(out, &format!("{name}_count"), "", count);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn workers_are_added_up() {
        let workers = [Arc::new(Counters::default()), Arc::new(Counters::default())];
        for worker in &workers {
            worker.answered(Label::OWN, StatusCode::OK);
            worker.wait.observe(Duration::from_millis(7));
        }
        workers[1].left(Label::UNKNOWN);
        let text = page(&workers, &Gauges { in_flight: 1, queued: 2, max: 32, target: 10, queue: 64, workers: 2 });
        for line in [
            "sglangd_requests_total{route=\"own\",status=\"2xx\"} 2",
            "sglangd_requests_total{route=\"unknown\",status=\"left\"} 1",
            "sglangd_requests_in_flight 1",
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
