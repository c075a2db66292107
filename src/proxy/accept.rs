//! Takes connections from a listener, one at a time, and tells those for which there is no descriptor.
//!
//! What is spoken on them is [`super::worker`]'s.

use std::io;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::task::{spawn_local, yield_now};
use tokio::time::{sleep, timeout};

use super::transport::arrival::Arrived;
use super::transport::counts::Turned;
use super::transport::crowd::{self, Reserve, Standing};
use super::transport::listener::Accepting;
use super::wire::Wire;
use super::worker::{ONE_TOO_MANY, ONE_TOO_MANY_CLOSE, Worker, converse, speak};

/// After a failed accept: long enough to let some connection end. Doubles up to the second one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const ACCEPT_PAUSE_MOST: Duration = Duration::from_secs(1);
/// Accepts one connection at a time and lets the others have theirs in between. What comes before
/// HTTP (TLS, PROXY) begins here, before [`converse`].
pub async fn accept(worker: Rc<Worker>, listener: Accepting) {
    let mut reserve = Reserve::new();
    let mut pause = ACCEPT_PAUSE;
    loop {
        match listener.accept().await {
            Ok((socket, address)) => {
                pause = ACCEPT_PAUSE;
                reserve.restore();
                let worker = Rc::clone(&worker);
                // Those that are turned away without a word, too.
                worker.counters.connections_total.fetch_add(1, Relaxed);
                let greeting = worker.greeting_of(&socket);
                if greeting.is_none() {
                    let wire = Wire::plain(Rc::new(socket));
                    spawn_local(converse(worker, Arrived { wire, address }));
                } else {
                    spawn_local(async move {
                        // Boxed: what only a greeting needs is not kept for the connection's life.
                        let greeted =
                            Box::pin(worker.handshakes.greet(&worker.shared, socket, address, greeting)).await;
                        if let Some(arrived) = greeted {
                            converse(worker, arrived).await;
                        }
                    });
                }
                yield_now().await;
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                let say = |more| tracing::warn!(%error, more, "no connection can be accepted for now");
                worker.shared.connections.unaccepted.say(say);
                let freed = crowd::is_shortage(&error) && worker.press() > 0;
                if freed || turn_away(&worker, &listener, &mut reserve, &error).await == Answered::No {
                    sleep(pause).await;
                    pause = if freed { ACCEPT_PAUSE } else { (pause * 2).min(ACCEPT_PAUSE_MOST) };
                }
                reserve.restore();
            }
        }
    }
}

/// Whether somebody was told that there is no room.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answered {
    Yes,
    No,
}

/// Spends the descriptor that is held back on one connection: a probe is answered, everybody else is told
/// why not.
async fn turn_away(worker: &Rc<Worker>, listener: &Accepting, reserve: &mut Reserve, error: &io::Error) -> Answered {
    if !crowd::is_shortage(error) || reserve.spend().is_none() {
        return Answered::No;
    }
    // Another worker, or the engine's side, may have been quicker.
    let Ok(Ok((socket, address))) = timeout(ACCEPT_PAUSE, listener.accept()).await else { return Answered::No };
    worker.counters.connections_total.fetch_add(1, Relaxed);
    let greeting = worker.greeting_of(&socket);
    let told = async {
        let arrived = if greeting.is_none() {
            Some(Arrived { wire: Wire::plain(Rc::new(socket)), address })
        } else {
            worker.handshakes.greet(&worker.shared, socket, address, greeting).await
        };
        if let Some(arrived) = arrived {
            speak(worker, &arrived, Standing::Turned(Turned::NoDescriptor)).await;
            let _ = timeout(ONE_TOO_MANY_CLOSE, arrived.wire.close()).await;
        }
    };
    // Boxed: seldom needed.
    let _ = timeout(ONE_TOO_MANY, Box::pin(told)).await;
    worker.shared.connections.turn_away(Turned::NoDescriptor, address);
    Answered::Yes
}
