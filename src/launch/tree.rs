//! Finds every process of one engine, wherever it went, and ends it.
//!
//! A process belongs to the engine if it is in the engine's cgroup or session, descends from a member, or
//! carries the launch's mark in its environment: a grandchild that calls `setsid` and forks twice
//! leaves the session and its parent, but not its environment (sglang#23627, vllm#55510), and never its
//! cgroup.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::killpg;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::sys::cgroup::Cgroup;
use crate::sys::proc::{self, Stat};

/// The environment variable that marks every process of a launch.
pub const MARK: &str = "SGLANGD_LAUNCH_ID";

/// Between two looks at the process table while something still lives.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What identifies an engine's processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// Value of [`MARK`].
    pub launch_id: String,
    /// The main process, which leads the session; none before it is started.
    pub leader: Option<Leader>,
    /// The engine's own cgroup, where it has one.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leader {
    pub pid: i32,
    pub start_time: u64,
}

/// Who is not to be counted although it descends from us: proxy, guard, fetcher.
pub type Ours = BTreeSet<i32>;

impl Tree {
    /// All live members (zombies are dead: only their parent has to collect them).
    pub fn members(&self) -> Vec<Stat> {
        let inside = self.group().map(|group| group.processes()).unwrap_or_default();
        if !proc::is_there() {
            return self.blind(inside);
        }
        self.find(&proc::all(), &inside, proc::has_env)
    }

    /// The engine's own cgroup; never one that we are in ourselves, whatever a record says.
    pub fn group(&self) -> Option<Cgroup> {
        let path = self.cgroup.as_ref()?;
        let ours = path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(&self.launch_id));
        let group = Cgroup::at(path.clone());
        let own = i32::try_from(std::process::id()).unwrap_or(-1);
        (ours && !group.holds(own)).then_some(group)
    }

    /// Without `/proc`: who is in the cgroup, or whether anybody is in the main process's group. What left
    /// both is not found.
    fn blind(&self, inside: Vec<i32>) -> Vec<Stat> {
        let unseen = |pid| Stat { pid, comm: "?".into(), state: '?', ppid: 0, pgid: 0, sid: 0, start_time: 0 };
        let mut found: Vec<Stat> = inside.into_iter().map(unseen).collect();
        if let Some(leader) = self.leader
            && found.is_empty()
            && killpg(nix::unistd::Pid::from_raw(leader.pid), None).is_ok()
        {
            found.push(unseen(leader.pid));
        }
        found
    }

    fn find(&self, all: &[Stat], inside: &[i32], has_mark: impl Fn(i32, &[u8]) -> bool) -> Vec<Stat> {
        let own = i32::try_from(std::process::id()).unwrap_or(-1);
        let mark = format!("{MARK}={}", self.launch_id).into_bytes();
        let session = self.leader.filter(|leader| {
            // A session's number is not reused while it has members; once it is empty, its leader's
            // pid may belong to a stranger, who then leads another session of that number.
            all.iter().find(|p| p.pid == leader.pid).is_none_or(|p| p.start_time == leader.start_time)
        });
        let mut found: BTreeSet<i32> = BTreeSet::new();
        for process in all.iter().filter(|p| p.pid != own) {
            let in_session = session.is_some_and(|l| process.sid == l.pid && process.start_time >= l.start_time);
            let in_group = inside.contains(&process.pid);
            if in_group || in_session || (!process.is_zombie() && has_mark(process.pid, &mark)) {
                found.insert(process.pid);
            }
        }
        // Descendants of members, level by level; the table is a snapshot, so this ends.
        loop {
            let more: Vec<i32> = all
                .iter()
                .filter(|p| p.pid != own && found.contains(&p.ppid) && !found.contains(&p.pid))
                .map(|p| p.pid)
                .collect();
            if more.is_empty() {
                break;
            }
            found.extend(more);
        }
        all.iter().filter(|p| found.contains(&p.pid) && !p.is_zombie()).cloned().collect()
    }

    /// Who listens on this address in the engine's place; `None` where it is the engine, or nobody, or
    /// somebody that cannot be seen. The port is held for the engine, but anybody who sets
    /// `SO_REUSEADDR` may listen on it first, and answer 200 to everything.
    pub fn stranger_on(&self, addr: SocketAddr) -> Option<Stat> {
        let listeners = proc::listeners(addr.port(), |ip| ip == addr.ip() || ip.is_unspecified());
        if listeners.is_empty() {
            return None;
        }
        let members: BTreeSet<i32> = self.members().iter().map(|member| member.pid).collect();
        let engines = listeners.iter().any(|listener| members.contains(&listener.pid));
        (!engines).then(|| listeners.into_iter().next()).flatten()
    }

    /// SIGKILL to every member, again and again until none is left or the time is over.
    /// Returns those that are still there: nobody, or processes stuck in the kernel.
    pub async fn kill(&self, limit: Duration) -> Vec<Stat> {
        let end = Instant::now() + limit;
        loop {
            match self.kill_once(end) {
                Round::Over(left) => return left,
                Round::Again => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    }

    /// The same for a process without a runtime (the guard, the next start).
    pub fn kill_blocking(&self, limit: Duration) -> Vec<Stat> {
        let end = Instant::now() + limit;
        loop {
            match self.kill_once(end) {
                Round::Over(left) => return left,
                #[allow(clippy::disallowed_methods)] // one thread, no runtime, nothing to block
                Round::Again => std::thread::sleep(LOOK_AGAIN),
            }
        }
    }

    /// Nobody is left: neither is the cgroup.
    pub fn tidy(&self) {
        if let Some(group) = self.group() {
            group.remove();
        }
    }

    fn kill_once(&self, end: Instant) -> Round {
        let members = self.members();
        if members.is_empty() || Instant::now() >= end {
            return Round::Over(members);
        }
        if let Some(group) = self.group() {
            // Refused or gone: they are killed one by one below.
            let _ = group.kill();
        }
        if !proc::is_there() {
            // By group, as nothing says whose a pid is; the leader's is not reused while the group has members.
            if let Some(leader) = self.leader {
                let _ = killpg(nix::unistd::Pid::from_raw(leader.pid), nix::sys::signal::Signal::SIGKILL);
            }
            return Round::Again;
        }
        for member in &members {
            // Gone meanwhile, or a pid that is somebody else's now: both are none of our business.
            if let Some(handle) = proc::open(member.pid, member.start_time) {
                let _ = proc::signal(handle, Signal::KILL);
            }
        }
        Round::Again
    }
}

/// What one SIGKILL to all came to.
enum Round {
    /// Those that are still there although the time is over; nobody, if all went well.
    Over(Vec<Stat>),
    Again,
}

/// "pid 4711 (sglang::schedul, state D)", for messages.
pub fn names(members: &[Stat]) -> String {
    let names: Vec<String> = members.iter().map(|m| format!("pid {} ({}, state {})", m.pid, m.comm, m.state)).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, ppid: i32, sid: i32, start_time: u64) -> Stat {
        Stat { pid, comm: "x".into(), state: 'S', ppid, pgid: sid, sid, start_time }
    }

    fn tree() -> Tree {
        Tree { launch_id: "a1".into(), leader: Some(Leader { pid: 100, start_time: 50 }), cgroup: None }
    }

    fn pids(found: &[Stat]) -> Vec<i32> {
        found.iter().map(|p| p.pid).collect()
    }

    #[test]
    fn the_session_and_its_descendants_belong_to_it() {
        let all =
            [process(1, 0, 1, 0), process(100, 1, 100, 50), process(101, 100, 100, 60), process(102, 101, 102, 70)];
        assert_eq!(pids(&tree().find(&all, &[], |_, _| false)), [100, 101, 102]);
    }

    #[test]
    fn one_that_left_session_and_parent_is_known_by_its_mark() {
        let all = [process(1, 0, 1, 0), process(200, 1, 200, 80), process(201, 200, 200, 81), process(300, 1, 300, 10)];
        assert_eq!(
            pids(&tree().find(&all, &[], |pid, mark| pid == 200 && mark == b"SGLANGD_LAUNCH_ID=a1")),
            [200, 201]
        );
    }

    #[test]
    fn one_that_left_all_but_its_cgroup_is_known_by_that() {
        let all = [process(1, 0, 1, 0), process(200, 1, 200, 80), process(201, 200, 201, 81), process(300, 1, 300, 10)];
        assert_eq!(pids(&tree().find(&all, &[200], |_, _| false)), [200, 201]);
    }

    #[test]
    fn a_record_that_names_somebody_elses_cgroup_is_not_believed() {
        let named = |path: &str| Tree { cgroup: Some(path.into()), ..tree() }.group().is_some();
        assert!(named("/sys/fs/cgroup/none/sglangd-engine-a1"));
        assert!(!named("/sys/fs/cgroup/system.slice"));
    }

    #[test]
    fn a_stranger_with_the_dead_leaders_pid_is_left_alone() {
        let all = [process(1, 0, 1, 0), process(100, 1, 100, 999), process(101, 100, 100, 1000)];
        assert_eq!(pids(&tree().find(&all, &[], |_, _| false)), Vec::<i32>::new());
    }

    #[test]
    fn orphans_of_a_dead_leader_are_found_by_their_session() {
        let all = [process(1, 0, 1, 0), process(101, 1, 100, 60)];
        assert_eq!(pids(&tree().find(&all, &[], |_, _| false)), [101]);
    }

    #[test]
    fn zombies_are_dead() {
        let mut dead = process(101, 1, 100, 60);
        dead.state = 'Z';
        assert!(tree().find(&[dead], &[], |_, _| true).is_empty());
    }

    /// A session leader that sleeps, as an engine's main process leads one.
    fn sleeper() -> std::process::Child {
        std::process::Command::new("setsid").args(["sleep", "86394"]).spawn().expect("setsid")
    }

    #[test]
    fn g19_only_the_process_of_that_start_is_ended_and_never_another_one_of_its_pid() {
        let mut child = sleeper();
        let pid = i32::try_from(child.id()).expect("a pid");
        let start_time = loop {
            // Until it has become the leader of its session.
            if let Some(stat) = proc::stat(pid).filter(|stat| stat.sid == pid) {
                break stat.start_time;
            }
        };
        let of =
            |start_time| Tree { launch_id: "g19g19".into(), leader: Some(Leader { pid, start_time }), cgroup: None };
        assert_eq!(of(start_time - 1).kill_blocking(Duration::from_secs(5)), [], "nobody of that start lives");
        assert!(child.try_wait().expect("ours").is_none(), "another process of its pid was ended");
        assert!(proc::open(pid, start_time - 1).is_none());
        let handle = proc::open(pid, start_time).expect("this one");
        assert_eq!(of(start_time).kill_blocking(Duration::from_secs(5)), []);
        child.wait().expect("ours");
        let late = proc::signal(&handle, Signal::KILL).expect_err("whoever has the pid now is not meant");
        assert_eq!(late.raw_os_error(), Some(nix::libc::ESRCH));
    }
}
