//! The door that all workers share: wait for a place, hold it, give it back by dropping it.
//!
//! A short `Mutex` around the pure queue and the wakers of who waits. It starts no task: each waiter
//! keeps its own timer, and whoever frees a place wakes the next.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use super::queue::{Arrival, Bound, Cancelled, Limits, Queue, WaiterId};
use super::terms::{Caller, KeyId};
use crate::link::Gate;

/// Why a request got no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// As many wait already as may.
    Full { retry_after: Duration },
    /// As many wait already with this key as may.
    KeyFull { retry_after: Duration },
    /// It waited, until another key needed the room in the queue.
    Displaced { retry_after: Duration },
    /// Its deadline is nearer than its turn.
    Hopeless { retry_after: Duration },
    /// Its deadline passed while it waited, for the node or for its key's own limit.
    Expired { retry_after: Duration, bound: Bound },
    /// The engine will not return, or the proxy drains.
    TurnedAway,
}

/// Numbers of this moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Places held.
    pub open: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Places that may be held at present.
    pub room: usize,
    /// Whether places are given out at all.
    pub gate: Gate,
}

#[derive(Debug)]
enum Slot {
    Waiting(Option<Waker>),
    Admitted { places: u32 },
    Expired(Bound),
    Displaced,
    TurnedAway,
}

#[derive(Debug)]
struct Inner {
    queue: Queue,
    slots: HashMap<WaiterId, Slot>,
}

/// The shared door. Cheap to clone.
#[derive(Clone)]
pub struct Admission {
    inner: Arc<Mutex<Inner>>,
    epoch: Instant,
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission").field("counts", &self.counts()).finish_non_exhaustive()
    }
}

impl Admission {
    pub fn new(limits: Limits, gate: Gate) -> Self {
        let inner = Inner { queue: Queue::new(limits, gate), slots: HashMap::new() };
        Self { inner: Arc::new(Mutex::new(inner)), epoch: Instant::now() }
    }

    // Nothing panics while the lock is held; if something did, the counts are still whole.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn since_epoch(&self, at: Instant) -> Duration {
        at.saturating_duration_since(self.epoch)
    }

    /// Waits until `deadline` for as many places as are asked for, or as there are. Dropping the
    /// future leaves the queue.
    pub fn enter(&self, deadline: Instant, caller: Caller, asked: u32) -> Entry {
        Entry { admission: self.clone(), deadline, caller, asked, state: EntryState::New }
    }

    pub fn counts(&self) -> Counts {
        let inner = self.lock();
        Counts {
            open: inner.queue.open(),
            waiting: inner.queue.waiting(),
            room: inner.queue.room(),
            gate: inner.queue.gate(),
        }
    }

    /// Keys that hold places or wait: places and waiters of each.
    pub fn busy(&self) -> Vec<(KeyId, u32, usize)> {
        self.lock().queue.busy().collect()
    }

    /// Opens or closes the way to the engine. Who waits goes on waiting.
    pub fn set_gate(&self, gate: Gate) {
        self.change(|inner| inner.queue.set_gate(gate));
    }

    pub fn set_limits(&self, limits: Limits) {
        self.change(|inner| inner.queue.set_limits(limits));
    }

    /// What the engine can take at present, whatever the limits say.
    pub fn set_ceiling(&self, ceiling: usize) {
        self.change(|inner| inner.queue.set_ceiling(ceiling));
    }

    /// Refuses everybody who waits: no place will come.
    pub fn turn_everybody_away(&self) {
        let mut woken = Vec::new();
        {
            let mut inner = self.lock();
            while let Some(id) = inner.queue.turn_away_next() {
                woken.extend(inner.settle(id, Slot::TurnedAway));
            }
        }
        woken.into_iter().for_each(Waker::wake);
    }

    fn change(&self, what: impl FnOnce(&mut Inner)) {
        let woken = {
            let mut inner = self.lock();
            what(&mut inner);
            inner.admit()
        };
        woken.into_iter().for_each(Waker::wake);
    }
}

/// Longest and shortest that a client is told to stay away, in seconds.
const RETRY_AFTER: std::ops::RangeInclusive<f64> = 1.0..=120.0;

/// After which a refused client of this key may come again: what its turn would take, spread by half
/// of it so that the refused do not return together.
fn retry_after(queue: &Queue, key: KeyId) -> Duration {
    let wait = queue.expected_wait(key).map_or(1.0, |wait| wait.as_secs_f64()).max(*RETRY_AFTER.start());
    // Clients are told whole seconds: less than two of them would not spread the shortest waits.
    let spread = wait + rand::random::<f64>() * (wait / 2.0).max(2.0);
    Duration::from_secs_f64(spread.clamp(*RETRY_AFTER.start(), *RETRY_AFTER.end()))
}

impl Inner {
    /// Gives free places to who is next. The wakers are for after the lock.
    fn admit(&mut self) -> Vec<Waker> {
        let mut woken = Vec::new();
        while let Some((id, places)) = self.queue.admit_next() {
            woken.extend(self.settle(id, Slot::Admitted { places }));
        }
        woken
    }

    fn settle(&mut self, id: WaiterId, outcome: Slot) -> Option<Waker> {
        let slot = self.slots.get_mut(&id)?;
        match std::mem::replace(slot, outcome) {
            Slot::Waiting(waker) => waker,
            _ => None,
        }
    }
}

enum EntryState {
    New,
    Waiting { id: WaiterId, ahead: usize, timer: Pin<Box<Sleep>> },
    Done,
}

/// A request on its way in.
pub struct Entry {
    admission: Admission,
    deadline: Instant,
    caller: Caller,
    asked: u32,
    state: EntryState,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

impl Entry {
    fn ticket(&self, places: u32, waited_behind: Option<usize>) -> Ticket {
        let (admission, key) = (self.admission.clone(), self.caller.key);
        Ticket { admission, key, places, since: Instant::now(), waited_behind, counted: Counted::Yes }
    }

    fn arrive(&mut self) -> Poll<Result<Ticket, Refused>> {
        let admission = self.admission.clone();
        let mut inner = admission.lock();
        let now = admission.since_epoch(Instant::now());
        let arrival = inner.queue.arrive(now, admission.since_epoch(self.deadline), self.caller, self.asked);
        let retry_after = |inner: &Inner| retry_after(&inner.queue, self.caller.key);
        let outcome = match arrival {
            Arrival::Admitted { places } => Ok(self.ticket(places, None)),
            Arrival::Queued { id, ahead, displaced } => {
                inner.slots.insert(id, Slot::Waiting(None));
                let woken = displaced.and_then(|id| inner.settle(id, Slot::Displaced));
                drop(inner);
                woken.into_iter().for_each(Waker::wake);
                self.state = EntryState::Waiting { id, ahead, timer: Box::pin(sleep_until(self.deadline)) };
                return Poll::Pending;
            }
            Arrival::Full => Err(Refused::Full { retry_after: retry_after(&inner) }),
            Arrival::KeyFull => Err(Refused::KeyFull { retry_after: retry_after(&inner) }),
            Arrival::Hopeless => Err(Refused::Hopeless { retry_after: retry_after(&inner) }),
        };
        self.state = EntryState::Done;
        Poll::Ready(outcome)
    }
}

impl Future for Entry {
    type Output = Result<Ticket, Refused>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if matches!(self.state, EntryState::New)
            && let Poll::Ready(outcome) = self.arrive()
        {
            return Poll::Ready(outcome);
        }
        let admission = self.admission.clone();
        let deadline = self.deadline;
        let EntryState::Waiting { id, ahead, timer } = &mut self.state else {
            unreachable!("a future is not polled again after it ended")
        };
        let (id, ahead) = (*id, *ahead);
        let due = timer.as_mut().poll(cx).is_ready();
        let mut inner = admission.lock();
        if due {
            // Everybody whose time has come, not only this one: the queue stays in order.
            let now = admission.since_epoch(Instant::now()).max(admission.since_epoch(deadline));
            while let Some((expired, bound)) = inner.queue.expire_next(now) {
                if let Some(waker) = inner.settle(expired, Slot::Expired(bound))
                    && expired != id
                {
                    waker.wake();
                }
            }
        }
        if let Some(Slot::Waiting(waker)) = inner.slots.get_mut(&id) {
            match waker {
                Some(known) => known.clone_from(cx.waker()),
                None => *waker = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        }
        let slot = inner.slots.remove(&id);
        let retry_after = || retry_after(&inner.queue, self.caller.key);
        let outcome = match slot {
            Some(Slot::Admitted { places }) => Ok(places),
            Some(Slot::Expired(bound)) => Err(Refused::Expired { retry_after: retry_after(), bound }),
            Some(Slot::Displaced) => Err(Refused::Displaced { retry_after: retry_after() }),
            Some(Slot::Waiting(_) | Slot::TurnedAway) | None => Err(Refused::TurnedAway),
        };
        drop(inner);
        self.state = EntryState::Done;
        Poll::Ready(outcome.map(|places| self.ticket(places, Some(ahead))))
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let EntryState::Waiting { id, .. } = self.state else { return };
        let woken = {
            let mut inner = self.admission.lock();
            let slot = inner.slots.remove(&id);
            if inner.queue.cancel(id) == Cancelled::Unknown
                && let Some(Slot::Admitted { places }) = slot
            {
                // Admitted in the very moment in which the client left: the places go on.
                inner.queue.leave(self.caller.key, places, None);
            }
            inner.admit()
        };
        woken.into_iter().for_each(Waker::wake);
    }
}

/// Whether the time that a place was held says something about the engine's service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counted {
    Yes,
    No,
}

/// Places towards the engine. Dropping it frees them and wakes the next.
pub struct Ticket {
    admission: Admission,
    key: KeyId,
    places: u32,
    since: Instant,
    waited_behind: Option<usize>,
    counted: Counted,
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("since", &self.since).finish_non_exhaustive()
    }
}

impl Ticket {
    /// How many stood before this request when it began to wait; none: it did not wait.
    pub fn waited_behind(&self) -> Option<usize> {
        self.waited_behind
    }

    /// The request did not get an answer from the engine: its time is no service time.
    pub fn was_not_served(mut self) {
        self.counted = Counted::No;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let held = (self.counted == Counted::Yes).then(|| self.since.elapsed());
        self.admission.change(|inner| inner.queue.leave(self.key, self.places, held));
    }
}

#[cfg(test)]
mod tests;
