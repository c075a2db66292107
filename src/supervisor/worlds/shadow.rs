//! What must hold whatever happens, told from outside: a second and much simpler account of who lives, who
//! holds the GPUs and what was asked for, kept beside a machine and compared with it after every step.

use super::super::step::*;
use super::name;

/// Two environments of one shadow are honest in the same way: a tree is reported empty only after SIGKILL,
/// GPUs only after they were asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
#[allow(clippy::struct_excessive_bools)] // what happened, one by one: no state is hidden in them
pub struct Shadow {
    pub engine: Engine,
    /// Since the present preparation began, the GPUs were free at some moment.
    pub gpus_were_free: bool,
    /// SIGKILLs under way that will report an empty tree.
    pub kills: u8,
    pub release_asked: bool,
    pub examine_asked: bool,
    pub confirm_asked: bool,
    pub fetching: bool,
    pub preparing: bool,
    pub draining: bool,
    pub stops: u8,
    pub exited: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Engine {
    #[default]
    None,
    /// Something of it may live.
    Launched,
    /// `/health` was answered 200 once.
    Proven,
    /// SIGKILL went to all of it.
    Killed,
}

impl Shadow {
    /// The world at the machine's first step.
    pub fn new() -> Self {
        Self { fetching: true, ..Self::default() }
    }

    /// Whether an honest world may report this now.
    pub fn allows(&self, event: &Event) -> bool {
        match event {
            Event::Fetched | Event::FetchFailed(_) => self.fetching,
            Event::Prepared | Event::PrepareFailed(_) => self.preparing,
            Event::Launched
            | Event::LaunchFailed(_)
            | Event::Exited
            | Event::Progressed
            | Event::LooksReady
            | Event::LooksBusy
            | Event::Unhealthy
            | Event::Hung => self.engine != Engine::None,
            // A late one too: probes of an engine that is being ended are still answered.
            Event::Healthy => self.confirm_asked || self.engine == Engine::Proven,
            Event::Examined(_) => self.examine_asked,
            Event::Idle => self.draining,
            Event::TreeEmpty => self.kills > 0,
            Event::Released { .. } | Event::Held { .. } => self.release_asked,
            Event::Stop | Event::Restart | Event::Tick => true,
        }
    }

    /// Takes one step of the machine, and says what was wrong with it.
    pub fn observe(
        &mut self,
        before: &State,
        event: &Event,
        actions: &[Action],
        after: &Machine,
    ) -> Result<(), String> {
        match event {
            Event::Fetched | Event::FetchFailed(_) => self.fetching = false,
            Event::Prepared | Event::PrepareFailed(_) => self.preparing = false,
            Event::Healthy if matches!(before, State::Loading { check: Check::Confirming, .. }) => {
                self.confirm_asked = false;
                self.engine = Engine::Proven;
            }
            Event::Unhealthy => self.confirm_asked = false,
            Event::TreeEmpty => {
                self.kills -= 1;
                self.engine = Engine::None;
            }
            Event::Released { .. } => (self.gpus_were_free, self.release_asked) = (true, false),
            Event::Examined(_) => self.examine_asked = false,
            Event::Stop => self.stops = (self.stops + 1).min(2),
            _ => {}
        }
        for action in actions {
            self.asked(*action, event, after)?;
        }
        let serving = matches!(after.state, State::Ready | State::Busy);
        if serving && (self.engine != Engine::Proven || self.stops > 0) {
            return Err(format!(
                "traffic in {} towards {:?} after {} stops",
                name(&after.state),
                self.engine,
                self.stops
            ));
        }
        if self.stops >= 2 && matches!(self.engine, Engine::Launched | Engine::Proven) {
            return Err(format!("a second stop left an engine without SIGKILL in {}", name(&after.state)));
        }
        if after.stopping() != (self.stops > 0) {
            return Err("a stop was forgotten, or nobody asked for one".into());
        }
        if matches!(after.state, State::Stopped { .. }) != self.exited {
            return Err(format!("{} with exit told: {}", name(&after.state), self.exited));
        }
        Ok(())
    }

    fn asked(&mut self, action: Action, event: &Event, after: &Machine) -> Result<(), String> {
        if self.exited {
            return Err(format!("{action:?} after the exit"));
        }
        match action {
            Action::Fetch => self.fetching = true,
            Action::Prepare => (self.preparing, self.gpus_were_free) = (true, false),
            Action::Launch if self.engine != Engine::None => return Err("a second engine beside a first one".into()),
            Action::Launch if !self.gpus_were_free => return Err("a launch on GPUs nobody found free".into()),
            Action::Launch if self.stops > 0 => return Err("a launch after a stop".into()),
            Action::Launch => (self.engine, self.gpus_were_free, self.confirm_asked) = (Engine::Launched, false, false),
            Action::Confirm => self.confirm_asked = true,
            Action::Examine => self.examine_asked = true,
            Action::Drain | Action::Hold => self.draining = true,
            Action::CutStreams if self.stops == 0 => return Err("the proxy cuts streams though nobody stops".into()),
            Action::CutStreams => {}
            Action::Terminate if self.engine == Engine::None => return Err("SIGTERM to nobody".into()),
            Action::Terminate => self.draining = false,
            Action::Kill => {
                self.kills = (self.kills + 1).min(2);
                // What was being made is taken back with it.
                (self.fetching, self.preparing, self.draining) = (false, false, false);
                if self.engine != Engine::None {
                    self.engine = Engine::Killed;
                }
            }
            Action::Release if self.engine != Engine::None => {
                return Err("GPUs are waited for while something may hold them".into());
            }
            Action::Release => self.release_asked = true,
            Action::Exit(code) => {
                self.exited = true;
                if self.engine != Engine::None && code != EXIT_UNKILLABLE {
                    return Err(format!("exit {code} with an engine alive, after {event:?}"));
                }
                if self.stops == 0 && after.policy.give_up == GiveUp::Serve {
                    return Err("it ends though nobody asked".into());
                }
            }
        }
        Ok(())
    }
}
