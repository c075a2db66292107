//! A cgroup of the engine's own, below ours: what is born in it stays in it, whatever it does to its
//! session, its parent or its environment, and one write ends it all.
//!
//! Only the second version has `cgroup.kill`; on a machine with both trees its own (`unified`) is used.
//! No controller is asked for, so ours may go on holding processes beside the engine's (the rule
//! against that speaks of groups that hand controllers down).

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A group that we made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup(PathBuf);

/// Where a removed group's processes may still be on their way out.
const REMOVALS: usize = 20;
const REMOVE_AGAIN: std::time::Duration = std::time::Duration::from_millis(5);

impl Cgroup {
    /// Makes it below ours. The error is why there can be none.
    pub fn create(name: &str) -> Result<Self, String> {
        let own = own().ok_or("there is no cgroup tree of the second version")?;
        let path = own.join(name);
        fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let made = Self(path);
        if !made.0.join("cgroup.kill").exists() {
            made.remove();
            return Err("the kernel knows no cgroup.kill (Linux 5.14)".into());
        }
        Ok(made)
    }

    /// One that somebody before us made.
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where a process writes `0` to move itself in.
    pub fn door(&self) -> io::Result<OwnedFd> {
        Ok(fs::OpenOptions::new().write(true).open(self.0.join("cgroup.procs"))?.into())
    }

    pub fn holds(&self, pid: i32) -> bool {
        self.processes().contains(&pid)
    }

    /// Everything in it and below; zombies are not. Empty where it does not exist (any more).
    pub fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        for folder in self.folders() {
            let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            // 0 is a process outside of our view of pids.
            found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
        }
        found
    }

    /// Whether anything in it or below lives, also what has no pid here.
    pub fn is_populated(&self) -> bool {
        let events = fs::read_to_string(self.0.join("cgroup.events")).unwrap_or_default();
        events.lines().any(|line| line == "populated 1")
    }

    /// SIGKILL to all of it at once; no fork escapes.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.0.join("cgroup.kill"), "1")
    }

    /// Removes it and what the engine made below it. Only an empty one can be.
    pub fn remove(&self) {
        for _ in 0..REMOVALS {
            let mut folders = self.folders();
            // The deepest first.
            folders.sort_by_key(|folder| std::cmp::Reverse(folder.components().count()));
            let gone = folders.iter().all(|folder| fs::remove_dir(folder).is_ok());
            if gone || !self.0.exists() {
                return;
            }
            #[allow(clippy::disallowed_methods)] // milliseconds, off the runtime; the kernel says no more than EBUSY
            std::thread::sleep(REMOVE_AGAIN);
        }
    }

    fn folders(&self) -> Vec<PathBuf> {
        let mut found = vec![self.0.clone()];
        let mut at = 0;
        while let Some(folder) = found.get(at) {
            let below = fs::read_dir(folder).into_iter().flatten().flatten();
            let below: Vec<PathBuf> =
                below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect();
            found.extend(below);
            at += 1;
        }
        found
    }
}

/// How many processes of our memory cgroup the kernel has killed for memory so far; none: nobody can say.
/// Counted in our own group: the engine's is below it and needs no memory controller for this.
pub fn oom_kills() -> Option<u64> {
    let count = |text: &str| {
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")).and_then(|number| number.trim().parse().ok())
    };
    let second = own().and_then(|own| fs::read_to_string(own.join("memory.events")).ok());
    if let Some(kills) = second.as_deref().and_then(count) {
        return Some(kills);
    }
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = group_of(&own, "memory")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let (root, at) = mount(&mounts, "cgroup", |options| options.split(',').any(|option| option == "memory"))?;
    count(&fs::read_to_string(below(&root, &at, &path).join("memory.oom_control")).ok()?)
}

/// Our own group in the tree of the second version.
fn own() -> Option<PathBuf> {
    let path = group_of(&fs::read_to_string("/proc/self/cgroup").ok()?, "")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let (root, at) = mount(&mounts, "cgroup2", |_| true)?;
    Some(below(&root, &at, &path))
}

/// `4:memory:/a/b` for a controller of the first version, `0::/a/b` for the second.
fn group_of(text: &str, controller: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let ours = controllers.split(',').any(|name| name == controller);
        ours.then(|| path.to_owned())
    })
}

/// Root and place of the first mount of this kind: `ID PARENT DEV ROOT PLACE OPTIONS … - TYPE SOURCE MORE`.
fn mount(text: &str, kind: &str, options: impl Fn(&str) -> bool) -> Option<(String, String)> {
    text.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let (found, _, more) = (after.next()?, after.next()?, after.next().unwrap_or_default());
        let mut before = before.split(' ').skip(3);
        let (root, place) = (before.next()?, before.next()?);
        (found == kind && options(more)).then(|| (root.to_owned(), place.to_owned()))
    })
}

/// A container may have only its own part of the tree mounted: `path` is then given from the tree's root.
fn below(root: &str, place: &str, path: &str) -> PathBuf {
    let rest = if root == "/" { path } else { path.strip_prefix(root).unwrap_or(path) };
    Path::new(place).join(rest.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
30 25 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
31 25 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n\
32 25 0:28 /docker/x /c rw - cgroup cgroup rw,cpu,cpuacct\n";

    #[test]
    fn our_group_is_found_in_either_tree() {
        let own = "4:memory:/a\n3:cpu,cpuacct:/docker/x/y\n0::/system.slice/sglangd.service\n";
        assert_eq!(group_of(own, "").as_deref(), Some("/system.slice/sglangd.service"));
        assert_eq!(group_of(own, "memory").as_deref(), Some("/a"));
        assert_eq!(group_of(own, "cpuacct").as_deref(), Some("/docker/x/y"));
        assert_eq!(group_of(own, "pids"), None);
        assert_eq!(mount(MOUNTS, "cgroup2", |_| true), Some(("/".into(), "/sys/fs/cgroup/unified".into())));
        let cpu = mount(MOUNTS, "cgroup", |options| options.contains("cpu")).expect("mounted");
        assert_eq!(below(&cpu.0, &cpu.1, "/docker/x/y"), Path::new("/c/y"));
        assert_eq!(below("/", "/s", "/"), Path::new("/s/"));
    }

    #[test]
    fn g12_nothing_escapes_a_group() {
        let name = format!("sglangd-test-{}", std::process::id());
        let group = match Cgroup::create(&name) {
            Ok(group) => group,
            // Without the right to make one there is nothing to be seen; `tests/systemd.rs` has it.
            Err(why) => {
                assert!(!why.is_empty());
                return;
            }
        };
        assert!(!group.is_populated() && group.processes().is_empty());
        let door = group.path().join("cgroup.procs").display().to_string();
        // Leaves session, parent and environment behind.
        let script = format!("echo 0 > {door}; env -i setsid sh -c 'sleep 60 & sleep 60 & exit' & wait");
        let mut child = std::process::Command::new("/bin/sh").args(["-c", &script]).spawn().expect("sh");
        let begun = std::time::Duration::from_millis(5);
        for _ in 0..2000 {
            if group.processes().len() >= 2 && child.try_wait().expect("ours").is_some() {
                break;
            }
            #[allow(clippy::disallowed_methods)]
            std::thread::sleep(begun);
        }
        assert_eq!(group.processes().len(), 2, "the two that fled are known by their group alone");
        group.kill().expect("ours");
        for _ in 0..2000 {
            if !group.is_populated() {
                break;
            }
            #[allow(clippy::disallowed_methods)]
            std::thread::sleep(begun);
        }
        assert!(group.processes().is_empty() && !group.is_populated());
        group.remove();
        assert!(!group.path().exists());
    }
}
