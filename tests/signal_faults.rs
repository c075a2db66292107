//! Group J: signals, the process and the operating system under sglangd itself.

use std::fs::{self, File, OpenOptions};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use tokio::time::Instant;

use crate::harness::client::End;
use crate::harness::daemon::{Daemon, SGLANGD, Setup, eventually};
use crate::harness::hub::{REPO, Site, small_model};
use crate::harness::processes;
use crate::harness::scene::{
    SOON, engine_pid, got, is_whole, number_at, open_stream, quick, replaces, script, send, state_dir, streamed,
    text_at, the_one,
};

/// "At any moment" means two seconds from the signal, where nothing is drained; a busy machine may take twice that,
/// and the grace, waited for in vain, four times.
const AT_ONCE: Duration = Duration::from_secs(4);

/// SIGTERM, and how long until it was gone with everything.
async fn stopped(mut daemon: Daemon) -> Duration {
    daemon.note_processes();
    let begun = Instant::now();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.exit(SOON).await, 0, "{}", daemon.log());
    let took = begun.elapsed();
    daemon.leaves_nothing(Duration::ZERO).await;
    took
}

#[tokio::test]
async fn j01_sigterm_at_any_moment_of_a_start_ends_it_at_once() {
    // Moments by time, since some states are too short to be caught; then the long ones by name.
    for moment in 1..8 {
        let daemon = quick("orphan_setsid,leak_shm").start();
        // Nothing is waited for: these are moments to strike at, whatever happens then.
        tokio::time::sleep(Duration::from_millis(16 * moment * moment)).await;
        if !daemon.log().contains("INFO fetching") {
            // Before it catches signals the default action ends it, and nothing was started.
            continue;
        }
        let took = stopped(daemon).await;
        assert!(took < AT_ONCE, "moment {moment}: {took:?}");
    }
}

#[tokio::test]
async fn j01_sigterm_while_the_engine_loads_or_its_ranks_import() {
    let mut importing = quick("ignore_sigterm").env("SGLANG_SIM_IMPORT_SECONDS", "60").start();
    importing
        .until("the ranks import", SOON, async |daemon| {
            (daemon.processes_named("multiprocessing.spawn").len() == 2).then_some(())
        })
        .await;
    let took = stopped(importing).await;
    assert!(took < AT_ONCE, "importing: {took:?}");

    let mut hanging = quick("hang_at_load,orphan_setsid").start();
    hanging
        .until("the load", SOON, async |daemon| {
            text_at(&daemon.status().await?, "/phase").contains("weights").then_some(())
        })
        .await;
    let took = stopped(hanging).await;
    assert!(took < AT_ONCE, "loading: {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j01_sigterm_while_downloading_keeps_what_was_fetched() {
    let site = Site::slow(small_model(), 1 << 20).await;
    let mut daemon = Setup::bare()
        .config(&format!(
            "model: {{repo: {REPO}}}\nweights: {{endpoint: \"{}\", cache: {}}}\nengine: {{command: [{SGLANGD}, simulate], tp: 1, flags: {{}}}}\n",
            site.hub.endpoint(),
            site.cache().display()
        ))
        .start();
    daemon.until("bytes arrive", SOON, async |_| (site.bytes_there() > 200_000).then_some(())).await;
    let status = daemon.status().await.unwrap();
    assert_eq!(text_at(&status, "/state"), "fetching");
    let took = stopped(daemon).await;
    assert!(took < AT_ONCE, "{took:?}");
    assert!(site.bytes_there() > 200_000, "what was there is gone");
}

#[tokio::test]
async fn j02_a_second_signal_skips_the_drain_and_still_leaves_nothing() {
    let mut daemon = quick("ignore_sigterm,orphan_setsid,leak_shm").env("SGLANG_SIM_TOKENS_PER_SECOND", "10").start();
    daemon.is_ready(SOON).await;
    let mut stream = open_stream(daemon.public(), 2000);
    daemon.terminate();
    daemon.reaches(&["draining"], SOON).await;
    let first = Instant::now();
    daemon
        .until("more than a bounce of the key", SOON, async |_| {
            (first.elapsed() > Duration::from_millis(150)).then_some(())
        })
        .await;
    assert_eq!(daemon.state().await.as_deref(), Some("draining"), "one signal waits for the stream");
    let begun = Instant::now();
    daemon.signal(Signal::SIGINT);
    let answer = stream.answer();
    assert_ne!(answer.end, End::Complete);
    assert!(answer.text().contains("\"error\"") && !answer.text().contains("[DONE]"), "{}", answer.text());
    assert_eq!(daemon.exit(SOON).await, 0);
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    daemon.leaves_nothing(Duration::ZERO).await;
}

/// However it misbehaves, its stop is over within the grace; those that do no harm to it take no longer than others.
#[tokio::test]
async fn j01_the_worst_stop_of_each_misbehaving_engine() {
    const GRACE: Duration = Duration::from_secs(12);
    let patient = |fault: &str| {
        let setup = quick(fault).set("shutdown.grace", "12s").set("engine.tp", "2");
        setup.env("SGLANG_SIM_TOKENS_PER_SECOND", "20")
    };
    let ready = [
        ("ignores SIGTERM", "ignore_sigterm"),
        ("has a stopped scheduler", ""),
        ("has a stopped main process", ""),
        ("hangs with a stream open", "hang_after_tokens=40"),
        ("does all of these, and has one that fled", "ignore_sigterm,orphan_setsid,leak_shm,hang_after_tokens=40"),
        ("has one that fled, and leaks memory", "orphan_setsid,leak_shm"),
        ("closed its output", "close_stdio"),
        ("floods", "flood_stdout,flood_stderr"),
    ];
    let mut cases = Vec::new();
    let mut streams = Vec::new();
    for (name, fault) in ready {
        let mut daemon = patient(fault).start();
        let engine = engine_pid(&daemon.is_ready(SOON).await);
        if name.contains("stream") || name.contains("these") {
            streams.push(open_stream(daemon.public(), 200));
        }
        if name.contains("scheduler") || name.contains("these") {
            send(the_one(&daemon, "sglang::scheduler_TP1"), Signal::SIGSTOP);
        }
        if name.contains("main") {
            send(engine, Signal::SIGSTOP);
        }
        cases.push((name, daemon));
    }
    let mut loading = patient("hang_at_load,ignore_sigterm").start();
    loading
        .until("the load", SOON, async |daemon| {
            text_at(&daemon.status().await?, "/phase").contains("weights").then_some(())
        })
        .await;
    cases.push(("hangs while it loads", loading));

    // All at once: most of it is waiting.
    let mut stops = tokio::task::JoinSet::new();
    for (name, daemon) in cases {
        stops.spawn(async move { (name, stopped(daemon).await) });
    }
    while let Some(stop) = stops.join_next().await {
        let (name, took) = stop.unwrap();
        println!("figure: stop of an engine that {name}: {took:.1?} of a grace of {GRACE:?}");
        assert!(took < GRACE + Duration::from_secs(2), "{name}: {took:?}");
        let harmless = ["leaks", "closed", "floods", "loads"].iter().any(|word| name.contains(word));
        assert!(!harmless || took < AT_ONCE, "{name}: {took:?}");
    }
}

#[tokio::test]
async fn j02_two_signals_of_one_key_are_one_wish() {
    let mut daemon = quick("").env("SGLANG_SIM_TOKENS_PER_SECOND", "20").start();
    daemon.is_ready(SOON).await;
    let mut stream = open_stream(daemon.public(), 30);
    daemon.note_processes();
    daemon.signal(Signal::SIGINT);
    daemon.signal(Signal::SIGTERM);
    assert!(is_whole(&stream.answer()), "the stream was cut by a signal that counts as the same");
    assert_eq!(daemon.exit(SOON).await, 0);
    daemon.leaves_nothing(Duration::ZERO).await;
}

#[tokio::test]
async fn j03_j05_signals_that_mean_nothing_change_nothing() {
    let mut daemon = quick("").env("SGLANG_SIM_START_SECONDS", "1").start();
    daemon.reaches(&["loading"], SOON).await;
    let nothing =
        [Signal::SIGHUP, Signal::SIGPIPE, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH, Signal::SIGCHLD];
    for signal in nothing {
        daemon.signal(signal);
    }
    let engine = engine_pid(&daemon.is_ready(SOON).await);
    for signal in nothing {
        daemon.signal(signal);
        let status = daemon.status().await.unwrap();
        assert_eq!((text_at(&status, "/state").as_str(), engine_pid(&status)), ("ready", engine), "{signal}");
    }
    assert!(is_whole(&streamed(daemon.public(), 3)));
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g15_j05_a_log_that_nobody_reads_or_that_is_closed_stops_nothing() {
    let setup = quick("flood_stdout,flood_stderr").env("SGLANG_SIM_TOKENS_PER_SECOND", "200");
    nix::unistd::mkfifo(&setup.log(), Mode::S_IRWXU).unwrap();
    let reader = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(setup.log()).unwrap();
    // G15 first: the pipe fills up and stays full.
    let mut daemon = setup.start();
    daemon.is_ready(SOON).await;
    assert!(is_whole(&streamed(daemon.public(), 20)), "a log that stands still stops the stream");
    drop::<File>(reader);
    let first = engine_pid(&daemon.status().await.unwrap());
    send(first, Signal::SIGKILL);
    replaces(&mut daemon, first).await;
    assert!(is_whole(&streamed(daemon.public(), 20)));
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn j05_time_in_which_it_was_stopped_is_no_silence_of_the_engines() {
    let mut daemon = quick("").env("SGLANG_SIM_START_SECONDS", "5").set("start.stall", "3s").start();
    daemon
        .until("the load", SOON, async |daemon| {
            text_at(&daemon.status().await?, "/phase").contains("weights").then_some(())
        })
        .await;
    let engine = engine_pid(&daemon.status().await.unwrap());
    // The engine is silent as long as sglangd cannot hear it, and a little longer.
    send(engine, Signal::SIGSTOP);
    daemon.signal(Signal::SIGSTOP);
    let begun = Instant::now();
    eventually("longer than start.stall", SOON, async || (begun.elapsed() > Duration::from_millis(4500)).then_some(()))
        .await;
    daemon.signal(Signal::SIGCONT);
    daemon.until("it is told", SOON, async |d| d.log().contains("itself did not run").then_some(())).await;
    assert_eq!(daemon.state().await.as_deref(), Some("loading"), "judged for silence that it could not hear");
    send(engine, Signal::SIGCONT);
    daemon.until("it loads on", SOON, async |d| Some(d.state().await? == "loading").filter(|ok| *ok)).await;
    assert_eq!(engine_pid(&daemon.status().await.unwrap()), engine);
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn j04_a_storm_of_orphans_is_reaped_and_starves_nobody() {
    const ORPHANS: usize = 400;
    let storm =
        format!("i=0; while [ $i -lt {ORPHANS} ]; do (sleep 4 &) ; i=$((i+1)); done; exec {SGLANGD} simulate \"$@\"");
    let mut daemon = script(quick(""), &storm).start();
    let children = |daemon: &Daemon| processes::all().into_iter().filter(|p| p.parent == daemon.pid()).count();
    let mut most = 0;
    daemon
        .until("the orphans are ours", SOON, async |daemon| {
            most = most.max(children(daemon));
            (most > ORPHANS / 4).then_some(())
        })
        .await;
    let begun = Instant::now();
    assert_eq!(got(daemon.public(), "/live").status, 200);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    let engine = engine_pid(&daemon.is_ready(SOON).await);
    // Proxy, guard, engine; a zombie would be a fourth.
    daemon.until("all are reaped", SOON, async |daemon| (children(daemon) == 3).then_some(())).await;
    let status = daemon.status().await.unwrap();
    assert_eq!(
        (engine_pid(&status), number_at(&status, "/engine/restarts")),
        (engine, 0),
        "an orphan was taken for it"
    );
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn j08_folders_that_cannot_be_used_and_files_that_cannot_be_read() {
    let setup = quick("");
    let file = setup.folder().join("model/config.json");
    let mut words = setup.full_command("serve");
    let answer = words.env("SGLANGD_STATE_DIR", "/ignored").output_with_state(&file.join("state"));
    let said = String::from_utf8_lossy(&answer.stderr).into_owned();
    assert_eq!(answer.status.code(), Some(65), "{said}");
    assert!(said.contains("--state-dir") && said.contains("config.json/state"), "{said}");

    fs::write(setup.runtime_dir().join("engine.json"), "{ \"boot_id\": ").unwrap();
    let mut daemon = setup.start();
    daemon.is_ready(SOON).await;
    assert!(daemon.log().contains("engine.json cannot be read"), "{}", daemon.log());
    let starts: Vec<_> = fs::read_dir(state_dir(&daemon).join("starts")).unwrap().flatten().collect();
    assert_eq!(starts.len(), 1, "how long this start took is kept");
    fs::write(starts[0].path(), [0xff; 64]).unwrap();
    let first = engine_pid(&daemon.status().await.unwrap());
    send(first, Signal::SIGKILL);
    replaces(&mut daemon, first).await;
    assert!(serde_json::from_slice::<serde_json::Value>(&fs::read(starts[0].path()).unwrap()).is_ok(), "written anew");
    daemon.stops_clean(SOON).await;
}

/// `serve` with another state folder than the set-up's.
trait WithState {
    fn output_with_state(&mut self, folder: &std::path::Path) -> std::process::Output;
}

impl WithState for std::process::Command {
    fn output_with_state(&mut self, folder: &std::path::Path) -> std::process::Output {
        let words: Vec<_> = self.get_args().map(ToOwned::to_owned).collect();
        let mut command = std::process::Command::new(self.get_program());
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            command.arg(&word);
            if word == "--state-dir" {
                words.next();
                command.arg(folder);
            }
        }
        command.output().unwrap()
    }
}

#[tokio::test]
async fn j09_a_killed_sglangd_leaves_no_engine_and_the_next_one_serves_in_its_place() {
    let mut daemon = quick("orphan_setsid,leak_shm").set("engine.tp", "2").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let mut stream = open_stream(daemon.public(), 2000);
    daemon.note_processes();
    let begun = Instant::now();
    daemon.signal(Signal::SIGKILL);
    assert_eq!(daemon.exit(SOON).await, -9);
    daemon.until_gone("the engine, the proxy, the guard", Duration::from_secs(4)).await;
    println!("figure: SIGKILL of sglangd while serving to all gone: {:?}", begun.elapsed());
    assert_ne!(stream.answer().end, End::Complete, "a stream of a killed one looks complete");
    daemon.start_again();
    assert_ne!(engine_pid(&daemon.is_ready(SOON).await), first);
    assert!(is_whole(&streamed(daemon.public(), 3)));
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn j09_the_guard_can_be_lost_too() {
    let mut daemon = quick("").start();
    daemon.is_ready(SOON).await;
    send(the_one(&daemon, "guard"), Signal::SIGKILL);
    daemon.until("it is gone", SOON, async |d| d.processes_named("guard").is_empty().then_some(())).await;
    let first = engine_pid(&daemon.status().await.unwrap());
    send(first, Signal::SIGKILL);
    replaces(&mut daemon, first).await;
    assert!(daemon.log().contains("the guard is gone"), "{}", daemon.log());
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn j17_a_stop_and_a_death_at_once_have_one_end() {
    for _ in 0..2 {
        let mut daemon = quick("orphan_setsid").start();
        let engine = engine_pid(&daemon.is_ready(SOON).await);
        daemon.note_processes();
        send(engine, Signal::SIGKILL);
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.exit(SOON).await, 0, "{}", daemon.log());
        assert_eq!(daemon.log().matches("engine started: pid").count(), 1, "it was started again: {}", daemon.log());
        daemon.leaves_nothing(Duration::ZERO).await;
    }
}

#[tokio::test]
async fn j18_both_families_are_served_and_the_engine_is_asked_by_its_literal_address() {
    let Ok(six) = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)) else {
        // A machine without IPv6 has nothing to be tested here.
        return;
    };
    let port = six.local_addr().unwrap().port();
    drop(six);
    let mut daemon = quick("").listening_on(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).start();
    daemon.is_ready(SOON).await;
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        assert!(is_whole(&streamed(SocketAddr::new(ip, port), 3)), "{ip}");
    }
    let engine = engine_pid(&daemon.status().await.unwrap());
    let command = processes::all().into_iter().find(|p| p.pid == engine).unwrap().command;
    assert!(command.contains("--host 127.0.0.1 "), "{command}");
    assert!(daemon.log().contains(&format!("http://[::1]:{port}")), "an address to copy: {}", daemon.log());
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn j07_where_no_file_may_be_opened_it_says_so_serves_on_and_comes_back() {
    let mut daemon = quick("").set("restart.max", "100").set("restart.backoff", "200ms").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let pid = rustix::process::Pid::from_raw(daemon.pid()).unwrap();
    let limit = |soft: Option<u64>| {
        let own = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let new = rustix::process::Rlimit { current: soft.or(own.current), maximum: own.maximum };
        rustix::process::prlimit(Some(pid), rustix::process::Resource::Nofile, new).unwrap();
    };
    // What is open stays open, and nothing more may be opened: the engine dies, and none can be started.
    limit(Some(3));
    send(first, Signal::SIGKILL);
    let named = |daemon: &Daemon| daemon.log().contains("a limit on open files is reached (");
    daemon.until("it is named", SOON, async |daemon| named(daemon).then_some(())).await;
    assert!(daemon.log().contains("LimitNOFILE"), "{}", daemon.log());
    assert_eq!(got(daemon.public(), "/live").status, 200, "the proxy serves on");
    assert_eq!(got(daemon.public(), "/ready").status, 503);
    limit(None);
    replaces(&mut daemon, first).await;
    daemon.stops_clean(SOON).await;
}
