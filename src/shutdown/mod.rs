//! The signals that end, reload or disturb a process, as events; which order things end in is
//! `supervisor::step`'s.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// SIGTERM or SIGINT.
    Stop,
    /// SIGHUP.
    Reload,
    /// A child ended.
    Reap,
    /// SIGQUIT: an orphaned rank signals its adoptive parent when it fails. It is caught, not
    /// ignored, because an ignored signal would be inherited by the engine.
    Quit,
    /// SIGUSR1, SIGUSR2: nothing listens to them; by default they would kill us.
    Nothing,
}

/// Catches them from now on.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    child: Signal,
    quit: Signal,
    user1: Signal,
    user2: Signal,
}

impl Signals {
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            child: signal(SignalKind::child())?,
            quit: signal(SignalKind::quit())?,
            user1: signal(SignalKind::user_defined1())?,
            user2: signal(SignalKind::user_defined2())?,
        })
    }

    /// The next wish. Cancel-safe.
    pub async fn next(&mut self) -> Wish {
        tokio::select! {
            biased;
            _ = self.terminate.recv() => Wish::Stop,
            _ = self.interrupt.recv() => Wish::Stop,
            _ = self.hangup.recv() => Wish::Reload,
            _ = self.child.recv() => Wish::Reap,
            _ = self.quit.recv() => Wish::Quit,
            _ = self.user1.recv() => Wish::Nothing,
            _ = self.user2.recv() => Wish::Nothing,
        }
    }
}
