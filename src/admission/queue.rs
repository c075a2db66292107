//! The queue before the engine, as data: what happens at each arrival, departure and deadline.
//!
//! It does not wait, wake, lock or look at a clock. Time is a [`Duration`] since any fixed moment.
//! Who is next is [`super::order`]'s; this file keeps the bounds: places in all, waiters in all, each
//! key's own, and how long each waits.
//!
//! A request may ask for several places. It gets them together or waits for them at the front of its
//! turn: nobody smaller slips past who is next. It never asks for more than there are.

use std::collections::BTreeSet;
use std::time::Duration;

pub use super::order::WaiterId;
use super::order::{NEWEST, Order};
use super::terms::{Caller, KeyId};
use crate::link::Gate;

/// How many may be open at once and how many may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub max: usize,
    pub queue: usize,
}

/// What an arrival led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// With so many places.
    Admitted { places: u32 },
    /// Waits; some `ahead` go before it.
    Queued {
        id: WaiterId,
        ahead: usize,
        /// Who no longer waits, to make room: the youngest of the line that is longest for its share.
        displaced: Option<WaiterId>,
    },
    /// As many wait already as may.
    Full,
    /// As many wait already with this key as may.
    KeyFull,
    /// It would still be waiting when its deadline passes, by what was measured.
    Hopeless,
}

/// Which limit keeps a request waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The node's places, or the engine.
    Node,
    /// Its key's own.
    Key,
}

#[derive(Debug)]
pub struct Queue {
    limits: Limits,
    /// What the engine can take at present: see [`super::sizing`].
    ceiling: usize,
    gate: Gate,
    /// Places held.
    open: usize,
    order: Order,
    deadlines: BTreeSet<WaiterId>,
    next_number: u64,
    /// Mean seconds of a place that a request takes; none before the first one ended.
    work: Option<f64>,
}

impl Queue {
    pub fn new(limits: Limits, gate: Gate) -> Self {
        Self {
            limits,
            ceiling: usize::MAX,
            gate,
            open: 0,
            order: Order::default(),
            deadlines: BTreeSet::new(),
            next_number: 0,
            work: None,
        }
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Places that may be held at present.
    pub fn room(&self) -> usize {
        self.limits.max.min(self.ceiling)
    }

    /// Places held.
    pub fn open(&self) -> usize {
        self.open
    }

    pub fn waiting(&self) -> usize {
        self.order.waiting()
    }

    /// Keys that hold places or wait: places and waiters of each.
    pub fn busy(&self) -> impl Iterator<Item = (KeyId, u32, usize)> {
        self.order.busy()
    }

    /// So many places, or as many as there are; none where they are taken.
    fn fit(&self, key: KeyId, asked: u32) -> Option<u32> {
        let room = self.room();
        let most = u32::try_from(room).unwrap_or(u32::MAX);
        let places = self.order.places(key, asked.clamp(1, most.max(1)));
        (self.gate == Gate::Open && self.open + places as usize <= room).then_some(places)
    }

    /// A request comes at `now`, asks for so many places and will not wait beyond `deadline`.
    pub fn arrive(&mut self, now: Duration, deadline: Duration, caller: Caller, asked: u32) -> Arrival {
        let key = caller.key;
        let asked = asked.clamp(1, u32::try_from(self.limits.max.max(1)).unwrap_or(u32::MAX));
        self.order.meet(caller);
        let waiting = self.order.length(key);
        if self.order.is_idle()
            && waiting == 0
            && self.order.may_take(key, asked)
            && let Some(places) = self.fit(key, asked)
        {
            self.order.pass(key, places);
            self.open += places as usize;
            return Arrival::Admitted { places };
        }
        if caller.terms.queue.is_some_and(|most| waiting >= most as usize) {
            return Arrival::KeyFull;
        }
        let is_full = self.waiting() >= self.limits.queue;
        let displaced = if is_full && self.limits.queue > 0 { self.order.displaced_by(key) } else { None };
        if is_full && displaced.is_none() {
            return Arrival::Full;
        }
        // While the engine is away nothing measured says when it returns.
        if self.gate == Gate::Open && self.expected_wait(key).is_some_and(|wait| now + wait > deadline) {
            return Arrival::Hopeless;
        }
        if let Some(id) = displaced {
            self.forget(id);
        }
        let ahead = self.order.ahead(key);
        let id = WaiterId { deadline, number: self.next_number, key };
        self.next_number += 1;
        self.order.push(id, asked);
        self.deadlines.insert(id);
        Arrival::Queued { id, ahead, displaced }
    }

    /// Says whether it was there.
    fn forget(&mut self, id: WaiterId) -> bool {
        let known = self.deadlines.remove(&id);
        if known {
            self.order.remove(id);
        }
        known
    }

    /// Gives the next waiter its places, if there is one and they are free. Call until it says `None`.
    pub fn admit_next(&mut self) -> Option<(WaiterId, u32)> {
        let next = self.order.next()?;
        let places = self.fit(next.id.key, next.asked)?;
        self.deadlines.remove(&next.id);
        self.order.admit(next, places);
        self.open += places as usize;
        Some((next.id, places))
    }

    /// Places become free; their request held them for `held`, if that says something about service.
    pub fn leave(&mut self, key: KeyId, places: u32, held: Option<Duration>) {
        debug_assert!(self.open >= places as usize, "a place was freed twice");
        self.open = self.open.saturating_sub(places as usize);
        self.order.leave(key, places, held);
        if let Some(held) = held {
            let sample = held.as_secs_f64() * f64::from(places);
            self.work = Some(self.work.map_or(sample, |mean| mean + NEWEST * (sample - mean)));
        }
    }

    /// A waiter goes away. Says whether it was still waiting.
    pub fn cancel(&mut self, id: WaiterId) -> Cancelled {
        if self.forget(id) { Cancelled::Waiting } else { Cancelled::Unknown }
    }

    /// Removes and names one waiter whose deadline has passed, and what kept it. Call until it says
    /// `None`.
    pub fn expire_next(&mut self, now: Duration) -> Option<(WaiterId, Bound)> {
        let id = *self.deadlines.first().filter(|id| id.deadline <= now)?;
        let bound = if self.order.is_held_by_its_key(id.key) { Bound::Key } else { Bound::Node };
        self.forget(id);
        Some((id, bound))
    }

    /// Removes and names one waiter, whoever it is: nobody will be admitted again.
    pub fn turn_away_next(&mut self) -> Option<WaiterId> {
        let id = *self.deadlines.first()?;
        self.forget(id);
        Some(id)
    }

    pub fn gate(&self) -> Gate {
        self.gate
    }

    pub fn set_gate(&mut self, gate: Gate) {
        self.gate = gate;
    }

    /// New limits. Who is open stays open and who waits goes on waiting, even above the new ones.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// What the engine can take at present; the same holds for who is above it.
    pub fn set_ceiling(&mut self, ceiling: usize) {
        self.ceiling = ceiling;
    }

    /// How long a request that comes now with this key would wait, by what was measured.
    pub fn expected_wait(&self, key: KeyId) -> Option<Duration> {
        let places = self.room().max(1) as f64;
        let node = self.work.map(|work| work * (self.order.ahead(key) as f64 + 1.0) / places);
        let node = node.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        node.max(self.order.own_wait(key))
    }
}

/// What a cancellation found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    Waiting,
    /// Admitted, expired, displaced or turned away before.
    Unknown,
}

#[cfg(test)]
mod tests;
