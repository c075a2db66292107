//! WebSockets through the proxy: the same keys and places as any request, then bytes both ways.
//!
//! The engine, not the proxy, speaks the protocol: frames pass unread but for their headers, which tell
//! where one ends (so that a goodbye of our own can stand between two) and whether anything but
//! heartbeats passes. A connection becomes a tunnel only by the engine's 101 to this very client.
//!
//! ```text
//!  asked (handshake) ─ key, place ─► engine ─ 101 ─► tunnel ─► over
//!                                      └─ any other answer: relayed, the connection stays HTTP
//! ```

pub mod frames;
mod handshake;
mod tunnel;

use std::rc::Rc;

use http::Response;

pub use handshake::{Asked, asked};
pub use tunnel::{Tunnel, carry};

use super::answer::Answer;
use super::call::Call;
use super::service::Stop;
use super::upstream::exchange::Answered;
use crate::admission::Ticket;

/// The engine has said 101: the client gets it, and then whatever the engine says.
pub fn open(call: &Rc<Call>, asked: &Asked, answered: Answered, ticket: Ticket) -> Result<Response<Answer>, Stop> {
    let Answered { engine, head, rest, .. } = answered;
    let response = match asked.answered(head) {
        Ok(response) => response,
        Err(stop) => {
            ticket.was_not_served();
            return Err(stop);
        }
    };
    let tunnel = Tunnel::new(Rc::clone(call), engine, rest, ticket);
    Ok(response.map(|()| Answer::Tunnel(Box::new(tunnel))))
}

/// The end of a head towards the engine: what is said in place of the client's own fields for this hop.
pub const FIELDS: &[u8] = b"connection: upgrade\r\nupgrade: websocket\r\n\r\n";
