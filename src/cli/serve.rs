//! `sglangd serve`: binds what clients and operators connect to, then supervises.

mod bind;
mod demo;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::exit::Exit;
use crate::config::folders::Folders;
use crate::config::{Color, Loaded, Sources, WhenMissing, load};
use crate::engine::inspect;
use crate::engine::resolve::resolve;
use crate::launch::guard::Guarded;
use crate::launch::spawner::{self, MainThread};
use crate::link::status::Listening;
use crate::observe::{admin, bundle, logging};
use crate::shutdown::Signals;
use crate::supervisor::driver::{Driver, Outlook, Outside, Reload};
use crate::sys::spawn::{ParentDeath, Spec, Stream};
use bind::Bound;

#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub daemon: super::DaemonArgs,
    /// Try it: a small model from an embedded hub, a simulated engine, a temporary folder.
    #[arg(long)]
    pub demo: bool,
}

pub fn run(mut args: ServeArgs) -> Exit {
    // Lives as long as we do: the hub serves, and the folder is removed at the end.
    let _demo = match args.demo.then(|| demo::begin(&mut args)).transpose() {
        Ok(demo) => demo,
        Err(error) => {
            eprintln!("sglangd: the demo cannot begin: {error}");
            return Exit::Bug;
        }
    };
    let color = if std::io::stderr().is_terminal() { Color::Terminal } else { Color::Plain };
    let args = args.daemon;
    let inspect_arguments = args.words();
    let sources = args.sources(WhenMissing::WriteOut);
    let folders = args.folders(&sources);
    let loaded = match load(&sources) {
        Ok(loaded) => loaded,
        Err(error) => {
            eprint!("{}", error.render(color));
            return Exit::Config;
        }
    };
    let _log = logging::init(loaded.config.observe.format, &loaded.config.observe.level, logging::RING);
    if let Err(complaint) = engine_is_possible(&loaded, &folders, color) {
        eprint!("{complaint}");
        return Exit::Config;
    }
    if let Err(error) = super::keys::check(&loaded.config) {
        eprintln!("sglangd: {error}");
        return Exit::Config;
    }
    if let Err(complaint) = super::certificate::check(&loaded) {
        eprint!("{complaint}");
        return Exit::Config;
    }
    let bound = match bind::all(&loaded.config, &folders) {
        Ok(bound) => bound,
        Err(error) => {
            eprintln!("sglangd: {error}");
            return error.exit();
        }
    };
    for notice in &loaded.notices {
        tracing::info!("{notice}");
    }
    for warning in loaded.warnings.iter().chain(&loaded.config.exposure()) {
        tracing::warn!("{warning}");
    }
    greet(&loaded, &bound);
    if let Some(panic) = bundle::last_panic(&folders.state) {
        tracing::warn!("sglangd itself broke down in an earlier run; its last words are in {}", panic.display());
    }
    bundle::keep_panics(&folders.state);
    if std::process::id() == 1 {
        tracing::info!(
            "as PID 1 of a container: its runtime must give more than {} s to stop (podman stop -t, \
             terminationGracePeriodSeconds), or it cuts what shutdown.grace promises",
            loaded.config.shutdown.grace.as_secs()
        );
    }
    if !crate::sys::proc::is_there() {
        tracing::warn!(
            "there is no /proc: ranks have no names, a dead one is not noticed by itself, and of the engine's processes only \
             its group and its cgroup are ended"
        );
    }
    let (own, main_thread) = spawner::pair();
    let supervisor = Supervisor { loaded, folders, sources, inspect_arguments, bound, spawner: own };
    supervise(supervisor, main_thread)
}

/// Everything that the supervisor's thread takes with it.
struct Supervisor {
    loaded: Loaded,
    folders: Folders,
    sources: Sources,
    inspect_arguments: Vec<OsString>,
    bound: Bound,
    spawner: spawner::Spawner,
}

/// As good as that, and short enough for every clock.
const FOR_EVER: std::time::Duration = std::time::Duration::from_secs(u32::MAX as u64);

/// The main thread forks, the rest happens on another one (see `launch::spawner`).
fn supervise(supervisor: Supervisor, main_thread: MainThread) -> Exit {
    let result = std::thread::Builder::new().name("supervisor".into()).spawn(move || {
        // Threads for what blocks are kept once they are there: where none may be started any more (pids.max), one
        // that is gone cannot be had back, and the runtime's answer to that is a panic.
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).thread_keep_alive(FOR_EVER).enable_all().build()?;
        let code = runtime.block_on(supervisor.run());
        // Tasks that still wait for somebody (a stuck proxy, a slow scrape) end with us.
        runtime.shutdown_background();
        code
    });
    let thread = match result {
        Ok(thread) => thread,
        Err(error) => {
            eprintln!("sglangd: no thread could be started: {error}");
            return Exit::Bug;
        }
    };
    main_thread.serve();
    match thread.join() {
        Ok(Ok(exit)) => exit,
        Ok(Err(error)) => {
            tracing::error!("sglangd cannot run: {error}");
            Exit::Bug
        }
        Err(_) => Exit::Bug,
    }
}

impl Supervisor {
    async fn run(self) -> std::io::Result<Exit> {
        let Self { loaded, folders, sources, inspect_arguments, bound, spawner } = self;
        let signals = Signals::catch()?;
        // Orphans of the engine become ours, not init's. PID 1 has them anyway.
        if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
            tracing::warn!("orphans of the engine will not come to us ({error}); they are found by their marks alone");
        }
        let Bound { public, unix, admin: admin_listener, admin_socket, socket_path, lock } = bound;
        let (unix, unix_name) = unix.unzip();
        let unix_path = loaded.config.listen.unix.clone();
        let address = public.as_ref().map(TcpListener::local_addr).transpose()?;
        let listen = Listening {
            public: match (address, &unix_path) {
                (Some(address), _) => address.to_string(),
                (None, path) => format!("unix:{}", path.as_deref().unwrap_or(Path::new("")).display()),
            },
            unix: unix_path,
            tls: loaded.config.listen.tls.is_some(),
            admin: admin_listener.local_addr()?.to_string(),
            admin_socket: Some(socket_path.clone()),
        };
        let guard = guard(&spawner, &folders, &sources).await;
        let outside = Outside {
            loaded,
            folders,
            own_env: sources.env.clone(),
            inspect_arguments,
            spawner,
            listeners: Arc::new(public.map(OwnedFd::from).into_iter().chain(unix.map(OwnedFd::from)).collect()),
            listen,
            guard,
            signals,
            reload: Reload(Box::new(move || {
                let again = Sources { missing: WhenMissing::BuiltIn, ..sources.clone() };
                let loaded = load(&again).map_err(|error| error.render(Color::Plain))?;
                super::certificate::check(&loaded)?;
                Ok(loaded)
            })),
        };
        let (driver, outlook) = Driver::new(outside);
        let Outlook { status, engine, settings, half, orders } = outlook;
        let routes = admin::routes(admin::Sources { status, engine, settings, half });
        admin_listener.set_nonblocking(true)?;
        let looking = admin::without_orders(routes.clone());
        tokio::spawn(admin::serve_tcp(tokio::net::TcpListener::from_std(admin_listener)?, looking));
        let acting = admin::with_orders(routes, orders);
        tokio::spawn(admin::serve_unix(tokio::net::UnixListener::from_std(admin_socket)?, acting));
        let code = driver.run().await;
        // The names go before the lock: whoever comes next makes its own.
        let _ = std::fs::remove_file(&socket_path);
        drop(unix_name);
        drop(lock);
        Ok(Exit::of(code))
    }
}

/// In plain use only: systemd's cgroup and a container's PID namespace end everything by themselves.
async fn guard(
    spawner: &spawner::Spawner,
    folders: &Folders,
    sources: &Sources,
) -> Option<Guarded<std::process::ChildStdin>> {
    if std::process::id() == 1 || sources.env.contains_key(std::ffi::OsStr::new("NOTIFY_SOCKET")) {
        return None;
    }
    let words = ["guard".into(), "--runtime-dir".into(), folders.runtime.clone().into()];
    let spec = Spec {
        stdin: Stream::Piped,
        on_parent_death: ParentDeath::Survive,
        ..Spec::ourselves(words, std::collections::BTreeMap::new())
    };
    match spawner.spawn(spec).await {
        Ok((mut child, end)) => child.stdin.take().map(|pipe| Guarded::new(pipe, end)),
        Err(error) => {
            tracing::warn!(
                "no guard could be started ({error}): should sglangd be killed, only the next start ends what it leaves"
            );
            None
        }
    }
}

/// What can be known of the engine before anything starts: that its program exists, and that its flags
/// are right. Flags that the bundled table does not know are asked of the installed engine right away,
/// since a typing error must not cost a download first.
fn engine_is_possible(loaded: &Loaded, folders: &Folders, color: Color) -> Result<(), String> {
    let engine = &loaded.config.engine;
    let plain = |error: inspect::InspectError| format!("sglangd: {error}\n");
    inspect::find_program(engine).map_err(plain)?;
    let is_python = inspect::interpreter(engine).map_err(plain)?.is_some();
    let kept = inspect::cached_table(engine, folders.inspect_cache());
    let known = kept.as_ref().unwrap_or(crate::engine::flags::FlagTable::bundled());
    let Err(errors) = resolve(&loaded.config, known) else { return Ok(()) };
    if !is_python || kept.is_some() {
        return Err(errors.explain(loaded).render(color));
    }
    eprintln!("sglangd: asking the installed engine about flags that are not known here (some 20 s) …");
    let installed =
        inspect::installed_table(engine, folders.inspect_cache(), super::plan::INSPECT_LIMIT).map_err(plain)?;
    resolve(&loaded.config, &installed.table).map(drop).map_err(|errors| errors.explain(loaded).render(color))
}

/// On standard output, for people: where everything is. A closed pipe is the reader's choice.
fn greet(loaded: &Loaded, bound: &Bound) {
    let address = bound.public.as_ref().and_then(|public| public.local_addr().ok()).map(reachable);
    let Ok(admin) = bound.admin.local_addr() else { return };
    let (model, listen) = (&loaded.config.model.name, &loaded.config.listen);
    let scheme = if listen.tls.is_some() { "https" } else { "http" };
    let (place, curl) = match (address, &listen.unix) {
        (Some(address), _) => (format!("{scheme}://{address}"), format!("{scheme}://{address}")),
        (None, Some(unix)) => {
            let path = unix.display();
            (format!("unix:{path}"), format!("--unix-socket {path} http://localhost"))
        }
        (None, None) => return,
    };
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "sglangd {} serves {model} on {place}", env!("CARGO_PKG_VERSION"));
    let _ = writeln!(out);
    let _ = writeln!(out, "  curl -N {curl}/v1/chat/completions -H 'Content-Type: application/json' \\");
    let _ = writeln!(
        out,
        "    -d '{{\"model\": \"{model}\", \"stream\": true, \"messages\": [{{\"role\": \"user\", \"content\": \"Hello!\"}}]}}'"
    );
    let _ = writeln!(out);
    let _ = writeln!(out, "  status   http://{admin}/status    (or: {})", status_command(bound));
    let _ = writeln!(out, "  metrics  http://{admin}/metrics");
    let _ = writeln!(out);
    let _ = out.flush();
}

fn status_command(bound: &Bound) -> String {
    let folder: PathBuf = bound.socket_path.parent().map(PathBuf::from).unwrap_or_default();
    format!("sglangd status --runtime-dir {}", folder.display())
}

/// Nobody can connect to 0.0.0.0.
fn reachable(mut addr: SocketAddr) -> SocketAddr {
    if addr.ip().is_unspecified() {
        addr.set_ip(if addr.is_ipv4() {
            std::net::Ipv4Addr::LOCALHOST.into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        });
    }
    addr
}
