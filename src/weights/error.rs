//! Why weights could not be had: each cause its own message with the next step, and whether asking
//! again can help. Says nothing about how often: that is the caller's patience.

use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

/// Whether the same fetch, started again, could end otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// It could, not before this long.
    Yes { after: Duration },
    /// Only when somebody changes something first.
    No,
}

#[derive(Debug, Error)]
pub enum FetchError {
    #[error(
        "the hub refuses {repo} to this token ({status}): the repository is gated. Ask for access on {endpoint}/{repo}, \
         then try again with the same account's token"
    )]
    Gated { endpoint: String, repo: String, status: u16 },
    #[error(
        "{repo} is gated or private and no token is set ({status}). Ask for access on {endpoint}/{repo} and give the token \
         in HF_TOKEN or in the file that HF_TOKEN_PATH names"
    )]
    NoToken { endpoint: String, repo: String, status: u16 },
    #[error("the hub does not know this token (401 from {endpoint}). Replace the one in HF_TOKEN or in the token file")]
    BadToken { endpoint: String },
    #[error(
        "there is no repository {repo} on {endpoint}{hint}. Check model.repo for a slip of the pen",
        hint = if *.token_set { " that this token may see" } else { ", or it is private and no token is set (HF_TOKEN)" }
    )]
    NoRepo { endpoint: String, repo: String, token_set: bool },
    #[error("{repo} has no revision {revision}. Name a branch, a tag or a whole commit in model.revision")]
    NoRevision { repo: String, revision: String },
    #[error("{repo}@{commit} holds no files: nothing to serve. Check model.repo and model.revision")]
    Empty { repo: String, commit: String },
    #[error(
        "{repo}@{commit} has no safetensors{instead}. Choose a repository that has them: pickles run code when they are \
         loaded, so they are fetched only with weights.pickles: allow (`fetch --pickles allow`)",
        instead = .pickle.as_ref().map(|name| format!(", only pickles such as {name}")).unwrap_or_default()
    )]
    NoSafetensors { repo: String, commit: String, pickle: Option<String> },
    #[error("{repo} holds a file named {name:?}, which {why}: nothing of it was fetched. Do not use this repository")]
    BadName { repo: String, name: String, why: &'static str },
    #[error("{what} {value:?} {why}")]
    BadRequest { what: &'static str, value: String, why: &'static str },
    #[error(
        "{} has {} free, and {} are needed to fetch {repo}. Free {} there, or name another folder with weights.cache",
        path.display(), bytes(*.free), bytes(*.need), bytes(need.saturating_sub(*.free))
    )]
    NoSpace { path: PathBuf, repo: String, need: u64, free: u64 },
    #[error(
        "the disk filled up while {file} was written to {}: what is there is kept. Free some space and start again",
        path.display()
    )]
    Full { path: PathBuf, file: String },
    #[error(
        "{repo}@{revision} is not in the cache {}{}, and nothing may be fetched ({why}). Fetch it once with `sglangd fetch \
         {repo}` where the network is allowed",
        cache.display(), lacking(.missing)
    )]
    NotCached { repo: String, revision: String, cache: PathBuf, missing: Vec<String>, why: &'static str },
    #[error(
        "the cache {} cannot be written to, and of {repo} it lacks {}. Make it writable, or complete it from an account \
         that may write there",
        cache.display(), list(.missing)
    )]
    ReadOnly { cache: PathBuf, repo: String, missing: Vec<String> },
    #[error("{} cannot be read or written: {source}. This is the disk or its permissions, not the engine", path.display())]
    Disk { path: PathBuf, source: std::io::Error },
    #[error(
        "{endpoint} cannot be reached: {cause}. Check the network, the proxy variables and HF_ENDPOINT; with everything \
         cached, weights.download: never needs no network"
    )]
    Unreachable { endpoint: String, cause: String },
    #[error("the hub's certificate is not valid at this machine's time ({cause}). Set the clock, then try again")]
    Clock { cause: String },
    #[error("{endpoint} asks for fewer requests{}. Wait, or set a token: anonymous limits are lower", wait(.after.as_ref()))]
    RateLimited { endpoint: String, after: Option<Duration> },
    #[error("{url} was redirected in a way that is not followed: {why}")]
    Redirect { url: String, why: String },
    #[error("the hub answered something that is no listing of {repo}: {cause}. Check HF_ENDPOINT")]
    BadAnswer { repo: String, cause: String },
    #[error(
        "{file} of {repo} could not be had after {attempts} attempts: {cause}. What was fetched is kept; start again"
    )]
    File { repo: String, file: String, attempts: u32, cause: String },
    #[error(
        "{file} of {repo} arrived wrong {attempts} times (hub says {expected}, got {got}). A proxy or the disk changes bytes: \
         look there before starting again"
    )]
    Corrupt { repo: String, file: String, attempts: u32, expected: String, got: String },
}

impl FetchError {
    /// Whether the same fetch could end otherwise if started again.
    pub fn class(&self) -> Retry {
        match self {
            Self::Unreachable { .. } | Self::File { .. } => Retry::Yes { after: Duration::from_secs(10) },
            Self::RateLimited { after, .. } => Retry::Yes { after: after.unwrap_or(Duration::from_mins(1)) },
            // The hub may be deploying, or a mirror may be behind.
            Self::BadAnswer { .. } => Retry::Yes { after: Duration::from_secs(30) },
            _ => Retry::No,
        }
    }

    /// One word for status and metrics; never changed once published.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Gated { .. } => "gated",
            Self::NoToken { .. } => "no-token",
            Self::BadToken { .. } => "bad-token",
            Self::NoRepo { .. } => "no-repository",
            Self::NoRevision { .. } => "no-revision",
            Self::Empty { .. } => "empty",
            Self::NoSafetensors { .. } => "no-safetensors",
            Self::BadName { .. } => "bad-name",
            Self::BadRequest { .. } => "bad-request",
            Self::NoSpace { .. } => "no-space",
            Self::Full { .. } => "disk-full",
            Self::NotCached { .. } => "not-cached",
            Self::ReadOnly { .. } => "read-only",
            Self::Disk { .. } => "disk",
            Self::Unreachable { .. } => "unreachable",
            Self::Clock { .. } => "clock",
            Self::RateLimited { .. } => "rate-limited",
            Self::Redirect { .. } => "redirect",
            Self::BadAnswer { .. } => "bad-answer",
            Self::File { .. } => "file",
            Self::Corrupt { .. } => "corrupt",
        }
    }

    /// An I/O error of the cache's disk: full and failing are told apart.
    pub(super) fn disk(path: &Path, file: &str, source: std::io::Error) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        match source.kind() {
            StorageFull | QuotaExceeded => Self::Full { path: path.to_owned(), file: file.to_owned() },
            _ => Self::Disk { path: path.to_owned(), source },
        }
    }
}

/// A number of bytes as people read it.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} bytes") } else { format!("{value:.1} {}", UNITS[unit]) }
}

fn wait(after: Option<&Duration>) -> String {
    after.map(|d| format!(" and to wait {} s", d.as_secs())).unwrap_or_default()
}

fn lacking(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!(" (missing: {})", list(names)) }
}

/// The first few names and how many more: 800 shards help nobody.
fn list(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let head = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => head,
        more => format!("{head} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h02_no_space_says_how_much_is_missing_and_where() {
        let error = FetchError::NoSpace { path: "/cache".into(), repo: "a/b".into(), need: 3 << 30, free: 1 << 30 };
        assert_eq!(
            error.to_string(),
            "/cache has 1.0 GiB free, and 3.0 GiB are needed to fetch a/b. Free 2.0 GiB there, or name another folder with \
             weights.cache"
        );
        assert_eq!(error.class(), Retry::No);
    }

    #[test]
    fn h02_a_full_disk_and_a_failing_one_are_told_apart() {
        let full = FetchError::disk(Path::new("/c"), "f", std::io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(full.name(), "disk-full");
        let quota = FetchError::disk(Path::new("/c"), "f", std::io::Error::from_raw_os_error(libc::EDQUOT));
        assert_eq!(quota.name(), "disk-full");
        let broken = FetchError::disk(Path::new("/c"), "f", std::io::Error::from_raw_os_error(libc::EIO));
        assert!(broken.to_string().contains("not the engine"), "H16: the disk is named: {broken}");
    }

    #[test]
    fn many_missing_files_are_counted_not_listed() {
        let names: Vec<String> = (0..163).map(|n| format!("model-{n}.safetensors")).collect();
        assert!(list(&names).ends_with("model-4.safetensors and 158 more"));
    }
}
