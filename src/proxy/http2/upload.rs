//! A request's body, as DATA frames bring it.
//!
//! The client may send on as fast as the engine takes: its window is opened again by each piece that
//! is taken, and by nothing else. Trailers are not read: merged into headers they could forge them.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use http_body::{Body, Frame};

use super::flow::Flow;

#[derive(Debug)]
pub struct Upload {
    stream: RecvStream,
    flow: Rc<Flow>,
}

impl Upload {
    pub fn new(stream: RecvStream, flow: Rc<Flow>) -> Self {
        Self { stream, flow }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let this = self.get_mut();
        this.flow.want();
        let Some(data) = ready!(this.stream.poll_data(cx)) else { return Poll::Ready(None) };
        let data = data?;
        // Fails only for more than was received.
        let _ = this.stream.flow_control().release_capacity(data.len());
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }
}
