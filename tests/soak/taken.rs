//! Memory, descriptors and threads of a process over time, and whether they grow.

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use super::MIB;

/// What a process holds at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    /// Resident memory in bytes.
    pub resident: u64,
    /// Without what is mapped from files, whose pages come in as they are first used.
    pub own: u64,
    pub descriptors: u64,
    pub threads: u64,
}

impl Taken {
    pub fn by(pid: i32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let number = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        Self {
            resident: number("VmRSS:") * 1024,
            own: number("RssAnon:") * 1024,
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64,
            threads: number("Threads:"),
        }
    }

    fn most(self, other: Self) -> Self {
        Self {
            resident: self.resident.max(other.resident),
            own: self.own.max(other.own),
            descriptors: self.descriptors.max(other.descriptors),
            threads: self.threads.max(other.threads),
        }
    }

    fn shown(self) -> String {
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        format!(
            "{:>6.1} MiB ({:>5.1} of its own), {:>4} descriptors, {:>2} threads",
            mib(self.resident),
            mib(self.own),
            self.descriptors,
            self.threads
        )
    }
}

/// Looks at the supervisor and the proxy, in the order of time.
#[derive(Debug, Default)]
pub struct Samples(Vec<(Duration, [Taken; 2])>);

const NAMES: [&str; 2] = ["supervisor", "proxy"];

impl Samples {
    pub fn add(&mut self, at: Duration, supervisor: Taken, proxy: Taken) {
        self.0.push((at, [supervisor, proxy]));
    }

    /// The most that each took between two times.
    fn most(&self, from: Duration, to: Duration) -> [Taken; 2] {
        let within = self.0.iter().filter(|(at, _)| (from..=to).contains(at));
        within.fold([Taken::default(); 2], |most, (_, now)| [most[0].most(now[0]), most[1].most(now[1])])
    }

    /// The first part is for growing into the load: its most is what the last part is held against.
    fn parts(&self, length: Duration) -> [[Taken; 2]; 2] {
        let part = (length / 4).min(Duration::from_mins(5));
        [self.most(Duration::ZERO, part), self.most(length.saturating_sub(part), length + part)]
    }

    pub fn shown(&self, at_rest: (Taken, Taken)) -> String {
        let length = self.0.last().map_or(Duration::ZERO, |(at, _)| *at);
        let [first, last] = self.parts(length);
        let mut out = String::new();
        for (n, name) in NAMES.iter().enumerate() {
            let rest = [at_rest.0, at_rest.1][n];
            let _ = writeln!(out, "  {name:<10} at rest        {}", rest.shown());
            let _ = writeln!(out, "  {name:<10} at first, most {}", first[n].shown());
            let _ = writeln!(out, "  {name:<10} at last, most  {}", last[n].shown());
        }
        out
    }

    /// At the end no more than at the beginning, but for what a heap that is cut up differently takes.
    pub fn are_bounded(&self, length: Duration) {
        let [first, last] = self.parts(length);
        for (n, name) in NAMES.iter().enumerate() {
            let (first, last) = (first[n], last[n]);
            assert!(last.own <= first.own + first.own / 4 + 2 * MIB, "{name}: memory grew: {first:?} then {last:?}");
            // A flood may be seen in one part and not in the other; what is left afterwards is asked by the soak itself.
            assert!(last.descriptors <= first.descriptors + 128, "{name}: descriptors: {first:?} then {last:?}");
            assert!(last.threads <= first.threads + 2, "{name}: threads: {first:?} then {last:?}");
        }
    }
}

#[test]
fn growth_without_end_is_found() {
    let mut samples = Samples::default();
    for minute in 0..=30 {
        let proxy = Taken { resident: 0, own: (10 + minute) * MIB, descriptors: 20, threads: 4 };
        samples.add(Duration::from_mins(minute), Taken::default(), proxy);
    }
    let bounded = std::panic::catch_unwind(|| samples.are_bounded(Duration::from_mins(30)));
    assert!(bounded.is_err(), "twenty megabytes more in half an hour");
}
