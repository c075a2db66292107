//! What the kernel's own log says of GPUs and of memory, where we may read it.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use super::gpus::Xid;

/// A record of `/dev/kmsg` has at most 8 KiB.
const RECORD: usize = 8 << 10;
/// The kernel's ring holds a few thousand records; more than this is a flood.
const RECORDS: usize = 65_536;

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Microseconds since boot, by the clock that does not count sleep.
    pub at: u64,
    pub text: String,
}

/// All records that the kernel still has, oldest first. Errors: no permission (`dmesg_restrict`, a unit
/// with `ProtectKernelLogs`), or no `/dev/kmsg`.
pub fn read() -> std::io::Result<Vec<Record>> {
    let mut file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open("/dev/kmsg")?;
    let (mut records, mut buffer) = (Vec::new(), vec![0; RECORD]);
    while records.len() < RECORDS {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => records.extend(parse(&String::from_utf8_lossy(&buffer[..n]))),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            // Overwritten while we read: the next one is there.
            Err(error) if error.raw_os_error() == Some(nix::libc::EPIPE) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(records)
}

/// `6,1234,98765432,-;text`, then lines of key and value that nobody needs.
fn parse(record: &str) -> Option<Record> {
    let (head, text) = record.split_once(';')?;
    let at = head.split(',').nth(2)?.parse().ok()?;
    Some(Record { at, text: text.lines().next().unwrap_or_default().to_owned() })
}

/// Microseconds since boot, as the records count.
pub fn now() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |t| (t.tv_sec() as u64).saturating_mul(1_000_000) + t.tv_nsec() as u64 / 1_000)
}

/// Errors of GPUs since that moment: `NVRM: Xid (PCI:0000:19:00): 79, pid=…`.
pub fn xids(records: &[Record], since: u64) -> Vec<Xid> {
    let xid = |record: &Record| {
        let (_, rest) = record.text.split_once("NVRM: Xid (")?;
        let (gpu, rest) = rest.split_once("): ")?;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        Some(Xid { number: digits.parse().ok()?, gpu: gpu.trim_start_matches("PCI:").to_owned() })
    };
    records.iter().filter(|record| record.at >= since).filter_map(xid).collect()
}

/// Processes that the kernel killed for memory since that moment: "Killed process 4711 (python) total-vm…".
pub fn killed_for_memory(records: &[Record], since: u64) -> Vec<i32> {
    let pid = |record: &Record| {
        let lower = record.text.to_ascii_lowercase();
        let rest =
            lower.split_once("killed process ").map(|(before, rest)| (before.contains("out of memory"), rest))?;
        let digits: String = rest.1.chars().take_while(char::is_ascii_digit).collect();
        rest.0.then(|| digits.parse().ok()).flatten()
    };
    records.iter().filter(|record| record.at >= since).filter_map(pid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> Vec<Record> {
        [
            "4,100,5000000,-;NVRM: Xid (PCI:0000:19:00): 31, pid=1, name=old, Ch 1",
            "4,101,9000000,-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n SUBSYSTEM=pci",
            "3,102,9000001,-;Out of memory: Killed process 4711 (sglang::schedul) total-vm:1kB, anon-rss:2kB",
            "3,103,9000002,-;Memory cgroup out of memory: Killed process 12 (python3) total-vm:1kB",
            "6,104,9000003,-;oom_reaper: reaped process 4711 (sglang::schedul)",
            "no record at all",
        ]
        .iter()
        .filter_map(|record| parse(record))
        .collect()
    }

    #[test]
    fn xids_of_this_launch_are_found() {
        assert_eq!(log().len(), 5);
        assert_eq!(xids(&log(), 6_000_000), [Xid { number: 79, gpu: "0000:3b:00".into() }]);
        assert_eq!(xids(&log(), 0).len(), 2);
    }

    #[test]
    fn g09_whom_the_kernel_killed_for_memory_is_found() {
        assert_eq!(killed_for_memory(&log(), 6_000_000), [4711, 12]);
        assert_eq!(killed_for_memory(&log(), 9_500_000), [0; 0]);
    }
}
