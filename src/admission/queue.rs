//! The queue before the engine, as data: what happens at each arrival, departure and deadline.
//!
//! It does not wait, wake, lock or look at a clock. Time is a [`Duration`] since any fixed moment.
//! Order is first in, first out; fairness between keys belongs in [`Queue::admit_next`], the only
//! place that picks who is next.

use std::collections::VecDeque;
use std::time::Duration;

use crate::link::Gate;

/// How many may be open at once and how many may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub max: usize,
    pub queue: usize,
}

/// Names one waiting request. Never used twice in a queue's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WaiterId(u64);

/// What an arrival led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    Admitted,
    /// Waits; `ahead` requests stand before it.
    Queued {
        id: WaiterId,
        ahead: usize,
    },
    /// As many wait already as may.
    Full,
    /// It would still be waiting when its deadline passes, by what was measured.
    Hopeless,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Waiter {
    id: WaiterId,
    deadline: Duration,
}

/// Share of the newest sample in the mean service time: the last some ten requests decide.
const NEWEST: f64 = 0.1;

#[derive(Debug)]
pub struct Queue {
    limits: Limits,
    gate: Gate,
    open: usize,
    /// Ids ascend from front to back: an id is found by bisection.
    waiting: VecDeque<Waiter>,
    next_id: u64,
    /// Mean seconds a request holds its place; none before the first one ended.
    service: Option<f64>,
}

impl Queue {
    pub fn new(limits: Limits, gate: Gate) -> Self {
        Self { limits, gate, open: 0, waiting: VecDeque::new(), next_id: 0, service: None }
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn open(&self) -> usize {
        self.open
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// A request comes at `now` and will not wait beyond `deadline`.
    pub fn arrive(&mut self, now: Duration, deadline: Duration) -> Arrival {
        if self.gate == Gate::Open && self.waiting.is_empty() && self.open < self.limits.max {
            self.open += 1;
            return Arrival::Admitted;
        }
        let ahead = self.waiting.len();
        if ahead >= self.limits.queue {
            return Arrival::Full;
        }
        // While the engine is away nothing measured says when it returns.
        if self.gate == Gate::Open && self.expected_wait(ahead).is_some_and(|wait| now + wait > deadline) {
            return Arrival::Hopeless;
        }
        let id = WaiterId(self.next_id);
        self.next_id += 1;
        self.waiting.push_back(Waiter { id, deadline });
        Arrival::Queued { id, ahead }
    }

    /// Gives the next waiter a place, if there is one of each. Call until it says `None`.
    pub fn admit_next(&mut self) -> Option<WaiterId> {
        if self.gate == Gate::Closed || self.open >= self.limits.max {
            return None;
        }
        let waiter = self.waiting.pop_front()?;
        self.open += 1;
        Some(waiter.id)
    }

    /// A place becomes free; its request held it for `held`, if that says something about service.
    pub fn leave(&mut self, held: Option<Duration>) {
        debug_assert!(self.open > 0, "a place was freed twice");
        self.open = self.open.saturating_sub(1);
        if let Some(held) = held {
            let sample = held.as_secs_f64();
            self.service = Some(self.service.map_or(sample, |mean| mean + NEWEST * (sample - mean)));
        }
    }

    /// A waiter goes away. Says whether it was still waiting.
    pub fn cancel(&mut self, id: WaiterId) -> Cancelled {
        match self.waiting.binary_search_by_key(&id, |waiter| waiter.id) {
            Ok(at) => {
                self.waiting.remove(at);
                Cancelled::Waiting
            }
            Err(_) => Cancelled::Unknown,
        }
    }

    /// Removes and names one waiter whose deadline has passed. Call until it says `None`.
    pub fn expire_next(&mut self, now: Duration) -> Option<WaiterId> {
        let at = self.waiting.iter().position(|waiter| waiter.deadline <= now)?;
        self.waiting.remove(at).map(|waiter| waiter.id)
    }

    /// Removes and names one waiter, whoever it is: nobody will be admitted again.
    pub fn turn_away_next(&mut self) -> Option<WaiterId> {
        self.waiting.pop_front().map(|waiter| waiter.id)
    }

    pub fn set_gate(&mut self, gate: Gate) {
        self.gate = gate;
    }

    /// New limits. Who is open stays open and who waits goes on waiting, even above the new ones.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// How long a request with `ahead` before it would wait, by the measured service time.
    pub fn expected_wait(&self, ahead: usize) -> Option<Duration> {
        let places = self.limits.max.max(1) as f64;
        let seconds = self.service? * (ahead as f64 + 1.0) / places;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// What a cancellation found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    Waiting,
    /// Admitted, expired or turned away before.
    Unknown,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn places_go_first_in_first_out() {
        let mut queue = Queue::new(Limits { max: 1, queue: 2 }, Gate::Open);
        assert_eq!(queue.arrive(secs(0), secs(9)), Arrival::Admitted);
        let Arrival::Queued { id: first, ahead: 0 } = queue.arrive(secs(0), secs(9)) else { panic!("queued") };
        let Arrival::Queued { id: second, ahead: 1 } = queue.arrive(secs(0), secs(9)) else { panic!("queued") };
        assert_eq!(queue.arrive(secs(0), secs(9)), Arrival::Full);
        assert_eq!(queue.admit_next(), None);
        queue.leave(Some(secs(1)));
        assert_eq!(queue.admit_next(), Some(first));
        assert_eq!(queue.admit_next(), None);
        queue.leave(Some(secs(1)));
        assert_eq!(queue.admit_next(), Some(second));
    }

    #[test]
    fn a_closed_gate_admits_nobody_and_keeps_the_order() {
        let mut queue = Queue::new(Limits { max: 2, queue: 9 }, Gate::Closed);
        let Arrival::Queued { id: first, .. } = queue.arrive(secs(0), secs(9)) else { panic!("queued") };
        let Arrival::Queued { id: second, .. } = queue.arrive(secs(0), secs(9)) else { panic!("queued") };
        assert_eq!(queue.admit_next(), None);
        queue.set_gate(Gate::Open);
        assert_eq!((queue.admit_next(), queue.admit_next(), queue.admit_next()), (Some(first), Some(second), None));
    }

    #[test]
    fn nobody_overtakes_the_queue_when_a_place_is_free() {
        let mut queue = Queue::new(Limits { max: 1, queue: 9 }, Gate::Closed);
        assert!(matches!(queue.arrive(secs(0), secs(9)), Arrival::Queued { .. }));
        queue.set_gate(Gate::Open);
        assert!(matches!(queue.arrive(secs(0), secs(9)), Arrival::Queued { ahead: 1, .. }));
    }

    #[test]
    fn a_deadline_shorter_than_the_measured_wait_is_refused_at_once() {
        let mut queue = Queue::new(Limits { max: 1, queue: 9 }, Gate::Open);
        assert_eq!(queue.arrive(secs(0), secs(60)), Arrival::Admitted);
        queue.leave(Some(secs(10)));
        assert_eq!(queue.arrive(secs(0), secs(60)), Arrival::Admitted);
        assert_eq!(queue.arrive(secs(0), secs(5)), Arrival::Hopeless);
        assert!(matches!(queue.arrive(secs(0), secs(11)), Arrival::Queued { .. }));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Arrive { patience: u64 },
        Leave,
        Cancel(usize),
        Pass(u64),
        Gate(bool),
        Limits { max: usize, queue: usize },
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (1u64..50).prop_map(|patience| Op::Arrive { patience }),
            3 => Just(Op::Leave),
            1 => (0usize..20).prop_map(Op::Cancel),
            2 => (0u64..20).prop_map(Op::Pass),
            1 => any::<bool>().prop_map(Op::Gate),
            1 => (0usize..5, 0usize..6).prop_map(|(max, queue)| Op::Limits { max, queue }),
        ]
    }

    proptest! {
        /// A slow, obvious model beside the queue: a plain list of waiters and a count.
        #[test]
        fn the_queue_does_what_the_model_does(ops in proptest::collection::vec(op(), 0..200)) {
            let mut limits = Limits { max: 2, queue: 4 };
            let mut queue = Queue::new(limits, Gate::Open);
            let mut gate = Gate::Open;
            let (mut now, mut open) = (secs(0), 0usize);
            let mut model: Vec<(WaiterId, Duration)> = Vec::new();
            for op in ops {
                match op {
                    Op::Arrive { patience } => {
                        let deadline = now + secs(patience);
                        let free = gate == Gate::Open && open < limits.max && model.is_empty();
                        match queue.arrive(now, deadline) {
                            Arrival::Admitted => { prop_assert!(free); open += 1; }
                            Arrival::Queued { id, ahead } => {
                                prop_assert!(!free && model.len() < limits.queue);
                                prop_assert_eq!(ahead, model.len());
                                prop_assert!(model.iter().all(|(known, _)| *known < id));
                                model.push((id, deadline));
                            }
                            Arrival::Full => prop_assert!(!free && model.len() >= limits.queue),
                            Arrival::Hopeless => prop_assert!(false, "nothing was measured"),
                        }
                    }
                    Op::Leave => if open > 0 { open -= 1; queue.leave(None); },
                    Op::Cancel(at) => if !model.is_empty() {
                        let (id, _) = model.remove(at % model.len());
                        prop_assert_eq!(queue.cancel(id), Cancelled::Waiting);
                        prop_assert_eq!(queue.cancel(id), Cancelled::Unknown);
                    },
                    Op::Pass(by) => now += secs(by),
                    Op::Gate(is_open) => { gate = if is_open { Gate::Open } else { Gate::Closed }; queue.set_gate(gate); }
                    Op::Limits { max, queue: room } => { limits = Limits { max, queue: room }; queue.set_limits(limits); }
                }
                let mut expired = Vec::new();
                while let Some(id) = queue.expire_next(now) { expired.push(id); }
                let due: Vec<_> = model.iter().filter(|w| w.1 <= now).map(|w| w.0).collect();
                model.retain(|w| w.1 > now);
                prop_assert_eq!(expired, due);
                while let Some(id) = queue.admit_next() {
                    prop_assert!(gate == Gate::Open && open < limits.max);
                    prop_assert_eq!(id, model.remove(0).0);
                    open += 1;
                }
                prop_assert!(gate == Gate::Closed || open >= limits.max || model.is_empty(), "a place stays empty");
                prop_assert_eq!((queue.open(), queue.waiting()), (open, model.len()));
            }
        }
    }
}
