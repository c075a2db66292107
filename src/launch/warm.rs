//! A throw-away import of the engine's Python while the weights arrive: imports are 20 to 40 s of a start from a cold disk,
//! and most of that is reading some thousand files.
//!
//! It sees no GPU, writes no bytecode, and has folders of its own for whatever it writes, which go with it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use super::beside::Beside;
use super::leftovers::Leftovers;
use super::spawner::Spawner;
use super::tree::{Leader, Tree};
use crate::engine::env::{LAUNCH_ID, is_hub_token};
use crate::sys::proc;
use crate::sys::spawn::Spec;

const SCRIPT: &str = include_str!("warm.py");
/// One launch at a time imports for nobody; the mark finds what it started.
const MARK: &str = "warm";

/// Starts it. `env` is the engine's; `folder` is private to it and removed with all that is in it.
pub async fn start(
    beside: &Beside,
    spawner: &Spawner,
    python: &Path,
    env: &BTreeMap<OsString, OsString>,
    folder: &Path,
) -> io::Result<()> {
    // What a killed run left.
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    DirBuilder::new().mode(0o700).create(folder)?;
    let leftovers = Leftovers::note(folder.to_owned());
    let launch_id = format!("{MARK}-{}", std::process::id());
    let order = Spec::quiet(vec![python.into(), "-c".into(), SCRIPT.into()], surroundings(env, folder, &launch_id));
    match spawner.spawn(order).await {
        Ok((child, end)) => {
            let leader = proc::stat(child.pid).map(|stat| Leader { pid: child.pid, start_time: stat.start_time });
            let tree = Tree { launch_id, leader, cgroup: None };
            beside.add("the import ahead of the engine's", child.pidfd, end, Some((tree, leftovers))).await;
            Ok(())
        }
        Err(error) => {
            leftovers.sweep();
            Err(error)
        }
    }
}

fn surroundings(engine: &BTreeMap<OsString, OsString>, folder: &Path, launch_id: &str) -> BTreeMap<OsString, OsString> {
    let mut env: BTreeMap<OsString, OsString> =
        engine.iter().filter(|(name, _)| !is_hub_token(name)).map(|(n, v)| (n.clone(), v.clone())).collect();
    // Packages may lie in the user's home, which is another one here.
    if let Some(home) = env.get(&OsString::from("HOME")).cloned() {
        env.entry("PYTHONUSERBASE".into()).or_insert_with(|| Path::new(&home).join(".local").into());
    }
    for name in ["HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "SGLANG_CACHE_DIR", "TRITON_CACHE_DIR"] {
        env.insert(name.into(), folder.into());
    }
    env.insert("TORCHINDUCTOR_CACHE_DIR".into(), folder.into());
    env.insert("FLASHINFER_WORKSPACE_BASE".into(), folder.into());
    for (name, value) in [("CUDA_VISIBLE_DEVICES", ""), ("PYTHONDONTWRITEBYTECODE", "1"), ("HF_HUB_OFFLINE", "1")] {
        env.insert(name.into(), value.into());
    }
    env.insert(LAUNCH_ID.into(), launch_id.into());
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_sees_no_gpu_holds_no_token_and_writes_only_into_its_own_folder() {
        let engine: BTreeMap<OsString, OsString> =
            [("HOME", "/root"), ("HF_TOKEN", "hf_x"), ("CUDA_VISIBLE_DEVICES", "0,1")]
                .map(|(name, value)| (name.into(), value.into()))
                .into();
        let env = surroundings(&engine, Path::new("/run/x/warm"), "warm-1");
        let of = |name: &str| env.get(&OsString::from(name)).and_then(|value| value.to_str());
        assert_eq!((of("CUDA_VISIBLE_DEVICES"), of("HF_TOKEN")), (Some(""), None));
        assert_eq!((of("HOME"), of("PYTHONUSERBASE")), (Some("/run/x/warm"), Some("/root/.local")));
        assert_eq!(of("SGLANGD_LAUNCH_ID"), Some("warm-1"));
    }
}
