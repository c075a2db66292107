//! Group B: what a hostile or unlucky client of HTTP/2 can do.

use std::time::Duration;

use crate::harness::alone::Process;
use crate::harness::client::{self, get as get1};
use crate::harness::engine::{Connection, EVENTS, Engine, LAST, chunk, json, stepped, thinking};
use crate::harness::front::{Front, eventually, patience, settings};
use crate::harness::hpack;
use crate::harness::http2::{
    self as h2, CANCEL, CONTINUATION, Client, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, End, GOAWAY, Goodbye,
    HEADERS, NO_ERROR, PING, PROTOCOL_ERROR, RST_STREAM, fields, frame, get, headers, ping, post, reset, window_update,
};

const CHAT: &str = "/v1/chat/completions";
const INITIAL_WINDOW_SIZE: u16 = 4;

// ------------------------------------------------------------------ B01, B06: resets

#[test]
fn b01_each_reset_frees_its_ticket_and_aborts_the_engine_call_once() {
    let engine = thinking();
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    for n in 0..50 {
        let stream = 2 * n + 1;
        client.send(post(stream, CHAT, "{}"));
        eventually("the request is with the engine", || engine.requests() == n as usize + 1);
        client.send(reset(stream, CANCEL));
        eventually("the engine's connection is closed", || engine.closed() == n as usize + 1);
        front.holds(0, 0);
    }
    assert_eq!(front.metric("sglangd_client_aborts_total"), Some(50.0));
    // Fifty are within the budget.
    client.send(get(1001, "/health"));
    assert_eq!(client.answer(1001).status, 200);
}

#[test]
fn b01_rapid_resets_end_the_connection_within_the_budget() {
    let engine = thinking();
    let front = Front::of(&engine);
    // At once, and each only when the one before has been seen.
    for pace in [50, 1] {
        let mut client = Client::connect(front.addr);
        let mut sent = 0;
        while client.goaways.is_empty() {
            let flood: Vec<u8> = (0..pace)
                .flat_map(|n| {
                    let stream = 2 * (sent + n) + 1;
                    [post(stream, CHAT, "{}"), reset(stream, CANCEL)].concat()
                })
                .collect();
            sent += pace;
            assert!(sent < 5_000, "no end after {sent} resets");
            if !client.pours(&flood) || !client.is_alive() {
                break;
            }
        }
        let Goodbye::Goaway(_, reason) = client.goodbye() else { panic!("no GOAWAY after {sent} resets") };
        assert_eq!(reason, ENHANCE_YOUR_CALM);
        assert!((200..=450).contains(&sent), "{sent} resets passed");
        front.holds(0, 0);
    }
    assert_eq!(front.metric("sglangd_http2_floods_total"), Some(2.0));
    eventually("the engine's connections are closed", || engine.closed() == engine.connections());
    assert_eq!(client::Client::ask(front.addr, get1("/health")).status, 200);
}

/// A request that is broken, on the given stream.
type Broken = fn(u32) -> Vec<u8>;

#[test]
fn b06_resets_that_a_client_forces_out_of_us_are_counted_with_its_own() {
    let engine = thinking();
    let front = Front::of(&engine);
    // A window that overflows, DATA that disagrees with its length, a head that is malformed only to
    // us and one that is to h2, a stream that depends on itself.
    let broken: [(&str, Broken); 5] = [
        ("overflow", |stream| [post(stream, CHAT, "{}"), window_update(stream, (1 << 31) - 1)].concat()),
        ("length", |stream| {
            let head = headers(stream, 0, &fields(CHAT, &[("content-length", "1")]));
            [head, frame(DATA, 0, stream, "12")].concat()
        }),
        ("host", |stream| headers(stream, END_STREAM, &fields(CHAT, &[("host", "other")]))),
        ("connection", |stream| headers(stream, END_STREAM, &fields(CHAT, &[("connection", "close")]))),
        ("dependency", |stream| {
            let block = hpack::block(&fields(CHAT, &[]));
            let payload = [&stream.to_be_bytes()[..], &[16], &block].concat();
            frame(HEADERS, END_HEADERS | END_STREAM | h2::PRIORITISED, stream, payload)
        }),
    ];
    for (how, broken) in broken {
        let mut client = Client::connect(front.addr);
        let mut stream = 1;
        // Half of the budget by our own hand.
        for _ in 0..100 {
            client.send(post(stream, CHAT, "{}")).send(reset(stream, CANCEL));
            assert!(client.is_alive(), "{how}");
            stream += 2;
        }
        let mut forced = 0;
        while client.goaways.is_empty() && forced < 400 {
            client.send(broken(stream));
            stream += 2;
            forced += 1;
            if !client.is_alive() {
                break;
            }
        }
        let Goodbye::Goaway(_, reason) = client.goodbye() else { panic!("{how}: no GOAWAY") };
        assert_eq!(reason, ENHANCE_YOUR_CALM, "{how}");
        assert!((100..200).contains(&forced), "{how}: {forced} passed");
        front.holds(0, 0);
    }
}

// ------------------------------------------------------------------ B02: floods

/// Memory of this process that is in use, in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn b02_frames_that_ask_for_work_and_are_none_end_the_connection() {
    let engine = thinking();
    let front = Front::of(&engine);
    let floods: [(&str, Vec<u8>); 8] = [
        ("SETTINGS", h2::settings(&[])),
        ("SETTINGS that change the table", h2::settings(&[(1, 0), (1, 4096), (INITIAL_WINDOW_SIZE, 70_000)])),
        ("PING", ping()),
        ("PING ACK", frame(PING, h2::ACK, 0, b"12345678")),
        ("empty DATA", frame(DATA, 0, 1, "")),
        ("PRIORITY", frame(h2::PRIORITY, 0, 5, [0, 0, 0, 3, 16])),
        ("an unknown kind", frame(0xbe, 0, 0, "????")),
        ("WINDOW_UPDATE", window_update(0, 1)),
    ];
    for (what, bytes) in floods {
        let mut client = Client::connect(front.addr);
        client.send(headers(1, 0, &fields(CHAT, &[])));
        front.holds(1, 0);
        let before = resident();
        // Twenty budgets.
        client.pours(&bytes.repeat(20_000));
        assert_eq!(client.goodbye_reason(), Some(ENHANCE_YOUR_CALM), "{what}");
        front.holds(0, 0);
        assert!(resident().saturating_sub(before) < 32 * 1024, "{what}: {} KiB more", resident() - before);
    }
}

/// A flood leaves nothing: what the tenth of a kind takes, the first has taken already.
#[test]
fn b02_floods_leave_memory_as_it_was() {
    let engine = thinking();
    let (process, addr) = Process::alone(engine.addr, &["--set", "limits.workers=1"]);
    let floods = |times: usize| {
        for _ in 0..times {
            for bytes in [
                h2::settings(&[]),
                ping(),
                frame(DATA, 0, 1, ""),
                [post(3, CHAT, "{}"), reset(3, CANCEL)].concat(),
                window_update(0, 1),
            ] {
                let mut client = Client::connect(addr);
                client.send(headers(1, 0, &fields(CHAT, &[])));
                client.pours(&bytes.repeat(5_000));
                client.goodbye();
            }
            let mut client = Client::connect(addr);
            client.send(frame(HEADERS, END_STREAM, 1, hpack::block(&fields(CHAT, &[]))));
            client.pours(&frame(CONTINUATION, 0, 1, hpack::block(&[("x", "y")])).repeat(5_000));
            client.goodbye();
        }
    };
    floods(2);
    let before = process.memory();
    floods(10);
    let grown = process.memory().saturating_sub(before);
    println!("sixty floods: {} KiB more than twelve", grown / 1024);
    // A leak of the pages of one flood would be some sixty times 100 KiB.
    assert!(grown < 1 << 20, "{} KiB more", grown / 1024);
    assert_eq!(client::Client::ask(addr, get1("/health")).status, 200);
}

#[test]
fn b02_what_an_ordinary_client_says_beside_its_requests_is_no_flood() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    for n in 0..1500 {
        let stream = 2 * n + 1;
        client.send(frame(h2::PRIORITY, 0, stream, [0, 0, 0, 0, 16])).send(post(stream, CHAT, "{}")).send(ping());
        assert_eq!(client.answer(stream).status, 200, "request {n}");
    }
    assert!(client.is_alive());
}

#[test]
fn b02_a_client_may_update_its_windows_for_each_event() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(EVENTS);
        for _ in 0..3000 {
            connection.send(chunk("data: x\n\n"));
        }
        connection.send(LAST);
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(1, CHAT, "{}"));
    // Hungry: two updates a frame.
    let answer = client.answer(1);
    assert_eq!((answer.end, answer.body.len()), (End::Complete, 3000 * 9));
    assert!(client.is_alive());
}

#[test]
fn b02_a_head_in_endless_pieces_ends_the_connection() {
    let engine = thinking();
    let front = Front::of(&engine);
    for piece in [Vec::new(), hpack::block(&[("x", "y")])] {
        let mut client = Client::connect(front.addr);
        let before = resident();
        client.send(frame(HEADERS, END_STREAM, 1, hpack::block(&fields(CHAT, &[]))));
        let more = frame(CONTINUATION, 0, 1, &piece).repeat(100);
        client.pours(&more.repeat(200));
        assert_eq!(client.goodbye_reason(), Some(ENHANCE_YOUR_CALM));
        assert!(resident().saturating_sub(before) < 32 * 1024);
    }
    assert_eq!(engine.connections(), 0);
}

#[test]
fn b02_a_head_that_swells_when_it_is_decoded_is_refused() {
    let engine = thinking();
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    let before = resident();
    // 4000 bytes in the table, then a byte for each time they are meant.
    let entry = hpack::indexed_literal("x-bomb", "b".repeat(4000));
    let good = hpack::block(&fields(CHAT, &[]));
    let head = |times: usize| [good.clone(), entry.clone(), vec![0xbe; times]].concat();
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, head(20)));
    let answer = client.answer(1);
    assert_eq!(answer.status, 431, "over the limit");
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 3, head(10_000)));
    assert_eq!(client.goodbye_reason(), Some(ENHANCE_YOUR_CALM), "over four times the limit");
    assert!(resident().saturating_sub(before) < 32 * 1024);
    assert_eq!(engine.connections(), 0);
}

// ------------------------------------------------------------------ B03, B04: what never becomes HTTP/1

#[test]
fn b03_malformed_requests_are_stream_errors_and_nothing_reaches_the_engine() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let (m, s, p, a) = ((":method", "POST"), (":scheme", "http"), (":path", CHAT), (":authority", "sglangd"));
    let with = |more: &[(&'static str, &'static str)]| [&[m, s, p, a], more].concat();
    for (what, fields) in [
        ("authority and host disagree", with(&[("host", "other")])),
        ("two hosts", with(&[("host", "sglangd"), ("host", "sglangd")])),
        ("neither authority nor host", vec![m, s, p]),
        ("an empty authority", vec![m, s, p, (":authority", "")]),
        ("a user in the authority", vec![m, s, p, (":authority", "root@sglangd")]),
        ("a path in the host", vec![m, s, p, ("host", "a/b")]),
        ("transfer-encoding", with(&[("transfer-encoding", "chunked")])),
        ("connection", with(&[("connection", "x-api-key")])),
        ("keep-alive", with(&[("keep-alive", "1")])),
        ("proxy-connection", with(&[("proxy-connection", "close")])),
        ("upgrade", with(&[("upgrade", "h2c")])),
        ("te", with(&[("te", "trailers, chunked")])),
        ("upper case", with(&[("X-Upper", "y")])),
        ("a name that is no token", with(&[("x y", "z")])),
        ("an empty name", with(&[("", "z")])),
        ("a colon in a name", with(&[("x:y", "z")])),
        ("CR and LF", with(&[("x", "a\r\nAuthorization: Bearer forged")])),
        ("LF", with(&[("x", "a\nb")])),
        ("NUL", with(&[("x", "a\0b")])),
        ("a space before", with(&[("x", " a")])),
        ("a tab behind", with(&[("x", "a\t")])),
        ("a late pseudo-header", vec![m, s, p, ("x", "y"), a]),
        ("a pseudo-header twice", vec![m, s, p, p, a]),
        ("an unknown pseudo-header", with(&[(":unknown", "x")])),
        ("one of an answer", vec![m, s, p, a, (":status", "200")]),
        ("no method", vec![s, p, a]),
        ("no scheme", vec![m, p, a]),
        ("no path", vec![m, s, a]),
        ("an empty path", vec![m, s, (":path", ""), a]),
        ("a space in the path", vec![m, s, (":path", "/v1/models HTTP/1.1"), a]),
        ("CR and LF in the path", vec![m, s, (":path", "/v1/models\r\nx: y"), a]),
        ("a path without root", vec![m, s, (":path", "v1/models"), a]),
        ("an absolute path", vec![m, s, (":path", "http://other/v1/models"), a]),
        ("an asterisk", vec![m, s, (":path", "*"), a]),
        ("more than ASCII in the path", vec![m, s, (":path", "/v1/mödels"), a]),
        ("CR and LF in the method", vec![(":method", "GET / HTTP/1.1\r\nx: y"), s, p, a]),
        ("CR and LF in the authority", vec![m, s, p, (":authority", "a\r\nx: y")]),
        ("protocol", with(&[(":protocol", "websocket")])),
        ("two lengths", with(&[("content-length", "0"), ("content-length", "0")])),
        ("two lengths that differ", with(&[("content-length", "0"), ("content-length", "1")])),
        ("a list of lengths", with(&[("content-length", "0, 0")])),
        ("a signed length", with(&[("content-length", "+0")])),
        ("an endless length", with(&[("content-length", "18446744073709551616")])),
    ] {
        let mut client = Client::connect(front.addr);
        client.send(headers(1, END_STREAM, &fields));
        let reason = match client.answer(1) {
            h2::Answer { status: 0, end: End::Reset(reason), .. } => reason,
            // What h2 cannot decode into fields at all is an error of the connection (RFC 9113 §5.4.1).
            h2::Answer { status: 0, end: End::Gone, .. } => client.goaways.last().map_or(u32::MAX, |goaway| goaway.1),
            answer => panic!("{what}: {answer:?}"),
        };
        assert_eq!(reason, PROTOCOL_ERROR, "{what}");
    }
    assert_eq!(engine.connections(), 0);
}

#[test]
fn b04_a_length_that_disagrees_with_the_data_aborts_the_engine_request() {
    for (what, length, pieces) in [
        ("more in one piece", "3", &[("1234", END_STREAM)][..]),
        ("more in the end", "3", &[("12", 0), ("34", END_STREAM)]),
        ("more behind the end", "3", &[("123", 0), ("4", END_STREAM)]),
        ("less", "3", &[("12", END_STREAM)]),
        ("nothing", "3", &[("", END_STREAM)]),
    ] {
        let engine = Engine::start(Connection::until_closed);
        let front = Front::of(&engine);
        let mut client = Client::connect(front.addr);
        client.send(headers(1, 0, &fields(CHAT, &[("content-length", length)])));
        eventually("the head is with the engine", || engine.requests() == 1);
        for (data, flags) in pieces {
            client.send(frame(DATA, *flags, 1, data));
        }
        let answer = client.answer(1);
        assert_eq!((answer.status, answer.end), (0, End::Reset(PROTOCOL_ERROR)), "{what}");
        eventually("the engine's connection is closed", || engine.closed() == 1);
        front.holds(0, 0);
        assert!(engine.text(0).split("\r\n\r\n").nth(1).unwrap().len() <= 3, "{what}: {}", engine.text(0));
        assert!(client.is_alive());
    }
    let engine = thinking();
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(headers(1, END_STREAM, &fields(CHAT, &[("content-length", "3")])));
    assert_eq!(client.answer(1).end, End::Reset(PROTOCOL_ERROR));
    assert_eq!(engine.connections(), 0);
}

// ------------------------------------------------------------------ B05: readers that stall

#[test]
fn b05_a_window_of_zero_for_ever_costs_one_stream_and_nobody_else() {
    let (engine, release) = stepped(|connection, gate| {
        let head = connection.request().unwrap();
        connection.send(EVENTS);
        if head.contains("x-stalls") {
            connection.send(chunk("data: one\n\n"));
        } else {
            while gate.pass() {
                connection.send(chunk("data: two\n\n"));
            }
            connection.send(LAST);
        }
        connection.until_closed();
    });
    let front = Front::with(&engine, settings(), patience(|patience| patience.write = Duration::from_millis(200)));
    let mut client = Client::with(front.addr, &[(INITIAL_WINDOW_SIZE, 0)]).starved();
    client.send(headers(1, 0, &fields(CHAT, &[("x-stalls", "1")]))).send(frame(DATA, END_STREAM, 1, "{}"));
    client.send(post(3, CHAT, "{}")).send(window_update(3, 1 << 30));
    while !client.has_come(1, RST_STREAM) {
        release.send(()).unwrap();
        client.until_text(3, "data: two\n\n");
    }
    let stalled = client.answer(1);
    assert_eq!((stalled.status, stalled.end, stalled.body.len()), (200, End::Reset(CANCEL), 0));
    eventually("the engine's connection is closed", || engine.closed() == 1);
    front.holds(1, 0);
    drop(release);
    assert_eq!(client.answer(3).end, End::Complete);
    front.holds(0, 0);
    assert_eq!(front.proxy.traffic().open_answers, 0);
}

#[test]
fn b05_what_waits_for_a_reader_is_bounded_and_the_engine_feels_it() {
    // Complete answers too: they hold no place, but they hold memory.
    for chunked in [true, false] {
        let engine = Engine::start(move |connection| {
            connection.request();
            connection.send(if chunked { EVENTS } else { "HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n" });
            let piece = vec![b'x'; 50_000];
            for _ in 0..1000 {
                if connection.is_broken() {
                    break;
                }
                if chunked { connection.send(chunk(&piece)) } else { connection.send(&piece) }
            }
        });
        let front = Front::with(&engine, settings(), patience(|patience| patience.write = Duration::from_millis(400)));
        let before = resident();
        let mut client = Client::with(front.addr, &[(INITIAL_WINDOW_SIZE, 0)]).starved();
        for stream in [1, 3, 5, 7] {
            client.send(post(stream, CHAT, "{}"));
        }
        front.holds(4, 0);
        for stream in [1, 3, 5, 7] {
            assert_eq!(client.answer(stream).end, End::Reset(CANCEL));
            // Two pieces of a read buffer each; fifty millions would be all of it.
            let passed = front.metric("sglangd_response_bytes_total").unwrap();
            assert!(passed <= 4.0 * 128.0 * 1024.0, "{passed} bytes were taken for readers that take none");
        }
        eventually("the engine felt it", || engine.broken() == 4);
        assert!(resident().saturating_sub(before) < 16 * 1024);
        front.holds(0, 0);
    }
}

#[test]
fn b05_a_small_answer_that_is_not_taken_is_cut_too() {
    let engine = Engine::answering(json("200 OK", "{\"whole\":true}"));
    let front = Front::with(&engine, settings(), patience(|patience| patience.write = Duration::from_millis(200)));
    let mut client = Client::with(front.addr, &[(INITIAL_WINDOW_SIZE, 0)]).starved();
    client.send(post(1, CHAT, "{}"));
    front.holds(0, 0);
    assert_eq!(client.answer(1).end, End::Reset(CANCEL));
    // And one that is taken slowly is not.
    client.send(post(3, CHAT, "{}"));
    assert_eq!(client.of_stream(3).unwrap().kind, HEADERS);
    for n in 0..14 {
        assert!(client.is_quiet(Duration::from_millis(40)), "cut after {n} bytes");
        client.send(window_update(3, 1));
        let byte = client.until(|frame| frame.stream == 3 && matches!(frame.kind, DATA | RST_STREAM)).unwrap();
        assert_eq!(byte.kind, DATA, "cut after {n} bytes");
    }
}

#[test]
fn b05_a_connection_that_reads_nothing_at_all_is_closed() {
    let engine = Engine::start(|connection| {
        connection.request();
        connection.send(EVENTS);
        let piece = vec![b'x'; 50_000];
        while !connection.is_broken() {
            connection.send(chunk(&piece));
        }
    });
    let front = Front::with(&engine, settings(), patience(|patience| patience.write = Duration::from_millis(300)));
    let mut client = Client::with(front.addr, &[(INITIAL_WINDOW_SIZE, (1 << 31) - 1)]).starved();
    client.send(window_update(0, (1 << 31) - 1 - 65_535)).send(post(1, CHAT, "{}"));
    eventually("the engine felt it", || engine.broken() == 1);
    front.holds(0, 0);
    eventually("the connection is gone", || front.metric("sglangd_http2_connections") == Some(0.0));
}

// ------------------------------------------------------------------ B07: drain

#[test]
fn b07_a_drain_says_goodbye_twice_and_lets_streams_end() {
    let (engine, release) = stepped(|connection, gate| {
        connection.request();
        connection.send(EVENTS);
        connection.send(chunk("data: one\n\n"));
        gate.pass();
        connection.send(chunk("data: [DONE]\n\n"));
        connection.send(LAST);
        connection.until_closed();
    });
    let front = Front::of(&engine);
    let mut client = Client::connect(front.addr);
    client.send(post(1, CHAT, "{}"));
    client.until_text(1, "data: one");
    front.proxy.drain();
    let first = client.until(|frame| frame.kind == GOAWAY).unwrap();
    assert_eq!(first.payload, [&0x7fff_ffff_u32.to_be_bytes()[..], &NO_ERROR.to_be_bytes()].concat());
    // A request that was on its way gets its answer in words, before the round trip is over.
    client.send(post(3, CHAT, "{}"));
    let late = client.answer(3);
    assert_eq!((late.status, late.code().as_str()), (503, "draining"));
    client.until_goaways(2);
    assert_eq!(client.goaways, [(0x7fff_ffff, NO_ERROR), (3, NO_ERROR)]);
    // One that comes later is ignored.
    client.send(post(5, CHAT, "{}"));
    release.send(()).unwrap();
    let answer = client.answer(1);
    assert_eq!((answer.end, answer.text().as_str()), (End::Complete, "data: [DONE]\n\n"));
    assert_eq!(client.goodbye(), Goodbye::Goaway(3, NO_ERROR));
    assert_eq!(engine.requests(), 1);
}

#[test]
fn b07_an_idle_connection_is_let_go_and_a_new_one_is_answered() {
    let engine = Engine::answering(json("200 OK", "{}"));
    let front = Front::of(&engine);
    let mut idle = Client::connect(front.addr);
    front.proxy.drain();
    assert_eq!(idle.goodbye(), Goodbye::Goaway(0, NO_ERROR));
    let mut late = Client::connect(front.addr);
    late.send(post(1, CHAT, "{}"));
    assert_eq!(late.answer(1).code(), "draining");
    assert_eq!(late.goodbye(), Goodbye::Goaway(1, NO_ERROR));
}
