//! Everything a start needs before the engine's process exists: the port is held, the folders and the
//! YAML are there, what an earlier run left is ended.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rand::Rng;

use super::ahead::reads_files;
use super::cause::Cause;
use super::releasing::flag;
use crate::config::folders::Folders;
use crate::config::{Config, ModelSource};
use crate::engine::argv::{LaunchSpec, Placement, launch_spec};
use crate::engine::env::{Env, kernel_caches};
use crate::engine::progress::{Device, Kernels, Known};
use crate::engine::resolve::Resolved;
use crate::exit::Exit;
use crate::launch::caches;
use crate::launch::leftovers::Leftovers;
use crate::launch::port::HeldPort;
use crate::launch::record::Record;
use crate::launch::tree::Tree;
use crate::link::Upstream;
use crate::weights::Snapshot;
use crate::weights::ahead::shards;

/// One start, ready to be forked.
#[derive(Debug)]
pub struct Prepared {
    pub spec: LaunchSpec,
    pub upstream: Upstream,
    /// Held until the engine has bound it.
    pub port: HeldPort,
    pub tree: Tree,
    pub leftovers: Leftovers,
    pub yaml: PathBuf,
    /// Never to be shown: this start's keys.
    pub secrets: Vec<String>,
    /// What its first ETA is made from.
    pub known: Known,
}

/// What a start is made from.
#[derive(Debug, Clone)]
pub struct Ingredients {
    pub config: Config,
    pub folders: Folders,
    pub own_env: Env,
    pub resolved: Resolved,
    /// The model's and its companions'; empty for a local folder.
    pub snapshots: Vec<Snapshot>,
    /// Where weights lie.
    pub weights: Vec<PathBuf>,
}

/// Does it all. Blocking: files, `/proc`, and up to ten seconds for processes of an earlier run.
pub fn prepare(from: &Ingredients) -> Result<Prepared, Cause> {
    end_earlier_run(&from.folders.runtime)?;
    let launch_id = random_hex(4);
    let tmpdir = temporary_folder(&launch_id).map_err(|e| no_folder("a temporary folder", &e))?;
    let leftovers = Leftovers::note(tmpdir.clone());
    let prepared = write(from, &launch_id, leftovers.clone());
    if prepared.is_err() {
        leftovers.sweep();
    }
    prepared
}

fn write(from: &Ingredients, launch_id: &str, leftovers: Leftovers) -> Result<Prepared, Cause> {
    let port = HeldPort::take().map_err(|error| {
        let what = "No free port between 12000 and 22000 could be had for the engine";
        Cause::of_a_limit(what, &error).unwrap_or_else(|| {
            let advice = "See who listens there (ss -ltnp).";
            Cause::passing("port", Exit::Engine.code(), format!("{what}: {error}."), advice)
        })
    })?;
    let api_key = random_hex(16);
    let admin_api_key = random_hex(16);
    let yaml = from.folders.engine_yaml();
    let cache_dir = from.folders.engine_cache();
    fs::create_dir_all(&cache_dir).map_err(|e| no_folder(&cache_dir.display().to_string(), &e))?;
    let placement = Placement {
        model_path: model_path(&from.config, &from.snapshots)?,
        extra: extra_paths(&from.snapshots),
        port: port.port(),
        yaml_path: yaml.clone(),
        tmpdir: leftovers.tmpdir.clone(),
        cache_dir,
        api_key: Some(api_key.clone()),
        admin_api_key: Some(admin_api_key.clone()),
        launch_id: launch_id.to_owned(),
        own_env: from.own_env.clone(),
    };
    let spec = launch_spec(&from.config, &from.resolved, &placement);
    write_private(&yaml, spec.yaml.as_bytes()).map_err(|e| no_folder(&yaml.display().to_string(), &e))?;
    Ok(Prepared {
        known: known(from, &spec),
        upstream: Upstream {
            addr: port.addr(),
            api_key: Some(api_key.clone()),
            admin_key: Some(admin_api_key.clone()),
        },
        spec,
        port,
        tree: Tree { launch_id: launch_id.to_owned(), leader: None, cgroup: None },
        leftovers,
        yaml,
        secrets: vec![api_key, admin_api_key],
    })
}

/// What tells how long a start may take that nobody has seen before.
fn known(from: &Ingredients, spec: &LaunchSpec) -> Known {
    let says = |name: &str| flag(&from.resolved, name);
    let format = says("load-format");
    let weights = match format.as_deref() {
        Some("dummy") => Some(0),
        format if reads_files(format) => {
            let shards = from.weights.iter().filter_map(|folder| shards(folder).ok()).flatten();
            Some(shards.map(|shard| shard.bytes).sum())
        }
        _ => None,
    };
    let on_cpu = spec.env.get(OsStr::new("SGLANG_USE_CPU_ENGINE")).is_some_and(|value| value == "1");
    let backend = says("cuda-graph-backend-decode");
    let no_graphs = on_cpu
        || says("device").as_deref() == Some("cpu")
        || says("disable-cuda-graph").is_some()
        || backend.as_deref() == Some("disabled");
    let caches = kernel_caches(&spec.env);
    Known {
        weights,
        cores: std::thread::available_parallelism().ok().and_then(|cores| u32::try_from(cores.get()).ok()),
        device: if no_graphs { Device::Cpu } else { Device::Gpu },
        kernels: if caches::measure(&caches).bytes == 0 { Kernels::None } else { Kernels::Perhaps },
    }
}

/// What a killed sglangd left, where no guard, cgroup or container ended it: ended before anything
/// new is started on its GPUs.
fn end_earlier_run(runtime: &Path) -> Result<(), Cause> {
    let Some(record) = Record::read(runtime) else { return Ok(()) };
    match record.end_leftovers() {
        Ok(0) => {}
        Ok(n) => tracing::warn!("ended {n} processes that an earlier run had left"),
        Err(names) => {
            return Err(Cause::passing(
                "unkillable",
                Exit::Bug.code(),
                format!("Processes of an earlier run do not end, not even by SIGKILL: {names}."),
                "They hang in the kernel, mostly in a driver: the node needs a look, then a reboot.",
            ));
        }
    }
    Record::remove(runtime);
    Ok(())
}

fn model_path(config: &Config, snapshots: &[Snapshot]) -> Result<PathBuf, Cause> {
    match &config.model.source {
        ModelSource::Folder(folder) => Ok(folder.clone()),
        ModelSource::Repo { repo, .. } => {
            snapshots.iter().find(|s| s.flag.is_none()).map(|s| s.path.clone()).ok_or_else(|| {
                Cause::never("bug", Exit::Bug.code(), format!("The fetcher returned no folder for {repo}."), "")
            })
        }
    }
}

fn extra_paths(snapshots: &[Snapshot]) -> BTreeMap<String, PathBuf> {
    snapshots.iter().filter_map(|s| Some((s.flag.clone()?, s.path.clone()))).collect()
}

/// Short on purpose: zmq's socket files lie in it, and a socket's path may have 107 bytes. Not in the
/// runtime folder, which is memory on most machines: compilers write here too.
fn temporary_folder(launch_id: &str) -> io::Result<PathBuf> {
    let base = std::env::var_os("TMPDIR").map(PathBuf::from).filter(|p| p.as_os_str().len() <= 60);
    let folder = base.unwrap_or_else(|| "/tmp".into()).join(format!("sglangd-{launch_id}"));
    fs::DirBuilder::new().mode(0o700).create(&folder)?;
    Ok(folder)
}

/// Mode 0600, whole or not at all: it holds keys.
fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("yaml.new");
    // What a killed run left is not reused: its mode could be another.
    let _ = fs::remove_file(&temporary);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    drop(file);
    fs::rename(temporary, path)
}

fn random_hex(bytes: usize) -> String {
    const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    let mut rng = rand::rng();
    (0..2 * bytes).map(|_| DIGITS[rng.random_range(0..16)]).collect()
}

fn no_folder(what: &str, error: &io::Error) -> Cause {
    if let Some(cause) = Cause::of_a_limit(&format!("{what} could not be written"), error) {
        return cause;
    }
    let advice = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "Free some space there.",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "Name a writable place with --runtime-dir and --state-dir."
        }
        _ => "",
    };
    Cause::never("disk", Exit::Bug.code(), format!("{what} could not be written: {error}."), advice)
}
