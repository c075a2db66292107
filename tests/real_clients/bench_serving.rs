//! `sglang.bench_serving`, the load generator of the installed SGLang.

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use super::{KEY, answered, counted, is_idle, python, script, serving, started};
use crate::harness::daemon::eventually;
use crate::harness::scene::{CHAT, SOON};
use crate::real_engine::prepared;

const REQUESTS: u64 = 24;
const TOKENS: u64 = 20;

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn bench_serving_gets_every_token_and_its_numbers_are_ours() {
    let mut daemon = started(serving("", "")).await;
    let model = prepared("SGLANGD_TEST_MODEL");
    let results = daemon.folder().join("results.jsonl");
    let (url, requests, tokens) = (daemon.url(""), REQUESTS.to_string(), TOKENS.to_string());
    let mut command = python();
    let paths = std::env::join_paths([prepared("SGLANGD_TEST_CLIENTS"), script("stubs")]).unwrap();
    command.env("PYTHONPATH", paths).args([
        "-m",
        "sglang.bench_serving",
        "--backend",
        "sglang-oai-chat",
        "--base-url",
        &url,
    ]);
    command.arg("--model").arg(&model).args(["--served-model-name", "small"]).arg("--tokenizer").arg(&model);
    // Tokens by chance: the other data sets are fetched.
    command.args(["--dataset-name", "random-ids", "--random-input-len", "16", "--random-output-len", &tokens]);
    command.args(["--random-range-ratio", "1", "--num-prompts", &requests, "--max-concurrency", "6"]);
    command.args(["--disable-tqdm", "--output-details", "--output-file"]).arg(&results);
    command.env("OPENAI_API_KEY", KEY).env("API_KEY", KEY).current_dir(daemon.folder());
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let status = eventually("its end", Duration::from_mins(5), async || child.try_wait().unwrap()).await;
    assert!(status.success(), "{status}");

    // Python's JSON has an infinite rate of requests.
    let results = std::fs::read_to_string(results).unwrap().replace("Infinity", "null");
    let told: Value = serde_json::from_str(results.trim()).unwrap();
    let number = |name: &str| told[name].as_f64().unwrap_or_else(|| panic!("no {name}: {told}"));
    assert_eq!((&told["completed"], &told["total_output_tokens"]), (&REQUESTS.into(), &(REQUESTS * TOKENS).into()));
    let each = |name: &str| told[name].as_array().unwrap().clone();
    assert!(each("errors").iter().all(|error| error == ""), "{:?}", each("errors"));
    assert!(each("output_lens").iter().all(|length| *length == TOKENS), "{:?}", each("output_lens"));
    // One by one: as many pauses as there are tokens behind the first.
    assert!(
        each("itls").iter().all(|pauses| pauses.as_array().unwrap().len() as u64 >= TOKENS / 2),
        "{:?}",
        each("itls")
    );
    println!(
        "bench_serving through sglangd: first token {:.1} ms, between two {:.1} ms (the engine's pace: 16.7 ms)",
        number("median_ttft_ms"),
        number("median_itl_ms")
    );

    is_idle(&mut daemon).await;
    // One more for its warm-up.
    assert_eq!(answered(&daemon, CHAT, "2xx"), REQUESTS + 1);
    assert_eq!(counted(&daemon, "sglangd_client_aborts_total"), 0);
    daemon.stops_clean(SOON).await;
}
