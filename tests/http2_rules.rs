//! The musts of RFC 9113 for a server, on raw frames: what must end a connection, what a stream, what
//! nothing at all. h2spec's list, as a table of our own.

use crate::harness::engine::{EVENTS, Engine, LAST, chunk, json};
use crate::harness::front::Front;
use crate::harness::hpack;
use crate::harness::http2::{
    ACK, COMPRESSION_ERROR, CONTINUATION, Client, DATA, END_HEADERS, END_STREAM, End, FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR, GOAWAY, Goodbye, HEADERS, NO_ERROR, PADDED, PING, PREFACE, PRIORITISED, PRIORITY, PROTOCOL_ERROR,
    PUSH_PROMISE, REFUSED_STREAM, RST_STREAM, SETTINGS, STREAM_CLOSED, WINDOW_UPDATE, fields, frame, get, headers,
    ping, post, reset, settings, window_update,
};

const CHAT: &str = "/v1/chat/completions";

/// What must come of some bytes.
#[derive(Debug, Clone, Copy)]
enum Must {
    /// The connection ends: GOAWAY with one of these reasons. What RFC 9113 calls a stream error may be
    /// treated so too (§5.4.1), where the reason is right.
    End(&'static [u32]),
    /// Stream 1 is reset for one of these reasons; the connection goes on.
    Reset(&'static [u32]),
    /// Stream 1 is reset, or the connection ended, for one of these reasons.
    Refuse(&'static [u32]),
    /// Stream 1 is answered with this status.
    Answer(u16),
    /// Nothing: the connection goes on.
    Pass,
}
use Must::{Answer, End as Ends, Pass, Refuse, Reset};

struct Rule {
    section: &'static str,
    what: &'static str,
    bytes: Vec<u8>,
    must: Must,
}

fn rule(section: &'static str, what: &'static str, bytes: Vec<u8>, must: Must) -> Rule {
    Rule { section, what, bytes, must }
}

fn bytes(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// The block of a good GET.
fn block() -> Vec<u8> {
    hpack::block(&[(":method", "GET"), (":scheme", "http"), (":path", "/health"), (":authority", "a")])
}

fn open(stream: u32) -> Vec<u8> {
    headers(stream, 0, &fields(CHAT, &[]))
}

fn frames_in_general() -> Vec<Rule> {
    let many = |count: usize| vec![b'x'; count];
    vec![
        rule("4.1", "a frame of an unknown kind", frame(0x16, 0xff, 0, "12345678"), Pass),
        rule(
            "4.1",
            "flags that mean nothing",
            bytes(&[&frame(PING, 0xfe, 0, "12345678"), &get(1, "/health")]),
            Answer(200),
        ),
        rule("4.1", "the reserved bit", frame(PING, 0, 1 << 31, "12345678"), Pass),
        rule("4.2", "a large DATA frame", bytes(&[&open(1), &frame(DATA, END_STREAM, 1, many(16_384))]), Answer(200)),
        rule(
            "4.2",
            "a DATA frame that is too large",
            bytes(&[&open(1), &frame(DATA, 0, 1, many(16_385))]),
            Ends(&[FRAME_SIZE_ERROR]),
        ),
        rule(
            "4.2",
            "HEADERS that are too large",
            frame(HEADERS, END_HEADERS, 1, many(16_385)),
            Ends(&[FRAME_SIZE_ERROR]),
        ),
        rule("4.2", "SETTINGS that are too large", frame(SETTINGS, 0, 0, many(16_386)), Ends(&[FRAME_SIZE_ERROR])),
        rule(
            "4.3",
            "a block that is no HPACK",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, [0xff; 8]),
            Ends(&[COMPRESSION_ERROR, PROTOCOL_ERROR]),
        ),
        rule(
            "4.3",
            "a block that is cut",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &block()[..20]),
            Ends(&[COMPRESSION_ERROR, PROTOCOL_ERROR]),
        ),
        rule(
            "4.3",
            "an index of no entry",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, [0xf0]),
            Ends(&[COMPRESSION_ERROR, PROTOCOL_ERROR]),
        ),
        rule(
            "4.3",
            "a table larger than allowed",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, bytes(&[&[0x3f, 0xff, 0xff, 0x03], &block()])),
            Ends(&[COMPRESSION_ERROR, PROTOCOL_ERROR]),
        ),
        rule(
            "4.3",
            "another frame within a block",
            bytes(&[&frame(HEADERS, END_STREAM, 1, block()), &ping()]),
            Ends(&[PROTOCOL_ERROR]),
        ),
        rule(
            "4.3",
            "another kind within a block",
            bytes(&[&frame(HEADERS, END_STREAM, 1, block()), &frame(0x16, 0, 0, "")]),
            Ends(&[PROTOCOL_ERROR]),
        ),
        rule(
            "4.3",
            "another stream's frame within a block",
            bytes(&[&frame(HEADERS, END_STREAM, 1, block()), &frame(CONTINUATION, END_HEADERS, 3, "")]),
            Ends(&[PROTOCOL_ERROR]),
        ),
    ]
}

fn streams() -> Vec<Rule> {
    let done = get(1, "/health");
    vec![
        rule("5.1", "DATA on an idle stream", frame(DATA, END_STREAM, 1, "x"), Ends(&[PROTOCOL_ERROR])),
        rule("5.1", "RST_STREAM on an idle stream", reset(1, NO_ERROR), Ends(&[PROTOCOL_ERROR])),
        rule("5.1", "WINDOW_UPDATE on an idle stream", window_update(1, 1), Ends(&[PROTOCOL_ERROR])),
        rule(
            "5.1",
            "CONTINUATION on an idle stream",
            frame(CONTINUATION, END_HEADERS, 1, block()),
            Ends(&[PROTOCOL_ERROR]),
        ),
        rule("5.1", "PRIORITY on an idle stream", frame(PRIORITY, 0, 1, [0, 0, 0, 0, 1]), Pass),
        // h2 ends the connection here, with the reason of an unexpected frame.
        rule(
            "5.1",
            "DATA behind the stream's end",
            bytes(&[&post(1, "/v1/embeddings", "{}"), &frame(DATA, 0, 1, "x")]),
            Refuse(&[STREAM_CLOSED, PROTOCOL_ERROR]),
        ),
        rule(
            "5.1",
            "HEADERS behind the stream's end",
            bytes(&[&post(1, "/v1/embeddings", "{}"), &headers(1, END_STREAM, &[("x", "y")])]),
            Refuse(&[STREAM_CLOSED, PROTOCOL_ERROR]),
        ),
        rule(
            "5.1",
            "CONTINUATION behind the stream's end",
            bytes(&[&post(1, "/v1/embeddings", "{}"), &frame(CONTINUATION, END_HEADERS, 1, "")]),
            Ends(&[STREAM_CLOSED, PROTOCOL_ERROR]),
        ),
        rule("5.1", "WINDOW_UPDATE behind the stream's end", bytes(&[&done, &window_update(1, 1)]), Answer(200)),
        rule("5.1", "RST_STREAM twice", bytes(&[&open(1), &reset(1, NO_ERROR), &reset(1, NO_ERROR)]), Pass),
        rule(
            "5.1",
            "DATA behind a reset",
            bytes(&[&open(1), &reset(1, NO_ERROR), &frame(DATA, 0, 1, "x")]),
            Refuse(&[STREAM_CLOSED, PROTOCOL_ERROR]),
        ),
        rule(
            "5.1",
            "HEADERS behind a reset",
            bytes(&[&open(1), &reset(1, NO_ERROR), &open(1)]),
            Refuse(&[STREAM_CLOSED, PROTOCOL_ERROR]),
        ),
        rule("5.1.1", "an even stream", headers(2, END_STREAM, &fields(CHAT, &[])), Ends(&[PROTOCOL_ERROR])),
        rule(
            "5.1.1",
            "a stream older than the last",
            bytes(&[&get(5, "/health"), &get(3, "/health")]),
            Ends(&[PROTOCOL_ERROR, STREAM_CLOSED]),
        ),
        rule("5.1.1", "streams with gaps", bytes(&[&get(1, "/health"), &get(1001, "/health")]), Answer(200)),
        rule(
            "5.3.1",
            "a stream that depends on itself",
            frame(PRIORITY, 0, 1, [0, 0, 0, 1, 1]),
            Refuse(&[PROTOCOL_ERROR]),
        ),
        rule(
            "5.3.1",
            "HEADERS that depend on themselves",
            frame(HEADERS, END_HEADERS | END_STREAM | PRIORITISED, 1, bytes(&[&[0, 0, 0, 1, 1], &block()])),
            Refuse(&[PROTOCOL_ERROR]),
        ),
        rule(
            "5.5",
            "an unknown kind on a stream",
            bytes(&[&open(1), &frame(0x16, 0, 1, "x"), &frame(DATA, END_STREAM, 1, "{}")]),
            Answer(200),
        ),
    ]
}

fn frames_of_each_kind() -> Vec<Rule> {
    let padded = |kind, flags, pad: u8, payload: &[u8], padding: usize| {
        frame(kind, PADDED | flags, 1, bytes(&[&[pad], payload, &vec![0; padding]]))
    };
    vec![
        rule("6.1", "DATA on stream 0", frame(DATA, 0, 0, "x"), Ends(&[PROTOCOL_ERROR])),
        rule("6.1", "padded DATA", bytes(&[&open(1), &padded(DATA, END_STREAM, 9, b"{}", 9)]), Answer(200)),
        rule(
            "6.1",
            "more padding than DATA",
            bytes(&[&open(1), &padded(DATA, END_STREAM, 9, b"{}", 0)]),
            Ends(&[PROTOCOL_ERROR]),
        ),
        rule(
            "6.2",
            "HEADERS on stream 0",
            frame(HEADERS, END_HEADERS | END_STREAM, 0, block()),
            Ends(&[PROTOCOL_ERROR]),
        ),
        rule(
            "6.2",
            "padded HEADERS with a priority",
            frame(
                HEADERS,
                END_HEADERS | END_STREAM | PADDED | PRIORITISED,
                1,
                bytes(&[&[3, 0, 0, 0, 0, 9], &block(), &[0; 3]]),
            ),
            Answer(200),
        ),
        rule(
            "6.2",
            "more padding than HEADERS",
            padded(HEADERS, END_HEADERS | END_STREAM, 255, &block(), 0),
            Ends(&[PROTOCOL_ERROR]),
        ),
        rule("6.3", "PRIORITY on stream 0", frame(PRIORITY, 0, 0, [0, 0, 0, 1, 1]), Ends(&[PROTOCOL_ERROR])),
        rule("6.3", "PRIORITY of a wrong length", frame(PRIORITY, 0, 1, [0; 4]), Refuse(&[FRAME_SIZE_ERROR])),
        rule("6.4", "RST_STREAM on stream 0", reset(0, NO_ERROR), Ends(&[PROTOCOL_ERROR])),
        rule(
            "6.4",
            "RST_STREAM of a wrong length",
            bytes(&[&open(1), &frame(RST_STREAM, 0, 1, [0; 3])]),
            Ends(&[FRAME_SIZE_ERROR]),
        ),
        rule("6.5", "SETTINGS on a stream", frame(SETTINGS, 0, 1, ""), Ends(&[PROTOCOL_ERROR])),
        rule("6.5", "an acknowledgement with settings", frame(SETTINGS, ACK, 0, [0; 6]), Ends(&[FRAME_SIZE_ERROR])),
        rule("6.5", "half a setting", frame(SETTINGS, 0, 0, [0; 3]), Ends(&[FRAME_SIZE_ERROR])),
        rule("6.5.2", "ENABLE_PUSH of 2", settings(&[(2, 2)]), Ends(&[PROTOCOL_ERROR])),
        rule("6.5.2", "a window that is too large", settings(&[(4, 1 << 31)]), Ends(&[FLOW_CONTROL_ERROR])),
        rule("6.5.2", "frames that are too small", settings(&[(5, 16_383)]), Ends(&[PROTOCOL_ERROR])),
        rule("6.5.2", "frames that are too large", settings(&[(5, 1 << 24)]), Ends(&[PROTOCOL_ERROR])),
        rule("6.5.2", "an unknown setting", settings(&[(0xff, 1)]), Pass),
        rule(
            "6.5.3",
            "an acknowledgement of nothing",
            bytes(&[&frame(SETTINGS, ACK, 0, ""), &frame(SETTINGS, ACK, 0, "")]),
            Ends(&[PROTOCOL_ERROR]),
        ),
        rule(
            "6.6",
            "PUSH_PROMISE",
            bytes(&[&open(1), &frame(PUSH_PROMISE, END_HEADERS, 1, bytes(&[&[0, 0, 0, 2], &block()]))]),
            Ends(&[PROTOCOL_ERROR]),
        ),
        rule("6.7", "PING on a stream", frame(PING, 0, 1, "12345678"), Ends(&[PROTOCOL_ERROR])),
        rule("6.7", "PING of a wrong length", frame(PING, 0, 0, "1234567"), Ends(&[FRAME_SIZE_ERROR])),
        rule("6.7", "an answer to no PING", frame(PING, ACK, 0, "12345678"), Pass),
        rule("6.8", "GOAWAY on a stream", frame(GOAWAY, 0, 1, [0; 8]), Ends(&[PROTOCOL_ERROR])),
        rule("6.8", "GOAWAY of a wrong length", frame(GOAWAY, 0, 0, [0; 7]), Ends(&[FRAME_SIZE_ERROR])),
        rule("6.9", "WINDOW_UPDATE of nothing on the connection", window_update(0, 0), Ends(&[PROTOCOL_ERROR])),
        rule(
            "6.9",
            "WINDOW_UPDATE of nothing on a stream",
            bytes(&[&open(1), &window_update(1, 0)]),
            Refuse(&[PROTOCOL_ERROR]),
        ),
        rule("6.9", "WINDOW_UPDATE of a wrong length", frame(WINDOW_UPDATE, 0, 0, [0; 3]), Ends(&[FRAME_SIZE_ERROR])),
        rule(
            "6.9.1",
            "a connection's window that overflows",
            window_update(0, (1 << 31) - 1),
            Ends(&[FLOW_CONTROL_ERROR]),
        ),
        rule(
            "6.9.1",
            "a stream's window that overflows",
            bytes(&[&open(1), &window_update(1, (1 << 31) - 1)]),
            Reset(&[FLOW_CONTROL_ERROR]),
        ),
        rule(
            "6.9.2",
            "a window that overflows by settings",
            bytes(&[&open(1), &window_update(1, (1 << 31) - 1 - 65_535), &settings(&[(4, 65_536)])]),
            Ends(&[FLOW_CONTROL_ERROR]),
        ),
        rule(
            "6.10",
            "CONTINUATION on stream 0",
            bytes(&[&frame(HEADERS, END_STREAM, 1, block()), &frame(CONTINUATION, END_HEADERS, 0, "")]),
            Ends(&[PROTOCOL_ERROR]),
        ),
        rule(
            "6.10",
            "CONTINUATION behind a whole head",
            bytes(&[&open(1), &frame(CONTINUATION, END_HEADERS, 1, "")]),
            Ends(&[PROTOCOL_ERROR]),
        ),
        rule(
            "6.10",
            "CONTINUATION behind DATA",
            bytes(&[&open(1), &frame(DATA, 0, 1, "x"), &frame(CONTINUATION, END_HEADERS, 1, "")]),
            Ends(&[PROTOCOL_ERROR]),
        ),
        rule("6.10", "a head in several pieces", pieces(), Answer(200)),
    ]
}

fn messages() -> Vec<Rule> {
    let with = |more: &[(&str, &str)]| headers(1, END_STREAM, &fields(CHAT, more));
    let trailers =
        |fields: &[(&str, &str)], flags| bytes(&[&open(1), &frame(DATA, 0, 1, "{}"), &headers(1, flags, fields)]);
    vec![
        rule("8.1", "trailers that do not end the stream", trailers(&[("x", "y")], 0), Refuse(&[PROTOCOL_ERROR])),
        rule("8.1", "trailers", trailers(&[("x", "y")], END_STREAM), Answer(200)),
        rule(
            "8.1",
            "trailers with a connection's field",
            trailers(&[("transfer-encoding", "chunked")], END_STREAM),
            Refuse(&[PROTOCOL_ERROR]),
        ),
        rule(
            "8.1.1",
            "less DATA than the length",
            bytes(&[&headers(1, 0, &fields(CHAT, &[("content-length", "3")])), &frame(DATA, END_STREAM, 1, "{}")]),
            Reset(&[PROTOCOL_ERROR]),
        ),
        rule(
            "8.1.1",
            "a length and trailers without DATA",
            bytes(&[&headers(1, 0, &fields(CHAT, &[("content-length", "3")])), &headers(1, END_STREAM, &[("x", "y")])]),
            Reset(&[PROTOCOL_ERROR]),
        ),
        rule("8.2", "an upper-case name", with(&[("X-Upper", "y")]), Refuse(&[PROTOCOL_ERROR])),
        rule("8.2.1", "a line's end in a value", with(&[("x", "y\r\nz: w")]), Refuse(&[PROTOCOL_ERROR])),
        rule("8.2.1", "a value in spaces", with(&[("x", " y ")]), Reset(&[PROTOCOL_ERROR])),
        rule("8.2.2", "connection", with(&[("connection", "keep-alive")]), Reset(&[PROTOCOL_ERROR])),
        rule("8.2.2", "te that is not trailers", with(&[("te", "gzip")]), Reset(&[PROTOCOL_ERROR])),
        rule("8.2.2", "te: trailers", with(&[("te", "trailers")]), Answer(200)),
        rule("8.2.3", "cookies in pieces", with(&[("cookie", "a=1"), ("cookie", "b=2")]), Answer(200)),
        rule("8.3", "an unknown pseudo-header", with(&[(":wish", "y")]), Refuse(&[PROTOCOL_ERROR])),
        rule("8.3.1", "a method twice", with(&[(":method", "POST")]), Reset(&[PROTOCOL_ERROR])),
        rule(
            "8.5",
            "CONNECT with a path",
            headers(1, END_STREAM, &[(":method", "CONNECT"), (":path", "/"), (":authority", "a:1")]),
            Reset(&[PROTOCOL_ERROR]),
        ),
        rule("8.7", "a stream given up", bytes(&[&open(1), &reset(1, 8)]), Pass),
        rule(
            "9.1",
            "a goodbye of the client's",
            bytes(&[&get(1, "/health"), &frame(GOAWAY, 0, 0, [0; 8])]),
            Answer(200),
        ),
    ]
}

/// A head in as many pieces as may be.
fn pieces() -> Vec<u8> {
    let block = block();
    let mut out = frame(HEADERS, END_STREAM, 1, &block[..5]);
    for piece in block[5..].chunks(block.len() / 4) {
        out.extend(frame(CONTINUATION, 0, 1, piece));
    }
    out.extend(frame(CONTINUATION, END_HEADERS, 1, ""));
    out
}

fn check(front: &Front, rule: &Rule) -> Result<(), String> {
    let mut client = Client::connect(front.addr);
    client.send(&rule.bytes);
    let wrong = |what: String| Err(format!("{} {}: {what}", rule.section, rule.what));
    let reasons = match rule.must {
        Pass => return if client.is_alive() { Ok(()) } else { wrong(format!("{:?}", client.goodbye())) },
        Answer(status) => {
            let answer = client.answer(1);
            let good = (answer.status, answer.end) == (status, End::Complete);
            return if good { Ok(()) } else { wrong(format!("{answer:?} {:?}", client.goaways)) };
        }
        Ends(reasons) => {
            return match client.goodbye() {
                Goodbye::Goaway(_, reason) if reasons.contains(&reason) => Ok(()),
                other => wrong(format!("{other:?}")),
            };
        }
        Reset(reasons) | Refuse(reasons) => reasons,
    };
    match (client.answer(1).end, rule.must) {
        (End::Reset(reason), _) if reasons.contains(&reason) => {}
        (End::Gone, Refuse(_)) if client.goaways.last().is_some_and(|(_, reason)| reasons.contains(reason)) => {
            return Ok(());
        }
        (end, _) => return wrong(format!("{end:?} {:?}", client.goaways)),
    }
    if client.is_alive() { Ok(()) } else { wrong(format!("{:?}", client.goodbye())) }
}

#[test]
fn each_must_of_rfc_9113_is_kept() {
    let engine = Engine::start(|connection| {
        while let Some(head) = connection.request() {
            if head.contains("embeddings") {
                return connection.until_closed();
            }
            connection.send(json("200 OK", "{}"));
        }
    });
    let front = Front::of(&engine);
    let rules = [frames_in_general(), streams(), frames_of_each_kind(), messages()];
    let rules: Vec<Rule> = rules.into_iter().flatten().collect();
    assert!(rules.len() >= 80, "{} rules", rules.len());
    let wrong: Vec<String> = rules.iter().filter_map(|rule| check(&front, rule).err()).collect();
    assert!(wrong.is_empty(), "{} of {} rules are broken:\n{}", wrong.len(), rules.len(), wrong.join("\n"));
    front.holds(0, 0);
}

// ------------------------------------------------------------------ what a table cannot say

fn quick() -> Engine {
    Engine::answering(json("200 OK", "{\"ok\":true}"))
}

/// The payloads of a stream's DATA so far, each a frame.
fn data(client: &mut Client, stream: u32) -> Vec<u8> {
    client.until(|frame| frame.kind == DATA && frame.stream == stream).expect("DATA").payload
}

#[test]
fn section_3_4_settings_come_first_from_both_sides() {
    let front = Front::of(&quick());
    let mut client = Client::bare(front.addr);
    client.send(PREFACE);
    assert_eq!(client.frame().unwrap().kind, SETTINGS, "ours come first, and wait for nobody's");
    for first in [ping(), frame(SETTINGS, ACK, 0, ""), get(1, "/health"), frame(0x16, 0, 0, ""), window_update(0, 1)] {
        let mut client = Client::bare(front.addr);
        client.send(bytes(&[PREFACE, &first]));
        assert_eq!(client.goodbye_reason(), Some(PROTOCOL_ERROR), "{first:?}");
    }
    // A request may come before any of ours is known.
    let mut client = Client::bare(front.addr);
    client.send(bytes(&[PREFACE, &settings(&[]), &get(1, "/health")]));
    assert_eq!(client.answer(1).status, 200);
}

#[test]
fn section_5_1_2_one_stream_more_than_allowed_is_refused_and_the_others_live() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.until_closed();
    });
    let limits = sglangd::link::ProxySettings { queue: 256, ..crate::harness::front::settings() };
    let front = Front::with(&engine, limits, sglangd::proxy::Timings::default());
    let mut client = Client::bare(front.addr);
    client.send(bytes(&[PREFACE, &settings(&[])]));
    let ours = client.until(|frame| frame.kind == SETTINGS && frame.flags & ACK == 0).unwrap();
    let limit = ours.payload.chunks(6).find(|setting| setting[..2] == [0, 3]).unwrap();
    assert_eq!(limit[2..], 100_u32.to_be_bytes());
    for n in 0..100 {
        // Without a place: the queue holds them.
        client.send(headers(2 * n + 1, 0, &fields(CHAT, &[])));
    }
    front.holds(32, 68);
    client.send(headers(201, 0, &fields(CHAT, &[])));
    assert_eq!(client.answer(201).end, End::Reset(REFUSED_STREAM));
    client.send(reset(1, NO_ERROR));
    assert!(client.is_alive());
    client.send(get(203, "/health"));
    assert_eq!(client.answer(203).status, 200);
}

#[test]
fn section_6_5_3_settings_are_acknowledged_and_obeyed_at_once() {
    let front = Front::of(&quick());
    let mut client = Client::connect(front.addr).starved();
    for _ in 0..3 {
        client.send(settings(&[(4, 1)]));
        assert!(client.until(|frame| frame.kind == SETTINGS && frame.flags & ACK != 0).is_some());
    }
    client.send(settings(&[(4, 0), (4, 2)])).send(post(1, CHAT, "{}"));
    assert_eq!(data(&mut client, 1), b"{\"", "the last value is the one that holds");
}

#[test]
fn section_6_9_2_a_window_may_be_changed_and_even_be_negative() {
    let front = Front::of(&quick());
    let mut client = Client::with(front.addr, &[(4, 0)]).starved();
    client.send(post(1, CHAT, "{}"));
    assert_eq!(client.of_stream(1).unwrap().kind, HEADERS, "a head needs no window");
    client.send(settings(&[(4, 1)]));
    assert_eq!(data(&mut client, 1), b"{");
    client.send(settings(&[(4, 3)]));
    assert_eq!(data(&mut client, 1), b"\"o");
    // Three are spent of two: one is owed.
    client.send(settings(&[(4, 2)])).send(window_update(1, 1));
    assert!(client.is_alive());
    client.send(window_update(1, 2));
    assert_eq!(data(&mut client, 1), b"k\"");
    client.send(window_update(1, 100));
    let rest = client.answer(1);
    assert_eq!((rest.end, rest.text().as_str()), (End::Complete, ":true}"));
}

#[test]
fn section_6_9_the_connections_window_is_obeyed_over_all_streams() {
    let engine = Engine::answering(bytes(&[b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n", &vec![b'x'; 60_000]]));
    let front = Front::of(&engine);
    let mut client = Client::with(front.addr, &[(4, 1 << 20)]).starved();
    client.send(post(1, CHAT, "{}")).send(post(3, CHAT, "{}"));
    let mut seen = 0;
    while seen < 65_535 {
        let frame = client.until(|frame| frame.kind == DATA).unwrap();
        assert!(frame.payload.len() <= 16_384, "a frame larger than the client takes");
        seen += frame.payload.len();
    }
    assert_eq!(seen, 65_535);
    assert!(client.is_quiet(std::time::Duration::from_millis(100)));
    client.send(window_update(0, 60_000));
    while seen < 120_000 {
        seen += client.until(|frame| frame.kind == DATA).unwrap().payload.len();
    }
}

#[test]
fn section_6_9_1_more_data_than_the_window_is_refused() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.until_closed();
    });
    let limits = sglangd::link::ProxySettings { max: 1, ..crate::harness::front::settings() };
    let front = Front::with(&engine, limits, sglangd::proxy::Timings::default());
    let mut client = Client::connect(front.addr);
    client.send(open(1));
    front.holds(1, 0);
    // It waits for a place, and nobody takes its body.
    client.send(open(3));
    front.holds(1, 1);
    for _ in 0..16 {
        client.send(frame(DATA, 0, 3, vec![b'x'; 16_384]));
    }
    assert!(client.is_alive());
    client.send(frame(DATA, 0, 3, "x"));
    assert_eq!(client.answer(3).end, End::Reset(FLOW_CONTROL_ERROR));
    front.holds(1, 0);
    assert!(client.is_alive());
}

#[test]
fn section_6_8_streams_end_behind_a_clients_goodbye() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(bytes(&[EVENTS.as_bytes(), &chunk("data: [DONE]\n\n"), LAST]));
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(bytes(&[&post(1, CHAT, "{}"), &frame(GOAWAY, 0, 0, [0; 8])]));
    assert_eq!(client.answer(1).end, End::Complete);
    assert_eq!(client.goodbye(), Goodbye::Goaway(1, NO_ERROR));
}

#[test]
fn section_10_5_1_a_head_over_the_limit_is_431_and_the_table_stays_in_step() {
    let front = Front::of(&quick());
    let mut client = Client::connect(front.addr);
    let large = "x".repeat(14_000);
    let mut block = hpack::block(&fields("/health", &[]));
    block.extend(hpack::indexed_literal("x-kept", "yes"));
    let more: Vec<u8> = (0..5).flat_map(|_| hpack::literal("x-large", &large)).collect();
    let mut head = frame(HEADERS, END_STREAM, 1, &block);
    for piece in more.chunks(16_000) {
        head.extend(frame(CONTINUATION, 0, 1, piece));
    }
    head.extend(frame(CONTINUATION, END_HEADERS, 1, ""));
    client.send(head);
    assert_eq!(client.answer(1).status, 431);
    // The entry that came with it can be referred to.
    let mut block = hpack::block(&[(":method", "GET"), (":scheme", "http"), (":path", "/health"), (":authority", "a")]);
    block.push(0x80 | 0x3e);
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 3, block));
    assert_eq!(client.answer(3).status, 200);
}
