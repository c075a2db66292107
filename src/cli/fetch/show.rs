//! How a fetch shows how far it is: bars on a terminal, a log line each 10 s elsewhere, JSON lines for a supervisor.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::time::Instant;

use crate::weights::plan::{FetchPlan, Hash, PlannedFile};
use crate::weights::{Pace, PlannedRepo, Progress, Space, bytes};

/// Between two log lines.
const LOG_EACH: Duration = Duration::from_secs(10);
/// How long a reader of `--progress-fd` may sleep before the last words are dropped.
const LAST_WORDS: u16 = 5000;

/// Where progress goes.
#[derive(Debug)]
pub struct Show {
    face: Face,
    pipe: Option<File>,
}

#[derive(Debug)]
enum Face {
    Bars(Box<Bars>),
    Log { next: Option<Instant> },
}

#[derive(Debug)]
struct Bars {
    all: MultiProgress,
    total: ProgressBar,
    files: HashMap<String, ProgressBar>,
}

impl Show {
    pub fn new(progress_fd: Option<u32>) -> std::io::Result<Self> {
        let pipe = progress_fd.map(open).transpose()?;
        let face =
            if std::io::stderr().is_terminal() { Face::Bars(Box::new(Bars::new())) } else { Face::Log { next: None } };
        Ok(Self { face, pipe })
    }

    /// Lines between bars would tear them.
    pub fn log_level(&self) -> &'static str {
        match self.face {
            Face::Bars(_) => "warn",
            Face::Log { .. } => "info",
        }
    }

    pub fn progress(&mut self, progress: Progress) {
        match &mut self.face {
            Face::Bars(bars) => bars.show(&progress),
            Face::Log { next } => log(&progress, next),
        }
        if let Some(pipe) = &mut self.pipe {
            tell(pipe, progress);
        }
    }

    /// Whether a supervisor says how it ended.
    pub fn tells_a_supervisor(&self) -> bool {
        self.pipe.is_some()
    }

    /// Takes the bars off the screen.
    pub fn clear(&mut self) {
        if let Face::Bars(bars) = &self.face {
            // A terminal that is gone shows nothing anyway.
            let _ = bars.all.clear();
        }
    }
}

/// Opened anew through /proc: a description of its own, so that not blocking here blocks nobody else less.
fn open(fd: u32) -> std::io::Result<File> {
    OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(format!("/proc/self/fd/{fd}"))
}

/// One JSON line. A reader that sleeps loses figures, which the next line repeats, but not the beginning and the end.
fn tell(pipe: &mut File, mut progress: Progress) {
    let passing = match &mut progress {
        Progress::Bytes { files, .. } => {
            // A line beyond PIPE_BUF could be torn by a full pipe.
            files.truncate(8);
            true
        }
        Progress::Verifying { .. } | Progress::Waiting { .. } => true,
        Progress::Plan { .. } | Progress::Done { .. } | Progress::Failed { .. } => false,
    };
    let Ok(mut line) = serde_json::to_vec(&progress) else { return };
    line.push(b'\n');
    if passing && line.len() > libc::PIPE_BUF {
        return;
    }
    let mut rest = &line[..];
    while !rest.is_empty() {
        match pipe.write(rest) {
            Ok(written) => rest = &rest[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock && !passing => {
                let mut ready = [PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)];
                if !matches!(poll(&mut ready, PollTimeout::from(LAST_WORDS)), Ok(n) if n > 0) {
                    return;
                }
            }
            // Full, or nobody reads any more: the fetch itself goes on.
            Err(_) => return,
        }
    }
}

fn log(progress: &Progress, next: &mut Option<Instant>) {
    let now = Instant::now();
    let mut due = || {
        let due = next.is_none_or(|at| now >= at);
        if due {
            *next = Some(now + LOG_EACH);
        }
        due
    };
    match progress {
        Progress::Plan { files, bytes_total, bytes_present } => {
            let fetch = bytes_total.saturating_sub(*bytes_present);
            tracing::info!(files, total = bytes(*bytes_total), to_fetch = bytes(fetch), "planned");
            *next = Some(now + LOG_EACH);
        }
        Progress::Bytes { done, total, rate_bytes_per_s, eta_seconds, pace, .. } => {
            if due() {
                let percent = percent(*done, *total);
                let rate = format!("{}/s", bytes(*rate_bytes_per_s));
                let eta = eta_seconds.map_or_else(|| "unknown".to_owned(), duration);
                let state = if *pace == Pace::Stalled { "stalled" } else { "fetching" };
                tracing::info!(percent, done = bytes(*done), total = bytes(*total), rate, eta, "{state}");
            }
        }
        Progress::Verifying { done, total, file } => {
            if due() {
                tracing::info!(percent = percent(*done, *total), file, "verifying what is there");
            }
        }
        Progress::Waiting { file, holder } => {
            tracing::info!(file, holder, "waiting: another process fetches this file");
        }

        Progress::Done { snapshots } => {
            for snapshot in snapshots {
                tracing::info!(repo = snapshot.repo, commit = snapshot.commit, "complete and verified");
            }
        }
        Progress::Failed { .. } => {}
    }
}

fn percent(done: u64, total: u64) -> u64 {
    done.saturating_mul(100).checked_div(total).unwrap_or(100)
}

fn duration(seconds: u64) -> String {
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds} s"),
        (0, _) => format!("{minutes} min {seconds:02} s"),
        _ => format!("{hours} h {minutes:02} min"),
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::new();
        let total = all.add(ProgressBar::new(0));
        total.set_style(style("{msg:32!} [{bar:28}] {bytes:>11}/{total_bytes:<11} {prefix}"));
        total.set_message("total");
        Self { all, total, files: HashMap::new() }
    }

    fn show(&mut self, progress: &Progress) {
        match progress {
            Progress::Plan { bytes_total, bytes_present, .. } => {
                self.total.set_length(*bytes_total);
                self.total.set_position(*bytes_present);
            }
            Progress::Bytes { done, total, rate_bytes_per_s, eta_seconds, pace, files } => {
                self.total.set_length(*total);
                self.total.set_position(*done);
                self.total.set_prefix(match (pace, eta_seconds) {
                    (Pace::Stalled, _) => "stalled".to_owned(),
                    (Pace::Moving, Some(eta)) => format!("{}/s, {} left", bytes(*rate_bytes_per_s), duration(*eta)),
                    (Pace::Moving, None) => String::new(),
                });
                self.files.retain(|name, bar| {
                    let stays = files.iter().any(|file| file.name == *name);
                    if !stays {
                        bar.finish_and_clear();
                    }
                    stays
                });
                for file in files {
                    let (all, total) = (&self.all, &self.total);
                    let bar = self.files.entry(file.name.clone()).or_insert_with(|| {
                        let bar = all.insert_before(total, ProgressBar::new(file.total));
                        bar.set_style(style("{msg:32!} [{bar:28}] {bytes:>11}/{total_bytes:<11}"));
                        bar.set_message(file.name.clone());
                        bar
                    });
                    bar.set_position(file.done);
                }
            }
            Progress::Verifying { done, total, .. } => {
                self.total.set_prefix(format!("verifying what is there, {} %", percent(*done, *total)));
            }
            Progress::Waiting { file, holder } => self.total.set_prefix(format!("{file}: waiting for {holder}")),
            Progress::Done { .. } | Progress::Failed { .. } => self.total.finish_and_clear(),
        }
    }
}

/// What `--plan` prints.
pub fn plan(planned: &[PlannedRepo], space: &Space, json: bool) {
    let plans: Vec<&FetchPlan> = planned.iter().map(|repo| &repo.plan).collect();
    if json {
        println!("{}", plan_json(&plans, space));
    } else {
        print!("{}", plan_text(&plans, space));
    }
}

fn plan_json(plans: &[&FetchPlan], space: &Space) -> serde_json::Value {
    let repositories = plans.iter().map(|plan| {
        let mut shown = serde_json::json!(plan);
        shown["bytes_total"] = plan.bytes_total().into();
        shown["bytes_to_fetch"] = plan.bytes_to_fetch().into();
        shown["code"] = plan.code().map(|f| f.file.name.as_str()).collect();
        shown
    });
    serde_json::json!({ "repositories": repositories.collect::<Vec<_>>(), "space": space })
}

fn plan_text(plans: &[&FetchPlan], space: &Space) -> String {
    let mut text = String::new();
    for plan in plans {
        let _ = writeln!(text, "{} {} = {}", plan.repo, plan.revision, plan.commit);
        for PlannedFile { file, action } in &plan.files {
            let hash = match &file.hash {
                Hash::Sha256(hex) => format!("sha256:{}", short(hex)),
                Hash::GitBlob(hex) => format!("git:{}", short(hex)),
                Hash::Unknown => "-".to_owned(),
            };
            let _ = writeln!(text, "  {:<8} {:>11}  {hash:<19}  {}", action.word(), bytes(file.size), file.name);
        }
        for name in &plan.skipped {
            let _ = writeln!(text, "  {:<8} {:>11}  {:<19}  {name}", "skip", "", "");
        }
        let code: Vec<&str> = plan.code().map(|planned| planned.file.name.as_str()).collect();
        if !code.is_empty() {
            let _ =
                writeln!(text, "  programs of this commit, run only where the engine trusts them: {}", code.join(", "));
        }
        let (all, fetch) = (plan.bytes_total(), plan.bytes_to_fetch());
        let there = if fetch == 0 { "all there".to_owned() } else { format!("{} to fetch", bytes(fetch)) };
        let _ = writeln!(text, "  {} files, {}; {there}", plan.files.len(), bytes(all));
    }
    if space.needed > 0 {
        let _ =
            writeln!(text, "{} needed, {} free in {}", bytes(space.needed), bytes(space.free), space.folder.display());
    }
    text
}

/// Enough of a hash to tell files apart by eye; `--json` has the whole.
fn short(hex: &str) -> &str {
    hex.get(..12).unwrap_or(hex)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::plan::{Action, RemoteFile, Transport};

    #[test]
    fn h18_a_plan_names_hashes_what_is_skipped_and_the_repositorys_own_programs() {
        let hash = Hash::Sha256("ab12".repeat(16));
        let file = |name: &str, hash, action| PlannedFile {
            file: RemoteFile { name: name.into(), size: 3 << 20, hash, transport: Transport::Http },
            action,
        };
        let plan = FetchPlan {
            repo: "a/b".into(),
            revision: "main".into(),
            commit: "5f0b02c75b57c5855da9ae460ce51323ea669d8a".into(),
            files: vec![
                file("encoding/enc.py", Hash::GitBlob("cd".repeat(20)), Action::Keep),
                file("model.safetensors", hash, Action::Fetch { from: 1 << 20 }),
            ],
            skipped: vec!["pytorch_model.bin".into()],
        };
        let space = Space { folder: "/cache".into(), needed: 66 << 20, free: 9 << 30, repo: String::new() };
        insta::assert_snapshot!(plan_text(&[&plan], &space), @r"
        a/b main = 5f0b02c75b57c5855da9ae460ce51323ea669d8a
          keep         3.0 MiB  git:cdcdcdcdcdcd     encoding/enc.py
          continue     3.0 MiB  sha256:ab12ab12ab12  model.safetensors
          skip                                       pytorch_model.bin
          programs of this commit, run only where the engine trusts them: encoding/enc.py
          2 files, 6.0 MiB; 2.0 MiB to fetch
        66.0 MiB needed, 9.0 GiB free in /cache
        ");
        let json = plan_json(&[&plan], &space);
        assert_eq!(json["repositories"][0]["code"], serde_json::json!(["encoding/enc.py"]));
        assert_eq!(json["repositories"][0]["bytes_to_fetch"], 2 << 20);
        assert_eq!(json["space"]["free"], 9_u64 << 30);
    }

    #[test]
    fn durations_are_read_at_a_glance() {
        assert_eq!(duration(42), "42 s");
        assert_eq!(duration(62), "1 min 02 s");
        assert_eq!(duration(7260), "2 h 01 min");
    }
}
