//! D10: very many pieces, very many streams, and a reader that has stopped.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::CHAT;
use crate::harness::alone::Process;
use crate::harness::client::{Client, End, get, post};
use crate::harness::engine::{EVENTS, Engine, LAST, chunk};
use crate::harness::front::eventually;

const MIB: u64 = 1 << 20;

#[test]
fn d10_a_million_chunks_of_one_byte_cost_no_more_than_their_bytes() {
    const BYTES: usize = 1_000_000;
    let text: Vec<u8> = b"data: x\n\n".iter().copied().cycle().take(BYTES).collect();
    let wire: Vec<u8> = text.iter().flat_map(|&byte| chunk([byte])).collect();
    let engine = Engine::start(move |connection| {
        connection.request();
        connection.send(EVENTS);
        connection.send(&wire);
        connection.send(LAST);
        connection.until_closed();
    });
    let (process, addr) = Process::alone(engine.addr, &[]);
    let (memory, cpu) = (process.memory(), process.cpu());
    let answer = Client::connect(addr).send(post(CHAT, "{}")).answer();
    let (memory, cpu) = (process.memory().saturating_sub(memory), process.cpu().saturating_sub(cpu));
    assert_eq!((answer.end, answer.body == text), (End::Complete, true));
    // A wake-up, a read and a write for each byte would take some ten seconds.
    assert!(cpu < Duration::from_secs(4), "{cpu:?} for {BYTES} chunks");
    assert!(memory < 4 * MIB, "{} KiB more", memory / 1024);
}

#[test]
fn d10_a_reader_that_stalls_holds_the_engine_back_and_nothing_else() {
    const EVENT: usize = 16 * 1024;
    const EVENTS_SENT: u64 = 8 * 1024;
    let sent = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&sent);
    let event = format!("data: {}\n\n", "x".repeat(EVENT - 8));
    let piece = chunk(&event);
    let engine = Engine::start(move |connection| {
        if connection.index == 0 {
            connection.request();
            connection.send([EVENTS.as_bytes(), &piece, LAST].concat());
            connection.close();
            return;
        }
        connection.request();
        connection.send(EVENTS);
        for _ in 0..EVENTS_SENT {
            connection.send(&piece);
            count.fetch_add(1, Relaxed);
        }
        connection.send(LAST);
        connection.until_closed();
    });
    let (process, addr) = Process::alone(engine.addr, &[]);
    // What the first stream of all takes is not this one's.
    assert_eq!(Client::ask(addr, post(CHAT, "{}")).end, End::Complete);
    let memory = process.memory();
    let mut stalled = Client::connect(addr);
    stalled.send(post(CHAT, "{}")).until("data: ");
    // The kernel's buffers take some megabytes, and then the engine waits.
    let (mut last, mut unchanged) = (0, 0);
    eventually("the engine is held back", || {
        let before = std::mem::replace(&mut last, sent.load(Relaxed));
        unchanged = if last == before { unchanged + 1 } else { 0 };
        unchanged >= 100
    });
    assert!(last < EVENTS_SENT / 2, "{last} events of {EVENTS_SENT} were taken from the engine");
    let grown = process.memory().saturating_sub(memory);
    // A quarter is promised; what the process takes at once for other things is not told from it.
    assert!(grown < MIB / 2, "{} KiB more for one stalled reader", grown / 1024);
    // Others do not notice.
    assert_eq!(Client::ask(addr, get("/live")).status, 200);
    // And it gets all of it, once it reads.
    let answer = stalled.answer();
    assert_eq!((answer.end, answer.body.len()), (End::Complete, EVENT * EVENTS_SENT as usize));
}

#[test]
fn d10_bodies_that_the_engine_does_not_take_stay_with_their_clients() {
    const UPLOADS: usize = 16;
    const BODY: usize = 32 * MIB as usize;
    let engine = TcpListener::bind("127.0.0.1:0").unwrap();
    let (process, addr) = Process::alone(engine.local_addr().unwrap(), &[]);
    let memory = process.memory();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: {BODY}\r\n\r\n");
    let sent = Arc::new(AtomicU64::new(0));
    let uploads: Vec<_> = (0..UPLOADS)
        .map(|_| {
            let (mut client, sent, head) = (TcpStream::connect(addr).unwrap(), Arc::clone(&sent), head.clone());
            std::thread::spawn(move || {
                client.write_all(head.as_bytes()).unwrap();
                let (piece, mut left) = (vec![b'x'; 64 * 1024], BODY);
                while left > 0 {
                    // It breaks off when the engine goes.
                    let Ok(written) = client.write(&piece[..left.min(piece.len())]) else { return };
                    left -= written;
                    sent.fetch_add(written as u64, Relaxed);
                }
            })
        })
        .collect();
    // Taken by nobody's hand, read by nobody.
    let untouched: Vec<_> = (0..UPLOADS).map(|_| engine.accept().unwrap()).collect();
    let (mut last, mut unchanged) = (0, 0);
    eventually("the clients are held back", || {
        let before = std::mem::replace(&mut last, sent.load(Relaxed));
        unchanged = if last == before { unchanged + 1 } else { 0 };
        unchanged >= 100
    });
    let each = process.memory().saturating_sub(memory) / UPLOADS as u64;
    // Half a MiB is promised; measured are 0.48, and 0.74 where a body is read on while its last piece waits.
    assert!(each < MIB * 5 / 8, "{} KiB an upload", each / 1024);
    drop((untouched, engine));
    for upload in uploads {
        upload.join().unwrap();
    }
}

/// An engine of one thread, at a pace of its own, that keeps any number of streams, each an event behind the other.
#[allow(clippy::disallowed_methods)] // its pace is what the test is about
fn many_streams(streams: usize, rounds: usize) -> SocketAddr {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(4096).unwrap();
    let listener = TcpListener::from(socket);
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut open: Vec<TcpStream> = Vec::new();
        for _ in 0..streams {
            // The request is on its way, or will be: what it says is of no interest.
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(EVENTS.as_bytes()).unwrap();
            open.push(stream);
        }
        for round in 0..rounds {
            let event = chunk(format!("data: {round}\n\n"));
            for stream in &mut open {
                stream.write_all(&event).unwrap();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        for stream in &mut open {
            stream.write_all(LAST).unwrap();
        }
        // The proxy keeps some of them for what comes next, until it ends.
        for stream in &mut open {
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    addr
}

/// Opens so many slow streams at once and reads them to their ends; bytes of memory and time on a
/// processor that each took of the proxy.
fn slow_streams(streams: usize, rounds: usize) -> (u64, Duration) {
    let engine = many_streams(streams, rounds);
    let max = format!("limits.max={streams}");
    let (process, addr) = Process::alone(engine, &["--set", &max, "--set", "limits.queue=20000"]);
    let (memory, cpu) = (process.memory(), process.cpu());
    let mut clients: Vec<TcpStream> = Vec::new();
    for _ in 0..streams {
        let mut client = TcpStream::connect(addr).unwrap();
        client.write_all(post(CHAT, "{\"stream\":true}").as_bytes()).unwrap();
        clients.push(client);
    }
    // All have had their first event: all are open.
    let mut texts = vec![String::new(); streams];
    for (client, text) in clients.iter_mut().zip(&mut texts) {
        client.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
        read_until(client, text, "data: 0\n\n");
    }
    let memory = process.memory().saturating_sub(memory) / streams as u64;
    for (client, text) in clients.iter_mut().zip(&mut texts) {
        read_until(client, text, "\r\n0\r\n\r\n");
        for round in 0..rounds {
            assert_eq!(text.matches(&format!("data: {round}\n\n")).count(), 1, "{text:?}");
        }
    }
    let events = u32::try_from(streams * rounds).unwrap();
    (memory, (process.cpu().saturating_sub(cpu)) / events)
}

fn read_until(client: &mut TcpStream, text: &mut String, what: &str) {
    let mut buffer = [0; 4096];
    while !text.contains(what) {
        match client.read(&mut buffer) {
            Ok(0) => panic!("the stream ended before {what:?}: {text:?}"),
            Ok(read) => text.push_str(std::str::from_utf8(&buffer[..read]).unwrap()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("{error} before {what:?}: {text:?}"),
        }
    }
}

#[test]
fn d10_a_thousand_slow_streams_take_little_each() {
    let (memory, cpu) = slow_streams(1000, 10);
    println!("{memory} bytes a stream, {cpu:?} an event");
    assert!(memory <= 16 * 1024, "{memory} bytes a stream");
    // Of a debug build on a busy machine; measured in docs/performance.md.
    assert!(cpu < Duration::from_millis(1), "{cpu:?} an event");
}

#[test]
#[ignore = "takes 18,000 descriptors of each process"]
fn d10_nine_thousand_slow_streams_take_little_each() {
    let (memory, cpu) = slow_streams(9000, 10);
    println!("{memory} bytes a stream, {cpu:?} an event");
    assert!(memory <= 16 * 1024, "{memory} bytes a stream");
}
