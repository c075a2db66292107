//! Machines that give less than they should: no `/proc`, no rights, no memory, no pids, processes that
//! cannot be killed. Needs root, to take away what others have.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid};
use tokio::time::Instant;

use crate::harness::client::Client;
use crate::harness::daemon::{Daemon, SGLANGD, Setup};
use crate::harness::processes;
use crate::harness::scene::{
    SOON, engine_pid, got, is_whole, number_at, quick, replaces, script, send, stream_of, streamed, text_at, the_one,
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
