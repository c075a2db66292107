//! Group G: what engines do to whoever supervises them, played by the simulated one.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use tokio::time::Instant;

use crate::harness::client::{Client, End, get};
use crate::harness::daemon::{Daemon, Setup};
use crate::harness::scene::{
    SOON, engine_pid, got, is_whole, number_at, open_stream, proxy_pid, quick, refuses_with, replaces, script, send,
    stream_of, streamed, text_at, the_one,
};

/// The first status that is neither ready nor busy, and when it was seen.
async fn notices(daemon: &mut Daemon) -> (Value, Instant) {
    daemon
        .until("the death is noticed", SOON, async |daemon| {
            let status = daemon.status().await?;
            let state = text_at(&status, "/state");
            (!["ready", "busy"].contains(&state.as_str())).then(|| (status, Instant::now()))
        })
        .await
}

#[tokio::test]
async fn g01_a_start_that_cannot_succeed_is_said_once_and_not_repeated() {
    let import_error = "echo 'Traceback (most recent call last):' >&2
echo '  File \"<frozen runpy>\", line 189, in _run_module_as_main' >&2
echo \"ModuleNotFoundError: No module named 'sglang'\" >&2
exit 1";
    let mut daemon = script(quick(""), import_error).start();
    let status = daemon.reaches(&["gave_up"], SOON).await;
    assert_eq!(number_at(&status, "/engine/restarts"), 0, "repeating cannot help");
    assert!(text_at(&status, "/reason").contains("No module named 'sglang'"), "the engine's last line: {status}");
    assert_eq!(text_at(&status, "/engine/last_exit"), "exit status 1");
    let refused = Client::ask(daemon.public(), stream_of(1));
    assert_eq!((refused.status, refused.code().as_str()), (503, "engine_gave_up"));
    assert!(refused.text().contains("No module named"), "{}", refused.text());
    assert_eq!(got(daemon.public(), "/live").status, 200);
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g01_what_vanished_after_the_check_is_named_too() {
    // Its interpreter is missing: the file is there and executable, and `execve` says otherwise.
    let setup = quick("").set("restart.on_give_up", "exit");
    let engine = setup.folder().join("engine");
    crate::harness::scene::write_script(&engine, "");
    fs::write(&engine, "#!/nowhere/python3\n").unwrap();
    let mut daemon = setup.set("engine.command", &format!("[{}]", engine.display())).start();
    assert_eq!(daemon.exit(SOON).await, 65, "{}", daemon.log());
    let named = format!("{} does not exist", engine.display());
    assert!(daemon.log().contains(&named) || daemon.log().contains("/nowhere/python3"), "{}", daemon.log());
    daemon.leaves_nothing(Duration::ZERO).await;
}

#[tokio::test]
async fn g02_three_deaths_of_one_kind_end_the_tries_and_http_stays_up() {
    let mut daemon = quick("exit_at_start=1,leak_shm").start();
    let status = daemon.reaches(&["gave_up"], SOON).await;
    assert_eq!(number_at(&status, "/engine/restarts"), 2, "three starts: {status}");
    assert!(!text_at(&status, "/reason").is_empty(), "{status}");
    assert_eq!(daemon.log().matches("engine started: pid").count(), 3);
    let refused = Client::ask(daemon.public(), stream_of(1));
    assert_eq!((refused.status, refused.code().as_str()), (503, "engine_gave_up"));
    assert!(refused.text().contains(&text_at(&status, "/reason")), "{}", refused.text());
    assert!(refused.header("retry-after").is_some());
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g02_giving_up_may_end_it_with_the_code_of_a_crash_loop() {
    let mut daemon = quick("exit_at_start=1,leak_shm").set("restart.on_give_up", "exit").start();
    assert_eq!(daemon.exit(SOON).await, 75, "{}", daemon.log());
    daemon.leaves_nothing(Duration::ZERO).await;
}

#[tokio::test]
async fn g04_a_start_without_progress_is_ended_and_tried_again() {
    let mut daemon = quick("hang_at_load,orphan_setsid").set("start.stall", "1s").set("restart.max", "2").start();
    let status = daemon.reaches(&["gave_up"], SOON).await;
    assert_eq!(number_at(&status, "/engine/restarts"), 1, "{status}");
    let reason = text_at(&status, "/reason");
    assert!(reason.contains("no progress for start.stall (1 s)") && reason.contains("weights"), "{reason}");
    let after = daemon.processes_named("simulate");
    assert!(after.is_empty(), "it lies in GaveUp with an engine beside it: {after:?}");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g05_a_port_found_taken_after_the_load_is_another_one_in_the_next_start() {
    let mut daemon = quick("busy_port").env("SGLANG_SIM_BIND_WAIT_SECONDS", "600").set("restart.max", "2").start();
    let status = daemon.reaches(&["gave_up"], SOON).await;
    assert!(text_at(&status, "/reason").contains("port"), "{status}");
    let log = daemon.log();
    let ports: BTreeSet<&str> = log.split("--port ").skip(1).filter_map(|rest| rest.split(' ').next()).collect();
    assert_eq!(ports.len(), 2, "the second start has a port of its own: {ports:?}");
    daemon.stops_clean(SOON).await;
}

/// Answers 200 to everything, on a port that another one holds.
struct Stranger {
    asked: std::sync::mpsc::Receiver<String>,
}

impl Stranger {
    fn listens(addr: SocketAddr) -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&addr.into()).unwrap();
        socket.listen(64).unwrap();
        let listener: std::net::TcpListener = socket.into();
        let (tell, asked) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut head = [0; 4096];
                let read = stream.read(&mut head).unwrap_or(0);
                let _ = tell.send(String::from_utf8_lossy(&head[..read]).into_owned());
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            }
        });
        Self { asked }
    }
}

#[tokio::test]
async fn g05_a_strangers_health_is_never_trusted() {
    let mut daemon = quick("").env("SGLANG_SIM_START_SECONDS", "3").start();
    let status = daemon.reaches(&["loading"], SOON).await;
    let port = u16::try_from(number_at(&status, "/engine/port")).unwrap();
    let first = engine_pid(&status);
    let stranger = Stranger::listens(SocketAddr::from(([127, 0, 0, 1], port)));
    let asked = stranger.asked.recv_timeout(SOON).unwrap();
    assert!(asked.starts_with("GET /ready"), "it is looked at: {asked}");
    let said = format!("127.0.0.1:{port} is answered by pid {}", std::process::id());
    daemon
        .until("the stranger is named", SOON, async |daemon| {
            let status = daemon.status().await?;
            assert_ne!(text_at(&status, "/state"), "ready", "a stranger's word was taken");
            daemon.log().contains(&said).then_some(())
        })
        .await;
    assert_eq!(got(daemon.public(), "/health").status, 503);
    assert_eq!(engine_pid(&daemon.status().await.unwrap()), first, "nothing to kill the engine for yet");
    for asked in stranger.asked.try_iter() {
        assert!(!asked.to_lowercase().contains("authorization"), "it was even given a key: {asked}");
    }
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g06_g08_a_killed_rank_ends_the_whole_engine_and_a_new_one_comes() {
    // `/health` goes on saying 200, and the launcher sees nothing.
    let mut daemon = quick("health_lies").set("engine.tp", "3").start();
    let ready = daemon.is_ready(SOON).await;
    assert_eq!(ready["engine"]["ranks"].as_array().map(Vec::len), Some(4), "{ready}");
    let first = engine_pid(&ready);
    let old: BTreeSet<i32> = daemon.processes_named("sglang::").iter().map(|p| p.pid).collect();
    assert_eq!(old.len(), 4);
    let begun = Instant::now();
    send(the_one(&daemon, "sglang::scheduler_TP2"), Signal::SIGKILL);
    let (_, noticed) = notices(&mut daemon).await;
    println!("figure: a rank's death to notice, launcher blind: {:?}", noticed - begun);
    assert!(noticed - begun < Duration::from_secs(4), "{:?}", noticed - begun);
    let again = replaces(&mut daemon, first).await;
    assert_eq!(number_at(&again, "/engine/restarts"), 1);
    assert_eq!(again["engine"]["ranks"].as_array().map(Vec::len), Some(4), "all of them are new: {again}");
    assert!(daemon.processes().iter().all(|p| !old.contains(&p.pid)), "one of the old ones still lives");
    assert!(daemon.log().contains("sglang::schedul"), "the dead one is named: {}", daemon.log());
    assert!(is_whole(&streamed(daemon.public(), 3)));
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g08_a_dead_engine_is_noticed_at_once_and_its_end_is_told() {
    let mut daemon = quick("leak_shm,orphan_setsid").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let begun = Instant::now();
    send(first, Signal::SIGKILL);
    let (_, noticed) = notices(&mut daemon).await;
    println!("figure: the engine's exit to notice, asked over HTTP: {:?}", noticed - begun);
    assert!(noticed - begun < Duration::from_secs(1), "{:?}", noticed - begun);
    let again = replaces(&mut daemon, first).await;
    assert_eq!(text_at(&again, "/engine/last_exit"), "killed by SIGKILL");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g10_a_stopped_scheduler_is_suspected_then_hung_then_replaced() {
    let mut daemon = quick("").set("health.hang_after", "4s").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let addr = daemon.public();
    send(the_one(&daemon, "sglang::scheduler"), Signal::SIGSTOP);
    // Somebody waits, too.
    let mut client = Client::connect(addr);
    client.send(stream_of(5));
    let suspected = daemon
        .until("a hang is suspected", SOON, async |daemon| {
            let status = daemon.status().await?;
            assert_ne!(text_at(&status, "/state"), "failing", "it was killed without a suspicion before");
            status["engine"]["suspected_seconds"].is_number().then_some(status)
        })
        .await;
    assert!(["ready", "busy"].contains(&text_at(&suspected, "/state").as_str()), "traffic goes on: {suspected}");
    refuses_with(&mut daemon, &get("/ready"), "engine_suspected").await;
    assert_eq!(got(addr, "/health").status, 200, "but nobody is to kill it yet");
    let again = replaces(&mut daemon, first).await;
    assert_eq!(number_at(&again, "/engine/restarts"), 1);
    assert!(daemon.log().contains("The engine hung"), "{}", daemon.log());
    let answer = client.answer();
    assert!(!is_whole(&answer), "{answer:?}");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g07_silence_without_a_waiting_request_is_no_hang() {
    let mut daemon = quick("").set("health.hang_after", "1s").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let begun = Instant::now();
    daemon
        .until("twice the limit", SOON, async |daemon| {
            let status = daemon.status().await?;
            assert_eq!(text_at(&status, "/state"), "ready", "{status}");
            (begun.elapsed() > Duration::from_secs(2)).then_some(())
        })
        .await;
    assert_eq!(engine_pid(&daemon.status().await.unwrap()), first);
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g11_g12_g24_what_ignores_sigterm_or_fled_is_killed_within_the_grace() {
    let mut daemon = quick("ignore_sigterm,orphan_setsid,leak_shm").set("shutdown.grace", "10s").start();
    daemon.is_ready(SOON).await;
    let stray = the_one(&daemon, "::stray");
    let session = daemon.processes().iter().find(|p| p.pid == stray).unwrap().session;
    assert_ne!(i64::from(session), number_at(&daemon.status().await.unwrap(), "/engine/pid"), "it fled the session");
    let begun = Instant::now();
    daemon.terminate();
    assert_eq!(daemon.exit(SOON).await, 0, "{}", daemon.log());
    let took = begun.elapsed();
    assert!((Duration::from_secs(7)..Duration::from_millis(10_500)).contains(&took), "{took:?} of a grace of 10 s");
    daemon.leaves_nothing(Duration::ZERO).await;
}

#[tokio::test]
async fn g12_reaping_ends_only_when_the_fled_one_is_gone_too() {
    let mut daemon = quick("orphan_setsid").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let old = the_one(&daemon, "::stray");
    send(first, Signal::SIGKILL);
    daemon
        .until("a new stray", SOON, async |daemon| {
            let strays: Vec<i32> = daemon.processes_named("::stray").iter().map(|p| p.pid).collect();
            let engine = daemon.status().await?["engine"]["pid"].as_i64();
            let new = engine.is_some_and(|pid| pid != i64::from(first));
            assert!(!new || !strays.contains(&old), "a second engine beside what was left of the first");
            (new && strays.iter().any(|pid| *pid != old)).then_some(())
        })
        .await;
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g14_floods_and_endless_lines_block_nothing_and_fill_nothing() {
    let mut daemon = quick("flood_stdout,long_line=8").start();
    daemon.is_ready(SOON).await;
    assert!(is_whole(&streamed(daemon.public(), 5)));
    daemon
        .until("the dropped lines are counted", SOON, async |daemon| {
            daemon.log().contains("lines of the engine were not logged").then_some(())
        })
        .await;
    assert!(daemon.log().contains("a line was cut"), "the line of 8 MiB is told of");
    let size = daemon.log().len();
    assert!(size < 4 << 20, "the log grew to {size} bytes");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g16_an_engine_that_closes_its_output_is_still_supervised() {
    let mut daemon = quick("close_stdio").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    assert!(is_whole(&streamed(daemon.public(), 3)));
    let busy = |pid: i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<u64> = stat.rsplit_once(") ").unwrap().1.split(' ').filter_map(|f| f.parse().ok()).collect();
        // utime and stime, in hundredths.
        fields[10] + fields[11]
    };
    let (begun, before) = (Instant::now(), busy(daemon.pid()));
    daemon
        .until("a second and a half", SOON, async |_| (begun.elapsed() > Duration::from_millis(1500)).then_some(()))
        .await;
    let spent = busy(daemon.pid()) - before;
    assert!(spent < 75, "{spent} hundredths of a second of computing: a busy loop on a closed pipe");
    send(first, Signal::SIGKILL);
    replaces(&mut daemon, first).await;
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g17_garbage_on_http_is_never_taken_for_readiness() {
    let mut daemon = quick("garbage_http").set("start.stall", "1s").set("restart.max", "1").start();
    let status = daemon
        .until("given up", SOON, async |daemon| {
            let status = daemon.status().await?;
            assert!(!["ready", "busy"].contains(&text_at(&status, "/state").as_str()), "{status}");
            (text_at(&status, "/state") == "gave_up").then_some(status)
        })
        .await;
    assert!(text_at(&status, "/reason").contains("start.stall"), "{status}");
    assert!(daemon.log().contains("looked ready, but its /health said otherwise"), "{}", daemon.log());
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g20_streams_end_with_an_error_and_new_requests_wait_for_the_next_engine() {
    let mut daemon = quick("orphan_setsid").env("SGLANG_SIM_TOKENS_PER_SECOND", "10").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let addr = daemon.public();
    let mut streams: Vec<Client> = (0..5).map(|_| open_stream(addr, 2000)).collect();
    send(first, Signal::SIGKILL);
    let (status, _) = notices(&mut daemon).await;
    // From the first moment at which it is known to be gone.
    let mut held: Vec<Client> = (0..5)
        .map(|_| {
            let mut client = Client::connect(addr);
            client.send(stream_of(3));
            client
        })
        .collect();
    for stream in &mut streams {
        let answer = stream.answer();
        assert_ne!(answer.end, End::Complete, "a cut stream looks complete");
        assert!(answer.text().contains("stream_interrupted") && !answer.text().contains("[DONE]"), "{}", answer.text());
    }
    for client in &mut held {
        let answer = client.answer();
        assert!(is_whole(&answer), "not held over the restart ({status}): {answer:?}\n{}", daemon.log());
    }
    replaces(&mut daemon, first).await;
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn g22_sigquit_of_an_orphaned_rank_is_survived() {
    let mut daemon = quick("").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    daemon.signal(Signal::SIGQUIT);
    daemon.until("it is told", SOON, async |daemon| daemon.log().contains("SIGQUIT").then_some(())).await;
    let status = daemon.status().await.unwrap();
    assert_eq!((text_at(&status, "/state").as_str(), engine_pid(&status)), ("ready", first));
    // Caught, not ignored: ignoring would be inherited.
    let ignored = fs::read_to_string(format!("/proc/{first}/status")).unwrap();
    let ignored = ignored.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim().to_owned();
    let mask = u64::from_str_radix(&ignored, 16).unwrap();
    assert_eq!(mask & (1 << (Signal::SIGQUIT as u64 - 1)), 0, "the engine ignores SIGQUIT: {ignored}");
    daemon.stops_clean(SOON).await;
}

/// An engine in the window in which its children have no parent-death signal.
async fn importing(setup: Setup) -> Daemon {
    let mut daemon = setup.env("SGLANG_SIM_IMPORT_SECONDS", "60").set("engine.tp", "2").start();
    daemon
        .until("the ranks import", SOON, async |daemon| {
            (daemon.processes_named("multiprocessing.spawn").len() == 3).then_some(())
        })
        .await;
    daemon
}

#[tokio::test]
async fn g25_a_supervisor_killed_while_the_ranks_import_leaves_nothing() {
    let mut daemon = importing(quick("leak_shm,orphan_setsid")).await;
    daemon.note_processes();
    let begun = Instant::now();
    daemon.signal(Signal::SIGKILL);
    assert_eq!(daemon.exit(SOON).await, -9);
    daemon.until_gone("everything of the engine", Duration::from_secs(4)).await;
    println!("figure: SIGKILL of the supervisor in the import window to all gone: {:?}", begun.elapsed());
}

#[tokio::test]
async fn g25_what_even_the_guard_could_not_end_the_next_start_ends() {
    let mut daemon = importing(quick("leak_shm,orphan_setsid")).await;
    daemon.note_processes();
    let guard = the_one(&daemon, "guard");
    send(guard, Signal::SIGKILL);
    daemon.signal(Signal::SIGKILL);
    assert_eq!(daemon.exit(SOON).await, -9);
    let left: BTreeSet<i32> = daemon.processes_named("multiprocessing.spawn").iter().map(|p| p.pid).collect();
    assert_eq!(left.len(), 3, "orphans that import: this test has something to end");
    daemon.start_again();
    daemon
        .until("the next engine", SOON, async |daemon| {
            let status = daemon.status().await?;
            let started = status["engine"]["pid"].is_number();
            let old = daemon.processes().iter().any(|p| left.contains(&p.pid));
            assert!(!(started && old), "a second engine beside what was left");
            started.then_some(())
        })
        .await;
    assert!(daemon.log().contains("that an earlier run had left"), "{}", daemon.log());
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
async fn a_killed_proxy_costs_its_connections_and_nothing_else() {
    // Its one place is taken by a request of the dead one, until the engine has let go of it.
    let mut daemon = quick("").env("SGLANG_SIM_TOKENS_PER_SECOND", "20").set("limits.max", "1").start();
    let ready = daemon.is_ready(SOON).await;
    let addr = daemon.public();
    daemon
        .until("a life of some length", SOON, async |d| {
            (number_at(&d.status().await?, "/uptime_seconds") >= 2).then_some(())
        })
        .await;
    let mut stream = open_stream(addr, 1000);
    let begun = Instant::now();
    send(proxy_pid(&ready), Signal::SIGKILL);
    // Connections of this moment wait in the listener's backlog.
    let answer = got(addr, "/health");
    let took = begun.elapsed();
    println!("figure: SIGKILL of the proxy to the next answered request: {took:?}");
    assert_eq!(answer.status, 200, "the new one knows of the engine");
    assert!(took < Duration::from_millis(900), "{took:?}");
    assert_ne!(stream.answer().end, End::Complete);
    assert!(is_whole(&streamed(addr, 3)));
    let took = begun.elapsed();
    println!("figure: SIGKILL of the proxy, all places taken, to the next whole stream: {took:?}");
    assert!(took < Duration::from_secs(1), "the next look came late: {took:?}");
    let status = daemon.status().await.unwrap();
    assert_eq!(engine_pid(&status), engine_pid(&ready), "the engine did not even notice");
    assert_ne!(proxy_pid(&status), proxy_pid(&ready));
    assert_eq!((number_at(&status, "/proxy/restarts"), number_at(&status, "/engine/restarts")), (1, 0));
    // The engine has given up on the request whose client is gone.
    daemon
        .until("nothing is open", SOON, async |daemon| {
            (number_at(&daemon.status().await?, "/requests/in_flight") == 0).then_some(())
        })
        .await;
    daemon.stops_clean(SOON).await;
}
