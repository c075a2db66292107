//! Hidden command of `serve`: reads the shards of model folders into memory while the engine imports. Killed when the
//! engine has loaded them, or is gone.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use clap::Args;
use tokio::time::Instant;

use super::exit::Exit;
use crate::sys::priority;
use crate::weights::ahead::{self, Ahead, Bound, Outcome, Place, Shard};
use crate::weights::room;

/// Between two lines of progress.
const TELL_EACH: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct ReadAheadArgs {
    /// Folders with weights, in the order in which they are loaded.
    pub folders: Vec<PathBuf>,
    /// Everything, whatever lies in memory and whatever memory is free.
    #[arg(long)]
    pub always: bool,
}

#[allow(clippy::needless_pass_by_value)] // every subcommand is given its arguments whole
pub fn run(args: ReadAheadArgs) -> Exit {
    // The engine's own reads come first, and so does everybody else.
    priority::give_way();
    let begun = Instant::now();
    let bound = if args.always { Bound::None } else { Bound::Room };
    let mut all = Outcome::default();
    for folder in &args.folders {
        match of_folder(folder, bound) {
            Ok(one) => {
                all.files += one.files;
                all.read += one.read;
                all.there += one.there;
                all.left += one.left;
                all.failed.extend(one.failed);
            }
            Err(error) => all.failed.push(format!("{}: {error}", folder.display())),
        }
    }
    all.seconds = begun.elapsed().as_secs_f64();
    tell(&Ahead::Done(all));
    Exit::Ok
}

fn of_folder(folder: &Path, bound: Bound) -> std::io::Result<Outcome> {
    let shards = ahead::shards(folder)?;
    let files = shards.len();
    let place = shards.first().map_or(Ok(Place::Local), |shard| ahead::place(&shard.path))?;
    let all = |shards: &[Shard]| shards.iter().map(|shard| shard.bytes).sum::<u64>();
    let (cold, there) = match (bound, place) {
        (Bound::None, _) => (shards, 0),
        (Bound::Room, Place::Memory) => (Vec::new(), all(&shards)),
        (Bound::Room, _) if !shards.first().is_some_and(ahead::knows_memory) => (shards, 0),
        (Bound::Room, _) => ahead::cold(shards),
    };
    let room = || match bound {
        Bound::None => u64::MAX,
        // What lies there of the same model is not to be pushed out.
        Bound::Room => room::room().saturating_sub(there),
    };
    let (done, over, total) = (AtomicU64::new(0), AtomicBool::new(false), all(&cold));
    let outcome = std::thread::scope(|scope| {
        let teller = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                tell(&Ahead::Reading { done: done.load(Ordering::Relaxed), total });
                std::thread::park_timeout(TELL_EACH);
            }
        });
        let outcome = ahead::read(&cold, place.readers(), room, |path| File::open(path), &done);
        over.store(true, Ordering::Relaxed);
        teller.thread().unpark();
        outcome
    });
    Ok(Outcome { files, there, ..outcome })
}

/// The supervisor reads it; gone, it has ended us already.
fn tell(ahead: &Ahead) {
    let line = serde_json::to_string(ahead).expect("plain data");
    let _ = writeln!(std::io::stdout(), "{line}");
}
