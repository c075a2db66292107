//! The main process of the simulated engine, from its first line to its end.
//!
//! ```text
//! imports ─► arguments ─► children import ─► load ─► bind ─► warm-up ─► up ─► drain ─► exit 0
//!  └── SIGTERM: default action, children orphaned ──┘   └── a child dies, SIGQUIT: SIGKILL on all ──┘
//! ```

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollTimeout, poll};
use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use super::args::{Args, Refusal};
use super::knobs::{Diagnostics, Fault, Knobs};
use super::rank::{Kind, Link, Started, Weights, spawn};
use super::requests::{Engine, Status};
use super::scheduler::{Order, Scheduler};
use super::trouble::{close_stdio, nuisances, troubles};
use super::{Ended, die_by, http, logline, model};

/// How often the watchdog looks after the children (the real one: each second).
const WATCH: Duration = Duration::from_millis(250);
/// How long a drain waits for schedulers that were asked to leave.
const LEAVE: Duration = Duration::from_secs(15);
/// A crash's pauses, in the real engine for py-spy and for CUDA core dumps.
const SETTLE: Duration = Duration::from_secs(5);
const COREDUMP: Duration = Duration::from_mins(1);

pub fn run(words: &[String], knobs: &Knobs) -> Ended {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            logline::raw(&format!("simulated engine: no runtime: {error}\n"));
            return Ended::Code(70);
        }
    };
    // The children are forked by this thread, the main one: it lives as long as the process.
    let ended = runtime.block_on(live(words, knobs));
    match ended {
        Ended::Code(code) => Ended::Code(code),
        Ended::By(signal) => die_by(signal),
    }
}

async fn live(words: &[String], knobs: &Knobs) -> Ended {
    nuisances(knobs);
    tokio::time::sleep(knobs.share(15)).await;
    if let Some(code) = knobs.find(|f| if let Fault::ExitAtStart(code) = f { Some(code) } else { None }) {
        return Ended::Code(code);
    }
    let args = if knobs.has(Fault::BadFlag) {
        Err(Refusal::Usage("unrecognized arguments: --frobnicate".into()))
    } else {
        Args::resolve(words)
    };
    let args = match args {
        Ok(args) => args,
        Err(refusal) => {
            logline::raw(&format!("{refusal}\n"));
            return Ended::Code(if matches!(refusal, Refusal::Usage(_)) { 2 } else { 1 });
        }
    };
    if let Err(what) = model::check_config(Path::new(args.model_path())) {
        logline::raw(&format!(
            "Traceback (most recent call last):\n  File \"transformers/utils/hub.py\", line 595, in cached_files\n    raise OSError(f\"{{e}}\") from e\n{what}\n"
        ));
        return Ended::Code(1);
    }
    // Python writes its repr; what matters is that the keys are in it.
    logline::say(None, format!("server_args={}", serde_json::Value::Object(args.as_json())));
    let mut tree = Tree(Vec::new());
    let links = match start(&mut tree, &args, knobs).await {
        Ok(links) => links,
        Err(ended) => {
            tree.kill();
            return ended;
        }
    };
    let ended = serve(&mut tree, links, args, knobs).await;
    tree.kill();
    ended
}

/// The children.
struct Tree(Vec<Started>);

impl Tree {
    fn kill(&mut self) {
        for started in &mut self.0 {
            // Gone already: nothing to do.
            let _ = started.child.kill();
        }
        for started in &mut self.0 {
            let _ = started.child.wait();
        }
    }

    /// The first child that ended otherwise than with 0, and its status as Python tells it.
    async fn crashed(&mut self) -> (Kind, u32, i32) {
        loop {
            for started in &mut self.0 {
                if let Ok(Some(status)) = started.child.try_wait()
                    && !status.success()
                {
                    return (started.kind, started.child.id(), python_status(status));
                }
            }
            tokio::time::sleep(WATCH).await;
        }
    }

    async fn schedulers_gone(&mut self) {
        loop {
            let alive = |started: &mut Started| {
                matches!(started.kind, Kind::Scheduler { .. }) && matches!(started.child.try_wait(), Ok(None))
            };
            if !self.0.iter_mut().any(alive) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn scheduler_alive(&mut self) -> bool {
        self.0.iter_mut().any(|s| matches!(s.kind, Kind::Scheduler { .. }) && matches!(s.child.try_wait(), Ok(None)))
    }
}

fn python_status(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.signal().map_or_else(|| status.code().unwrap_or(0), |signal| -signal)
}

/// Spawns the children and waits for the load.
async fn start(tree: &mut Tree, args: &Args, knobs: &Knobs) -> Result<Vec<Link>, Ended> {
    let bug = |error: std::io::Error| {
        logline::raw(&format!("simulated engine: {error}\n"));
        Ended::Code(1)
    };
    let mut quit = signal(SignalKind::quit()).map_err(bug)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(bug)?;
    let weights = if args.one("load-format") == Some("dummy") { Weights::Dummy } else { Weights::Files };
    let of = args.tp();
    let mut links = Vec::new();
    for kind in (0..of).map(|rank| Kind::Scheduler { rank, of }).chain([Kind::Detokenizer]) {
        let (started, link) = spawn(kind, args.model_path(), weights, knobs).map_err(bug)?;
        tree.0.push(started);
        links.push(link);
    }
    let loaded = async {
        for link in &mut links {
            if link.loaded().await.is_err() {
                // Its end is seen by the watch below.
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        () = loaded => {}
        (kind, _, status) = tree.crashed() => {
            let rank = if let Kind::Scheduler { rank, .. } = kind { rank } else { 0 };
            logline::raw(&format!(
                "Traceback (most recent call last):\n  File \"sglang/srt/entrypoints/engine.py\", line 1190, in wait_for_ready\nRuntimeError: Rank {rank} scheduler died during initialization (exit code: {status}). If exit code is -9 (SIGKILL), a common cause is the OS OOM killer.\n"
            ));
            return Err(Ended::Code(1));
        }
        _ = quit.recv() => {
            logline::say(None, "Received sigquit from a child process. It usually means the child failed.");
            return Err(Ended::By(Signal::SIGKILL));
        }
        _ = interrupt.recv() => {
            logline::raw("Traceback (most recent call last):\nKeyboardInterrupt\n");
            return Err(Ended::By(Signal::SIGINT));
        }
    }
    // The detokenizer's link is the last one; it takes no steps.
    links.truncate(of as usize);
    Ok(links)
}

async fn serve(tree: &mut Tree, links: Vec<Link>, args: Args, knobs: &Knobs) -> Ended {
    let tokenizer = knobs.start.as_secs_f64();
    logline::say(
        None,
        format!(
            "Engine startup timings (s): load_weight={:.2}, kv_cache_allocation=0.10, scheduler_e2e={:.2}, tokenizer_e2e={tokenizer:.2}",
            knobs.share(30).as_secs_f64(),
            knobs.share(80).as_secs_f64()
        ),
    );
    logline::say(None, format!("INFO:     Started server process [{}]", std::process::id()));
    logline::say(None, "INFO:     Waiting for application startup.");
    logline::say(None, "INFO:     Application startup complete.");
    let host = args.one("host").unwrap_or("127.0.0.1").to_owned();
    let port = args.number("port").and_then(|p| u16::try_from(p).ok()).unwrap_or(30000);
    let bound = if knobs.has(Fault::BusyPort) {
        Err(std::io::Error::from_raw_os_error(nix::libc::EADDRINUSE))
    } else {
        http::bind(&host, port)
    };
    let listener = match bound {
        Ok(listener) => listener,
        Err(error) => return port_taken(&host, port, &error, knobs).await,
    };
    let port = listener.local_addr().map_or(port, |addr| addr.port());
    logline::say(None, format!("INFO:     Uvicorn running on http://{host}:{port} (Press CTRL+C to quit)"));

    let last = links.last().map(|link| link.pid);
    let (engine, line) = Engine::new(args, knobs.clone());
    // Orders are a handful in a life: to leave, or to fail.
    let (orders, taken) = mpsc::channel(4);
    tokio::spawn(Scheduler::new(Arc::clone(&engine), links).run(line, taken));
    let (stop, stopped) = watch::channel(false);
    let mut serving = tokio::spawn(http::serve(listener, Arc::clone(&engine), stopped));
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::quit()));
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut quit)) = signals else { return Ended::Code(70) };
    let mut warmup = Box::pin(warm_up(Arc::clone(&engine)));
    let mut warm = false;
    let troubles = troubles(knobs, orders.clone(), last);
    tokio::pin!(troubles);
    loop {
        tokio::select! {
            result = &mut warmup, if !warm => {
                warm = true;
                if let Err(what) = result {
                    logline::say(None, format!("Initialization failed. warmup error: {what}"));
                    return Ended::By(Signal::SIGKILL);
                }
                if knobs.has(Fault::CloseStdio) {
                    close_stdio();
                }
            }
            () = &mut troubles, if warm => unreachable!("troubles never end"),
            _ = terminate.recv(), if !knobs.has(Fault::IgnoreSigterm) => break,
            _ = interrupt.recv() => {
                // Uvicorn's own: the port closes at once, answers go on without a limit.
                let _ = stop.send(true);
                tokio::select! {
                    _ = &mut serving => {}
                    _ = interrupt.recv() => {}
                }
                logline::raw("Traceback (most recent call last):\nKeyboardInterrupt\n");
                return Ended::By(Signal::SIGINT);
            }
            _ = quit.recv() => return crash(tree, knobs),
            (kind, pid, status) = tree.crashed(), if !knobs.has(Fault::HealthLies) => {
                told_crash(kind, pid, status);
                return crash(tree, knobs);
            }
        }
    }
    engine.set_status(Status::Draining);
    logline::say(None, "SIGTERM received. signum=None frame=None. Draining requests and shutting down...");
    tokio::select! {
        () = no_requests(&engine) => {}
        _ = quit.recv() => return crash(tree, knobs),
        (kind, pid, status) = tree.crashed() => {
            told_crash(kind, pid, status);
            return crash(tree, knobs);
        }
    }
    let _ = orders.send(Order::Leave).await;
    if tokio::time::timeout(LEAVE, tree.schedulers_gone()).await.is_err() {
        logline::say(None, "Schedulers still alive 15s after ShutdownReq, killing them before they released");
    }
    told_kill("False");
    tree.kill();
    logline::say(None, "INFO:     Shutting down");
    let _ = stop.send(true);
    let _ = serving.await;
    logline::say(None, "INFO:     Waiting for application shutdown.");
    logline::say(None, "INFO:     Application shutdown complete.");
    logline::say(None, format!("INFO:     Finished server process [{}]", std::process::id()));
    Ended::Code(0)
}

async fn no_requests(engine: &Engine) {
    loop {
        // Noticed by a loop that sleeps first: even an idle engine takes its time.
        tokio::time::sleep(engine.knobs.drain_poll).await;
        let rids = engine.remaining();
        let quoted: Vec<String> = rids.iter().map(|rid| format!("'{rid}'")).collect();
        logline::say(
            None,
            format!(
                "Gracefully exiting... Remaining number of requests {}. Remaining requests remaining_rids=[{}].",
                rids.len(),
                quoted.join(", ")
            ),
        );
        if rids.is_empty() {
            return;
        }
    }
}

async fn warm_up(engine: Arc<Engine>) -> Result<(), String> {
    tokio::time::sleep(engine.knobs.share(4)).await;
    logline::access("127.0.0.1:59276", "GET", "/model_info", ::http::StatusCode::OK);
    let limit = engine.knobs.warmup_timeout;
    let answered = tokio::time::timeout(limit, async {
        let mut request = engine.admit("warmup".into(), 22).await?;
        let mut tokens = 0;
        while tokens < 8 {
            tokens += request.next().await?;
        }
        request.finish(tokens);
        Some(())
    });
    match answered.await {
        Ok(Some(())) => {}
        Ok(None) => return Err("aborted".into()),
        Err(_) => return Err(format!("HTTPConnectionPool: Read timed out. (read timeout={})", limit.as_secs())),
    }
    logline::access("127.0.0.1:59288", "POST", "/generate", ::http::StatusCode::OK);
    engine.set_status(Status::Up);
    logline::say(None, "The server is fired up and ready to roll!");
    Ok(())
}

/// Measured: the engine loads everything, finds its port taken, and does not exit.
async fn port_taken(host: &str, port: u16, error: &std::io::Error, knobs: &Knobs) -> Ended {
    let number = error.raw_os_error().unwrap_or(0);
    logline::say(
        None,
        format!(
            "ERROR:    [Errno {number}] error while attempting to bind on address ('{host}', {port}): {}",
            reason(error)
        ),
    );
    logline::say(None, "INFO:     Waiting for application shutdown.");
    tokio::time::sleep(knobs.bind_wait).await;
    logline::say(None, "Initialization failed. warmup error: the server did not come up");
    Ended::By(Signal::SIGKILL)
}

fn reason(error: &std::io::Error) -> String {
    if error.kind() == std::io::ErrorKind::AddrInUse {
        "address already in use".into()
    } else {
        error.to_string().to_lowercase()
    }
}

fn told_crash(kind: Kind, pid: u32, status: i32) {
    logline::say(
        None,
        format!(
            "Subprocess {} (pid={pid}) crashed with exit code {status}. Triggering SIGQUIT for cleanup...",
            kind.name()
        ),
    );
}

fn told_kill(include_parent: &str) {
    let pid = std::process::id();
    logline::say(
        None,
        format!("kill_process_tree called: parent_pid={pid}, include_parent={include_parent}, pid={pid}"),
    );
}

/// SIGQUIT's handler: pauses in which the event loop is blocked (no answer to anybody), then SIGKILL
/// on all and on itself.
fn crash(tree: &mut Tree, knobs: &Knobs) -> Ended {
    logline::say(None, "SIGQUIT received. signum=None, frame=None. It usually means one child failed.");
    if knobs.diagnostics == Diagnostics::On {
        logline::say(None, "Sleeping 5 seconds before crash diagnostics to let GPU activity settle.");
        block(SETTLE);
        if tree.scheduler_alive() {
            logline::say(None, "Waiting 60.0 seconds for CUDA coredumps before exiting.");
            block(COREDUMP);
        } else {
            logline::say(None, "No live scheduler processes found; skipping py-spy and CUDA coredump.");
        }
    }
    told_kill("True");
    Ended::By(Signal::SIGKILL)
}

/// Blocks this thread, as the real handler blocks the event loop: that is the point.
fn block(time: Duration) {
    let _ = poll(&mut [], PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX));
}
