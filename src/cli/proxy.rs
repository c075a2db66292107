//! `sglangd proxy`: the data plane alone, or as the half that `serve` starts.

use std::fs::File;
use std::io::IsTerminal as _;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs as _};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::exit::Exit;
use super::public_socket;
use crate::config::{Color, Config, LogFormat, Needs, Sources, WhenMissing, load};
use crate::link::{EngineState, EngineView, ProxySettings, Upstream};
use crate::observe::logging;
use crate::proxy::{CERTIFICATE_LOOK, Listener, Proxy, Supervision, Timings, linked};
use crate::sys::{fd, memory, seccomp};

#[derive(Debug, Args)]
pub struct ProxyArgs {
    /// Where clients connect: ADDRESS:PORT or unix:PATH; may be repeated.
    #[arg(long, value_name = "ADDR", required_unless_present = "link_fd", value_parser = place)]
    pub listen: Vec<Place>,
    /// The engine, e.g. `http://127.0.0.1:30000`. Its health is not judged.
    #[arg(long, value_name = "URL", required_unless_present = "link_fd")]
    pub upstream: Option<String>,
    /// How long open answers may take to end after SIGTERM, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 25)]
    pub grace: u64,
    #[command(flatten)]
    pub config: super::ConfigArgs,
    /// The link to the supervisor, inherited.
    #[arg(long, hide = true, value_name = "FD", requires = "listen_fd", conflicts_with_all = ["listen", "upstream"])]
    pub link_fd: Option<RawFd>,
    /// A listener, inherited; may be repeated.
    #[arg(long, hide = true, value_name = "FD", requires = "link_fd")]
    pub listen_fd: Vec<RawFd>,
}

/// Where clients connect.
#[derive(Debug, Clone)]
pub enum Place {
    Address(SocketAddr),
    Unix(PathBuf),
}

fn place(text: &str) -> Result<Place, String> {
    match text.strip_prefix("unix:") {
        Some("") => Err("a path is missing behind `unix:`".to_owned()),
        Some(path) => Ok(Place::Unix(path.into())),
        None => text.parse().map(Place::Address).map_err(|_| "expected ADDRESS:PORT or unix:PATH".to_owned()),
    }
}

/// Whether others than this machine may connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Machine,
    Others,
}

struct Bound {
    listener: Listener,
    reach: Reach,
    name: Option<public_socket::Name>,
}

fn bind(place: &Place, mode: u32) -> anyhow::Result<Bound> {
    match place {
        Place::Address(address) => {
            let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
            // More than the standard library's 128: who finds a full backlog tries again after a second.
            socket2::SockRef::from(&listener).listen(public_socket::BACKLOG)?;
            let address = listener.local_addr()?;
            tracing::info!(%address, "listening");
            let reach = if address.ip().is_loopback() { Reach::Machine } else { Reach::Others };
            Ok(Bound { listener: listener.into(), reach, name: None })
        }
        Place::Unix(path) => {
            let path = std::path::absolute(path)?;
            let (listener, name) =
                public_socket::bind(&path, mode).map_err(|error| Wrong(Exit::Config, error.to_string()))?;
            tracing::info!(path = %path.display(), "listening");
            Ok(Bound { listener: listener.into(), reach: Reach::Machine, name: Some(name) })
        }
    }
}

#[allow(clippy::needless_pass_by_value)] // every subcommand has this shape
pub fn run(args: ProxyArgs) -> Exit {
    // `serve` says in the environment how it logs; alone, people read it.
    let said = |name: &str| std::env::var(name).ok();
    let format = match said("SGLANGD_OBSERVE_LOG").as_deref() {
        Some("json") => LogFormat::Json,
        Some("journald") => LogFormat::Journald,
        _ => LogFormat::Text,
    };
    let level = said("SGLANGD_OBSERVE_LEVEL").unwrap_or_else(|| "info".into());
    // While there is one thread: see `TABLE`.
    let taken = take_descriptors();
    let _log = logging::init(format, &level, logging::SMALL_RING);
    if let Err(error) = taken {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
    let outcome = match args.link_fd {
        Some(link) => run_linked(link, &args.listen_fd),
        None => run_alone(&args),
    };
    match outcome {
        Ok(exit) => exit,
        Err(error) => {
            eprintln!("sglangd proxy: {error:#}");
            error.downcast_ref::<Wrong>().map_or(Exit::Bug, |wrong| wrong.0)
        }
    }
}

/// Descriptors for which there is room at once. The kernel's table doubles as it fills, and in a process with threads each
/// doubling waits for all processors (`expand_fdtable`: `synchronize_rcu`): at the 64th, 128th, 256th … descriptor all
/// streams of a worker stood still for 8 to 38 ms, measured. 8 bytes of kernel memory each.
const TABLE: u64 = 65_536;

/// Each connection is one: shells and containers allow 1024 and many more to who asks. It is this process's
/// limit alone; the engine has the one that it was given.
fn take_descriptors() -> std::io::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    let room = if raised.is_ok() { hard } else { soft }.min(TABLE);
    // The table never becomes smaller again.
    drop(rustix::io::fcntl_dupfd_cloexec(File::open("/")?, room.saturating_sub(1) as RawFd)?);
    Ok(raised?)
}

/// An error that is the caller's, with its exit code.
#[derive(Debug, thiserror::Error)]
#[error("{1}")]
struct Wrong(Exit, String);

fn run_linked(link: RawFd, listeners: &[RawFd]) -> anyhow::Result<Exit> {
    let listeners = listeners.iter().map(|&number| fd::take(number).and_then(Listener::from_descriptor));
    let listeners = listeners.collect::<Result<Vec<_>, _>>().context("an inherited listener")?;
    let link = UnixStream::from(fd::take(link).context("the inherited link")?);
    if let Err(error) = seccomp::forbid_exec() {
        tracing::warn!("the proxy keeps the right to execute programs: {error}");
    }
    memory::let_go_of_start();
    linked(listeners, link)?;
    Ok(Exit::Ok)
}

fn run_alone(args: &ProxyArgs) -> anyhow::Result<Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Before anything can be connected to: a SIGTERM right after that must drain, not kill.
    let signals = runtime.block_on(async { Signals::new() })?;
    let (settings, config) = settings(&args.config)?;
    let Some(upstream) = args.upstream.as_deref() else { bail!("--listen and --upstream are needed") };
    let upstream = upstream_address(upstream)?;
    let bound = args.listen.iter().map(|place| bind(place, config.listen.unix_mode)).collect::<Result<Vec<_>, _>>()?;
    let exposed = settings.keys_file.is_none() && bound.iter().any(|bound| bound.reach == Reach::Others);
    let mut proxy = Proxy::new(Timings::default(), Supervision::Alone);
    proxy.settings(settings).map_err(|error| Wrong(Exit::Config, error.to_string()))?;
    proxy.engine(EngineView { hold_ms: config.limits.hold.as_millis() as u64, ..ready(upstream) });
    let (listeners, names): (Vec<_>, Vec<_>) = bound.into_iter().map(|bound| (bound.listener, bound.name)).unzip();
    proxy.listen(listeners)?;
    if exposed {
        tracing::warn!(
            "no key is asked for: everybody who reaches this address may use the engine; set auth.keys_file"
        );
    }
    tracing::info!(engine = %upstream, "proxying");
    memory::let_go_of_start();
    runtime.block_on(until_stopped(&mut proxy, signals, Duration::from_secs(args.grace), &args.config));
    proxy.close();
    drop(names);
    Ok(Exit::Ok)
}

/// What the cut streams are given to reach their clients.
const LAST_WORDS: Duration = Duration::from_secs(1);

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Limits, keys and certificates are read again; a terminal that closes is no reason to stop.
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Serves until SIGTERM or SIGINT, then drains within `grace`; a second signal ends at once.
async fn until_stopped(proxy: &mut Proxy, mut signals: Signals, grace: Duration, config: &super::ConfigArgs) {
    let mut files = interval(CERTIFICATE_LOOK);
    files.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => break,
            _ = signals.interrupt.recv() => break,
            _ = signals.hangup.recv() => reload(proxy, config),
            _ = files.tick(), if proxy.has_files() => look_at_files(proxy),
        }
    }
    tracing::info!("draining");
    proxy.drain();
    tokio::select! {
        drained = timeout(grace.saturating_sub(LAST_WORDS), proxy.drained()) => {
            if drained.is_err() {
                proxy.cut_streams("the server is stopping".to_owned());
                let _ = timeout(LAST_WORDS, proxy.drained()).await;
            }
            // The last bytes are with the kernel; let connections close behind them.
            sleep(Duration::from_millis(20)).await;
        }
        () = signals.stop() => {}
    }
}

fn look_at_files(proxy: &mut Proxy) {
    proxy.look_at_certificate();
    match proxy.look_at_keys() {
        None => {}
        Some(Ok(())) => tracing::info!("the keys were read again"),
        Some(Err(error)) => tracing::error!("the new keys are not used, the old ones stay: {error}"),
    }
}

/// A wrong file changes nothing.
fn reload(proxy: &mut Proxy, config: &super::ConfigArgs) {
    let outcome = settings(config).and_then(|(settings, _)| proxy.settings(settings).map_err(Into::into));
    match outcome {
        Ok(()) => tracing::info!("configuration reloaded"),
        Err(error) => tracing::error!("the configuration was not reloaded, everything stays as it was: {error:#}"),
    }
}

/// An engine that somebody else runs is taken to be ready.
fn ready(addr: SocketAddr) -> EngineView {
    EngineView {
        state: EngineState::Ready,
        phase: String::new(),
        percent: None,
        eta_seconds: None,
        eta_range_seconds: None,
        reason: String::new(),
        upstream: Some(Upstream { addr, api_key: None, admin_key: None }),
        suspected: false,
        will_return: true,
        hold_ms: 0,
    }
}

fn upstream_address(url: &str) -> anyhow::Result<SocketAddr> {
    let wrong = |why: String| Wrong(Exit::Usage, format!("--upstream {url}: {why}"));
    let rest = url.strip_prefix("http://").ok_or_else(|| wrong("expected http://HOST:PORT".into()))?;
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains(['/', '?', '#', '@']) {
        return Err(wrong("a path is not part of the engine's address".into()).into());
    }
    let with_port = if authority.parse::<SocketAddr>().is_ok()
        || authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
    {
        authority.to_owned()
    } else {
        format!("{authority}:80")
    };
    let mut found = with_port.to_socket_addrs().map_err(|error| wrong(error.to_string()))?;
    Ok(found.next().ok_or_else(|| wrong("the name has no address".into()))?)
}

/// The proxy's part of the configuration.
fn settings(args: &super::ConfigArgs) -> anyhow::Result<(ProxySettings, Config)> {
    let sources = Sources { needs: Needs::ProxyOnly, ..args.sources(WhenMissing::BuiltIn) };
    let loaded = load(&sources).map_err(|error| {
        let color = if std::io::stderr().is_terminal() { Color::Terminal } else { Color::Plain };
        Wrong(Exit::Config, error.render(color))
    })?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    super::certificate::check(&loaded).map_err(|complaint| Wrong(Exit::Config, complaint))?;
    Ok((ProxySettings::from(&loaded.config), loaded.config))
}
