//! A request on its way to the engine: the head, and the body as its client sends it.
//!
//! It reads no answer, and does not say the request again.

use std::future::poll_fn;
use std::io::{self, Write as _};
use std::task::Poll;

use socket2::SockRef;
use tokio::net::TcpStream;

use super::History;
use super::exchange::{BodyFault, Outgoing};
use crate::proxy::headers::BodyFraming;

/// Why it was not sent whole.
pub enum Fault {
    Engine(io::Error),
    Client(BodyFault),
}

/// Sends all of it, as it comes from the client.
pub async fn send(stream: &TcpStream, history: History, head: &[u8], body: &mut Outgoing) -> Result<(), Fault> {
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
            Poll::Pending => write(stream, history, [first, b"", b"", b""]).await?,
            Poll::Ready(Some(Err(fault))) => return Err(Fault::Client(fault)),
            Poll::Ready(Some(Ok(data))) if chunked => {
                prefix.clear();
                // Writing into a Vec does not fail.
                let _ = write!(prefix, "{:x}\r\n", data.len());
                write(stream, history, [first, &prefix, &data, b"\r\n"]).await?;
            }
            Poll::Ready(Some(Ok(data))) => write(stream, history, [first, &data, b"", b""]).await?,
            Poll::Ready(None) => {
                let end: &[u8] = if chunked { b"0\r\n\r\n" } else { b"" };
                return write(stream, history, [first, end, b"", b""]).await;
            }
        }
        if !chunked && body.is_sent() {
            return Ok(());
        }
    }
}

async fn write(stream: &TcpStream, mut history: History, mut parts: [&[u8]; 4]) -> Result<(), Fault> {
    while parts.iter().any(|part| !part.is_empty()) {
        let slices = parts.map(io::IoSlice::new);
        let outcome = match std::mem::replace(&mut history, History::Reused) {
            // tokio has not heard yet that it may be written to, and would wait a turn to hear it.
            History::Fresh => SockRef::from(stream).send_vectored(&slices),
            History::Reused => stream.try_write_vectored(&slices),
        };
        let mut written = match outcome {
            Ok(0) => return Err(Fault::Engine(io::ErrorKind::WriteZero.into())),
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                stream.writable().await.map_err(Fault::Engine)?;
                continue;
            }
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
