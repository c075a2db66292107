//! How many places the engine can fill at present, by what it says of itself: pure.
//!
//! What waits inside the engine cannot be cancelled at once, is served in the engine's order and is
//! lost with it; so it had better wait here. But the engine forms its batches out of its own line,
//! and a request is in that line for the time of a prefill even when there is room for it. The rule:
//!
//! - A line of an eighth of what runs, and of 2 at least, is the engine's own business.
//! - Never more than the engine says it runs at once, and that line.
//! - When in two looks in a row more than that waits, no more is admitted than runs, and that line.
//! - From then on each look that finds a longer line sets the same again. Each that does not lets an
//!   eighth more in, then twice as much, and so on until the limit is `limits.max` again.
//!
//! At capacity the engine's line so stays between one and two eighths of what it runs, and a long
//! prefill, a burst or a single odd look changes nothing.
//!
//! A proxy that finds an engine serving takes the place of one that died: what the engine still runs
//! of that one's is subtracted, until it is gone or for [`HEIR_LOOKS`] looks.

/// Looks for which an heir believes that strangers' requests will go. Ten a second: the engine notices a client
/// that has left within some two seconds.
const HEIR_LOOKS: u8 = 50;

/// What the engine said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests it computes.
    pub running: usize,
    /// Requests in its own line.
    pub waiting: usize,
    /// Requests that it computes at once at most; 0: not said.
    pub most: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Free,
    /// Too much waited in the last look.
    Suspected,
    /// So many are let in; with the next good look so many more.
    Held { places: usize, step: usize },
}

#[derive(Debug, Default)]
pub struct Sizing {
    state: State,
    /// Looks left in which what runs may be a dead proxy's.
    heir: u8,
}

impl Sizing {
    /// Of a proxy that finds the engine serving.
    pub fn heir() -> Self {
        Self { heir: HEIR_LOOKS, ..Self::default() }
    }

    /// Whether what runs may be a dead proxy's.
    pub fn is_heir(&self) -> bool {
        self.heir > 0
    }

    /// Places that may be held from now on, `open` of `limit` being held.
    pub fn look(&mut self, load: Load, open: usize, limit: usize) -> usize {
        if self.heir > 0 {
            let left = (load.running + load.waiting).saturating_sub(open);
            self.heir = if left == 0 { 0 } else { self.heir - 1 };
            if self.heir > 0 {
                return limit.saturating_sub(left);
            }
        }
        let line = (load.running / 8).max(2);
        let most = match load.most {
            0 => limit,
            most => limit.min(most + (most / 8).max(2)),
        };
        let floor = load.running + line;
        self.state = match self.state {
            State::Free if load.waiting > line => State::Suspected,
            State::Suspected | State::Held { .. } if load.waiting > line => State::Held { places: floor, step: line },
            State::Free | State::Suspected => State::Free,
            State::Held { places, step } => {
                let places = places.max(load.running + load.waiting).saturating_add(step);
                if places < most { State::Held { places, step: step.saturating_mul(2) } } else { State::Free }
            }
        };
        match self.state {
            State::Held { places, .. } => places.min(most),
            State::Free | State::Suspected => most,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn load(running: usize, waiting: usize) -> Load {
        Load { running, waiting, most: 0 }
    }

    #[test]
    fn a_prefill_a_burst_or_one_odd_look_changes_nothing() {
        let mut sizing = Sizing::default();
        for odd in [load(0, 20), load(20, 0), load(30, 3), load(5, 2), load(40, 30), load(40, 5), load(0, 0)] {
            assert_eq!(sizing.look(odd, 20, 64), 64, "{odd:?}");
        }
    }

    #[test]
    fn what_the_engine_would_queue_waits_here_and_passes_when_there_is_room() {
        let mut sizing = Sizing::default();
        assert_eq!(sizing.look(load(32, 32), 64, 64), 64);
        assert_eq!(sizing.look(load(32, 32), 64, 64), 36);
        assert_eq!(sizing.look(load(32, 8), 40, 64), 36, "as long as the line is too long");
        // Growth is careful at first, then quick.
        let places: Vec<usize> = (0..4).map(|_| sizing.look(load(32, 0), 32, 64)).collect();
        assert_eq!(places, [40, 48, 64, 64]);
    }

    #[test]
    fn the_engine_is_not_given_more_than_it_says_it_runs() {
        let mut sizing = Sizing::default();
        assert_eq!(sizing.look(Load { most: 32, ..load(0, 0) }, 1, 64), 36);
        assert_eq!(sizing.look(Load { most: 32, ..load(0, 0) }, 1, 16), 16);
        assert_eq!(sizing.look(Load { most: 32, ..load(0, 0) }, 1, 32), 32);
    }

    #[test]
    fn an_heir_leaves_room_for_what_a_dead_proxy_left_behind() {
        let mut sizing = Sizing::heir();
        assert_eq!(sizing.look(load(20, 5), 0, 32), 7);
        assert_eq!(sizing.look(load(10, 0), 4, 32), 26);
        assert_eq!(sizing.look(load(4, 0), 4, 32), 32);
        assert!(!sizing.is_heir());
        assert_eq!(sizing.look(load(20, 0), 4, 32), 32, "others' requests are not subtracted for ever");
        let mut sizing = Sizing::heir();
        let places: Vec<usize> = (0..u16::from(HEIR_LOOKS)).map(|_| sizing.look(load(99, 0), 0, 32)).collect();
        assert_eq!((places[0], places.last()), (0, Some(&32)));
    }

    proptest! {
        /// An engine that runs `capacity` at once and is asked for more than that all the time: its line
        /// stays short, and its places full.
        #[test]
        fn at_capacity_the_engines_line_stays_short(capacity in 4usize..200, limit in 1usize..600, speed in 1usize..20) {
            let mut sizing = Sizing::default();
            let mut open = 0usize;
            let mut room = limit;
            for second in 0..1500 {
                // Some end, and as many come as there is room for.
                open -= (open.min(capacity) * speed).div_ceil(20).min(open);
                open = open.max(room);
                let running = open.min(capacity);
                room = sizing.look(load(running, open - running), open, limit);
                prop_assert!(room >= 1 && room <= limit);
                // Those who were let in before it was known are gone by then.
                if second > 1000 {
                    prop_assert!(open - running <= capacity / 4 + 6, "{} wait in an engine of {capacity}", open - running);
                    prop_assert!(running == capacity.min(limit), "{running} of {capacity} run");
                }
            }
        }
    }
}
