//! What is counted of the answers that pass: nothing is changed or delayed for it.

use sglangd::link::ProxySettings;
use sglangd::proxy::Timings;

use super::{CHAT, stepped};
use crate::harness::client::{Client, End, post, post_with};
use crate::harness::engine::{EVENTS, Engine, LAST, chunk, json};
use crate::harness::front::{Front, eventually, keys_file, settings};

const USAGE: &str = "\"usage\":{\"prompt_tokens\":12,\"total_tokens\":19,\"completion_tokens\":7}";

fn event(rest: &str) -> String {
    format!("data: {{\"choices\":[{{\"delta\":{{}},{rest}}}]}}\n\n")
}

#[test]
fn streams_are_counted_by_usage_or_else_by_events() {
    let token = event("\"finish_reason\":null");
    let end = event("\"finish_reason\":\"length\"");
    let usage = format!("data: {{\"choices\":[],{USAGE}}}\n\n");
    let whole = [token.as_str(), &token, &end, &usage, "data: [DONE]\n\n"].concat();
    let engine = Engine::start(move |connection| {
        while let Some(head) = connection.request() {
            connection.send(EVENTS);
            if head.contains("bytes: yes") {
                // Each byte in a chunk of its own.
                connection.send(whole.bytes().flat_map(|byte| chunk([byte])).collect::<Vec<u8>>());
            } else {
                connection.send([chunk(&token), chunk(&token), chunk(&end)].concat());
                connection.send(chunk("data: [DONE]\n\n"));
            }
            connection.send(LAST);
        }
    });
    let front = Front::of(&engine);
    for fields in ["", "Bytes: yes\r\n", "Bytes: yes\r\n"] {
        assert_eq!(Client::ask(front.addr, post_with(CHAT, fields, "{}")).end, End::Complete);
    }
    let of = |name: &str, more: &str| front.metric(&format!("sglangd_{name}{{route=\"{CHAT}\"{more}}}"));
    assert_eq!(of("prompt_tokens_total", ""), Some(24.0));
    assert_eq!(of("completion_tokens_total", ",counted=\"usage\""), Some(14.0));
    assert_eq!(of("completion_tokens_total", ",counted=\"events\""), Some(3.0));
    assert_eq!(of("finish_reasons_total", ",reason=\"length\""), Some(3.0));
    assert_eq!(of("time_to_first_token_seconds_count", ""), Some(3.0));
    // Two gaps of three events, and twice three of four.
    assert_eq!(of("inter_token_seconds_count", ""), Some(8.0));
}

#[test]
fn answers_that_are_no_streams_are_counted_by_their_end() {
    let choice = "\"choices\":[{\"finish_reason\":\"stop\"}]";
    let long = format!("{{\"text\":\"{}\",{choice},{USAGE}}}", "\\\"completion_tokens\\\":99 ".repeat(10_000));
    let answer = json("200 OK", &long);
    let engine = Engine::answering(answer);
    let front = Front::of(&engine);
    let answer = Client::ask(front.addr, post(CHAT, "{}"));
    assert_eq!(answer.text(), long);
    let of = |name: &str, more: &str| front.metric(&format!("sglangd_{name}{{route=\"{CHAT}\"{more}}}"));
    eventually("it is counted", || of("prompt_tokens_total", "") == Some(12.0));
    assert_eq!(of("completion_tokens_total", ",counted=\"usage\""), Some(7.0));
    assert_eq!(of("finish_reasons_total", ",reason=\"stop\""), Some(1.0));
    assert_eq!(of("time_to_first_token_seconds_count", ""), None);
}

#[test]
fn each_dialect_is_counted_under_its_route_and_the_key_that_was_shown() {
    let keys = keys_file(&[("ci", "secret", "")]);
    let engine = Engine::start(|connection| {
        while let Some(head) = connection.request() {
            if head.starts_with("post /v1/messages ") {
                let first = "event: message_start\ndata: {\"usage\":{\"input_tokens\":5,\"output_tokens\":0}}\n\n";
                let last = "event: message_delta\ndata: {\"delta\":{\"stop_reason\":\"tool_use\"},\"usage\":{\"output_tokens\":6}}\n\n";
                connection.send([EVENTS.as_bytes(), &chunk(first), &chunk(last), LAST].concat());
            } else {
                connection.send(
                    "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n",
                );
                connection.send(chunk("{\"done\":false}\n"));
                connection.send(chunk("{\"done_reason\":\"stop\",\"prompt_eval_count\":3,\"eval_count\":2}\n"));
                connection.send(LAST);
            }
        }
    });
    let front = Front::with(
        &engine,
        ProxySettings { keys_file: Some(keys.path().to_owned()), ..settings() },
        Timings::default(),
    );
    for (path, prompt, completion, reason) in
        [("/v1/messages", 5.0, 6.0, "tool_calls"), ("/api/chat", 3.0, 2.0, "stop")]
    {
        assert_eq!(Client::ask(front.addr, post_with(path, "X-Api-Key: secret\r\n", "{}")).end, End::Complete);
        let of = |name: &str, more: &str| front.metric(&format!("sglangd_{name}{{route=\"{path}\",key=\"ci\"{more}}}"));
        assert_eq!(of("prompt_tokens_total", ""), Some(prompt), "{path}");
        assert_eq!(of("completion_tokens_total", ",counted=\"usage\""), Some(completion), "{path}");
        assert_eq!(of("finish_reasons_total", &format!(",reason=\"{reason}\"")), Some(1.0), "{path}");
        assert_eq!(of("inter_token_seconds_count", ""), Some(1.0), "{path}");
    }
}

#[test]
fn a_stream_that_breaks_off_counts_what_it_gave_and_no_reason() {
    let (engine, release) = stepped(|connection, gate| {
        connection.request();
        connection.send([EVENTS.as_bytes(), &chunk("data: one\n\n"), &chunk("data: two\n\n")].concat());
        gate.recv().unwrap();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(CHAT, "{}")).until("data: two\n\n");
    release.send(()).unwrap();
    assert_eq!(client.answer().end, End::Broken);
    let events = format!("sglangd_completion_tokens_total{{route=\"{CHAT}\",counted=\"events\"}}");
    assert_eq!(front.metric(&events), Some(2.0));
    assert!(!front.proxy.metrics().contains("sglangd_finish_reasons_total{"));
}
