//! Asks the installed SGLang which flags it takes: its own parser, in a short Python run without a GPU.
//!
//! The run takes 7 to 20 s (it imports torch), so the answer is kept by the path, time and size of its
//! `server_args.py`. Blocking: meant for a process of its own (`sglangd plan --inspect`).

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::flags::{FlagTable, TableFile, TableOrigin};
use crate::config::Engine;

const SCRIPT: &str = include_str!("inspect.py");
/// Finding a package imports nothing; on a cold network disk Python itself takes seconds.
const LOCATE_LIMIT: Duration = Duration::from_secs(30);
/// Most that is kept of what Python printed, in bytes.
const MAX_OUTPUT: u64 = 256 << 10;

/// Why the engine cannot be what `engine.command` says. Repeating does not help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InspectError {
    #[error("engine.command names `{program}`: not found in PATH ({path}) – name an existing program, or install it")]
    NotInPath { program: String, path: String },
    #[error("engine.command names `{program}`: no such file – name an existing program")]
    NoSuchFile { program: String },
    #[error("engine.command names `{program}`: it may not be executed – `chmod +x` it, or name another")]
    NotExecutable { program: String },
    #[error(
        "engine.command names `{interpreter}`, which has no SGLang ({said}) – install sglang there, or name the \
         Python that has it: engine.command: [/path/to/venv/bin/python, -m, sglang.launch_server]"
    )]
    NoSglang { interpreter: String, said: String },
}

/// A table, and how it was come by.
#[derive(Debug, Clone)]
pub struct TableSource {
    pub table: FlagTable,
    pub how: How,
    /// Why the installed engine's own table could not be had, or kept.
    pub warning: Option<String>,
}

impl TableSource {
    /// The table that ships with sglangd.
    pub fn bundled(warning: Option<String>) -> Self {
        Self { table: FlagTable::bundled().clone(), how: How::Bundled, warning }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// The installed parser was run now.
    Asked,
    /// It was run before, and nothing has changed since.
    Cached,
    /// Not a Python engine, or its parser is broken.
    Bundled,
}

/// What is kept: the table and of which file it is the parser.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    interpreter: PathBuf,
    server_args: PathBuf,
    mtime_ns: i64,
    size: u64,
    /// The script's own hash: a newer sglangd asks anew.
    script: String,
    table: TableFile,
}

/// The table of the engine that `engine.command` starts. `limit` bounds the run of its parser.
pub fn installed_table(engine: &Engine, cache_dir: &Path, limit: Duration) -> Result<TableSource, InspectError> {
    find_program(engine)?;
    let Some(interpreter) = interpreter(engine)? else { return Ok(TableSource::bundled(None)) };
    if let Some(table) = cached(&interpreter, cache_dir) {
        return Ok(TableSource { table, how: How::Cached, warning: None });
    }
    let located = run(engine, &interpreter, &["locate".into()], LOCATE_LIMIT);
    let server_args = match located {
        Ran::Ended { success: true, out, .. } => PathBuf::from(out.trim()),
        Ran::Ended { err, .. } => {
            let said = last_line(&err);
            return Err(InspectError::NoSglang { interpreter: interpreter.display().to_string(), said });
        }
        Ran::Failed(why) => return Ok(TableSource::bundled(Some(fallback(&why)))),
    };
    match dump(engine, &interpreter, limit) {
        Ok(table) => {
            let warning = keep(&interpreter, &server_args, &table, cache_dir)
                .err()
                .map(|error| format!("the engine's flags cannot be kept in {}: {error}", cache_dir.display()));
            let origin = TableOrigin::Installed { path: server_args.display().to_string() };
            Ok(TableSource { table: FlagTable::new(table, origin), how: How::Asked, warning })
        }
        Err(why) => Ok(TableSource::bundled(Some(fallback(&why)))),
    }
}

/// The same without running anything: only what an earlier run left, if it still holds.
pub fn cached_table(engine: &Engine, cache_dir: &Path) -> Option<FlagTable> {
    cached(&interpreter(engine).ok()??, cache_dir)
}

/// What the installed engine's own parser makes of a whole command line and its YAML.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Each setting that differs from the engine's default.
    Accepted(serde_json::Map<String, serde_json::Value>),
    /// The parser's own words.
    Refused(String),
    /// Not a Python engine, or its parser is broken.
    NotAsked(String),
}

/// Runs the engine's merger and parser on what a start would give it. `argv` is without the command,
/// with `--config` naming any path: the YAML is given beside it.
pub fn check(engine: &Engine, argv: &[OsString], yaml: &str, limit: Duration) -> Result<Answer, InspectError> {
    let Some(interpreter) = interpreter(engine)? else {
        return Ok(Answer::NotAsked("engine.command starts no SGLang of Python's".to_owned()));
    };
    Ok(ask(engine, &interpreter, argv, yaml, limit).unwrap_or_else(Answer::NotAsked))
}

fn ask(engine: &Engine, interpreter: &Path, argv: &[OsString], yaml: &str, limit: Duration) -> Result<Answer, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Said {
        Accepted(serde_json::Map<String, serde_json::Value>),
        Refused(String),
    }
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let (file, output) = (folder.path().join("engine.yaml"), folder.path().join("answer.json"));
    std::fs::write(&file, yaml).map_err(|error| error.to_string())?;
    let mut args: Vec<OsString> = vec!["check".into(), output.clone().into_os_string()];
    let mut after_config = false;
    for word in argv {
        args.push(if after_config { file.clone().into_os_string() } else { word.clone() });
        after_config = word == "--config";
    }
    match run(engine, interpreter, &args, limit) {
        Ran::Ended { success: true, .. } => {
            let text = std::fs::read(&output).map_err(|error| error.to_string())?;
            Ok(match serde_json::from_slice(&text).map_err(|error| error.to_string())? {
                Said::Accepted(settings) => Answer::Accepted(settings),
                Said::Refused(why) => Answer::Refused(why),
            })
        }
        Ran::Ended { err, .. } => Err(last_line(&err)),
        Ran::Failed(why) => Err(why),
    }
}

/// The program that `engine.command` starts, found as `execvp` would.
pub fn find_program(engine: &Engine) -> Result<PathBuf, InspectError> {
    let program = engine.command.first().map(String::as_str).unwrap_or_default();
    find(program, engine)
}

/// The Python behind `engine.command`; none where it is no SGLang by name (the simulated engine).
pub fn interpreter(engine: &Engine) -> Result<Option<PathBuf>, InspectError> {
    let command = &engine.command;
    let module = command.windows(2).position(|pair| pair[0] == "-m" && pair[1].starts_with("sglang"));
    if let Some(module) = module {
        // `numactl --interleave=all python3 -m sglang.launch_server` has its Python in the middle.
        let python = command[..module].iter().rev().find(|word| base_name(word).starts_with("python"));
        return python.map(|python| find(python, engine)).transpose();
    }
    let Some(script) = command.iter().find(|word| base_name(word) == "sglang") else { return Ok(None) };
    let script = find(script, engine)?;
    Ok(shebang(&script).and_then(|python| find(&python, engine).ok()))
}

fn base_name(word: &str) -> &str {
    word.rsplit('/').next().unwrap_or(word)
}

fn find(program: &str, engine: &Engine) -> Result<PathBuf, InspectError> {
    let executable = |path: &Path| path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    if program.contains('/') {
        let path = Path::new(program);
        return match path.metadata() {
            _ if executable(path) => Ok(path.to_path_buf()),
            Ok(_) => Err(InspectError::NotExecutable { program: program.to_owned() }),
            Err(_) => Err(InspectError::NoSuchFile { program: program.to_owned() }),
        };
    }
    let said = engine.env.get("PATH").map(Into::into).or_else(|| std::env::var_os("PATH"));
    let path = said.unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|path| executable(path)).ok_or_else(|| {
        InspectError::NotInPath { program: program.to_owned(), path: path.to_string_lossy().into_owned() }
    })
}

/// The Python of a script that pip wrote: `#!/venv/bin/python`, `#!/usr/bin/env python3`, or for long
/// paths a second line `'''exec' "/long/python" "$0" "$@"`.
fn shebang(script: &Path) -> Option<String> {
    let mut head = Vec::new();
    std::fs::File::open(script).ok()?.take(4096).read_to_end(&mut head).ok()?;
    let head = String::from_utf8_lossy(&head);
    let mut lines = head.lines();
    let mut words = lines.next()?.strip_prefix("#!")?.split_whitespace();
    let program = words.next()?;
    let word = match base_name(program) {
        "env" => words.next_back()?.to_owned(),
        "sh" => {
            let exec = lines.next()?.strip_prefix("'''exec'")?.trim();
            exec.strip_prefix('"')
                .and_then(|rest| rest.split('"').next())
                .or_else(|| exec.split(' ').next())?
                .to_owned()
        }
        _ => program.to_owned(),
    };
    base_name(&word).starts_with("python").then_some(word)
}

// ---------------------------------------------------------------------- the cache

fn cache_file(interpreter: &Path, cache_dir: &Path) -> PathBuf {
    cache_dir.join(format!("engine-flags-{}.json", hash(interpreter.as_os_str().as_encoded_bytes())))
}

fn hash(bytes: &[u8]) -> String {
    use std::fmt::Write;
    Sha256::digest(bytes).iter().take(8).fold(String::new(), |mut out, byte| {
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

fn cached(interpreter: &Path, cache_dir: &Path) -> Option<FlagTable> {
    let text = std::fs::read(cache_file(interpreter, cache_dir)).ok()?;
    let kept: Kept = serde_json::from_slice(&text).ok()?;
    let meta = kept.server_args.metadata().ok()?;
    let same = kept.interpreter == interpreter
        && kept.script == hash(SCRIPT.as_bytes())
        && (kept.mtime_ns, kept.size) == stamp(&meta);
    let origin = TableOrigin::Installed { path: kept.server_args.display().to_string() };
    same.then(|| FlagTable::new(kept.table, origin))
}

fn stamp(meta: &std::fs::Metadata) -> (i64, u64) {
    (meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec()), meta.size())
}

fn keep(interpreter: &Path, server_args: &Path, table: &TableFile, cache_dir: &Path) -> std::io::Result<()> {
    let (mtime_ns, size) = stamp(&server_args.metadata()?);
    let kept = serde_json::json!({
        "interpreter": interpreter,
        "server_args": server_args,
        "mtime_ns": mtime_ns,
        "size": size,
        "script": hash(SCRIPT.as_bytes()),
        "table": table,
    });
    std::fs::create_dir_all(cache_dir)?;
    let file = tempfile::Builder::new().prefix(".engine-flags.").tempfile_in(cache_dir)?;
    serde_json::to_writer(file.as_file(), &kept)?;
    file.persist(cache_file(interpreter, cache_dir))?;
    Ok(())
}

// ---------------------------------------------------------------------- the run

enum Ran {
    Ended { success: bool, out: String, err: String },
    Failed(String),
}

fn fallback(why: &str) -> String {
    format!("the installed SGLang's parser cannot be asked ({why}): the flags are checked against the shipped table")
}

fn dump(engine: &Engine, interpreter: &Path, limit: Duration) -> Result<TableFile, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let output = folder.path().join("flags.json");
    match run(engine, interpreter, &["dump".into(), output.clone().into_os_string()], limit) {
        Ran::Ended { success: true, .. } => {
            let text = std::fs::read(&output).map_err(|error| error.to_string())?;
            serde_json::from_slice(&text).map_err(|error| error.to_string())
        }
        Ran::Ended { err, .. } => Err(last_line(&err)),
        Ran::Failed(why) => Err(why),
    }
}

/// Runs the script to its end or the limit.
fn run(engine: &Engine, interpreter: &Path, args: &[OsString], limit: Duration) -> Ran {
    let deadline = Instant::now() + limit;
    let Ok(mut errors) = tempfile::tempfile() else { return Ran::Failed("no temporary file can be made".to_owned()) };
    let Ok(stderr) = errors.try_clone() else { return Ran::Failed("no descriptor is left".to_owned()) };
    let mut command = Command::new(interpreter);
    command.arg("-c").arg(SCRIPT).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
    for (name, _) in std::env::vars_os() {
        if super::env::is_hub_token(&name) {
            command.env_remove(name);
        }
    }
    command.envs(engine.env.iter().filter(|(name, _)| !super::env::is_hub_token(OsStr::new(name))));
    // A parser needs no hub; an import that calls it anyway must not wait for it.
    command.env("HF_HUB_OFFLINE", "1").env("PYTHONUTF8", "1").env("PYTHONDONTWRITEBYTECODE", "1");
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Ran::Failed(format!("{}: {error}", interpreter.display())),
    };
    let Some(mut stdout) = child.stdout.take() else { return Ran::Failed("no pipe".to_owned()) };
    let mut out = Vec::new();
    // Python keeps its standard output open until it exits: the pipe's end is the process's end.
    let ended = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let millis = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(millis)) {
            Ok(0) if left.is_zero() || Instant::now() >= deadline => break false,
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => {
                let mut chunk = [0; 4096];
                match stdout.read(&mut chunk) {
                    Ok(0) | Err(_) => break true,
                    Ok(n) if (out.len() as u64) < MAX_OUTPUT => out.extend_from_slice(&chunk[..n]),
                    Ok(_) => {}
                }
            }
            Err(_) => break false,
        }
    };
    if !ended {
        // Already gone is as good as killed.
        let _ = child.kill();
    }
    let status = child.wait();
    if !ended {
        return Ran::Failed(format!("no answer within {}", crate::config::units::show_duration(limit)));
    }
    let mut err = Vec::new();
    let _ = std::io::Seek::rewind(&mut errors).and_then(|()| errors.take(MAX_OUTPUT).read_to_end(&mut err));
    Ran::Ended {
        success: status.is_ok_and(|status| status.success()),
        out: String::from_utf8_lossy(&out).into_owned(),
        err: String::from_utf8_lossy(&err).into_owned(),
    }
}

fn last_line(text: &str) -> String {
    text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no message").chars().take(300).collect()
}

#[cfg(test)]
mod tests;
