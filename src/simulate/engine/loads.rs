//! What the simulated engine tells about itself: `/v1/loads`, `/metrics`, `/model_info`, `/server_info`.

use std::fmt::Write;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::requests::Engine;
use crate::observe::clock;

pub const VERSION: &str = "0.5.23";

pub fn loads(engine: &Engine) -> Value {
    let running = engine.running.load(Ordering::Relaxed);
    json!({
        "timestamp": clock::now(), "version": VERSION, "accelerator": "simulated",
        "num_accelerators": engine.args.tp(),
        "loads": [{
            "dp_rank": 0, "timestamp": clock::unix_seconds(), "num_running_reqs": running,
            "num_waiting_reqs": engine.waiting(), "num_used_tokens": running * 128, "num_total_tokens": running * 128,
            "max_total_num_tokens": 65536,
            "max_running_requests": engine.args.number("max-running-requests").unwrap_or(48),
            "token_usage": 0.0, "gen_throughput": engine.knobs.tokens_per_second * running as f64,
            "cache_hit_rate": 0.0, "utilization": 0.0,
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
        ("max_total_num_tokens", "gauge", "Maximum total number of tokens in the KV cache pool.", 65536),
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
    info.insert("max_total_num_tokens".into(), 65536.into());
    Value::Object(info)
}
