use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::num::NonZeroU32;

use proptest::prelude::*;

use super::*;
use crate::admission::{Priority, Terms};

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

const ANYBODY: Caller = Caller::ANYBODY;

fn key(number: u32, terms: Terms) -> Caller {
    Caller { key: KeyId(number), terms }
}

fn weighing(number: u32, weight: u32) -> Caller {
    key(number, Terms { weight: NonZeroU32::new(weight).unwrap(), ..Terms::DEFAULT })
}

fn of_priority(number: u32, priority: Priority) -> Caller {
    key(number, Terms { priority, ..Terms::DEFAULT })
}

fn queue(max: usize, queue: usize) -> Queue {
    Queue::new(Limits { max, queue }, Gate::Open)
}

const ADMITTED: Arrival = Arrival::Admitted { places: 1 };

impl Queue {
    /// One place, until far in the future.
    fn comes(&mut self, caller: Caller) -> Arrival {
        self.arrive(secs(0), secs(1_000_000), caller, 1)
    }

    fn waits(&mut self, caller: Caller) -> WaiterId {
        match self.comes(caller) {
            Arrival::Queued { id, .. } => id,
            other => panic!("{other:?}"),
        }
    }

    fn goes(&mut self) -> Option<KeyId> {
        self.admit_next().map(|(id, _)| id.key)
    }
}

#[test]
fn places_go_first_in_first_out() {
    let mut queue = queue(1, 2);
    assert_eq!(queue.comes(ANYBODY), ADMITTED);
    let Arrival::Queued { id: first, ahead: 0, displaced: None } = queue.comes(ANYBODY) else { panic!("queued") };
    let Arrival::Queued { id: second, ahead: 1, displaced: None } = queue.comes(ANYBODY) else { panic!("queued") };
    assert_eq!(queue.comes(ANYBODY), Arrival::Full);
    assert_eq!(queue.admit_next(), None);
    queue.leave(KeyId::ANYBODY, 1, Some(secs(1)));
    assert_eq!(queue.admit_next(), Some((first, 1)));
    assert_eq!(queue.admit_next(), None);
    queue.leave(KeyId::ANYBODY, 1, Some(secs(1)));
    assert_eq!(queue.admit_next(), Some((second, 1)));
}

#[test]
fn a_closed_gate_admits_nobody_and_keeps_the_order() {
    let mut queue = Queue::new(Limits { max: 2, queue: 9 }, Gate::Closed);
    let (first, second) = (queue.waits(ANYBODY), queue.waits(ANYBODY));
    assert_eq!(queue.admit_next(), None);
    queue.set_gate(Gate::Open);
    let gone: Vec<_> = std::iter::from_fn(|| queue.admit_next()).collect();
    assert_eq!(gone, [(first, 1), (second, 1)]);
}

#[test]
fn nobody_overtakes_the_queue_when_a_place_is_free() {
    let mut queue = Queue::new(Limits { max: 1, queue: 9 }, Gate::Closed);
    queue.waits(ANYBODY);
    queue.set_gate(Gate::Open);
    assert!(matches!(queue.comes(ANYBODY), Arrival::Queued { ahead: 1, .. }));
}

#[test]
fn a_deadline_shorter_than_the_measured_wait_is_refused_at_once() {
    let mut queue = queue(1, 9);
    assert_eq!(queue.arrive(secs(0), secs(60), ANYBODY, 1), ADMITTED);
    queue.leave(KeyId::ANYBODY, 1, Some(secs(10)));
    assert_eq!(queue.arrive(secs(0), secs(60), ANYBODY, 1), ADMITTED);
    assert_eq!(queue.arrive(secs(0), secs(5), ANYBODY, 1), Arrival::Hopeless);
    assert!(matches!(queue.arrive(secs(0), secs(11), ANYBODY, 1), Arrival::Queued { .. }));
}

#[test]
fn f03_a_flood_of_one_key_waits_while_anothers_single_request_passes_next() {
    let mut queue = queue(2, 100);
    let (flood, single) = (weighing(1, 1), weighing(2, 1));
    assert_eq!((queue.comes(flood), queue.comes(flood)), (ADMITTED, ADMITTED));
    for _ in 0..98 {
        queue.waits(flood);
    }
    assert!(matches!(queue.comes(single), Arrival::Queued { ahead: 1, .. }));
    queue.leave(flood.key, 1, Some(secs(1)));
    assert_eq!(queue.goes(), Some(single.key));
}

#[test]
fn a_key_that_was_idle_has_saved_nothing_up() {
    let mut queue = queue(1, 1000);
    let (busy, idle) = (weighing(1, 1), weighing(2, 1));
    assert_eq!(queue.comes(busy), ADMITTED);
    for _ in 0..100 {
        queue.waits(busy);
    }
    for _ in 0..50 {
        queue.leave(busy.key, 1, Some(secs(1)));
        assert_eq!(queue.goes(), Some(busy.key));
    }
    for _ in 0..50 {
        queue.waits(idle);
    }
    let mut last = busy.key;
    let mut of_idle = 0;
    for _ in 0..20 {
        queue.leave(last, 1, Some(secs(1)));
        last = queue.goes().unwrap();
        of_idle += usize::from(last == idle.key);
    }
    assert!((9..=11).contains(&of_idle), "{of_idle} of 20");
}

#[test]
fn f03_a_flood_does_not_keep_another_key_out_of_the_queue() {
    let mut queue = queue(1, 4);
    let (flood, other) = (weighing(1, 1), weighing(2, 1));
    assert_eq!(queue.comes(flood), ADMITTED);
    let waiting: Vec<WaiterId> = (0..4).map(|_| queue.waits(flood)).collect();
    assert_eq!(queue.comes(flood), Arrival::Full);
    for made_room in [waiting[3], waiting[2]] {
        let Arrival::Queued { displaced, .. } = queue.comes(other) else { panic!("queued") };
        assert_eq!(displaced, Some(made_room), "the youngest of the longest line");
        assert_eq!(queue.cancel(made_room), Cancelled::Unknown);
    }
    assert_eq!(queue.comes(other), Arrival::Full, "each has its half by now");
    assert_eq!(queue.waiting(), 4);
}

#[test]
fn a_keys_own_limits_bind_that_key_alone() {
    let limited = key(1, Terms { concurrency: Some(NonZeroU32::new(2).unwrap()), queue: Some(1), ..Terms::DEFAULT });
    let mut queue = queue(8, 100);
    assert_eq!((queue.comes(limited), queue.comes(limited)), (ADMITTED, ADMITTED));
    let waiter = queue.waits(limited);
    assert_eq!(queue.comes(limited), Arrival::KeyFull);
    assert_eq!(queue.comes(ANYBODY), ADMITTED, "others pass who waits for its own key");
    assert_eq!(queue.admit_next(), None);
    queue.leave(limited.key, 1, None);
    assert_eq!(queue.admit_next(), Some((waiter, 1)));
    // Terms that change apply at once, to who waits too.
    let waiter = queue.waits(limited);
    assert_eq!(queue.admit_next(), None);
    assert_eq!(
        queue.comes(key(1, Terms::DEFAULT)),
        Arrival::Queued { id: WaiterId { number: 2, ..waiter }, ahead: 1, displaced: None }
    );
    assert_eq!((queue.goes(), queue.goes(), queue.goes()), (Some(KeyId(1)), Some(KeyId(1)), None));
}

#[test]
fn who_expires_is_told_which_limit_it_was() {
    let limited = key(1, Terms { concurrency: Some(NonZeroU32::MIN), ..Terms::DEFAULT });
    let mut queue = queue(2, 9);
    assert_eq!(queue.comes(limited), ADMITTED);
    queue.arrive(secs(0), secs(3), limited, 1);
    assert_eq!(queue.comes(ANYBODY), ADMITTED);
    queue.arrive(secs(0), secs(2), ANYBODY, 1);
    assert_eq!(queue.expire_next(secs(1)), None);
    assert_eq!(queue.expire_next(secs(5)).map(|(id, bound)| (id.key, bound)), Some((KeyId::ANYBODY, Bound::Node)));
    assert_eq!(queue.expire_next(secs(5)).map(|(id, bound)| (id.key, bound)), Some((KeyId(1), Bound::Key)));
    assert_eq!(queue.expire_next(secs(5)), None);
}

#[test]
fn a_request_of_several_places_gets_them_together_and_nobody_slips_past_it() {
    let mut queue = queue(4, 9);
    for _ in 0..4 {
        assert_eq!(queue.comes(ANYBODY), ADMITTED);
    }
    let Arrival::Queued { id: large, .. } = queue.arrive(secs(0), secs(99), ANYBODY, 3) else { panic!("queued") };
    queue.waits(weighing(7, 100));
    queue.goes();
    let mut gone = Vec::new();
    for _ in 0..4 {
        queue.leave(KeyId::ANYBODY, 1, None);
        gone.extend(queue.admit_next());
    }
    assert!(gone.contains(&(large, 3)), "{gone:?}");
    assert_eq!(queue.open(), 4);
    // More than there are is as many as there are.
    queue.leave(KeyId::ANYBODY, 3, None);
    queue.leave(KeyId(7), 1, None);
    assert_eq!(queue.arrive(secs(0), secs(99), ANYBODY, 1000), Arrival::Admitted { places: 4 });
}

#[test]
fn lower_priorities_keep_their_share_of_places_and_of_the_queue() {
    let mut queue = queue(1, 2000);
    let [high, normal, low] = Priority::ALL.map(|priority| of_priority(priority as u32 + 1, priority));
    assert_eq!(queue.comes(high), ADMITTED);
    for caller in [low, normal, high] {
        for _ in 0..340 {
            queue.waits(caller);
        }
    }
    let mut served = HashMap::<KeyId, u32>::new();
    let mut last = high.key;
    for _ in 0..340 {
        queue.leave(last, 1, Some(secs(1)));
        last = queue.goes().unwrap();
        *served.entry(last).or_default() += 1;
    }
    assert_eq!(served[&low.key], 340 / (Priority::Low.passed_over() + 1));
    assert!((60..=70).contains(&served[&normal.key]), "{served:?}");
    // A flood of high ones does not empty the queue of low ones.
    for _ in 0..5000 {
        queue.comes(high);
    }
    let waiting = |caller: Caller| queue.busy().find(|(key, ..)| *key == caller.key).map_or(0, |(.., waiting)| waiting);
    assert!(waiting(low) >= 2000 / 22, "{}", waiting(low));
    assert!(waiting(high) > waiting(normal) && waiting(normal) > waiting(low));
}

#[test]
fn the_engine_sets_a_ceiling_and_who_is_above_it_stays() {
    let mut queue = queue(4, 9);
    for _ in 0..4 {
        assert_eq!(queue.comes(ANYBODY), ADMITTED);
    }
    queue.set_ceiling(2);
    let waiter = queue.waits(ANYBODY);
    for open in [3, 2] {
        queue.leave(KeyId::ANYBODY, 1, None);
        assert_eq!((queue.open(), queue.admit_next()), (open, None));
    }
    queue.leave(KeyId::ANYBODY, 1, None);
    assert_eq!(queue.admit_next(), Some((waiter, 1)));
    queue.waits(ANYBODY);
    queue.set_ceiling(100);
    assert!(queue.goes().is_some());
    assert_eq!(queue.room(), 4, "never above limits.max");
}

/// Time of places that each key gets while all have work: by weight, whatever their answers' lengths.
#[test]
fn keys_share_the_engines_time_by_weight_and_not_by_request() {
    const KEYS: [(u32, u64); 4] = [(1, 1), (1, 60), (2, 5), (4, 20)];
    let callers: Vec<Caller> = KEYS.iter().zip(1..).map(|((weight, _), number)| weighing(number, *weight)).collect();
    let mut queue = queue(16, 10_000);
    let mut random = 7u64;
    let mut held = [0u64; KEYS.len()];
    // When each open request ends, and whose it is.
    let mut open: BinaryHeap<Reverse<(u64, usize, u64)>> = BinaryHeap::default();
    let mut now = 0;
    let mut start = |queue: &mut Queue, open: &mut BinaryHeap<_>, now: u64| {
        while let Some((id, 1)) = queue.admit_next() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = id.key.0 as usize - 1;
            // Half to one and a half of the key's own length.
            let takes = KEYS[at].1 * 1000 * (500 + (random >> 33) % 1000) / 1000;
            open.push(Reverse((now + takes, at, takes)));
        }
    };
    queue.set_gate(Gate::Closed);
    for caller in &callers {
        for _ in 0..20 {
            queue.waits(*caller);
        }
    }
    queue.set_gate(Gate::Open);
    start(&mut queue, &mut open, now);
    while now < 20_000_000 {
        let Some(Reverse((end, at, takes))) = open.pop() else { panic!("places stay empty") };
        now = end;
        if now > 2_000_000 {
            held[at] += takes;
        }
        queue.leave(callers[at].key, 1, Some(Duration::from_millis(takes)));
        queue.waits(callers[at]);
        start(&mut queue, &mut open, now);
    }
    let whole: u64 = held.iter().sum();
    for ((weight, length), held) in KEYS.iter().zip(held) {
        let (share, due) = (held as f64 / whole as f64, f64::from(*weight) / 8.0);
        assert!((share / due - 1.0).abs() < 0.15, "weight {weight}, {length} s: {share:.3} of {due:.3}");
    }
}

#[test]
fn ten_thousand_waiters_leave_from_anywhere() {
    let mut queue = Queue::new(Limits { max: 10_000, queue: 10_000 }, Gate::Closed);
    let ids: Vec<WaiterId> = (0..10_000).map(|n| queue.waits(weighing(n % 100, 1))).collect();
    for id in ids.iter().skip(1).step_by(2) {
        assert_eq!(queue.cancel(*id), Cancelled::Waiting);
    }
    queue.set_gate(Gate::Open);
    let gone: Vec<WaiterId> = std::iter::from_fn(|| queue.admit_next()).map(|(id, _)| id).collect();
    assert_eq!((gone.len(), queue.waiting(), queue.open()), (5000, 0, 5000));
}

#[derive(Debug, Clone)]
enum Op {
    Arrive { key: usize, patience: u64, asked: u32 },
    Leave(usize),
    Cancel(usize),
    Pass(u64),
    Gate(bool),
    Limits { max: usize, queue: usize },
    Ceiling(usize),
    Terms { key: usize, terms: Terms },
}

fn terms() -> impl Strategy<Value = Terms> {
    let number = |most: u32| (1..most).prop_map(|n| NonZeroU32::new(n).unwrap());
    let priority = prop_oneof![Just(Priority::High), Just(Priority::Normal), Just(Priority::Low)];
    (proptest::option::of(number(4)), proptest::option::of(0u32..4), priority, number(4))
        .prop_map(|(concurrency, queue, priority, weight)| Terms { concurrency, queue, priority, weight })
}

const KEYS: usize = 4;

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0..KEYS, 1u64..50, 1u32..4).prop_map(|(key, patience, asked)| Op::Arrive { key, patience, asked }),
        6 => (0usize..20).prop_map(Op::Leave),
        2 => (0usize..20).prop_map(Op::Cancel),
        3 => (0u64..20).prop_map(Op::Pass),
        1 => any::<bool>().prop_map(Op::Gate),
        1 => (0usize..6, 0usize..8).prop_map(|(max, queue)| Op::Limits { max, queue }),
        1 => (1usize..8).prop_map(Op::Ceiling),
        1 => (0..KEYS, terms()).prop_map(|(key, terms)| Op::Terms { key, terms }),
    ]
}

/// A slow, obvious model beside the queue: a plain list of who waits and one of who is open.
#[derive(Debug)]
struct Model {
    limits: Limits,
    ceiling: usize,
    gate: Gate,
    terms: [Terms; KEYS],
    /// The terms that each key came with last: new ones count from its next request.
    known: [Terms; KEYS],
    waiting: Vec<(WaiterId, u32)>,
    open: Vec<(usize, u32)>,
}

impl Model {
    fn room(&self) -> usize {
        self.limits.max.min(self.ceiling)
    }

    fn places(&self) -> usize {
        self.open.iter().map(|(_, places)| *places as usize).sum()
    }

    fn places_of(&self, key: usize) -> u32 {
        self.open.iter().filter(|(of, _)| *of == key).map(|(_, places)| places).sum()
    }

    fn waiting_of(&self, key: usize) -> usize {
        self.waiting.iter().filter(|(id, _)| id.key.0 as usize == key).count()
    }

    /// Whether the key's own limit lets a request of so many places go now.
    fn may_take(&self, key: usize, asked: u32) -> bool {
        self.known[key].concurrency.is_none_or(|most| self.places_of(key) + asked.min(most.get()) <= most.get())
    }

    /// The oldest waiter of each key, where its key's limit lets it go.
    fn candidates(&self) -> Vec<(WaiterId, u32)> {
        let oldest = |key: usize| {
            self.waiting.iter().filter(move |(id, _)| id.key.0 as usize == key).min_by_key(|(id, _)| id.number)
        };
        (0..KEYS).filter_map(oldest).filter(|(id, asked)| self.may_take(id.key.0 as usize, *asked)).copied().collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn the_queue_does_what_the_model_does(ops in proptest::collection::vec(op(), 0..300)) {
        let mut model = Model {
            limits: Limits { max: 3, queue: 5 }, ceiling: usize::MAX, gate: Gate::Open,
            terms: [Terms::DEFAULT; KEYS], known: [Terms::DEFAULT; KEYS], waiting: Vec::new(), open: Vec::new(),
        };
        let mut queue = Queue::new(model.limits, model.gate);
        let mut now = secs(0);
        for op in ops {
            match op {
                Op::Arrive { key, patience, asked } => {
                    let deadline = now + secs(patience);
                    model.known[key] = model.terms[key];
                    let terms = model.terms[key];
                    let nobody = model.candidates().is_empty() && model.waiting_of(key) == 0;
                    let caller = Caller { key: KeyId(key as u32), terms };
                    let asked = asked.clamp(1, model.limits.max.max(1) as u32);
                    match queue.arrive(now, deadline, caller, asked) {
                        Arrival::Admitted { places } => {
                            prop_assert!(nobody && model.gate == Gate::Open, "overtook somebody");
                            prop_assert!(model.may_take(key, asked));
                            prop_assert!(places >= 1 && places <= asked);
                            model.open.push((key, places));
                            prop_assert!(model.places() <= model.room(), "above the room");
                        }
                        Arrival::Queued { id, displaced, .. } => {
                            if let Some(gone) = displaced {
                                let at = model.waiting.iter().position(|(known, _)| *known == gone);
                                model.waiting.remove(at.expect("who is displaced was waiting"));
                            }
                            prop_assert!(terms.queue.is_none_or(|most| model.waiting_of(key) < most as usize));
                            prop_assert!(model.waiting.iter().all(|(known, _)| known.number < id.number));
                            model.waiting.push((id, asked));
                            prop_assert!(model.waiting.len() <= model.limits.queue || displaced.is_some());
                        }
                        Arrival::Full => prop_assert!(model.waiting.len() >= model.limits.queue),
                        Arrival::KeyFull => {
                            prop_assert!(terms.queue.is_some_and(|most| model.waiting_of(key) >= most as usize));
                        }
                        Arrival::Hopeless => prop_assert!(false, "nothing was measured"),
                    }
                }
                Op::Leave(at) => if !model.open.is_empty() {
                    let (key, places) = model.open.remove(at % model.open.len());
                    queue.leave(KeyId(key as u32), places, None);
                },
                Op::Cancel(at) => if !model.waiting.is_empty() {
                    let (id, _) = model.waiting.remove(at % model.waiting.len());
                    prop_assert_eq!(queue.cancel(id), Cancelled::Waiting);
                    prop_assert_eq!(queue.cancel(id), Cancelled::Unknown);
                },
                Op::Pass(by) => now += secs(by),
                Op::Gate(is_open) => {
                    model.gate = if is_open { Gate::Open } else { Gate::Closed };
                    queue.set_gate(model.gate);
                }
                Op::Limits { max, queue: room } => {
                    model.limits = Limits { max, queue: room };
                    queue.set_limits(model.limits);
                }
                Op::Ceiling(ceiling) => {
                    model.ceiling = ceiling;
                    queue.set_ceiling(ceiling);
                }
                Op::Terms { key, terms } => model.terms[key] = terms,
            }
            let mut expired: Vec<WaiterId> = std::iter::from_fn(|| queue.expire_next(now)).map(|(id, _)| id).collect();
            let mut due: Vec<WaiterId> = model.waiting.iter().map(|(id, _)| *id).filter(|id| id.deadline <= now).collect();
            expired.sort_unstable();
            due.sort_unstable();
            prop_assert_eq!(expired, due);
            model.waiting.retain(|(id, _)| id.deadline > now);
            while let Some((id, places)) = queue.admit_next() {
                prop_assert!(model.gate == Gate::Open);
                let next = model.candidates().into_iter().find(|(known, _)| *known == id);
                let Some((_, asked)) = next else {
                    return Err(TestCaseError::fail("out of its key's order, or above its key's limit"));
                };
                prop_assert!(places >= 1 && places <= asked);
                model.waiting.retain(|(known, _)| *known != id);
                model.open.push((id.key.0 as usize, places));
                prop_assert!(model.places() <= model.room(), "above the room");
            }
            // Places stay empty only before somebody who needs more of them together.
            let free = model.room().saturating_sub(model.places());
            let most = model.candidates().iter().map(|(_, asked)| *asked as usize).max().unwrap_or(0).min(model.room());
            prop_assert!(model.gate == Gate::Closed || most == 0 || free < most, "{free} places stay empty");
            prop_assert_eq!((queue.open(), queue.waiting()), (model.places(), model.waiting.len()));
            prop_assert!(queue.order.is_sound());
        }
    }
}
