//! How many bytes of files this machine can keep in memory: what is free or only caches, within every limit of the
//! control groups above us, less what the engine itself will want.

use std::fs;
use std::path::{Path, PathBuf};

/// Of all memory, left for the engine's own processes: eight ranks with their libraries and pinned buffers.
const LEFT_SHARE: u64 = 8;
/// And at least this much.
const LEFT_AT_LEAST: u64 = 2 << 30;

/// One control group's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    pub limit: u64,
    pub used: u64,
    /// Of what is used: pages of files, which give way.
    pub files: u64,
}

/// Bytes of files that may lie in memory, those that do already included.
pub fn room() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let groups = groups(&fs::read_to_string("/proc/self/cgroup").unwrap_or_default(), Path::new("/sys/fs/cgroup"));
    within(&meminfo, &groups)
}

fn within(meminfo: &str, groups: &[Group]) -> u64 {
    let of = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024)
    };
    let machine = left(of("MemAvailable"), of("MemTotal"));
    let group = |group: &Group| left(group.limit.saturating_sub(group.used.saturating_sub(group.files)), group.limit);
    groups.iter().map(group).fold(machine, u64::min)
}

fn left(available: u64, all: u64) -> u64 {
    available.saturating_sub((all / LEFT_SHARE).max(LEFT_AT_LEAST).min(all / 2))
}

/// The limits above this process: version 2 in one tree, version 1 in `memory`. One without a limit is none.
fn groups(own: &str, mount: &Path) -> Vec<Group> {
    let mut found = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(kind), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (base, names): (PathBuf, _) = match kind {
            "" if mount.join("unified").is_dir() => (mount.join("unified"), &VERSION_2),
            "" => (mount.to_owned(), &VERSION_2),
            kinds if kinds.split(',').any(|kind| kind == "memory") => (mount.join("memory"), &VERSION_1),
            _ => continue,
        };
        // In a container the path may be the host's, of which only the lowest part is mounted: then it is the root's.
        let own = base.join(path.trim_start_matches('/'));
        let lowest = if own.is_dir() { own } else { base.clone() };
        found.extend(lowest.ancestors().take_while(|dir| dir.starts_with(&base)).filter_map(|dir| names.read(dir)));
    }
    found
}

struct Names {
    limits: &'static [&'static str],
    used: &'static str,
    files: &'static [&'static str],
}

const VERSION_2: Names =
    Names { limits: &["memory.max", "memory.high"], used: "memory.current", files: &["inactive_file", "active_file"] };
const VERSION_1: Names = Names {
    limits: &["memory.limit_in_bytes"],
    used: "memory.usage_in_bytes",
    files: &["total_inactive_file", "total_active_file"],
};

impl Names {
    fn read(&self, dir: &Path) -> Option<Group> {
        let number = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
        // "max" is no number, and version 1 says it with one beyond all memory.
        let limit = self.limits.iter().filter_map(|name| number(name)).min().filter(|limit| *limit < 1 << 60)?;
        let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        let pages = stat.lines().filter_map(|line| line.split_once(' '));
        let files =
            pages.filter(|(name, _)| self.files.contains(name)).filter_map(|(_, n)| n.parse::<u64>().ok()).sum();
        Some(Group { limit, used: number(self.used).unwrap_or(0), files })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_tightest_limit_counts_and_caches_give_way() {
        let meminfo = "MemTotal:       67108864 kB\nMemFree:         1048576 kB\nMemAvailable:   50331648 kB\n";
        assert_eq!(within(meminfo, &[]), 40 * GIB, "48 GiB available, an eighth of 64 left");
        let group = Group { limit: 32 * GIB, used: 30 * GIB, files: 26 * GIB };
        assert_eq!(within(meminfo, &[group]), 24 * GIB, "28 GiB that are free or only files, less 4");
        assert_eq!(within("", &[]), 0, "nothing is known: nothing is taken");
    }

    #[test]
    fn limits_are_found_in_both_versions_and_in_every_level() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("system.slice/memory.max", "1000\n");
        write("system.slice/memory.current", "900\n");
        write("system.slice/memory.stat", "anon 100\ninactive_file 300\nactive_file 200\n");
        write("system.slice/x.service/memory.max", "max\n");
        write("system.slice/x.service/memory.high", "800\n");
        let found = groups("0::/system.slice/x.service\n", root.path());
        assert_eq!(
            found,
            [Group { limit: 800, used: 0, files: 0 }, Group { limit: 1000, used: 900, files: 500 }],
            "from the lowest up"
        );
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("memory")).unwrap();
        fs::write(root.path().join("memory/memory.limit_in_bytes"), "700\n").unwrap();
        fs::write(root.path().join("memory/memory.usage_in_bytes"), "70\n").unwrap();
        let found = groups("5:cpu:/x\n4:memory:/docker/0123\n", root.path());
        assert_eq!(found, [Group { limit: 700, used: 70, files: 0 }], "the host's path is not in the container");
    }
}
