//! Group H, weights out of a content-addressed store: the same guarantees as for plain files.

use std::sync::atomic::Ordering;
use std::time::Duration;

use sglangd::simulate::hub::{Route, What, Which};
use sglangd::weights::Settings;
use tokio::time::timeout;

use crate::harness::hub::{eventually, fetch_with, peak};
use crate::harness::xet::XetSite;

const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_xet_file_comes_out_of_the_store_verified_and_the_token_stays_with_the_hub() {
    let there = XetSite::with(6 * MIB).await;
    let snapshot = there.site.fetch_with_token("hf_secret").await.unwrap();
    there.site.assert_right(&snapshot.path, &there.files);
    there.site.assert_no_leftovers();
    let seen = there.site.hub.seen();
    assert!(seen.iter().all(|s| s.route != Some(Route::Cdn)), "bytes came from elsewhere");
    let right: Vec<_> = seen.iter().filter(|s| s.target.contains("/xet-read-token/")).collect();
    assert_eq!(right.len(), 1, "{right:?}");
    assert_eq!(right[0].authorization.as_deref(), Some("Bearer hf_secret"));
    assert!(there.carried() >= 6 * MIB);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_a_xet_file_that_is_killed_half_way_goes_on_where_it_was() {
    let there = XetSite::with(24 * MIB).await;
    there.store.pipe.rate.store(3 * MIB, Ordering::Relaxed);
    let mut child = there.site.command().spawn().unwrap();
    eventually("a good part is written", || there.site.bytes_there() > 6 * MIB).await;
    child.kill().unwrap();
    child.wait().unwrap();
    let kept = there.site.bytes_there();
    there.store.pipe.rate.store(0, Ordering::Relaxed);
    there.store.pipe.carried.store(0, Ordering::Relaxed);
    let snapshot = there.site.fetch().await.unwrap();
    there.site.assert_right(&snapshot.path, &there.files);
    there.site.assert_no_leftovers();
    // Chunks at the seam come whole, and the journal's last line may be a step behind.
    let most = 24 * MIB - kept + 2 * MIB;
    assert!(there.carried() <= most, "{} KiB came again", (there.carried() + kept).saturating_sub(24 * MIB) >> 10);
}

/// The library's buffers take a share of the machine's memory unless they are told how much: `weights.xet_memory`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_memory_of_xet_keeps_to_its_setting() {
    let there = XetSite::with(192 * MIB).await;
    let (fetch, peak) = peak(there.site.command().args(["--set", "weights.xet_memory=128MiB"]));
    assert!(fetch.status.success());
    assert!(there.carried() >= 192 * MIB, "it came another way");
    println!("192 MiB by xet with 128 MiB of buffers: {peak} MiB at most");
    // Twice its buffers, what it unpacks and the program: measured as 224 MiB.
    assert!(peak <= 128 + 192, "{peak} MiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h06_a_store_that_breaks_off_is_asked_again_and_the_file_is_right() {
    let there = XetSite::with(6 * MIB).await;
    there.store.pipe.after.store(MIB, Ordering::Relaxed);
    there.store.pipe.to_cut.store(3, Ordering::Relaxed);
    let snapshot = there.site.fetch().await.unwrap();
    there.site.assert_right(&snapshot.path, &there.files);
    assert_eq!(there.store.pipe.to_cut.load(Ordering::Relaxed), 0, "nothing was cut: the test proves nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h06_a_store_that_dies_half_way_is_left_for_plain_http_and_what_came_stays() {
    let there = XetSite::with(24 * MIB).await;
    there.store.pipe.rate.store(3 * MIB, Ordering::Relaxed);
    let dies = async {
        eventually("a good part is written", || there.site.bytes_there() > 8 * MIB).await;
        there.store.die();
    };
    let (snapshot, ()) = tokio::join!(there.site.fetch(), dies);
    there.site.assert_right(&snapshot.unwrap().path, &there.files);
    there.site.assert_no_leftovers();
    let by_http = there.site.hub.sent();
    assert!(by_http > 0, "all of it came out of the store: the test proves nothing");
    assert!(by_http <= 17 * MIB, "begun anew: {} KiB came by plain HTTP", by_http >> 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h07_a_store_that_stalls_is_left_and_asked_anew() {
    let there = XetSite::with(6 * MIB).await;
    there.store.pipe.after.store(MIB, Ordering::Relaxed);
    there.store.pipe.to_stall.store(1, Ordering::Relaxed);
    let snapshot = timeout(Duration::from_secs(15), there.site.fetch_impatiently()).await.expect("stuck").unwrap();
    there.site.assert_right(&snapshot.path, &there.files);
    assert_eq!(there.store.pipe.to_stall.load(Ordering::Relaxed), 0, "nothing stalled: the test proves nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h07_a_store_that_takes_questions_and_says_nothing_is_left_for_plain_http() {
    let there = XetSite::with(MIB).await;
    there.store.pipe.to_stall.store(u64::MAX, Ordering::Relaxed);
    there.store.pipe.after.store(1, Ordering::Relaxed);
    let snapshot = timeout(Duration::from_mins(1), there.site.fetch_impatiently()).await.expect("stuck").unwrap();
    there.site.assert_right(&snapshot.path, &there.files);
    assert!(there.site.hub.sent() > MIB, "nothing came by plain HTTP");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h03_a_hub_too_busy_to_give_the_right_to_read_is_waited_for() {
    let there = XetSite::with(MIB).await;
    there.site.misbehave(Route::Api, Which::Each(3), What::Refuse { status: 503, retry_after: Some(1), code: None });
    let request = there.site.request();
    let small = Settings { xet_memory: Some(1), ..there.site.settings(&request) };
    let snapshot = fetch_with(&request, &small).await.unwrap().remove(0);
    there.site.assert_right(&snapshot.path, &there.files);
}
