//! Waits for the engine's GPUs: after an end until its memory is back, before a launch until there is room.
//!
//! Nothing is launched beside memory that a dead engine still holds, nor beside a stranger who leaves too
//! little. Without facts about the GPUs there is nothing to wait for. What is free is `node::room`'s to say.

use std::ffi::OsStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, redact};
use crate::engine::env::Env;
use crate::engine::resolve::{Resolved, YamlValue};
use crate::node::gpus::{Gpu, Gpus, Holder};
use crate::node::room::{Baseline, Held, Wait, in_the_way, sentence};
use crate::node::visible::{Chosen, Share, choose};

/// Memory comes back within 170 ms of the exit (measured, H100); a driver that needs longer than this does
/// not give it back by itself.
const COMES_BACK: Duration = Duration::from_secs(10);
/// The same where somebody wants us to end.
const IN_A_HURRY: Duration = Duration::from_millis(1_500);
/// What is over sooner is nobody's news.
const NEWS: Duration = Duration::from_secs(1);
/// What an engine takes at least whose share nobody said: it then chooses between 0.75 and 0.9 itself.
const DEFAULT_SHARE: f64 = 0.75;

/// Which GPUs an engine uses, and how much of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Uses {
    share: Share,
    visible: Option<String>,
    fraction: f64,
}

impl Uses {
    pub fn of(config: &Config, resolved: &Resolved, own: &Env) -> Self {
        let number = |name: &str| flag(resolved, name).and_then(|text| text.parse::<usize>().ok());
        let size = |name: &str| number(name).unwrap_or(1).max(1);
        // With attention split over the data parallel ranks, they share the tensor parallel ones' GPUs.
        let shared = flag(resolved, "enable-dp-attention").is_some() || number("attn-dp-size").is_some();
        let copies = if shared { 1 } else { size("dp-size") };
        let ranks = config.engine.tp as usize * size("pp-size") * copies / size("nnodes");
        let said = config.engine.env.get(VISIBLE).cloned();
        let visible = said.or_else(|| own.get(OsStr::new(VISIBLE)).map(|text| text.to_string_lossy().into_owned()));
        let fraction = flag(resolved, "mem-fraction-static").and_then(|text| text.parse().ok());
        Self {
            share: Share { ranks, first: number("base-gpu-id").unwrap_or(0), step: size("gpu-id-step") },
            visible,
            fraction: fraction.unwrap_or(DEFAULT_SHARE),
        }
    }

    /// The GPUs it will use, of all that there are.
    pub fn choose(&self, all: &[Gpu]) -> Chosen {
        choose(all, self.visible.as_deref(), self.share)
    }
}

const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// What a flag is set to; a switch that is on is "true", or empty.
pub fn flag(resolved: &Resolved, name: &str) -> Option<String> {
    let in_yaml = resolved.yaml.iter().rev().find(|(flag, _)| flag == name).map(|(_, value)| match value {
        YamlValue::True => "true".to_owned(),
        YamlValue::Word(word) => word.clone(),
        YamlValue::Words(words) => words.join(" "),
    });
    in_yaml.or_else(|| {
        let (equals, bare) = (format!("--{name}="), format!("--{name}"));
        let mut words = resolved.argv.iter();
        words.find_map(|word| word.strip_prefix(&equals).map(str::to_owned).or((*word == bare).then(String::new)))
    })
}

/// Who is in the way, as a sentence; empty: nobody.
pub type InTheWay = Arc<Mutex<String>>;

/// The node's GPUs, and what was held of them before any engine of ours.
#[derive(Debug, Clone)]
pub struct Room {
    pub gpus: Gpus,
    before: Arc<Mutex<Baseline>>,
    pub in_the_way: InTheWay,
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    Free,
    /// It was not waited for to the end.
    Broken,
}

impl Room {
    pub fn new(gpus: Gpus) -> Self {
        Self { gpus, before: Arc::default(), in_the_way: Arc::default() }
    }

    /// After an engine's end: until its memory is back, or for [`COMES_BACK`], or until somebody is in a
    /// hurry and a little longer.
    pub async fn released(&self, uses: &Uses, hurry: &CancellationToken) -> Waited {
        let begun = Instant::now();
        let waited = tokio::select! {
            waited = self.wait(uses, begun, Give::Up, async {}) => waited,
            () = async {
                hurry.cancelled().await;
                tokio::time::sleep(IN_A_HURRY).await;
            } => Waited::Broken,
        };
        let left = std::mem::take(&mut *self.said());
        if waited == Waited::Broken && !left.is_empty() {
            tracing::error!("the engine is gone, and yet {left}");
        }
        tracing::debug!("the GPUs' memory: {waited:?} after {} ms", begun.elapsed().as_millis());
        waited
    }

    /// Before a launch, for as long as it takes. `held` is awaited once, when somebody is in the way for more
    /// than a moment.
    pub async fn free(&self, uses: &Uses, stop: &CancellationToken, held: impl Future<Output = ()> + Send) -> Waited {
        let waited = tokio::select! {
            waited = self.wait(uses, Instant::now(), Give::Nothing, held) => waited,
            () = stop.cancelled() => Waited::Broken,
        };
        self.said().clear();
        waited
    }

    fn said(&self) -> std::sync::MutexGuard<'_, String> {
        // A sentence is whole at every point where a panic could happen.
        self.in_the_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn wait(&self, uses: &Uses, begun: Instant, give: Give, tell: impl Future<Output = ()> + Send) -> Waited {
        let mut tell = Some(tell);
        let mut named: Option<Vec<(u32, Vec<i32>)>> = None;
        loop {
            let look = self.gpus.look().await;
            let Some(sight) = look.sight() else { return Waited::Free };
            let chosen = uses.choose(&sight.gpus);
            let wait = if begun.elapsed() < COMES_BACK { Wait::Still } else { Wait::Over };
            let held = {
                let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
                before.learn(&chosen.gpus);
                in_the_way(&chosen.gpus, &before, uses.fraction, wait)
            };
            if held.is_empty() {
                if named.is_some() {
                    tracing::info!("the GPUs' memory is free after {} s", begun.elapsed().as_secs());
                }
                return Waited::Free;
            }
            let text = sentence(&held, redact::text);
            self.said().clone_from(&text);
            if give == Give::Up && wait == Wait::Over {
                return Waited::Broken;
            }
            let who = holders(&held);
            if begun.elapsed() >= NEWS && named.as_ref() != Some(&who) {
                tracing::warn!("no engine is started: {text}");
                named = Some(who);
                if let Some(tell) = tell.take() {
                    tell.await;
                }
            }
            tokio::time::sleep((begun.elapsed() / 10).clamp(FIRST_LOOK, SLOW_LOOK)).await;
        }
    }
}

/// Between two looks: at first often, since memory comes back within 170 ms.
const FIRST_LOOK: Duration = Duration::from_millis(20);
const SLOW_LOOK: Duration = Duration::from_secs(1);

/// What follows where memory does not come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Give {
    Up,
    Nothing,
}

/// Who it is, without the amounts, which move.
fn holders(held: &[Held]) -> Vec<(u32, Vec<i32>)> {
    let pids = |holders: &[Holder]| holders.iter().map(|holder| holder.pid).collect();
    held.iter().map(|gpu| (gpu.index, pids(&gpu.holders))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::flags::FlagTable;
    use crate::engine::resolve::resolve;
    use crate::node::gpus::Source;
    use serde_json::json;
    use std::path::Path;

    const GIB: u64 = 1 << 30;

    fn uses() -> Uses {
        let mut config = Config::shipped();
        config.engine.tp = 1;
        let resolved = resolve(&config, FlagTable::bundled()).expect("the shipped configuration");
        Uses::of(&config, &resolved, &Env::new())
    }

    fn node(folder: &Path, used: u64) -> Room {
        let gpus: Vec<_> = (0..8)
            .map(|index| {
                json!({"index": index, "uuid": format!("GPU-{index}"), "name": "NVIDIA B200",
                       "memory_total": 180 * GIB, "memory_used": used})
            })
            .collect();
        let sight = json!({"driver": "580.95.05", "gpus": gpus});
        std::fs::write(folder.join("gpus.json"), sight.to_string()).expect("written");
        Room::new(Gpus::of(Source::Written(folder.to_owned())))
    }

    fn holds(folder: &Path, index: u32, pid: u32, bytes: u64) -> std::path::PathBuf {
        let file = folder.join(format!("{index}-{pid}"));
        std::fs::write(&file, bytes.to_string()).expect("written");
        file
    }

    #[test]
    fn the_shipped_engine_uses_eight_gpus_and_most_of_their_memory() {
        let config = Config::shipped();
        let resolved = resolve(&config, FlagTable::bundled()).expect("the shipped configuration");
        let uses = Uses::of(&config, &resolved, &Env::new());
        assert_eq!((uses.share, uses.fraction), (Share { ranks: 8, first: 0, step: 1 }, 0.82));
        assert_eq!(uses.visible.as_deref(), Some("0,1,2,3,4,5,6,7"));
    }

    #[tokio::test]
    async fn g13_a_stranger_is_named_and_the_launch_comes_by_itself_once_it_is_gone() {
        let folder = tempfile::tempdir().expect("a folder");
        let room = node(folder.path(), GIB / 2);
        let mut stranger = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        holds(folder.path(), 0, stranger.id(), 100 * GIB);
        let (told, stop) = (Arc::clone(&room.in_the_way), CancellationToken::new());
        let launch = tokio::spawn(async move { room.free(&uses(), &stop, async {}).await });
        let said = loop {
            let said = told.lock().expect("no panic").clone();
            if !said.is_empty() {
                break said;
            }
            tokio::task::yield_now().await;
        };
        let named = format!("pid {} (sleep 60, 100.0 GiB)", stranger.id());
        assert!(said.contains("GPU 0 has 79.5 GiB free and the engine needs 147.6 GiB"), "{said}");
        assert!(said.contains(&named), "{said}");
        assert!(!launch.is_finished());
        stranger.kill().expect("ours");
        stranger.wait().expect("ours");
        let waited = tokio::time::timeout(Duration::from_secs(20), launch).await.expect("by itself");
        assert_eq!(waited.expect("no panic"), Waited::Free);
        assert_eq!(*told.lock().expect("no panic"), "");
    }

    #[tokio::test]
    async fn g13_a_stranger_who_leaves_enough_or_sits_on_another_gpu_is_not_in_the_way() {
        let folder = tempfile::tempdir().expect("a folder");
        let room = node(folder.path(), 0);
        holds(folder.path(), 0, 0, 20 * GIB);
        holds(folder.path(), 1, 0, 180 * GIB);
        let (uses, stop) = (uses(), CancellationToken::new());
        let free = tokio::time::timeout(Duration::from_secs(5), room.free(&uses, &stop, async {})).await;
        assert_eq!(free, Ok(Waited::Free));
    }

    #[tokio::test]
    async fn memory_of_the_dead_is_waited_for_and_a_stop_does_not_wait_long() {
        let folder = tempfile::tempdir().expect("a folder");
        let room = node(folder.path(), 0);
        let never = CancellationToken::new();
        assert_eq!(room.free(&uses(), &never, async {}).await, Waited::Free);
        // The engine's memory outlives it for a moment.
        let file = holds(folder.path(), 0, 0, 30 * GIB);
        let release = tokio::spawn({
            let room = room.clone();
            async move { room.released(&uses(), &CancellationToken::new()).await }
        });
        while room.in_the_way.lock().expect("no panic").is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(!release.is_finished(), "30 GiB more than before are not free");
        std::fs::remove_file(file).expect("removed");
        assert_eq!(release.await.expect("no panic"), Waited::Free);

        holds(folder.path(), 0, 0, 30 * GIB);
        let hurry = CancellationToken::new();
        hurry.cancel();
        let begun = Instant::now();
        assert_eq!(room.released(&uses(), &hurry).await, Waited::Broken);
        assert!(begun.elapsed() < COMES_BACK / 2, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn without_facts_nothing_is_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let room = Room::new(Gpus::of(Source::Written(folder.path().join("none"))));
        assert_eq!(room.free(&uses(), &CancellationToken::new(), async {}).await, Waited::Free);
    }
}
