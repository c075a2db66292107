//! A log line that others can cause at will, said at most each [`PAUSE`].

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// Often enough to be seen while it happens, too seldom to fill a disk.
const PAUSE: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub struct Seldom {
    said: Cell<Option<Instant>>,
    unsaid: Cell<u64>,
}

impl Seldom {
    /// Says it, with how many were left unsaid since the last time; or leaves it.
    pub fn say(&self, line: impl FnOnce(u64)) {
        let now = Instant::now();
        if self.said.get().is_some_and(|at| now.duration_since(at) < PAUSE) {
            self.unsaid.set(self.unsaid.get() + 1);
            return;
        }
        self.said.set(Some(now));
        line(self.unsaid.replace(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_one_line_and_its_number() {
        let (seldom, said) = (Seldom::default(), Cell::new(Vec::new()));
        let note = |more| {
            let mut lines = said.take();
            lines.push(more);
            said.set(lines);
        };
        (0..5).for_each(|_| seldom.say(note));
        tokio::time::advance(PAUSE).await;
        (0..2).for_each(|_| seldom.say(note));
        assert_eq!(said.take(), [0, 4]);
    }
}
