//! What runs on this machine, read from `/proc`: the witness of whether something was left behind.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// One process at the moment of looking.
#[derive(Debug, Clone)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    pub session: i32,
    /// Clock ticks after boot: with the pid, an identity that is never used twice.
    pub started: u64,
    state: char,
    /// Command line, or the title that replaced it; arguments parted by blanks.
    pub command: String,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold blanks and parentheses itself.
        let rest = stat.rsplit_once(") ")?.1;
        let fields: Vec<&str> = rest.split(' ').collect();
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words: Vec<_> = command.split(|b| *b == 0).map(String::from_utf8_lossy).collect();
        Some(Self {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            session: fields.get(3)?.parse().ok()?,
            started: fields.get(19)?.parse().ok()?,
            state: fields.first()?.chars().next()?,
            command: words.join(" ").trim_end().to_owned(),
        })
    }

    /// A zombie holds nothing: it waits for a parent that may be slow to ask.
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X')
    }

    /// What this environment variable was when it was started.
    pub fn environment(&self, name: &str) -> Option<Vec<u8>> {
        let environment = fs::read(format!("/proc/{}/environ", self.pid)).unwrap_or_default();
        let value = |entry: &[u8]| Some(entry.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?.to_vec());
        environment.split(|b| *b == 0).find_map(value)
    }

    /// Whether it was started with this environment variable.
    pub fn mentions(&self, name: &str, value: &str) -> bool {
        self.environment(name).is_some_and(|found| found == value.as_bytes())
    }
}

pub fn all() -> Vec<Process> {
    let pids = fs::read_dir("/proc").unwrap().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(Process::read).collect()
}

/// Whether anybody listens on this TCP port.
pub fn is_listening(port: u16) -> bool {
    !listeners(port).is_empty()
}

/// Who listens on this TCP port, where that can be seen.
pub fn listener(port: u16) -> Option<Process> {
    let inodes = listeners(port);
    let holds = |process: &Process| {
        fs::read_dir(format!("/proc/{}/fd", process.pid)).is_ok_and(|open| {
            open.flatten().any(|file| fs::metadata(file.path()).is_ok_and(|about| inodes.contains(&about.ino())))
        })
    };
    if inodes.is_empty() { None } else { all().into_iter().find(holds) }
}

/// The inodes of the sockets that listen there.
fn listeners(port: u16) -> Vec<u64> {
    // Columns: number, local address:port in hex, remote, state (0A is LISTEN), five others, inode.
    let suffix = format!(":{port:04X}");
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
    let rows = tables.iter().flat_map(|table| table.lines()).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row.len() > 9 && row[1].ends_with(&suffix) && row[3] == "0A")
        .filter_map(|row| row[9].parse().ok())
        .collect()
}

/// Whether any process has this file mapped.
pub fn is_mapped(file: &Path) -> bool {
    let Ok(wanted) = fs::metadata(file) else { return false };
    let wanted = format!(" {} ", wanted.ino());
    let path = file.to_string_lossy();
    all().iter().any(|process| {
        let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid)).unwrap_or_default();
        maps.lines().any(|line| line.contains(&*path) && line.contains(&wanted))
    })
}
