//! Liveness, health and readiness: answered here, never the engine's word.

use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Method, Response};

use super::answer::Answer;
use super::error::Refusal;
use super::routes::Own;
use super::service::Stop;
use super::state::{Mode, Shared, Supervision};
use crate::link::Gate;

const GET: &[Method] = &[Method::GET, Method::HEAD];

pub fn answer(shared: &Shared, own: Own, method: &Method) -> Result<Response<Answer>, Stop> {
    if !GET.contains(method) {
        return Err(Refusal::wrong_method(GET).into());
    }
    if own == Own::Live {
        if shared.supervision == Supervision::Linked && shared.silence() > shared.timings.supervisor_silence {
            return Err(Refusal::stuck_supervisor().into());
        }
        return Ok(ok(r#"{"live":true}"#.to_owned()));
    }
    let snapshot = shared.snapshot();
    let view = snapshot.engine.as_ref();
    if own == Own::Ready && snapshot.mode != Mode::Serving {
        return Err(Refusal::draining().into());
    }
    match view {
        Some(view) if own == Own::Ready && view.suspected => Err(Refusal::suspected(view).into()),
        Some(view) if view.state.gate() == Gate::Open => Ok(ok(format!(r#"{{"state":"{}"}}"#, view.state.name()))),
        view => Err(Refusal::engine(view).into()),
    }
}

fn ok(body: String) -> Response<Answer> {
    let mut response = Response::new(Answer::Own(Some(body.into())));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
