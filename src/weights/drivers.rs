//! The tasks of a fetch that drive its connections: as many as there are processors, each with several connections where
//! those are more. So what two files got at the same time is hashed together, which takes less time than one after the other
//! ([`crate::sys::sha256`]), from where the network left it.
//!
//! ```text
//! lane ─ step ─►┐
//! lane ─ step ─►├─ when no lane has news any more: the oldest step and one of another file are hashed, and written by their lanes
//! lane ─ step ─►┘
//! ```
//!
//! Nobody waits for a mate: a step that has none is hashed alone.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::{mpsc, oneshot};

use super::writer::{Hashed, Step};

type Lane = Pin<Box<dyn Future<Output = ()> + Send>>;

#[derive(Debug)]
pub struct Drivers(Vec<Driver>);

#[derive(Debug)]
struct Driver {
    lanes: mpsc::Sender<Lane>,
    steps: Arc<Steps>,
    /// Lanes that it drives.
    load: Arc<AtomicUsize>,
}

/// The end of a lane. Dropped, it stops the lane where it is.
pub type Ending<T> = oneshot::Receiver<T>;

/// Tasks that drive at most so many lanes at once.
pub fn how_many(lanes: usize) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    lanes.clamp(1, processors)
}

impl Drivers {
    /// For at most so many lanes at once. They end when this is dropped and their lanes are through. Must be called within a runtime.
    pub fn start(lanes: usize) -> Self {
        Self::of(how_many(lanes), lanes)
    }

    fn of(drivers: usize, lanes: usize) -> Self {
        Self((0..drivers).map(|_| Driver::start(lanes.max(1))).collect())
    }

    /// Has the lane driven by who drives fewest.
    pub fn drive<T: Send + 'static, L>(&self, lane: impl FnOnce(Arc<Steps>) -> L) -> Ending<T>
    where
        L: Future<Output = T> + Send + 'static,
    {
        let least = self.0.iter().min_by_key(|driver| driver.load.load(Ordering::Relaxed));
        let driver = least.expect("there is at least one");
        let (mut tell, ending) = oneshot::channel();
        let lane = lane(driver.steps.clone());
        let counted = Counted::one_more(driver.load.clone());
        let sent = driver.lanes.try_send(Box::pin(async move {
            let _counted = counted;
            tokio::select! {
                biased;
                end = lane => drop(tell.send(end)),
                () = tell.closed() => {}
            }
        }));
        // There is room for all lanes that may be. A driver ends only by a panic of one of its lanes; then `ending` says so.
        drop(sent);
        ending
    }
}

impl Driver {
    fn start(lanes: usize) -> Self {
        let (lanes, mut new) = mpsc::channel(lanes);
        let steps = Arc::<Steps>::default();
        let (met, mut driven) = (steps.clone(), FuturesUnordered::new());
        tokio::spawn(std::future::poll_fn(move |cx| turn(cx, &mut new, &mut driven, &met)));
        Self { lanes, steps, load: Arc::default() }
    }
}

fn turn(
    cx: &mut Context<'_>,
    new: &mut mpsc::Receiver<Lane>,
    driven: &mut FuturesUnordered<Lane>,
    steps: &Steps,
) -> Poll<()> {
    loop {
        let no_more = loop {
            match new.poll_recv(cx) {
                Poll::Ready(Some(lane)) => driven.push(lane),
                Poll::Ready(None) => break true,
                Poll::Pending => break false,
            }
        };
        while let Poll::Ready(Some(())) = driven.poll_next_unpin(cx) {}
        if !steps.settle() {
            return if no_more && driven.is_empty() { Poll::Ready(()) } else { Poll::Pending };
        }
    }
}

struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn one_more(load: Arc<AtomicUsize>) -> Self {
        load.fetch_add(1, Ordering::Relaxed);
        Self(load)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where the lanes of one driver bring what is to be hashed, oldest first.
#[derive(Debug, Default)]
pub struct Steps(Mutex<Vec<Waiting>>);

#[derive(Debug)]
struct Waiting {
    step: Step,
    done: oneshot::Sender<Hashed>,
}

impl Steps {
    /// Has the step hashed, before this driver's lanes wait for the network again.
    pub async fn hash(&self, step: Step) -> std::io::Result<Hashed> {
        let (done, end) = oneshot::channel();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Waiting { step, done });
        end.await.map_err(std::io::Error::other)
    }

    /// Hashes the oldest step, and a mate's with it. False: there was none.
    fn settle(&self) -> bool {
        let (first, mate) = {
            let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.is_empty() {
                return false;
            }
            let first = waiting.remove(0);
            let mate = waiting.iter().position(|other| first.step.pairs_with(&other.step));
            (first, mate.map(|at| waiting.remove(at)))
        };
        // Who asked may be gone.
        match mate {
            None => drop(first.done.send(first.step.hash())),
            Some(mate) => {
                let [one, other] = Step::hash_both([first.step, mate.step]);
                drop((first.done.send(one), mate.done.send(other)));
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use futures_util::FutureExt as _;

    use super::*;
    use crate::weights::left::Paths;
    use crate::weights::plan::{Hash, RemoteFile, Transport};
    use crate::weights::verify::Hasher;
    use crate::weights::write::{Finished, Partial};
    use crate::weights::writer::Writer;

    const STEP: usize = 128 << 10;

    /// A blob of so many steps, all of one byte, and a writer at its beginning.
    fn blob(dir: &std::path::Path, name: &str, steps: usize) -> (Arc<Partial>, Writer, Bytes) {
        let content = Bytes::from(vec![name.as_bytes()[0]; steps * STEP]);
        let mut hasher = Hasher::new(&Hash::Sha256(String::new()), 0);
        hasher.update(&content);
        let (name, size) = (name.to_owned(), content.len() as u64);
        let paths = Paths::beside(&dir.join("blobs").join(&name));
        let hash = Hash::Sha256(hasher.hex());
        let partial = Partial::open(paths, &RemoteFile { name, size, hash, transport: Transport::Http }, None).unwrap();
        let writer = partial.writer(0).unwrap();
        (partial, writer, content)
    }

    #[tokio::test]
    async fn steps_of_two_files_are_hashed_together_and_those_of_one_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let (one, mut to_one, mut first) = blob(dir.path(), "a", 2);
        let (other, mut to_other, mut second) = blob(dir.path(), "b", 1);
        let (more, mut to_more, mut third) = blob(dir.path(), "c", 1);
        let steps = Steps::default();
        let next = |writer: &mut Writer, bytes: &mut Bytes| steps.hash(writer.next(bytes).unwrap()).boxed_local();
        let mut hashed =
            [next(&mut to_one, &mut first), next(&mut to_other, &mut second), next(&mut to_more, &mut third)];
        let mut look = || hashed.each_mut().map(|step| step.now_or_never().map(Result::unwrap));
        assert!(look().iter().all(Option::is_none));
        assert!(steps.settle());
        let [a, b, c] = look();
        assert!(c.is_none(), "the oldest and its mate");
        assert!(steps.settle());
        // What has come to its end is not asked again.
        let c = (&mut hashed[2]).now_or_never().expect("nobody waits for a mate").unwrap();
        assert!(!steps.settle());
        drop(hashed);
        to_one.put(a.unwrap()).await.unwrap();
        to_other.put(b.unwrap()).await.unwrap();
        to_more.put(c).await.unwrap();
        assert_eq!((one.have(), other.is_whole(), more.is_whole()), (STEP as u64, true, true));
        let last = to_one.next(&mut first).unwrap().hash();
        to_one.put(last).await.unwrap();
        for (partial, name) in [(one, "a"), (other, "b"), (more, "c")] {
            assert_eq!(partial.finish(&dir.path().join(name)).await.unwrap(), Finished::Right, "{name}");
        }
    }

    #[tokio::test]
    async fn a_step_that_is_not_where_the_hash_stands_has_no_mate() {
        let dir = tempfile::tempdir().unwrap();
        let (one, _, first) = blob(dir.path(), "a", 2);
        let (_other, mut to_other, mut second) = blob(dir.path(), "b", 1);
        let mut later = one.writer(STEP as u64).unwrap();
        let late = later.next(&mut first.slice(STEP..)).unwrap();
        assert!(!late.pairs_with(&to_other.next(&mut second).unwrap()));
    }

    struct Gone(Option<oneshot::Sender<()>>);

    impl Drop for Gone {
        fn drop(&mut self) {
            let _ = self.0.take().unwrap().send(());
        }
    }

    #[tokio::test]
    async fn lanes_are_spread_end_with_their_word_and_stop_where_nobody_waits() {
        let drivers = Drivers::of(2, 4);
        let loads = || drivers.0.iter().map(|driver| driver.load.load(Ordering::Relaxed)).collect::<Vec<_>>();
        assert_eq!(drivers.drive(|_| async { 7 }).await, Ok(7));
        let (gone, heard) = oneshot::channel();
        let gone = Gone(Some(gone));
        let endless = drivers.drive(|_| async move {
            let _gone = gone;
            std::future::pending::<()>().await;
        });
        let another = drivers.drive(|_| std::future::pending::<()>());
        assert_eq!(loads(), [1, 1]);
        drop(endless);
        tokio::time::timeout(Duration::from_secs(10), heard).await.expect("it goes on").unwrap();
        drop(another);
    }

    #[tokio::test]
    async fn a_lane_that_panics_is_told_and_waits_for_nobody() {
        let drivers = Drivers::of(1, 1);
        let ending = drivers.drive::<(), _>(|_| async { panic!("as a defect would") });
        assert!(tokio::time::timeout(Duration::from_secs(10), ending).await.expect("it hangs").is_err());
    }
}
