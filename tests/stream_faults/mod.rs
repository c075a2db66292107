//! Group D: streams. A stream passes byte for byte, and one that is cut never looks complete.

mod again;
mod broken;
mod bytes;
mod leaving;
mod mass;
mod silence;
mod told;

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::harness::engine::Engine;

const CHAT: &str = "/v1/chat/completions";

/// An engine whose every step the test releases.
fn stepped(
    steps: impl Fn(&mut crate::harness::engine::Connection, &Receiver<()>) + Send + Sync + 'static,
) -> (Engine, Sender<()>) {
    let (release, gate) = channel();
    let gate = Mutex::new(gate);
    let engine = Engine::start(move |connection| steps(connection, &gate.lock().unwrap()));
    (engine, release)
}
