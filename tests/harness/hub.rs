//! A simulated hub with its CDN on another port, a cache in a temporary folder, and fetches into it: in this process, or as
//! the child that `serve` starts.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use sglangd::config::Download;
use sglangd::simulate::hub::{COMMIT, Content, Fault, Hub, Options, Route, What, Which};
use sglangd::simulate::model::{ModelFile, Storage, demo};
use sglangd::weights::{
    self, FetchError, Patience, Progress, Proof, RepoRequest, Request, Settings, Snapshot, Token, Tuning,
};

pub const REPO: &str = "made-up/tiny";
/// Where `main` goes when it moves.
pub const NEXT_COMMIT: &str = "00112233445566778899aabbccddeeff00112233";

pub fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

/// Shards of 1 MiB: some pieces each, quick to hash.
pub fn small_model() -> Vec<ModelFile> {
    demo(3, 1 << 20)
}

pub struct Site {
    pub hub: Hub,
    dir: tempfile::TempDir,
}

#[allow(clippy::unused_self)] // verbs read better with their subject: `site.assert_right(…)`
impl Site {
    pub async fn new() -> Self {
        Self::with(small_model(), Options::default()).await
    }

    pub async fn slow(files: Vec<ModelFile>, rate: u64) -> Self {
        Self::with(files, Options { rate: Some(rate), ..Options::default() }).await
    }

    pub async fn with(files: Vec<ModelFile>, options: Options) -> Self {
        let options = Options { cdn: Some(listener()), ..options };
        let hub = Hub::serve(listener(), Content::Files(files), options).await.unwrap();
        Self { hub, dir: tempfile::tempdir().unwrap() }
    }

    pub fn cache(&self) -> PathBuf {
        self.dir.path().join("hub")
    }

    pub fn repo_dir(&self) -> PathBuf {
        self.cache().join(format!("models--{}", REPO.replace('/', "--")))
    }

    pub fn blobs(&self) -> PathBuf {
        self.repo_dir().join("blobs")
    }

    pub fn snapshot_file(&self, name: &str) -> PathBuf {
        self.repo_dir().join("snapshots").join(COMMIT).join(name)
    }

    pub fn misbehave(&self, on: Route, which: Which, what: What) {
        self.hub.fault(Fault { on, which, about: None, what });
    }

    pub fn misbehave_about(&self, file: &str, which: Which, what: What) {
        self.hub.fault(Fault { on: Route::Cdn, which, about: Some(file.to_owned()), what });
    }

    pub fn request(&self) -> Request {
        Request {
            repos: vec![RepoRequest::model(REPO, "main")],
            cache: Some(self.cache()),
            endpoint: Some(self.hub.endpoint()),
            download: Download::Auto,
            tuning: Tuning::default(),
            proof: Proof::Kept,
        }
    }

    /// Impatient, so that a test of giving up takes a second.
    pub fn settings(&self, request: &Request) -> Settings {
        let mut settings = Settings::resolve(request, |_| None).unwrap();
        settings.patience = Patience {
            stall: Duration::from_secs(5),
            attempts: 4,
            limit: Duration::from_secs(20),
            backoff: Duration::from_millis(10),
            backoff_max: Duration::from_millis(50),
            corrupt: 3,
        };
        settings
    }

    pub async fn fetch(&self) -> Result<Snapshot, FetchError> {
        let request = self.request();
        let settings = self.settings(&request);
        fetch_with(&request, &settings).await.map(|mut all| all.remove(0))
    }

    /// With a stall called one after a third of a second: only for tests of stalls, a busy machine stutters.
    pub async fn fetch_impatiently(&self) -> Result<Snapshot, FetchError> {
        let request = self.request();
        let mut settings = self.settings(&request);
        settings.patience.stall = Duration::from_millis(300);
        fetch_with(&request, &settings).await.map(|mut all| all.remove(0))
    }

    pub async fn fetch_with_token(&self, token: &str) -> Result<Snapshot, FetchError> {
        let request = self.request();
        let settings = Settings { token: Some(Token::new(token)), ..self.settings(&request) };
        fetch_with(&request, &settings).await.map(|mut all| all.remove(0))
    }

    /// Nothing else in the cache's blobs than whole files under their names.
    pub fn assert_no_leftovers(&self) {
        for entry in std::fs::read_dir(self.blobs()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(!name.contains('.'), "left over: {name}");
        }
    }

    /// Every file of the snapshot has the bytes that the hub serves.
    pub fn assert_right(&self, snapshot: &Path, files: &[ModelFile]) {
        for file in files {
            let got = std::fs::read(snapshot.join(&file.name)).unwrap_or_else(|e| panic!("{}: {e}", file.name));
            let mut want = Vec::new();
            while (want.len() as u64) < file.size {
                want.extend_from_slice(&file.piece(want.len() as u64, 1 << 20).unwrap());
            }
            assert!(got == want, "{} differs", file.name);
        }
    }

    /// `sglangd fetch` as a child, with nothing of the caller's Hugging Face environment.
    pub fn command(&self) -> Command {
        let mut command = self.bare_command();
        command.arg("fetch").arg(REPO).arg("--cache").arg(self.cache()).arg("--endpoint").arg(self.hub.endpoint());
        command
    }

    /// The program, to be told what to do.
    pub fn bare_command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sglangd"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HF_")) {
            command.env_remove(name);
        }
        command.env("HF_HOME", self.dir.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Bytes that lie in blobs, whole or not.
    pub fn bytes_there(&self) -> u64 {
        let Ok(entries) = std::fs::read_dir(self.blobs()) else { return 0 };
        entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len())).sum()
    }
}

/// Runs it and returns the most memory it ever had, in MiB.
pub fn peak(command: &mut Command) -> (Output, u64) {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let watch = std::thread::spawn(move || {
        let mut most = 0;
        while let Ok(text) = std::fs::read_to_string(&status) {
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let Some(kib) = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()) else {
                break;
            };
            most = most.max(kib);
            #[allow(clippy::disallowed_methods)] // a thread of its own, which only looks
            std::thread::sleep(Duration::from_millis(5));
        }
        most >> 10
    });
    let output = child.wait_with_output().unwrap();
    (output, watch.join().unwrap())
}

pub async fn fetch_with(request: &Request, settings: &Settings) -> Result<Vec<Snapshot>, FetchError> {
    weights::fetch(request, settings, &mut |_| {}).await
}

pub async fn fetch_watched(
    request: &Request,
    settings: &Settings,
) -> (Result<Vec<Snapshot>, FetchError>, Vec<Progress>) {
    let mut all = Vec::new();
    let ended = weights::fetch(request, settings, &mut |progress| all.push(progress)).await;
    (ended, all)
}

/// A small file of the hub's own.
pub fn text_file(name: &str, text: &'static str) -> ModelFile {
    ModelFile::bytes(name, Storage::Git, text)
}

/// Waits until `what` is so, at most some seconds.
pub async fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !so() {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
