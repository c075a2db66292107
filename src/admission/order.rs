//! Who is next, as data: one line of waiters a key, and a fair order between the lines.
//!
//! Within a line it is first come, first served. Between lines of one priority it is start-time fair
//! queueing: each admission is charged to its line what it is expected to hold (places × the mean time
//! that the key's requests took) by the key's weight, and the line that has been charged least goes
//! next. So shares are shares of the engine's time: a key of long answers does not crowd out one of
//! short ones, a flood waits behind a single request, and an idle key saves nothing up.
//!
//! Higher priorities go first, but a lower one that was passed over [`PASSED_OVER`] times goes before
//! them: of 5 admissions one is left to normal or lower ones that wait, of 17 one to low ones.
//!
//! All steps take the logarithm of the number of keys or of waiters. It knows no deadlines and no
//! bounds of the queue: those are [`super::queue`]'s.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::terms::{Caller, KeyId, Terms};

/// How often a priority may be passed over while somebody of it could go.
const PASSED_OVER: [u32; 3] = [u32::MAX, 4, 16];
/// What a priority's weight is beside the others' where room in the queue is shared.
const STANDING: [u64; 3] = [16, 4, 1];
/// Charged, in microseconds, before the first request of a key has ended.
const UNKNOWN: u64 = 1_000_000;
/// A single charge: no key buys itself out for longer than that.
const MOST: u64 = 3_600_000_000;
/// Share of the newest sample in a mean: the last some ten requests decide.
pub const NEWEST: f64 = 0.1;
/// Resolution of a line's length by its weight.
const SCALE: u64 = 1 << 20;

/// Names one waiting request. Never used twice in a queue's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WaiterId {
    // First, so that ids are in the order in which they expire.
    pub(super) deadline: Duration,
    pub(super) number: u64,
    pub(super) key: KeyId,
}

#[derive(Debug, Clone, Copy)]
struct Waiter {
    deadline: Duration,
    /// Places that it asks for.
    asked: u32,
}

/// One key's requests.
#[derive(Debug, Default)]
struct Line {
    terms: Terms,
    /// By number: oldest first.
    waiting: BTreeMap<u64, Waiter>,
    /// Places held.
    open: u32,
    /// Up to when, in the virtual time of its priority, what it was given is charged.
    charged: u64,
    /// Mean seconds that a place is held.
    service: Option<f64>,
    /// Under which time it stands in `ready`.
    listed: Option<u64>,
}

impl Line {
    /// Places for a request that asks for `asked`: never more than the key may ever hold.
    fn places(&self, asked: u32) -> u32 {
        self.terms.concurrency.map_or(asked, |most| asked.min(most.get()))
    }

    fn may_take(&self, asked: u32) -> bool {
        self.terms.concurrency.is_none_or(|most| self.open + self.places(asked) <= most.get())
    }

    /// Whether its oldest waiter may go as far as the key's own limit is concerned.
    fn is_ready(&self) -> bool {
        self.waiting.first_key_value().is_some_and(|(_, waiter)| self.may_take(waiter.asked))
    }

    fn standing(&self) -> u64 {
        u64::from(self.terms.weight.get()) * STANDING[self.terms.priority as usize]
    }

    fn length(&self, waiting: usize) -> u64 {
        waiting as u64 * SCALE / self.standing()
    }

    fn charge(&self, places: u32) -> u64 {
        let each = self.service.map_or(UNKNOWN, |seconds| (seconds * 1e6) as u64);
        (u64::from(places) * each / u64::from(self.terms.weight.get())).clamp(1, MOST)
    }
}

/// The next waiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Next {
    pub id: WaiterId,
    /// Places it asks for.
    pub asked: u32,
}

#[derive(Debug, Default)]
pub struct Order {
    /// By the key's number.
    lines: Vec<Line>,
    /// Lines whose oldest waiter may go, by priority and virtual time.
    ready: [BTreeSet<(u64, KeyId)>; 3],
    clocks: [u64; 3],
    passed_over: [u32; 3],
    /// Lines with waiters, by their length against their standing.
    lengths: BTreeSet<(u64, KeyId)>,
    waiting: usize,
    /// Of the lines in `ready`: their standing, and their waiters.
    standing: u64,
    contending: usize,
}

impl Order {
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// Whether nobody who waits could go if there were room.
    pub fn is_idle(&self) -> bool {
        self.ready.iter().all(BTreeSet::is_empty)
    }

    fn line(&self, key: KeyId) -> &Line {
        &self.lines[key.0 as usize]
    }

    /// Makes the caller's line, with the terms of now.
    pub fn meet(&mut self, caller: Caller) {
        let at = caller.key.0 as usize;
        if at >= self.lines.len() {
            self.lines.resize_with(at + 1, Line::default);
        }
        if self.lines[at].terms != caller.terms {
            self.change(caller.key, |line| line.terms = caller.terms);
        }
    }

    /// Whether the key's own limits let a request pass right now.
    pub fn may_take(&self, key: KeyId, asked: u32) -> bool {
        self.line(key).may_take(asked)
    }

    pub fn places(&self, key: KeyId, asked: u32) -> u32 {
        self.line(key).places(asked)
    }

    pub fn length(&self, key: KeyId) -> usize {
        self.line(key).waiting.len()
    }

    /// Changes a line and keeps its place in the lists in step.
    fn change<T>(&mut self, key: KeyId, how: impl FnOnce(&mut Line) -> T) -> T {
        let line = &mut self.lines[key.0 as usize];
        let (before, priority_before) = (line.waiting.len(), line.terms.priority);
        if before > 0 {
            self.lengths.remove(&(line.length(before), key));
        }
        let mut was_listed = line.listed.take();
        if let Some(time) = was_listed {
            self.standing -= line.standing();
            self.contending -= before;
            self.ready[line.terms.priority as usize].remove(&(time, key));
        }
        let outcome = how(line);
        if line.terms.priority != priority_before {
            // Each priority has a time of its own.
            (was_listed, line.charged) = (None, 0);
        }
        let after = line.waiting.len();
        self.waiting = self.waiting + after - before;
        if after > 0 {
            self.lengths.insert((line.length(after), key));
        }
        if line.is_ready() {
            let priority = line.terms.priority as usize;
            // Who has been away has saved nothing up.
            let time = was_listed.unwrap_or(0).max(line.charged).max(self.clocks[priority]);
            line.listed = Some(time);
            self.standing += line.standing();
            self.contending += after;
            self.ready[priority].insert((time, key));
        }
        outcome
    }

    pub fn push(&mut self, id: WaiterId, asked: u32) {
        self.change(id.key, |line| line.waiting.insert(id.number, Waiter { deadline: id.deadline, asked }));
    }

    /// Takes one away that will not go.
    pub fn remove(&mut self, id: WaiterId) {
        self.change(id.key, |line| line.waiting.remove(&id.number));
    }

    fn next_priority(&self) -> Option<usize> {
        let waits = |priority: &usize| !self.ready[*priority].is_empty();
        let patient =
            (1..3).rev().find(|priority| self.passed_over[*priority] >= PASSED_OVER[*priority] && waits(priority));
        patient.or_else(|| (0..3).find(waits))
    }

    /// Who goes when there is room.
    pub fn next(&self) -> Option<Next> {
        let (_, key) = *self.ready[self.next_priority()?].first()?;
        let (number, waiter) = self.line(key).waiting.first_key_value()?;
        let id = WaiterId { deadline: waiter.deadline, number: *number, key };
        Some(Next { id, asked: waiter.asked })
    }

    /// Lets [`Self::next`] go, with so many places.
    pub fn admit(&mut self, next: Next, places: u32) {
        let key = next.id.key;
        let priority = self.line(key).terms.priority as usize;
        let time = self.line(key).listed.unwrap_or_default();
        self.clocks[priority] = self.clocks[priority].max(time);
        self.change(key, |line| {
            line.waiting.remove(&next.id.number);
            line.open += places;
            line.charged = time.saturating_add(line.charge(places));
        });
        self.passed_over[priority] = 0;
        for lower in priority + 1..3 {
            if self.ready[lower].is_empty() {
                self.passed_over[lower] = 0;
            } else {
                self.passed_over[lower] = self.passed_over[lower].saturating_add(1);
            }
        }
    }

    /// Lets a request go that never waited.
    pub fn pass(&mut self, key: KeyId, places: u32) {
        let line = &mut self.lines[key.0 as usize];
        let clock = &mut self.clocks[line.terms.priority as usize];
        *clock = line.charged.max(*clock);
        line.charged = clock.saturating_add(line.charge(places));
        line.open += places;
    }

    /// Places come back. `held`: for how long they were of use.
    pub fn leave(&mut self, key: KeyId, places: u32, held: Option<Duration>) {
        self.change(key, |line| {
            debug_assert!(line.open >= places, "a place was freed twice");
            line.open = line.open.saturating_sub(places);
            if let Some(held) = held {
                let sample = held.as_secs_f64();
                line.service = Some(line.service.map_or(sample, |mean| mean + NEWEST * (sample - mean)));
            }
        });
    }

    /// Whose line is the longest against its standing, if it is longer than `key`'s would be with one
    /// more: the youngest there makes room.
    pub fn displaced_by(&self, key: KeyId) -> Option<WaiterId> {
        let line = self.line(key);
        let (longest, victim) = *self.lengths.last()?;
        if longest <= line.length(line.waiting.len() + 1) {
            return None;
        }
        let (number, waiter) = self.line(victim).waiting.last_key_value()?;
        Some(WaiterId { deadline: waiter.deadline, number: *number, key: victim })
    }

    /// How many would go before a request that comes now with this key.
    pub fn ahead(&self, key: KeyId) -> usize {
        let line = self.line(key);
        let own = line.waiting.len();
        let (standing, contending) = match line.listed {
            Some(_) => (self.standing - line.standing(), self.contending - own),
            None => (self.standing, self.contending),
        };
        let overtaking = (own as u64 + 1) * standing / line.standing();
        own + contending.min(usize::try_from(overtaking).unwrap_or(usize::MAX))
    }

    /// Whether it is the key's own limit that keeps its waiters.
    pub fn is_held_by_its_key(&self, key: KeyId) -> bool {
        let line = self.line(key);
        !line.waiting.is_empty() && !line.is_ready()
    }

    /// How long the key's own limit alone keeps a request that comes now.
    pub fn own_wait(&self, key: KeyId) -> Option<Duration> {
        let line = self.line(key);
        let places = line.terms.concurrency?.get();
        if line.may_take(1) && line.waiting.is_empty() {
            return None;
        }
        let seconds = line.service? * (line.waiting.len() as f64 + 1.0) / f64::from(places);
        Duration::try_from_secs_f64(seconds).ok()
    }

    /// Keys that hold places or wait: places and waiters of each.
    pub fn busy(&self) -> impl Iterator<Item = (KeyId, u32, usize)> {
        let busy = self.lines.iter().zip(0..).filter(|(line, _)| line.open > 0 || !line.waiting.is_empty());
        busy.map(|(line, number)| (KeyId(number), line.open, line.waiting.len()))
    }

    #[cfg(test)]
    pub fn is_sound(&self) -> bool {
        let waiting: usize = self.lines.iter().map(|line| line.waiting.len()).sum();
        let listed = || self.lines.iter().filter(|line| line.listed.is_some());
        let standing: u64 = listed().map(Line::standing).sum();
        let contending: usize = listed().map(|line| line.waiting.len()).sum();
        let ready = self.lines.iter().filter(|line| line.is_ready()).count();
        let lines = self.lines.iter().filter(|line| !line.waiting.is_empty()).count();
        waiting == self.waiting
            && (standing, contending) == (self.standing, self.contending)
            && ready == listed().count()
            && ready == self.ready.iter().map(BTreeSet::len).sum::<usize>()
            && lines == self.lengths.len()
    }
}

#[cfg(test)]
impl super::terms::Priority {
    pub fn passed_over(self) -> u32 {
        PASSED_OVER[self as usize]
    }
}
