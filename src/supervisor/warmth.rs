//! Whether a start compiled kernels that an earlier one had compiled already: a cache that is not kept costs
//! 10 to 20 minutes at each start (sglang#9867, sglang#29170).
//!
//! Keeps one number beside what earlier starts took. Says nothing of a first start: it has to compile.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::engine::env::Env;
use crate::engine::remarks::{Kind, Remark};
use crate::launch::caches;

/// So much compiling makes a start a cold one; a shape or two are compiled in any.
const COLD: Duration = Duration::from_secs(30);

/// Of one model with one set of flags.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Starts {
    /// The last so many starts were cold.
    cold: u32,
}

/// Where the cache lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Lasting,
    /// Gone with the container, or with the next boot.
    ShortLived,
}

/// Notes the start that has just become ready in `file`, and says what is wrong with it.
pub fn remark(file: &Path, compiled: Duration, env: &Env) -> Option<Remark> {
    let folder = env.get(OsStr::new("SGLANG_CACHE_DIR")).map(PathBuf::from).unwrap_or_default();
    let place = if caches::is_short_lived(&folder) { Place::ShortLived } else { Place::Lasting };
    let before = fs::read(file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    let starts = next(before, compiled);
    if starts != before
        && let Err(error) = keep(file, starts)
    {
        tracing::debug!("whether this start was a cold one could not be kept: {error}");
    }
    judge(starts, compiled, &folder, place)
}

fn keep(file: &Path, starts: Starts) -> std::io::Result<()> {
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    let temporary = file.with_extension("kernels.new");
    fs::write(&temporary, serde_json::to_vec(&starts)?)?;
    fs::rename(temporary, file)
}

fn next(before: Starts, compiled: Duration) -> Starts {
    Starts { cold: if compiled >= COLD { before.cold.saturating_add(1) } else { 0 } }
}

fn judge(starts: Starts, compiled: Duration, folder: &Path, place: Place) -> Option<Remark> {
    let (seconds, folder) = (compiled.as_secs(), folder.display());
    let sentence = match (starts.cold, place) {
        (0, _) | (1, Place::Lasting) => return None,
        (1, Place::ShortLived) => format!(
            "this start compiled kernels for {seconds} s, and the next one will again: their cache, {folder}, is gone \
             with the container or the next boot. Keep it on a volume"
        ),
        (n, _) => format!(
            "this start compiled kernels for {seconds} s, as did the {} before it: their cache, {folder}, does not \
             outlive a start. Keep it on a volume, and see that it can be written",
            if n == 2 { "one".to_owned() } else { format!("{}", n - 1) }
        ),
    };
    Some(Remark { kind: Kind::KernelsCold, sentence })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_mins(12);

    fn told(file: &Path, compiled: Duration, place: Place) -> Option<String> {
        let before = fs::read(file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let starts = next(before, compiled);
        keep(file, starts).unwrap();
        judge(starts, compiled, Path::new("/var/lib/sglangd/cache"), place).map(|remark| remark.sentence)
    }

    #[test]
    fn a_second_cold_start_is_said_and_a_first_one_where_its_cache_cannot_last() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("starts/0123.kernels");
        assert_eq!(told(&file, LONG, Place::Lasting), None, "somebody has to be the first");
        assert_eq!(told(&file, Duration::from_secs(5), Place::Lasting), None, "warm");
        assert_eq!(told(&file, LONG, Place::Lasting), None, "another first one: a new version, other flags");
        let second = told(&file, LONG, Place::Lasting).expect("the second in a row");
        assert!(second.contains("720 s, as did the one before it") && second.contains("/var/lib/sglangd/cache"));
        assert!(told(&file, LONG, Place::Lasting).expect("the third").contains("as did the 2 before it"));
        let fresh = folder.path().join("starts/4567.kernels");
        assert!(told(&fresh, LONG, Place::ShortLived).expect("at once").contains("gone with the container"));
        assert_eq!(told(&folder.path().join("x.kernels"), Duration::ZERO, Place::ShortLived), None);
    }

    #[test]
    fn a_file_that_is_broken_is_a_first_start() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("0123.kernels");
        fs::write(&file, "{").unwrap();
        let env = Env::from([("SGLANG_CACHE_DIR".into(), "/proc".into())]);
        assert_eq!(remark(&file, LONG, &env), None);
        assert_eq!(remark(&file, LONG, &env).map(|remark| remark.kind), Some(Kind::KernelsCold));
        assert_eq!(remark(&file, Duration::ZERO, &env), None);
    }
}
