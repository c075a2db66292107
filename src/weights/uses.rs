//! Who uses what of the cache: files that are open or mapped, folders that are held, paths in command lines. What is
//! not ours may be hidden in `/proc`; a held folder is seen all the same.

use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What the processes of this machine have open below one folder.
#[derive(Debug, Default)]
pub struct Uses {
    /// By device and inode: a process in another mount namespace sees another path.
    inodes: HashMap<(u64, u64), String>,
    /// Mapped or open, by path: some file systems show other device numbers in `maps`.
    paths: HashMap<PathBuf, String>,
    /// Command lines, and whose they are.
    commands: Vec<(Vec<u8>, String)>,
}

impl Uses {
    /// Looks at every process but this one.
    pub fn look(root: &Path) -> Self {
        let root = fs::canonicalize(root).unwrap_or_else(|_| root.to_owned());
        let mut uses = Self::default();
        let own = std::process::id();
        let Ok(processes) = fs::read_dir("/proc") else { return uses };
        for process in processes.flatten() {
            let pid = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            if let Some(pid) = pid.filter(|pid| *pid != own) {
                uses.add(&root, pid);
            }
        }
        uses
    }

    /// What cannot be read is another user's, or gone.
    fn add(&mut self, root: &Path, pid: u32) {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let who = named(&command, pid);
        if contains(&command, root.as_os_str().as_bytes()) {
            self.commands.push((command, who.clone()));
        }
        for descriptor in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let path = descriptor.path();
            let Ok(meta) = fs::metadata(&path) else { continue };
            if meta.is_file() || meta.is_dir() {
                self.inodes.insert((meta.dev(), meta.ino()), who.clone());
                self.paths.extend(fs::read_link(&path).ok().filter(|p| p.starts_with(root)).map(|p| (p, who.clone())));
            }
        }
        for path in mapped(&fs::read(format!("/proc/{pid}/maps")).unwrap_or_default()) {
            if path.starts_with(root) {
                self.paths.insert(path, who.clone());
            }
        }
    }

    /// Who has this file open or mapped.
    pub fn of_file(&self, path: &Path, inode: (u64, u64)) -> Option<&str> {
        self.inodes.get(&inode).or_else(|| self.paths.get(path)).map(String::as_str)
    }

    /// Who holds this folder open, or was told its path.
    pub fn of_folder(&self, folder: &Path) -> Option<&str> {
        let held = fs::metadata(folder).ok().and_then(|meta| self.inodes.get(&(meta.dev(), meta.ino())));
        let told = || {
            let path = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
            let named = |(command, _): &&(Vec<u8>, String)| contains(command, path.as_os_str().as_bytes());
            self.commands.iter().find(named).map(|(_, who)| who)
        };
        held.or_else(told).map(String::as_str)
    }
}

/// Programs by their first words: what comes later may be a secret.
pub fn named(command: &[u8], pid: u32) -> String {
    let words = command.split(|b| *b == 0).filter(|word| !word.is_empty()).take(2);
    let words: Vec<String> = words.map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    if words.is_empty() { format!("pid {pid}") } else { format!("{} (pid {pid})", words.join(" ")) }
}

/// The files of `/proc/PID/maps`.
fn mapped(maps: &[u8]) -> impl Iterator<Item = PathBuf> {
    maps.split(|b| *b == b'\n').filter_map(|line| {
        let path = &line[line.iter().position(|b| *b == b'/')?..];
        let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
        Some(PathBuf::from(std::ffi::OsStr::from_bytes(path)))
    })
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    memchr::memmem::find(text, part).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_files_are_read_from_the_kernels_words() {
        let maps = b"7f00-7f01 r--s 00000000 fd:01 42                         /cache/blobs/ab cd\n\
                     7f02-7f03 rw-p 00000000 00:00 0                          [heap]\n\
                     7f04-7f05 r--s 00000000 fd:01 43                         /cache/blobs/ef (deleted)\n";
        let paths: Vec<PathBuf> = mapped(maps).collect();
        assert_eq!(paths, [PathBuf::from("/cache/blobs/ab cd"), PathBuf::from("/cache/blobs/ef")]);
    }

    #[test]
    fn a_process_is_named_by_its_first_words_only() {
        assert_eq!(named(b"python3\0-m\0sglang\0--api-key\0secret\0", 7), "python3 -m (pid 7)");
        assert_eq!(named(b"", 7), "pid 7");
    }
}
