//! What a start does with the time in which disks or the network are slow: the engine's Python is imported ahead while
//! weights arrive, the shards are read ahead while the engine imports. Neither is ever in the way.

use std::fs;
use std::path::{Path, PathBuf};

use crate::harness::daemon::{Daemon, SGLANGD, Setup};
use crate::harness::hub::{REPO, Site, small_model};
use crate::harness::scene::{SOON, is_whole, quick_engine, streamed, write_script};

/// A Python that knows what sglangd asks it: the check of the flags has nothing to say, an import writes down that it
/// runs and goes on for ever, and the engine is the simulated one.
fn python(folder: &Path) -> PathBuf {
    let file = folder.join("python3");
    let seen = folder.join("imports");
    write_script(
        &file,
        &format!(
            r#"case "$1" in
-c) case "$3" in
    locate) echo "$0";;
    dump|check) exit 1;;
    *) echo "$$ devices=$CUDA_VISIBLE_DEVICES home=$HOME token=$HF_TOKEN" >> {seen}
       touch "$TMPDIR/written"
       sleep 600 & wait;;
    esac;;
-m) shift 2; exec {SGLANGD} simulate "$@";;
esac"#,
            seen = seen.display()
        ),
    );
    file
}

fn serving(site: &Site) -> Setup {
    let setup = quick_engine(Setup::bare(), "");
    let python = python(setup.folder());
    setup.env("HF_TOKEN", "hf_secret").config(&format!(
        "model:\n  repo: {REPO}\n  name: small\nweights:\n  cache: {}\n  endpoint: {}\nengine:\n  tp: 1\n  command: [{}, -m, \
         sglang.launch_server]\n",
        site.cache().display(),
        site.hub.endpoint(),
        python.display()
    ))
}

fn imports(daemon: &Daemon) -> Option<String> {
    fs::read_to_string(daemon.folder().join("imports")).ok().filter(|text| text.ends_with('\n'))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_weights_arrive_the_engines_python_is_imported_ahead_and_ended_before_the_engine_starts() {
    let site = Site::slow(small_model(), 700 << 10).await;
    let mut daemon = serving(&site).start();
    let seen = daemon.until("an import ahead", SOON, async |daemon| imports(daemon)).await;
    assert!(seen.contains("devices= ") && seen.contains("/warm ") && seen.ends_with("token=\n"), "{seen}");
    daemon.is_ready(SOON).await;
    assert_eq!(imports(&daemon).unwrap(), seen, "once is enough");
    assert_eq!(daemon.processes_named("sleep 600").len(), 0, "what it started goes with it");
    assert!(!daemon.runtime_dir().join("warm").exists());
    assert!(is_whole(&streamed(daemon.public(), 5)));
    daemon.stops_clean(SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_while_weights_arrive_ends_the_import_ahead_too() {
    let site = Site::slow(small_model(), 100 << 10).await;
    let mut daemon = serving(&site).start();
    daemon.until("an import ahead", SOON, async |daemon| imports(daemon)).await;
    daemon.stops_clean(SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_prefetch_never_nothing_is_done_ahead() {
    let site = Site::slow(small_model(), 1500 << 10).await;
    let mut daemon = serving(&site).set("weights.prefetch", "never").start();
    daemon.is_ready(SOON).await;
    assert_eq!(imports(&daemon), None);
    assert!(!daemon.log().contains("weight files ahead"), "{}", daemon.log());
    daemon.stops_clean(SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shards_are_read_ahead_while_the_engine_starts_and_the_log_says_how_fast() {
    let site = Site::new().await;
    let mut daemon = serving(&site).set("weights.prefetch", "always").env("SGLANG_SIM_START_SECONDS", "6").start();
    daemon
        .until("the shards are read ahead", SOON, async |daemon| {
            daemon.log().contains("read 3.0 MiB of 3 weight files ahead").then_some(())
        })
        .await;
    daemon.is_ready(SOON).await;
    daemon.stops_clean(SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_models_are_not_worth_a_process_of_their_own() {
    let site = Site::new().await;
    let mut daemon = serving(&site).start();
    daemon.is_ready(SOON).await;
    assert!(!daemon.log().contains("weight files ahead"), "{}", daemon.log());
    daemon.stops_clean(SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_daemon_keeps_its_snapshot_from_being_tidied_away() {
    let site = Site::new().await;
    let mut daemon = serving(&site).start();
    daemon.is_ready(SOON).await;
    let listed = daemon.command("fetch").args(["--list", "--cache"]).arg(site.cache()).output().unwrap();
    let said = String::from_utf8_lossy(&listed.stdout);
    assert!(said.contains("in use by") && said.contains("serve"), "{said}{}", String::from_utf8_lossy(&listed.stderr));
    daemon.stops_clean(SOON).await;
}
