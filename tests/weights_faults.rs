//! Group H: weights. A simulated hub misbehaves; the cache ends right, or the message says what to do.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sglangd::config::Download;
use sglangd::simulate::hub::{COMMIT, Options, Route, What, Which};
use sglangd::simulate::model::ModelFile;
use sglangd::weights::{Access, FetchError, Progress, RepoRequest, Request, Retry, Settings, Wanted};
use tokio::time::{Instant, timeout};

use crate::harness::hub::{
    NEXT_COMMIT, REPO, Site, eventually, fetch_watched, fetch_with, listener, small_model, text_file,
};

const SHARD_OF_20: &str = "model-00003-of-00020.safetensors";
const SHARD: &str = "model-00002-of-00003.safetensors";

fn refuse(status: u16, retry_after: Option<u64>) -> What {
    What::Refuse { status, retry_after, code: None }
}

fn refuse_with(status: u16, code: &'static str) -> What {
    What::Refuse { status, retry_after: None, code: Some(code) }
}

#[tokio::test]
async fn a_model_is_fetched_into_the_standard_cache_and_the_next_start_asks_nothing_twice() {
    let site = Site::new().await;
    let snapshot = site.fetch().await.unwrap();
    site.assert_right(&snapshot.path, &small_model());
    site.assert_no_leftovers();
    assert_eq!(snapshot.commit, COMMIT);
    assert_eq!(fs::read_to_string(site.repo_dir().join("refs/main")).unwrap(), COMMIT);
    assert!(fs::read_link(site.snapshot_file(SHARD)).unwrap().starts_with("../../blobs"));

    site.hub.forget();
    site.fetch().await.unwrap();
    assert_eq!(site.hub.seen().len(), 1, "one request for what main is: {:?}", site.hub.seen());
    site.hub.forget();
    let mut request = site.request();
    COMMIT.clone_into(&mut request.repos[0].revision);
    fetch_with(&request, &site.settings(&request)).await.unwrap();
    assert_eq!(site.hub.seen(), [], "a pinned commit needs no request");
}

#[tokio::test]
async fn dummy_weights_bring_everything_but_the_weights_and_a_later_fetch_brings_those() {
    let site = Site::new().await;
    let mut request = site.request();
    request.repos[0].files = Wanted::NoWeights;
    let snapshot = fetch_with(&request, &site.settings(&request)).await.unwrap().remove(0);
    assert!(snapshot.path.join("tokenizer.json").is_file());
    assert!(!snapshot.path.join(SHARD).exists());
    let snapshot = site.fetch().await.unwrap();
    site.assert_right(&snapshot.path, &small_model());
}

#[tokio::test]
async fn two_repositories_come_together_and_each_knows_its_flag() {
    let site = Site::new().await;
    let mut request = site.request();
    let draft = RepoRequest {
        flag: Some("speculative-draft-model-path".into()),
        ..RepoRequest::model("made-up/draft", "main")
    };
    request.repos.push(draft);
    let (ended, progress) = fetch_watched(&request, &site.settings(&request)).await;
    let snapshots = ended.unwrap();
    assert_eq!(snapshots[1].flag.as_deref(), Some("speculative-draft-model-path"));
    site.assert_right(&snapshots[1].path, &small_model());
    assert!(matches!(progress.first(), Some(Progress::Plan { files: 18, .. })), "{:?}", progress.first());
    assert_eq!(progress.last(), Some(&Progress::Done { snapshots }));
}

#[tokio::test]
async fn h01_a_truncated_a_flipped_and_a_zeroed_file_in_the_cache_are_found_and_only_they_are_fetched_again() {
    let site = Site::new().await;
    let snapshot = site.fetch().await.unwrap();
    let path = |n: u32| snapshot.path.join(format!("model-0000{n}-of-00003.safetensors"));
    // As another tool's cache: nothing says that these files were ever proved.
    fs::remove_file(site.repo_dir().join(format!(".sglangd-complete-{COMMIT}.json"))).unwrap();
    let whole = fs::read(path(1)).unwrap();
    fs::write(path(1), &whole[..whole.len() - 1]).unwrap();
    let mut flipped = fs::read(path(2)).unwrap();
    flipped[700_000] ^= 1;
    fs::write(path(2), &flipped).unwrap();
    let zeros = fs::File::create(path(3)).unwrap();
    zeros.set_len(whole.len() as u64).unwrap();
    site.hub.forget();
    site.fetch().await.unwrap();
    site.assert_right(&snapshot.path, &small_model());
    assert_eq!(site.hub.sent(), 3 << 20, "the three shards and nothing else");
}

#[tokio::test]
async fn h01_a_file_that_changes_after_it_was_proved_is_found_at_the_next_start() {
    let site = Site::new().await;
    let snapshot = site.fetch().await.unwrap();
    let mut bytes = fs::read(snapshot.path.join(SHARD)).unwrap();
    bytes[900_000] ^= 0x80;
    fs::write(snapshot.path.join(SHARD), &bytes).unwrap();
    site.fetch().await.unwrap();
    site.assert_right(&snapshot.path, &small_model());
}

#[tokio::test]
async fn h01_a_bit_that_flips_on_the_way_is_fetched_again_and_one_that_always_flips_is_named() {
    let site = Site::new().await;
    site.misbehave_about(SHARD, Which::First(1), What::Flip(600_000));
    let snapshot = site.fetch().await.unwrap();
    site.assert_right(&snapshot.path, &small_model());

    let site = Site::new().await;
    site.misbehave_about(SHARD, Which::All, What::Zeros);
    let error = site.fetch().await.unwrap_err();
    assert!(matches!(&error, FetchError::Corrupt { file, .. } if file == SHARD), "{error}");
    assert!(!site.snapshot_file(SHARD).exists(), "a wrong file under its final name");
}

#[tokio::test]
async fn h02_a_disk_too_small_is_refused_with_numbers_before_the_first_byte() {
    let site = Site::new().await;
    let request = site.request();
    let settings = Settings { free_space: Some(1 << 20), ..site.settings(&request) };
    let error = fetch_with(&request, &settings).await.unwrap_err();
    assert!(matches!(error, FetchError::NoSpace { free: 0x10_0000, .. }), "{error}");
    assert!(error.to_string().contains("1.0 MiB free"), "{error}");
    assert_eq!(site.hub.sent(), 0);
    assert!(!site.cache().exists(), "something was written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h02_a_disk_that_fills_up_on_the_way_ends_it_and_what_is_there_is_kept() {
    let site = Site::new().await;
    // A file-size limit makes the kernel refuse the write in the middle, as a full disk does.
    let fetch = site.command();
    let mut limited = Command::new("sh");
    limited
        .arg("-c")
        .arg("ulimit -f 1024; trap '' XFSZ; exec \"$0\" \"$@\"")
        .arg(fetch.get_program())
        .args(fetch.get_args());
    for (name, value) in fetch.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    let limited = limited.output().unwrap();
    let said = String::from_utf8_lossy(&limited.stderr).into_owned();
    assert_eq!(limited.status.code(), Some(66), "{said}");
    assert!(said.contains("cannot be read or written"), "{said}");
    assert!(site.bytes_there() > 0);
    let before = site.hub.seen().iter().filter(|s| s.route == Some(Route::Cdn) && s.method == "GET").count();
    assert!(before <= 3, "no retry storm: {before} GETs for three shards");
}

#[tokio::test]
async fn h03_bursts_of_429_and_5xx_are_waited_out_and_retry_after_is_honoured() {
    let site = Site::new().await;
    site.misbehave(Route::Api, Which::First(1), refuse(429, Some(1)));
    site.misbehave(Route::Cdn, Which::Each(2), refuse(503, None));
    site.misbehave(Route::Resolve, Which::First(2), refuse(502, None));
    let begun = Instant::now();
    let snapshot = site.fetch().await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1), "Retry-After: 1 was not waited for");
    site.assert_right(&snapshot.path, &small_model());
}

#[tokio::test]
async fn h03_a_hub_too_busy_for_longer_than_patience_is_said_with_the_time_it_named() {
    let site = Site::new().await;
    site.misbehave(Route::Api, Which::All, refuse(429, Some(3600)));
    let error = site.fetch().await.unwrap_err();
    assert_eq!(error.class(), Retry::Yes { after: Duration::from_hours(1) }, "{error}");
    assert_eq!(site.hub.seen().len(), 1, "asked again although told not to");
}

#[tokio::test]
async fn h03_a_pause_that_one_file_is_told_holds_for_all() {
    let site = Site::slow(sglangd::simulate::model::demo(20, 256 << 10), 8 << 20).await;
    site.misbehave_about(SHARD_OF_20, Which::First(1), refuse(429, Some(2)));
    site.fetch().await.unwrap();
    let seen = site.hub.seen();
    let told = seen
        .iter()
        .find(|s| s.method == "GET" && s.target.contains(SHARD_OF_20) && s.route == Some(Route::Cdn))
        .unwrap();
    // A request that was on its way when the pause was told is no breach of it.
    let pause = told.at + Duration::from_millis(500)..told.at + Duration::from_secs(2);
    let breach: Vec<_> = seen.iter().filter(|s| pause.contains(&s.at)).collect();
    assert!(breach.is_empty(), "{} requests in the pause, the first {:?}", breach.len(), breach[0]);
    assert!(seen.iter().any(|s| s.at >= pause.end), "nothing was left to be held: the test proves nothing");
}

#[tokio::test]
async fn h04_a_signed_url_that_ran_out_is_resolved_again_and_the_file_goes_on() {
    let site = Site::new().await;
    site.misbehave_about(SHARD, Which::First(1), What::Cut(500_000));
    site.misbehave(Route::Cdn, Which::Each(3), refuse(403, None));
    let snapshot = site.fetch().await.unwrap();
    site.assert_right(&snapshot.path, &small_model());
    let ranges: Vec<_> = site.hub.seen().into_iter().filter_map(|s| s.range).collect();
    assert!(!ranges.is_empty(), "begun anew instead of continued");
    assert!(site.hub.sent() < (3 << 20) + 600_000, "{} bytes for 3 MiB", site.hub.sent());
}

#[tokio::test]
async fn h05_a_redirect_loop_ends_and_is_named() {
    let site = Site::new().await;
    let round = format!("{}/{REPO}/resolve/main/config.json", site.hub.endpoint());
    site.misbehave(Route::Resolve, Which::All, What::Redirect(round));
    let error = site.fetch().await.unwrap_err();
    assert!(matches!(&error, FetchError::Redirect { why, .. } if why.contains("more than 10")), "{error}");
}

#[tokio::test]
async fn h05_a_redirect_to_another_scheme_or_to_a_metadata_service_is_refused() {
    for to in ["file:///etc/passwd", "http://169.254.169.254/latest/meta-data/"] {
        let site = Site::new().await;
        site.misbehave(Route::Resolve, Which::All, What::Redirect(to.to_owned()));
        let error = timeout(Duration::from_secs(10), site.fetch()).await.expect("it was contacted").unwrap_err();
        assert!(matches!(error, FetchError::Redirect { .. } | FetchError::File { .. }), "{to}: {error}");
        assert!(!matches!(error.class(), Retry::Yes { .. }) || to.starts_with("file"), "{to}: {error}");
    }
}

#[tokio::test]
async fn h05_the_token_reaches_the_hub_and_never_the_cdn() {
    let site = Site::new().await;
    site.fetch_with_token("hf_secret").await.unwrap();
    let seen = site.hub.seen();
    for request in &seen {
        let token = request.authorization.as_deref();
        match request.route {
            Some(Route::Cdn) => assert_eq!(token, None, "leaked: {request:?}"),
            _ => assert_eq!(token, Some("Bearer hf_secret"), "{request:?}"),
        }
    }
    assert!(seen.iter().any(|r| r.route == Some(Route::Cdn)));
}

#[tokio::test]
async fn h06_a_server_that_ignores_ranges_serves_the_file_from_its_beginning() {
    let site = Site::new().await;
    site.misbehave_about(SHARD, Which::First(1), What::Cut(300_000));
    site.misbehave_about(SHARD, Which::All, What::IgnoreRange);
    let snapshot = site.fetch().await.unwrap();
    site.assert_right(&snapshot.path, &small_model());
}

#[tokio::test]
async fn h06_a_range_with_the_wrong_bytes_is_found_and_the_file_begins_anew() {
    let site = Site::new().await;
    site.misbehave_about(SHARD, Which::First(1), What::Cut(300_000));
    site.misbehave_about(SHARD, Which::First(2), What::WrongRange);
    let snapshot = site.fetch().await.unwrap();
    site.assert_right(&snapshot.path, &small_model());
}

#[tokio::test]
async fn h06_bodies_shorter_or_longer_than_they_should_be_never_pass() {
    for what in [What::Truncate(1), What::Longer(1000)] {
        let site = Site::new().await;
        site.misbehave(Route::Cdn, Which::Each(2), what.clone());
        let snapshot = site.fetch().await.unwrap();
        site.assert_right(&snapshot.path, &small_model());

        let site = Site::new().await;
        site.misbehave_about(SHARD, Which::All, what);
        let error = site.fetch().await.unwrap_err();
        assert!(matches!(&error, FetchError::File { file, .. } if file == SHARD), "{error}");
        assert!(error.to_string().contains(SHARD));
    }
}

#[tokio::test]
async fn h07_a_stream_that_stalls_is_opened_anew_where_it_stopped() {
    let site = Site::new().await;
    site.misbehave_about(SHARD, Which::First(2), What::Stall(200_000));
    let snapshot = timeout(Duration::from_secs(10), site.fetch_impatiently()).await.expect("stuck").unwrap();
    site.assert_right(&snapshot.path, &small_model());
    let ranges = site.hub.seen().iter().filter(|s| s.route == Some(Route::Cdn) && s.range.is_some()).count();
    assert!(ranges >= 2, "not continued: {ranges} ranges");
}

#[tokio::test]
async fn h07_a_stall_without_end_is_given_up_with_the_files_name() {
    let site = Site::new().await;
    site.misbehave_about(SHARD, Which::All, What::Stall(0));
    let error = timeout(Duration::from_secs(15), site.fetch_impatiently()).await.expect("stuck").unwrap_err();
    assert!(matches!(&error, FetchError::File { file, .. } if file == SHARD), "{error}");
    assert!(error.to_string().contains("stalled"), "{error}");
}

#[tokio::test]
async fn h08_two_fetchers_share_one_cache_without_fetching_twice_and_the_second_says_who_is_first() {
    let site = Site::slow(small_model(), 3 << 20).await;
    let request = site.request();
    let settings = site.settings(&request);
    let (first, second) = tokio::join!(fetch_watched(&request, &settings), fetch_watched(&request, &settings));
    let (snapshot, _) = (first.0.unwrap().remove(0), second.0.unwrap());
    site.assert_right(&snapshot.path, &small_model());
    let sizes: u64 = small_model().iter().map(|f| f.size).sum();
    assert_eq!(site.hub.sent(), sizes, "fetched twice");
    let me = format!("pid {}", std::process::id());
    let told =
        |all: &[Progress]| all.iter().any(|p| matches!(p, Progress::Waiting { holder, .. } if holder.contains(&me)));
    assert!(told(&first.1) || told(&second.1), "nobody was told who holds the lock");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h08_a_holder_that_is_killed_holds_nothing() {
    let site = Site::slow(small_model(), 1 << 20).await;
    let mut child = site.command().spawn().unwrap();
    eventually("the first fetcher writes", || site.bytes_there() > 100_000).await;
    child.kill().unwrap();
    child.wait().unwrap();
    let snapshot = timeout(Duration::from_secs(10), site.fetch()).await.expect("waits for the dead").unwrap();
    site.assert_right(&snapshot.path, &small_model());
}

fn stop_half_way(mut child: Child, signal: Signal) -> std::process::Output {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
    let _ = child.stdin.take();
    child.wait_with_output().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_a_fetch_that_is_killed_goes_on_where_it_was_and_never_leaves_half_a_file_under_its_name() {
    let files = sglangd::simulate::model::demo(3, 4 << 20);
    let total: u64 = files.iter().map(|f| f.size).sum();
    let site = Site::slow(files.clone(), 8 << 20).await;
    let child = site.command().spawn().unwrap();
    eventually("half is there", || site.bytes_there() > total / 2).await;
    stop_half_way(child, Signal::SIGKILL);
    let there = site.bytes_there();
    for entry in fs::read_dir(site.blobs()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let whole = files.iter().any(|f| f.hash().unwrap() == name && f.size == entry.metadata().unwrap().len());
        assert!(whole || name.ends_with(".incomplete"), "half a file as {name}");
    }
    site.hub.forget();
    let output = site.command().output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let path = String::from_utf8(output.stdout).unwrap();
    site.assert_right(path.trim().as_ref(), &files);
    site.assert_no_leftovers();
    let again = (there + site.hub.sent()).saturating_sub(total);
    assert!(again <= there / 50, "{again} of {there} bytes were fetched again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j01_sigterm_while_downloading_stops_within_two_seconds_and_the_rest_is_resumable() {
    let site = Site::slow(small_model(), 1 << 20).await;
    let child = site.command().spawn().unwrap();
    eventually("bytes arrive", || site.bytes_there() > 200_000).await;
    let begun = Instant::now();
    let output = tokio::task::spawn_blocking(move || stop_half_way(child, Signal::SIGTERM)).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(output.status.code(), Some(143));
    assert!(site.bytes_there() > 200_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h10_a_read_only_cache_serves_when_complete_and_names_what_is_missing_when_not() {
    let site = Site::new().await;
    let snapshot = site.fetch().await.unwrap();
    let request = site.request();
    let read_only = Settings { access: Some(Access::ReadOnly), ..site.settings(&request) };
    let before = listing(&site);
    assert_eq!(fetch_with(&request, &read_only).await.unwrap()[0].path, snapshot.path);
    // Without the marker too: every file is read and compared, nothing is written.
    fs::remove_file(site.repo_dir().join(format!(".sglangd-complete-{COMMIT}.json"))).unwrap();
    fetch_with(&request, &read_only).await.unwrap();
    fs::remove_file(site.snapshot_file(SHARD)).unwrap();
    let error = fetch_with(&request, &read_only).await.unwrap_err();
    assert!(matches!(&error, FetchError::ReadOnly { missing, .. } if missing == &[SHARD]), "{error}");
    assert_eq!(listing(&site).len() + 2, before.len(), "something was written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h10_folders_without_write_permission_are_seen_as_read_only_by_the_real_fetcher() {
    let site = Site::new().await;
    site.fetch().await.unwrap();
    fs::remove_file(site.repo_dir().join("refs/main")).unwrap();
    let mut folders = vec![site.cache()];
    let mut at = 0;
    while at < folders.len() {
        let inside = fs::read_dir(&folders[at]).unwrap().map(|e| e.unwrap().path());
        folders.extend(inside.filter(|p| p.is_dir() && !p.is_symlink()).collect::<Vec<_>>());
        at += 1;
    }
    let set = |mode| folders.iter().for_each(|f| fs::set_permissions(f, fs::Permissions::from_mode(mode)).unwrap());
    fs::set_permissions(site.cache().parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
    set(0o555);
    let mut command = site.command();
    if nix::unistd::geteuid().is_root() {
        // Permissions do not bind root; and nobody may not look into the folder root builds in.
        let program = site.cache().parent().unwrap().join("sglangd");
        fs::copy(command.get_program(), &program).unwrap();
        let mut nobodys = std::process::Command::new(program);
        nobodys.args(command.get_args()).envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        nobodys.uid(65534).gid(65534);
        command = nobodys;
    }
    let output = command.output().unwrap();
    set(0o755);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!site.repo_dir().join("refs/main").exists(), "it could write after all: the test proves nothing");
}

fn listing(site: &Site) -> Vec<std::path::PathBuf> {
    let mut all = vec![site.repo_dir()];
    let mut at = 0;
    while at < all.len() {
        if all[at].is_dir() {
            let inside: Vec<_> = fs::read_dir(&all[at]).unwrap().map(|e| e.unwrap().path()).collect();
            all.extend(inside);
        }
        at += 1;
    }
    all
}

#[tokio::test]
async fn h12_hostile_names_are_refused_by_name_and_nothing_is_written() {
    let long = "x".repeat(300);
    for name in ["../../etc/x", "/etc/x", "a\0b", "CON", long.as_str(), "Config.json", "model.safetensors/x"] {
        let shard = ModelFile::shard("model.safetensors", "a", 4096, 1);
        let site =
            Site::with(vec![text_file("config.json", "{}"), shard, text_file(name, "x")], Options::default()).await;
        let error = site.fetch().await.unwrap_err();
        assert!(matches!(&error, FetchError::BadName { name: refused, .. } if refused == name), "{name:?}: {error}");
        assert!(!site.cache().exists(), "{name:?}: something was written");
        assert_eq!(site.hub.sent(), 0);
    }
}

#[tokio::test]
async fn h13_a_long_listing_comes_in_pages_and_one_without_weights_is_a_clear_error() {
    let mut files = vec![ModelFile::shard("model.safetensors", "a", 4096, 1)];
    for n in 0..250 {
        files.push(ModelFile::bytes(&format!("extra/{n}.txt"), sglangd::simulate::model::Storage::Git, format!("{n}")));
    }
    let site = Site::with(files.clone(), Options { page: 100, ..Options::default() }).await;
    let snapshot = site.fetch().await.unwrap();
    site.assert_right(&snapshot.path, &files);

    let bare = Site::with(vec![text_file("config.json", "{}")], Options::default()).await;
    assert!(matches!(bare.fetch().await.unwrap_err(), FetchError::NoSafetensors { .. }));
    let empty = Site::with(vec![], Options::default()).await;
    assert!(matches!(empty.fetch().await.unwrap_err(), FetchError::Empty { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h14_a_branch_that_moves_while_it_is_fetched_ends_as_the_commit_it_was() {
    let site = Site::slow(small_model(), 3 << 20).await;
    let request = site.request();
    let settings = site.settings(&request);
    let running = tokio::spawn(async move { fetch_with(&request, &settings).await });
    eventually("bytes arrive", || site.bytes_there() > 100_000).await;
    let mut next = small_model();
    next[0] = ModelFile::shard(&next[0].name.clone(), "model.layers.0.mlp.down_proj.weight", 1 << 20, 99);
    site.hub.push(NEXT_COMMIT, next.clone());
    let snapshot = running.await.unwrap().unwrap().remove(0);
    assert_eq!(snapshot.commit, COMMIT);
    site.assert_right(&snapshot.path, &small_model());

    site.hub.forget();
    let moved = site.fetch().await.unwrap();
    assert_eq!(moved.commit, NEXT_COMMIT);
    site.assert_right(&moved.path, &next);
    assert_eq!(site.hub.sent(), 1 << 20, "what both commits hold was fetched again");
}

#[tokio::test]
async fn h15_gated_missing_unknown_token_and_unreachable_are_four_messages_with_four_next_steps() {
    let site = Site::new().await;
    site.misbehave(Route::Api, Which::All, refuse_with(403, "GatedRepo"));
    let gated = site.fetch_with_token("hf_x").await.unwrap_err();
    assert!(gated.to_string().contains("Ask for access on"), "{gated}");
    let anonymous = site.fetch().await.unwrap_err();
    assert!(anonymous.to_string().contains("HF_TOKEN"), "{anonymous}");

    site.hub.heal();
    site.misbehave(Route::Api, Which::All, refuse_with(401, "RepoNotFound"));
    let missing = site.fetch().await.unwrap_err();
    assert!(missing.to_string().contains("there is no repository made-up/tiny"), "{missing}");

    site.hub.heal();
    let mut request = site.request();
    "no-such-branch".clone_into(&mut request.repos[0].revision);
    let revision = fetch_with(&request, &site.settings(&request)).await.unwrap_err();
    assert!(revision.to_string().contains("no revision no-such-branch"), "{revision}");

    let gone = listener().local_addr().unwrap();
    let request = Request { endpoint: Some(format!("http://{gone}")), ..site.request() };
    let unreachable = fetch_with(&request, &site.settings(&request)).await.unwrap_err();
    assert!(unreachable.to_string().contains("cannot be reached"), "{unreachable}");

    for error in [&gated, &anonymous, &missing, &revision] {
        assert_eq!(error.class(), Retry::No, "{error}");
    }
    assert!(matches!(unreachable.class(), Retry::Yes { .. }));
}

#[tokio::test]
async fn h15_a_repository_that_is_gated_only_at_its_files_is_gated_all_the_same() {
    let site = Site::new().await;
    site.misbehave(Route::Resolve, Which::All, refuse_with(403, "GatedRepo"));
    assert!(matches!(site.fetch_with_token("hf_x").await.unwrap_err(), FetchError::Gated { .. }));
}

#[tokio::test]
async fn h15_offline_uses_what_is_cached_and_names_what_is_not() {
    let site = Site::new().await;
    let request = Request { download: Download::Never, ..site.request() };
    let settings = site.settings(&request);
    let nothing = fetch_with(&request, &settings).await.unwrap_err();
    assert!(nothing.to_string().contains("weights.download is never"), "{nothing}");
    let snapshot = site.fetch().await.unwrap();
    site.hub.forget();
    assert_eq!(fetch_with(&request, &settings).await.unwrap(), [snapshot]);

    // Without the marker, the index knows the shards, and a shard's header its length.
    fs::remove_file(site.repo_dir().join(format!(".sglangd-complete-{COMMIT}.json"))).unwrap();
    fetch_with(&request, &settings).await.unwrap();
    fs::remove_file(site.repo_dir().join(format!(".sglangd-complete-{COMMIT}.json"))).unwrap();
    let short = site.snapshot_file("model-00001-of-00003.safetensors");
    let bytes = fs::read(&short).unwrap();
    fs::write(&short, &bytes[..bytes.len() - 1]).unwrap();
    fs::remove_file(site.snapshot_file(SHARD)).unwrap();
    let error = fetch_with(&request, &settings).await.unwrap_err();
    let FetchError::NotCached { missing, .. } = &error else { panic!("{error}") };
    assert_eq!(missing, &["model-00001-of-00003.safetensors", SHARD]);
    assert_eq!(site.hub.seen(), [], "offline, and yet the hub was asked");
}

#[tokio::test]
async fn h15_a_hub_that_is_down_does_not_keep_a_cached_model_from_starting() {
    let site = Site::new().await;
    let snapshot = site.fetch().await.unwrap();
    let gone = listener().local_addr().unwrap();
    let request = Request { endpoint: Some(format!("http://{gone}")), ..site.request() };
    assert_eq!(fetch_with(&request, &site.settings(&request)).await.unwrap(), [snapshot]);
}

#[tokio::test]
async fn h18_a_pickle_beside_safetensors_is_not_fetched() {
    let mut files = small_model();
    files.push(ModelFile::bytes("pytorch_model.bin", sglangd::simulate::model::Storage::Lfs, "pickle"));
    let site = Site::with(files, Options::default()).await;
    let snapshot = site.fetch().await.unwrap();
    assert!(!snapshot.path.join("pytorch_model.bin").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_plans_without_writing_reports_to_its_supervisor_and_exits_66_on_failure() {
    let site = Site::new().await;
    let plan = site.command().arg("--plan").output().unwrap();
    let text = String::from_utf8(plan.stdout).unwrap();
    assert!(text.contains(&format!("{REPO} main = {COMMIT}")) && text.contains("9 files"), "{text}");
    assert!(!site.cache().exists());

    let request = serde_json::to_string(&site.request()).unwrap();
    let reported = Command::new("sh")
        .arg("-c")
        .arg("\"$0\" fetch --request \"$1\" --progress-fd 3 3>&1 >/dev/null | cat")
        .arg(env!("CARGO_BIN_EXE_sglangd"))
        .arg(&request)
        .output()
        .unwrap();
    let lines: Vec<Progress> =
        String::from_utf8(reported.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(matches!(lines.first(), Some(Progress::Plan { files: 9, .. })), "{lines:?}");
    assert!(matches!(lines.last(), Some(Progress::Done { .. })), "{lines:?}");

    site.misbehave(Route::Api, Which::All, refuse_with(404, "RepoNotFound"));
    let failed = site.command().output().unwrap();
    assert_eq!(failed.status.code(), Some(66));
    assert!(String::from_utf8_lossy(&failed.stderr).contains("there is no repository"));
}
