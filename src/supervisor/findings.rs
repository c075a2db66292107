//! Collects what can be known of an engine while it can be known: before a dead one's processes are ended,
//! and while a silent one still hangs. Bounded: a restart waits for none of it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::config::redact;
use crate::engine::argv::{LaunchSpec, shown};
use crate::launch::spawner::Spawner;
use crate::launch::tree::Tree;
use crate::observe::bundle::Page;
use crate::sys::proc;
use crate::sys::spawn::{Spec, Stream};

/// All stacks together: they are taken at once, and an examination has 5 s.
const STACKS: Duration = Duration::from_secs(3);
/// `nvidia-smi` wakes GPUs up; nobody waits for it.
const SMI: Duration = Duration::from_secs(10);
/// Kept of what a tool prints.
const LARGEST: u64 = 1 << 20;
/// A TP of 8 has ten processes; more than these would only take longer.
const MAX_STACKS: usize = 24;

/// Whether the stacks are worth the time: a dead engine's have gone with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stacks {
    Take,
    Leave,
}

/// An engine, as far as its findings are concerned.
#[derive(Debug, Clone)]
pub struct Subject {
    tree: Tree,
    spec: LaunchSpec,
}

impl Subject {
    pub fn new(tree: Tree, spec: LaunchSpec) -> Self {
        Self { tree, spec }
    }

    /// What is gone once its processes are.
    pub async fn alive(&self, spawner: &Spawner, stacks: Stacks) -> Vec<Page> {
        let tree = self.tree.clone();
        // Every process is looked at: not on a worker of the runtime.
        let processes = tokio::task::spawn_blocking(move || {
            let members: Vec<i32> = tree.members().iter().map(|member| member.pid).collect();
            let own = i32::try_from(std::process::id()).unwrap_or(-1);
            (process_table(&members, own), members)
        });
        let (table, members) = processes.await.unwrap_or_default();
        let mut pages = vec![Page::new("processes", self.spec.redactor.text(&table))];
        if stacks == Stacks::Take {
            pages.push(Page::new("stacks", self.spec.redactor.text(&self.stacks(spawner, &members).await)));
        }
        pages
    }

    /// What it was started with, without its secrets.
    pub fn start(&self) -> Vec<Page> {
        let hide = |text: &str| self.spec.redactor.text(text);
        let mut env = String::new();
        for (name, value) in &self.spec.env {
            let (name, value) = (name.to_string_lossy(), value.to_string_lossy());
            let value = if redact::is_secret_name(&name) { redact::MASK.into() } else { hide(&value) };
            // Writing to a String cannot fail.
            let _ = writeln!(env, "{name}={value}");
        }
        vec![
            Page::new("argv", hide(&shown(&self.spec.argv)) + "\n"),
            Page::new("engine.yaml", hide(&self.spec.yaml)),
            Page::new("environment", env),
        ]
    }

    /// The engine's last lines, as the log has them.
    pub fn tail(&self, lines: &[Vec<u8>]) -> Page {
        let mut text = String::new();
        for line in lines {
            text.push_str(&String::from_utf8_lossy(line));
            text.push('\n');
        }
        Page::new("engine.log", self.spec.redactor.text(&text))
    }

    async fn stacks(&self, spawner: &Spawner, members: &[i32]) -> String {
        let Some(tool) = self.py_spy() else {
            return "(py-spy is neither beside the engine's Python nor in its PATH)\n".into();
        };
        let one = |pid: &i32| {
            let words = ["dump", "--nonblocking", "--pid"].map(OsString::from);
            let argv = [vec![tool.clone().into_os_string()], words.to_vec(), vec![pid.to_string().into()]].concat();
            let (spawner, env, pid) = (spawner.clone(), self.tool_env(), *pid);
            tokio::spawn(async move { (pid, said(&spawner, argv, env, STACKS).await) })
        };
        // All at once, each in a process of its own.
        let running: Vec<_> = members.iter().take(MAX_STACKS).map(one).collect();
        let mut text = String::new();
        for task in running {
            if let Ok((pid, stack)) = task.await {
                let _ = writeln!(text, "--- pid {pid}\n{stack}");
            }
        }
        text
    }

    /// Beside the interpreter, where `pip` puts it, or in the engine's PATH.
    fn py_spy(&self) -> Option<PathBuf> {
        let beside = self.spec.argv.first().and_then(|program| Path::new(program).parent()).map(Path::to_owned);
        let path = self.spec.env.get(OsStr::new("PATH")).cloned().unwrap_or_default();
        let folders = beside.filter(|folder| folder.is_absolute()).into_iter().chain(std::env::split_paths(&path));
        folders.map(|folder| folder.join("py-spy")).find(|file| file.is_file())
    }

    fn tool_env(&self) -> BTreeMap<OsString, OsString> {
        // Without the launch's mark: it would be ended with the engine's processes.
        let keep = ["PATH", "HOME", "LD_LIBRARY_PATH", "LANG"].map(OsStr::new);
        self.spec.env.iter().filter(|(name, _)| keep.contains(&name.as_os_str())).map(pair).collect()
    }
}

fn pair((name, value): (&OsString, &OsString)) -> (OsString, OsString) {
    (name.clone(), value.clone())
}

/// What `nvidia-smi` shows.
pub async fn nvidia_smi(spawner: &Spawner) -> Page {
    let keep = |name: &str| std::env::var_os(name).map(|value| (OsString::from(name), value));
    let env = ["PATH", "LD_LIBRARY_PATH"].into_iter().filter_map(keep).collect();
    Page::new("nvidia-smi", said(spawner, vec!["nvidia-smi".into()], env, SMI).await)
}

/// Runs a tool and returns what it printed, or why there is nothing.
async fn said(spawner: &Spawner, argv: Vec<OsString>, env: BTreeMap<OsString, OsString>, limit: Duration) -> String {
    let name = argv.first().map(|program| program.to_string_lossy().into_owned()).unwrap_or_default();
    let spec = Spec { stdout: Stream::Piped, ..Spec::quiet(argv, env) };
    let (mut child, end) = match spawner.spawn(spec).await {
        Ok(started) => started,
        Err(error) => return format!("({name}: {error})\n"),
    };
    let pipe = child.stdout.take().map(OwnedFd::from).map(pipe::Receiver::from_owned_fd);
    let Some(Ok(pipe)) = pipe else { return String::new() };
    let mut bytes = Vec::new();
    let read = async {
        // What was read before an error is what there is.
        let _ = pipe.take(LARGEST).read_to_end(&mut bytes).await;
        let _ = end.await;
    };
    let late = tokio::time::timeout(limit, read).await.is_err();
    if late {
        let _ = proc::signal(child.pidfd.as_fd(), Signal::KILL);
    }
    let mut text = String::from_utf8_lossy(&bytes).into_owned();
    if late {
        let _ = writeln!(text, "({name} did not end within {} s)", limit.as_secs());
    }
    text
}

/// The engine's processes and our own, and where those that sleep do so.
fn process_table(members: &[i32], own: i32) -> String {
    let mut text = String::new();
    for process in proc::all() {
        let whose = if members.contains(&process.pid) {
            "engine"
        } else if process.pid == own || process.ppid == own {
            "sglangd"
        } else {
            continue;
        };
        let pid = process.pid;
        let read = |what: &str| fs::read_to_string(format!("/proc/{pid}/{what}")).unwrap_or_default();
        let (status, wchan, stack) = (read("status"), read("wchan"), read("stack"));
        let fact = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map_or("?", str::trim).to_owned()
        };
        let command = redact::text(&proc::command_line(pid));
        let command = if command.is_empty() { format!("[{}]", process.comm) } else { command };
        let _ = writeln!(
            text,
            "{whose} pid {pid} parent {} session {} state {} threads {} memory {} waits in {}\n  {command}",
            process.ppid,
            process.sid,
            process.state,
            fact("Threads"),
            fact("VmRSS"),
            if wchan.is_empty() { "?" } else { wchan.as_str() },
        );
        for line in stack.lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
    text
}
