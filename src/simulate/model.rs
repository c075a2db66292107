//! What the simulated hub serves: a small made-up model whose bytes come out of a formula, a folder of real files, or
//! files that a test makes up. Knows no HTTP.

use std::fmt::Write as _;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use crate::weights::plan::Hash;

/// The pool of random bytes that shards are cut from. Odd, so that bytes at a wrong offset hash wrong.
const POOL: usize = (1 << 20) + 4099;
/// Files of a folder above this are LFS files, as on the hub.
const LFS_FROM: u64 = 1 << 20;

/// One file of a repository.
#[derive(Debug, Clone)]
pub struct ModelFile {
    pub name: String,
    pub size: u64,
    /// Served by the CDN and known by sha256; others by the hub itself and known by their git blob id.
    pub storage: Storage,
    source: Source,
    /// Computed when first asked for.
    hash: Arc<OnceLock<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    Git,
    Lfs,
}

#[derive(Debug, Clone)]
enum Source {
    Bytes(Bytes),
    /// A safetensors header, then bytes of the pool from `start` on, again and again.
    Formula {
        header: Bytes,
        start: usize,
    },
    Disk(PathBuf),
}

impl ModelFile {
    /// A file of these bytes.
    pub fn bytes(name: &str, storage: Storage, bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self::new(name, bytes.len() as u64, storage, Source::Bytes(bytes))
    }

    /// A valid safetensors shard of `size` bytes with one tensor, different for each `seed`.
    pub fn shard(name: &str, tensor: &str, size: u64, seed: u64) -> Self {
        // Padded to a fixed length, so that the numbers in the header do not change it.
        const HEADER: u64 = 512;
        let data = size.saturating_sub(8 + HEADER);
        let text = format!(
            "{{\"__metadata__\":{{\"format\":\"pt\"}},\"{tensor}\":{{\"dtype\":\"U8\",\"shape\":[{data}],\"data_offsets\":[0,{data}]}}}}"
        );
        let mut header = HEADER.to_le_bytes().to_vec();
        header.extend_from_slice(format!("{text:<512}").as_bytes());
        let start = usize::try_from(seed.wrapping_mul(1_000_003) % POOL as u64).unwrap_or(0);
        Self::new(name, 8 + HEADER + data, Storage::Lfs, Source::Formula { header: header.into(), start })
    }

    fn new(name: &str, size: u64, storage: Storage, source: Source) -> Self {
        Self { name: name.to_owned(), size, storage, source, hash: Arc::default() }
    }

    /// sha256 for LFS, git blob id for the rest, hex. Reads the whole file the first time.
    pub fn hash(&self) -> std::io::Result<&str> {
        if let Some(known) = self.hash.get() {
            return Ok(known);
        }
        let kind = match self.storage {
            Storage::Lfs => Hash::Sha256(String::new()),
            Storage::Git => Hash::GitBlob(String::new()),
        };
        let mut hasher = crate::weights::Hasher::new(&kind, self.size);
        let mut at = 0;
        while at < self.size {
            let piece = self.piece(at, 1 << 20)?;
            hasher.update(&piece);
            at += piece.len() as u64;
        }
        Ok(self.hash.get_or_init(|| hasher.hex()))
    }

    /// The bytes at `at`, at least one and at most `most` of them.
    pub fn piece(&self, at: u64, most: usize) -> std::io::Result<Bytes> {
        let left = usize::try_from(self.size.saturating_sub(at)).unwrap_or(usize::MAX);
        let most = most.min(left);
        match &self.source {
            Source::Bytes(bytes) => {
                let at = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
                Ok(bytes.slice(at..at + most))
            }
            Source::Formula { header, start } => {
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                if at < header.len() {
                    return Ok(header.slice(at..header.len().min(at + most)));
                }
                let at = (start + (at - header.len())) % POOL;
                Ok(pool().slice(at..POOL.min(at + most)))
            }
            Source::Disk(path) => {
                let mut file = std::fs::File::open(path)?;
                file.seek(SeekFrom::Start(at))?;
                let mut bytes = vec![0; most];
                file.read_exact(&mut bytes)?;
                Ok(bytes.into())
            }
        }
    }
}

/// splitmix64's words, once a process.
fn pool() -> &'static Bytes {
    static MADE: OnceLock<Bytes> = OnceLock::new();
    MADE.get_or_init(|| {
        let mut bytes = Vec::with_capacity(POOL + 8);
        let mut state = 1u64;
        while bytes.len() < POOL {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            bytes.extend_from_slice(&(z ^ (z >> 31)).to_le_bytes());
        }
        bytes.truncate(POOL);
        bytes.into()
    })
}

/// The demo's model: what a repository of a small language model holds, with weights that mean nothing.
pub fn demo(shards: u64, shard_bytes: u64) -> Vec<ModelFile> {
    let name = |n: u64| format!("model-{n:05}-of-{shards:05}.safetensors");
    let tensor = |n: u64| format!("model.layers.{}.mlp.down_proj.weight", n - 1);
    let mut files: Vec<ModelFile> =
        (1..=shards).map(|n| ModelFile::shard(&name(n), &tensor(n), shard_bytes, n)).collect();
    let total: u64 = files.iter().map(|f| f.size).sum();
    let map = (1..=shards).fold(String::new(), |mut map, n| {
        // Writing to a String cannot fail.
        let _ = write!(map, "{}\"{}\": \"{}\"", if n > 1 { ", " } else { "" }, tensor(n), name(n));
        map
    });
    let mut text = |name: &str, text: String| files.push(ModelFile::bytes(name, Storage::Git, text));
    text(
        "config.json",
        format!(
            "{{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_size\": 64, \"intermediate_size\": 128, \
             \"num_attention_heads\": 4, \"num_hidden_layers\": {shards}, \"vocab_size\": 260, \"torch_dtype\": \"bfloat16\", \
             \"bos_token_id\": 256, \"eos_token_id\": 257, \"max_position_embeddings\": 4096}}\n"
        ),
    );
    text("generation_config.json", "{\"bos_token_id\": 256, \"eos_token_id\": 257, \"do_sample\": true}\n".to_owned());
    text("tokenizer.json", tokenizer());
    text(
        "tokenizer_config.json",
        "{\"tokenizer_class\": \"PreTrainedTokenizerFast\", \"bos_token\": \"<s>\", \"eos_token\": \"</s>\", \
         \"model_max_length\": 4096}\n"
            .to_owned(),
    );
    text("README.md", "# A made-up model\n\nIts weights are pseudo-random bytes.\n".to_owned());
    text(
        "model.safetensors.index.json",
        format!("{{\"metadata\": {{\"total_size\": {total}}}, \"weight_map\": {{{map}}}}}\n"),
    );
    files
}

/// One token a byte, and four special ones.
fn tokenizer() -> String {
    let mut vocab = String::new();
    for byte in 0..256 {
        let _ = write!(vocab, "\"<0x{byte:02X}>\": {byte}, ");
    }
    let special: Vec<String> = ["<s>", "</s>", "<unk>", "<pad>"]
        .iter()
        .zip(256..)
        .map(|(word, id)| {
            format!(
                "{{\"id\": {id}, \"content\": \"{word}\", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \
                 \"normalized\": false, \"special\": true}}"
            )
        })
        .collect();
    format!(
        "{{\"version\": \"1.0\", \"truncation\": null, \"padding\": null, \"added_tokens\": [{}], \"normalizer\": null, \
         \"pre_tokenizer\": null, \"post_processor\": null, \"decoder\": {{\"type\": \"ByteFallback\"}}, \"model\": {{\"type\": \"BPE\", \
         \"dropout\": null, \"unk_token\": \"<unk>\", \"fuse_unk\": false, \"byte_fallback\": true, \"vocab\": {{{vocab}\"<s>\": 256, \
         \"</s>\": 257, \"<unk>\": 258, \"<pad>\": 259}}, \"merges\": []}}}}\n",
        special.join(", ")
    )
}

/// The files of a folder, as a repository. Hidden folders (`.git`, `.cache`) are none of it.
pub fn folder(root: &Path) -> std::io::Result<Vec<ModelFile>> {
    let mut files = Vec::new();
    walk(root, root, &mut files)?;
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn walk(root: &Path, at: &Path, files: &mut Vec<ModelFile>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(at)? {
        let path = entry?.path();
        let meta = std::fs::metadata(&path)?;
        let name = path.strip_prefix(root).ok().and_then(Path::to_str);
        let Some(name) = name else { continue };
        if meta.is_dir() {
            if !name.starts_with('.') {
                walk(root, &path, files)?;
            }
            continue;
        }
        let large = meta.len() >= LFS_FROM || path.extension().is_some_and(|e| e == "safetensors");
        let storage = if large { Storage::Lfs } else { Storage::Git };
        files.push(ModelFile::new(name, meta.len(), storage, Source::Disk(path.clone())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(file: &ModelFile, step: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < file.size {
            bytes.extend_from_slice(&file.piece(bytes.len() as u64, step).unwrap());
        }
        bytes
    }

    #[test]
    fn a_shard_is_the_same_however_it_is_cut_and_is_valid_safetensors() {
        let shard = ModelFile::shard("x.safetensors", "a", 3 << 20, 7);
        let bytes = whole(&shard, 1 << 20);
        assert_eq!(bytes, whole(&shard, 12_345));
        assert_eq!(bytes.len() as u64, shard.size);
        let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        assert_eq!(header["a"]["data_offsets"][1], shard.size - 8 - 512);
        assert_ne!(shard.hash().unwrap(), ModelFile::shard("x", "a", 3 << 20, 8).hash().unwrap());
    }

    #[test]
    fn the_demo_models_json_is_json_and_its_index_names_its_shards() {
        let files = demo(3, 4096);
        for file in files.iter().filter(|f| f.storage == Storage::Git && f.name != "README.md") {
            let value: serde_json::Value = serde_json::from_slice(&whole(file, 1 << 20)).unwrap();
            if file.name == "model.safetensors.index.json" {
                for shard in value["weight_map"].as_object().unwrap().values() {
                    assert!(files.iter().any(|f| f.name == shard.as_str().unwrap()));
                }
            }
        }
    }

    #[test]
    fn a_folder_is_served_with_the_ids_git_would_give() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("sub/hello.txt"), "hello\n").unwrap();
        let files = folder(dir.path()).unwrap();
        assert_eq!(files[0].name, "sub/hello.txt");
        assert_eq!(files[0].hash().unwrap(), "ce013625030ba8dba906f756967f9e9ca394464a");
    }
}
