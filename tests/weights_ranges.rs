//! Group H, bytes on their way: many ranges of a file at once, kept over a kill, and what a hub does to them.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::num::{NonZeroU16, NonZeroU64};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sglangd::simulate::hub::{Options, Route, What, Which, XetStore};
use sglangd::simulate::model::{ModelFile, demo};
use sglangd::weights::{PageCache, Request, Settings, Tuning, ahead};
use tokio::time::Instant;

use crate::harness::hub::{REPO, Site, eventually, fetch_watched, fetch_with, listener, small_model, text_file};
use crate::harness::pki::Pair;

const SHARD: &str = "model-00002-of-00003.safetensors";
/// The most that one connection loses to a kill.
const LOST_BY_A_KILL: u64 = 4 << 20;

fn one_shard(bytes: u64) -> Vec<ModelFile> {
    vec![text_file("config.json", "{}"), ModelFile::shard("model.safetensors", "t", bytes, 7)]
}

fn ranges(site: &Site) -> Vec<String> {
    let mut all: Vec<String> =
        site.hub.seen().into_iter().filter(|s| s.route == Some(Route::Cdn)).filter_map(|s| s.range).collect();
    all.sort();
    all.dedup();
    all
}

fn asked_of_the_hub(site: &Site, file: &str) -> usize {
    site.hub.seen().iter().filter(|s| s.route == Some(Route::Resolve) && s.target.ends_with(file)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h13_one_large_file_comes_in_ranges_over_several_connections() {
    let files = one_shard(40 << 20);
    let site = Site::with(files.clone(), Options::default()).await;
    let snapshot = site.fetch().await.unwrap();
    site.assert_right(&snapshot.path, &files);
    site.assert_no_leftovers();
    assert_eq!(ranges(&site).len(), 5, "pieces of 8 MiB: {:?}", ranges(&site));
    assert_eq!(site.hub.sent(), (40 << 20) + 2, "each byte once");
}

/// Nobody reads next what a person fetches: it must not push out what a serving engine has in memory. What `serve` fetches
/// an engine reads next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_fetched_by_hand_goes_past_the_page_cache_and_what_a_start_fetches_stays_in_it() {
    let files = one_shard((9 << 20) + 77);
    for (page_cache, stays) in [(PageCache::Bypass, 0), (PageCache::WhatFits, 1), (PageCache::Keep, 1)] {
        let site = Site::with(files.clone(), Options::default()).await;
        let mut request = site.request();
        // What several connections bring of one file out of order is read back out of memory.
        request.tuning = Tuning { connections: NonZeroU16::new(1), page_cache, ..Tuning::default() };
        let snapshot = fetch_with(&request, &site.settings(&request)).await.unwrap().remove(0);
        let shards = ahead::shards(&snapshot.path).unwrap();
        let cold = ahead::cold(shards.clone()).0.len();
        assert_eq!(shards.len() - cold, stays, "{page_cache:?}");
        site.assert_right(&snapshot.path, &files);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h09_ranges_that_were_on_their_way_at_a_kill_lose_no_more_than_4_mib_a_connection() {
    let files = one_shard(48 << 20);
    let site = Site::slow(files.clone(), 24 << 20).await;
    let mut command = site.command();
    let mut child = command.args(["--connections", "4"]).spawn().unwrap();
    eventually("half is there", || site.hub.sent() > 24 << 20).await;
    child.kill().unwrap();
    child.wait().unwrap();
    let before = site.hub.sent();
    assert!(ranges(&site).len() >= 4, "one connection alone: {:?}", ranges(&site));
    site.hub.forget();
    let output = site.command().output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    site.assert_right(String::from_utf8(output.stdout).unwrap().trim().as_ref(), &files);
    site.assert_no_leftovers();
    // What the hub sent and the kernel never gave to the fetcher counts too.
    let again = (before + site.hub.sent()).saturating_sub((48 << 20) + 2);
    assert!(again <= 4 * LOST_BY_A_KILL, "{} KiB fetched again", again >> 10);
    assert!(site.hub.sent() < 40 << 20, "begun anew");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h04_a_range_of_another_content_is_not_put_beside_the_first() {
    let files = one_shard(20 << 20);
    let site = Site::with(files.clone(), Options::default()).await;
    // The first piece comes as one content's, and when the second is asked for another one lies there.
    site.misbehave_about("model.safetensors", Which::First(1), What::Etag("the first one's"));
    let request = site.request();
    let settings = Settings { connections: 1, ..site.settings(&request) };
    let snapshot = fetch_with(&request, &settings).await.unwrap().remove(0);
    site.assert_right(&snapshot.path, &files);
    let seen = site.hub.seen();
    let conditions: Vec<_> =
        seen.iter().filter(|s| s.route == Some(Route::Cdn)).map(|s| s.if_range.as_deref()).collect();
    assert_eq!(conditions, [None, Some("\"the first one's\""), None], "asked anew, without a condition, at once");
    assert_eq!(asked_of_the_hub(&site, "model.safetensors"), 2);
    assert!(seen.iter().filter(|s| s.route == Some(Route::Cdn)).all(|s| s.range.is_some()), "begun anew: {seen:?}");
}

/// A store that refuses connections, and one to which the hub gives no right.
#[tokio::test]
async fn h04_a_xet_store_that_gives_nothing_is_left_alone_for_plain_http() {
    let files = one_shard(5 << 20);
    let closed = listener();
    let gone = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    for url in [gone.as_str(), "no address"] {
        let known = [("model.safetensors".to_owned(), "5c".repeat(32))].into();
        let xet = Some(XetStore { url: url.to_owned(), files: known });
        let site = Site::with(files.clone(), Options { xet, ..Options::default() }).await;
        let snapshot = site.fetch_impatiently().await.unwrap();
        site.assert_right(&snapshot.path, &files);
        site.assert_no_leftovers();
        assert!(asked_of_the_hub(&site, "model.safetensors") >= 1, "{url}: nothing came by plain HTTP");
        assert!(
            site.hub.seen().iter().any(|s| s.target.contains("xet-read-token")),
            "{url}: the store was never tried"
        );
    }
}

#[tokio::test]
async fn h09_another_tools_beginning_is_continued_and_a_wrong_one_is_found() {
    for (beginning, most) in [("right", (2 << 20) + 400_000), ("wrong", 5 << 20)] {
        let site = Site::new().await;
        let shard = small_model().into_iter().find(|f| f.name == SHARD).unwrap();
        fs::create_dir_all(site.blobs()).unwrap();
        let mut bytes = Vec::new();
        while bytes.len() < 700_000 {
            bytes.extend_from_slice(&shard.piece(bytes.len() as u64, 100_000).unwrap());
        }
        if beginning == "wrong" {
            bytes[300_000] ^= 1;
        }
        let have = bytes.len() as u64;
        fs::write(site.blobs().join(format!("{}.incomplete", shard.hash().unwrap())), bytes).unwrap();
        let snapshot = site.fetch().await.unwrap();
        site.assert_right(&snapshot.path, &small_model());
        site.assert_no_leftovers();
        let sent = site.hub.sent();
        assert!(sent <= most, "{beginning}: {sent} bytes for 3 MiB less {have}");
    }
}

/// huggingface_hub takes `HASH.incomplete` for the first bytes of a file, however long: one with gaps must have another name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h08_what_is_begun_here_is_nothing_that_another_tool_would_continue() {
    let site = Site::slow(one_shard(40 << 20), 20 << 20).await;
    let mut child = site.command().spawn().unwrap();
    eventually("ranges are there", || site.bytes_there() > 4 << 20).await;
    child.kill().unwrap();
    child.wait().unwrap();
    for entry in fs::read_dir(site.blobs()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let end = name.split_once('.').map(|(_, end)| end);
        assert!(matches!(end, None | Some("sglangd.incomplete" | "sglangd.ranges.incomplete")), "{name}");
    }
}

#[tokio::test]
async fn h03_a_503_with_retry_after_holds_all_connections_as_long_as_it_says() {
    let site = Site::slow(demo(20, 256 << 10), 8 << 20).await;
    let busy = What::Refuse { status: 503, retry_after: Some(2), code: None };
    site.misbehave_about("model-00003-of-00020.safetensors", Which::First(1), busy);
    site.fetch().await.unwrap();
    let seen = site.hub.seen();
    let about =
        |s: &&sglangd::simulate::hub::Seen| s.route == Some(Route::Cdn) && s.target.contains("model-00003-of-00020");
    let told = seen.iter().find(about).unwrap();
    // A request that was on its way when the pause was told is no breach of it.
    let pause = told.at + Duration::from_millis(500)..told.at + Duration::from_secs(2);
    let breach = seen.iter().filter(|s| pause.contains(&s.at)).count();
    assert_eq!(breach, 0, "requests in the pause");
    assert!(seen.iter().any(|s| s.at >= pause.end), "nothing was left to be held: the test proves nothing");
}

#[tokio::test]
async fn h04_an_address_is_asked_for_once_and_again_when_it_ran_out() {
    let files = one_shard(40 << 20);
    let site = Site::with(files.clone(), Options::default()).await;
    site.fetch().await.unwrap();
    // Each of the first connections may ask before another one knows.
    let asked = asked_of_the_hub(&site, "model.safetensors");
    assert!((1..=5).contains(&asked), "{asked} times for five ranges");

    let site = Site::with(files.clone(), Options::default()).await;
    let request = site.request();
    let alone = Settings { connections: 1, ..site.settings(&request) };
    let expired = What::Refuse { status: 403, retry_after: None, code: None };
    site.misbehave(Route::Cdn, Which::Each(2), expired);
    let snapshot = fetch_with(&request, &alone).await.unwrap().remove(0);
    site.assert_right(&snapshot.path, &files);
    assert!(asked_of_the_hub(&site, "model.safetensors") >= 2, "the old address was tried again and again");
    assert_eq!(site.hub.sent(), (40 << 20) + 2, "nothing was fetched twice");
}

#[tokio::test]
async fn h07_after_a_stall_the_hub_is_asked_where_else_the_bytes_are() {
    let site = Site::new().await;
    site.misbehave_about(SHARD, Which::First(1), What::Stall(200_000));
    let snapshot = site.fetch_impatiently().await.unwrap();
    site.assert_right(&snapshot.path, &small_model());
    assert_eq!(asked_of_the_hub(&site, SHARD), 2);
}

#[tokio::test]
async fn the_rate_of_all_connections_together_is_kept() {
    let site = Site::new().await;
    let request = site.request();
    let slow = Settings { max_rate: NonZeroU64::new(3 << 20), ..site.settings(&request) };
    let begun = Instant::now();
    let snapshot = fetch_with(&request, &slow).await.unwrap().remove(0);
    assert!(begun.elapsed() >= Duration::from_millis(950), "3 MiB in {:?}", begun.elapsed());
    site.assert_right(&snapshot.path, &small_model());
}

#[tokio::test]
async fn h13_thousands_of_small_files_are_never_all_at_once_in_the_report() {
    let mut files = one_shard(1 << 20);
    let text: Vec<&'static str> = (0..1500).map(|n| &*Box::leak(format!("{{\"n\": {n}}}").into_boxed_str())).collect();
    files.extend(text.iter().enumerate().map(|(n, text)| text_file(&format!("part-{n}.json"), text)));
    let site = Site::with(files.clone(), Options::default()).await;
    let request = site.request();
    let (ended, progress) = fetch_watched(&request, &site.settings(&request)).await;
    let snapshot = ended.unwrap().remove(0);
    for n in [0, 749, 1499] {
        assert_eq!(fs::read_to_string(snapshot.path.join(format!("part-{n}.json"))).unwrap(), text[n]);
    }
    let shown = progress.iter().filter_map(|p| match p {
        sglangd::weights::Progress::Bytes { files, .. } => Some(files.len()),
        _ => None,
    });
    assert!(shown.max().unwrap() <= 16, "more than are fetched at once");
}

/// The fetcher steps back behind an engine: each of its threads, since Linux knows nice by thread.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_fetchers_nice_value_is_that_of_the_request_in_all_its_threads() {
    let site = Site::slow(small_model(), 1 << 20).await;
    let tuning = Tuning { nice: Some(7), connections: NonZeroU16::new(3), ..Tuning::default() };
    let request = Request { tuning, ..site.request() };
    let mut command = site.bare_command();
    command.args(["fetch", "--request", &serde_json::to_string(&request).unwrap()]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    eventually("bytes arrive", || site.bytes_there() > 100_000).await;
    let nice =
        |stat: &str| stat.rsplit_once(')').unwrap().1.split_whitespace().nth(16).unwrap().parse::<i32>().unwrap();
    let threads: Vec<i32> = fs::read_dir(format!("/proc/{}/task", child.id()))
        .unwrap()
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok())
        .map(|stat| nice(&stat))
        .collect();
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    assert!(threads.len() > 3 && threads.iter().all(|nice| *nice == 7), "{threads:?}");
}

/// A hub whose certificate begins to be valid next year: the machine's clock is behind, or so it looks.
#[test]
fn h17_a_certificate_that_is_not_valid_yet_is_said_to_be_the_clock() {
    let pair = Pair::beginning(SignedDuration::from_hours(24 * 365));
    let hub = listener();
    let endpoint = format!("https://localhost:{}", hub.local_addr().unwrap().port());
    let chain = vec![CertificateDer::from_pem_slice(pair.cert.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let config = Arc::new(config);
    let served = std::thread::spawn(move || {
        // One handshake: a fetcher that comes again would wait and fail the test's time.
        let (stream, _) = hub.accept().unwrap();
        handshake(stream, config);
    });
    let dir = tempfile::tempdir().unwrap();
    let authority = dir.path().join("ca.pem");
    fs::write(&authority, &pair.cert).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_sglangd"));
    command.arg("fetch").arg(REPO).arg("--cache").arg(dir.path().join("hub")).arg("--endpoint").arg(endpoint);
    command.env("SSL_CERT_FILE", &authority).env_remove("SSL_CERT_DIR").env("HF_HOME", dir.path()).stdin(Stdio::null());
    let output = command.output().unwrap();
    served.join().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(66), "{said}");
    assert!(said.contains("not valid at this machine's time") && said.contains("Set the clock"), "{said}");
}

fn handshake(mut stream: TcpStream, config: Arc<rustls::ServerConfig>) {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut connection = rustls::ServerConnection::new(config).unwrap();
    // The client breaks it off: that is the point.
    let mut tls = rustls::Stream::new(&mut connection, &mut stream);
    let _ = tls.read(&mut [0; 1]);
    let _ = tls.flush();
}
