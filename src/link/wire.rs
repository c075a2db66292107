//! One line of JSON a message, over one end of a socketpair.

use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::MAX_MESSAGE;

/// What can go wrong on the link. Either way the other side is to be considered gone.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("the link between supervisor and proxy broke: {0}")]
    Io(#[from] io::Error),
    #[error("a message on the link was not understood: {0}")]
    Garbled(#[from] serde_json::Error),
    #[error("a message on the link was longer than {MAX_MESSAGE} bytes")]
    TooLong,
}

/// Two connected ends, for two processes.
pub fn pair() -> io::Result<(StdUnixStream, StdUnixStream)> {
    StdUnixStream::pair()
}

#[derive(Debug)]
pub struct Reader {
    lines: BufReader<OwnedReadHalf>,
    buffer: Vec<u8>,
}

#[derive(Debug)]
pub struct Writer {
    half: OwnedWriteHalf,
}

/// The async ends of one side. Must be called inside a tokio runtime.
pub fn split(end: StdUnixStream) -> io::Result<(Reader, Writer)> {
    end.set_nonblocking(true)?;
    let (read, write) = UnixStream::from_std(end)?.into_split();
    Ok((Reader { lines: BufReader::new(read), buffer: Vec::new() }, Writer { half: write }))
}

impl Reader {
    /// The next message; `None` when the other side is gone. Cancel-safe: a half-read line is kept.
    pub async fn next<M: DeserializeOwned>(&mut self) -> Result<Option<M>, LinkError> {
        loop {
            let room = (MAX_MESSAGE + 1 - self.buffer.len()) as u64;
            let read = (&mut self.lines).take(room).read_until(b'\n', &mut self.buffer).await?;
            if self.buffer.last() == Some(&b'\n') {
                let message = serde_json::from_slice(&self.buffer);
                self.buffer.clear();
                return Ok(Some(message?));
            }
            if self.buffer.len() > MAX_MESSAGE {
                return Err(LinkError::TooLong);
            }
            if read == 0 {
                return Ok(None);
            }
        }
    }
}

impl Writer {
    pub async fn send<M: Serialize>(&mut self, message: &M) -> Result<(), LinkError> {
        let mut line = serde_json::to_vec(message)?;
        if line.len() >= MAX_MESSAGE {
            return Err(LinkError::TooLong);
        }
        line.push(b'\n');
        self.half.write_all(&line).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::{Down, EngineState, EngineView};

    #[tokio::test]
    async fn messages_arrive_whole_and_in_order() {
        let (a, b) = pair().expect("socketpair");
        let (_, mut down) = split(a).expect("split");
        let (mut up, _) = split(b).expect("split");
        let view = EngineView {
            state: EngineState::Loading,
            phase: "loading weights 3/64".into(),
            percent: Some(12.5),
            eta_seconds: Some(90),
            eta_range_seconds: None,
            reason: String::new(),
            upstream: None,
            suspected: false,
            will_return: true,
            hold_ms: 0,
        };
        down.send(&Down::Engine(view.clone())).await.expect("send");
        down.send(&Down::Heartbeat).await.expect("send");
        assert_eq!(up.next::<Down>().await.expect("read"), Some(Down::Engine(view)));
        assert_eq!(up.next::<Down>().await.expect("read"), Some(Down::Heartbeat));
        drop(down);
    }

    #[tokio::test]
    async fn the_end_of_the_other_side_is_none() {
        let (a, b) = pair().expect("socketpair");
        let (mut up, _w) = split(b).expect("split");
        drop(a);
        assert_eq!(up.next::<Down>().await.expect("read"), None);
    }
}
