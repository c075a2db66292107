//! One request on its way: who asks, for what and since when. Shared by its service and its answer.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::time::Instant;

use super::line::Line;
use super::metrics::Label;
use super::peek::Stream;
use super::routes::Route;
use super::service::Peer;
use super::worker::Worker;
use crate::admission::Caller;

#[derive(Debug)]
pub struct Call {
    pub peer: Rc<Peer>,
    pub route: &'static Route,
    pub caller: Caller,
    /// Where it is counted.
    pub label: Label,
    pub arrived: Instant,
    /// Whether the client asks for a stream, as far as its body has told.
    pub asks: Cell<Stream>,
    course: Cell<Course>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Course {
    Asked,
    /// Its answer has begun, and is counted as open until all parts of it are gone.
    Answered,
}

impl Call {
    pub fn new(peer: Rc<Peer>, route: &'static Route, caller: Caller, label: Label, arrived: Instant) -> Rc<Self> {
        let (asks, course) = (Cell::new(Stream::Unknown), Cell::new(Course::Asked));
        Rc::new(Self { peer, route, caller, label, arrived, asks, course })
    }

    pub fn worker(&self) -> &Rc<Worker> {
        &self.peer.worker
    }

    pub fn line(&self) -> &Line {
        &self.peer.line
    }

    /// Its answer begins.
    pub fn begin(&self) {
        if self.course.replace(Course::Answered) == Course::Asked {
            self.worker().counters.open_answers.fetch_add(1, Relaxed);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.course.get() == Course::Answered {
            self.worker().counters.open_answers.fetch_sub(1, Relaxed);
        }
    }
}
