//! What `/proc` says of processes, and signals that cannot hit the wrong one.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// One line of `/proc/PID/stat`, as far as it is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    pub pid: i32,
    /// At most 15 bytes of the name.
    pub comm: String,
    /// `R`, `S`, `D` (uninterruptible), `T` (stopped), `Z` (zombie) …
    pub state: char,
    pub ppid: i32,
    pub pgid: i32,
    pub sid: i32,
    /// Clock ticks since boot: with the pid it names a process for ever.
    pub start_time: u64,
}

impl Stat {
    /// Dead, but not yet collected by its parent.
    pub fn is_zombie(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }

    /// Stopped by a signal. Not `t`: a debugger or a profiler holds it, for as long as it looks.
    pub fn is_stopped(&self) -> bool {
        self.state == 'T'
    }
}

/// Whether processes can be seen at all: a container may come without `/proc`.
pub fn is_there() -> bool {
    fs::metadata("/proc/self/stat").is_ok()
}

/// The process of this pid; `None` where there is none (any more).
pub fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// All processes that can be seen. Those that end meanwhile are left out.
pub fn all() -> Vec<Stat> {
    let Ok(folder) = fs::read_dir("/proc") else { return Vec::new() };
    folder.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(stat).collect()
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The name may hold anything, `)` and spaces too: it ends at the last parenthesis.
    let (head, rest) = text.rsplit_once(')')?;
    let (pid, comm) = head.split_once(" (")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    Some(Stat {
        pid: pid.trim().parse().ok()?,
        comm: comm.to_owned(),
        state: fields.first()?.chars().next()?,
        ppid: fields.get(1)?.parse().ok()?,
        pgid: fields.get(2)?.parse().ok()?,
        sid: fields.get(3)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
    })
}

/// CPU time that a process has used, in clock ticks.
pub fn cpu_ticks(pid: i32) -> Option<u64> {
    parse_cpu_ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_cpu_ticks(text: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Bytes that a process has read so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BytesRead {
    /// By system calls, from anything.
    pub called: u64,
    /// From disks, by calls or through mapped files: what lay in the page cache is not in it.
    pub stored: u64,
}

impl BytesRead {
    /// What comes from a disk by a call counts twice: the sum only tells growth.
    pub fn sum(self) -> u64 {
        self.called.saturating_add(self.stored)
    }
}

pub fn bytes_read(pid: i32) -> Option<BytesRead> {
    parse_bytes_read(&fs::read_to_string(format!("/proc/{pid}/io")).ok()?)
}

fn parse_bytes_read(text: &str) -> Option<BytesRead> {
    let of = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    Some(BytesRead { called: of("rchar:")?, stored: of("read_bytes:")? })
}

/// The command line as one text; empty for zombies and kernel threads.
pub fn command_line(pid: i32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<String> = bytes
        .split(|b| *b == 0)
        .filter(|word| !word.is_empty())
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    words.join(" ")
}

/// Whether the process was started with `NAME=VALUE` in its environment (as `execve` saw it).
pub fn has_env(pid: i32, assignment: &[u8]) -> bool {
    fs::read(format!("/proc/{pid}/environ"))
        .is_ok_and(|bytes| bytes.split(|b| *b == 0).any(|entry| entry == assignment))
}

/// The files that a process has mapped below `/dev/shm`, by name.
pub fn mapped_shm(pid: i32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let mut names: Vec<String> = text
        .lines()
        .filter_map(|line| line.split_once("/dev/shm/").map(|(_, name)| name.trim_end_matches(" (deleted)").to_owned()))
        .collect();
    if let Ok(folder) = fs::read_dir(format!("/proc/{pid}/fd")) {
        for entry in folder.flatten() {
            if let Ok(target) = fs::read_link(entry.path()) {
                let target = String::from_utf8_lossy(&target.into_os_string().into_vec()).into_owned();
                if let Some(name) = target.strip_prefix("/dev/shm/") {
                    names.push(name.trim_end_matches(" (deleted)").to_owned());
                }
            }
        }
    }
    names.sort();
    names.dedup();
    names
}

/// The processes that listen on this TCP port of an address that `matters`, as far as `/proc` shows
/// them to us.
pub fn listeners(port: u16, matters: impl Fn(IpAddr) -> bool) -> Vec<Stat> {
    let inodes: Vec<u64> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| table.lines().filter_map(listener).collect::<Vec<_>>())
        .filter(|(ip, at, _)| *at == port && matters(*ip))
        .map(|(_, _, inode)| inode)
        .collect();
    if inodes.is_empty() {
        return Vec::new();
    }
    let holds = |process: &Stat| {
        fs::read_dir(format!("/proc/{}/fd", process.pid)).is_ok_and(|fds| {
            fds.flatten().any(|fd| fs::metadata(fd.path()).is_ok_and(|meta| inodes.contains(&meta.ino())))
        })
    };
    all().into_iter().filter(holds).collect()
}

/// Address, port and inode of a line of `/proc/net/tcp` or `tcp6`, if it is a listener.
fn listener(line: &str) -> Option<(IpAddr, u16, u64)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (ip, port) = fields.get(1)?.split_once(':')?;
    // 0A is LISTEN.
    if *fields.get(3)? != "0A" {
        return None;
    }
    // Words of 32 bits in the machine's own order.
    let words = ip.as_bytes().chunks(8).map(|word| u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok());
    let bytes: Vec<u8> = words.collect::<Option<Vec<u32>>>()?.into_iter().flat_map(u32::to_ne_bytes).collect();
    let ip = match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(four) => Ipv4Addr::from(four).into(),
        Err(_) => Ipv6Addr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?).to_canonical(),
    };
    Some((ip, u16::from_str_radix(port, 16).ok()?, fields.get(9)?.parse().ok()?))
}

/// Names this boot of the kernel; empty where it cannot be read.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// A handle on the process with this pid *and* start time. `None`: it is gone, whoever has the pid now.
pub fn open(pid: i32, start_time: u64) -> Option<OwnedFd> {
    let fd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    // Checked after opening: a pid that was reused in between shows another start time.
    (stat(pid)?.start_time == start_time).then_some(fd)
}

/// Sends a signal to exactly this process. `ESRCH`: it is gone.
pub fn signal(process: impl AsFd, signal: Signal) -> io::Result<()> {
    Ok(pidfd_send_signal(process, signal)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_is_read() {
        let line = "42 (a) b (c) S 1 40 39 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 10 20 1 2 3";
        let stat = parse_stat(line).expect("a stat line");
        assert_eq!((stat.pid, stat.comm.as_str(), stat.state), (42, "a) b (c", 'S'));
        assert_eq!((stat.ppid, stat.pgid, stat.sid, stat.start_time), (1, 40, 39, 987_654));
    }

    #[test]
    fn time_used_and_bytes_read_are_found() {
        let line = "42 (a) b (c) S 1 40 39 0 -1 4194560 1 2 3 4 500 60 7 8 20 0 1 0 987654 10 20 1 2 3";
        assert_eq!(parse_cpu_ticks(line), Some(560));
        let io = "rchar: 1000\nwchar: 5\nsyscr: 1\nsyscw: 1\nread_bytes: 4096\nwrite_bytes: 0\n";
        let read = parse_bytes_read(io).expect("both are there");
        assert_eq!((read.called, read.stored, read.sum()), (1000, 4096, 5096));
        assert_eq!(parse_bytes_read(""), None);
        let own = i32::try_from(std::process::id()).expect("a pid");
        let before = bytes_read(own).expect("our own entry");
        fs::read("/proc/self/environ").expect("our own environment");
        assert!(bytes_read(own).expect("our own entry").called > before.called);
        assert!(cpu_ticks(own).is_some());
    }

    #[test]
    fn a_listener_is_found_by_its_address_and_port() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = socket.local_addr().expect("bound").port();
        let own = i32::try_from(std::process::id()).expect("a pid");
        let found = |ip: Ipv4Addr| listeners(port, |at| at == IpAddr::from(ip)).iter().any(|p| p.pid == own);
        assert!(found(Ipv4Addr::LOCALHOST));
        assert!(!found(Ipv4Addr::new(127, 0, 0, 2)), "another address is another listener");
        drop(socket);
        assert!(!found(Ipv4Addr::LOCALHOST));
    }

    #[test]
    fn we_see_ourselves() {
        let own = i32::try_from(std::process::id()).expect("a pid");
        let stat = stat(own).expect("our own entry");
        assert!(all().iter().any(|other| other.pid == own));
        assert!(open(own, stat.start_time).is_some());
        assert!(open(own, stat.start_time + 1).is_none(), "another start time is another process");
    }
}
