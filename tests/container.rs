//! The image as `deploy/Containerfile` builds it, on a bare Debian: sglangd as entry point and PID 1,
//! with the simulated engine.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tokio::time::Instant;

use crate::harness::daemon::{eventually, free_address, get_json};
use crate::harness::processes::{self, Process};
use crate::harness::setup::{RUN, temporary_folder, write_small_model};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const NAME: &str = "sglangd-test";
/// In the environment of every process of the container; the engine gets it by its prefix.
const MARK: &str = "SGLANG_TEST_MARK";

/// Images and containers in a folder of the test's own, so that the machine's are neither seen nor touched.
struct Podman {
    folder: TempDir,
}

impl Podman {
    /// A store with the image built in it.
    fn with_image() -> Self {
        let prepared = |name: &str| {
            PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: use `tests/run heavy`")))
        };
        let (binary, base) = (prepared("SGLANGD_TEST_RELEASE"), prepared("SGLANGD_TEST_BASE"));
        let podman = Self { folder: temporary_folder() };
        let at = |name: &str| podman.folder.path().join(name);
        fs::write(
            at("storage.conf"),
            format!(
                "[storage]\ndriver = \"vfs\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n",
                at("images").display(),
                at("run").display()
            ),
        )
        .unwrap();

        // The part of a checkout that the Containerfile reads.
        fs::create_dir_all(at("context/target/release")).unwrap();
        fs::copy(&binary, at("context/target/release/sglangd")).unwrap();
        fs::copy(format!("{ROOT}/config.yaml"), at("context/config.yaml")).unwrap();
        podman.does(&["import", "--quiet", &base.display().to_string(), "localhost/base"]);
        podman.does(&[
            "build",
            "--quiet",
            // One layer: the plain-folder store copies the whole base for each.
            "--layers=false",
            "--build-arg",
            "BASE=localhost/base",
            "--tag",
            NAME,
            "--file",
            &format!("{ROOT}/deploy/Containerfile"),
            &at("context").display().to_string(),
        ]);

        write_small_model(&at("model"));
        fs::write(
            at("config.yaml"),
            "model:\n  path: /model\n  name: small\n\
             engine:\n  command: [/usr/local/bin/sglangd, simulate]\n  tp: 1\n  flags: {}\n",
        )
        .unwrap();
        podman
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(format!("{ROOT}/tests/bin/podman-box"));
        command
            .args(words)
            .env("CONTAINERS_STORAGE_CONF", self.folder.path().join("storage.conf"))
            .stdin(Stdio::null());
        command
    }

    fn output(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    fn does(&self, words: &[&str]) -> String {
        let output = self.output(words);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{words:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
        said
    }

    fn run(&self) -> Container<'_> {
        let (public, admin) = (free_address(), free_address());
        let mark = self.folder.path().display().to_string();
        let log = fs::File::create(self.folder.path().join("log")).unwrap();
        let bind = |name: &str, to: &str| format!("--volume={mark}/{name}:{to}:ro");
        let client = self
            .command(&["run", "--rm", "--network=host", "--name", NAME])
            .args([
                bind("model", "/model"),
                bind("config.yaml", "/override.yaml"),
                format!("--env={MARK}={mark}"),
                format!("--env={RUN}"),
            ])
            .args([NAME, "--config", "/override.yaml"])
            .args(["--listen", &public.to_string(), "--admin", &admin.to_string()])
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Container { podman: self, client, public, admin, mark }
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // Its layers are not the test's to unlink: they may be mounted.
        let _ = self.output(&["rm", "--all", "--force", "--time", "0"]);
        let _ = self.output(&["rmi", "--all", "--force"]);
    }
}

/// `podman run` in the foreground: its exit status is the container's.
struct Container<'a> {
    podman: &'a Podman,
    client: Child,
    public: SocketAddr,
    admin: SocketAddr,
    mark: String,
}

impl Container<'_> {
    fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.podman.folder.path().join("log")).unwrap()).into_owned()
    }

    async fn status(&self) -> Option<Value> {
        get_json(&format!("http://{}/status", self.admin)).await
    }

    async fn is_ready(&mut self) {
        let begun = Instant::now();
        while self.status().await.is_none_or(|status| status["state"] != "ready") {
            if let Some(status) = self.client.try_wait().unwrap() {
                panic!("the container ended: {status}\n{}", self.log());
            }
            assert!(begun.elapsed() < Duration::from_secs(90), "not ready\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Everything that runs in it, seen from the host.
    fn processes(&self) -> Vec<Process> {
        processes::all().into_iter().filter(|p| p.is_alive() && p.mentions(MARK, &self.mark)).collect()
    }

    /// Its PID 1, as the host counts.
    fn first(&self) -> i32 {
        self.podman.does(&["inspect", "--format", "{{.State.Pid}}", NAME]).trim().parse().unwrap()
    }

    async fn ends(&mut self, within: Duration) -> Option<i32> {
        let client = &mut self.client;
        eventually("podman run ends", within, async || client.try_wait().unwrap()).await.code()
    }

    async fn leaves_nothing(&self) {
        eventually("no process of it is left", Duration::from_secs(2), async || {
            self.processes().is_empty().then_some(())
        })
        .await;
        assert!(!processes::is_listening(self.public.port()) && !processes::is_listening(self.admin.port()));
        assert_eq!(self.podman.does(&["ps", "--all", "--quiet"]), "");
    }
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn as_pid_1_it_serves_reaps_and_stops_clean() {
    let podman = Podman::with_image();
    let mut container = podman.run();
    container.is_ready().await;

    let answer = reqwest::Client::builder()
        .no_proxy()
        .build()
        .unwrap()
        .post(format!("http://{}/v1/chat/completions", container.public))
        .json(&serde_json::json!({
            "model": "small",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 8,
            "stream": true,
        }))
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 200);
    assert!(answer.text().await.unwrap().contains("data: [DONE]"));

    // PID 1 inherits what others leave: an orphan that ends must not stay as a zombie.
    let first = container.first();
    let command = processes::all().into_iter().find(|p| p.pid == first).unwrap().command;
    assert!(command.starts_with("/usr/local/bin/sglangd serve"), "PID 1 is {command:?}");
    podman.does(&["exec", NAME, "sh", "-c", "(exec sleep 0.3) & (exec sleep 0.4) & (exec sleep 0.5) & exit 0"]);
    let orphans =
        || processes::all().into_iter().filter(|p| p.parent == first && p.command.starts_with("sleep")).count();
    eventually("the orphans come to PID 1", Duration::from_secs(2), async || (orphans() == 3).then_some(())).await;
    let zombies = || processes::all().into_iter().filter(|p| p.parent == first && !p.is_alive()).count();
    eventually("the orphans are gone, zombies too", Duration::from_secs(3), async || {
        (orphans() == 0 && zombies() == 0).then_some(())
    })
    .await;

    // J04: ten thousand of them, while a client reads.
    let storm = "i=0; while [ $i -lt 10000 ]; do (sleep 0.1 &); i=$((i+1)); done";
    let mut storm = podman.command(&["exec", NAME, "sh", "-c", storm]).spawn().unwrap();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let (mut asked, begun) = (0, Instant::now());
    while storm.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < Duration::from_mins(5), "the storm does not end");
        let live = client.get(format!("http://{}/ready", container.public)).send().await.unwrap();
        assert_eq!(live.status(), 200);
        asked += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(storm.wait().unwrap().success() && asked > 0);
    eprintln!("container: 10,000 orphans in {:.1?}, {asked} answers meanwhile", begun.elapsed());
    eventually("all of them are reaped", Duration::from_secs(10), async || {
        (orphans() == 0 && zombies() == 0).then_some(())
    })
    .await;

    assert!(container.log().contains("must give more than 25 s to stop"), "J15: {}", container.log());
    let stopping = Instant::now();
    podman.does(&["stop", "--time", "40", NAME]);
    assert_eq!(container.ends(Duration::from_secs(30)).await, Some(0), "{}", container.log());
    assert!(stopping.elapsed() < Duration::from_secs(26), "within the grace, not by podman's SIGKILL");
    eprintln!("container: podman stop took {:.1?}", stopping.elapsed());
    container.leaves_nothing().await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn j15_a_runtime_that_gives_less_than_the_grace_cuts_it_and_leaves_nothing() {
    let podman = Podman::with_image();
    let mut container = podman.run();
    container.is_ready().await;
    let open = reqwest::Client::builder().no_proxy().build().unwrap();
    let stream = open
        .post(format!("http://{}/v1/chat/completions", container.public))
        .json(&serde_json::json!({
            "model": "small",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 20_000,
            "ignore_eos": true,
            "stream": true,
        }))
        .send()
        .await
        .unwrap();
    assert_eq!(stream.status(), 200);
    // Less than the 25 s that the stream would be given.
    podman.does(&["stop", "--time", "3", NAME]);
    assert_eq!(container.ends(Duration::from_secs(15)).await, Some(137), "by the runtime's SIGKILL");
    container.leaves_nothing().await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn a_killed_pid_1_takes_everything_with_it() {
    let podman = Podman::with_image();
    let mut container = podman.run();
    container.is_ready().await;
    assert!(container.processes().len() >= 3, "supervisor, proxy and engine: {:?}", container.processes());
    podman.does(&["kill", "--signal", "KILL", NAME]);
    assert_eq!(container.ends(Duration::from_secs(10)).await, Some(137));
    container.leaves_nothing().await;
}
