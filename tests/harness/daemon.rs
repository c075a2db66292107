//! A real `sglangd serve`, started as its user would start it, watched from outside, and searched for
//! what it left behind. It knows the binary's published interface and nothing of its insides.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::time::Instant;

use super::processes::{self, Process};
use super::setup::MARK;
pub use super::setup::{SGLANGD, Setup, free_address};

/// Between two looks: well under the 50 ms that the shortest promise speaks of at first, less and less
/// often the longer it takes, since an engine that starts needs the cores that the looking would take.
fn look_again(waited: Duration) -> Duration {
    (waited / 100).clamp(Duration::from_millis(10), Duration::from_millis(200))
}

/// Between two looks at what runs.
const NOTE_AGAIN: Duration = Duration::from_millis(100);

/// Looks again and again until `look` finds something; says what was waited for when it never does.
pub async fn eventually<T>(what: &str, within: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begun.elapsed() < within, "not within {within:?}: {what}");
        tokio::time::sleep(look_again(begun.elapsed())).await;
    }
}

/// A started daemon.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    ended: Option<ExitStatus>,
    /// Every process of it that was ever seen, with its time of start: a pid alone may be another's by now.
    seen: BTreeMap<i32, u64>,
    shm_before: BTreeSet<String>,
    setup: Setup,
}

impl Daemon {
    pub(super) fn of(setup: Setup) -> Self {
        let shm_before = shared_memory();
        Self { child: setup.spawn(), ended: None, seen: BTreeMap::new(), shm_before, setup }
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub fn public(&self) -> SocketAddr {
        self.setup.public
    }

    pub fn admin(&self) -> SocketAddr {
        self.setup.admin
    }

    pub fn folder(&self) -> &Path {
        self.setup.folder()
    }

    pub fn runtime_dir(&self) -> PathBuf {
        self.setup.runtime_dir()
    }

    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// The binary in this daemon's environment, for `status` and `probe`.
    pub fn command(&self, subcommand: &str) -> Command {
        self.setup.command(subcommand)
    }

    /// `http://…/path` on the public port.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.setup.public)
    }

    /// All that it and its engine have said.
    pub fn log(&self) -> String {
        // A test may have put a pipe there: reading it would take what the test is to read, or wait.
        if !fs::metadata(self.setup.log()).is_ok_and(|file| file.is_file()) {
            return String::new();
        }
        String::from_utf8_lossy(&fs::read(self.setup.log()).unwrap_or_default()).into_owned()
    }

    /// `GET /status`, or nothing where it does not answer.
    pub async fn status(&self) -> Option<Value> {
        get_json(&format!("http://{}/status", self.setup.admin)).await
    }

    pub async fn state(&self) -> Option<String> {
        Some(self.status().await?.get("state")?.as_str()?.to_owned())
    }

    /// Waits for one of these states and returns the status that had it.
    pub async fn reaches(&mut self, states: &[&str], within: Duration) -> Value {
        let what = format!("state {}", states.join(" or "));
        self.until(&what, within, async |daemon| {
            let status = daemon.status().await?;
            let state = status.get("state")?.as_str()?;
            states.contains(&state).then(|| status.clone())
        })
        .await
    }

    /// Ready, on the status page and for clients: the proxy hears of it a moment later.
    pub async fn is_ready(&mut self, within: Duration) -> Value {
        let status = self.reaches(&["ready"], within).await;
        self.until("clients are let through", within, async |daemon| (!daemon.refuses_clients().await).then_some(()))
            .await;
        status
    }

    /// Whether the public port says 503. One that speaks TLS, or is a Unix socket, says nothing here.
    pub async fn refuses_clients(&self) -> bool {
        asks().get(self.url("/ready")).send().await.is_ok_and(|answer| answer.status() == 503)
    }

    /// Like [`eventually`], but ends early, with the log, when the daemon does.
    pub async fn until<T>(&mut self, what: &str, within: Duration, mut look: impl AsyncFnMut(&Self) -> Option<T>) -> T {
        let begun = Instant::now();
        let mut noted = None::<Instant>;
        loop {
            // To read all of `/proc` costs more than most looks.
            if noted.is_none_or(|at| at.elapsed() >= NOTE_AGAIN) {
                self.note_processes();
                noted = Some(Instant::now());
            }
            if let Some(found) = look(self).await {
                return found;
            }
            if let Some(status) = self.poll_exit() {
                panic!("sglangd ended ({status}) while waiting for: {what}\n{}", self.tail());
            }
            assert!(begun.elapsed() < within, "not within {within:?}: {what}\n{}", self.tail());
            tokio::time::sleep(look_again(begun.elapsed())).await;
        }
    }

    pub fn signal(&self, signal: Signal) {
        assert!(self.ended.is_none(), "it has ended already");
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    pub fn terminate(&mut self) {
        self.note_processes();
        self.signal(Signal::SIGTERM);
    }

    fn poll_exit(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().unwrap();
        }
        self.ended
    }

    /// Waits for its end; the code, or the signal as a negative number.
    pub async fn exit(&mut self, within: Duration) -> i32 {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.poll_exit() {
                return status.code().unwrap_or_else(|| -status.signal().unwrap());
            }
            self.note_processes();
            assert!(begun.elapsed() < within, "sglangd has not ended within {within:?}\n{}", self.tail());
            tokio::time::sleep(look_again(begun.elapsed())).await;
        }
    }

    /// SIGTERM, exit 0 within the time, nothing left.
    pub async fn stops_clean(mut self, within: Duration) {
        self.terminate();
        let code = self.exit(within).await;
        assert_eq!(code, 0, "exit code after SIGTERM\n{}", self.tail());
        self.leaves_nothing(Duration::ZERO).await;
    }

    /// Starts it once more on the same folders and addresses, as systemd would after an end.
    pub fn start_again(&mut self) {
        assert!(self.poll_exit().is_some(), "it still runs");
        self.child = self.setup.spawn();
        self.ended = None;
    }

    /// Its processes that are alive now: itself, proxy, guard, fetcher, engine and all of theirs.
    pub fn processes(&self) -> Vec<Process> {
        let folder = self.setup.mark();
        let all = processes::all();
        let is_mine =
            |p: &Process| p.pid == self.pid() || self.seen.get(&p.pid) == Some(&p.started) || p.mentions(MARK, &folder);
        let mut mine: BTreeSet<i32> = all.iter().filter(|p| is_mine(p)).map(|p| p.pid).collect();
        // A child is listed before its parent where pids have wrapped, hence until nothing is added.
        loop {
            let before = mine.len();
            let children = all.iter().filter(|p| mine.contains(&p.parent)).map(|p| p.pid).collect::<Vec<_>>();
            mine.extend(children);
            if mine.len() == before {
                break;
            }
        }
        all.into_iter().filter(|p| mine.contains(&p.pid) && p.is_alive()).collect()
    }

    /// Remembers what runs now, so that it is still known when its parent is gone.
    pub fn note_processes(&mut self) {
        for process in self.processes() {
            self.seen.insert(process.pid, process.started);
        }
    }

    /// Those whose title or command line contains the text.
    pub fn processes_named(&self, text: &str) -> Vec<Process> {
        self.processes().into_iter().filter(|p| p.command.contains(text)).collect()
    }

    /// No process, no listener, no temporary file, no socket, no shared memory of its own.
    pub async fn leaves_nothing(&mut self, within: Duration) {
        assert!(self.poll_exit().is_some(), "it still runs");
        let begun = Instant::now();
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(begun.elapsed() < within, "left behind:\n{left}\n{}", self.tail());
            tokio::time::sleep(look_again(begun.elapsed())).await;
        }
    }

    /// After a death without a farewell: no process, no listener, nothing in its temporary folder or in
    /// shared memory. What its runtime folder keeps, the next start takes over.
    pub async fn until_gone(&mut self, what: &str, within: Duration) {
        assert!(self.poll_exit().is_some(), "it still runs");
        let runtime = self.runtime_dir().display().to_string();
        let begun = Instant::now();
        loop {
            let left: Vec<String> = self.left().lines().filter(|l| !l.contains(&runtime)).map(str::to_owned).collect();
            if left.is_empty() {
                return;
            }
            assert!(begun.elapsed() < within, "{what}: left behind: {left:#?}\n{}", self.tail());
            tokio::time::sleep(look_again(begun.elapsed())).await;
        }
    }

    fn left(&self) -> String {
        let mut left = String::new();
        for process in self.processes() {
            let _ = writeln!(left, "  process {} {:?}", process.pid, process.command);
        }
        for address in [self.setup.public, self.setup.admin] {
            // A port that was let go may be another test's by now.
            let neighbour = |process: &Process| {
                let a_test = process.command.contains("/deps/") && process.pid.unsigned_abs() != std::process::id();
                a_test || process.environment(MARK).is_some_and(|mark| mark != self.setup.mark().as_bytes())
            };
            if processes::is_listening(address.port())
                && !processes::listener(address.port()).is_some_and(|process| neighbour(&process))
            {
                let _ = writeln!(left, "  listener {address}");
            }
        }
        for file in files_below(&self.folder().join("tmp")) {
            let _ = writeln!(left, "  temporary file {}", file.display());
        }
        for file in files_below(&self.runtime_dir()) {
            // A lock file stays by design: removing one that another may hold makes two owners.
            if file.file_name().is_none_or(|name| name != "lock") {
                let _ = writeln!(left, "  runtime file {}", file.display());
            }
        }
        for name in shared_memory().difference(&self.shm_before) {
            if self.may_be_mine(name) {
                let _ = writeln!(left, "  shared memory /dev/shm/{name}");
            }
        }
        left
    }

    /// Names with a pid of its own, and names of the engine's kinds that no living process has mapped.
    /// The simulated engine's all have a pid: quick tests run side by side, and a neighbour's killed
    /// engine leaves files, too, until its sglangd has removed them.
    fn may_be_mine(&self, name: &str) -> bool {
        if self.bears_a_pid_of_mine(name) {
            return true;
        }
        let kind = ["sem.mp-", "sgl_shm_mq_", "sglang_loads_", "nccl-"].iter().any(|k| name.starts_with(k));
        // "-test-": a unit test's of the sweeping itself.
        kind && !name.contains("sim")
            && !name.contains("-test-")
            && !processes::is_mapped(&Path::new("/dev/shm").join(name))
    }

    fn bears_a_pid_of_mine(&self, name: &str) -> bool {
        let mut numbers = name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok());
        numbers.any(|pid: i32| self.seen.contains_key(&pid))
    }

    fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(80);
        format!("--- the last lines of its log ---\n{}\n---", lines[from..].join("\n"))
    }
}

impl Drop for Daemon {
    /// A failed test leaves nothing either.
    fn drop(&mut self) {
        self.note_processes();
        if self.poll_exit().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        for process in self.processes() {
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
        // What the supervisor, killed here, can no longer sweep. Only names with a pid of its own: a
        // nameless one may be a neighbour's.
        for name in shared_memory().difference(&self.shm_before) {
            if self.bears_a_pid_of_mine(name) {
                let _ = fs::remove_file(Path::new("/dev/shm").join(name));
            }
        }
    }
}

/// For questions to daemons of this machine. One, and without the machine's certificates: to read those takes longer
/// than the question. It keeps no connection, which would belong to the runtime of one test.
fn asks() -> &'static reqwest::Client {
    static CLIENT: OnceLock<reqwest::Client> = OnceLock::new();
    let builder = || reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(2)).tls_certs_only([]);
    CLIENT.get_or_init(|| builder().pool_max_idle_per_host(0).build().unwrap())
}

/// A GET whose answer is JSON; nothing on any failure, since daemons come and go in these tests.
pub async fn get_json(url: &str) -> Option<Value> {
    asks().get(url).send().await.ok()?.json().await.ok()
}

fn shared_memory() -> BTreeSet<String> {
    let Ok(folder) = fs::read_dir("/dev/shm") else { return BTreeSet::new() };
    folder.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                _ => found.push(entry.path()),
            }
        }
    }
    found
}

/// The witness itself: were it blind, every "nothing is left" would be worth nothing.
mod witness {
    use std::net::TcpListener;

    use super::*;

    /// An idle daemon, and something of its that outlives it.
    async fn outlived_by(stray: impl FnOnce(&Daemon) -> Option<Child>) {
        let mut daemon = Setup::simulated().start();
        daemon.until("status", Duration::from_secs(20), async |daemon| daemon.status().await).await;
        let mut stray = stray(&daemon);
        daemon.terminate();
        assert_eq!(daemon.exit(Duration::from_secs(20)).await, 0);
        let left = daemon.left();
        if let Some(stray) = stray.as_mut() {
            stray.kill().unwrap();
            stray.wait().unwrap();
        }
        assert!(left.is_empty(), "{left}");
    }

    #[tokio::test]
    #[should_panic(expected = "process ")]
    async fn a_process_that_stays_is_seen() {
        outlived_by(|daemon| {
            // In a session of its own and nobody's child: only its environment tells whose it was.
            Some(Command::new("setsid").args(["sleep", "60"]).env(MARK, daemon.setup.mark()).spawn().unwrap())
        })
        .await;
    }

    #[tokio::test]
    #[should_panic(expected = "temporary file ")]
    async fn a_temporary_file_that_stays_is_seen() {
        outlived_by(|daemon| {
            fs::write(daemon.folder().join("tmp/stray"), "").unwrap();
            None
        })
        .await;
    }

    #[tokio::test]
    #[should_panic(expected = "listener ")]
    async fn a_listener_that_stays_is_seen() {
        let mut taken = None;
        outlived_by(|daemon| {
            // The daemon has bound it already: one more, beside it, on the same port of another address.
            taken = Some(TcpListener::bind(("127.0.0.2", daemon.public().port())).unwrap());
            None
        })
        .await;
    }
}
