//! The proxy's end of the link: messages down become calls, facts about traffic go up.
//!
//! The end of the link is the end of the proxy: it closes everything, so that the next sglangd can
//! bind. It judges nothing.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::{CERTIFICATE_LOOK, KEYS_LOOK, Listener, Proxy, ProxyError, Supervision, Timings};
use crate::link::{Down, LinkError, Traffic, Up, split};

/// How often the facts are looked at; sent when they changed.
const LOOK: Duration = Duration::from_millis(100);
/// The same while no request is open: an idle proxy wakes once a second, not ten times.
const AT_REST: Duration = Duration::from_secs(1);
/// How often they are sent when nothing changed.
const REPEAT: Duration = Duration::from_secs(1);
/// A supervisor says what it knows at once. One that does not is stuck, and clients are told so.
const FIRST_WORD: Duration = Duration::from_secs(1);

/// Why the proxy cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum End {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    #[error("the proxy cannot run: {0}")]
    Io(#[from] io::Error),
}

/// The data plane under a supervisor. Returns when the link ends, with everything closed.
pub fn linked(listeners: Vec<Listener>, link: UnixStream) -> Result<(), End> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let proxy = Proxy::new(Timings::default(), Supervision::Linked);
    match runtime.block_on(control(proxy, listeners, link)) {
        // A supervisor that dies with messages unread resets the link: that is its end too.
        Err(End::Link(LinkError::Io(error))) => {
            tracing::debug!(%error, "the link ended");
            Ok(())
        }
        outcome => outcome,
    }
}

async fn control(mut proxy: Proxy, listeners: Vec<Listener>, link: UnixStream) -> Result<(), End> {
    // A proxy that takes the place of a dead one must not answer 503 for want of news: connections
    // wait in the backlog until it has heard of the engine.
    let mut unheard = Some(listeners);
    let born = Instant::now();
    let (mut down, mut up) = split(link)?;
    let hello = Up::Hello { pid: std::process::id(), version: env!("CARGO_PKG_VERSION").to_owned() };
    up.send(&hello).await?;
    let (mut look_at, mut looked_at) = (Instant::now(), Instant::now());
    let (mut warned, mut certificate_seen) = (Vec::new(), Instant::now());
    let (mut sent, mut sent_at): (Option<Traffic>, Instant) = (None, Instant::now());
    let mut keys = KeysNews::default();
    loop {
        tokio::select! {
            message = down.next::<Down>() => {
                let Some(message) = message? else { return Ok(()) };
                proxy.hear();
                match message {
                    Down::Settings(settings) => {
                        if let Some(news) = keys.of(proxy.settings(settings))? {
                            up.send(&news).await?;
                        }
                    }
                    Down::Engine(view) => {
                        proxy.engine(view);
                        if let Some(listeners) = unheard.take() {
                            proxy.listen(listeners)?;
                        }
                        // At once, for a supervisor that waits for the last answer of an engine it replaces.
                        let traffic = proxy.traffic();
                        if sent.is_some_and(|sent| sent.closed != traffic.closed) {
                            up.send(&Up::Traffic(traffic)).await?;
                            (sent, sent_at) = (Some(traffic), Instant::now());
                        }
                    }
                    Down::Drain => {
                        proxy.drain();
                        // At once: the supervisor waits for a report that is newer than the drain.
                        let traffic = proxy.traffic();
                        up.send(&Up::Traffic(traffic)).await?;
                        (sent, sent_at) = (Some(traffic), Instant::now());
                    }
                    Down::CutStreams { reason } => proxy.cut_streams(reason),
                    Down::Scrape { id } => up.send(&Up::Scraped { id, text: proxy.metrics() }).await?,
                    Down::Recent { id } => up.send(&Up::Scraped { id, text: proxy.recent() }).await?,
                    Down::Heartbeat => {}
                }
            }
            // Never sooner than a busy proxy looks: clients that ask one after the other would else cost a
            // look and a report each, and fill the link of a supervisor that is slow to read.
            () = proxy.stirred() => look_at = looked_at + LOOK,
            () = sleep_until(look_at) => {
                looked_at = Instant::now();
                if certificate_seen.elapsed() >= CERTIFICATE_LOOK {
                    certificate_seen = Instant::now();
                    proxy.look_at_certificate();
                }
                if proxy.warnings() != warned {
                    warned = proxy.warnings().to_vec();
                    up.send(&Up::Warnings { warnings: warned.clone() }).await?;
                }
                if born.elapsed() >= FIRST_WORD && let Some(listeners) = unheard.take() {
                    proxy.listen(listeners)?;
                }
                if keys.looked_at.elapsed() >= KEYS_LOOK {
                    keys.looked_at = Instant::now();
                    if let Some(outcome) = proxy.look_at_keys()
                        && let Some(news) = keys.of(outcome)?
                    {
                        up.send(&news).await?;
                    }
                }
                let mut traffic = proxy.traffic();
                let rests = unheard.is_none() && is_idle(&traffic);
                if rests {
                    // First the wish to be woken, then the look: no request falls in between.
                    proxy.rest();
                    traffic = proxy.traffic();
                }
                look_at = Instant::now() + if rests { AT_REST } else { LOOK };
                if sent.is_none_or(|sent| changed(&sent, &traffic)) || sent_at.elapsed() >= REPEAT {
                    up.send(&Up::Traffic(traffic)).await?;
                    (sent, sent_at) = (Some(traffic), Instant::now());
                }
            }
        }
    }
}

/// What the supervisor was last told of the keys.
#[derive(Debug)]
struct KeysNews {
    looked_at: Instant,
    complaint: Option<String>,
}

impl Default for KeysNews {
    fn default() -> Self {
        Self { looked_at: Instant::now(), complaint: None }
    }
}

impl KeysNews {
    /// What there is to say about an attempt to read them. Errors of another kind are the proxy's end.
    fn of(&mut self, outcome: Result<(), ProxyError>) -> Result<Option<Up>, ProxyError> {
        let complaint = match outcome {
            Ok(()) => None,
            Err(ProxyError::Keys(error)) => Some(error.to_string()),
            Err(error) => return Err(error),
        };
        if complaint == self.complaint {
            return Ok(None);
        }
        self.complaint.clone_from(&complaint);
        Ok(Some(complaint.map_or(Up::Recovered, |reason| Up::Refused { reason })))
    }
}

/// Whether anything but the passing of time differs: an age that grew says nothing new, one that
/// did not is a byte or a request since.
fn is_idle(traffic: &Traffic) -> bool {
    traffic.in_flight == 0 && traffic.queued == 0 && traffic.open_answers == 0 && traffic.websockets == 0
}

fn changed(before: &Traffic, now: &Traffic) -> bool {
    let fresh = |before: Option<u64>, now: Option<u64>| match (before, now) {
        (Some(before), Some(now)) => now <= before,
        (before, now) => before != now,
    };
    let counts = |traffic: &Traffic| Traffic { last_byte_ms: None, last_request_ms: None, ..*traffic };
    counts(before) != counts(now)
        || fresh(before.last_byte_ms, now.last_byte_ms)
        || fresh(before.last_request_ms, now.last_request_ms)
}
