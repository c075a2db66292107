//! Reads a model's shards into the page cache before the engine asks for them, in the order in which it loads them: while
//! it imports, the disk would else be idle. Blocks; meant for a process of its own that may be killed at any moment.
//!
//! All threads take pieces from one queue, so that the first shard is there first. What does not fit into memory is not
//! read: it would only push out what comes before it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statfs::{self, statfs};
use rustix::fs::sendfile;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use serde::{Deserialize, Serialize};

use super::local;

/// What a thread takes at once: large enough for a disk's queue, small enough to keep the order.
const PIECE: u64 = 8 << 20;
/// What is read at once: stays in a core's own cache.
const STEP: usize = 512 << 10;
/// Between two looks at the memory.
const LOOK_EACH: u64 = 512 << 20;
/// Places of a file that are looked at to say whether it lies in memory.
const SAMPLES: u64 = 64;
/// Readers of a disk of this machine: an NVMe's queue is filled by 8 × 8 MiB.
const LOCAL_READERS: usize = 8;
/// Readers over a network: each waits for an answer most of the time.
const NETWORK_READERS: usize = 16;

/// One file to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    pub path: PathBuf,
    pub bytes: u64,
}

/// How far it is; one JSON line each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Ahead {
    Reading { done: u64, total: u64 },
    Done(Outcome),
}

/// What it came to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub files: usize,
    /// Bytes read now.
    pub read: u64,
    /// That lay in memory already.
    pub there: u64,
    /// That memory had no room for.
    pub left: u64,
    pub seconds: f64,
    /// Files that could not be read, with the disk's own words (H16).
    pub failed: Vec<String>,
}

/// Where files lie, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In memory anyway.
    Memory,
    Local,
    Network,
}

/// Where this folder's files lie.
pub fn place(folder: &Path) -> io::Result<Place> {
    /// Not among nix's: FUSE, SMB, CIFS, Ceph, Lustre, GPFS, BeeGFS.
    const NETWORKS: [u32; 7] =
        [0x6573_5546, 0xfe53_4d42, 0xff53_4d42, 0x00c3_6400, 0x0bd0_0bd0, 0x4750_4653, 0x1983_0326];
    const RAMFS: u32 = 0x8584_58f6;
    let kind = statfs(folder)?.filesystem_type();
    // Magic numbers have 32 bits, whatever the field's width and sign.
    let magic = kind.0 as u32;
    Ok(match kind {
        statfs::TMPFS_MAGIC | statfs::HUGETLBFS_MAGIC => Place::Memory,
        statfs::NFS_SUPER_MAGIC | statfs::AFS_SUPER_MAGIC | statfs::CODA_SUPER_MAGIC => Place::Network,
        _ if magic == RAMFS => Place::Memory,
        _ if NETWORKS.contains(&magic) => Place::Network,
        _ => Place::Local,
    })
}

impl Place {
    pub fn readers(self) -> usize {
        match self {
            Self::Memory | Self::Local => LOCAL_READERS,
            Self::Network => NETWORK_READERS,
        }
    }
}

/// The weight files of a model's folder in the order in which the engine loads them: by name, and only those that the
/// index names where there is one.
pub fn shards(folder: &Path) -> io::Result<Vec<Shard>> {
    let index = fs::read(folder.join(local::INDEX)).ok().and_then(|text| local::shards(&text));
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
        let wanted = match &index {
            Some(names) => names.contains(&name),
            None => ["safetensors", "bin", "pt", "gguf"].iter().any(|end| name.ends_with(&format!(".{end}"))),
        };
        // Follows the link; one that leads nowhere is for the engine to complain about.
        if let Some(meta) = fs::metadata(&path).ok().filter(|meta| wanted && meta.is_file()) {
            found.insert(name, Shard { path, bytes: meta.len() });
        }
    }
    Ok(found.into_values().collect())
}

/// A file that is read, or what stands for one.
pub trait Source: FileExt {
    /// These bytes are wanted soon.
    fn soon(&self, _from: u64, _bytes: u64) {}
    /// Has some of these bytes brought into memory without handing them over, and says how many; none: it cannot.
    fn bring(&self, _from: u64, _most: usize) -> Option<io::Result<usize>> {
        None
    }
    /// Whether all places that are looked at lie in memory.
    fn in_memory(&self, _bytes: u64) -> bool {
        false
    }
}

impl Source for File {
    fn soon(&self, from: u64, bytes: u64) {
        let (Ok(from), Ok(bytes)) = (i64::try_from(from), i64::try_from(bytes)) else { return };
        // Advice: a file system that takes none is read all the same.
        let _ = posix_fadvise(self, from, bytes, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    }

    fn bring(&self, from: u64, most: usize) -> Option<io::Result<usize>> {
        /// Where pages may be sent to without being copied.
        static NOWHERE: LazyLock<Option<File>> = LazyLock::new(|| File::options().write(true).open("/dev/null").ok());
        let mut from = from;
        match sendfile(NOWHERE.as_ref()?, self, Some(&mut from), most) {
            // Of a file system that has no pages to send.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => None,
            sent => Some(sent.map_err(io::Error::from)),
        }
    }

    fn in_memory(&self, bytes: u64) -> bool {
        // Not mincore: of another user's file it says that all is there.
        (0..SAMPLES).all(|n| {
            let mut byte = [0];
            let at = (bytes.saturating_sub(1) / SAMPLES).saturating_mul(n);
            matches!(preadv2(self, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT), Ok(1))
        })
    }
}

/// What may lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// As much as there is room for.
    Room,
    /// Everything.
    None,
}

/// Reads them all, or as many as there is room for. `done` counts bytes.
pub fn read<S: Source>(
    shards: &[Shard],
    readers: usize,
    room: impl Fn() -> u64 + Sync,
    open: impl Fn(&Path) -> io::Result<S> + Sync,
    done: &AtomicU64,
) -> Outcome {
    let pieces = pieces(shards);
    let next = AtomicUsize::new(0);
    let (reach, read) = (AtomicU64::new(room()), AtomicU64::new(0));
    let failed: Mutex<BTreeMap<usize, String>> = Mutex::default();
    let lost = |shard: usize| failed.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&shard);
    let work = || {
        let mut buffer = vec![0; STEP];
        let mut file: Option<(usize, S)> = None;
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            if piece.before % LOOK_EACH < PIECE {
                reach.store(room(), Ordering::Relaxed);
            }
            if piece.before + piece.bytes > reach.load(Ordering::Relaxed) {
                return;
            }
            if lost(piece.shard) {
                continue;
            }
            let path = &shards[piece.shard].path;
            let opened = match file.take() {
                Some((shard, file)) if shard == piece.shard => Ok(file),
                _ => open(path),
            };
            let outcome = opened.and_then(|source| {
                source.soon(piece.from, piece.bytes);
                let got = read_piece(&source, piece, &mut buffer, done);
                file = Some((piece.shard, source));
                got
            });
            match outcome {
                Ok(got) => drop(read.fetch_add(got, Ordering::Relaxed)),
                Err(error) => {
                    let said = format!("{}: {error}", path.display());
                    failed.lock().unwrap_or_else(PoisonError::into_inner).insert(piece.shard, said);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..readers.max(1) {
            scope.spawn(work);
        }
    });
    let total: u64 = shards.iter().map(|shard| shard.bytes).sum();
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    let read = read.into_inner();
    Outcome {
        files: shards.len(),
        read,
        left: if failed.is_empty() { total.saturating_sub(read) } else { 0 },
        failed: failed.into_values().collect(),
        ..Outcome::default()
    }
}

/// One thread's next portion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    shard: usize,
    from: u64,
    bytes: u64,
    /// Bytes of all shards before it.
    before: u64,
}

fn pieces(shards: &[Shard]) -> Vec<Piece> {
    let mut all = Vec::new();
    let mut before = 0;
    for (shard, Shard { bytes, .. }) in shards.iter().enumerate() {
        let mut from = 0;
        while from < *bytes {
            let bytes = PIECE.min(bytes - from);
            all.push(Piece { shard, from, bytes, before });
            from += bytes;
            before += bytes;
        }
    }
    all
}

/// A file that became shorter ends early; that is for the engine to find.
fn read_piece(file: &impl Source, piece: &Piece, buffer: &mut [u8], done: &AtomicU64) -> io::Result<u64> {
    let mut got = 0;
    while got < piece.bytes {
        let most = usize::try_from(piece.bytes - got).unwrap_or(STEP).min(buffer.len());
        let at = piece.from + got;
        match file.bring(at, most).unwrap_or_else(|| file.read_at(&mut buffer[..most], at)) {
            Ok(0) => break,
            Ok(n) => {
                got += n as u64;
                done.fetch_add(n as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

/// Parts the shards that lie in memory from those that do not.
pub fn cold(shards: Vec<Shard>) -> (Vec<Shard>, u64) {
    let is_there = |shard: &Shard| File::open(&shard.path).is_ok_and(|file| file.in_memory(shard.bytes));
    let (there, cold): (Vec<_>, Vec<_>) = shards.into_iter().partition(is_there);
    (cold, there.iter().map(|shard| shard.bytes).sum())
}

/// Whether a read that must not wait can be asked for here at all; without it nothing is known of the memory.
pub fn knows_memory(shard: &Shard) -> bool {
    let mut byte = [0];
    let asked = File::open(&shard.path)
        .map(|file| preadv2(&file, &mut [IoSliceMut::new(&mut byte)], 0, ReadWriteFlags::NOWAIT));
    matches!(asked, Ok(Ok(_) | Err(Errno::AGAIN)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(folder: &Path, name: &str, bytes: usize) {
        fs::write(folder.join(name), vec![7; bytes]).unwrap();
    }

    fn names(shards: &[Shard]) -> Vec<&str> {
        shards.iter().map(|shard| shard.path.file_name().unwrap().to_str().unwrap()).collect()
    }

    #[test]
    fn shards_come_in_the_order_of_their_names_and_only_those_of_the_index() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.safetensors", "a.safetensors", "consolidated.safetensors", "config.json"] {
            file(folder.path(), name, 10);
        }
        assert_eq!(
            names(&shards(folder.path()).unwrap()),
            ["a.safetensors", "b.safetensors", "consolidated.safetensors"]
        );
        let index = r#"{"weight_map":{"x":"b.safetensors","y":"a.safetensors"}}"#;
        fs::write(folder.path().join(local::INDEX), index).unwrap();
        assert_eq!(names(&shards(folder.path()).unwrap()), ["a.safetensors", "b.safetensors"]);
    }

    #[test]
    fn all_is_read_once_and_what_memory_has_no_room_for_is_left() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            file(folder.path(), &format!("{name}.safetensors"), 9 << 20);
        }
        let all = shards(folder.path()).unwrap();
        let done = AtomicU64::new(0);
        let open = |path: &Path| File::open(path);
        let outcome = read(&all, 4, || u64::MAX, open, &done);
        assert_eq!((outcome.read, outcome.left, done.into_inner()), (27 << 20, 0, 27 << 20));
        let outcome = read(&all, 4, || 18 << 20, open, &AtomicU64::new(0));
        assert_eq!((outcome.read, outcome.left), (18 << 20, 9 << 20), "the first two, not parts of all");
        assert_eq!(outcome.failed, Vec::<String>::new());
    }

    /// A disk that fails behind the first megabyte.
    struct Broken(i32);

    impl FileExt for Broken {
        fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
            if at < 1 << 20 { Ok(buffer.len().min(1 << 20)) } else { Err(io::Error::from_raw_os_error(self.0)) }
        }

        fn write_at(&self, _: &[u8], _: u64) -> io::Result<usize> {
            unreachable!("nothing is written")
        }
    }

    impl Source for Broken {}

    #[test]
    fn h16_a_disk_that_fails_is_named_once_a_file_and_the_others_are_read() {
        for error in [libc::EIO, libc::ESTALE] {
            let shard = |name: &str| Shard { path: name.into(), bytes: 40 << 20 };
            let outcome = read(&[shard("a"), shard("b")], 2, || u64::MAX, |_| Ok(Broken(error)), &AtomicU64::new(0));
            let said = io::Error::from_raw_os_error(error).to_string();
            assert_eq!(outcome.failed, [format!("a: {said}"), format!("b: {said}")]);
        }
    }

    #[test]
    fn what_was_just_written_lies_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        file(folder.path(), "a.safetensors", 1 << 20);
        let all = shards(folder.path()).unwrap();
        if knows_memory(&all[0]) {
            assert_eq!(cold(all), (vec![], 1 << 20));
        }
        assert_ne!(place(folder.path()).unwrap(), Place::Network);
    }
}
