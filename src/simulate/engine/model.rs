//! The checks that a real start makes of the model's folder, and the words with which it fails them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// The weight files in loading order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shards(pub Vec<PathBuf>);

/// What the main process finds wrong, as Python's last line says it.
pub fn check_config(model: &Path) -> Result<(), String> {
    if !model.is_dir() {
        return Err(format!(
            "OSError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '{}'. Use `repo_type` argument if needed.",
            model.display()
        ));
    }
    let text = std::fs::read(model.join("config.json"))
        .map_err(|_| format!("OSError: {} does not appear to have a file named config.json.", model.display()))?;
    match serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&text) {
        Ok(_) => Ok(()),
        Err(_) => Err(format!(
            "OSError: It looks like the config file at '{}' is not a valid JSON file.",
            model.join("config.json").display()
        )),
    }
}

/// The architecture's name in `Load weight end`.
pub fn architecture(model: &Path) -> String {
    #[derive(Deserialize)]
    struct Config {
        architectures: Vec<String>,
    }
    std::fs::read(model.join("config.json"))
        .ok()
        .and_then(|text| serde_json::from_slice::<Config>(&text).ok())
        .and_then(|config| config.architectures.into_iter().next())
        .unwrap_or_else(|| "SimulatedForCausalLM".to_owned())
}

/// The weight files: those that the index names, else all that are there.
pub fn shards(model: &Path) -> Result<Shards, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let none = || format!("RuntimeError: Cannot find any model weights with `{}`", model.display());
    if let Ok(text) = std::fs::read(model.join("model.safetensors.index.json")) {
        let index: Index = serde_json::from_slice(&text).map_err(|e| format!("json.decoder.JSONDecodeError: {e}"))?;
        let names: BTreeSet<String> = index.weight_map.into_values().collect();
        let files: Vec<PathBuf> = names.into_iter().map(|name| model.join(name)).collect();
        return match files.iter().find(|file| !file.exists()) {
            Some(missing) => Err(format!("FileNotFoundError: No such file or directory: \"{}\"", missing.display())),
            None if files.is_empty() => Err(none()),
            None => Ok(Shards(files)),
        };
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(model)
        .map_err(|_| none())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "safetensors"))
        .collect();
    files.sort();
    if files.is_empty() { Err(none()) } else { Ok(Shards(files)) }
}

/// Opens one shard as safetensors does: the header, and that the file is as long as it says.
pub fn open_shard(file: &Path) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Tensor {
        data_offsets: Option<(u64, u64)>,
    }
    let broken = |what: &str| format!("safetensors_rust.SafetensorError: Error while deserializing header: {what}");
    let mut shard = File::open(file).map_err(|error| format!("OSError: {error}: {}", file.display()))?;
    let length = shard.metadata().map_err(|error| format!("OSError: {error}"))?.len();
    let mut size = [0u8; 8];
    shard.read_exact(&mut size).map_err(|_| broken("HeaderTooSmall"))?;
    let size = u64::from_le_bytes(size);
    if size > 100_000_000 {
        return Err(broken("HeaderTooLarge"));
    }
    if size + 8 > length {
        return Err(broken("InvalidHeaderLength"));
    }
    let mut header = Vec::new();
    shard.take(size).read_to_end(&mut header).map_err(|error| format!("OSError: {error}"))?;
    let tensors: BTreeMap<String, Tensor> =
        serde_json::from_slice(&header).map_err(|_| broken("InvalidHeaderDeserialization"))?;
    let end = tensors.values().filter_map(|t| t.data_offsets).map(|(_, end)| end).max().unwrap_or(0);
    if end + size + 8 == length { Ok(()) } else { Err(broken("incomplete metadata, file not fully covered")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn a_truncated_or_garbled_shard_is_refused_and_a_whole_one_is_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("model.safetensors");
        let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
        std::fs::write(&file, shard(header, 16)).expect("write");
        assert_eq!(open_shard(&file), Ok(()));
        std::fs::write(&file, shard(header, 15)).expect("write");
        assert!(open_shard(&file).is_err_and(|e| e.contains("SafetensorError")));
        std::fs::write(&file, [0xff; 64]).expect("write");
        assert!(open_shard(&file).is_err_and(|e| e.contains("HeaderTooLarge")));
    }
}
