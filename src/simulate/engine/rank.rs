//! The engine's children: schedulers (one a rank) and the detokenizer.
//!
//! A child is born with Python's command line and without a parent-death signal; only after its
//! imports does it take its title and arm the signal (sglang's `common.py` does so too, without a look
//! whether its parent still lives). What is killed in between leaves orphans. That window is why the
//! supervisor ends whole trees and never trusts a launcher to.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::knobs::{Fault, Knobs};
use super::{Ended, logline, model};

pub const ROLE: &str = "::rank";

/// What Python shows of a child until it has imported everything.
const SPAWNING: &str = "python3 -B -c from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=6, pipe_handle=8) --multiprocessing-fork";

/// Sent up once a child is ready, and as the answer to each step.
const DONE: u8 = b'.';
/// Sent down: do one forward step.
const STEP: u8 = b's';
/// Sent down: leave (`ShutdownReq`).
const LEAVE: u8 = b'q';
/// Sent down: raise an exception now.
const RAISE: u8 = b'x';

/// What a child is told on its command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Scheduler { rank: u32, of: u32 },
    Detokenizer,
}

impl Kind {
    /// As in the process title.
    pub fn title(self) -> String {
        match self {
            Self::Scheduler { of: 1, .. } => "sglang::scheduler".into(),
            Self::Scheduler { rank, .. } => format!("sglang::scheduler_TP{rank}"),
            Self::Detokenizer => "sglang::detokenizer".into(),
        }
    }

    /// As in the watchdog's line.
    pub fn name(self) -> String {
        match self {
            Self::Scheduler { rank, .. } => format!("scheduler_{rank}"),
            Self::Detokenizer => "detokenizer".into(),
        }
    }

    /// The rank in log lines; with one rank there is none.
    fn log_rank(self) -> Option<u32> {
        match self {
            Self::Scheduler { rank, of } if of > 1 => Some(rank),
            _ => None,
        }
    }
}

/// A child as its parent holds it.
#[derive(Debug)]
pub struct Started {
    pub kind: Kind,
    pub child: Child,
}

/// The pipe between a child and its parent.
#[derive(Debug)]
pub struct Link {
    pub pid: Pid,
    stream: UnixStream,
}

/// Forks from the calling thread, which must live as long as the child: the parent-death signal is
/// the thread's. Inside a runtime.
pub fn spawn(kind: Kind, model: &str, weights: Weights, knobs: &Knobs) -> io::Result<(Started, Link)> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut command = Command::new(super::own_program()?);
    command.arg0(SPAWNING).args(["simulate", ROLE, "importing"]);
    let (rank, of) = match kind {
        Kind::Scheduler { rank, of } => (rank.to_string(), of.to_string()),
        Kind::Detokenizer => ("detokenizer".to_owned(), "0".to_owned()),
    };
    command.args([rank.as_str(), of.as_str(), model, if weights == Weights::Dummy { DUMMY } else { "auto" }]);
    command.stdin(OwnedFd::from(theirs));
    if knobs.has(Fault::CloseStdio) {
        command.stdout(Stdio::null()).stderr(Stdio::null());
    }
    let child = command.spawn()?;
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    Ok((Started { kind, child }, Link { pid, stream: UnixStream::from_std(ours)? }))
}

/// `--load-format dummy` reads no weight file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    Files,
    Dummy,
}

const DUMMY: &str = "dummy";

impl Link {
    /// Waits for "loaded"; an error when the child went first.
    pub async fn loaded(&mut self) -> io::Result<()> {
        let mut byte = [0u8];
        self.stream.read_exact(&mut byte).await.map(|_| ())
    }

    pub async fn begin(&mut self) {
        let _ = self.stream.write_all(&[STEP]).await;
    }

    /// Waits for the step's end: for ever, when the child is stopped or gone. (Who notices a dead
    /// child is the watchdog, as in the real engine.)
    pub async fn end(&mut self) {
        if self.loaded().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    pub async fn leave(&mut self) {
        let _ = self.stream.write_all(&[LEAVE]).await;
    }

    pub async fn raise(&mut self) {
        let _ = self.stream.write_all(&[RAISE]).await;
    }
}

pub fn run(words: &[String], knobs: &Knobs) -> Ended {
    let [stage, rank, of, model, format] = words else { return Ended::Code(64) };
    let kind = match (rank.parse(), of.parse()) {
        (Ok(rank), Ok(of)) => Kind::Scheduler { rank, of },
        _ => Kind::Detokenizer,
    };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Ended::Code(70);
    };
    if stage == "importing" {
        runtime.block_on(async { tokio::time::sleep(knobs.import_window()).await });
        drop(runtime);
        let Ok(own) = super::own_program() else { return Ended::Code(70) };
        let error =
            Command::new(own).arg0(kind.title()).args(["simulate", ROLE, "imported", rank, of, model, format]).exec();
        logline::raw(&format!("simulated engine: cannot exec itself: {error}\n"));
        return Ended::Code(70);
    }
    if let Ok(name) = CString::new(kind.title()) {
        let _ = prctl::set_name(&name);
    }
    let _ = prctl::set_pdeathsig(Signal::SIGKILL);
    // Read now and used later, as psutil's `parent()` is: an orphan has whoever adopted it.
    let parent = getppid();
    let weights = if format == DUMMY { Weights::Dummy } else { Weights::Files };
    runtime.block_on(live(kind, parent, model, weights, knobs))
}

async fn live(kind: Kind, parent: Pid, model: &str, weights: Weights, knobs: &Knobs) -> Ended {
    let link = io::stdin().as_fd().try_clone_to_owned().map(StdUnixStream::from).and_then(|link| {
        link.set_nonblocking(true)?;
        UnixStream::from_std(link)
    });
    let Ok(mut link) = link else { return Ended::Code(70) };
    if matches!(kind, Kind::Scheduler { .. }) {
        if let Err(what) = load(kind, std::path::Path::new(model), weights, knobs).await {
            return raise(kind, parent, &what).await;
        }
        if let Kind::Scheduler { rank: 0, .. } = kind
            && knobs.has(Fault::OrphanSetsid)
        {
            super::strays::release();
        }
    }
    if link.write_all(&[DONE]).await.is_err() {
        return match kind {
            // Measured: the orphaned scheduler fails to report, signals whoever is its parent by
            // now, and leaves with status 0; the detokenizer stays for ever.
            Kind::Scheduler { .. } => {
                quit(parent);
                tokio::time::sleep(Duration::from_secs(3)).await;
                Ended::Code(0)
            }
            Kind::Detokenizer => std::future::pending().await,
        };
    }
    let mut byte = [0u8];
    loop {
        match link.read_exact(&mut byte).await {
            Ok(_) if byte[0] == STEP => {
                if link.write_all(&[DONE]).await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            Ok(_) if byte[0] == RAISE => {
                let what = "RuntimeError: CUDA error: an illegal memory access was encountered";
                return raise(kind, parent, what).await;
            }
            Ok(_) => return Ended::Code(0),
            // The parent is gone; the parent-death signal ends this process where it was armed.
            Err(_) => std::future::pending::<()>().await,
        }
    }
}

/// SIGQUIT to whoever is the parent, if that is an sglangd: the engine, or the supervisor that adopted
/// an orphan. The real one signals anybody; here it would hit a developer's session manager.
fn quit(parent: Pid) {
    let same = std::fs::read_link(format!("/proc/{parent}/exe")).ok() == super::own_program().ok();
    if same {
        let _ = kill(parent, Signal::SIGQUIT);
    }
}

/// What every child does with an exception: the traceback, then SIGQUIT to the parent, who ends all.
async fn raise(kind: Kind, parent: Pid, what: &str) -> Ended {
    let frames = "  File \"sglang/srt/managers/scheduler.py\", line 6368, in run_scheduler_process\n    \
                  scheduler.run_event_loop()";
    logline::say(
        kind.log_rank(),
        format!("Scheduler hit an exception: Traceback (most recent call last):\n{frames}\n{what}\n"),
    );
    quit(parent);
    tokio::time::sleep(Duration::from_secs(3)).await;
    Ended::Code(0)
}

/// The long part of a start, with the lines by which its progress is read.
async fn load(kind: Kind, folder: &std::path::Path, weights: Weights, knobs: &Knobs) -> Result<(), String> {
    let rank = kind.log_rank();
    let first = matches!(kind, Kind::Scheduler { rank: 0, .. });
    let say = |message: String| logline::say(rank, message);
    let pause = |percent| tokio::time::sleep(knobs.share(percent));
    say("Init parallel begin.".into());
    pause(5).await;
    say(format!("Init parallel ends. elapsed={:.2} s", knobs.share(5).as_secs_f64()));
    say("Load weight begin. avail mem=177.61 GB".into());
    if knobs.has(Fault::HangAtLoad) {
        std::future::pending::<()>().await;
    }
    if weights == Weights::Dummy {
        pause(30).await;
    } else {
        let files = model::shards(folder)?.0;
        let bar = |done: usize| {
            let total = files.len();
            let bar = format!("\rMulti-thread loading shards: {:3}% Completed | {done}/{total} ", done * 100 / total);
            let figures = if done == 0 { "[00:00<?, ?it/s]" } else { "[00:01<00:01,  2.40it/s]" };
            if first {
                logline::raw(&format!("{bar}{figures}"));
            }
        };
        bar(0);
        for (n, file) in files.iter().enumerate() {
            model::open_shard(file)?;
            tokio::time::sleep(knobs.share(30) / files.len() as u32).await;
            bar(n + 1);
        }
        if first {
            logline::raw("\n");
        }
    }
    if knobs.has(Fault::CudaOom) && first {
        return Err("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 178.35 GiB of which 1.20 GiB is free.".into());
    }
    say(format!(
        "Load weight end. elapsed={:.2} s, type={}, avail mem=80.11 GB, mem usage=97.50 GB.",
        knobs.share(30).as_secs_f64(),
        model::architecture(folder)
    ));
    pause(3).await;
    say("KV Cache is allocated. dtype: torch.bfloat16, #tokens: 65536, K size: 23.52 GB, V size: 23.52 GB".into());
    say("Memory pool end. avail mem=31.20 GB".into());
    graphs(rank, first, knobs).await;
    if first {
        let tokens = knobs.kv_tokens;
        say(format!(
            "max_total_num_tokens={tokens}, chunked_prefill_size=4096, max_prefill_tokens=16384, max_running_requests=32, context_len=32768, available_gpu_mem=29.96 GB"
        ));
    }
    Ok(())
}

async fn graphs(rank: Option<u32>, first: bool, knobs: &Knobs) {
    const SIZES: [u32; 6] = [32, 16, 8, 4, 2, 1];
    logline::say(
        rank,
        "Capture target decode CUDA graph begin. backend=full, num_tokens_per_bs=1, bs=[1, 2, 4, 8, 16, 32], avail mem=29.99 GB",
    );
    for (n, size) in SIZES.iter().enumerate() {
        let total = SIZES.len();
        let bar = |done: usize| {
            if first {
                logline::raw(&format!(
                    "\rCapturing batches (bs={size} avail_mem=29.96 GB): {:3}%|███       | {done}/{total} [00:00<00:00,  4.00it/s]",
                    done * 100 / total
                ));
            }
        };
        bar(n);
        tokio::time::sleep(knobs.share(15) / total as u32).await;
        bar(n + 1);
    }
    if first {
        logline::raw("\n");
    }
    logline::say(
        rank,
        format!(
            "Capture target decode CUDA graph end. elapsed={:.2} s, mem usage=0.04 GB, avail mem=29.96 GB.",
            knobs.share(15).as_secs_f64()
        ),
    );
}
