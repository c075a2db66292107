//! Events on their way to their clients, until what came with them is read.
//!
//! A decode batch brings an event for each of its streams at once, and each write wakes a reader. Where reads and writes
//! alternate, that reader has run and sleeps again before the next one's event is out, and each write pays for a wake-up; behind
//! some reads, one wake-up serves them all. So what comes first in a worker's turn goes out at once, what comes with it is
//! posted here, and a task of the worker's own, which runs behind those that were woken with it, takes it to the kernel.
//!
//! ```text
//! news of the kernel ─► stream: read, write ─► stream: read, post ─► stream: read, post ─► … ─► deliver: write, write, …
//! ```
//!
//! What the kernel does not take is the stream's again ([`Wire::unwritten`]).

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use super::wire::Wire;

thread_local! {
    /// One a worker, like its read buffer.
    static OUTBOX: RefCell<Outbox> = RefCell::default();
}

/// Events that wait for each other: with more, those wait for longer whose streams run free, and lockstep gains little.
const MOST: usize = 8;
/// The longest that is copied for it: a larger one goes out at once.
const LONGEST: usize = 2048;

#[derive(Default)]
struct Outbox {
    bytes: Vec<u8>,
    /// In the order in which they came: whose, and where their bytes end.
    letters: Vec<(Rc<Wire>, usize)>,
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
    fn way_of(&mut self, bytes: &[u8]) -> Way {
        let Some(postman) = &self.postman else { return Way::AtOnce };
        if self.turn == Turn::Fresh {
            self.turn = Turn::Begun;
            postman.wake_by_ref();
            return Way::AtOnce;
        }
        if bytes.len() > LONGEST { Way::AtOnce } else { Way::Posted }
    }

    fn add(&mut self, wire: &Rc<Wire>, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.letters.push((Rc::clone(wire), self.bytes.len()));
    }

    fn is_full(&self) -> bool {
        self.letters.len() == MOST
    }

    /// Nothing was posted meanwhile, or it must not be lost.
    fn keep_memory(&mut self, mut bytes: Vec<u8>, letters: Vec<(Rc<Wire>, usize)>) {
        if self.letters.is_empty() {
            bytes.clear();
            (self.bytes, self.letters) = (bytes, letters);
        }
    }
}

/// Takes these bytes to the client, within this turn of the worker, behind all that was posted for it before.
pub fn post(wire: &Rc<Wire>, bytes: &[u8]) {
    match OUTBOX.with_borrow_mut(|outbox| outbox.way_of(bytes)) {
        Way::AtOnce => wire.write(bytes),
        Way::Posted => {
            wire.posted();
            let full = OUTBOX.with_borrow_mut(|outbox| {
                outbox.add(wire, bytes);
                outbox.is_full()
            });
            if full {
                deliver();
            }
        }
    }
}

/// Writes what was posted, now.
pub fn deliver() {
    // Out of the cell: a wire that is dropped here may bring down a stream, whatever that does.
    let (bytes, mut letters) =
        OUTBOX.with_borrow_mut(|outbox| (std::mem::take(&mut outbox.bytes), std::mem::take(&mut outbox.letters)));
    let mut from = 0;
    for (wire, to) in letters.drain(..) {
        wire.deliver(&bytes[from..to]);
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
    use crate::proxy::transport::socket::Socket;

    async fn client() -> (Rc<Wire>, Peer) {
        let (ours, theirs) = Peer::pair().unwrap();
        for end in [&ours, &theirs] {
            end.set_nonblocking(true).unwrap();
        }
        let ours = UnixStream::from_std(ours).unwrap();
        // As a stream's socket is, whose head was written.
        ours.writable().await.unwrap();
        (Wire::plain(Rc::new(Socket::Unix(ours))), theirs)
    }

    async fn client_with_postman() -> (Rc<Wire>, Peer) {
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
                post(&one, b"at once");
                assert_eq!(there(&mut its_peer), b"at once", "there is no postman");
                let postman = spawn_local(carry());
                yield_now().await;
                for _ in 0..2 {
                    post(&one, b"first");
                    assert_eq!(there(&mut its_peer), b"first", "nobody came before it");
                    for n in 1..MOST as u8 / 2 {
                        post(&one, &[n]);
                        post(&other, &[n, n]);
                    }
                    assert_eq!((there(&mut its_peer).len(), there(&mut another).len()), (0, 0));
                    yield_now().await;
                    let of_one: Vec<u8> = (1..MOST as u8 / 2).collect();
                    assert_eq!(there(&mut its_peer), of_one);
                    assert_eq!(there(&mut another), of_one.iter().flat_map(|n| [*n, *n]).collect::<Vec<_>>());
                }
                post(&one, b"first");
                there(&mut its_peer);
                post(&one, b"last");
                postman.abort();
                assert!(postman.await.is_err());
                assert_eq!(there(&mut its_peer), b"last", "nothing stays behind");
                post(&one, b"at once");
                assert_eq!(there(&mut its_peer), b"at once");
            })
            .await;
    }

    #[tokio::test]
    async fn neither_too_many_nor_a_long_one_wait_and_none_overtakes() {
        LocalSet::new()
            .run_until(async {
                let (wire, mut peer) = client_with_postman().await;
                for _ in 0..MOST {
                    post(&wire, b"x");
                }
                assert_eq!(there(&mut peer).len(), 1);
                post(&wire, b"x");
                assert_eq!(there(&mut peer).len(), MOST);
                post(&wire, b"z");
                post(&wire, &[b'y'; LONGEST + 1]);
                let came = there(&mut peer);
                assert_eq!((came[0], came.len()), (b'z', LONGEST + 2));
            })
            .await;
    }

    #[tokio::test]
    async fn what_the_kernel_does_not_take_is_the_streams_again_in_order() {
        LocalSet::new()
            .run_until(async {
                let (wire, mut peer) = client_with_postman().await;
                let mut sent = Vec::new();
                while wire.is_written() {
                    let piece = [sent.len() as u8; LONGEST - 1];
                    sent.extend_from_slice(&piece);
                    post(&wire, &piece);
                    yield_now().await;
                }
                // The kernel takes more again, and what waits is still first.
                let mut came = there(&mut peer);
                poll_fn(|cx| wire.poll_write(cx, b"")).await.unwrap();
                for behind in [&b"behind it"[..], b"and behind that"] {
                    post(&wire, behind);
                    sent.extend_from_slice(behind);
                }
                let unwritten = wire.unwritten();
                came.extend(there(&mut peer));
                assert!([came, unwritten].concat() == sent);
                assert!(wire.is_written());
            })
            .await;
    }
}
