//! The other half: keeps one proxy process alive on the inherited listeners, and the link to it.
//!
//! It dies alone: a proxy that crashes costs the clients on it their connections and nothing else.
//! The listeners stay open here, so that connections wait in the backlog until the next one accepts.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::launch::spawner::Spawner;
use crate::link::{self, Down, EngineView, HEARTBEAT, ProxySettings, Traffic, Up};
use crate::sys::spawn::Spec;

/// A proxy that lived shorter than this is not replaced at once: something is wrong with it.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// Wait before replacing a proxy that keeps dying.
const NEXT_TRY: Duration = Duration::from_millis(500);
/// A proxy whose link has ended closes everything within milliseconds.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);
/// Commands under way: drain, cut, questions.
const COMMANDS: usize = 16;
/// What is asked for is gathered within milliseconds; a proxy that takes longer is stuck.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// What the proxy is told; the latest counts.
#[derive(Debug, Clone)]
pub struct Orders {
    pub settings: watch::Receiver<ProxySettings>,
    pub engine: watch::Receiver<EngineView>,
}

/// What is known of the proxy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HalfView {
    pub pid: Option<u32>,
    pub restarts: u64,
    pub traffic: Traffic,
    /// Traffic reports received from this proxy so far.
    pub reports: u64,
    /// What it cannot live by; it goes on with what it had.
    pub refused: Option<String>,
    /// What is not as it should be, though it works.
    pub warnings: Vec<String>,
}

#[derive(Debug)]
enum Command {
    Send(Box<Down>),
    /// End the proxy, and keep none from now on.
    Close,
    Ask(Question, oneshot::Sender<String>),
}

/// What the proxy answers with a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    Metrics,
    Recent,
}

/// Questions are numbered over all proxies: a late answer of a dead one finds no waiter.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Speaks to whichever proxy runs at the moment.
#[derive(Debug, Clone)]
pub struct Half {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<HalfView>,
}

impl Half {
    /// Starts keeping a proxy alive. Ends it when every [`Half`] is dropped.
    pub fn keep(
        spawner: Spawner,
        listeners: Arc<Vec<OwnedFd>>,
        orders: Orders,
        log_env: BTreeMap<OsString, OsString>,
    ) -> Self {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let (tell, view) = watch::channel(HalfView::default());
        tokio::spawn(keep(spawner, listeners, orders, log_env, inbox, tell));
        Self { commands, view }
    }

    pub fn view(&self) -> watch::Receiver<HalfView> {
        self.view.clone()
    }

    /// Admit nothing more.
    pub fn drain(&self) {
        self.send(Down::Drain);
    }

    /// End open streams with an error event.
    pub fn cut(&self, reason: &str) {
        self.send(Down::CutStreams { reason: reason.to_owned() });
    }

    /// Ends the proxy; its view has no sender any more once it is gone.
    pub fn close(&self) {
        let _ = self.commands.try_send(Command::Close);
    }

    fn send(&self, message: Down) {
        // Full: the proxy does not read; it is about to be found dead, and its clients with it.
        let _ = self.commands.try_send(Command::Send(Box::new(message)));
    }

    /// Its metrics page; `None` while no proxy answers.
    pub async fn scrape(&self) -> Option<String> {
        self.ask(Question::Metrics).await
    }

    /// The last requests that went towards the engine, a line each; `None` while no proxy answers.
    pub async fn recent(&self) -> Option<String> {
        self.ask(Question::Recent).await
    }

    async fn ask(&self, what: Question) -> Option<String> {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(Command::Ask(what, reply)).ok()?;
        tokio::time::timeout(ANSWER_LIMIT, answer).await.ok()?.ok()
    }
}

async fn keep(
    spawner: Spawner,
    listeners: Arc<Vec<OwnedFd>>,
    orders: Orders,
    env: BTreeMap<OsString, OsString>,
    mut inbox: mpsc::Receiver<Command>,
    tell: watch::Sender<HalfView>,
) {
    loop {
        let begun = Instant::now();
        match run(&spawner, &listeners, orders.clone(), env.clone(), &mut inbox, &tell).await {
            Ok(Ended::NoLongerWanted) => return,
            Ok(Ended::Died(how)) => {
                tracing::error!("the proxy process died ({how}); starting another on the same sockets");
            }
            Err(error) => tracing::error!("the proxy process could not be started: {error}"),
        }
        tell.send_modify(|view| {
            view.pid = None;
            view.traffic = Traffic::default();
            view.reports = 0;
            view.refused = None;
            view.restarts += 1;
        });
        if begun.elapsed() < SHORT_LIFE {
            tokio::time::sleep(NEXT_TRY).await;
        }
    }
}

enum Ended {
    /// Every `Half` is gone, or one closed it.
    NoLongerWanted,
    Died(String),
}

async fn run(
    spawner: &Spawner,
    listeners: &[OwnedFd],
    mut orders: Orders,
    env: BTreeMap<OsString, OsString>,
    inbox: &mut mpsc::Receiver<Command>,
    tell: &watch::Sender<HalfView>,
) -> Result<Ended, link::LinkError> {
    let (ours, theirs) = link::pair()?;
    let mut keep = vec![theirs.as_raw_fd()];
    let mut words: Vec<OsString> = vec!["proxy".into(), "--link-fd".into(), theirs.as_raw_fd().to_string().into()];
    for listener in listeners {
        keep.push(listener.as_raw_fd());
        words.extend(["--listen-fd".into(), listener.as_raw_fd().to_string().into()]);
    }
    let (child, mut end) = spawner.spawn(Spec { keep, ..Spec::ourselves(words, env) }).await?;
    drop(theirs);
    let (mut reader, mut writer) = link::split(ours)?;
    tell.send_modify(|view| view.pid = u32::try_from(child.pid).ok());

    let first = orders.settings.borrow_and_update().clone();
    writer.send(&Down::Settings(first)).await?;
    let first = orders.engine.borrow_and_update().clone();
    writer.send(&Down::Engine(first)).await?;

    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    let mut asked: BTreeMap<u64, oneshot::Sender<String>> = BTreeMap::new();
    loop {
        let message = tokio::select! {
            how = &mut end => {
                return Ok(Ended::Died(how.map_or_else(|_| "unknown".into(), |how| how.to_string())));
            }
            up = reader.next::<Up>() => {
                match up {
                    Ok(Some(Up::Hello { pid, version })) => tracing::debug!("proxy {pid} ({version}) accepts connections"),
                    Ok(Some(Up::Traffic(traffic))) => {
                        tell.send_modify(|view| {
                            view.traffic = traffic;
                            view.reports += 1;
                        });
                    }
                    Ok(Some(Up::Scraped { id, text })) => {
                        if let Some(reply) = asked.remove(&id) {
                            let _ = reply.send(text);
                        }
                    }
                    Ok(Some(Up::Refused { reason })) => {
                        tracing::error!("the proxy goes on with what it had: {reason}");
                        tell.send_modify(|view| view.refused = Some(reason));
                    }
                    Ok(Some(Up::Warnings { warnings })) => tell.send_modify(|view| view.warnings = warnings),
                    Ok(Some(Up::Recovered)) => {
                        tracing::info!("the proxy took what it had refused");
                        tell.send_modify(|view| view.refused = None);
                    }
                    // Its process is at its end; a link that broke without it is ended with it below.
                    Ok(None) | Err(_) => {
                        let _ = crate::sys::proc::signal(&child.pidfd, rustix::process::Signal::KILL);
                        let how = (&mut end).await.map_or_else(|_| "unknown".into(), |how| how.to_string());
                        return Ok(Ended::Died(how));
                    }
                }
                continue;
            }
            changed = orders.settings.changed() => {
                if changed.is_err() { return Ok(Ended::NoLongerWanted) }
                Down::Settings(orders.settings.borrow_and_update().clone())
            }
            changed = orders.engine.changed() => {
                if changed.is_err() { return Ok(Ended::NoLongerWanted) }
                Down::Engine(orders.engine.borrow_and_update().clone())
            }
            command = inbox.recv() => match command {
                Some(Command::Send(message)) => *message,
                Some(Command::Close) => {
                    // The end of the link is its order to end: connections are closed, not reset.
                    drop((reader, writer));
                    if tokio::time::timeout(CLOSE_LIMIT, &mut end).await.is_err() {
                        let _ = crate::sys::proc::signal(&child.pidfd, rustix::process::Signal::KILL);
                        let _ = end.await;
                    }
                    return Ok(Ended::NoLongerWanted);
                }
                Some(Command::Ask(what, reply)) => {
                    let id = NEXT.fetch_add(1, Ordering::Relaxed);
                    asked.retain(|_, waiting| !waiting.is_closed());
                    asked.insert(id, reply);
                    match what {
                        Question::Metrics => Down::Scrape { id },
                        Question::Recent => Down::Recent { id },
                    }
                }
                None => return Ok(Ended::NoLongerWanted),
            },
            _ = heartbeat.tick() => Down::Heartbeat,
        };
        // A proxy that is gone is noticed by its end, above.
        let _ = writer.send(&message).await;
    }
}
