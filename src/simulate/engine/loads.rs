//! What the simulated engine tells about itself: `/v1/loads`, `/metrics`, `/model_info`, `/server_info`.

use std::fmt::Write;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::requests::Engine;
use crate::observe::clock;

pub const VERSION: &str = "0.5.23";
/// Size of the simulated KV cache.
const KV_TOKENS: u64 = 65536;

/// What the scheduler writes into shared memory after each batch: a rank that hangs goes on telling its
/// last figures, with their time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Snapshot {
    pub timestamp: f64,
    pub running: usize,
    pub waiting: usize,
    pub tokens: u64,
}

impl Snapshot {
    pub fn of(engine: &Engine) -> Self {
        let running = engine.running.load(Ordering::Relaxed);
        Self { timestamp: clock::unix_time(), running, waiting: engine.waiting(), tokens: running as u64 * 128 }
    }
}

/// The core section alone, whatever `include` asks for: the others depend on features that are not
/// simulated.
pub fn loads(engine: &Engine) -> Value {
    let Snapshot { timestamp, running, waiting, tokens } = engine.figures();
    let usage = tokens as f64 / KV_TOKENS as f64;
    json!({
        "timestamp": clock::now(), "version": VERSION, "accelerator": "simulated",
        "num_accelerators": engine.args.tp(),
        "loads": [{
            "timestamp": timestamp, "dp_rank": 0, "num_running_reqs": running, "num_waiting_reqs": waiting,
            "num_waiting_uncached_tokens": waiting * 128, "num_used_tokens": tokens, "num_total_tokens": tokens,
            "num_active_tokens": tokens, "num_prealloc_ready_tokens": 0, "max_total_num_tokens": KV_TOKENS,
            "max_running_requests": engine.args.number("max-running-requests").unwrap_or(48),
            "token_usage": usage, "gen_throughput": engine.knobs.tokens_per_second * running as f64,
            "cache_hit_rate": 0.0, "utilization": usage, "total_prefill_uncached_tokens": 0,
            "total_prefill_busy_us": 0, "decode_moments": null,
        }],
    })
}

pub fn metrics(engine: &Engine) -> String {
    let labels = format!(
        "{{engine_type=\"unified\",model_name=\"{}\",pp_rank=\"0\",tp_rank=\"0\"}}",
        engine.args.served_name().replace('\\', "\\\\").replace('"', "\\\"")
    );
    let total = &engine.totals;
    let running = engine.running.load(Ordering::Relaxed) as u64;
    let mut page = String::new();
    let rows = [
        ("num_running_reqs", "gauge", "The number of running requests.", running),
        ("num_queue_reqs", "gauge", "The number of requests in the waiting queue.", engine.waiting() as u64),
        ("max_total_num_tokens", "gauge", "Maximum total number of tokens in the KV cache pool.", KV_TOKENS),
        ("prompt_tokens_total", "counter", "Number of prefill tokens processed.", total.prompt.load(Ordering::Relaxed)),
        (
            "generation_tokens_total",
            "counter",
            "Number of generation tokens processed.",
            total.generated.load(Ordering::Relaxed),
        ),
        ("num_requests_total", "counter", "Number of requests processed.", total.requests.load(Ordering::Relaxed)),
        ("num_aborted_requests_total", "counter", "Number of requests aborted.", total.aborted.load(Ordering::Relaxed)),
    ];
    for (name, kind, help, value) in rows {
        // The counter of aborts does not exist before the first one.
        if name == "num_aborted_requests_total" && value == 0 {
            continue;
        }
        let _ =
            writeln!(page, "# HELP sglang:{name} {help}\n# TYPE sglang:{name} {kind}\nsglang:{name}{labels} {value}.0");
    }
    page
}

pub fn model_info(engine: &Engine) -> Value {
    json!({
        "model_path": engine.args.model_path(), "tokenizer_path": engine.args.model_path(),
        "is_generation": true, "preferred_sampling_params": null, "weight_version": "default",
        "has_image_understanding": false, "has_audio_understanding": false,
    })
}

/// With the keys in clear, as the real one has them: what a proxy must never let out.
pub fn server_info(engine: &Engine) -> Value {
    let mut info = engine.args.as_json();
    info.insert("status".into(), "ready".into());
    info.insert("version".into(), VERSION.into());
    info.insert("max_total_num_tokens".into(), KV_TOKENS.into());
    Value::Object(info)
}
