//! The clients of the soak: each kind a loop on a thread of its own, that ends when it is told to.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;
use tokio::time::Instant;

use super::judge::{Asked, Outcome, Tally, judge, judge_body, refused};
use crate::harness::client::{Client, End, post_with};
use crate::harness::http2 as h2;
use crate::harness::scene::{CHAT, stream_body};

/// Longer than anything may be silent: a stream has a comment each 15 s, a whole answer waits in the queue.
const SILENCE: Duration = Duration::from_mins(3);
/// A reader that takes nothing is cut after a minute.
pub const STALL: Duration = Duration::from_secs(75);

pub const STEADY: &str = "sk-steady";
pub const FLOOD: &str = "sk-flood";

/// What all clients share.
#[derive(Debug)]
pub struct Field {
    pub addr: SocketAddr,
    pub tally: Mutex<Tally>,
    /// When a client that did nothing wrong was harmed, and how.
    pub harm: Mutex<Vec<(Instant, &'static str, Outcome)>>,
    /// What must never be.
    pub wrong: Mutex<Vec<String>>,
    pub over: AtomicBool,
}

impl Field {
    pub fn new(addr: SocketAddr) -> Self {
        Self {
            addr,
            tally: Mutex::default(),
            harm: Mutex::default(),
            wrong: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Relaxed)
    }

    fn note(&self, kind: &'static str, outcome: Result<Outcome, String>) {
        match outcome {
            Ok(outcome) => self.tally.lock().unwrap().count(kind, outcome),
            Err(what) => self.wrong.lock().unwrap().push(format!("{kind}: {what}")),
        }
    }

    /// The same of a client whose every request should be answered.
    fn note_steady(&self, kind: &'static str, outcome: Result<Outcome, String>) {
        if let Ok(outcome) = outcome
            && outcome.is_harm()
        {
            self.harm.lock().unwrap().push((Instant::now(), kind, outcome));
        }
        self.note(kind, outcome);
    }

    fn connect(&self) -> Client {
        Client::connect(self.addr).patient(SILENCE)
    }

    /// A pause, in pieces so that the end is not waited for.
    #[allow(clippy::disallowed_methods)] // the clients' own pace
    fn rest(&self, pause: Duration) {
        let end = Instant::now() + pause;
        while Instant::now() < end && !self.is_over() {
            std::thread::sleep(Duration::from_millis(50).min(pause));
        }
    }
}

fn with_key(path: &str, key: &str, body: &str) -> String {
    post_with(path, &format!("Authorization: Bearer {key}\r\n"), body)
}

fn whole_body(tokens: u32) -> String {
    json!({"model": "small", "max_tokens": tokens, "ignore_eos": true, "messages": [{"role": "user", "content": "hi"}]})
        .to_string()
}

/// One kind of client.
pub type Kind = fn(&Field, &mut StdRng);

/// All clients: a name for their threads, what they do, and how many of them there are.
pub const CROWD: [(&str, Kind, usize); 9] = [
    ("streams", streams, 4),
    ("whole answers", wholes, 2),
    ("messages", messages, 1),
    ("http2", http2, 2),
    ("leavers", leavers, 3),
    ("short stalls", short_stalls, 1),
    ("long stalls", long_stalls, 1),
    ("floods", floods, 1),
    ("half requests", half_requests, 1),
];

/// Starts all of them.
pub fn start(field: &std::sync::Arc<Field>, seed: u64) -> Vec<std::thread::JoinHandle<()>> {
    let mut started = Vec::new();
    for (name, kind, count) in CROWD {
        for n in 0..count {
            let (field, number) = (std::sync::Arc::clone(field), started.len() as u64);
            let thread = std::thread::Builder::new().name(format!("{name} {n}"));
            let run = move || {
                let mut rng = StdRng::seed_from_u64(seed.wrapping_add(number));
                while !field.is_over() {
                    kind(&field, &mut rng);
                }
            };
            started.push(thread.spawn(run).unwrap());
        }
    }
    started
}

/// Asks again and again on one connection, for as long as that may be kept.
fn asks(field: &Field, rng: &mut StdRng, kind: &'static str, mut request: impl FnMut(&mut StdRng) -> (String, Asked)) {
    let mut client = field.connect();
    for _ in 0..20 {
        if field.is_over() {
            return;
        }
        let (request, asked) = request(rng);
        let Some(answer) = client.send(request).any_answer() else {
            field.note_steady(kind, Err("the connection ended without an answer".into()));
            return;
        };
        field.note_steady(kind, judge(&answer, asked));
        if answer.end != End::Complete || answer.header("connection") == Some("close") {
            return;
        }
        field.rest(Duration::from_millis(rng.random_range(0..600)));
    }
}

fn streams(field: &Field, rng: &mut StdRng) {
    asks(field, rng, "stream", |rng| {
        let tokens = rng.random_range(5..200);
        (with_key(CHAT, STEADY, &stream_body(tokens)), Asked::Stream(tokens))
    });
}

fn wholes(field: &Field, rng: &mut StdRng) {
    asks(field, rng, "whole", |rng| {
        let tokens = rng.random_range(2..60);
        (with_key(CHAT, STEADY, &whole_body(tokens)), Asked::Whole(tokens))
    });
}

fn messages(field: &Field, rng: &mut StdRng) {
    asks(field, rng, "messages", |rng| {
        let tokens = rng.random_range(5..120);
        let body = stream_body(tokens);
        (with_key("/v1/messages", STEADY, &body), Asked::Messages(tokens))
    });
}

/// Three streams at a time on one connection, one of which may be reset in the middle.
fn http2(field: &Field, rng: &mut StdRng) {
    let mut client = h2::Client::on(field.connect()).greet(&[]);
    let key = format!("Bearer {STEADY}");
    for round in 0..10 {
        if field.is_over() {
            return;
        }
        let open: Vec<(u32, u32)> = (0..3).map(|n| (2 * (3 * round + n) + 1, rng.random_range(5..150))).collect();
        for (stream, tokens) in &open {
            client.send(h2::headers(*stream, 0, &h2::fields(CHAT, &[("authorization", &key)])));
            client.send(h2::frame(h2::DATA, h2::END_STREAM, *stream, stream_body(*tokens)));
        }
        let left = rng.random_bool(0.3).then_some(open[0].0);
        if let Some(stream) = left {
            field.rest(Duration::from_millis(rng.random_range(0..800)));
            client.send(h2::reset(stream, h2::CANCEL));
            field.note("http2", Ok(Outcome::Left));
        }
        for (stream, tokens) in open {
            if Some(stream) == left {
                continue;
            }
            let answer = client.answer(stream);
            let complete = answer.end == h2::End::Complete;
            let outcome = match answer.status {
                0 => Err(format!("no answer but {:?}", answer.end)),
                200 => judge_body(&answer.text(), complete, Asked::Stream(tokens)),
                status => refused(status, complete, answer.field("retry-after").is_some(), &answer.body),
            };
            field.note_steady("http2", outcome);
            if answer.end == h2::End::Gone {
                return;
            }
        }
        field.rest(Duration::from_millis(rng.random_range(0..400)));
    }
}

/// Goes at any moment, in any way.
fn leavers(field: &Field, rng: &mut StdRng) {
    let mut client = field.connect();
    let request = with_key(CHAT, STEADY, &stream_body(rng.random_range(50..2000)));
    match rng.random_range(0..4) {
        // In the middle of its own request.
        0 => _ = client.send(&request[..rng.random_range(1..request.len())]),
        // In the queue, in prefill or later.
        1 => {
            client.send(&request);
            field.rest(Duration::from_millis(rng.random_range(0..300)));
        }
        _ => {
            client.send(&request);
            // A refusal has no token: what comes first is enough.
            client.bytes(1);
            field.rest(Duration::from_millis(rng.random_range(0..1500)));
        }
    }
    match rng.random_range(0..3) {
        0 => drop(client),
        1 => client.rst(),
        _ => {
            // Half of an end: nothing more will be asked, and nobody listens for long.
            client.fin();
            field.rest(Duration::from_millis(100));
        }
    }
    field.note("leaver", Ok(Outcome::Left));
    field.rest(Duration::from_millis(rng.random_range(0..500)));
}

/// Reads nothing for some seconds, and then all: it gets all.
fn short_stalls(field: &Field, rng: &mut StdRng) {
    let tokens = rng.random_range(200..400);
    let mut client = field.connect();
    client.send(with_key(CHAT, STEADY, &stream_body(tokens)));
    field.rest(Duration::from_millis(rng.random_range(500..8000)));
    let outcome = client.any_answer().ok_or_else(|| "the connection ended without an answer".to_owned());
    field.note_steady("short stall", outcome.and_then(|answer| judge(&answer, Asked::Stream(tokens))));
}

/// Reads nothing for longer than that is borne, of an answer that no buffer holds: it is cut, and looks so.
fn long_stalls(field: &Field, rng: &mut StdRng) {
    // Each event repeats the whole text: some twenty megabytes.
    let body = json!({"text": "hi", "stream": true, "sampling_params": {"max_new_tokens": 3500, "ignore_eos": true}});
    let mut client = field.connect();
    client.send(with_key("/generate", STEADY, &body.to_string()));
    field.rest(STALL + Duration::from_secs(rng.random_range(0..20)));
    if field.is_over() {
        return;
    }
    let outcome = match client.any_answer() {
        None => Err("the connection ended without an answer".to_owned()),
        Some(answer) if answer.status != 200 => judge(&answer, Asked::Stream(0)),
        Some(answer) if answer.end == End::Complete || answer.text().contains("[DONE]") => {
            Err(format!("{} bytes that look complete", answer.body.len()))
        }
        Some(_) => Ok(Outcome::Broken),
    };
    field.note("long stall", outcome);
}

/// A hundred connections at once, of a key that has little: each is answered, one way or the other.
fn floods(field: &Field, rng: &mut StdRng) {
    let mut clients: Vec<Client> = (0..100).map(|_| field.connect()).collect();
    for client in &mut clients {
        client.send(with_key(CHAT, FLOOD, &stream_body(5)));
    }
    for mut client in clients {
        let outcome = client.any_answer().ok_or_else(|| "the connection ended without an answer".to_owned());
        field.note("flood", outcome.and_then(|answer| judge(&answer, Asked::Stream(5))));
    }
    field.rest(Duration::from_secs(rng.random_range(5..15)));
}

/// Half a request, and then nothing: told so after ten seconds.
fn half_requests(field: &Field, rng: &mut StdRng) {
    let request = with_key(CHAT, STEADY, &stream_body(5));
    let mut client = field.connect();
    client.send(&request[..rng.random_range(1..40)]);
    let outcome = match client.any_answer() {
        Some(answer) if answer.status == 408 => judge(&answer, Asked::Stream(0)),
        other => Err(format!("no 408 but {other:?}")),
    };
    field.note("half request", outcome);
}
