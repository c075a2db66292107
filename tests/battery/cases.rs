//! What is sent, and what must hold whoever stands in between.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use super::servers::Server;
use crate::harness::client::{get, head, post, post_with};
use crate::harness::engine::{Connection, EVENTS, Engine, LAST, chunk, json};
use crate::harness::front::eventually;
use crate::harness::malformed::{self, Bar, ROWS, chunked};

const CHAT: &str = "/v1/chat/completions";

pub struct Case {
    pub id: &'static str,
    pub what: String,
    pub run: Box<dyn Fn(Server) -> Result<(), String>>,
}

fn case(id: &'static str, what: &str, run: impl Fn(Server) -> Result<(), String> + 'static) -> Case {
    Case { id, what: what.to_owned(), run: Box::new(run) }
}

fn ensure(holds: bool, what: impl Into<String>) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what.into()) }
}

/// How a connection stands after an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    Open,
    Fin,
    Rst,
}

/// A client that takes whatever comes.
struct Talk {
    stream: TcpStream,
    got: Vec<u8>,
}

impl Talk {
    fn to(addr: SocketAddr) -> Self {
        Self { stream: TcpStream::connect(addr).unwrap(), got: Vec::new() }
    }

    fn say(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        let _ = self.stream.write_all(bytes.as_ref());
        self
    }

    /// Reads until the end, or until nothing has come for `quiet`.
    fn hear(&mut self, quiet: Duration) -> Stand {
        self.stream.set_read_timeout(Some(quiet)).unwrap();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Stand::Fin,
                Ok(read) => self.got.extend_from_slice(&buffer[..read]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Stand::Open;
                }
                Err(_) => return Stand::Rst,
            }
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.got).into_owned()
    }

    /// The status codes of all answers so far.
    fn statuses(&self) -> Vec<u16> {
        let text = self.text();
        text.match_indices("HTTP/1.").filter_map(|(at, _)| text.get(at + 9..at + 12)?.parse().ok()).collect()
    }
}

const QUIET: Duration = Duration::from_millis(700);

fn everything(engine: &Engine) -> String {
    (0..engine.connections()).map(|n| engine.text(n)).collect()
}

/// It must not reach the engine, and must not be answered as if it had.
fn refused(id: &'static str, what: &str, bytes: impl Into<Vec<u8>>) -> Case {
    let bytes = bytes.into();
    case(id, what, move |server| {
        let engine = Engine::answering(json("200 OK", "{}"));
        let running = server.start(engine.addr);
        let mut talk = Talk::to(running.addr);
        talk.say(&bytes).hear(QUIET);
        ensure(everything(&engine).is_empty(), "passed it to the engine")?;
        ensure(talk.statuses().iter().all(|status| *status >= 400), format!("answered {:?}", talk.statuses()))
    })
}

/// A body that is malformed must never look whole to the engine.
fn never_whole(id: &'static str, what: &str, body: String) -> Case {
    case(id, what, move |server| {
        let engine = Engine::start(|connection| {
            connection.head();
            connection.until_closed();
        });
        let running = server.start(engine.addr);
        let mut talk = Talk::to(running.addr);
        talk.say(chunked(&body)).hear(QUIET);
        let seen = everything(&engine);
        ensure(!seen.contains("\r\n0\r\n") && !seen.contains("\n0\n"), "ended the body as if it were whole")
    })
}

/// Any engine, any exchange.
fn with(
    script: impl Fn(&mut Connection) + Send + Sync + 'static,
    server: Server,
    talk: impl Fn(&Engine, &mut Talk) -> Result<(), String>,
) -> Result<(), String> {
    let engine = Engine::start(script);
    let running = server.start(engine.addr);
    talk(&engine, &mut Talk::to(running.addr))
}

fn answers(answer: impl Into<Vec<u8>>) -> impl Fn(&mut Connection) + Send + Sync + 'static {
    let answer = answer.into();
    move |connection| {
        while connection.request().is_some() {
            connection.send(&answer);
        }
    }
}

fn within(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let since = Instant::now();
    let mut held = holds();
    while !held && since.elapsed() < limit {
        #[allow(clippy::disallowed_methods)] // a test's bounded wait, on a thread of its own
        std::thread::sleep(Duration::from_millis(5));
        held = holds();
    }
    held
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for row in ROWS {
        let everybodys = malformed::of(row).into_iter().filter(|malformed| malformed.bar == Bar::Any);
        cases.extend(everybodys.map(|malformed| refused(row, &malformed.what, malformed.bytes)));
    }
    cases.extend(bodies());
    cases.extend(behaviour());
    cases.extend(streams());
    // Rows in their order, and each row's cases in theirs.
    cases.sort_by_key(|case| case.id);
    cases
}

fn bodies() -> Vec<Case> {
    let mut cases = Vec::new();
    for body in malformed::bodies() {
        let shown = format!("chunk {:?}", &body[..body.len().min(16)]);
        cases.push(never_whole("A06", &shown, body));
    }
    cases.push(case("A07", "trailers that forge headers", |server| {
        let trailers = "Content-Length: 99\r\nAuthorization: Bearer x\r\nHost: evil\r\nConnection: close\r\n";
        with(answers(json("200 OK", "{}")), server, |engine, talk| {
            talk.say(chunked(&format!("2\r\n{{}}\r\n0\r\n{trailers}\r\n"))).hear(QUIET);
            let seen = everything(engine).to_lowercase();
            ensure(!seen.contains("evil") && !seen.contains("bearer"), "passed them on")
        })
    }));
    cases
}

fn behaviour() -> Vec<Case> {
    vec![
        case("A09", "a request behind one that asks for an upgrade", |server| {
            with(answers(json("200 OK", "{}")), server, |engine, talk| {
                let upgrade = post_with(CHAT, "Connection: upgrade\r\nUpgrade: foo\r\n", "{}");
                talk.say(format!("{upgrade}{}", get("/flush_cache"))).hear(QUIET);
                ensure(!everything(engine).contains("/flush_cache"), "tunnelled it to the engine")
            })
        }),
        case("A09", "101 that nobody asked for", |server| {
            let switch = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: foo\r\nConnection: upgrade\r\n\r\n";
            with(answers(switch), server, |_, talk| {
                talk.say(post(CHAT, "{}")).hear(QUIET);
                ensure(!talk.statuses().contains(&101), "relayed it")
            })
        }),
        case("A10", "an answer before the body", |server| {
            let early = |connection: &mut Connection| {
                connection.head();
                connection.send(json("417 Expectation Failed", "{}"));
                connection.until_closed();
            };
            with(early, server, |_, talk| {
                talk.say(format!(
                    "POST {CHAT} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1000\r\n\r\n"
                ));
                let stand = talk.hear(Duration::from_secs(3));
                ensure(
                    talk.statuses().last() == Some(&417) && stand != Stand::Open,
                    format!("{:?}, {stand:?}", talk.statuses()),
                )
            })
        }),
        case("A11", "a connection with an unread body is not used again", |server| {
            let early = |connection: &mut Connection| {
                connection.head();
                connection.send(json("400 Bad Request", "{}"));
                connection.until_closed();
            };
            with(early, server, |engine, talk| {
                talk.say(format!(
                    "POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 500000\r\n\r\n{}",
                    "x".repeat(1000)
                ));
                talk.hear(QUIET);
                talk.say(get("/v1/models")).hear(QUIET);
                ensure(!everything(engine).contains("/v1/models"), "took it for the rest of a body, or of a connection")
            })
        }),
        case("A13", "HEAD answered with a body", |server| {
            with(answers("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"), server, |_, talk| {
                talk.say(head("HEAD /v1/models HTTP/1.1", "Host: a\r\n")).hear(QUIET);
                ensure(!talk.text().contains("hello"), "passed the body on")?;
                talk.say(get("/v1/models")).hear(QUIET);
                ensure(talk.statuses() == [200, 200], format!("the next answer: {:?}", talk.statuses()))
            })
        }),
        case("A13", "204 with a body", |server| {
            with(answers("HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello"), server, |_, talk| {
                talk.say(post(CHAT, "{}")).hear(QUIET);
                ensure(talk.statuses() == [204] && !talk.text().contains("hello"), "passed the body on")
            })
        }),
        case("A15", "Connection: authorization", |server| {
            with(answers(json("200 OK", "{}")), server, |engine, talk| {
                let fields = "Connection: authorization, x-api-key\r\nAuthorization: Bearer k\r\nX-Api-Key: k\r\n";
                talk.say(post_with(CHAT, fields, "{}")).hear(QUIET);
                let seen = everything(engine).to_lowercase();
                ensure(seen.contains("authorization: bearer k") && seen.contains("x-api-key: k"), "stripped them")
            })
        }),
        case("A16", "a forged address", |server| {
            with(answers(json("200 OK", "{}")), server, |engine, talk| {
                talk.say(post_with(CHAT, "X-Forwarded-For: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\n", "{}")).hear(QUIET);
                ensure(!everything(engine).contains("6.6.6.6"), "passed it on")
            })
        }),
        case("A18", "pipelined requests, one at a time", |server| {
            let (release, gate) = channel::<()>();
            let gate = Arc::new(Mutex::new(gate));
            let held = move |connection: &mut Connection| {
                while connection.request().is_some() {
                    let _ = gate.lock().unwrap().recv();
                    connection.send(json("200 OK", "{}"));
                }
            };
            with(held, server, |engine, talk| {
                talk.say(post(CHAT, "{}").repeat(50));
                talk.hear(QUIET);
                let begun = everything(engine).matches("POST ").count();
                for _ in 0..50 {
                    let _ = release.send(());
                }
                talk.hear(QUIET);
                ensure(begun == 1, format!("{begun} were begun"))?;
                ensure(talk.statuses().len() == 50, format!("{} answers", talk.statuses().len()))
            })
        }),
        case("A19", "a head that does not come", |server| {
            with(answers(json("200 OK", "{}")), server, |_, talk| {
                let stand = talk.say("GET /v1/models HTTP/1.1\r\nHost: ").hear(Duration::from_secs(14));
                ensure(stand != Stand::Open, "still waits after 14 s")
            })
        }),
        case("D01", "the second request meets the end of a kept connection", |server| {
            let dies = |connection: &mut Connection| {
                connection.request();
                connection.send(json("200 OK", "{}"));
                if connection.index > 0 {
                    connection.until_closed();
                } else {
                    connection.request();
                }
            };
            // nginx and haproxy were seen to connect once before: the engine's first connection may be that.
            with(dies, server, |_, talk| {
                talk.say(post(CHAT, "{}")).hear(QUIET);
                talk.say(post(CHAT, "{}")).hear(QUIET);
                ensure(talk.statuses() == [200, 200], format!("{:?}", talk.statuses()))
            })
        }),
    ]
}

fn streams() -> Vec<Case> {
    let thinks = |connection: &mut Connection| {
        connection.request();
        connection.until_closed();
    };
    let gone = |engine: &Engine| {
        let gone =
            within(Duration::from_secs(2), || engine.connections() > 0 && engine.closed() == engine.connections());
        ensure(gone, "the engine goes on")
    };
    let begun = |engine: &Engine| eventually("the engine has it", || everything(engine).contains("POST "));
    vec![
        case("D02", "an engine that dies in mid-stream", |server| {
            let dies = |connection: &mut Connection| {
                connection.request();
                connection.send(EVENTS);
                connection.send(chunk("data: one\n\n"));
                connection.close();
            };
            with(dies, server, |_, talk| {
                let stand = talk.say(post(CHAT, "{}")).hear(Duration::from_secs(3));
                ensure(stand != Stand::Open && !talk.text().ends_with("0\r\n\r\n"), "looks whole")
            })
        }),
        case("D02", "and its client is told so in words", |server| {
            let dies = |connection: &mut Connection| {
                connection.request();
                connection.send(EVENTS);
                connection.send(chunk("data: one\n\n"));
                connection.close();
            };
            with(dies, server, |_, talk| {
                talk.say(post(CHAT, "{\"stream\":true}")).hear(Duration::from_secs(3));
                ensure(talk.text().contains("\"error\""), "no error event")
            })
        }),
        case("D04", "a client that leaves in prefill", move |server| {
            with(thinks, server, |engine, talk| {
                talk.say(post(CHAT, "{}"));
                begun(engine);
                talk.stream.shutdown(Shutdown::Both).unwrap();
                gone(engine)
            })
        }),
        case("D04", "a client that leaves with a second request on its way", move |server| {
            with(thinks, server, |engine, talk| {
                talk.say(post(CHAT, "{}"));
                begun(engine);
                talk.say(post(CHAT, &"x".repeat(20_000)));
                talk.stream.shutdown(Shutdown::Write).unwrap();
                gone(engine)
            })
        }),
        case("D04", "a client that leaves in mid-stream", move |server| {
            let streams = |connection: &mut Connection| {
                connection.request();
                connection.send(EVENTS);
                connection.send(chunk("data: one\n\n"));
                connection.until_closed();
            };
            with(streams, server, |engine, talk| {
                talk.say(post(CHAT, "{}")).hear(QUIET);
                talk.stream.shutdown(Shutdown::Both).unwrap();
                gone(engine)
            })
        }),
        case("D06", "an event comes when it is said", |server| {
            let (release, gate) = channel::<()>();
            let gate = Arc::new(Mutex::new(gate));
            let stepped = move |connection: &mut Connection| {
                connection.request();
                connection.send(EVENTS);
                connection.send(chunk("data: one\n\n"));
                let _ = gate.lock().unwrap().recv();
                connection.send(LAST);
            };
            with(stepped, server, |_, talk| {
                talk.say(post(CHAT, "{}")).hear(QUIET);
                let came = talk.text().contains("data: one");
                let _ = release.send(());
                ensure(came, "it was held back")
            })
        }),
        case("D08", "an answer shorter than its length", |server| {
            let short = |connection: &mut Connection| {
                connection.request();
                connection.send("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort");
                connection.close();
            };
            with(short, server, |_, talk| {
                let stand = talk.say(post(CHAT, "{}")).hear(Duration::from_secs(3));
                ensure(stand != Stand::Open, "the client waits for ever")
            })
        }),
        case("D12", "Date, Server and CORS said twice", |server| {
            let twice = "HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nServer: a\r\n\
                         Server: a\r\nAccess-Control-Allow-Origin: *\r\nAccess-Control-Allow-Origin: *\r\nContent-Length: 2\r\n\r\n{}";
            with(answers(twice), server, |_, talk| {
                talk.say(post(CHAT, "{}")).hear(QUIET);
                let text = talk.text().to_lowercase();
                let once = |field: &str| text.matches(&format!("\r\n{field}:")).count() <= 1;
                ensure(["date", "server", "access-control-allow-origin"].into_iter().all(once), "passed both on")
            })
        }),
        case("G17", "garbage in place of an answer", |server| {
            with(answers("garbage\r\n\r\n"), server, |_, talk| {
                talk.say(post(CHAT, "{}")).hear(Duration::from_secs(3));
                ensure(talk.statuses().first().is_some_and(|status| *status >= 500), format!("{:?}", talk.statuses()))
            })
        }),
    ]
}
