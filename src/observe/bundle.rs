//! Keeps what was found at a death or a hang: one folder each, the last ten, for whoever asks why.
//!
//! What it is given is redacted already; it adds what the machine says of itself. Nothing here waits for
//! an engine: that is `supervisor::findings`.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::clock;
use crate::node::kernel_log;

/// More of them help nobody; each has some hundred kilobytes.
const KEPT: usize = 10;
/// Of the kernel's log.
const RECORDS: usize = 300;
/// Of one file, whatever was found.
const LARGEST: usize = 4 << 20;

/// A file of a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub name: String,
    pub text: String,
}

impl Page {
    pub fn new(name: &str, text: impl Into<String>) -> Self {
        Self { name: name.to_owned(), text: text.into() }
    }
}

/// Where they lie.
pub fn folder(state: &Path) -> PathBuf {
    state.join("bundles")
}

/// Writes one and removes the oldest. It appears whole; its name says when and why. Blocking.
pub fn write(state: &Path, why: &str, pages: &[Page]) -> io::Result<PathBuf> {
    let all = folder(state);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&all)?;
    let name = format!("{}-{why}", clock::now().replace(':', ""));
    let (making, made) = (all.join(format!(".{name}.new")), all.join(&name));
    fs::DirBuilder::new().mode(0o700).create(&making)?;
    let written = pages.iter().chain(&machine()).try_for_each(|page| put(&making, page));
    if let Err(error) = written.and_then(|()| fs::rename(&making, &made)) {
        // Half a bundle would be taken for a whole one.
        let _ = fs::remove_dir_all(&making);
        return Err(error);
    }
    prune(&all);
    Ok(made)
}

/// One more page for a bundle that is there.
pub fn add(bundle: &Path, page: &Page) -> io::Result<()> {
    put(bundle, page)
}

/// The newest; none: nothing has died here yet.
pub fn newest(state: &Path) -> Option<PathBuf> {
    finished(&folder(state)).pop()
}

fn put(folder: &Path, page: &Page) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(folder.join(&page.name))?;
    let bytes = page.text.as_bytes();
    // The end says more than the beginning.
    file.write_all(&bytes[bytes.len().saturating_sub(LARGEST)..])
}

/// The names begin with the time: sorted, the oldest is the first.
fn finished(all: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(all).into_iter().flatten().flatten();
    let visible = entries.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'));
    let mut found: Vec<PathBuf> = visible.map(|entry| entry.path()).collect();
    found.sort();
    found
}

fn prune(all: &Path) {
    let found = finished(all);
    for old in found.iter().take(found.len().saturating_sub(KEPT)) {
        // A page that cannot be removed stays; the next bundle tries again.
        let _ = fs::remove_dir_all(old);
    }
}

/// What the machine says of itself.
fn machine() -> Vec<Page> {
    let file = |path: &str| fs::read_to_string(path).unwrap_or_else(|error| format!("({path}: {error})\n"));
    let log = match kernel_log::read() {
        Ok(records) => {
            let last = records.iter().skip(records.len().saturating_sub(RECORDS));
            let lines: Vec<String> =
                last.map(|record| format!("[{:>12.6}] {}\n", record.at as f64 / 1e6, record.text)).collect();
            lines.concat()
        }
        Err(error) => format!("(the kernel's log may not be read: {error})\n"),
    };
    vec![
        Page::new("meminfo", file("/proc/meminfo")),
        Page::new("pressure-memory", file("/proc/pressure/memory")),
        Page::new("loadavg", file("/proc/loadavg")),
        Page::new("own-cgroup", file("/proc/self/cgroup")),
        Page::new("kernel.log", log),
    ]
}

/// From now on a panic of ours leaves its text in a bundle, before the process aborts.
pub fn keep_panics(state: &Path) {
    let (state, before) = (state.to_owned(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        let trace = std::backtrace::Backtrace::force_capture();
        let text = format!("sglangd {}: {panic}\n\n{trace}\n", env!("CARGO_PKG_VERSION"));
        // A defect of the bundle's own must not hide the panic's words on standard error.
        let _ = write(&state, PANIC, &[Page::new("panic", text)]);
        before(panic);
    }));
}

const PANIC: &str = "panic";

/// The bundle of our own last panic, if nothing has died since.
pub fn last_panic(state: &Path) -> Option<PathBuf> {
    newest(state).filter(|path| path.to_string_lossy().ends_with(&format!("-{PANIC}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_last_ten_are_kept_and_only_their_owner_reads_them() {
        let state = tempfile::tempdir().expect("a folder");
        let mut made = Vec::new();
        for n in 0..12 {
            made.push(write(state.path(), "crash", &[Page::new("cause", n.to_string())]).expect("written"));
            // Two of one millisecond would have one name.
            let now = clock::now();
            while clock::now() == now {
                std::thread::yield_now();
            }
        }
        assert_eq!(finished(&folder(state.path())), made[2..]);
        assert_eq!(newest(state.path()).as_ref(), made.last());
        let cause = made[11].join("cause");
        assert_eq!(fs::read_to_string(&cause).expect("there"), "11");
        assert_eq!(fs::metadata(&cause).expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&made[11]).expect("there").permissions().mode() & 0o777, 0o700);
        assert!(made[11].join("meminfo").exists());
    }

    #[test]
    fn a_place_that_cannot_be_written_is_an_error_and_leaves_nothing() {
        let state = tempfile::tempdir().expect("a folder");
        fs::write(folder(state.path()), b"a file in its place").expect("written");
        assert!(write(state.path(), "crash", &[]).is_err());
        assert!(newest(state.path()).is_none());
    }

    #[test]
    fn j10_the_text_of_a_panic_is_in_a_bundle() {
        let state = tempfile::tempdir().expect("a folder");
        keep_panics(state.path());
        let ended = std::thread::spawn(|| panic!("the invariant of {} is gone", "tests")).join();
        let _ = std::panic::take_hook();
        assert!(ended.is_err());
        let bundle = last_panic(state.path()).expect("a bundle");
        let text = fs::read_to_string(bundle.join("panic")).expect("the text");
        assert!(text.contains("the invariant of tests is gone"), "{text}");
        assert!(text.contains("bundle.rs"), "where it happened: {text}");
    }
}
