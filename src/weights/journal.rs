//! Which bytes of an unfinished blob count after a kill or a power cut: a small file beside it.
//!
//! ```text
//! sglangd ranges 1 SIZE BOOT            the boot during which it is written
//! FROM WRITTEN SYNCED CHECK             one line a range, of one length, written anew in its place
//! ```
//!
//! Bytes handed to the kernel survive the death of the process, so in the same boot a range counts up to WRITTEN.
//! After another boot it counts up to SYNCED: so far the disk itself said that it has them. A line that does not check
//! (torn by a power cut) counts for nothing; whatever counts, the whole file is hashed before it gets its name.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::ranges::Ranges;

/// A journal is a line for each 8 MiB or more: beyond this it is no journal.
const LARGEST: u64 = 64 << 20;
/// `FROM WRITTEN SYNCED CHECK\n` in hexadecimal digits.
const LINE: usize = 16 * 3 + 8 + 4;

#[derive(Debug)]
pub struct Journal {
    file: File,
    head: u64,
    slots: Vec<Slot>,
}

/// One range that grows from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slot {
    from: u64,
    written: u64,
    synced: u64,
}

/// How far each range was written when a push to the disk began.
#[derive(Debug)]
pub struct Pushed(Vec<u64>);

/// This boot of this machine; another one's page cache is gone.
pub fn boot() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    // Without one, nothing is known to be the same boot.
    if id.trim().is_empty() { format!("unknown-{}", std::process::id()) } else { id.trim().to_owned() }
}

/// What counts of a file of `size` bytes, of which `len` are allocated; none: there is no journal of it.
pub fn read(path: &Path, size: u64, len: u64, boot: &str) -> Option<Ranges> {
    let file = File::open(path).ok()?;
    let mut text = Vec::new();
    file.take(LARGEST).read_to_end(&mut text).ok()?;
    counted(&text, size, len, boot)
}

fn counted(text: &[u8], size: u64, len: u64, boot: &str) -> Option<Ranges> {
    let end = text.iter().position(|b| *b == b'\n')?;
    let (head, lines) = (std::str::from_utf8(&text[..end]).ok()?, &text[end + 1..]);
    let (of, during) = head.strip_prefix("sglangd ranges 1 ")?.split_once(' ')?;
    if of.parse() != Ok(size) {
        return None;
    }
    let mut ranges = Ranges::default();
    for slot in lines.chunks(LINE).filter_map(Slot::parse) {
        let to = if during == boot { slot.written } else { slot.synced };
        // A file that is shorter than its journal was cut by somebody else.
        ranges.add(slot.from..to.min(len).min(size).max(slot.from));
    }
    Some(ranges)
}

impl Journal {
    /// Begins a journal in which `done` counts; the caller has pushed those bytes to the disk.
    pub fn begin(path: &Path, size: u64, boot: &str, done: &Ranges) -> std::io::Result<Self> {
        let slot = |r: &Range<u64>| Slot { from: r.start, written: r.end, synced: r.end };
        let slots: Vec<Slot> = done.iter().map(slot).collect();
        let mut text = format!("sglangd ranges 1 {size} {boot}\n");
        let head = text.len() as u64;
        text.extend(slots.iter().map(Slot::line));
        // Beside it first: at no moment may the old journal be gone and the new one not be there.
        let fresh = path.with_extension("fresh.incomplete");
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&fresh)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&fresh, path)?;
        Ok(Self { file, head, slots })
    }

    /// A new range that begins at `from`; the number is its name.
    pub fn open_range(&mut self, from: u64) -> std::io::Result<usize> {
        self.slots.push(Slot { from, written: from, synced: from });
        self.put(self.slots.len() - 1)?;
        Ok(self.slots.len() - 1)
    }

    /// The range is written up to `to`.
    pub fn note(&mut self, range: usize, to: u64) -> std::io::Result<()> {
        self.slots[range].written = to;
        self.put(range)
    }

    /// To be taken before the data is pushed to the disk.
    pub fn before_push(&self) -> Pushed {
        Pushed(self.slots.iter().map(|slot| slot.written).collect())
    }

    /// The push that began with `pushed` has ended well.
    pub fn after_push(&mut self, pushed: &Pushed) -> std::io::Result<()> {
        for (range, &to) in pushed.0.iter().enumerate() {
            if self.slots[range].synced < to {
                self.slots[range].synced = to;
                self.put(range)?;
            }
        }
        Ok(())
    }

    fn put(&self, range: usize) -> std::io::Result<()> {
        let place = self.head + (range * LINE) as u64;
        self.file.write_all_at(self.slots[range].line().as_bytes(), place)
    }
}

impl Slot {
    fn check(&self) -> u32 {
        let mixed = self.from.rotate_left(7) ^ self.written.rotate_left(23) ^ self.synced.rotate_left(41) ^ 0x5347_4c52;
        (mixed ^ (mixed >> 32)) as u32
    }

    fn line(&self) -> String {
        let mut line = String::with_capacity(LINE);
        // Writing to a String cannot fail.
        let _ = writeln!(line, "{:016x} {:016x} {:016x} {:08x}", self.from, self.written, self.synced, self.check());
        line
    }

    fn parse(line: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
        let mut words = line.split(' ').map(|word| u64::from_str_radix(word, 16).ok());
        let mut next = || words.next().flatten();
        let slot = Self { from: next()?, written: next()?, synced: next()? };
        let right = next()? == u64::from(slot.check()) && slot.from <= slot.synced && slot.synced <= slot.written;
        right.then_some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn journal(path: &Path) -> Journal {
        let mut journal = Journal::begin(path, 100 * MIB, "this", &Ranges::one(0..MIB)).unwrap();
        let first = journal.open_range(10 * MIB).unwrap();
        let second = journal.open_range(20 * MIB).unwrap();
        journal.note(first, 12 * MIB).unwrap();
        let pushed = journal.before_push();
        journal.note(first, 13 * MIB).unwrap();
        journal.note(second, 21 * MIB).unwrap();
        journal.after_push(&pushed).unwrap();
        journal
    }

    #[test]
    fn h09_after_a_kill_all_that_was_written_counts_and_after_a_power_cut_what_the_disk_had() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.ranges");
        journal(&path);
        let same = read(&path, 100 * MIB, 100 * MIB, "this").unwrap();
        assert_eq!(same.gaps(100 * MIB), [MIB..10 * MIB, 13 * MIB..20 * MIB, 21 * MIB..100 * MIB]);
        let other = read(&path, 100 * MIB, 100 * MIB, "another").unwrap();
        assert_eq!(other.gaps(100 * MIB), [MIB..10 * MIB, 12 * MIB..100 * MIB]);
    }

    #[test]
    fn h09_a_torn_line_a_shorter_file_and_another_files_journal_count_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.ranges");
        journal(&path);
        let text = std::fs::read(&path).unwrap();
        assert_eq!(counted(&text, 99 * MIB, 99 * MIB, "this"), None, "another size");
        assert_eq!(counted(&text, 100 * MIB, 11 * MIB, "this").unwrap().total(), 2 * MIB, "cut at 11 MiB");
        let mut torn = text.clone();
        let at = text.len() - LINE - 20;
        torn[at] ^= 1;
        assert_eq!(counted(&torn, 100 * MIB, 100 * MIB, "this").unwrap().total(), 2 * MIB, "one line torn");
        assert_eq!(counted(&text[..text.len() - 5], 100 * MIB, 100 * MIB, "this").unwrap().total(), 4 * MIB);
        assert_eq!(counted(b"", 1, 1, "this"), None);
        assert_eq!(counted(&[0; 4096], 1, 1, "this"), None, "zeros");
    }
}
