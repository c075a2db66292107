//! What is to be fetched: a pure function of the hub's listing and of what the cache holds. No I/O.

use globset::{Glob, GlobSet, GlobSetBuilder};
use serde::{Deserialize, Serialize};

use super::error::FetchError;
use super::{Pickles, RepoRequest, Wanted, name};

/// One file of a repository, as the hub lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteFile {
    /// Path in the repository.
    pub name: String,
    pub size: u64,
    pub hash: Hash,
    pub transport: Transport,
}

/// What the hub says the content hashes to; also the blob's name in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hash {
    /// LFS and xet files: sha256 of the content, hex.
    Sha256(String),
    /// Small files: git's blob id, sha1 over `blob SIZE\0` and the content, hex.
    GitBlob(String),
    /// Only in a cache without symlinks that is read without the hub.
    Unknown,
}

impl Hash {
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
            Self::Unknown => "",
        }
    }

    /// From a blob's name: 64 hex digits are a sha256, 40 a git blob id; anything else proves nothing.
    pub fn from_hex(hex: &str) -> Option<Self> {
        if !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        match hex.len() {
            64 => Some(Self::Sha256(hex.to_owned())),
            40 => Some(Self::GitBlob(hex.to_owned())),
            _ => None,
        }
    }
}

/// How the bytes come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// Byte ranges over HTTP: resumable.
    Http,
    /// The hub's content-addressed store, through hf-hub's own client.
    Xet,
}

/// What the cache holds of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Present {
    No,
    /// The first bytes of it, in `.incomplete`.
    Part(u64),
    /// A file of this size, not yet proved.
    Whole(u64),
    /// Proved by an earlier run and unchanged since.
    Verified,
}

/// One file with what is to be done about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedFile {
    #[serde(flatten)]
    pub file: RemoteFile,
    pub action: Action,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// There, and proved.
    Keep,
    /// There with the right size: read it once and compare its hash.
    Verify,
    /// Fetch from this byte on.
    Fetch { from: u64 },
}

impl Action {
    pub fn word(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Verify => "verify",
            Self::Fetch { from: 0 } => "fetch",
            Self::Fetch { .. } => "continue",
        }
    }
}

/// What will be done for one repository; printed by `sglangd fetch --plan` and `sglangd plan`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FetchPlan {
    pub repo: String,
    pub revision: String,
    pub commit: String,
    pub files: Vec<PlannedFile>,
    /// Files of the repository that the engine does not need, by name.
    pub skipped: Vec<String>,
}

impl FetchPlan {
    pub fn bytes_total(&self) -> u64 {
        self.files.iter().map(|f| f.file.size).sum()
    }

    /// Bytes still to come over the network; also the free space needed.
    pub fn bytes_to_fetch(&self) -> u64 {
        self.files
            .iter()
            .map(|f| match f.action {
                Action::Keep | Action::Verify => 0,
                Action::Fetch { from } => f.file.size.saturating_sub(from),
            })
            .sum()
    }

    pub fn bytes_present(&self) -> u64 {
        self.bytes_total() - self.bytes_to_fetch()
    }

    /// Programs of the repository's own, which the engine runs where it is told to trust them. They are those of
    /// this commit: a commit's files never change.
    pub fn code(&self) -> impl Iterator<Item = &PlannedFile> {
        self.files.iter().filter(|f| kind(&f.file.name) == Kind::Code)
    }

    /// Names of the files that are not there whole.
    pub fn missing(&self) -> Vec<String> {
        let fetched = |f: &&PlannedFile| matches!(f.action, Action::Fetch { .. });
        self.files.iter().filter(fetched).map(|f| f.file.name.clone()).collect()
    }
}

/// Decides about every file of `listing`. `present` says what the cache holds of one.
pub fn plan(
    request: &RepoRequest,
    commit: &str,
    listing: Vec<RemoteFile>,
    mut present: impl FnMut(&RemoteFile) -> Present,
) -> Result<FetchPlan, FetchError> {
    for file in &listing {
        if let Some(why) = name::refuse_file(&file.name) {
            return Err(FetchError::BadName { repo: request.repo.clone(), name: file.name.clone(), why });
        }
    }
    if let Some((bad, why)) = name::refuse_set(listing.iter().map(|f| f.name.as_str())) {
        return Err(FetchError::BadName { repo: request.repo.clone(), name: bad.to_owned(), why });
    }
    if listing.is_empty() {
        return Err(FetchError::Empty { repo: request.repo.clone(), commit: commit.to_owned() });
    }
    let (mut files, skipped) = choose(request, commit, listing)?;
    // Small ones first: a gated or broken repository shows at the first request, and the engine's YAML
    // can be checked while the shards arrive. Then the order in which the engine loads shards.
    files.sort_by(|a, b| (kind(&a.name).is_weights(), &a.name).cmp(&(kind(&b.name).is_weights(), &b.name)));
    let files = files
        .into_iter()
        .map(|file| {
            let action = match present(&file) {
                Present::Verified => Action::Keep,
                Present::Whole(size) if size == file.size => Action::Verify,
                Present::Part(have) if have <= file.size => Action::Fetch { from: have },
                // A blob of another size is no beginning of the right one: nothing says where it went wrong.
                Present::No | Present::Whole(_) | Present::Part(_) => Action::Fetch { from: 0 },
            };
            PlannedFile { file, action }
        })
        .collect();
    Ok(FetchPlan {
        repo: request.repo.clone(),
        revision: request.revision.clone(),
        commit: commit.to_owned(),
        files,
        skipped,
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Safetensors,
    /// Runs code when loaded.
    Pickle,
    /// The same weights for other programs: TensorFlow, JAX, ONNX, llama.cpp.
    Foreign,
    /// Python of the repository's own.
    Code,
    Other,
}

impl Kind {
    fn is_weights(self) -> bool {
        matches!(self, Self::Safetensors | Self::Pickle | Self::Foreign)
    }
}

fn kind(name: &str) -> Kind {
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension).to_ascii_lowercase();
    match extension.as_str() {
        "safetensors" => Kind::Safetensors,
        "bin" | "pt" | "pth" | "ckpt" | "pkl" | "pickle" => Kind::Pickle,
        "h5" | "msgpack" | "ot" | "onnx" | "onnx_data" | "tflite" | "gguf" | "mlmodel" | "npz" => Kind::Foreign,
        "py" => Kind::Code,
        _ => Kind::Other,
    }
}

/// The files the engine needs, and the names of the others.
fn choose(
    request: &RepoRequest,
    commit: &str,
    listing: Vec<RemoteFile>,
) -> Result<(Vec<RemoteFile>, Vec<String>), FetchError> {
    let asked = Asked::of(request)?;
    let has = |wanted: Kind| listing.iter().find(|f| kind(&f.name) == wanted && asked.allows(&f.name));
    let by_name = !request.include.is_empty();
    let pickles_serve = request.pickles == Pickles::Allowed && (by_name || has(Kind::Safetensors).is_none());
    let needed = |file: &RemoteFile| {
        asked.allows(&file.name)
            && match (kind(&file.name), request.files) {
                (Kind::Other | Kind::Code, _) | (Kind::Safetensors, Wanted::All) => true,
                (Kind::Pickle, Wanted::All) => pickles_serve,
                (Kind::Foreign, Wanted::All) => by_name,
                (_, Wanted::NoWeights) => false,
            }
    };
    if request.files == Wanted::All && !listing.iter().any(|f| kind(&f.name).is_weights() && needed(f)) {
        return Err(FetchError::NoSafetensors {
            repo: request.repo.clone(),
            commit: commit.to_owned(),
            pickle: has(Kind::Pickle).map(|f| f.name.clone()),
        });
    }
    let (needed, skipped): (Vec<_>, Vec<_>) = listing.into_iter().partition(needed);
    Ok((needed, skipped.into_iter().map(|f| f.name).collect()))
}

/// The patterns of a request.
#[derive(Debug)]
pub struct Asked {
    /// None: everything.
    include: Option<GlobSet>,
    exclude: GlobSet,
}

impl Asked {
    pub fn of(request: &RepoRequest) -> Result<Self, FetchError> {
        let include = (!request.include.is_empty()).then(|| set("weights.include", &request.include)).transpose()?;
        Ok(Self { include, exclude: set("weights.exclude", &request.exclude)? })
    }

    pub fn allows(&self, name: &str) -> bool {
        self.include.as_ref().is_none_or(|include| include.is_match(name)) && !self.exclude.is_match(name)
    }
}

/// As huggingface_hub reads them: `*` takes `/` too, and a folder's name with a slash at its end stands for all in it.
fn set(what: &'static str, patterns: &[String]) -> Result<GlobSet, FetchError> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        let folder = pattern.ends_with('/').then(|| format!("{pattern}*"));
        let bad =
            || FetchError::BadRequest { what, value: pattern.clone(), why: "is no pattern: use names with * and ?" };
        set.add(Glob::new(folder.as_deref().unwrap_or(pattern)).map_err(|_| bad())?);
    }
    set.build().map_err(|_| FetchError::BadRequest {
        what,
        value: patterns.join(", "),
        why: "are more patterns than can be searched for at once",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, size: u64) -> RemoteFile {
        RemoteFile { name: name.into(), size, hash: Hash::GitBlob("0".repeat(40)), transport: Transport::Http }
    }

    fn request(files: Wanted) -> RepoRequest {
        RepoRequest { files, ..RepoRequest::model("a/b", "main") }
    }

    fn names(plan: &FetchPlan) -> Vec<&str> {
        plan.files.iter().map(|f| f.file.name.as_str()).collect()
    }

    #[test]
    fn h18_pickles_are_skipped_beside_safetensors_and_refused_alone() {
        let listing = vec![file("pytorch_model.bin", 9), file("model.safetensors", 9), file("config.json", 1)];
        let plan = super::plan(&request(Wanted::All), "c", listing, |_| Present::No).unwrap();
        assert_eq!(names(&plan), ["config.json", "model.safetensors"]);
        assert_eq!(plan.skipped, ["pytorch_model.bin"]);

        let only = || vec![file("pytorch_model.bin", 9), file("config.json", 1)];
        let error = super::plan(&request(Wanted::All), "c", only(), |_| Present::No).unwrap_err();
        assert!(error.to_string().contains("pytorch_model.bin"), "{error}");

        let asked = RepoRequest { pickles: Pickles::Allowed, ..request(Wanted::All) };
        let plan = super::plan(&asked, "c", only(), |_| Present::No).unwrap();
        assert_eq!(names(&plan), ["config.json", "pytorch_model.bin"]);
    }

    #[test]
    fn only_what_is_included_and_not_excluded_is_needed_and_pickles_stay_refused() {
        let listing = || {
            ["config.json", "model.safetensors", "original/w.safetensors", "model.bin", "q4.gguf"]
                .map(|n| file(n, 1))
                .to_vec()
        };
        let asked = |include: &[&str], exclude: &[&str], pickles| {
            let words = |list: &[&str]| list.iter().map(|&word| word.to_owned()).collect();
            let request =
                RepoRequest { include: words(include), exclude: words(exclude), pickles, ..request(Wanted::All) };
            super::plan(&request, "c", listing(), |_| Present::No)
        };
        let plan = asked(&[], &["original/"], Pickles::Refused).unwrap();
        assert_eq!(names(&plan), ["config.json", "model.safetensors"]);
        assert_eq!(plan.skipped, ["original/w.safetensors", "model.bin", "q4.gguf"]);
        let plan = asked(&["*.gguf", "*.json"], &[], Pickles::Refused).unwrap();
        assert_eq!(names(&plan), ["config.json", "q4.gguf"], "weights of another kind, where they are named");
        let error = asked(&["*.bin", "*.json"], &[], Pickles::Refused).unwrap_err();
        assert!(error.to_string().contains("weights.pickles"), "{error}");
        let plan = asked(&["*.bin", "*.json"], &[], Pickles::Allowed).unwrap();
        assert_eq!(names(&plan), ["config.json", "model.bin"]);
        assert_eq!(asked(&["[z"], &[], Pickles::Refused).unwrap_err().name(), "bad-request");
    }

    #[test]
    fn dummy_weights_need_everything_but_the_weight_files() {
        let listing = vec![file("model.safetensors", 9), file("config.json", 1), file("tokenizer.model", 4)];
        let plan = super::plan(&request(Wanted::NoWeights), "c", listing, |_| Present::No).unwrap();
        assert_eq!(names(&plan), ["config.json", "tokenizer.model"]);
    }

    #[test]
    fn what_is_there_is_counted_and_a_wrong_size_starts_over() {
        let listing = vec![
            file("a.safetensors", 100),
            file("b.safetensors", 100),
            file("c.safetensors", 100),
            file("d.safetensors", 100),
            file("e.safetensors", 100),
        ];
        let plan = super::plan(&request(Wanted::All), "c", listing, |f| match f.name.as_bytes()[0] {
            b'a' => Present::Verified,
            b'b' => Present::Whole(100),
            b'c' => Present::Part(40),
            b'd' => Present::Whole(99),
            _ => Present::Part(101),
        })
        .unwrap();
        let actions: Vec<Action> = plan.files.iter().map(|f| f.action).collect();
        let fresh = Action::Fetch { from: 0 };
        assert_eq!(actions, [Action::Keep, Action::Verify, Action::Fetch { from: 40 }, fresh, fresh]);
        assert_eq!((plan.bytes_total(), plan.bytes_to_fetch(), plan.bytes_present()), (500, 260, 240));
    }

    #[test]
    fn h12_one_bad_name_stops_the_whole_plan_before_any_look_at_the_disk() {
        let listing = vec![file("model.safetensors", 1), file("../../etc/x", 1)];
        let error = super::plan(&request(Wanted::All), "c", listing, |_| panic!("looked at the disk")).unwrap_err();
        assert_eq!(error.name(), "bad-name");
    }

    #[test]
    fn h13_an_empty_repository_and_one_without_weights_are_clear_errors() {
        let none = super::plan(&request(Wanted::All), "c", vec![], |_| Present::No).unwrap_err();
        assert_eq!(none.name(), "empty");
        let bare = super::plan(&request(Wanted::All), "c", vec![file("README.md", 1)], |_| Present::No).unwrap_err();
        assert_eq!(bare.name(), "no-safetensors");
    }
}
