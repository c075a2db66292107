//! How far a start is, in words and per cent, for whichever state it is in.

use super::step::{Machine, Millis, State};
use crate::launch::output::Said;
use crate::link::status::WeightsStatus;
use crate::weights::Pace;

#[derive(Debug, Default)]
pub struct Loading {
    phase: String,
    fetch_eta: Option<u64>,
}

impl Loading {
    /// Something begins that the engine's log does not speak of.
    pub fn named(&mut self, phase: String) {
        self.phase = phase;
    }

    /// Bytes come, or do not.
    pub fn fetching(&mut self, pace: Pace, eta_seconds: Option<u64>) {
        self.phase = match pace {
            Pace::Moving => "fetching the weights".into(),
            Pace::Stalled => "fetching the weights, stalled".into(),
        };
        self.fetch_eta = eta_seconds;
    }

    /// Takes in what the engine said. True news are progress.
    pub fn heard(&mut self, said: &Said) -> News {
        let phase = format!("{:?}", said.fact);
        if phase == self.phase {
            News::Old
        } else {
            self.phase = phase;
            News::Further
        }
    }

    pub fn phase(&self, state: &State) -> &str {
        match state {
            State::Fetching | State::Preparing | State::Launching | State::Loading { .. } => &self.phase,
            _ => "",
        }
    }

    pub fn reached(&self) -> String {
        if self.phase.is_empty() { "starting".into() } else { self.phase.clone() }
    }

    pub fn percent(&self, state: &State, weights: Option<&WeightsStatus>) -> Option<f32> {
        match (state, weights) {
            (State::Fetching, Some(w)) if w.total > 0 => Some(w.done as f32 / w.total as f32 * 100.0),
            _ => None,
        }
    }

    pub fn eta_seconds(&self, _machine: &Machine, _now: Millis) -> Option<u64> {
        None
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    Further,
    Old,
}
