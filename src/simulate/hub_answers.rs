//! The simulated hub's answers, request by request: the API's JSON, `resolve`, and the bytes. Keeps nothing.

use std::fmt::Write as _;
use std::sync::Arc;

use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, LINK, LOCATION, RETRY_AFTER};
use hyper::{Method, Request, Response, StatusCode};

use super::hub::{Body, Route, Seen, State, What, locked};
use super::model::{ModelFile, Storage};

/// What was asked, once the path is taken apart.
enum Asked {
    Info { repo: String, revision: String },
    Tree { repo: String, revision: String },
    XetRight { repo: String },
    Resolve { revision: String, file: String },
    Cdn { commit: String, file: String },
    Nothing,
}

pub(super) async fn answer(request: &Request<Incoming>, state: &Arc<State>) -> Response<Body> {
    let asked = take_apart(request.uri().path());
    let (route, name) = match &asked {
        Asked::Info { repo, .. } | Asked::Tree { repo, .. } | Asked::XetRight { repo } => {
            (Some(Route::Api), repo.clone())
        }
        Asked::Resolve { file, .. } => (Some(Route::Resolve), file.clone()),
        Asked::Cdn { file, .. } => (Some(Route::Cdn), file.clone()),
        Asked::Nothing => (None, String::new()),
    };
    let header = |name: &str| request.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    state.note(Seen {
        method: request.method().to_string(),
        target: request.uri().to_string(),
        range: header("range"),
        if_range: header("if-range"),
        authorization: header("authorization"),
        route,
        at: tokio::time::Instant::now(),
    });
    // A fault of content is spent on answers that carry content.
    let counts = route != Some(Route::Cdn) || request.method() == Method::GET;
    let fault = route.filter(|_| counts).and_then(|route| state.misbehave(route, &name));
    match &fault {
        Some(What::Refuse { status, retry_after, code }) => {
            let mut refusal = text(*status, "text/plain", "refused on request");
            if let Some(seconds) = retry_after {
                put(&mut refusal, RETRY_AFTER.as_str(), &seconds.to_string());
            }
            if let Some(code) = code {
                put(&mut refusal, "x-error-code", code);
            }
            return refusal;
        }
        Some(What::Redirect(to)) => {
            let mut hop = text(302, "text/plain", "elsewhere");
            put(&mut hop, LOCATION.as_str(), to);
            return hop;
        }
        _ => {}
    }
    match asked {
        Asked::Info { repo, revision } => info(state, &repo, &revision),
        Asked::Tree { revision, .. } => {
            tree(state, &revision, request.uri().query().unwrap_or(""), request.uri().path()).await
        }
        Asked::XetRight { .. } => xet_right(state),
        Asked::Resolve { revision, file } => resolve(request, state, &revision, &file, fault).await,
        Asked::Cdn { commit, file } => match find(state, &commit, &file) {
            Some((commit, file)) => {
                let mut answer = content(request, state, file, fault).await;
                // huggingface_hub follows a redirect to another port of the same host where it means to read
                // the first answer's headers; the real CDN has a name of its own.
                put(&mut answer, "x-repo-commit", &commit);
                answer
            }
            None => text(404, "text/plain", "no such file"),
        },
        Asked::Nothing => text(404, "text/plain", "no such page"),
    }
}

/// `/api/models/{repo}[/revision/{rev}]`, `/api/models/{repo}/tree/{rev}`, `/{repo}/resolve/{rev}/{file}`, `/cdn/{commit}/{file}`.
fn take_apart(path: &str) -> Asked {
    if let Some(rest) = path.strip_prefix("/api/models/") {
        if let Some((repo, revision)) = rest.split_once("/tree/") {
            return Asked::Tree { repo: decode(repo), revision: decode(revision) };
        }
        if let Some((repo, _)) = rest.split_once("/xet-read-token/") {
            return Asked::XetRight { repo: decode(repo) };
        }
        let (repo, revision) = rest.split_once("/revision/").unwrap_or((rest, "main"));
        return Asked::Info { repo: decode(repo), revision: decode(revision) };
    }
    if let Some((commit, file)) = path.strip_prefix("/cdn/").and_then(|rest| rest.split_once('/')) {
        return Asked::Cdn { commit: commit.to_owned(), file: decode(file) };
    }
    match path.split_once("/resolve/").and_then(|(_, rest)| rest.split_once('/')) {
        Some((revision, file)) => Asked::Resolve { revision: decode(revision), file: decode(file) },
        None => Asked::Nothing,
    }
}

/// Percent-encoding undone; bytes that are no UTF-8 become replacement characters.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match (first, tail) {
            (b'%', [a, b, after @ ..]) => {
                let digits = std::str::from_utf8(&[*a, *b]).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok());
                digits.map(|byte| (byte, after))
            }
            _ => None,
        };
        let (byte, after) = escaped.unwrap_or((*first, tail));
        bytes.push(byte);
        rest = after;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The commit that a revision is, with its files.
fn commit(state: &State, revision: &str) -> Option<(String, Arc<Vec<ModelFile>>)> {
    let repo = locked(&state.repo);
    let wanted = if revision == "main" { repo.head.clone() } else { revision.to_owned() };
    repo.commits.iter().find(|(commit, _)| *commit == wanted).cloned()
}

fn find(state: &State, revision: &str, name: &str) -> Option<(String, ModelFile)> {
    let (commit, files) = commit(state, revision)?;
    let file = files.iter().find(|file| file.name == name)?.clone();
    Some((commit, file))
}

async fn hash(file: &ModelFile) -> String {
    let file = file.clone();
    let hashed = tokio::task::spawn_blocking(move || file.hash().map(str::to_owned)).await;
    // A file of a folder that went away: its hash matches nothing, so the client says so.
    hashed.ok().and_then(Result::ok).unwrap_or_default()
}

fn no_revision() -> Response<Body> {
    let mut answer = text(404, "application/json", "{\"error\":\"Invalid rev id\"}");
    put(&mut answer, "x-error-code", "RevisionNotFound");
    answer
}

fn info(state: &State, repo: &str, revision: &str) -> Response<Body> {
    let Some((commit, files)) = commit(state, revision) else { return no_revision() };
    let mut siblings = Vec::new();
    for file in files.iter() {
        siblings.push(serde_json::json!({ "rfilename": file.name, "size": file.size }));
    }
    let body = serde_json::json!({
        "_id": "1", "id": repo, "modelId": repo, "author": "simulated", "sha": commit,
        "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
        "private": false, "gated": false, "disabled": false, "downloads": 0, "likes": 0, "tags": [],
        "siblings": siblings,
    });
    text(200, "application/json", body.to_string())
}

async fn tree(state: &State, revision: &str, query: &str, path: &str) -> Response<Body> {
    let Some((_, files)) = commit(state, revision) else { return no_revision() };
    let cursor =
        query.split('&').find_map(|pair| pair.strip_prefix("cursor=")).and_then(|n| n.parse().ok()).unwrap_or(0);
    let mut entries = Vec::new();
    for file in files.iter().skip(cursor).take(state.page) {
        let oid = hash(file).await;
        let mut entry = serde_json::json!({ "type": "file", "size": file.size, "path": file.name });
        match file.storage {
            Storage::Git => entry["oid"] = oid.into(),
            Storage::Lfs => {
                entry["oid"] = oid.get(..40).unwrap_or_default().into();
                entry["lfs"] = serde_json::json!({ "oid": oid, "size": file.size, "pointerSize": 135 });
            }
        }
        if let Some(hash) = state.xet.as_ref().and_then(|store| store.files.get(&file.name)) {
            entry["xetHash"] = hash.as_str().into();
        }
        entries.push(entry);
    }
    let next = cursor + entries.len();
    let mut answer = text(200, "application/json", serde_json::Value::Array(entries).to_string());
    if next < files.len() {
        put(&mut answer, LINK.as_str(), &format!("<{path}?recursive=true&cursor={next}>; rel=\"next\""));
    }
    answer
}

/// Where the store is, and a right to read there.
fn xet_right(state: &State) -> Response<Body> {
    let Some(store) = &state.xet else { return text(404, "text/plain", "no such page") };
    let right = serde_json::json!({
        "accessToken": "a-right-to-read", "exp": jiff::Timestamp::now().as_second() + 3600, "casUrl": store.url,
    });
    text(200, "application/json", right.to_string())
}

async fn resolve(
    request: &Request<Incoming>,
    state: &Arc<State>,
    revision: &str,
    name: &str,
    fault: Option<What>,
) -> Response<Body> {
    let Some((commit, files)) = commit(state, revision) else { return no_revision() };
    let Some(file) = files.iter().find(|file| file.name == name).cloned() else {
        let mut answer = text(404, "text/plain", "Entry not found");
        put(&mut answer, "x-error-code", "EntryNotFound");
        put(&mut answer, "x-repo-commit", &commit);
        return answer;
    };
    let hash = hash(&file).await;
    let mut answer = match (file.storage, state.cdn) {
        (Storage::Lfs, Some(cdn)) => {
            let mut answer = text(302, "text/plain", "Found. Redirecting");
            let place = file.name.split('/').map(encode).collect::<Vec<_>>().join("/");
            put(
                &mut answer,
                LOCATION.as_str(),
                &format!("http://{cdn}/cdn/{commit}/{place}?sig={}", hash.get(..16).unwrap_or("")),
            );
            put(&mut answer, ETAG.as_str(), &format!("\"{hash}\""));
            answer
        }
        _ => content(request, state, file.clone(), fault).await,
    };
    if file.storage == Storage::Lfs {
        put(&mut answer, "x-linked-etag", &format!("\"{hash}\""));
        if state.cdn.is_some() {
            // Not beside content: hf-hub would take it for the length of a range.
            put(&mut answer, "x-linked-size", &file.size.to_string());
        }
    }
    put(&mut answer, "x-repo-commit", &commit);
    answer
}

/// Percent-encoding of one segment of a path.
fn encode(segment: &str) -> String {
    segment.bytes().fold(String::new(), |mut text, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            text.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(text, "%{byte:02X}");
        }
        text
    })
}

/// The file's bytes, all or a range, with what is to go wrong about them.
async fn content(
    request: &Request<Incoming>,
    state: &Arc<State>,
    file: ModelFile,
    fault: Option<What>,
) -> Response<Body> {
    let hash = hash(&file).await;
    let etag = match fault {
        Some(What::Etag(other)) => other,
        _ => hash.as_str(),
    };
    let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    // RFC 9110, 13.1.5: another content than the one that the client has a part of is sent whole.
    let same = header("if-range").is_none_or(|wanted| wanted.trim_matches('"') == etag);
    let asked = header("range").filter(|_| same && fault != Some(What::IgnoreRange)).map(|text| range(text, file.size));
    let (status, from, to) = match asked {
        None => (StatusCode::OK, 0, file.size),
        Some(Some((from, to))) => (StatusCode::PARTIAL_CONTENT, from, to),
        Some(None) => {
            let mut answer = text(416, "text/plain", "no such range");
            put(&mut answer, CONTENT_RANGE.as_str(), &format!("bytes */{}", file.size));
            return answer;
        }
    };
    let length = match fault {
        Some(What::Truncate(less)) => (to - from).saturating_sub(less),
        Some(What::Longer(more)) => to - from + more,
        _ => to - from,
    };
    let body = if request.method() == Method::HEAD {
        Full::default().map_err(|never| match never {}).boxed_unsync()
    } else {
        body(state.clone(), file.clone(), from, to, fault)
    };
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    if status == StatusCode::PARTIAL_CONTENT {
        put(&mut answer, CONTENT_RANGE.as_str(), &format!("bytes {from}-{}/{}", to - 1, file.size));
    }
    put(&mut answer, CONTENT_LENGTH.as_str(), &length.to_string());
    put(&mut answer, CONTENT_TYPE.as_str(), "application/octet-stream");
    put(&mut answer, ACCEPT_RANGES.as_str(), "bytes");
    put(&mut answer, ETAG.as_str(), &format!("\"{etag}\""));
    answer
}

/// `bytes=A-B`, `bytes=A-` or `bytes=-N` as a half-open range; none: it cannot be served.
fn range(header: &str, size: u64) -> Option<(u64, u64)> {
    let (from, to) = header.strip_prefix("bytes=")?.split_once('-')?;
    let (from, to) = match (from.parse::<u64>(), to.parse::<u64>()) {
        (Ok(from), Ok(to)) => (from, to.saturating_add(1).min(size)),
        (Ok(from), Err(_)) => (from, size),
        (Err(_), Ok(last)) => (size.saturating_sub(last), size),
        (Err(_), Err(_)) => return None,
    };
    (from < to).then_some((from, to))
}

fn body(state: Arc<State>, file: ModelFile, from: u64, to: u64, fault: Option<What>) -> Body {
    let (from, to) = match fault {
        Some(What::WrongRange) => (0, to - from),
        Some(What::Truncate(less)) => (from, to.saturating_sub(less).max(from)),
        _ => (from, to),
    };
    let begun = from;
    let steps = stream::try_unfold(from, move |at| {
        let (state, file, fault) = (state.clone(), file.clone(), fault.clone());
        async move {
            let mut most = state.step();
            match fault {
                Some(What::Stall(after)) if at - begun >= after => std::future::pending().await,
                Some(What::Cut(after)) if at - begun >= after => return Err(std::io::Error::other("cut on request")),
                Some(What::Longer(_)) if at >= to => return Err(std::io::Error::other("shorter than promised")),
                Some(What::Stall(after) | What::Cut(after)) => {
                    most = most.min(usize::try_from(after - (at - begun)).unwrap_or(most));
                }
                _ => {}
            }
            if at >= to {
                return Ok(None);
            }
            let most = most.min(usize::try_from(to - at).unwrap_or(most));
            let mut piece = file.piece(at, most)?;
            match fault {
                Some(What::Flip(place)) if (at..at + piece.len() as u64).contains(&place) => {
                    let mut bytes = piece.to_vec();
                    bytes[usize::try_from(place - at).unwrap_or(0)] ^= 1;
                    piece = bytes.into();
                }
                Some(What::Zeros) => piece = vec![0; piece.len()].into(),
                _ => {}
            }
            let length = piece.len() as u64;
            state.send(length).await;
            Ok(Some((Frame::data(piece), at + length)))
        }
    });
    StreamBody::new(steps).boxed_unsync()
}

fn text(status: u16, kind: &'static str, text: impl Into<Bytes>) -> Response<Body> {
    let mut answer = Response::new(Full::new(text.into()).map_err(|never| match never {}).boxed_unsync());
    *answer.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    put(&mut answer, CONTENT_TYPE.as_str(), kind);
    answer
}

/// Sets a header; a value that is none (a file's name with a line break, say) is left out.
fn put(answer: &mut Response<Body>, name: &str, value: &str) {
    if let (Ok(name), Ok(value)) =
        (hyper::header::HeaderName::from_bytes(name.as_bytes()), hyper::header::HeaderValue::from_str(value))
    {
        answer.headers_mut().insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_rfc_9110_has_them() {
        assert_eq!(range("bytes=0-0", 10), Some((0, 1)));
        assert_eq!(range("bytes=5-", 10), Some((5, 10)));
        assert_eq!(range("bytes=5-99", 10), Some((5, 10)));
        assert_eq!(range("bytes=-3", 10), Some((7, 10)));
        assert_eq!(range("bytes=10-", 10), None);
        assert_eq!(range("lines=1-2", 10), None);
    }

    #[test]
    fn names_survive_their_way_through_a_url() {
        for name in ["a b.txt", "ä/ö.json", "100%.txt", "a#b?c"] {
            assert_eq!(decode(&name.split('/').map(encode).collect::<Vec<_>>().join("/")), name);
        }
        assert_eq!(decode("refs%2Fpr%2F1"), "refs/pr/1");
        assert_eq!(decode("50%"), "50%");
    }
}
