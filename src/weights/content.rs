//! One file's bytes over HTTP: a range of them from wherever the hub says they lie, its signed address kept for the next
//! range, and every head checked before its body is believed. Retries nothing but an address that ran out.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use futures_util::StreamExt;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_RANGE, LOCATION,
    RANGE,
};
use reqwest::{Response, StatusCode, Url};

use super::error::FetchError;
use super::hops::{refuse_hop, without_query};
use super::hub::{ByteStream, Fault, Hub};
use super::near;
use super::plan::RemoteFile;

/// Where a file's bytes were found last. Several connections share it.
#[derive(Debug, Default)]
pub struct Found(Mutex<Option<Place>>);

#[derive(Debug, Clone)]
struct Place {
    url: Url,
    /// Of the content there; a strong one, or none.
    etag: Option<HeaderValue>,
}

/// How a server is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// For these bytes.
    Range,
    /// For the whole file: of a server that serves no ranges.
    Whole,
}

impl Found {
    fn get(&self) -> Option<Place> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, place: Option<Place>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = place;
    }

    /// The next range asks the hub again, which may name another host.
    pub fn forget(&self) {
        self.set(None);
    }
}

impl Hub {
    /// These bytes of `file`: exactly those, or a fault.
    pub async fn open(
        &self,
        repo: &str,
        commit: &str,
        file: &RemoteFile,
        found: &Found,
        range: Range<u64>,
        ask: Ask,
    ) -> Result<ByteStream, Fault> {
        if let Some(place) = found.get() {
            let answer = self.get(&place.url, file, &range, ask, place.etag.as_ref()).await?;
            let status = answer.status();
            // The whole in answer to `If-Range`: what lies there is another content than that of the first range.
            let changed =
                status == StatusCode::OK && ask == Ask::Range && place.etag.is_some() && range != (0..file.size);
            if !ran_out(status) && !changed {
                return self.body(repo, commit, file, found, answer, &range);
            }
            tracing::debug!(file = %file.name, %status, changed, "the address is of no use any more: asking the hub for a new one");
            found.forget();
        }
        let answer = self.resolve_file(repo, commit, file, &range, ask).await?;
        self.body(repo, commit, file, found, answer, &range)
    }

    /// Asks the hub, and goes where it sends: by hand, so that each hop is looked at and the last address is known.
    async fn resolve_file(
        &self,
        repo: &str,
        commit: &str,
        file: &RemoteFile,
        range: &Range<u64>,
        ask: Ask,
    ) -> Result<Response, Fault> {
        let mut url = self.address(repo, commit, &file.name)?;
        let mut hops = 0;
        loop {
            let answer = self.get(&url, file, range, ask, None).await?;
            if !answer.status().is_redirection() {
                return Ok(answer);
            }
            hops += 1;
            let refused = |why: String| Fault::Fatal(FetchError::Redirect { url: without_query(url.as_str()), why });
            let location = answer.headers().get(LOCATION).and_then(|to| to.to_str().ok());
            let Some(to) = location.and_then(|to| url.join(to).ok()) else {
                return Err(Fault::again(format!(
                    "{} from {} leads nowhere",
                    answer.status(),
                    without_query(url.as_str())
                )));
            };
            if let Some(why) = refuse_hop(Some(&url), &to, hops, self.is_local()) {
                return Err(refused(why));
            }
            url = to;
        }
    }

    fn address(&self, repo: &str, commit: &str, name: &str) -> Result<Url, Fault> {
        let mut url = self.endpoint.clone();
        {
            let bad = |()| Fault::again(format!("{} is no base of addresses", self.endpoint));
            let mut path = url.path_segments_mut().map_err(bad)?;
            path.pop_if_empty().extend(repo.split('/')).extend(["resolve", commit]).extend(name.split('/'));
        }
        Ok(url)
    }

    async fn get(
        &self,
        url: &Url,
        file: &RemoteFile,
        range: &Range<u64>,
        ask: Ask,
        etag: Option<&HeaderValue>,
    ) -> Result<Response, Fault> {
        // A range of compressed bytes is no range of the file.
        let mut request = self.http(url)?.get(url.clone()).header(ACCEPT_ENCODING, "identity");
        if ask == Ask::Range && *range != (0..file.size) {
            request = request.header(RANGE, format!("bytes={}-{}", range.start, range.end - 1));
            if let Some(etag) = etag {
                request = request.header(IF_RANGE, etag);
            }
        }
        if let Some(token) = self.settings.token.as_ref().filter(|_| url.origin() == self.endpoint.origin()) {
            request = request.bearer_auth(token.expose());
        }
        self.in_time(request.send()).await?.map_err(|error| self.transport(&error))
    }

    /// The body of an answer whose head says that it is what was asked for.
    fn body(
        &self,
        repo: &str,
        commit: &str,
        file: &RemoteFile,
        found: &Found,
        answer: Response,
        range: &Range<u64>,
    ) -> Result<ByteStream, Fault> {
        let status = answer.status();
        if !status.is_success() {
            return Err(self.refuses(repo, commit, &answer));
        }
        if let Err(fault) = check(status, answer.headers(), range, file.size) {
            // What is there has changed, or another server answers: ask without a condition the next time.
            found.forget();
            return Err(fault);
        }
        if answer.url().origin() != self.endpoint.origin() {
            let strong = |etag: &&HeaderValue| etag.as_bytes().starts_with(b"\"");
            let etag = answer.headers().get(ETAG).filter(strong).cloned();
            found.set(Some(Place { url: answer.url().clone(), etag }));
        }
        near::narrow(&answer);
        let hub = self.clone();
        Ok(Box::pin(answer.bytes_stream().map(move |chunk| chunk.map_err(|error| hub.transport(&error)))))
    }
}

/// A signed address whose time is over, or that never was one.
fn ran_out(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 401 | 403 | 404 | 410)
}

/// Whether a successful answer is these bytes of a file of `size`.
fn check(status: StatusCode, headers: &HeaderMap, range: &Range<u64>, size: u64) -> Result<(), Fault> {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    if let Some(coding) = text(CONTENT_ENCODING).filter(|coding| *coding != "identity") {
        return Err(Fault::again(format!("the bytes came as {coding}, which nobody asked for")));
    }
    match status {
        // Never append what may be the beginning.
        StatusCode::OK if *range != (0..size) => return Err(Fault::RangeIgnored),
        StatusCode::OK => {}
        StatusCode::PARTIAL_CONTENT => {
            let said = text(CONTENT_RANGE).unwrap_or("no range");
            let of = |total: &str| total == "*" || total.parse() == Ok(size);
            let right =
                said.strip_prefix("bytes ").and_then(|said| said.split_once('/')).is_some_and(|(span, total)| {
                    span.split_once('-').is_some_and(|(from, last)| {
                        from.parse() == Ok(range.start) && last.parse() == Ok(range.end - 1) && of(total)
                    })
                });
            if !right {
                return Err(Fault::again(format!(
                    "{said} came where bytes {}-{} were asked",
                    range.start,
                    range.end - 1
                )));
            }
        }
        other => return Err(Fault::again(format!("{other} came where content was asked"))),
    }
    let wanted = range.end - range.start;
    match text(CONTENT_LENGTH).map(str::parse::<u64>) {
        None => Ok(()),
        Some(Ok(length)) if length == wanted => Ok(()),
        Some(length) => {
            Err(Fault::again(format!("{} bytes were announced where {wanted} are left", length.unwrap_or_default())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads(all: &[(&'static str, &str)]) -> HeaderMap {
        all.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn h06_only_the_range_that_was_asked_for_is_taken() {
        let partial =
            |said: &str| check(StatusCode::PARTIAL_CONTENT, &heads(&[("content-range", said)]), &(10..20), 100).is_ok();
        assert!(partial("bytes 10-19/100"));
        assert!(partial("bytes 10-19/*"));
        for said in ["bytes 0-9/100", "bytes 10-19/101", "bytes 10-20/100", "bytes 11-19/100", "lines 10-19/100", ""] {
            assert!(!partial(said), "{said:?}");
        }
        assert!(check(StatusCode::PARTIAL_CONTENT, &heads(&[]), &(10..20), 100).is_err());
        let ignored = check(StatusCode::OK, &heads(&[("content-length", "100")]), &(10..20), 100);
        assert!(matches!(ignored, Err(Fault::RangeIgnored)));
        assert!(check(StatusCode::OK, &heads(&[]), &(0..100), 100).is_ok());
        assert!(check(StatusCode::NO_CONTENT, &heads(&[]), &(0..100), 100).is_err());
    }

    #[test]
    fn h06_lengths_that_lie_and_compressed_ranges_are_refused_at_the_head() {
        let all = |name, value| check(StatusCode::OK, &heads(&[(name, value)]), &(0..100), 100).is_ok();
        assert!(all("content-length", "100"));
        assert!(!all("content-length", "1100"));
        assert!(!all("content-length", "99"));
        assert!(!all("content-encoding", "gzip"));
    }
}
