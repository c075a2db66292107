//! The client's socket while nothing waits before it: an event that comes as one whole chunk goes out from where it was read,
//! before anything else is done with it. Else it would be copied, framed anew and written in four pieces.

use bytes::Bytes;

use crate::proxy::transport::socket::Socket;

#[derive(Debug)]
pub struct Door<'a> {
    client: &'a Socket,
    /// What the kernel did not take.
    rest: Bytes,
}

impl<'a> Door<'a> {
    pub fn new(client: &'a Socket) -> Self {
        Self { client, rest: Bytes::new() }
    }

    /// Once: what it is given must be out before another.
    pub fn pass(&mut self, framed: &[u8]) {
        let written = self.client.write_now(framed);
        if written < framed.len() {
            self.rest = Bytes::copy_from_slice(&framed[written..]);
        }
    }

    pub fn into_rest(self) -> Bytes {
        self.rest
    }
}
