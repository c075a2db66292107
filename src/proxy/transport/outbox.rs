//! Few bytes on their way to where they go, until what came with them is read.
//!
//! A decode batch brings an event for each of its streams at once, a busy engine some answers and busy clients some requests,
//! and each write wakes a reader. Where reads and writes alternate, that reader has run and sleeps again before the next
//! one's bytes are out, and each write pays for a wake-up; behind some reads, one wake-up serves them all. So what comes first
//! in a worker's turn goes out at once, what comes with it is posted here, and a task of the worker's own, which runs behind
//! those that were woken with it, takes it to the kernel.
//!
//! ```text
//! news of the kernel ─► stream: read, write ─► stream: read, post ─► stream: read, post ─► … ─► deliver: write, write, …
//! ```
//!
//! What the kernel does not take is the socket's again ([`Socket::poll_unwritten`]).

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::IoSlice;
use std::rc::Rc;
use std::task::{Poll, Waker};

use super::socket::Socket;

thread_local! {
    /// One a worker, like its read buffer.
    static OUTBOX: RefCell<Outbox> = RefCell::default();
}

/// Pieces that wait for each other: with more, those wait for longer whose streams run free, and lockstep gains little.
const MOST: usize = 8;
/// The longest that is copied for it: a larger one goes out at once.
pub const LONGEST: usize = 4096;

#[derive(Default)]
struct Outbox {
    bytes: Vec<u8>,
    /// In the order in which they came: whose, and where their bytes end.
    letters: Vec<(Rc<Socket>, usize)>,
    postman: Option<Waker>,
    turn: Turn,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Nothing came yet.
    #[default]
    Fresh,
    Begun,
}

enum Way {
    AtOnce,
    Posted,
}

impl Outbox {
    fn way_of(&mut self, length: usize) -> Way {
        let Some(postman) = &self.postman else { return Way::AtOnce };
        if self.turn == Turn::Fresh {
            self.turn = Turn::Begun;
            postman.wake_by_ref();
            return Way::AtOnce;
        }
        if length > LONGEST { Way::AtOnce } else { Way::Posted }
    }

    fn add(&mut self, socket: &Rc<Socket>, slices: &[IoSlice<'_>]) {
        append(&mut self.bytes, slices);
        match self.letters.last_mut() {
            // One write for both.
            Some((last, to)) if Rc::ptr_eq(last, socket) => *to = self.bytes.len(),
            _ => self.letters.push((Rc::clone(socket), self.bytes.len())),
        }
    }

    fn is_full(&self) -> bool {
        self.letters.len() == MOST || self.bytes.len() >= MOST * LONGEST
    }

    /// Nothing was posted meanwhile, or it must not be lost.
    fn keep_memory(&mut self, mut bytes: Vec<u8>, letters: Vec<(Rc<Socket>, usize)>) {
        if self.letters.is_empty() {
            bytes.clear();
            (self.bytes, self.letters) = (bytes, letters);
        }
    }
}

/// Takes these bytes to the kernel, within this turn of the worker, behind all that was posted for the same socket before.
pub fn post(socket: &Rc<Socket>, slices: &[IoSlice<'_>]) {
    let length = slices.iter().map(|slice| slice.len()).sum();
    match OUTBOX.with_borrow_mut(|outbox| outbox.way_of(length)) {
        Way::AtOnce => {
            socket.settle();
            write(socket, slices);
        }
        Way::Posted => {
            socket.posted();
            let full = OUTBOX.with_borrow_mut(|outbox| {
                outbox.add(socket, slices);
                outbox.is_full()
            });
            if full {
                deliver();
            }
        }
    }
}

/// One piece of memory costs the kernel less than several, and the outbox's is at hand.
fn write(socket: &Socket, slices: &[IoSlice<'_>]) {
    if let [bytes] = slices {
        return socket.hand_over(bytes);
    }
    OUTBOX.with_borrow_mut(|outbox| {
        let from = outbox.bytes.len();
        append(&mut outbox.bytes, slices);
        socket.hand_over(&outbox.bytes[from..]);
        outbox.bytes.truncate(from);
    });
}

fn append(bytes: &mut Vec<u8>, slices: &[IoSlice<'_>]) {
    for slice in slices {
        bytes.extend_from_slice(slice);
    }
}

/// Writes what was posted, now.
pub fn deliver() {
    // Out of the cell: a socket that is dropped here may bring down whatever waits for it.
    let (bytes, mut letters) =
        OUTBOX.with_borrow_mut(|outbox| (std::mem::take(&mut outbox.bytes), std::mem::take(&mut outbox.letters)));
    let mut from = 0;
    for (socket, to) in letters.drain(..) {
        socket.deliver(&bytes[from..to]);
        from = to;
    }
    OUTBOX.with_borrow_mut(|outbox| outbox.keep_memory(bytes, letters));
}

/// The worker's postman. Without one, what is posted is written at once.
pub async fn carry() {
    let _off_duty = OffDuty;
    poll_fn(|cx| {
        OUTBOX.with_borrow_mut(|outbox| {
            if !outbox.postman.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
                outbox.postman = Some(cx.waker().clone());
            }
        });
        deliver();
        OUTBOX.with_borrow_mut(|outbox| outbox.turn = Turn::Fresh);
        Poll::<()>::Pending
    })
    .await;
}

/// The worker ends: what is posted yet goes out, and nothing more waits.
struct OffDuty;

impl Drop for OffDuty {
    fn drop(&mut self) {
        OUTBOX.with_borrow_mut(|outbox| outbox.postman = None);
        deliver();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream as Peer;

    use tokio::net::UnixStream;
    use tokio::task::{LocalSet, spawn_local, yield_now};

    use super::*;

    async fn client() -> (Rc<Socket>, Peer) {
        let (ours, theirs) = Peer::pair().unwrap();
        for end in [&ours, &theirs] {
            end.set_nonblocking(true).unwrap();
        }
        let ours = UnixStream::from_std(ours).unwrap();
        // As a stream's socket is, whose head was written.
        ours.writable().await.unwrap();
        (Rc::new(Socket::from(ours)), theirs)
    }

    async fn client_with_postman() -> (Rc<Socket>, Peer) {
        spawn_local(carry());
        yield_now().await;
        client().await
    }

    fn there(peer: &mut Peer) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _would_block = peer.read_to_end(&mut bytes);
        bytes
    }

    #[tokio::test]
    async fn what_is_posted_goes_out_behind_the_tasks_that_run_already_each_to_its_own_client_in_order() {
        LocalSet::new()
            .run_until(async {
                let (one, mut its_peer) = client().await;
                let (other, mut another) = client().await;
                post(&one, &[IoSlice::new(b"at once")]);
                assert_eq!(there(&mut its_peer), b"at once", "there is no postman");
                let postman = spawn_local(carry());
                yield_now().await;
                for _ in 0..2 {
                    post(&one, &[IoSlice::new(b"first")]);
                    assert_eq!(there(&mut its_peer), b"first", "nobody came before it");
                    for n in 1..MOST as u8 / 2 {
                        post(&one, &[IoSlice::new(&[n])]);
                        post(&other, &[IoSlice::new(&[n, n])]);
                    }
                    assert_eq!((there(&mut its_peer).len(), there(&mut another).len()), (0, 0));
                    yield_now().await;
                    let of_one: Vec<u8> = (1..MOST as u8 / 2).collect();
                    assert_eq!(there(&mut its_peer), of_one);
                    assert_eq!(there(&mut another), of_one.iter().flat_map(|n| [*n, *n]).collect::<Vec<_>>());
                }
                post(&one, &[IoSlice::new(b"first")]);
                there(&mut its_peer);
                post(&one, &[IoSlice::new(b"last")]);
                postman.abort();
                assert!(postman.await.is_err());
                assert_eq!(there(&mut its_peer), b"last", "nothing stays behind");
                post(&one, &[IoSlice::new(b"at once")]);
                assert_eq!(there(&mut its_peer), b"at once");
            })
            .await;
    }

    #[tokio::test]
    async fn neither_too_many_nor_a_long_one_wait_and_none_overtakes() {
        LocalSet::new()
            .run_until(async {
                let (one, mut its_peer) = client_with_postman().await;
                let (other, mut another) = client().await;
                post(&one, &[IoSlice::new(b"first")]);
                there(&mut its_peer);
                for _ in 1..MOST / 2 {
                    post(&one, &[IoSlice::new(b"x")]);
                    post(&other, &[IoSlice::new(b"x")]);
                }
                post(&one, &[IoSlice::new(b"x")]);
                assert_eq!((there(&mut its_peer).len(), there(&mut another).len()), (0, 0));
                post(&other, &[IoSlice::new(b"x")]);
                assert_eq!((there(&mut its_peer).len(), there(&mut another).len()), (MOST / 2, MOST / 2));
                post(&one, &[IoSlice::new(b"z")]);
                post(&one, &[IoSlice::new(&[b'y'; LONGEST + 1])]);
                let came = there(&mut its_peer);
                assert_eq!((came[0], came.len()), (b'z', LONGEST + 2));
            })
            .await;
    }

    #[tokio::test]
    async fn pieces_for_one_that_follow_each_other_go_out_as_one_and_are_bounded() {
        LocalSet::new()
            .run_until(async {
                let (socket, mut peer) = client_with_postman().await;
                post(&socket, &[IoSlice::new(b"first")]);
                there(&mut peer);
                for _ in 0..2 * MOST {
                    post(&socket, &[IoSlice::new(b"a"), IoSlice::new(b""), IoSlice::new(b"bc")]);
                }
                assert_eq!(OUTBOX.with_borrow(|outbox| outbox.letters.len()), 1);
                yield_now().await;
                assert_eq!(there(&mut peer), b"abc".repeat(2 * MOST));
                post(&socket, &[IoSlice::new(b"first")]);
                there(&mut peer);
                for _ in 0..MOST {
                    post(&socket, &[IoSlice::new(&[b'x'; LONGEST])]);
                }
                assert_eq!(there(&mut peer).len(), MOST * LONGEST);
            })
            .await;
    }

    #[tokio::test]
    async fn several_slices_that_go_at_once_leave_what_is_posted_for_others_alone() {
        LocalSet::new()
            .run_until(async {
                let (one, mut its_peer) = client_with_postman().await;
                let (other, mut another) = client().await;
                post(&one, &[IoSlice::new(b"first "), IoSlice::new(b"of it")]);
                assert_eq!(there(&mut its_peer), b"first of it");
                post(&one, &[IoSlice::new(b"waits")]);
                post(&other, &[IoSlice::new(&[b'y'; LONGEST]), IoSlice::new(b"long")]);
                assert_eq!((there(&mut another).len(), there(&mut its_peer).len()), (LONGEST + 4, 0));
                yield_now().await;
                assert_eq!(there(&mut its_peer), b"waits");
            })
            .await;
    }

    #[tokio::test]
    async fn what_the_kernel_does_not_take_is_the_sockets_again_in_order_and_wakes_its_writer() {
        LocalSet::new()
            .run_until(async {
                let (socket, mut peer) = client_with_postman().await;
                let mut sent = Vec::new();
                while socket.is_written() {
                    let piece = [sent.len() as u8; LONGEST - 1];
                    sent.extend_from_slice(&piece);
                    poll_fn(|cx| socket.poll_write(cx, &piece)).await.unwrap();
                    yield_now().await;
                }
                // What comes behind waits for it, however much the kernel takes by now, and however short.
                let writing = spawn_local({
                    let socket = Rc::clone(&socket);
                    async move {
                        for behind in [&b"behind it"[..], b"and behind that", &[b'l'; 2 * LONGEST]] {
                            let mut rest = behind;
                            while !rest.is_empty() {
                                let taken = poll_fn(|cx| socket.poll_write(cx, rest)).await.unwrap();
                                rest = &rest[taken..];
                            }
                        }
                        poll_fn(|cx| socket.poll_shut(cx)).await.unwrap();
                    }
                });
                sent.extend([&b"behind it"[..], b"and behind that", &[b'l'; 2 * LONGEST]].concat());
                yield_now().await;
                assert!(!writing.is_finished());
                let mut came = Vec::new();
                for _ in 0..1_000 {
                    came.extend(there(&mut peer));
                    tokio::task::yield_now().await;
                    if writing.is_finished() && came.len() == sent.len() {
                        break;
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
                assert!(came == sent, "{} of {}", came.len(), sent.len());
                writing.await.unwrap();
                assert_eq!(std::io::Read::read(&mut peer, &mut [0]).unwrap(), 0, "the end, behind all of it");
            })
            .await;
    }

    #[tokio::test]
    async fn who_wrote_hears_that_what_was_posted_cannot_be_delivered() {
        LocalSet::new()
            .run_until(async {
                let (socket, peer) = client_with_postman().await;
                let (other, _its_peer) = client().await;
                drop(peer);
                let sending = spawn_local({
                    let socket = Rc::clone(&socket);
                    async move {
                        post(&other, &[IoSlice::new(b"first")]);
                        poll_fn(|cx| socket.poll_write(cx, b"posted")).await.unwrap();
                        poll_fn(|cx| socket.poll_sent(cx)).await
                    }
                });
                let error = sending.await.unwrap().unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
            })
            .await;
    }
}
