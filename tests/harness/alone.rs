//! The data plane alone, as a process of its own: what it takes can be measured from outside.

use std::fs;
use std::net::SocketAddr;
use std::process::{Child, Command};
use std::time::Duration;

use super::front::eventually;

/// `sglangd proxy` as a process; killed at the test's end.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    pub fn start(args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sglangd"));
        Self(command.arg("proxy").args(args).spawn().unwrap())
    }

    /// The data plane alone, on a port of the kernel's choice that was free a moment ago.
    pub fn alone(engine: SocketAddr, more: &[&str]) -> (Self, SocketAddr) {
        Self::of(Command::new(env!("CARGO_BIN_EXE_sglangd")), engine, more)
    }

    /// The same, with so many descriptors and no way to more.
    pub fn with_descriptors(count: usize, engine: SocketAddr, more: &[&str]) -> (Self, SocketAddr) {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("ulimit -n {count} && exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_sglangd")]);
        Self::of(shell, engine, more)
    }

    fn of(mut command: Command, engine: SocketAddr, more: &[&str]) -> (Self, SocketAddr) {
        let addr = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (listen, upstream) = (addr.to_string(), format!("http://{engine}"));
        // Scripts of fake engines expect the test's requests and no questions about their load.
        let fixed = ["--listen", &listen, "--upstream", &upstream, "--set", "limits.sizing=fixed"];
        let process = Self(command.arg("proxy").args(fixed).args(more).spawn().unwrap());
        eventually("the proxy listens", || std::net::TcpStream::connect(addr).is_ok());
        (process, addr)
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Resident memory in bytes, without what is only mapped from files: a program's own pages come in
    /// as they are first used.
    pub fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    }

    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.0.id())).unwrap().count()
    }

    /// Time on a processor so far, of all threads.
    pub fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        // The name in parentheses may hold anything; user and system time are 12th and 13th behind it.
        let ticks = stat.rsplit_once(") ").unwrap().1.split(' ').skip(11).take(2);
        Duration::from_millis(10 * ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum::<u64>())
    }
}
