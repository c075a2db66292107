//! What the cache alone says, when the hub may not be asked or cannot be: which commit, which files, and what is
//! missing. The weights' own index names the shards, and each shard's header its length.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::cache::{Marker, RepoCache};
use super::error::FetchError;
use super::name;
use super::plan::{Asked, Hash, RemoteFile, Transport};
use super::verify;
use super::{Pickles, RepoRequest, Wanted};

pub(super) const INDEX: &str = "model.safetensors.index.json";
/// What is missing where there is neither an index nor a shard.
const ANY_SHARD: &str = "*.safetensors";

/// The files of a cached commit.
#[derive(Debug)]
pub struct Local {
    pub files: Vec<RemoteFile>,
    /// Names that must be there and are not, or are cut short.
    pub missing: Vec<String>,
}

/// Lists what the snapshot holds. An earlier run's marker knows the hub's whole listing; without one, the
/// index and the headers have to do.
pub fn list(
    request: &RepoRequest,
    cache: &RepoCache,
    commit: &str,
    marker: Option<&Marker>,
) -> Result<Local, FetchError> {
    let snapshot = cache.snapshot(commit);
    let mut files = Vec::new();
    walk(&snapshot, &snapshot, &mut files).map_err(|source| FetchError::Disk { path: snapshot.clone(), source })?;
    let mut missing = BTreeSet::new();
    if let Some(marker) = marker {
        let there: BTreeSet<&str> = files.iter().map(|f| f.name.as_str()).collect();
        missing.extend(marker.files.keys().filter(|name| !there.contains(name.as_str())).cloned());
        // The marker's size and hash are the hub's; the disk's own may be a truncated file's.
        for file in &mut files {
            if let Some(proved) = marker.files.get(&file.name) {
                if file.size != proved.size {
                    missing.insert(file.name.clone());
                }
                file.size = proved.size;
                file.hash = proved.hash.clone();
            }
        }
    }
    if request.files == Wanted::All {
        let asked = Asked::of(request)?;
        let other_weights = request.pickles == Pickles::Allowed || !request.include.is_empty();
        let shards = missing_shards(&snapshot, &files)?.into_iter();
        // Which other weights there must be is known to nobody without the hub; that there are some, to the plan.
        missing.extend(shards.filter(|name| asked.allows(name) && !(other_weights && name == ANY_SHARD)));
    }
    if request.flag.is_none() && !snapshot.join("config.json").is_file() {
        missing.insert("config.json".to_owned());
    }
    Ok(Local { files, missing: missing.into_iter().collect() })
}

/// Files of the snapshot that can be read, with the hash that the blob's name is.
fn walk(root: &Path, folder: &Path, files: &mut Vec<RemoteFile>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        // Follows the link: a link without its blob is no file.
        let Ok(meta) = fs::metadata(&path) else { continue };
        if meta.is_dir() {
            walk(root, &path, files)?;
            continue;
        }
        let Some(name) = path.strip_prefix(root).ok().and_then(Path::to_str) else { continue };
        let target = fs::read_link(&path).ok();
        let blob = target.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
        files.push(RemoteFile {
            name: name.to_owned(),
            size: meta.len(),
            hash: blob.and_then(Hash::from_hex).unwrap_or(Hash::Unknown),
            transport: Transport::Http,
        });
    }
    Ok(())
}

/// Shards that the index names and the snapshot lacks, and those shorter than their header says.
fn missing_shards(snapshot: &Path, files: &[RemoteFile]) -> Result<Vec<String>, FetchError> {
    let there: BTreeSet<&str> = files.iter().map(|f| f.name.as_str()).collect();
    let mut missing = Vec::new();
    let index = snapshot.join(INDEX);
    if index.is_file() {
        let text = fs::read(&index).map_err(|source| FetchError::Disk { path: index, source })?;
        match shards(&text) {
            Some(names) => missing.extend(names.into_iter().filter(|name| !there.contains(name.as_str()))),
            None => missing.push(INDEX.to_owned()),
        }
    } else if !files.iter().any(|f| f.name.ends_with(".safetensors")) {
        missing.push(ANY_SHARD.to_owned());
    }
    for file in files.iter().filter(|f| f.name.ends_with(".safetensors")) {
        let path = snapshot.join(&file.name);
        let length =
            verify::safetensors_length(&path).map_err(|source| FetchError::Disk { path: path.clone(), source })?;
        let size = fs::metadata(&path).map_err(|source| FetchError::Disk { path, source })?.len();
        if length != Some(size) && !missing.contains(&file.name) {
            missing.push(file.name.clone());
        }
    }
    Ok(missing)
}

/// The files that the index's weight map names; none: it is no index.
pub(super) fn shards(index: &[u8]) -> Option<BTreeSet<String>> {
    let index: serde_json::Value = serde_json::from_slice(index).ok()?;
    let map = index.get("weight_map")?.as_object()?;
    let names: BTreeSet<String> = map.values().filter_map(|v| v.as_str()).map(str::to_owned).collect();
    names.iter().all(|n| name::refuse_file(n).is_none()).then_some(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_names_each_shard_once_and_one_that_leads_elsewhere_is_none() {
        let index = br#"{"weight_map":{"a":"x-1.safetensors","b":"x-1.safetensors","c":"x-2.safetensors"}}"#;
        assert_eq!(shards(index).unwrap().into_iter().collect::<Vec<_>>(), ["x-1.safetensors", "x-2.safetensors"]);
        assert_eq!(shards(br#"{"weight_map":{"a":"../../x"}}"#), None);
        assert_eq!(shards(b"[]"), None);
    }
}
