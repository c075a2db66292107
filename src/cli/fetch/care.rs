//! `sglangd fetch --list` and `--prune`: what the cache holds, who uses it, and what nobody needs any more.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use crate::cli::exit::Exit;
use crate::observe::clock;
use crate::weights::inventory::{self, Kept};
use crate::weights::prune::{self, Kind, Tidying};
use crate::weights::{Uses, bytes};

/// Whether what is shown is also done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    Show,
    Remove,
}

/// One repository as `--list --json` shows it.
#[derive(Debug, Serialize)]
struct Listed<'a> {
    #[serde(flatten)]
    kept: &'a Kept,
    /// On the disk, with what lies beside its snapshots.
    bytes: u64,
    fetched_by: Option<String>,
    /// Commit and user of each snapshot that is in use.
    used_by: Vec<(&'a str, String)>,
}

/// Shows what the cache holds, of `repo` or of all.
pub fn list(root: &Path, repo: Option<&str>, json: bool) -> Exit {
    let kept = match look(root, repo) {
        Ok(kept) => kept,
        Err(exit) => return exit,
    };
    let uses = Uses::look(root);
    let listed: Vec<Listed<'_>> = kept.iter().map(|kept| listed(kept, &uses)).collect();
    if json {
        println!("{}", serde_json::json!({ "cache": root, "repositories": listed }));
    } else {
        print!("{}", list_text(root, &listed, clock::unix_seconds()));
    }
    Exit::Ok
}

fn listed<'a>(kept: &'a Kept, uses: &Uses) -> Listed<'a> {
    let user = |revision: &'a inventory::Revision| Some((revision.commit.as_str(), prune::user(revision, uses)?));
    Listed {
        bytes: kept.bytes(),
        fetched_by: prune::fetching(kept),
        used_by: kept.snapshots.iter().filter_map(user).collect(),
        kept,
    }
}

fn look(root: &Path, repo: Option<&str>) -> Result<Vec<Kept>, Exit> {
    let mut kept = inventory::look(root).map_err(|error| {
        eprintln!("sglangd fetch: {} cannot be read: {error}. This is the disk or its permissions", root.display());
        Exit::Weights
    })?;
    if let Some(repo) = repo {
        kept.retain(|kept| kept.repo == repo);
        if kept.is_empty() {
            eprintln!("sglangd fetch: {} holds nothing of {repo}", root.display());
            return Err(Exit::Weights);
        }
    }
    Ok(kept)
}

fn list_text(root: &Path, listed: &[Listed<'_>], now: i64) -> String {
    let mut text = String::new();
    let mut snapshots = 0;
    for Listed { kept, bytes: all, fetched_by, used_by } in listed {
        let fetched = fetched_by.as_ref().map(|who| format!(", fetched just now by {who}")).unwrap_or_default();
        let _ = writeln!(text, "{}  {}{fetched}", kept.repo, bytes(*all));
        for revision in &kept.snapshots {
            snapshots += 1;
            let refs = if revision.refs.is_empty() { "-".to_owned() } else { revision.refs.join(", ") };
            let user = used_by.iter().find(|(commit, _)| *commit == revision.commit);
            let user = user.map(|(_, who)| format!("  in use by {who}")).unwrap_or_default();
            let _ = writeln!(
                text,
                "  {}  {refs:<12} {:>6} files {:>11}  used {}{user}",
                revision.commit,
                revision.files,
                bytes(revision.bytes),
                ago(revision.last_used, now),
            );
        }
        if !kept.leftovers.is_empty() {
            let size: u64 = kept.leftovers.iter().map(|piece| piece.bytes).sum();
            let _ = writeln!(
                text,
                "  {} begun or left over, {}",
                count(kept.leftovers.len(), "file", "files"),
                bytes(size)
            );
        }
    }
    let all = listed.iter().map(|listed| listed.bytes).sum();
    let _ = writeln!(
        text,
        "{}, {}, {} in {}",
        count(listed.len(), "repository", "repositories"),
        count(snapshots, "snapshot", "snapshots"),
        bytes(all),
        root.display()
    );
    text
}

/// Shows what nobody needs, and removes it where that is asked. `wanted` are commits that stay.
pub fn prune(root: &Path, repo: Option<&str>, wanted: &[String], deed: Deed, json: bool) -> Exit {
    let kept = match look(root, repo) {
        Ok(kept) => kept,
        Err(exit) => return exit,
    };
    let uses = Uses::look(root);
    let now = clock::unix_seconds();
    let mut tidying = Tidying::default();
    for kept in &kept {
        let one = prune::plan(kept, &uses, wanted, now);
        tidying.removals.extend(one.removals);
        tidying.spared.extend(one.spared);
    }
    let failed = match deed {
        Deed::Show => Vec::new(),
        Deed::Remove => prune::remove(root, &tidying),
    };
    if json {
        let failed: Vec<_> = failed
            .iter()
            .map(|(path, error)| serde_json::json!({ "path": path, "error": error.to_string() }))
            .collect();
        let told = serde_json::json!({
            "cache": root, "removed": deed == Deed::Remove, "bytes": tidying.bytes(), "removals": tidying.removals,
            "spared": tidying.spared, "failed": failed,
        });
        println!("{told}");
    } else {
        print!("{}", prune_text(root, &tidying, deed));
        for (path, error) in &failed {
            eprintln!("sglangd fetch: {} stays: {error}", path.display());
        }
    }
    if failed.is_empty() { Exit::Ok } else { Exit::Weights }
}

fn prune_text(root: &Path, tidying: &Tidying, deed: Deed) -> String {
    let mut text = String::new();
    let below = |path: &Path| path.strip_prefix(root).unwrap_or(path).display().to_string();
    let verb = match deed {
        Deed::Show => "would remove",
        Deed::Remove => "removed",
    };
    for removal in tidying.removals.iter().filter(|removal| removal.kind != Kind::Lock) {
        let what = match removal.kind {
            Kind::Snapshot => "old snapshot",
            Kind::Blob => "orphaned blob",
            Kind::Leftover | Kind::Lock => "leftover",
        };
        let _ = writeln!(text, "{verb} {what:<13} {:>11}  {}", bytes(removal.bytes), below(&removal.path));
    }
    let locks = tidying.removals.iter().filter(|removal| removal.kind == Kind::Lock).count();
    if locks > 0 {
        let _ = writeln!(text, "{verb} {} of nobody", count(locks, "lock", "locks"));
    }
    for spared in &tidying.spared {
        let _ = writeln!(text, "keeps {}: it {}", below(&spared.path), spared.why);
    }
    let freed = bytes(tidying.bytes());
    let _ = match (tidying.removals.is_empty(), deed) {
        (true, _) => writeln!(text, "nothing to remove in {}", root.display()),
        (false, Deed::Show) => {
            writeln!(text, "{freed} in {}; nothing was removed yet: add --yes to do it", root.display())
        }
        (false, Deed::Remove) => writeln!(text, "{freed} freed in {}", root.display()),
    };
    text
}

fn count(number: usize, one: &str, more: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { more })
}

/// Rough on purpose: a file's access time is noted once a day on most disks.
fn ago(then: i64, now: i64) -> String {
    let seconds = now.saturating_sub(then).max(0);
    match (seconds / 86_400, seconds / 3600, seconds / 60) {
        (0, 0, 0) => "just now".to_owned(),
        (0, 0, minutes) => format!("{minutes} min ago"),
        (0, hours, _) => format!("{hours} h ago"),
        (1, ..) => "a day ago".to_owned(),
        (days, ..) => format!("{days} days ago"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::prune::{Removal, Spared};

    #[test]
    fn how_long_ago_is_read_at_a_glance() {
        let told = |seconds: i64| ago(1_000_000_000 - seconds, 1_000_000_000);
        assert_eq!(
            [5, 120, 7300, 90_000, 864_000].map(told),
            ["just now", "2 min ago", "2 h ago", "a day ago", "10 days ago"]
        );
    }

    #[test]
    fn what_would_go_and_what_stays_is_said_before_anything_goes() {
        let removal = |kind, path: &str, bytes| Removal { repo: "a/b".into(), kind, path: path.into(), bytes };
        let tidying = Tidying {
            removals: vec![
                removal(Kind::Snapshot, "/c/models--a--b/snapshots/01", 0),
                removal(Kind::Blob, "/c/models--a--b/blobs/ab", 3 << 20),
                removal(Kind::Lock, "/c/.locks/x.lock", 0),
            ],
            spared: vec![Spared {
                repo: "a/b".into(),
                path: "/c/models--a--b/blobs/cd".into(),
                why: "is used by x (pid 1)".into(),
            }],
        };
        insta::assert_snapshot!(prune_text(Path::new("/c"), &tidying, Deed::Show), @r"
        would remove old snapshot      0 bytes  models--a--b/snapshots/01
        would remove orphaned blob     3.0 MiB  models--a--b/blobs/ab
        would remove 1 lock of nobody
        keeps models--a--b/blobs/cd: it is used by x (pid 1)
        3.0 MiB in /c; nothing was removed yet: add --yes to do it
        ");
    }
}
