//! The way to the client while nothing waits before it: an event that comes as one whole chunk goes out as it was read, before
//! anything else is done with it. Else it would be framed anew and written in four pieces.

use std::io::IoSlice;
use std::rc::Rc;

use crate::proxy::transport::outbox;
use crate::proxy::transport::socket::Socket;
use crate::proxy::wire::Wire;

#[derive(Debug, Clone, Copy)]
pub struct Door<'a>(&'a Rc<Socket>);

impl<'a> Door<'a> {
    /// None: what this client gets is not what was read.
    pub fn of(client: &'a Wire) -> Option<Self> {
        client.in_clear().map(Self)
    }

    pub fn pass(self, framed: &[u8]) {
        outbox::post(self.0, &[IoSlice::new(framed)]);
    }
}
