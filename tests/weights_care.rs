//! Group H once more: what is planned, verified, listed and tidied in the cache.

use std::fs::{self, File, FileTimes};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use sglangd::simulate::hub::{COMMIT, Options};
use sglangd::simulate::model::{ModelFile, Storage};
use sglangd::weights::{FetchError, Hold, Progress, Proof, Request, Settings, Space, prepare};

use crate::harness::hub::{NEXT_COMMIT, REPO, Site, eventually, fetch_watched, fetch_with, small_model, text_file};

/// With a shard that no other commit has.
fn next_model() -> Vec<ModelFile> {
    let mut files = small_model();
    files[0] = ModelFile::shard(&files[0].name.clone(), "model.layers.0.mlp.down_proj.weight", 1 << 20, 99);
    files
}

fn ran(mut command: Command) -> (Output, String) {
    let output = command.output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output, said)
}

fn json(command: Command) -> Value {
    let (output, said) = ran(command);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"))
}

/// `sglangd fetch` of this site's cache with these words.
fn told(site: &Site, words: &[&str]) -> Command {
    let mut command = site.command();
    command.args(words);
    command
}

/// Everything in the cache was written two hours ago.
fn age(site: &Site) {
    let old = FileTimes::new().set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    let mut all = vec![site.cache()];
    let mut at = 0;
    while at < all.len() {
        if all[at].is_dir() && !all[at].is_symlink() {
            all.extend(fs::read_dir(&all[at]).unwrap().map(|entry| entry.unwrap().path()));
        }
        at += 1;
    }
    for path in all.iter().filter(|path| !path.is_symlink()) {
        File::open(path).unwrap().set_times(old).unwrap();
    }
}

/// Writes other bytes and gives the file its times back: nothing but its content tells.
fn spoil(path: &Path, how: impl FnOnce(&mut Vec<u8>)) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    let mut bytes = fs::read(path).unwrap();
    how(&mut bytes);
    fs::write(path, &bytes).unwrap();
    File::open(path).unwrap().set_times(FileTimes::new().set_modified(modified)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_verify_reads_all_again_and_mends_only_what_is_wrong_whatever_the_marker_says() {
    let site = Site::new().await;
    let snapshot = site.fetch().await.unwrap();
    let path = |n: u32| snapshot.path.join(format!("model-0000{n}-of-00003.safetensors"));
    spoil(&path(1), |bytes| bytes.truncate(bytes.len() - 1));
    spoil(&path(2), |bytes| bytes[700_000] ^= 1);
    spoil(&path(3), |bytes| bytes.fill(0));
    let config = snapshot.path.join("config.json");
    spoil(&config, |bytes| bytes[3] ^= 1);

    let request = Request { proof: Proof::Anew, ..site.request() };
    let (ended, progress) = fetch_watched(&request, &site.settings(&request)).await;
    ended.unwrap();
    site.assert_right(&snapshot.path, &small_model());
    let config_size = fs::metadata(config).unwrap().len();
    assert_eq!(site.hub.sent(), small_model().iter().map(|f| f.size).sum::<u64>() + (3 << 20) + config_size);
    assert!(matches!(progress.last(), Some(Progress::Done { .. })), "{progress:?}");

    // The command says the same; now that all is right, nothing is fetched.
    site.hub.forget();
    let (output, said) = ran(told(&site, &["--verify"]));
    assert!(output.status.success(), "{said}");
    assert_eq!(site.hub.sent(), 0, "{said}");
}

#[tokio::test]
async fn h01_verify_without_the_hub_names_what_it_cannot_mend() {
    let site = Site::new().await;
    let snapshot = site.fetch().await.unwrap();
    let shard = "model-00002-of-00003.safetensors";
    spoil(&snapshot.path.join(shard), |bytes| bytes[700_000] ^= 1);
    let request = Request { proof: Proof::Anew, download: sglangd::config::Download::Never, ..site.request() };
    let error = fetch_with(&request, &site.settings(&request)).await.unwrap_err();
    assert!(matches!(&error, FetchError::Corrupt { file, .. } if file == shard), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_plan_shows_commit_hashes_what_is_there_and_the_room_before_the_first_byte() {
    let site = Site::with([small_model(), vec![text_file("encode.py", "pass")]].concat(), Options::default()).await;
    let plan = json(told(&site, &["--plan", "--json"]));
    let repository = &plan["repositories"][0];
    assert_eq!((&repository["repo"], &repository["commit"]), (&Value::from(REPO), &Value::from(COMMIT)));
    let shard = &small_model()[0];
    let listed = repository["files"].as_array().unwrap().iter().find(|f| f["name"] == shard.name).unwrap();
    assert_eq!(listed["hash"]["sha256"], shard.hash().unwrap());
    assert_eq!(listed["size"], shard.size);
    assert_eq!(listed["action"], serde_json::json!({"fetch": {"from": 0}}));
    assert_eq!(repository["code"], serde_json::json!(["encode.py"]));
    let to_fetch = repository["bytes_to_fetch"].as_u64().unwrap();
    assert!(plan["space"]["needed"].as_u64().unwrap() > to_fetch, "{plan}");
    assert!(plan["space"]["free"].as_u64().unwrap() > 0);
    assert_eq!(site.hub.sent(), 0, "content was fetched");
    assert!(!site.cache().exists(), "something was written");

    site.fetch().await.unwrap();
    let (_, said) = ran(told(&site, &["--plan"]));
    assert!(said.contains("10 files") && said.contains("all there") && said.contains("sha256:"), "{said}");
}

#[tokio::test]
async fn h02_a_plan_that_does_not_fit_is_shown_and_refused_with_numbers() {
    let site = Site::new().await;
    let request = site.request();
    let settings = Settings { free_space: Some(1 << 20), ..site.settings(&request) };
    let planned = prepare(&request, &settings).await.unwrap();
    let space = Space::look(&planned, &settings).unwrap();
    assert_eq!((space.free, space.needed), (1 << 20, planned[0].plan.bytes_to_fetch() + (64 << 20)));
    let error = space.enough().unwrap_err();
    assert!(error.to_string().contains("or name another folder with weights.cache"), "{error}");
}

#[tokio::test]
async fn files_that_are_excluded_are_not_fetched_and_do_not_make_the_cache_incomplete() {
    let extra = ModelFile::bytes("original/weights.pth", Storage::Lfs, "other weights");
    let site = Site::with([small_model(), vec![extra]].concat(), Options::default()).await;
    let mut request = site.request();
    request.repos[0].exclude = vec!["tokenizer*".into()];
    let settings = site.settings(&request);
    let snapshot = fetch_with(&request, &settings).await.unwrap().remove(0);
    assert!(!snapshot.path.join("tokenizer.json").exists() && !snapshot.path.join("original").exists());
    assert!(snapshot.path.join("config.json").is_file());
    site.hub.forget();
    COMMIT.clone_into(&mut request.repos[0].revision);
    fetch_with(&request, &settings).await.unwrap();
    assert_eq!(site.hub.seen(), [], "complete without them");
    // Without the exclusion it is not.
    site.fetch().await.unwrap();
    assert!(snapshot.path.join("tokenizer.json").is_file());
}

/// Two commits in the cache; `main` is the second.
async fn two_commits() -> (Site, PathBuf, PathBuf) {
    let site = Site::new().await;
    let first = site.fetch().await.unwrap().path;
    site.hub.push(NEXT_COMMIT, next_model());
    let second = site.fetch().await.unwrap().path;
    (site, first, second)
}

/// The blob of the first commit alone.
fn old_blob(first: &Path) -> PathBuf {
    fs::canonicalize(first.join(&small_model()[0].name)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_list_shows_snapshots_sizes_last_use_and_who_uses_them() {
    let (site, first, _) = two_commits().await;
    let _held = Hold::take(&first).unwrap();
    let list = json(told(&site, &["--list", "--json"]));
    let repository = &list["repositories"][0];
    let of = |commit: &str| {
        let all = repository["snapshots"].as_array().unwrap();
        all.iter().find(|snapshot| snapshot["commit"] == commit).unwrap().clone()
    };
    let size: u64 = small_model().iter().map(|file| file.size).sum();
    assert_eq!(of(COMMIT)["refs"], serde_json::json!([]));
    assert_eq!(of(NEXT_COMMIT)["refs"], serde_json::json!(["main"]));
    assert_eq!((&of(COMMIT)["files"], &of(COMMIT)["bytes"]), (&Value::from(9), &Value::from(size)));
    assert!(of(COMMIT)["last_used_unix"].as_i64().unwrap() > 1_700_000_000);
    let user = repository["used_by"][0].clone();
    assert_eq!(user[0], COMMIT);
    assert!(user[1].as_str().unwrap().contains(&format!("pid {}", std::process::id())), "{user}");
    let (_, said) = ran(told(&site, &["--list"]));
    assert!(said.contains("in use by") && said.contains("1 repository, 2 snapshots"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pruning_removes_what_nobody_needs_only_when_told_and_never_what_is_used() {
    let (site, first, second) = two_commits().await;
    let blob = old_blob(&first);
    let begun = site.blobs().join(format!("{}.incomplete", "ab".repeat(32)));
    fs::write(&begun, "half").unwrap();

    let young = ran(told(&site, &["--prune", "--yes"])).1;
    assert!(young.contains("less than an hour ago") && young.contains("nothing to remove"), "{young}");
    age(&site);
    let shown = ran(told(&site, &["--prune"])).1;
    for part in [
        "would remove old snapshot",
        "would remove orphaned blob",
        "would remove leftover",
        "locks of nobody",
        "add --yes",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(first.exists() && blob.exists() && begun.exists(), "a preview removes nothing");

    // Held by a daemon, then mapped or open in an engine.
    let held = Hold::take(&first).unwrap();
    let said = ran(told(&site, &["--prune", "--yes"])).1;
    assert!(said.contains("is used by") && first.exists() && blob.exists(), "{said}");
    assert!(!begun.exists(), "of what nobody uses nothing stays: {said}");
    drop(held);
    let open = File::open(&blob).unwrap();
    let said = ran(told(&site, &["--prune", "--yes"])).1;
    assert!(said.contains("is used by") && first.exists() && blob.exists(), "{said}");
    drop(open);

    let said = ran(told(&site, &["--prune", "--yes"])).1;
    assert!(said.contains("removed old snapshot") && said.contains("1.0 MiB freed"), "{said}");
    assert!(!first.exists() && !blob.exists());
    assert!(!site.repo_dir().join(format!(".sglangd-complete-{COMMIT}.json")).exists());
    site.assert_right(&second, &next_model());
    site.hub.forget();
    site.fetch().await.unwrap();
    assert_eq!(site.hub.sent(), 0, "what is needed was removed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pruning_leaves_alone_what_is_just_being_fetched() {
    let site = Site::slow(small_model(), 1 << 20).await;
    let mut child = site.command().spawn().unwrap();
    eventually("bytes arrive", || site.bytes_there() > 200_000).await;
    age(&site);
    let said = ran(told(&site, &["--prune", "--yes"])).1;
    assert!(said.contains("is being fetched by") && said.contains("nothing to remove"), "{said}");
    assert!(child.wait().unwrap().success());
    site.assert_right(&site.repo_dir().join("snapshots").join(COMMIT), &small_model());
    site.assert_no_leftovers();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_the_configuration_names_is_no_old_revision() {
    let (site, first, _) = two_commits().await;
    age(&site);
    let config = site.cache().with_file_name("config.yaml");
    fs::write(&config, format!("model:\n  repo: {REPO}\n  revision: {COMMIT}\n")).unwrap();
    let said = ran(told(&site, &["--prune", "--yes", "--config", config.to_str().unwrap()])).1;
    assert!(first.exists() && old_blob(&first).exists(), "{said}");
}

#[tokio::test]
async fn nothing_else_in_the_cache_is_touched() {
    let site = Site::new().await;
    site.fetch().await.unwrap();
    let others = [site.cache().join("datasets--a--b/blobs"), site.cache().join("mine"), site.blobs().join("notes.txt")];
    for path in &others {
        fs::create_dir_all(path).unwrap();
    }
    age(&site);
    let (output, said) = ran(told(&site, &["--prune", "--yes"]));
    assert!(output.status.success(), "{said}");
    assert!(others.iter().all(|path| path.exists()), "{said}");
}
