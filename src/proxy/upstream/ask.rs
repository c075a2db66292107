//! Our own questions to the engine: one connection each, the whole answer at once, bounded.
//!
//! Clients' requests are [`super::exchange`]'s. How long an answer may take is the caller's matter.

use std::io;

use http::{HeaderMap, Method, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::decode::Decoder;
use super::exchange::Failure;
use super::head::{self, MAX_HEAD};
use crate::link::Upstream;

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

/// `GET target`. An answer of more than `most` bytes is none.
pub async fn get(engine: &Upstream, target: &str, most: usize) -> Result<Answer, Failure> {
    let mut stream = super::connect(engine.addr).await.map_err(Failure::Unreachable)?;
    let mut question = format!("GET {target} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n", engine.addr);
    if let Some(key) = &engine.api_key {
        question.push_str("authorization: Bearer ");
        question.push_str(key);
        question.push_str("\r\n");
    }
    question.push_str("\r\n");
    stream.write_all(question.as_bytes()).await.map_err(Failure::Broken)?;
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(head) = head::parse(&bytes, &Method::GET)? {
            break head;
        }
        more(&mut stream, &mut bytes, MAX_HEAD + most).await?;
    };
    let mut body = bytes.split_off(head.length);
    let mut whole = Vec::new();
    let mut decoder = head.framing.map(Decoder::new);
    while let Some(decoder) = &mut decoder {
        let decoded = decoder.decode(&mut body).map_err(|error| broken(io::ErrorKind::InvalidData, error))?;
        whole.extend_from_slice(&body[..decoded.payload]);
        if whole.len() > most {
            return Err(broken(io::ErrorKind::FileTooLarge, "the answer is too long"));
        }
        if decoder.is_done() {
            break;
        }
        body.clear();
        match more(&mut stream, &mut body, usize::MAX).await {
            Err(Failure::Broken(error))
                if error.kind() == io::ErrorKind::UnexpectedEof && decoder.ends_with_connection() =>
            {
                break;
            }
            outcome => outcome?,
        }
    }
    Ok(Answer { status: head.status, headers: head.headers, body: whole })
}

fn broken(kind: io::ErrorKind, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Failure {
    Failure::Broken(io::Error::new(kind, why))
}

async fn more(stream: &mut tokio::net::TcpStream, bytes: &mut Vec<u8>, most: usize) -> Result<(), Failure> {
    match stream.read_buf(bytes).await.map_err(Failure::Broken)? {
        0 => Err(Failure::Broken(io::ErrorKind::UnexpectedEof.into())),
        _ if bytes.len() > most => Err(broken(io::ErrorKind::FileTooLarge, "the answer is too long")),
        _ => Ok(()),
    }
}
