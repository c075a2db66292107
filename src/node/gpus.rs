//! What the machine's GPUs say of themselves: name, memory, who holds it, and their errors.
//!
//! NVML is asked on a thread of its own: a driver that hangs must hang nobody else. Without NVML there
//! are no facts, which is said and never fatal.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::nvml;
use super::written;

/// NVML answers within milliseconds, and within seconds where it has to wake the GPUs up first.
const PATIENCE: Duration = Duration::from_secs(5);
/// Looks that may wait for a slow driver: more of them would not make it faster.
const LOOKS: usize = 4;
/// Names a folder of written facts in NVML's place.
pub const WRITTEN: &str = "SGLANGD_SIM_GPUS";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// As `nvidia-smi` counts.
    pub index: u32,
    pub uuid: String,
    pub name: String,
    /// Bytes.
    pub memory_total: u64,
    pub memory_used: u64,
    /// Whose memory can be seen from here; nobody's, in a container, is the usual answer.
    #[serde(default)]
    pub holders: Vec<Holder>,
    /// Of one that is split (MIG): each part as a GPU of its own, under its parent's number. CUDA sees the parts
    /// alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Self>,
}

impl Gpu {
    pub fn memory_free(&self) -> u64 {
        self.memory_total.saturating_sub(self.memory_used)
    }

    /// What these processes hold: all that is used but what others are seen to hold. In a container nobody is
    /// seen, and what is used is the engine's, since it is launched only where nobody is in its way.
    pub fn held_by(&self, pids: &[i32]) -> u64 {
        let others = self.holders.iter().filter(|holder| holder.command.is_some() && !pids.contains(&holder.pid));
        self.memory_used.saturating_sub(others.filter_map(|holder| holder.memory).sum())
    }
}

/// A process with memory on a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: i32,
    /// Bytes, where the driver tells.
    pub memory: Option<u64>,
    /// Its command line; none where the process itself cannot be seen.
    pub command: Option<String>,
}

/// An error that a GPU's driver reported.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Xid {
    pub number: u64,
    /// Which GPU: a uuid, or its place on the bus.
    pub gpu: String,
}

impl Xid {
    /// What it says of the GPU, in NVIDIA's words; none for those that follow from something else.
    pub fn meaning(&self) -> Option<(Blame, &'static str)> {
        Some(match self.number {
            48 => (Blame::Hardware, "double bit ECC error"),
            62 => (Blame::Hardware, "internal micro-controller halt"),
            64 => (Blame::Hardware, "a bad row of memory could not be recorded"),
            79 => (Blame::Hardware, "GPU has fallen off the bus"),
            95 => (Blame::Hardware, "uncontained ECC error"),
            119 | 120 => (Blame::Hardware, "the GPU's system processor does not answer"),
            140 => (Blame::Hardware, "unrecovered ECC error"),
            143 => (Blame::Hardware, "GPU initialization error"),
            74 | 144..=150 => (Blame::Hardware, "NVLink error"),
            13 => (Blame::Program, "graphics engine exception"),
            31 => (Blame::Program, "memory page fault"),
            32 => (Blame::Program, "corrupted push buffer"),
            69 => (Blame::Program, "graphics engine class error"),
            94 => (Blame::Program, "contained ECC error"),
            _ => return None,
        })
    }
}

/// Whose fault an error is, mostly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    Hardware,
    /// A kernel's, or one page of memory's: starting again helps.
    Program,
}

/// The worst that the driver said, in words: `Xid 79 (GPU has fallen off the bus) on GPU-…`.
pub fn worst(xids: &[Xid], lost: &[String], whose: Blame) -> Option<String> {
    let said = xids.iter().find_map(|xid| {
        let (blame, words) = xid.meaning()?;
        (blame == whose).then(|| format!("Xid {} ({words}) on {}", xid.number, xid.gpu))
    });
    said.or_else(|| lost.first().filter(|_| whose == Blame::Hardware).map(|lost| format!("the driver lost {lost}")))
}

/// All of them at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sight {
    pub driver: String,
    pub gpus: Vec<Gpu>,
    /// Those that the driver knows and no longer reaches, in its words.
    #[serde(default)]
    pub lost: Vec<String>,
    /// Errors since the last look.
    #[serde(default)]
    pub xids: Vec<Xid>,
}

/// What one look came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look {
    Seen(Sight),
    /// There are no facts, and why.
    Nothing(String),
}

impl Look {
    pub fn sight(&self) -> Option<&Sight> {
        match self {
            Self::Seen(sight) => Some(sight),
            Self::Nothing(_) => None,
        }
    }
}

/// Where facts come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Nvml,
    /// A folder with `gpus.json` and a file for each holder: a node for tests.
    Written(PathBuf),
}

impl Source {
    pub fn from_env(get: impl Fn(&str) -> Option<std::ffi::OsString>) -> Self {
        get(WRITTEN).map_or(Self::Nvml, |folder| Self::Written(folder.into()))
    }
}

/// Asks, as often as one likes. Clones share the thread.
#[derive(Debug, Clone)]
pub struct Gpus {
    asks: SyncSender<oneshot::Sender<Look>>,
}

impl Gpus {
    /// Nothing is opened before the first look.
    pub fn of(source: Source) -> Self {
        let (asks, asked) = sync_channel(LOOKS);
        let thread = std::thread::Builder::new().name("gpus".into()).spawn(move || answer(&source, &asked));
        if let Err(error) = thread {
            // Every look then says that nobody answers.
            tracing::warn!("no thread for the GPUs' facts could be started: {error}");
        }
        Self { asks }
    }

    fn ask(&self) -> Result<oneshot::Receiver<Look>, Look> {
        let (tell, told) = oneshot::channel();
        match self.asks.try_send(tell) {
            Ok(()) => Ok(told),
            Err(TrySendError::Full(_)) => Err(stuck()),
            Err(TrySendError::Disconnected(_)) => Err(Look::Nothing("nobody looks at the GPUs".into())),
        }
    }

    pub async fn look(&self) -> Look {
        match self.ask() {
            Ok(told) => match tokio::time::timeout(PATIENCE, told).await {
                Ok(Ok(look)) => look,
                _ => stuck(),
            },
            Err(look) => look,
        }
    }
}

/// One look, without a runtime: for subcommands.
pub fn look_once(source: &Source) -> Look {
    match source {
        Source::Nvml => nvml::Session::open().map_or_else(Look::Nothing, |mut session| session.look()),
        Source::Written(folder) => written::look(folder),
    }
}

fn stuck() -> Look {
    Look::Nothing(format!("the NVIDIA driver has not answered for {} s", PATIENCE.as_secs()))
}

fn answer(source: &Source, asked: &Receiver<oneshot::Sender<Look>>) {
    let mut session = None;
    while let Ok(tell) = asked.recv() {
        let look = match source {
            Source::Written(folder) => written::look(folder),
            Source::Nvml => {
                // A driver that is loaded later, or again, is found then.
                let open = match session.take() {
                    Some(open) => Ok(open),
                    None => nvml::Session::open(),
                };
                match open {
                    Ok(mut open) => {
                        let look = open.look();
                        if matches!(look, Look::Seen(_)) {
                            session = Some(open);
                        }
                        look
                    }
                    Err(why) => Look::Nothing(why),
                }
            }
        };
        // Whoever asked may have lost patience.
        let _ = tell.send(look);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_nvml_there_are_no_facts_and_a_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        let gpus = Gpus::of(Source::Written(folder.path().join("none")));
        let Look::Nothing(why) = gpus.look().await else { panic!("facts out of nowhere") };
        assert!(why.contains("gpus.json"), "{why}");
    }

    #[test]
    fn the_worst_error_is_named_and_what_only_follows_is_not() {
        let xid = |number| Xid { number, gpu: "GPU-1".into() };
        let said = worst(&[xid(45), xid(31), xid(79)], &[], Blame::Hardware);
        assert_eq!(said.as_deref(), Some("Xid 79 (GPU has fallen off the bus) on GPU-1"));
        assert_eq!(
            worst(&[xid(45), xid(31)], &[], Blame::Program).as_deref(),
            Some("Xid 31 (memory page fault) on GPU-1")
        );
        assert_eq!(worst(&[xid(45), xid(43)], &[], Blame::Program), None);
        let lost = ["GPU 3: the device is lost".to_owned()];
        assert_eq!(worst(&[], &lost, Blame::Hardware).as_deref(), Some("the driver lost GPU 3: the device is lost"));
        assert_eq!(worst(&[], &lost, Blame::Program), None);
    }

    #[tokio::test]
    async fn a_driver_that_hangs_is_said_to_hang_and_holds_nobody() {
        // A thread that never answers, as one that is stuck in the driver.
        let (asks, asked) = sync_channel(LOOKS);
        let gpus = Gpus { asks };
        tokio::time::pause();
        for _ in 0..=LOOKS {
            assert!(matches!(gpus.look().await, Look::Nothing(why) if why.contains("has not answered")));
        }
        drop(asked);
    }
}
