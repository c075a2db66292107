use proptest::prelude::*;

use super::*;

/// Scans `text` cut at these places; what was seen in the end.
fn scanned(grammar: Grammar, words: Words, text: &[u8], cuts: &[usize]) -> Scanner {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (text.len() + 1)).chain([text.len()]).collect();
    ends.sort_unstable();
    let (mut scanner, mut from) = (Scanner::new(grammar, words), 0);
    for end in ends {
        scanner.scan(&text[from..end]);
        from = end;
    }
    scanner
}

fn events(text: &str) -> Scanner {
    scanned(Grammar::Events, Words::Common, text.as_bytes(), &[])
}

type Seen = (u64, bool, bool, Option<u64>, Option<u64>, Option<Reason>);

fn seen(scanner: &Scanner) -> Seen {
    let facts = scanner.facts();
    (scanner.events(), scanner.is_between_events(), scanner.is_done(), facts.prompt, facts.completion, facts.reason)
}

const CHAT: &str = concat!(
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"say \\\"completion_tokens\\\":999, \"},\"finish_reason\":null}]}\n\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"length\",\"matched_stop\":null}]}\n\n",
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":12,\"total_tokens\":31,\"completion_tokens\":19,\"reasoning_tokens\":5}}\n\n",
    "data: [DONE]\n\n"
);

#[test]
fn each_dialect_tells_its_tokens_and_its_end() {
    assert_eq!(seen(&events(CHAT)), (3, true, true, Some(12), Some(19), Some(Reason::Length)));
    let anthropic = concat!(
        "event: message_start\ndata: {\"message\":{\"stop_reason\":null,\"usage\":{\"input_tokens\":7,\"output_tokens\":0}}}\n\n",
        "event: ping\ndata: {\"type\":\"ping\"}\n\n",
        "event: message_delta\ndata: {\"delta\":{\"stop_reason\": \"end_turn\"},\"usage\":{\"output_tokens\": 25}}\n\n",
    );
    assert_eq!(seen(&events(anthropic)), (3, true, false, Some(7), Some(25), Some(Reason::Stop)));
    let native = concat!(
        "data: {\"text\":\"a\",\"meta_info\":{\"finish_reason\":null,\"prompt_tokens\":3,\"completion_tokens\":1}}\n\n",
        "data: {\"text\":\"ab\",\"meta_info\":{\"finish_reason\":{\"type\":\"stop\",\"matched\":2},\"prompt_tokens\":3,\"completion_tokens\":2}}\n\n",
    );
    assert_eq!(seen(&events(native)), (2, true, false, Some(3), Some(2), Some(Reason::Stop)));
    let ollama = b"{\"message\":{},\"done\":false}\n{\"done\":true,\"done_reason\":\"length\",\"prompt_eval_count\":4,\"eval_count\":9}\n";
    let lines = scanned(Grammar::Lines, Words::Ollama, ollama, &[]);
    assert_eq!(seen(&lines), (2, false, false, Some(4), Some(9), Some(Reason::Length)));
    let whole = "{\"choices\":[{\"finish_reason\":\"tool_calls\"}],\"usage\":{\"prompt_tokens\":5,\"max_output_tokens\":7,\"completion_tokens\":6}}";
    let whole = [" ".repeat(100_000).as_bytes(), whole.as_bytes()].concat();
    let document = scanned(Grammar::Document, Words::Common, &whole, &[99_990]);
    assert_eq!(seen(&document), (0, false, false, Some(5), Some(6), Some(Reason::ToolCalls)));
}

#[test]
fn an_event_ends_with_an_empty_line_of_any_kind_and_not_before() {
    for (text, count, between) in [
        ("", 0, true),
        ("\u{feff}data: x\n\n", 1, true),
        ("data: x\r\n\r\n", 1, true),
        ("data: x\r\r", 1, true),
        ("data: x\n", 0, false),
        ("data: x", 0, false),
        ("d", 0, false),
        (": comment\n\n", 0, true),
        (": comment\n", 0, false),
        ("event: x\ndata\n\n\n\n", 1, true),
        ("data:x\ndata:y\n\ndata:z\n\n", 2, true),
        ("id: 1\n\n", 0, true),
    ] {
        let scanner = events(text);
        assert_eq!((scanner.events(), scanner.is_between_events()), (count, between), "{text:?}");
    }
}

#[test]
fn done_is_the_last_word_or_none() {
    for (text, done) in [
        ("data: [DONE]\n\n", true),
        ("data:[DONE]\r\n\r\n", true),
        ("\u{feff}data: [DONE]", true),
        ("data: x\n\ndata: [DONE]\n", true),
        ("data: [DONE]\n\ndata: more\n\n", false),
        ("data: [DONE] \n\n", false),
        ("data: {\"text\":\"data: [DONE]\"}\n\n", false),
        ("data: [DONE]\n\n: comment\n\n", false),
    ] {
        assert_eq!(events(text).is_done(), done, "{text:?}");
    }
}

#[test]
fn a_huge_event_takes_no_memory() {
    let mut scanner = Scanner::new(Grammar::Events, Words::Common);
    scanner.scan(b"data: ");
    for _ in 0..5 * 16 {
        scanner.scan("é🦀".repeat(64 * 1024 / 6).as_bytes());
    }
    assert!(!scanner.is_between_events());
    scanner.scan(b"\"completion_tokens\":7}\n\n");
    assert_eq!((scanner.events(), scanner.facts().completion), (1, Some(7)));
    assert!(std::mem::size_of::<Scanner>() <= 192, "{}", std::mem::size_of::<Scanner>());
}

proptest! {
    /// However the bytes are cut, the same is seen.
    #[test]
    fn any_split_sees_the_same(
        pieces in proptest::collection::vec(prop_oneof![
            Just("data: "), Just("\n"), Just("\r"), Just("\r\n"), Just("\n\n"), Just(": x"), Just("[DONE]"),
            Just("{\"finish_reason\":\"stop\""), Just(",\"completion_tokens\": 12"), Just("{\"prompt_tokens\":3}"),
            Just("\"finish_reason\":{\"type\":\"length\"}"), Just("é🦀"), Just("\u{feff}"), Just("null"), Just("\\\""),
            Just("event: a"), Just("1"),
        ], 0..30),
        cuts in proptest::collection::vec(any::<usize>(), 0..40),
    ) {
        let text = pieces.concat();
        for grammar in [Grammar::Events, Grammar::Lines] {
            let whole = scanned(grammar, Words::Common, text.as_bytes(), &[]);
            let cut = scanned(grammar, Words::Common, text.as_bytes(), &cuts);
            prop_assert_eq!(seen(&whole), seen(&cut));
        }
    }

    #[test]
    fn every_byte_alone_sees_the_same(lf in any::<bool>()) {
        let text = if lf { CHAT.to_owned() } else { CHAT.replace('\n', "\r\n") };
        let every: Vec<usize> = (0..text.len()).collect();
        let cut = scanned(Grammar::Events, Words::Common, text.as_bytes(), &every);
        prop_assert_eq!(seen(&cut), seen(&events(CHAT)));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), cuts in proptest::collection::vec(any::<usize>(), 0..20)) {
        for (grammar, words) in [(Grammar::Events, Words::Common), (Grammar::Lines, Words::Ollama), (Grammar::Document, Words::Common)] {
            let _ = seen(&scanned(grammar, words, &bytes, &cuts));
        }
    }
}

/// By hand, in release mode: what an event of the usual size costs. The proxy spends some ten
/// microseconds an event on system calls.
#[test]
#[ignore = "a measurement"]
#[allow(clippy::print_stderr)]
fn cost_of_an_event() {
    const ROUNDS: u32 = 1_000_000;
    let event = format!(
        "data: {{\"id\":\"{}\",\"object\":\"chat.completion.chunk\",\"created\":1790000000,\"model\":\"deepseek-v4-pro\",\"choices\":[{{\"index\":0,\"delta\":{{\"reasoning_content\":null,\"content\":\" token\"}},\"logprobs\":null,\"finish_reason\":null,\"matched_stop\":null}}]}}\n\n",
        "0123456789abcdef".repeat(2)
    );
    let mut scanner = Scanner::new(Grammar::Events, Words::Common);
    let since = tokio::time::Instant::now();
    for _ in 0..ROUNDS {
        scanner.scan(std::hint::black_box(event.as_bytes()));
    }
    eprintln!("{} ns an event of {} bytes", (since.elapsed() / ROUNDS).as_nanos(), event.len());
    assert_eq!(scanner.events(), u64::from(ROUNDS));
}
