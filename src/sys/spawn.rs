//! Forks and executes a program with exactly the surroundings that were asked for.
//!
//! # Safety contract
//! The only `unsafe` is [`std::os::unix::process::CommandExt::pre_exec`]. Its closure runs in the
//! forked child of a process with many threads, so it calls nothing but async-signal-safe functions
//! (`write`, `setsid`, `prctl`, `getppid`, `signal`, `sigprocmask`, `setrlimit`, `fcntl`), allocates nothing,
//! takes no lock, and reads only values that were copied into it before the fork.
//!
//! A parent-death signal belongs to the *thread* that forked (measured: a child forked by a thread
//! that ends is killed then). Call [`Spec::spawn`] only on a thread that lives as long as the
//! process; `serve` keeps its main thread for that.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command, Stdio};

use nix::libc;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// What to start, and in which surroundings.
#[derive(Debug)]
pub struct Spec {
    /// Program (looked up in the child's PATH) and its arguments; never through a shell.
    pub argv: Vec<OsString>,
    /// What the process calls itself (`ps`); none: the program.
    pub arg0: Option<OsString>,
    /// The whole environment: nothing is inherited beside it.
    pub env: BTreeMap<OsString, OsString>,
    pub session: Session,
    pub stdin: Stream,
    pub stdout: Stream,
    pub stderr: Stream,
    /// Descriptors the child keeps, under the same numbers. All others are closed at `execve`.
    pub keep: Vec<RawFd>,
    pub cwd: Option<PathBuf>,
    /// What happens to the child when the forking thread's process ends.
    pub on_parent_death: ParentDeath,
    /// `cgroup.procs` of the group that it is to be born in, open for writing.
    pub cgroup: Option<OwnedFd>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Session {
    /// A session and process group of its own: no terminal's Ctrl-C reaches it.
    New,
    /// The parent's session, a process group of its own.
    OwnGroup,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Null,
    Piped,
    Inherit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParentDeath {
    /// SIGKILL, armed before `execve` and checked against a parent that died in between.
    Kill,
    /// It lives on.
    Survive,
}

/// A started process. Nobody but the reaper may wait for it.
#[derive(Debug)]
pub struct Spawned {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub stdin: Option<ChildStdin>,
    pub stdout: Option<ChildStdout>,
    pub stderr: Option<ChildStderr>,
}

/// Exit status of a child whose parent died between fork and exec; nobody is left to see it.
const ORPHANED_BEFORE_EXEC: i32 = 70;

impl Spec {
    /// A program in a session of its own, with nothing but this environment, that hears and says nothing and is
    /// ended with us.
    pub fn quiet(argv: Vec<OsString>, env: BTreeMap<OsString, OsString>) -> Self {
        Self {
            argv,
            arg0: None,
            env,
            session: Session::New,
            stdin: Stream::Null,
            stdout: Stream::Null,
            stderr: Stream::Null,
            keep: Vec::new(),
            cwd: None,
            on_parent_death: ParentDeath::Kill,
            cgroup: None,
        }
    }

    /// This program once more, with other words: in a session of its own, silent but for its log, and
    /// ended with us.
    pub fn ourselves(words: impl IntoIterator<Item = OsString>, env: BTreeMap<OsString, OsString>) -> Self {
        let argv = std::iter::once(own_program()).chain(words).collect();
        Self { arg0: Some("sglangd".into()), stderr: Stream::Inherit, ..Self::quiet(argv, env) }
    }

    /// Forks and executes; returns once `execve` succeeded, or with its error.
    ///
    /// Errors are the kernel's: `NotFound` and `PermissionDenied` name the program, `WouldBlock` is a
    /// limit on processes (`pids.max`, `RLIMIT_NPROC`).
    pub fn spawn(self) -> io::Result<Spawned> {
        let (program, args) =
            self.argv.split_first().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "an empty command"))?;
        let mut command = Command::new(program);
        command.args(args).env_clear().envs(&self.env);
        command.stdin(stdio(self.stdin)).stdout(stdio(self.stdout)).stderr(stdio(self.stderr));
        if let Some(name) = &self.arg0 {
            command.arg0(name);
        }
        if let Some(cwd) = &self.cwd {
            command.current_dir(cwd);
        }
        let (keep, session, death) = (self.keep.clone(), self.session, self.on_parent_death);
        let parent = nix::unistd::getpid().as_raw();
        let door = self.cgroup.as_ref().map(AsRawFd::as_raw_fd);
        // SAFETY: the closure keeps the contract at the top of this file.
        unsafe {
            command.pre_exec(move || in_child(&keep, session, death, parent, door));
        }
        let mut child = command.spawn()?;
        let pid = i32::try_from(child.id()).expect("Linux pids fit in 22 bits");
        // The child cannot have been reaped: only the reaper waits, and it learns of it after this.
        let pidfd = match pidfd_open(Pid::from_raw(pid).expect("a child's pid is positive"), PidfdFlags::NONBLOCK) {
            Ok(handle) => handle,
            Err(error) => {
                // Without a handle (no descriptor was left) nobody could end it later. It was not reaped yet, so the
                // pid is its own.
                let _ = child.kill();
                return Err(error.into());
            }
        };
        Ok(Spawned { pid, pidfd, stdin: child.stdin.take(), stdout: child.stdout.take(), stderr: child.stderr.take() })
    }
}

/// This program's file, whatever its name is by now; where there is no `/proc`, as we were called.
fn own_program() -> OsString {
    const OWN: &str = "/proc/self/exe";
    if std::path::Path::new(OWN).exists() { OWN.into() } else { std::env::args_os().next().unwrap_or(OWN.into()) }
}

fn stdio(stream: Stream) -> Stdio {
    match stream {
        Stream::Null => Stdio::null(),
        Stream::Piped => Stdio::piped(),
        Stream::Inherit => Stdio::inherit(),
    }
}

/// Runs between fork and exec.
fn in_child(keep: &[RawFd], session: Session, death: ParentDeath, parent: i32, door: Option<RawFd>) -> io::Result<()> {
    // SAFETY: plain system calls on integers; see the contract at the top of this file.
    unsafe {
        if let Some(door) = door {
            // "0" is whoever writes. Refused, it stays in our group, and is found by other means.
            libc::write(door, b"0".as_ptr().cast(), 1);
        }
        match session {
            Session::New => {
                check(libc::setsid())?;
            }
            Session::OwnGroup => {
                check(libc::setpgid(0, 0))?;
            }
        }
        if death == ParentDeath::Kill {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            // The parent may have died before the line above: then no signal will ever come.
            if libc::getppid() != parent {
                libc::_exit(ORPHANED_BEFORE_EXEC);
            }
        }
        // An ignored signal stays ignored over execve (nohup, or our own dispositions); the engine
        // is to find what a shell would give it.
        for signal in 1..=libc::SIGRTMAX() {
            // SIGKILL, SIGSTOP and the two that glibc keeps for itself refuse; nothing to do then.
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()))?;
        // No core of a process that maps hundreds of gigabytes, unless the limit was set on purpose
        // higher up; a soft limit of 0 can be raised by the engine itself.
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_CORE, &raw mut limit) == 0 {
            limit.rlim_cur = 0;
            libc::setrlimit(libc::RLIMIT_CORE, &raw const limit);
        }
        for &fd in keep {
            check(libc::fcntl(fd, libc::F_SETFD, 0))?;
        }
    }
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn shell(script: &str) -> Spec {
        let argv = ["/bin/sh", "-c", script].map(OsString::from).to_vec();
        let env = BTreeMap::from([("PATH".into(), "/usr/bin:/bin".into())]);
        Spec { stdout: Stream::Piped, on_parent_death: ParentDeath::Survive, ..Spec::quiet(argv, env) }
    }

    fn output(spec: Spec) -> String {
        let mut child = spec.spawn().expect("sh starts");
        let mut text = String::new();
        child.stdout.take().expect("piped").read_to_string(&mut text).expect("utf-8");
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child.pid), None).expect("our child");
        text
    }

    #[test]
    fn the_child_leads_a_session_of_its_own() {
        let text = output(shell("cut -d' ' -f1,5,6 /proc/self/stat; echo $$"));
        let numbers: Vec<&str> = text.split_whitespace().collect();
        assert_eq!(numbers[1], numbers[3], "process group is the shell's own: {text}");
        assert_eq!(numbers[2], numbers[3], "session is the shell's own: {text}");
    }

    #[test]
    fn no_signal_is_blocked_or_ignored_in_the_child() {
        let text = output(shell("grep -E '^Sig(Blk|Ign)' /proc/self/status"));
        for line in text.lines() {
            let (_, mask) = line.split_once(char::is_whitespace).or_else(|| line.split_once(':')).expect("a mask");
            let mask = u64::from_str_radix(mask.trim(), 16).expect("hexadecimal");
            // 32 and 33 are the C library's own: it lets nobody change them.
            assert_eq!(mask & !0x1_8000_0000, 0, "{text}");
        }
    }

    #[test]
    fn nothing_of_our_environment_is_inherited() {
        assert_eq!(output(shell("env | grep -vE '^(PWD|SHLVL|_|PATH|OLDPWD)='")), "");
    }

    #[test]
    fn a_missing_program_is_not_found() {
        let mut spec = shell("");
        spec.argv = vec!["/nonexistent/python".into()];
        assert_eq!(spec.spawn().expect_err("no such program").kind(), io::ErrorKind::NotFound);
    }
}
