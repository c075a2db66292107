//! How a fetch shows how far it is: bars on a terminal, a log line each 10 s elsewhere, JSON lines for a supervisor.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::time::Instant;

use crate::weights::{Pace, PlannedRepo, Progress, bytes};

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
pub fn plan(planned: &[PlannedRepo], json: bool) {
    if json {
        let plans: Vec<_> = planned.iter().map(|repo| &repo.plan).collect();
        println!("{}", serde_json::json!(plans));
        return;
    }
    for PlannedRepo { plan, .. } in planned {
        println!("{} {} = {}", plan.repo, plan.revision, plan.commit);
        for planned in &plan.files {
            println!("  {:<8} {:>11}  {}", planned.action.word(), bytes(planned.file.size), planned.file.name);
        }
        for name in &plan.skipped {
            println!("  {:<8} {:>11}  {name}", "skip", "");
        }
        let (all, fetch) = (plan.bytes_total(), plan.bytes_to_fetch());
        println!("  {} files, {}; {} to fetch", plan.files.len(), bytes(all), bytes(fetch));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_at_a_glance() {
        assert_eq!(duration(42), "42 s");
        assert_eq!(duration(62), "1 min 02 s");
        assert_eq!(duration(7260), "2 h 01 min");
    }
}
