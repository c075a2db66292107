//! What a growing blob needs besides its writers, in threads of its own: what came out of order is read back and hashed,
//! and what was written is pushed to the disk.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, MutexGuard};

use super::verify::Hasher;
use super::write::{Partial, Push, State};

/// Bytes between two pushes to the disk. What is not pushed is lost in a power cut (not in a kill); pushing
/// rarely leaves one long stop at the end of each file.
const PUSH_EACH: u64 = 32 << 20;
/// Bytes that went past the page cache count for so much less: the disk has them, if only in a cache of its own, and all other writes
/// wait while it empties that. With one push each 32 MiB a virtual disk spent half of a fetch's time on them.
pub(super) const PAST_CACHE: u64 = 8;
/// One step of reading back. Small enough to stay in the CPU's cache while it is hashed.
const STEP: usize = 256 << 10;

impl Partial {
    /// Feeds the hash with what is there beyond it, in a thread of its own, if nobody does yet.
    pub fn follow(self: &Arc<Self>) {
        let mut state = self.state();
        if state.done.prefix() > state.hashed
            && let Some(hasher) = state.hasher.take()
        {
            let life = state.life;
            drop(state);
            let partial = self.clone();
            tokio::task::spawn_blocking(move || partial.read_back(hasher, life));
        }
    }

    fn read_back(&self, mut hasher: Hasher, life: u32) {
        let mut buffer = vec![0; STEP];
        loop {
            let (from, to) = {
                // A file that begins anew has a hash of its own.
                let Some(mut state) = self.state_in(life) else { break };
                if state.done.prefix() <= state.hashed || state.trouble.is_some() {
                    state.hasher = Some(hasher);
                    break;
                }
                (state.hashed, state.done.prefix())
            };
            let step = usize::try_from(to - from).unwrap_or(STEP).min(STEP);
            let read = read_at(&self.file, &mut buffer[..step], from).inspect(|&n| hasher.update(&buffer[..n]));
            let Some(mut state) = self.state_in(life) else { break };
            match read {
                Ok(n) => state.hashed = from + n as u64,
                Err(error) => state.trouble = Some(error),
            }
        }
        self.moved.notify_waiters();
    }

    /// Pushes to the disk what was written, in a thread of its own, if enough came since the last time.
    pub(super) fn push(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        if state.unpushed < PUSH_EACH || state.push == Push::Running {
            return;
        }
        state.push = Push::Running;
        state.unpushed = 0;
        let (pushed, life) = (state.journal.before_push(), state.life);
        drop(state);
        let partial = self.clone();
        tokio::task::spawn_blocking(move || {
            let outcome = partial.file.sync_data();
            let mut state = partial.state();
            let noted = match outcome {
                Ok(()) if state.life == life => state.journal.after_push(&pushed),
                // The journal of another life knows nothing of these ranges.
                outcome => outcome,
            };
            state.push = Push::Idle;
            if let Err(error) = noted {
                state.trouble = Some(error);
            }
            drop(state);
            partial.moved.notify_waiters();
        });
    }
}

fn read_at(file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
    loop {
        match file.read_at(buffer, at) {
            Ok(0) => return Err(std::io::Error::new(ErrorKind::UnexpectedEof, "the file was cut by somebody else")),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}
