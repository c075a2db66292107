//! A request on its way to the engine: the head, and the body as its client sends it.
//!
//! It reads no answer, and does not say the request again. While the engine does not take what it was given, no more of the
//! body is read: a request holds one piece of it, whatever its length.

use std::future::poll_fn;
use std::io::{self, Write as _};
use std::rc::Rc;
use std::task::Poll;

use super::History;
use super::exchange::{BodyFault, Outgoing};
use crate::proxy::headers::BodyFraming;
use crate::proxy::line::Line;
use crate::proxy::transport::socket::Socket;

/// Why it was not sent whole.
pub enum Fault {
    Engine(io::Error),
    Client(BodyFault),
}

/// Sends all of it, as it comes from the client. Ready at the latest when its task is woken by something else, once all is out:
/// see [`Socket::poll_sent`].
pub async fn send(socket: &Rc<Socket>, history: History, head: &[u8], body: &mut Outgoing) -> Result<(), Fault> {
    let client = body.client();
    let mut prefix: Vec<u8> = Vec::new();
    let mut head = Some(head);
    let mut history = history;
    loop {
        // The first piece goes out with the head where it is there already.
        let piece = match &head {
            Some(_) => poll_fn(|cx| Poll::Ready(body.poll_next(cx))).await,
            None => Poll::Ready(poll_fn(|cx| body.poll_next(cx)).await),
        };
        let chunked = body.framing == BodyFraming::Chunked;
        let first = head.take().unwrap_or_default();
        let history = std::mem::replace(&mut history, History::Reused);
        match piece {
            Poll::Pending => write(socket, history, &client, [first, b"", b"", b""]).await?,
            Poll::Ready(Some(Err(fault))) => return Err(Fault::Client(fault)),
            Poll::Ready(Some(Ok(data))) if chunked => {
                prefix.clear();
                // Writing into a Vec does not fail.
                let _ = write!(prefix, "{:x}\r\n", data.len());
                write(socket, history, &client, [first, &prefix, &data, b"\r\n"]).await?;
            }
            Poll::Ready(Some(Ok(data))) => write(socket, history, &client, [first, &data, b"", b""]).await?,
            Poll::Ready(None) => {
                let end: &[u8] = if chunked { b"0\r\n\r\n" } else { b"" };
                write(socket, history, &client, [first, end, b"", b""]).await?;
                break;
            }
        }
        if !chunked && body.is_sent() {
            break;
        }
    }
    poll_fn(|cx| socket.poll_sent(cx)).await.map_err(Fault::Engine)
}

async fn write(socket: &Rc<Socket>, mut history: History, client: &Line, mut parts: [&[u8]; 4]) -> Result<(), Fault> {
    let mut held = None;
    while parts.iter().any(|part| !part.is_empty()) {
        let slices = parts.map(io::IoSlice::new);
        let outcome = match std::mem::replace(&mut history, History::Reused) {
            History::Fresh => socket.write_first(&slices),
            History::Reused => {
                poll_fn(|cx| {
                    let outcome = socket.poll_write_vectored(cx, &slices);
                    if outcome.is_pending() {
                        held = held.take().or_else(|| client.hold());
                    }
                    outcome
                })
                .await
            }
        };
        let mut written = match outcome {
            Ok(0) => return Err(Fault::Engine(io::ErrorKind::WriteZero.into())),
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(Fault::Engine(error)),
        };
        for part in &mut parts {
            let gone = written.min(part.len());
            *part = &part[gone..];
            written -= gone;
        }
    }
    Ok(())
}
