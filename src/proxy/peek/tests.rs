use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn seen(text: &str) -> (Stream, u32) {
    let Peek { stream, sequences } = peek(text.as_bytes());
    (stream, sequences)
}

const NOTHING: (Stream, u32) = (Stream::Unknown, 1);

#[test]
fn a_stream_and_the_sequences_are_seen() {
    assert_eq!(seen(r#"{"model": "m", "stream": true}"#), (Stream::Yes, 1));
    assert_eq!(seen(r#" {"stream":false , "n" : 3}"#), (Stream::No, 3));
    assert_eq!(seen(r"{}"), (Stream::No, 1));
    assert_eq!(seen(r#"{"n": 2, "best_of": 5, "prompt": ["a", "b,]\"", "c"]}"#), (Stream::No, 15));
    assert_eq!(seen(r#"{"prompt": [[1, 2], [3]], "n": 2}"#), (Stream::No, 4));
    assert_eq!(seen(r#"{"prompt": [1, 2, 3]}"#), (Stream::No, 1), "one prompt of three tokens");
    assert_eq!(seen(r#"{"input": [{"role": "user"}, {"role": "user"}]}"#), (Stream::No, 1), "one conversation");
    assert_eq!(seen(r#"{"text": ["a", "b"], "sampling_params": {"n": 4, "stop": ["}"]}}"#), (Stream::No, 8));
    assert_eq!(seen(r#"{"n": 0, "prompt": []}"#), (Stream::No, 1));
    assert_eq!(seen(r#"{"n": 4294967295, "prompt": ["", ""]}"#), (Stream::No, u32::MAX));
}

#[test]
fn what_is_nested_or_quoted_is_not_taken_for_the_requests_own() {
    assert_eq!(seen(r#"{"a": {"stream": true, "n": 9}, "b": "\"stream\": true", "c": [{"n": 7}]}"#), (Stream::No, 1));
}

#[test]
fn f05_on_doubt_nothing_is_known() {
    let deep = |levels: usize| format!(r#"{{"a": {}{}, "stream": true}}"#, "[".repeat(levels), "]".repeat(levels));
    assert_eq!(seen(&deep(127)), (Stream::Yes, 1));
    assert_eq!(seen(&deep(129)), NOTHING);
    for text in [
        "",
        "null",
        "[]",
        "{\"stream\": true, \"stream\": true}",
        "{\"stream\": true, \"stream\": false}",
        "{\"stream\": true, \"str\\u0065am\": false}",
        "{\"n\": 2, \"sampling_params\": {\"n\": 3}, \"stream\": true}",
        "{\"prompt\": \"a\", \"text\": \"b\", \"stream\": true}",
        "\u{feff}{\"stream\": true}",
        "{\"stream\": true} {",
        "{\"a\": [}, \"stream\": true}",
        "{\"a\" \"b\", \"stream\": true}",
        "{\"a\": ], \"stream\": true}",
        "{'stream': true}",
        "stream=true",
    ] {
        assert_eq!(seen(text), NOTHING, "{text:?}");
    }
    let wide: Vec<u8> = "{\"stream\": true}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(peek(&wide), Peek::NOTHING);
    assert_eq!(peek(&[0x1f, 0x8b, 8, 0]), Peek::NOTHING);
    assert_eq!(seen(&"[".repeat(100_000)), NOTHING);
    assert_eq!(seen(&format!("{{\"a\": {}", "[".repeat(100_000))), NOTHING);
}

#[test]
fn f05_what_the_engine_may_coerce_is_left_to_it() {
    for value in ["\"true\"", "1", "null", "[true]", "{}"] {
        assert_eq!(seen(&format!("{{\"stream\": {value}, \"n\": 2}}")), (Stream::Unknown, 2), "{value}");
    }
    for value in ["\"4\"", "4.0", "-4", "4e0", "null", "99999999999"] {
        assert_eq!(seen(&format!("{{\"n\": {value}}}")), (Stream::No, 1), "{value}");
    }
}

#[test]
fn of_a_body_that_is_cut_counts_what_was_seen_whole() {
    assert_eq!(seen(r#"{"stream": true, "n": 3, "messages": [{"con"#), (Stream::Yes, 3));
    assert_eq!(seen(r#"{"n": 3"#), NOTHING, "it may go on with 0");
    assert_eq!(seen(r#"{"stream": tru"#), NOTHING);
    assert_eq!(seen(r#"{"prompt": ["a", "b", "c"#), (Stream::Unknown, 2));
    let long = format!(r#"{{"stream": true, "prompt": "{}"}}"#, "x".repeat(WINDOW));
    assert_eq!(seen(&long), (Stream::Yes, 1));
    let late = format!(r#"{{"prompt": "{}", "stream": true}}"#, "x".repeat(10 << 20));
    assert_eq!(seen(&late), NOTHING);
    assert_eq!(stream_at_end(&late.as_bytes()[late.len() - END..]), Stream::Yes);
}

#[test]
fn the_end_tells_what_the_prompt_hides() {
    for (text, stream) in [
        (r#"x"}], "model": "m\\", "stream": true, "user": "a \"b\" \\"}"#, Stream::Yes),
        (r#"x"}],"stream":false }  "#, Stream::No),
        (r#"x"}], "stream": true, "tools": []}"#, Stream::Unknown),
        (r#"x"}], "options": {"stream": true}}"#, Stream::Unknown),
        (r#"x"}], "stream": "true"}"#, Stream::Unknown),
        (r#"x, \"stream\": true}"#, Stream::Unknown),
        (r#""stream": true"#, Stream::Unknown),
        ("true}", Stream::Unknown),
        ("", Stream::Unknown),
    ] {
        assert_eq!(stream_at_end(text.as_bytes()), stream, "{text}");
    }
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-9i64..99).prop_map(Value::from),
        "[a-z\"\\\\{}\\[\\],: é]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((name(), inner), 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("stream".to_owned()),
        Just("n".to_owned()),
        Just("best_of".to_owned()),
        Just("prompt".to_owned()),
        Just("sampling_params".to_owned()),
        "[a-z]{1,6}",
    ]
}

proptest! {
    /// What a whole parser reads is what the peek says, and no prefix or suffix says otherwise.
    #[test]
    fn the_peek_agrees_with_a_whole_parser(members in proptest::collection::vec((name(), value()), 0..6)) {
        let object: serde_json::Map<String, Value> = members.into_iter().collect();
        let text = Value::Object(object.clone()).to_string();
        let truth = match object.get("stream") {
            None | Some(Value::Bool(false)) => Stream::No,
            Some(Value::Bool(true)) => Stream::Yes,
            Some(_) => Stream::Unknown,
        };
        let sampled = object.get("sampling_params").and_then(|params| params.get("n"));
        if !(sampled.is_some() && object.contains_key("n")) {
            prop_assert_eq!(peek(text.as_bytes()).stream, truth);
            let number = |name: &str| object.get(name).and_then(Value::as_u64).unwrap_or(1);
            let sampled = sampled.and_then(Value::as_u64).unwrap_or(1);
            let prompts = match object.get("prompt").and_then(Value::as_array) {
                Some(items) if matches!(items.first(), Some(Value::String(_) | Value::Array(_))) => items.len() as u64,
                _ => 1,
            };
            let sequences = number("n").max(sampled).max(number("best_of")).max(1) * prompts.max(1);
            prop_assert_eq!(u64::from(peek(text.as_bytes()).sequences), sequences);
        }
        for cut in 0..text.len() {
            let part = peek(&text.as_bytes()[..cut]).stream;
            prop_assert!(part == Stream::Unknown || part == truth, "{} says {part:?}", &text[..cut]);
            let end = stream_at_end(&text.as_bytes()[cut..]);
            prop_assert!(end == Stream::Unknown || end == truth, "{} says {end:?}", &text[cut..]);
        }
    }

    #[test]
    fn no_bytes_are_too_odd(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        peek(&bytes);
        stream_at_end(&bytes);
    }

    #[test]
    fn no_json_like_bytes_are_too_odd(text in "[\\[\\]{}\",:\\\\ntrue0-9 streamprompt]{0,120}") {
        peek(text.as_bytes());
        stream_at_end(text.as_bytes());
    }
}

#[test]
fn names_are_those_of_the_engine() {
    // What the scan compares with, spelled as the SDKs send it.
    let body = json!({"model": "m", "messages": [], "n": 2, "stream": true, "stream_options": {"include_usage": true}});
    assert_eq!(seen(&body.to_string()), (Stream::Yes, 2));
}
