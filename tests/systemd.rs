//! The unit as it ships, under a real systemd (252) in a throw-away container, with the simulated engine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tokio::time::Instant;

use crate::harness::daemon::{SGLANGD, eventually};
use crate::harness::setup::{temporary_folder, write_small_model};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A booted systemd with the unit, its user and its folders installed.
struct SystemdBox {
    folder: TempDir,
}

impl SystemdBox {
    fn boot(config: &str) -> Self {
        let folder = temporary_folder();
        let at = |name: &str| folder.path().join(name);
        // Laid over /usr/bin, so that the unit's ExecStart is the one that ships.
        fs::create_dir(at("bin")).unwrap();
        fs::copy(SGLANGD, at("bin/sglangd")).unwrap();
        write_small_model(&at("model"));
        fs::create_dir(at("etc")).unwrap();
        fs::write(at("etc/config.yaml"), config).unwrap();
        let unit = |from: &str, to: &str| format!("--bind-ro={ROOT}/systemd/{from}:{to}");
        let here = Self { folder };
        let up = Command::new(format!("{ROOT}/tests/bin/systemd-box"))
            .arg("up")
            .arg(here.state())
            .arg(format!("--overlay-ro=/usr/bin:{}:/usr/bin", at_str(&here, "bin")))
            .arg(format!("--bind-ro={}:/opt/model", at_str(&here, "model")))
            .arg(format!("--bind={}:/etc/sglangd", at_str(&here, "etc")))
            .arg(unit("sglangd.service", "/run/systemd/system/sglangd.service"))
            .arg(unit("sysusers.d/sglangd.conf", "/run/sysusers.d/sglangd.conf"))
            .arg(unit("tmpfiles.d/sglangd.conf", "/run/tmpfiles.d/sglangd.conf"))
            // The box has no network but a loopback; waiting for one takes systemd two minutes.
            .arg("--bind-ro=/dev/null:/run/systemd/system/systemd-networkd-wait-online.service")
            .output()
            .unwrap();
        assert!(up.status.success(), "{}{}", text(&up.stdout), text(&up.stderr));
        here
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("box")
    }

    fn run(&self, command: &[&str]) -> Output {
        Command::new(format!("{ROOT}/tests/bin/systemd-box"))
            .arg("run")
            .arg(self.state())
            .args(command)
            .output()
            .unwrap()
    }

    /// Runs it and returns what it printed; it must succeed.
    fn says(&self, command: &[&str]) -> String {
        let output = self.run(command);
        assert!(
            output.status.success(),
            "{command:?}: {}{}\n{}",
            text(&output.stdout),
            text(&output.stderr),
            self.journal()
        );
        text(&output.stdout)
    }

    fn property(&self, name: &str) -> String {
        self.says(&["systemctl", "show", "sglangd", "--value", "-p", name]).trim().to_owned()
    }

    fn journal(&self) -> String {
        text(&self.run(&["journalctl", "-u", "sglangd", "--no-pager", "-o", "cat", "-n", "60"]).stdout)
    }

    /// `sglangd status --json`, as an operator in the box asks.
    fn status(&self) -> Option<Value> {
        serde_json::from_slice(&self.run(&["sglangd", "status", "--json"]).stdout).ok()
    }

    /// Every process of the unit's cgroup and below; a pid each.
    fn in_cgroup(&self) -> Vec<String> {
        let script = "cat $(find /sys/fs/cgroup/systemd /sys/fs/cgroup /sys/fs/cgroup/unified \
                      -path '*sglangd.service*' -name cgroup.procs 2>/dev/null) /dev/null 2>/dev/null | sort -u";
        self.says(&["sh", "-c", script]).lines().map(str::to_owned).collect()
    }

    /// Processes of the daemon's user, wherever they are.
    fn of_the_user(&self) -> String {
        text(&self.run(&["ps", "-u", "sglangd", "-o", "pid=,args="]).stdout)
    }

    async fn until(&self, what: &str, within: Duration, mut look: impl FnMut(&Self) -> bool) {
        let begun = Instant::now();
        while !look(self) {
            assert!(begun.elapsed() < within, "not within {within:?}: {what}\n{}", self.journal());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn nothing_is_left(&self) {
        eventually("the cgroup is empty", Duration::from_secs(2), async || {
            (self.in_cgroup().is_empty() && self.of_the_user().is_empty()).then_some(())
        })
        .await;
        // The box shares no /dev/shm and no /tmp with the host; both are the engine's to fill.
        assert_eq!(self.says(&["find", "/dev/shm", "-type", "f"]), "");
        assert_eq!(self.says(&["sh", "-c", "ls /run/sglangd 2>/dev/null || true"]), "", "RuntimeDirectory");
    }
}

fn at_str(here: &SystemdBox, name: &str) -> String {
    here.folder.path().join(name).display().to_string()
}

impl Drop for SystemdBox {
    fn drop(&mut self) {
        let down = Command::new(format!("{ROOT}/tests/bin/systemd-box")).arg("down").arg(self.state()).status();
        // A second panic would hide the first.
        assert!(std::thread::panicking() || down.is_ok_and(|status| status.success()), "the box does not go down");
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn simulated(more: &str) -> String {
    format!(
        "model:\n  path: /opt/model\n  name: small\nengine:\n  command: [/usr/bin/sglangd, simulate]\n  tp: 1\n  flags: {{}}\n{more}"
    )
}

/// Sees each STATUS text while `systemctl start` waits.
async fn start_and_watch(here: &SystemdBox) -> Vec<String> {
    here.says(&["systemctl", "start", "--no-block", "sglangd"]);
    let mut texts: Vec<String> = Vec::new();
    here.until("the unit is active", Duration::from_secs(90), |here| {
        let shown = here.says(&["systemctl", "show", "sglangd", "-p", "ActiveState,StatusText"]);
        let value = |key: &str| {
            shown
                .lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned))
                .unwrap_or_default()
        };
        let status = value("StatusText");
        if !status.is_empty() && texts.last() != Some(&status) {
            texts.push(status);
        }
        let active = value("ActiveState");
        assert_ne!(active, "failed", "{}", here.journal());
        active == "active"
    })
    .await;
    texts
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn the_unit_is_ready_when_the_engine_is_reloads_and_stops_clean() {
    let here = SystemdBox::boot(&simulated(""));
    let verify = here.run(&["systemd-analyze", "verify", "/run/systemd/system/sglangd.service"]);
    assert!(verify.status.success() && verify.stderr.is_empty(), "{}", text(&verify.stderr));

    let texts = start_and_watch(&here).await;
    let status = here.status().expect("status answers as soon as the unit is active");
    assert_eq!(status["state"], "ready", "READY=1 is said by the engine's readiness, not by the process's: {status}");
    assert!(texts.len() >= 3, "STATUS shows the phases of the start: {texts:?}");

    // Through the public port, by a stranger in the box: its own user, its own environment.
    let ready = here.says(&["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:8000/ready"]);
    assert_eq!(ready, "200");
    let answer = here.says(&[
        "curl",
        "-sS",
        "-H",
        "content-type: application/json",
        "-d",
        r#"{"model":"small","messages":[{"role":"user","content":"hi"}],"max_tokens":8,"stream":true}"#,
        "http://127.0.0.1:8000/v1/chat/completions",
    ]);
    assert!(answer.contains("data: [DONE]"), "{answer}");
    assert_eq!(here.says(&["stat", "-c", "%U", &format!("/proc/{}", here.property("MainPID"))]).trim(), "sglangd");

    // The engine lives in a cgroup of its own, and sglangd where systemd put it.
    let group = status["engine"]["cgroup"].as_str().expect("Delegate=yes").to_owned();
    let inside = here.says(&["cat", &format!("{group}/cgroup.procs")]);
    let main_process = status["engine"]["pid"].to_string();
    assert!(inside.lines().any(|pid| pid == main_process), "{inside}");
    assert!(group.contains("sglangd.service/sglangd-engine-"), "{group}");
    let supervisor = here.property("MainPID");
    assert!(!inside.lines().any(|pid| pid == supervisor), "{inside}");

    // Reload: limits go live, the engine stays.
    let engine = status["engine"]["pid"].clone();
    let main = here.property("MainPID");
    fs::write(here.folder.path().join("etc/config.yaml"), simulated("limits:\n  max: 7\n  target: 3\n")).unwrap();
    here.says(&["systemctl", "reload", "sglangd"]);
    here.until("the new limit is live", Duration::from_secs(5), |here| {
        here.status().is_some_and(|status| status["requests"]["max"] == 7)
    })
    .await;
    let status = here.status().unwrap();
    assert_eq!((&status["engine"]["pid"], &here.property("MainPID")), (&engine, &main), "nothing was restarted");

    // A file that is wrong changes nothing.
    fs::write(here.folder.path().join("etc/config.yaml"), "limits:\n  max: many\n").unwrap();
    here.says(&["systemctl", "reload", "sglangd"]);
    here.until("the mistake is reported", Duration::from_secs(5), |here| here.journal().contains("limits.max")).await;
    assert_eq!(here.status().unwrap()["requests"]["max"], 7);
    assert_eq!(here.property("ActiveState"), "active");

    let stopping = Instant::now();
    here.says(&["systemctl", "stop", "sglangd"]);
    eprintln!("systemd: stop took {:.1?}; STATUS texts {texts:?}", stopping.elapsed());
    assert!(stopping.elapsed() < Duration::from_secs(26), "within the grace");
    assert_eq!((here.property("Result"), here.property("ExecMainStatus")), ("success".into(), "0".into()));
    here.nothing_is_left().await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn a_killed_supervisor_is_restarted_and_nothing_of_before_lives_on() {
    let here = SystemdBox::boot(&simulated(""));
    start_and_watch(&here).await;
    let before = here.in_cgroup();
    assert!(before.len() >= 3, "supervisor, proxy and engine at least: {before:?}");
    let engine = here.status().unwrap()["engine"]["pid"].clone();

    here.says(&["kill", "-KILL", &here.property("MainPID")]);
    here.until("the restart is ready", Duration::from_secs(90), |here| {
        here.property("NRestarts") == "1" && here.property("ActiveState") == "active"
    })
    .await;
    let after = here.in_cgroup();
    assert!(before.iter().all(|pid| !after.contains(pid)), "{before:?} and now {after:?}\n{}", here.of_the_user());
    assert_ne!(here.status().unwrap()["engine"]["pid"], engine);
    here.says(&["systemctl", "stop", "sglangd"]);
    here.nothing_is_left().await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn j16_a_start_longer_than_systemds_patience_gets_more_as_long_as_it_makes_progress() {
    let here = SystemdBox::boot(&simulated(""));
    here.says(&["mkdir", "-p", "/run/systemd/system/sglangd.service.d"]);
    let patience = "printf '[Service]\nTimeoutStartSec=4s\nEnvironment=SGLANG_SIM_START_SECONDS=25\n' \
                    > /run/systemd/system/sglangd.service.d/patience.conf";
    here.says(&["sh", "-c", patience]);
    here.says(&["systemctl", "daemon-reload"]);
    let begun = Instant::now();
    start_and_watch(&here).await;
    assert!(begun.elapsed() > Duration::from_secs(8), "it was no long start: {:?}", begun.elapsed());
    assert_eq!(here.property("NRestarts"), "0");
    here.says(&["systemctl", "stop", "sglangd"]);
    here.nothing_is_left().await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn j16_giving_up_is_serving_to_systemd_too() {
    let here = SystemdBox::boot(&simulated("  env: {SGLANG_SIM_FAULT: bad_flag}\n"));
    start_and_watch(&here).await;
    assert_eq!(here.status().expect("it serves")["state"], "gave_up");
    here.says(&["systemctl", "stop", "sglangd"]);
    here.nothing_is_left().await;
}

#[tokio::test]
#[ignore = "heavy: tests/run prepares it"]
async fn a_wrong_configuration_exits_65_and_is_not_restarted() {
    let here = SystemdBox::boot("model:\n  path: /opt/model\nlimits:\n  maxx: 7\n");
    assert!(!here.run(&["systemctl", "start", "sglangd"]).status.success());
    assert_eq!(here.property("ExecMainStatus"), "65", "{}", here.journal());
    // RestartSec is 1 s: a unit that is going to be restarted is `activating (auto-restart)` at once.
    assert_eq!((here.property("ActiveState"), here.property("SubState")), ("failed".into(), "failed".into()));
    assert_eq!(here.property("NRestarts"), "0");
    let journal = here.journal();
    assert!(journal.contains("maxx") && journal.contains("config.yaml"), "the mistake and its place: {journal}");
    here.nothing_is_left().await;
}

/// The binary runs where SGLang's images run: Ubuntu 22.04 has glibc 2.35.
#[test]
#[ignore = "heavy: tests/run prepares it"]
fn the_release_binary_asks_for_no_glibc_newer_than_2_35() {
    let binary = std::env::var("SGLANGD_TEST_RELEASE").expect("SGLANGD_TEST_RELEASE is not set: use `tests/run heavy`");
    let symbols = Command::new("objdump").arg("-T").arg(Path::new(&binary)).output().unwrap();
    assert!(symbols.status.success(), "{}", text(&symbols.stderr));
    let symbols = text(&symbols.stdout);
    let needed: Vec<(u32, u32)> = symbols
        .split("GLIBC_")
        .skip(1)
        .filter_map(|rest| {
            let version = rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
            let mut parts = version.split('.').map(str::parse);
            Some((parts.next()?.ok()?, parts.next()?.ok()?))
        })
        .collect();
    assert!(needed.len() > 20, "objdump names the versions");
    let newest = needed.iter().max().unwrap();
    assert!(newest <= &(2, 35), "GLIBC_{}.{} is needed", newest.0, newest.1);
}
