//! Machines that give less than they should: no `/proc`, no rights, no memory, no pids, processes that
//! cannot be killed. Needs root, to take away what others have.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid};
use tokio::time::Instant;

use crate::harness::client::Client;
use crate::harness::daemon::{Daemon, SGLANGD, Setup};
use crate::harness::processes;
use crate::harness::scene::{
    SOON, engine_pid, got, is_remarked, is_whole, number_at, open_stream, quick, replaces, script, send, stream_of,
    streamed, text_at, the_one,
};

/// A group of the first version's tree, of the test's own; removed at the end.
struct Group(PathBuf);

impl Group {
    /// Below our own in this controller's tree.
    fn of(controller: &str) -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let path = own.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            (parts.next()? == controller).then(|| parts.next())?
        });
        let path = path.unwrap_or_else(|| panic!("no {controller} controller here: {own}")).trim_start_matches('/');
        let tree = Path::new("/sys/fs/cgroup").join(controller);
        // In a container the path may be that of the outside.
        let base = Some(tree.join(path)).filter(|base| base.exists()).unwrap_or(tree);
        let group = base.join(format!("sglangd-test-{}", std::process::id()));
        fs::create_dir(&group).unwrap();
        Self(group)
    }

    fn set(&self, file: &str, value: &str) {
        fs::write(self.0.join(file), value).unwrap_or_else(|error| panic!("{file} = {value}: {error}"));
    }

    fn take_in(&self, pid: i32) {
        self.set("cgroup.procs", &pid.to_string());
    }

    /// All that runs of it, and what it starts.
    fn take_in_all(&self, daemon: &Daemon) {
        for process in daemon.processes() {
            // One that ends meanwhile is nobody's to move.
            let _ = fs::write(self.0.join("cgroup.procs"), process.pid.to_string());
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A failed test's processes end after this; then the folder stays, and is empty.
        let _ = fs::remove_dir(&self.0);
    }
}

/// As a user who may do nothing, with a copy of the program where that one may read it.
fn as_nobody(setup: Setup, first: &str) -> Setup {
    let program = setup.folder().join("sglangd");
    fs::copy(SGLANGD, &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let nobody = (Some(Uid::from_raw(65_534)), Some(Gid::from_raw(65_534)));
    for folder in
        [setup.folder().to_owned()].into_iter().chain(["tmp", "run", "state", "home"].map(|n| setup.folder().join(n)))
    {
        nix::unistd::chown(&folder, nobody.0, nobody.1).unwrap();
    }
    let program = program.display().to_string();
    // `serve` is this copy, too: the words that follow begin with the program that it replaces.
    let script = format!("{first} shift; exec setpriv --reuid=65534 --regid=65534 --clear-groups {program} \"$@\"");
    let engine = format!("[{program}, simulate]");
    setup.set("engine.command", &engine).under(&["unshare", "-m", "sh", "-c", &script, "sh"])
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn j14_as_nobody_who_sees_no_other_process_it_serves_and_leaves_nothing() {
    let setup = as_nobody(quick("orphan_setsid,leak_shm"), "mount -t proc -o hidepid=invisible proc /proc;");
    let mut daemon = setup.start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    assert!(daemon.log().contains("gets no cgroup of its own"), "what is lost is said: {}", daemon.log());
    assert!(is_whole(&streamed(daemon.public(), 3)));
    send(first, Signal::SIGKILL);
    replaces(&mut daemon, first).await;
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn j14_without_proc_it_serves_says_what_is_lost_and_leaves_nothing() {
    let script = "mount -t tmpfs none /proc && exec \"$@\"";
    let setup = quick("").env("SGLANG_SIM_PROGRAM", SGLANGD).under(&["unshare", "-m", "sh", "-c", script, "sh"]);
    let mut daemon = setup.start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    assert!(daemon.log().contains("there is no /proc"), "{}", daemon.log());
    assert!(is_whole(&streamed(daemon.public(), 3)));
    let old: Vec<i32> = daemon.processes_named("sglang::").iter().map(|p| p.pid).collect();
    send(first, Signal::SIGKILL);
    replaces(&mut daemon, first).await;
    let now: Vec<i32> = daemon.processes_named("sglang::").iter().map(|p| p.pid).collect();
    assert!(old.iter().all(|pid| !now.contains(pid)), "a rank of the first engine lives: {old:?} {now:?}");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn g09_an_engine_that_the_kernel_killed_for_memory_is_said_to_be() {
    let group = Group::of("memory");
    group.set("memory.limit_in_bytes", &(400_u64 << 20).to_string());
    let mut daemon = quick("eat_memory=1").set("restart.backoff", "60s").start();
    group.take_in_all(&daemon);
    let begun = daemon
        .until("the engine dies", SOON, async |daemon| {
            let status = daemon.status().await?;
            // Whatever was started before it was moved.
            (text_at(&status, "/state") == "backoff").then_some(status)
        })
        .await;
    let reason = text_at(&begun, "/reason");
    assert!(reason.contains("OOM killer"), "{reason}\n{}", daemon.log());
    let refused = Client::ask(daemon.public(), "GET /ready HTTP/1.1\r\nhost: x\r\n\r\n");
    assert!(refused.text().contains("OOM killer"), "clients are told the same: {}", refused.text());
    let bundle = daemon.until("the bundle", SOON, async |d| {
        let path = text_at(&d.status().await?, "/bundle");
        path.ends_with("-host_oom").then_some(path)
    });
    let cause = fs::read_to_string(Path::new(&bundle.await).join("cause")).unwrap();
    assert!(cause.starts_with("host_oom\n"), "{cause}");
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn g23_what_sigkill_does_not_end_is_named_and_no_second_engine_comes_beside_it() {
    let group = Group::of("freezer");
    let mut daemon = quick("").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    // Frozen, it takes no signal: as one that hangs in a driver.
    let rank = the_one(&daemon, "sglang::scheduler");
    group.take_in(rank);
    group.set("freezer.state", "FROZEN");
    send(first, Signal::SIGKILL);
    let status = daemon.reaches(&["unkillable"], Duration::from_secs(40)).await;
    let reason = text_at(&status, "/reason");
    assert!(reason.contains(&format!("pid {rank} ")), "{reason}");
    let refused = Client::ask(daemon.public(), stream_of(1));
    assert_eq!(refused.status, 503);
    assert!(refused.text().contains(&format!("pid {rank} ")), "{}", refused.text());
    assert_eq!(daemon.log().matches("engine started: pid").count(), 1, "a second engine beside it");
    group.set("freezer.state", "THAWED");
    replaces(&mut daemon, first).await;
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn j07_where_no_process_may_be_started_it_says_so_serves_on_and_comes_back() {
    let group = Group::of("pids");
    let mut daemon = quick("").set("restart.max", "100").set("restart.backoff", "200ms").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    group.take_in_all(&daemon);
    // The engine dies and nothing may be started in its place. The threads that are there go on.
    group.set("pids.max", "1");
    send(first, Signal::SIGKILL);
    let status = daemon
        .until("it is named", SOON, async |daemon| {
            let status = daemon.status().await?;
            text_at(&status, "/reason").contains("a limit on processes is reached").then_some(status)
        })
        .await;
    assert!(text_at(&status, "/advice").contains("TasksMax"), "{status}");
    assert_eq!(got(daemon.public(), "/live").status, 200, "the proxy serves on");
    group.set("pids.max", "max");
    let again = daemon
        .until("a place is free again", SOON, async |daemon| {
            let status = daemon.status().await?;
            (text_at(&status, "/state") == "ready").then_some(status)
        })
        .await;
    assert!(number_at(&again, "/engine/restarts") >= 1);
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn j04_ten_thousand_orphans_are_reaped_while_streams_flow() {
    const ORPHANS: usize = 10_000;
    // Each is forked twice and left by its parent: it comes to sglangd, its nearest reaper.
    let storm = format!(
        "(i=0; while [ $i -lt {ORPHANS} ]; do (sleep 0.1 &); i=$((i+1)); done; echo the storm is over) &\n\
         exec {SGLANGD} simulate \"$@\""
    );
    let mut daemon = script(quick(""), &storm).start();
    let engine = engine_pid(&daemon.is_ready(SOON).await);
    let addr = daemon.public();
    let (mut streams, mut slowest, begun) = (0, Duration::ZERO, Instant::now());
    while !daemon.log().contains("the storm is over") {
        assert!(begun.elapsed() < Duration::from_mins(5), "the storm does not end");
        let asked = Instant::now();
        assert!(is_whole(&streamed(addr, 5)), "a stream was hurt");
        slowest = slowest.max(asked.elapsed());
        streams += 1;
    }
    println!(
        "figure: {ORPHANS} orphans in {:.1?}, {streams} streams meanwhile, the slowest {slowest:.1?}",
        begun.elapsed()
    );
    assert!(streams > 0, "nothing flowed meanwhile");
    let children = |daemon: &Daemon| processes::all().into_iter().filter(|p| p.parent == daemon.pid()).count();
    // Proxy, guard, engine; a zombie would be a fourth.
    daemon.until("all are reaped", SOON, async |daemon| (children(daemon) == 3).then_some(())).await;
    let status = daemon.status().await.unwrap();
    assert_eq!((engine_pid(&status), number_at(&status, "/engine/restarts")), (engine, 0), "one was taken for it");
    daemon.stops_clean(SOON).await;
}

/// The wall clock of whoever loads it is so many seconds off as a file says, whenever it is asked.
const OFF: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long off(void) {
    char text[32] = {0};
    const char *path = getenv("SGLANG_TEST_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    ssize_t n = read(file, text, sizeof text - 1);
    close(file);
    return n > 0 ? strtol(text, 0, 10) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, at);
    if (!failed && clock == CLOCK_REALTIME) at->tv_sec += off();
    return failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}
"#;

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn j06_a_wall_clock_that_is_set_moves_no_decision() {
    let setup = quick("").set("engine.tp", "2").set("health.hang_after", "10s").set("health.probe_interval", "1s");
    let (source, library, clock) =
        (setup.folder().join("off.c"), setup.folder().join("off.so"), setup.folder().join("clock"));
    fs::write(&source, OFF).unwrap();
    fs::write(&clock, "0").unwrap();
    let made =
        Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).args([&library, &source]).arg("-ldl").status();
    assert!(made.unwrap().success());
    let (library, file) = (library.display().to_string(), clock.display().to_string());
    let mut daemon = setup.env("LD_PRELOAD", &library).env("SGLANG_TEST_CLOCK", &file).start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let now = jiff::Timestamp::now().as_second();
    // A request waits all the while, so that silence would count; its tokens come slowly.
    let mut client = open_stream(daemon.public(), 1_500);
    for (off, year) in
        [(3_600, None), (-3_600, None), (100 * 365 * 86_400, Some("212")), (1_000_000 - now, Some("1970-"))]
    {
        fs::write(&clock, off.to_string()).unwrap();
        let begun = Instant::now();
        daemon
            .until("a while with that clock", SOON, async |daemon| {
                let status = daemon.status().await?;
                assert!(!status["engine"]["suspected_seconds"].is_number(), "{off} s: {status}");
                assert_eq!((text_at(&status, "/state").as_str(), engine_pid(&status)), ("ready", first), "{off} s");
                (begun.elapsed() > Duration::from_secs(3)).then_some(())
            })
            .await;
        if let Some(year) = year {
            // What is said bears the time that it is: the clock was really set.
            daemon.signal(Signal::SIGUSR1);
            daemon.signal(Signal::SIGHUP);
            daemon
                .until("a line of that year", SOON, async |d| d.log().contains(&format!("\n{year}")).then_some(()))
                .await;
        }
    }
    fs::write(&clock, "0").unwrap();
    let status = daemon.status().await.unwrap();
    assert_eq!((number_at(&status, "/engine/suspected_total"), number_at(&status, "/engine/restarts")), (0, 0));
    client.until("[DONE]");
    drop(client);
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn j06_after_a_long_sleep_of_the_machine_it_is_probed_again_before_any_verdict() {
    let group = Group::of("freezer");
    let mut daemon = quick("").set("health.hang_after", "6s").set("health.probe_interval", "2s").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    let mut client = open_stream(daemon.public(), 600);
    group.take_in_all(&daemon);
    // All of it at once, as a machine that sleeps: clocks go on, which those of a machine that sleeps need not.
    group.set("freezer.state", "FROZEN");
    tokio::time::sleep(Duration::from_secs(15)).await;
    group.set("freezer.state", "THAWED");
    let said = "sglangd itself did not run for";
    daemon.until("it knows that it slept", SOON, async |daemon| daemon.log().contains(said).then_some(())).await;
    client.until("[DONE]");
    let status = daemon.status().await.unwrap();
    assert_eq!(engine_pid(&status), first, "{}", daemon.log());
    assert_eq!((number_at(&status, "/engine/suspected_total"), number_at(&status, "/engine/restarts")), (0, 0));
    assert!(is_whole(&streamed(daemon.public(), 3)));
    drop(client);
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn j07_where_no_thread_may_be_started_a_death_is_told_and_nothing_of_ours_dies_of_it() {
    let group = Group::of("pids");
    let mut daemon = quick("").set("restart.max", "100").set("restart.backoff", "200ms").start();
    let first = engine_pid(&daemon.is_ready(SOON).await);
    // So long nobody needs a thread for what blocks, and a runtime lets those go that are idle for ten seconds.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let proxy = number_at(&daemon.status().await.unwrap(), "/proxy/pid");
    group.take_in_all(&daemon);
    group.set("pids.max", "1");
    send(first, Signal::SIGKILL);
    let named = async |daemon: &Daemon| {
        let status = daemon.status().await?;
        text_at(&status, "/reason").contains("a limit on processes is reached").then_some(status)
    };
    let status = daemon.until("it is named", SOON, named).await;
    assert_eq!(number_at(&status, "/proxy/pid"), proxy, "{status}");
    group.set("pids.max", "max");
    replaces(&mut daemon, first).await;
    daemon.stops_clean(SOON).await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn weights_that_come_from_the_disk_are_named_as_what_makes_a_start_slow() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let weights = folder.path().join("weights");
    let target = format!("of={}", weights.display());
    let made =
        Command::new("dd").args(["if=/dev/zero", "bs=1M", "count=192", "conv=fsync", "status=none", &target]).status();
    assert!(made.unwrap().success());
    // Read past the page cache, as a rank reads from a cold disk; then as from a warm one.
    for (flags, cold) in [("iflag=direct", true), ("", false)] {
        let text = format!(
            "echo '[2026-11-23 14:49:03] Load weight begin. avail mem=177.61 GB'\n\
             dd if={} bs=1M {flags} status=none | while [ $(head -c 4M | wc -c) -gt 0 ]; do sleep 0.2; done\n\
             exec {SGLANGD} simulate \"$@\"",
            weights.display()
        );
        // Looked at each two seconds.
        let mut daemon = script(quick(""), &text).set("start.stall", "8s").start();
        daemon.reaches(&["ready"], Duration::from_mins(1)).await;
        let said = daemon.log().contains("the weights are not in the page cache: they come from the disk at");
        assert_eq!(said, cold, "{}", daemon.log());
        daemon.stops_clean(SOON).await;
    }
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn kernels_compiled_for_a_cache_that_does_not_last_are_said_in_log_status_and_metrics() {
    // One after the other, long enough to be more than a shape or two, in a load that has begun. The cache is on a
    // tmpfs.
    let text = format!(
        "echo '[2026-11-23 14:49:03] Load weight begin. avail mem=177.61 GB'\n\
         cp /bin/sh \"$TMPDIR/cicc\"\n\
         for n in $(seq 80); do \"$TMPDIR/cicc\" -c 'sleep 0.5; :'; done\n\
         exec {SGLANGD} simulate \"$@\""
    );
    let cache = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = script(quick(""), &text).env("SGLANG_CACHE_DIR", cache.path().to_str().unwrap()).start();
    daemon.reaches(&["ready"], Duration::from_mins(2)).await;
    is_remarked(&mut daemon, "kernels_cold", "is gone with the container or the next boot").await;
    daemon.stops_clean(SOON).await;
}
