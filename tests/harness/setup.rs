//! What a real `sglangd serve` is to be started with: folders, addresses, configuration, environment.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{self as unix, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use tempfile::TempDir;

use super::daemon::Daemon;

/// The binary under test.
pub const SGLANGD: &str = env!("CARGO_BIN_EXE_sglangd");

/// Inherited by every process of one daemon: SGLang's prefix, so that sglangd hands it to the engine too.
pub const MARK: &str = "SGLANG_TEST_MARK";

/// Set by `tests/run`, so that it can tell what its own tests left from what others are doing.
pub const RUN: &str = "SGLANG_TEST_RUN";

/// A folder of the test's own. Short: engines put Unix sockets below it, and their paths end at 107 bytes.
pub fn temporary_folder() -> TempDir {
    let run = std::env::var(RUN).map_or_else(|_| String::new(), |run| run + "-");
    tempfile::Builder::new().prefix(&format!("sd-{run}")).tempdir_in("/tmp").unwrap()
}

/// A loopback address that nobody listens on, and that no other test gets while this one runs: its number is held by
/// a Unix socket without a file. Below the ephemeral range and clear of what sglangd picks for its engines.
pub fn free_address() -> SocketAddr {
    const PORTS: Range<u16> = 30_000..32_768;
    static HELD: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());
    let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
    let begin = std::process::id() as usize * 13 + held.len();
    let some = begin % PORTS.len();
    for port in PORTS.skip(some).chain(PORTS.take(some)) {
        let name = unix::SocketAddr::from_abstract_name(format!("sglangd-test-port-{port}")).unwrap();
        let Ok(lock) = UnixListener::bind_addr(&name) else { continue };
        if let Ok(free) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            held.push(lock);
            return free.local_addr().unwrap();
        }
    }
    panic!("no port is free below the ephemeral range");
}

/// Where a daemon listens and keeps its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Places {
    /// Where the test says.
    Given,
    /// Where it finds them itself; its arguments name what must be known.
    Its,
}

/// What a daemon is to be started with. All it writes lies in one temporary folder.
#[derive(Debug)]
pub struct Setup {
    folder: TempDir,
    places: Places,
    files: Vec<PathBuf>,
    arguments: Vec<String>,
    engine_flags: Vec<String>,
    environment: BTreeMap<String, String>,
    /// What `serve` is run by, in the end by `exec`.
    wrapper: Vec<String>,
    pub(super) public: SocketAddr,
    /// In place of the address.
    listen: Option<String>,
    pub(super) admin: SocketAddr,
}

impl Setup {
    /// Folders and addresses only: no configuration yet.
    pub fn bare() -> Self {
        let folder = temporary_folder();
        for name in ["tmp", "run", "state", "home"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        Self {
            folder,
            places: Places::Given,
            files: Vec::new(),
            arguments: Vec::new(),
            engine_flags: Vec::new(),
            environment: BTreeMap::new(),
            wrapper: Vec::new(),
            public: free_address(),
            listen: None,
            admin: free_address(),
        }
    }

    /// The simulated engine on a small model in a local folder.
    pub fn simulated() -> Self {
        let setup = Self::bare();
        let model = setup.folder().join("model");
        write_small_model(&model);
        setup.config(&format!(
            "model:\n  path: {}\n  name: small\nengine:\n  command: [{SGLANGD}, simulate]\n  tp: 1\n  flags: {{}}\n",
            model.display()
        ))
    }

    /// `serve --demo` with the folders of its own choice and ports of the kernel's.
    pub fn demo() -> Self {
        let setup = Self { places: Places::Its, ..Self::bare() };
        setup.argument("--demo").set("listen.public", "127.0.0.1:0").set("listen.admin", "127.0.0.1:0")
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn public(&self) -> SocketAddr {
        self.public
    }

    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    #[must_use]
    pub fn listening_on(self, public: SocketAddr) -> Self {
        Self { public, ..self }
    }

    /// `--listen` with these words.
    #[must_use]
    pub fn listen(self, place: &str) -> Self {
        Self { listen: Some(place.to_owned()), ..self }
    }

    /// One more configuration file; later ones win.
    #[must_use]
    pub fn config(mut self, yaml: &str) -> Self {
        let file = self.folder().join(format!("config-{}.yaml", self.files.len()));
        fs::write(&file, yaml).unwrap();
        self.files.push(file);
        self
    }

    /// A configuration file that exists already, such as the shipped one.
    #[must_use]
    pub fn config_file(mut self, file: &Path) -> Self {
        self.files.push(file.to_owned());
        self
    }

    /// `--set KEY=VALUE`
    #[must_use]
    pub fn set(mut self, key: &str, value: &str) -> Self {
        self.arguments.extend(["--set".to_owned(), format!("{key}={value}")]);
        self
    }

    #[must_use]
    pub fn argument(mut self, word: &str) -> Self {
        self.arguments.push(word.to_owned());
        self
    }

    /// A flag for the engine, after `--`.
    #[must_use]
    pub fn engine_flag(mut self, word: &str) -> Self {
        self.engine_flags.push(word.to_owned());
        self
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.to_owned(), value.to_owned());
        self
    }

    /// `serve` is handed to these words, which must run it by `exec`: its pid is watched.
    #[must_use]
    pub fn under(mut self, words: &[&str]) -> Self {
        self.wrapper.extend(words.iter().map(|&word| word.to_owned()));
        self
    }

    /// The binary with this set-up's configuration, folders and environment, for any subcommand.
    pub fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new(SGLANGD);
        command.arg(subcommand);
        // Only what a login would give: a developer's HF_TOKEN or SGLANGD_… must not reach a test.
        command.env_clear();
        for name in ["PATH", "LANG", "LLVM_PROFILE_FILE", RUN] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.env("HOME", self.folder().join("home"));
        command.env("TMPDIR", self.folder().join("tmp"));
        command.env(MARK, self.mark());
        command.envs(&self.environment);
        command.current_dir(self.folder()).stdin(Stdio::null());
        command
    }

    pub(super) fn mark(&self) -> String {
        self.folder().display().to_string()
    }

    pub fn runtime_dir(&self) -> PathBuf {
        self.folder().join("run")
    }

    /// Where its standard output and error go.
    pub fn log(&self) -> PathBuf {
        self.folder().join("log")
    }

    /// `sglangd serve` with all of it.
    pub fn start(self) -> Daemon {
        Daemon::of(self)
    }

    /// `subcommand` with every argument of this set-up, for the commands that take what `serve` takes.
    pub fn full_command(&self, subcommand: &str) -> Command {
        let mut command = self.command(subcommand);
        for file in &self.files {
            command.arg("--config").arg(file);
        }
        if self.places == Places::Given {
            command.arg("--listen").arg(self.listen.clone().unwrap_or_else(|| self.public.to_string()));
            command.arg("--admin").arg(self.admin.to_string());
            command.arg("--runtime-dir").arg(self.runtime_dir());
            command.arg("--state-dir").arg(self.folder().join("state"));
        }
        command.args(&self.arguments);
        if !self.engine_flags.is_empty() {
            command.arg("--").args(&self.engine_flags);
        }
        command
    }

    fn wrapped(&self, inner: Command) -> Command {
        let Some((program, words)) = self.wrapper.split_first() else { return inner };
        let mut command = Command::new(program);
        command.args(words).arg(inner.get_program()).args(inner.get_args());
        command.env_clear().envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.current_dir(self.folder()).stdin(Stdio::null());
        command
    }

    pub(super) fn spawn(&self) -> Child {
        let mut command = self.wrapped(self.full_command("serve"));
        let log = File::options().create(true).append(true).open(self.log()).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        command.spawn().unwrap()
    }
}

/// The files that make a folder a model: enough for sglangd's checks and the simulated engine.
pub fn write_small_model(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), r#"{"architectures":["Qwen2ForCausalLM"],"model_type":"qwen2"}"#).unwrap();
    fs::write(folder.join("tokenizer.json"), "{}").unwrap();
    fs::write(folder.join("tokenizer_config.json"), "{}").unwrap();
    // An empty safetensors file: the length of its header, and the header.
    fs::write(folder.join("model.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
}
