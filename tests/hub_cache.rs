//! The cache as others see it: the real huggingface_hub beside sglangd, a disk without links, one that cannot be
//! written to, and a repository of a hundred thousand files. `tests/run` installs the former.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use sglangd::simulate::hub::{COMMIT, Options};
use sglangd::simulate::model::{ModelFile, Storage};

use crate::harness::daemon::SGLANGD;
use crate::harness::hub::{REPO, Site, eventually, peak, small_model};
use crate::real_engine::prepared;

fn client(script: &str) -> Command {
    let mut command = Command::new(prepared("SGLANGD_TEST_VENV").join("bin/python"));
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/").to_owned() + script);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HF_")) {
        command.env_remove(name);
    }
    command.env("HF_HUB_DISABLE_TELEMETRY", "1").env("HF_HUB_DISABLE_XET", "1");
    command
}

/// What the real library says of a cache, with this site's hub to ask.
fn library(site: &Site, cache: &Path, words: &[&str]) -> Value {
    asked(cache, words, &site.hub.endpoint())
}

/// What it finds of a repository where nobody can be asked.
pub fn found_offline(cache: &Path, repo: &str) -> Value {
    asked(cache, &["find", repo, "main"], "http://127.0.0.1:9")
}

fn asked(cache: &Path, words: &[&str], endpoint: &str) -> Value {
    let mut command = client("hub_cache.py");
    command.arg(words[0]).arg(cache).args(&words[1..]).env("HF_ENDPOINT", endpoint);
    command.env("HF_HOME", cache.with_file_name("home"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn fetched(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

/// Everything in the cache but locks, times and what is sglangd's own: names with what they hold or lead to.
fn tree(cache: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![cache.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
            // The library keeps the hub's listing in `trees`, for itself.
            let own = ["CACHEDIR.TAG", "trees"].contains(&name.as_str()) || name.starts_with(".sglangd-complete-");
            if name == ".locks" || own {
                continue;
            }
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                folders.push(path);
                continue;
            }
            let what = if kind.is_symlink() {
                format!("-> {}", fs::read_link(&path).unwrap().display())
            } else if name == "main" {
                fs::read_to_string(&path).unwrap()
            } else {
                format!("{} bytes", entry.metadata().unwrap().len())
            };
            found.insert(path.strip_prefix(cache).unwrap().to_owned(), what);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "heavy: tests/run prepares it"]
async fn the_real_library_finds_offline_what_sglangd_wrote_and_sglangd_uses_what_the_library_wrote() {
    let site = Site::new().await;
    fetched(&mut site.command());
    let ours = site.cache();
    let names: BTreeMap<String, u64> = small_model().into_iter().map(|file| (file.name, file.size)).collect();
    for revision in ["main", COMMIT] {
        let found = library(&site, &ours, &["find", REPO, revision]);
        assert_eq!(found["folder"], ours.join(format!("models--made-up--tiny/snapshots/{COMMIT}")).to_str().unwrap());
        assert!(found["config"].as_str().unwrap().ends_with("config.json"), "{found}");
        let files: BTreeMap<String, u64> = serde_json::from_value(found["files"].clone()).unwrap();
        assert_eq!(files, names);
    }
    let scanned = library(&site, &ours, &["scan"]);
    assert_eq!(scanned["warnings"], serde_json::json!([]), "{scanned}");
    assert_eq!(scanned["repos"][REPO][COMMIT]["refs"], serde_json::json!(["main"]));
    assert_eq!(scanned["repos"][REPO][COMMIT]["size"], names.values().sum::<u64>());

    // The other way round, in a cache of its own: the same names with the same content, and not a byte fetched again.
    let theirs = ours.with_file_name("theirs");
    library(&site, &theirs, &["fetch", REPO, "main"]);
    assert_eq!(tree(&theirs), tree(&ours), "the two lay out a cache differently");
    site.hub.forget();
    let mut command = Command::new(SGLANGD);
    command.arg("fetch").arg(REPO).arg("--cache").arg(&theirs).arg("--endpoint").arg(site.hub.endpoint());
    command.env("HF_HOME", ours.with_file_name("home"));
    fetched(&mut command);
    assert_eq!(site.hub.sent(), 0, "fetched again: {:?}", site.hub.seen());
    site.hub.forget();
    fetched(&mut command);
    assert_eq!(site.hub.seen().len(), 1, "{:?}", site.hub.seen());
    let found = library(&site, &theirs, &["find", REPO, "main"]);
    assert_eq!(found["files"].as_object().unwrap().len(), names.len(), "the library still finds it");
    eprintln!("huggingface_hub {}: one cache for both", found["version"]);
}

/// Ended with the test.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "heavy: tests/run prepares it"]
async fn h08_a_python_program_that_holds_a_lock_is_waited_for_by_name_and_not_once_it_is_dead() {
    let site = Site::new().await;
    let blob = small_model()[0].hash().unwrap().to_owned();
    let mut command = client("hub_cache.py");
    command.arg("hold").arg(site.cache()).args([REPO, blob.as_str()]);
    let mut holder = Holder(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let mut said = String::new();
    BufReader::new(holder.0.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.contains("held"), "{said}");

    let log = site.cache().with_file_name("log");
    let mut command = site.command();
    let mut fetch = Holder(command.stderr(fs::File::create(&log).unwrap()).spawn().unwrap());
    let told = format!("(pid {})", holder.0.id());
    eventually("it says for whom it waits", || fs::read_to_string(&log).unwrap().contains(&told)).await;
    assert!(fetch.0.try_wait().unwrap().is_none(), "it did not wait");
    holder.0.kill().unwrap();
    holder.0.wait().unwrap();
    eventually("the dead hold nothing", || fetch.0.try_wait().unwrap().is_some()).await;
    assert!(fetch.0.wait().unwrap().success(), "{}", fs::read_to_string(&log).unwrap());
    site.assert_right(&site.repo_dir().join("snapshots").join(COMMIT), &small_model());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "heavy: tests/run prepares it"]
async fn h11_without_symlinks_real_files_take_their_place_and_nothing_lies_there_twice() {
    let site = Site::new().await;
    let command = || {
        let plain = site.command();
        let mut command = client("without_symlinks.py");
        command.arg(plain.get_program()).args(plain.get_args());
        command.env("HF_HOME", site.cache().with_file_name("home")).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    fetched(&mut command());
    let snapshot = site.repo_dir().join("snapshots").join(COMMIT);
    site.assert_right(&snapshot, &small_model());
    for file in small_model() {
        assert!(!snapshot.join(&file.name).is_symlink(), "{} is a link", file.name);
    }
    assert_eq!(site.bytes_there(), 0, "blobs beside the files");
    let found = library(&site, &site.cache(), &["find", REPO, "main"]);
    assert_eq!(found["files"].as_object().unwrap().len(), small_model().len());
    site.hub.forget();
    fetched(&mut command());
    assert_eq!((site.hub.seen().len(), site.hub.sent()), (1, 0), "the next start fetches again");
    // Files that the marker does not vouch for are found by their hashes here too.
    fs::remove_file(site.repo_dir().join(format!(".sglangd-complete-{COMMIT}.json"))).unwrap();
    let shard = snapshot.join(&small_model()[0].name);
    let mut bytes = fs::read(&shard).unwrap();
    bytes[4000] ^= 1;
    fs::write(&shard, bytes).unwrap();
    fetched(&mut command());
    assert_eq!(site.hub.sent(), 1 << 20, "only what was wrong");
    site.assert_right(&snapshot, &small_model());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "heavy: tests/run prepares it"]
async fn h10_a_cache_on_a_read_only_mount_serves_when_complete_and_names_what_is_missing_when_not() {
    let site = Site::new().await;
    fetched(&mut site.command());
    let run = || -> Output {
        let plain = site.command();
        let cache = site.cache();
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            .arg("mount --bind \"$0\" \"$0\" && mount -o remount,ro,bind \"$0\" && exec \"$@\"")
            .arg(&cache)
            .arg(plain.get_program())
            .args(plain.get_args())
            .env("HF_HOME", cache.with_file_name("home"));
        command.output().unwrap()
    };
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let complete = run();
    assert!(complete.status.success(), "{}", said(&complete));
    let marker = site.repo_dir().join(format!(".sglangd-complete-{COMMIT}.json"));
    fs::remove_file(&marker).unwrap();
    let complete = run();
    assert!(complete.status.success(), "{}", said(&complete));
    assert!(!marker.exists(), "it could write after all: the test proves nothing");
    let shard = &small_model()[1].name;
    fs::remove_file(site.snapshot_file(shard)).unwrap();
    let incomplete = run();
    assert_eq!(incomplete.status.code(), Some(66));
    assert!(
        said(&incomplete).contains("cannot be written to") && said(&incomplete).contains(shard),
        "{}",
        said(&incomplete)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "heavy: tests/run prepares it"]
async fn h13_a_hundred_thousand_files_are_planned_and_fetched_in_bounded_memory() {
    let many = |count: usize| {
        let mut files = vec![ModelFile::shard("model.safetensors", "a", 1 << 20, 1)];
        files.extend((0..count).map(|n| {
            ModelFile::bytes(&format!("extra/{:03}/{n:06}.json", n % 500), Storage::Git, format!("{{\"number\": {n}}}"))
        }));
        files
    };
    let site = Site::with(many(100_000), Options::default()).await;
    let (plan, planned) = peak(site.command().arg("--plan"));
    let said = String::from_utf8_lossy(&plan.stdout);
    assert!(plan.status.success() && said.contains("100001 files"), "{}", String::from_utf8_lossy(&plan.stderr));
    assert!(site.hub.seen().len() > 100, "the listing was to come in pages");
    // Some 300 bytes a file beyond what a small plan takes.
    assert!(planned < 96, "{planned} MiB for a plan of 100,000 files");

    let site = Site::with(many(5_000), Options::default()).await;
    let (fetch, few) = peak(&mut site.command());
    assert!(fetch.status.success(), "{}", String::from_utf8_lossy(&fetch.stderr));
    assert!(few < 64, "{few} MiB for 5,000 files");
    eprintln!("peak memory: {planned} MiB for a plan of 100,000 files, {few} MiB for a fetch of 5,000");
}
