use std::future::poll_fn;
use std::mem::MaybeUninit;

use hyper::rt::ReadBuf;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;

use super::*;
use crate::proxy::transport::socket::Socket;

/// What hyper gets from one read.
async fn read(tap: &mut Tap, room: usize) -> Vec<u8> {
    let mut memory = vec![MaybeUninit::uninit(); room];
    let mut buffer = ReadBuf::uninit(&mut memory);
    poll_fn(|cx| Pin::new(&mut *tap).poll_read(cx, buffer.unfilled())).await.expect("bytes");
    buffer.filled().to_vec()
}

#[tokio::test]
async fn a_body_is_read_to_its_end_and_what_stands_behind_it_is_judged() {
    let (mut there, here) = UnixStream::pair().expect("a pair of sockets");
    let wire = Wire::plain(Rc::new(Socket::from(here)));
    let mut tap = Tap::new(wire, Patience::default(), Preface::Excluded);
    let head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n";
    there.write_all(&[&head[..], b"abc"].concat()).await.expect("room");
    assert_eq!(read(&mut tap, 4096).await, [&head[..], b"abc"].concat());
    // A bare line feed: hyper would take it, and must never see it.
    there.write_all(b"defghijGET / HTTP/1.1\nHost: a\r\n\r\n").await.expect("room");
    assert_eq!(read(&mut tap, 5).await, b"defgh");
    assert_eq!(tap.checker.left_of_body(), Some(2));
    assert_eq!(read(&mut tap, 4096).await, b"ij");
    assert!(tap.is_between_requests());
    assert_eq!(read(&mut tap, 4096).await, MARKER);
    assert!(tap.wire.refusal().is_some());
}

#[tokio::test]
async fn a_client_that_leaves_in_its_body_is_seen_to_have_left() {
    let (mut there, here) = UnixStream::pair().expect("a pair of sockets");
    let wire = Wire::plain(Rc::new(Socket::from(here)));
    let mut tap = Tap::new(wire, Patience::default(), Preface::Excluded);
    there.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc").await.expect("room");
    read(&mut tap, 4096).await;
    drop(there);
    assert_eq!(read(&mut tap, 4096).await, b"");
    assert!(tap.wire.has_ended());
}

#[tokio::test]
async fn while_a_piece_of_a_body_waits_for_the_engine_no_more_is_read() {
    let (mut there, here) = UnixStream::pair().expect("a pair of sockets");
    let wire = Wire::plain(Rc::new(Socket::from(here)));
    let mut tap = Tap::new(Rc::clone(&wire), Patience::default(), Preface::Excluded);
    there.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc").await.expect("room");
    read(&mut tap, 4096).await;
    let held = wire.hold();
    let reading = async { read(&mut tap, 4096).await };
    let mut reading = std::pin::pin!(reading);
    there.write_all(b"defg").await.expect("room");
    // As long as it takes for news of a socket, and longer.
    let early = tokio::time::timeout(Duration::from_millis(100), reading.as_mut()).await;
    assert!(early.is_err(), "{early:?}");
    drop(held);
    let late = tokio::time::timeout(Duration::from_secs(10), reading).await;
    assert_eq!(late.expect("woken"), b"defg");
}
