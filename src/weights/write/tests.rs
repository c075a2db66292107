#![allow(clippy::single_range_in_vec_init)] // one gap is a list of one

use bytes::Bytes;

use super::*;
use crate::weights::direct_io::BLOCK;
use crate::weights::left::left;
use crate::weights::plan::Transport;

fn hello() -> RemoteFile {
    RemoteFile {
        name: "hello.txt".into(),
        size: 6,
        hash: Hash::GitBlob("ce013625030ba8dba906f756967f9e9ca394464a".into()),
        transport: Transport::Http,
    }
}

/// A file of so many bytes, and what a hub says of it.
fn noise(bytes: u32) -> (Vec<u8>, RemoteFile) {
    let content: Vec<u8> = (0..bytes).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut hasher = Hasher::new(&Hash::Sha256(String::new()), 0);
    hasher.update(&content);
    let remote = RemoteFile { hash: Hash::Sha256(hasher.hex()), size: bytes.into(), ..hello() };
    (content, remote)
}

fn paths(dir: &Path) -> Paths {
    Paths::beside(&dir.join("blobs/x"))
}

async fn put(partial: &Arc<Partial>, from: u64, bytes: &[u8]) {
    let mut writer = partial.writer(from).unwrap();
    put_all(&mut writer, bytes).await;
    writer.flush().await.unwrap();
}

async fn put_all(writer: &mut Writer, bytes: &[u8]) {
    let mut bytes = Bytes::copy_from_slice(bytes);
    while let Some(step) = writer.next(&mut bytes) {
        writer.put(step.hash()).await.unwrap();
    }
}

fn names(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir.join("blobs")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn h09_what_an_earlier_run_left_is_continued_and_the_name_comes_last() {
    let dir = tempfile::tempdir().unwrap();
    let blob = dir.path().join("blobs/x");
    let partial = Partial::open(paths(dir.path()), &hello(), None).unwrap();
    put(&partial, 4, b"o\n").await;
    put(&partial, 0, b"he").await;
    drop(partial);
    assert_eq!(left(&paths(dir.path()), 6), Some(4));
    let partial = Partial::open(paths(dir.path()), &hello(), None).unwrap();
    assert_eq!(partial.gaps(), [2..4]);
    put(&partial, 2, b"ll").await;
    assert!(partial.is_whole());
    assert!(!blob.exists(), "half a file under its final name");
    assert_eq!(partial.finish(&blob).await.unwrap(), Finished::Right);
    assert_eq!(std::fs::read(&blob).unwrap(), b"hello\n");
    assert_eq!(names(dir.path()), ["x"]);
}

#[tokio::test]
async fn h01_a_wrong_file_never_gets_its_name_and_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let blob = dir.path().join("blobs/x");
    let partial = Partial::open(paths(dir.path()), &hello(), None).unwrap();
    put(&partial, 3, b"lo\n").await;
    put(&partial, 0, b"HEL").await;
    assert!(matches!(partial.finish(&blob).await.unwrap(), Finished::Wrong { .. }));
    assert!(!blob.exists());
    assert_eq!(partial.gaps(), [0..6]);
    put(&partial, 0, b"hello\n").await;
    assert_eq!(partial.finish(&blob).await.unwrap(), Finished::Right);
}

#[tokio::test]
async fn another_tools_beginning_is_taken_over_and_one_longer_than_the_file_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let there = paths(dir.path());
    std::fs::create_dir(dir.path().join("blobs")).unwrap();
    std::fs::write(&there.foreign, b"hello\nhello\n").unwrap();
    assert_eq!(left(&there, 6), None);
    assert_eq!(Partial::open(there.clone(), &hello(), None).unwrap().have(), 0);
    std::fs::remove_file(&there.data).unwrap();
    std::fs::write(&there.foreign, b"hel").unwrap();
    assert_eq!(left(&there, 6), Some(3));
    let partial = Partial::open(there, &hello(), None).unwrap();
    assert_eq!(partial.gaps(), [3..6]);
    put(&partial, 3, b"lo\n").await;
    assert_eq!(partial.finish(&dir.path().join("blobs/x")).await.unwrap(), Finished::Right);
    assert_eq!(names(dir.path()), ["x"]);
}

/// Data without its journal says nothing about gaps: a file as long as the right one may be full of zeros.
#[tokio::test]
async fn bytes_without_a_journal_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let there = paths(dir.path());
    std::fs::create_dir(dir.path().join("blobs")).unwrap();
    std::fs::write(&there.data, b"\0\0\0\0\0\n").unwrap();
    assert_eq!(Partial::open(there, &hello(), None).unwrap().gaps(), [0..6]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_writers_out_of_order_make_the_right_file() {
    many_writers(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_writers_of_whom_some_go_past_the_page_cache_make_the_right_file() {
    many_writers(Some(Arc::default())).await;
}

async fn many_writers(past: Option<Arc<Blocks>>) {
    let dir = tempfile::tempdir().unwrap();
    let (content, remote) = noise((8 << 20) + 5);
    let partial = Partial::open(paths(dir.path()), &remote, past).unwrap();
    let content = Arc::new(content);
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..8u64 {
        let (partial, content) = (partial.clone(), content.clone());
        writers.spawn(async move {
            let mut writer = partial.writer(n << 20).unwrap();
            // Steps of many lengths; a pause so that the writers really mix.
            let end_of_all = if n == 7 { content.len() } else { usize::try_from((n + 1) << 20).unwrap() };
            while writer.at() < end_of_all as u64 {
                let at = usize::try_from(writer.at()).unwrap();
                let end = (at + 10_007 + 40_009 * (at % 7)).min(end_of_all);
                put_all(&mut writer, &content[at..end]).await;
                tokio::task::yield_now().await;
            }
            writer.flush().await.unwrap();
        });
    }
    writers.join_all().await;
    let blob = dir.path().join("blobs/x");
    assert_eq!(partial.finish(&blob).await.unwrap(), Finished::Right);
    assert!(std::fs::read(&blob).unwrap() == *content);
}

/// Else a disk with a cache of its own does little but empty it.
#[tokio::test]
async fn what_went_past_the_page_cache_is_pushed_less_often() {
    let (content, remote) = noise(2 * BLOCK as u32);
    let mut unpushed = Vec::new();
    for past in [None, Some(Arc::default())] {
        let dir = tempfile::tempdir().unwrap();
        let partial = Partial::open(paths(dir.path()), &remote, past).unwrap();
        put(&partial, 0, &content[..BLOCK]).await;
        unpushed.push(partial.state().unpushed);
    }
    assert_eq!(unpushed, [BLOCK as u64, BLOCK as u64 / behind::PAST_CACHE]);
}

/// A write that fails, of a full disk: its bytes were hashed and are not there.
#[tokio::test]
async fn h02_a_hash_that_is_not_brought_back_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let partial = Partial::open(paths(dir.path()), &hello(), None).unwrap();
    put(&partial, 0, b"he").await;
    let mut taken = partial.hasher_at(2).unwrap();
    taken.hasher.update(b"XX");
    assert!(!partial.hash_stands_at(2));
    // No place that a file has.
    partial.write(1 << 63, &StepBytes::Loose(Bytes::from_static(b"XX"))).unwrap_err();
    partial.bring_back(taken, 4);
    put(&partial, 2, b"llo\n").await;
    assert_eq!(partial.finish(&dir.path().join("blobs/x")).await.unwrap(), Finished::Right);
}

/// A hub that turns out not to serve ranges: what reads back and what pushes may still be at the file of before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h04_a_file_that_begins_anew_has_nothing_of_its_life_before() {
    let dir = tempfile::tempdir().unwrap();
    let (content, remote) = noise(1 << 20);
    let half = content.len() / 2;
    for turn in 0..100 {
        let partial = Partial::open(paths(dir.path()), &remote, None).unwrap();
        // Out of order, so that it is read back in another thread.
        put(&partial, half as u64, &content[half..]).await;
        put(&partial, 0, &vec![0xee; half]).await;
        if turn % 2 == 0 {
            tokio::task::yield_now().await;
        }
        partial.restart().unwrap();
        put(&partial, 0, &content).await;
        assert_eq!(partial.finish(&dir.path().join("blobs/x")).await.unwrap(), Finished::Right, "turn {turn}");
    }
}
