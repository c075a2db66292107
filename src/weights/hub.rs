//! The hub as seen from here: a revision's commit, a commit's files, and what its refusals mean. Retries nothing and
//! writes nothing. A file's bytes are `content`'s and `xet`'s.
//!
//! hf-hub resolves the revision. Own requests are made for the listing (hf-hub 1.0.0 reads `lfs.sha256` from the tree
//! API, which calls it `lfs.oid`, so its listing has no hash to verify against, and it follows a `Link` to any host
//! with the token) and for the bytes (it drops the headers of refusals and does not tell 200 from 206).

use std::pin::Pin;
use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use hf_hub::{HFClient, HFError, split_id};
use reqwest::header::{ACCEPT, HeaderMap, LINK, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use super::error::FetchError;
use super::hops::{follow, is_loopback, without_query};
use super::name;
use super::plan::RemoteFile;
use super::settings::Settings;
use super::tree::{TreeEntry, next_link};

/// A connection that is not there after this is not coming; the next attempt may get another address.
const CONNECT: Duration = Duration::from_secs(10);
/// One page of a listing: 1000 entries of some hundred bytes each.
const LARGEST_PAGE: usize = 32 << 20;
/// Files in a repository before its listing is called a mistake.
const MOST_FILES: usize = 1_000_000;

/// What the TLS library says of a certificate outside its time.
const CLOCK: [&str; 4] = ["NotValidYet", "not valid yet", "certificate expired", "Expired"];

/// What went wrong with one attempt.
#[derive(Debug)]
pub enum Fault {
    /// Another attempt may do better.
    Again {
        cause: String,
        after: Option<Duration>,
        scope: Scope,
    },
    /// The server sends the file from its beginning whatever is asked.
    RangeIgnored,
    Fatal(FetchError),
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Again { cause, .. } => f.write_str(cause),
            Self::RangeIgnored => f.write_str("the server ignores ranges"),
            Self::Fatal(error) => error.fmt(f),
        }
    }
}

/// Whom a fault concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// This connection or file.
    Stream,
    /// The hub as a whole (429, 5xx): everybody waits.
    Hub,
    /// No connection at all.
    Network,
}

impl Fault {
    pub fn again(cause: impl Into<String>) -> Self {
        Self::Again { cause: cause.into(), after: None, scope: Scope::Stream }
    }
}

/// Bytes of one file, a range of them in order.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, Fault>> + Send>>;

/// Cheap to make: a client, with its certificates, only comes into being with the first request.
#[derive(Debug, Clone)]
pub struct Hub {
    http: OnceLock<reqwest::Client>,
    /// Without certificates, which take longer to read than a local hub to answer.
    plain: OnceLock<reqwest::Client>,
    pub(super) endpoint: Url,
    pub(super) settings: Settings,
}

impl Hub {
    pub fn new(settings: &Settings) -> Result<Self, FetchError> {
        let bad = |why| FetchError::BadRequest { what: "the hub's address", value: settings.endpoint.clone(), why };
        let endpoint: Url = settings.endpoint.parse().map_err(|_| bad("is no URL: correct weights.endpoint"))?;
        Ok(Self { http: OnceLock::new(), plain: OnceLock::new(), endpoint, settings: settings.clone() })
    }

    pub(super) fn is_local(&self) -> bool {
        is_loopback(&self.endpoint)
    }

    /// Follows redirects of the API alone: a file's redirects are followed by hand, since their target is kept.
    pub(super) fn http(&self, to: &Url) -> Result<&reqwest::Client, Fault> {
        let plain = to.scheme() == "http" && is_loopback(to);
        let kept = if plain { &self.plain } else { &self.http };
        if let Some(http) = kept.get() {
            return Ok(http);
        }
        let local = self.is_local();
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("sglangd/", env!("CARGO_PKG_VERSION"), "; hf-hub/1.0"))
            .connect_timeout(CONNECT)
            // Many streams over one HTTP/2 connection share one window: slower than a connection each.
            .http1_only()
            .pool_max_idle_per_host(self.settings.connections)
            .redirect(Policy::custom(move |attempt| follow(attempt, local)));
        if plain {
            http = http.tls_certs_only([]);
        }
        if local {
            // The demo's hub is on this machine, whatever proxy the environment names.
            http = http.no_proxy();
        }
        let http = http.build().map_err(|error| Fault::Fatal(unreachable(&self.settings, &error)))?;
        Ok(kept.get_or_init(|| http))
    }

    fn client(&self) -> Result<HFClient, Fault> {
        let mut builder = HFClient::builder()
            .endpoint(&self.settings.endpoint)
            .client(self.http(&self.endpoint)?.clone())
            .cache_dir(&self.settings.cache)
            // Its retries know neither our patience nor each other.
            .retry_max_attempts(0);
        if let Some(token) = &self.settings.token {
            builder = builder.token(token.expose());
        }
        builder.build().map_err(|error| Fault::again(error.to_string()))
    }

    /// The commit that `revision` is now.
    pub async fn resolve(&self, repo: &str, revision: &str) -> Result<String, Fault> {
        let (owner, short) = split_id(repo);
        let client = self.client()?;
        let model = client.model(owner, short);
        let asked = model.info().revision(revision).expand(vec!["sha".to_owned()]).send();
        let info = self.in_time(asked).await?.map_err(|error| self.fault(repo, revision, error))?;
        match info.sha {
            // It becomes a folder's name.
            Some(sha) if name::is_commit(&sha) => Ok(sha),
            other => Err(Fault::Fatal(FetchError::BadAnswer {
                repo: repo.to_owned(),
                cause: format!("{other:?} is no commit for {revision}"),
            })),
        }
    }

    /// Whether `revision` is this commit still: one small request, where nothing may be to do. hf-hub would read the
    /// machine's certificates twice for it (11 ms), into a client of its own that is never used.
    pub async fn is_still(&self, repo: &str, revision: &str, commit: &str) -> Result<bool, Fault> {
        #[derive(Deserialize)]
        struct Info {
            sha: Option<String>,
        }
        let mut url = self.endpoint.clone();
        {
            let bad = |()| Fault::again(format!("{} is no base of addresses", self.endpoint));
            let mut path = url.path_segments_mut().map_err(bad)?;
            path.pop_if_empty().extend(["api", "models"]).extend(repo.split('/')).extend(["revision", revision]);
        }
        url.set_query(Some("expand=sha"));
        let (page, _) = self.in_time(self.page(repo, revision, url)).await??;
        let info: Result<Info, _> = serde_json::from_slice(&page);
        Ok(info.is_ok_and(|info| info.sha.as_deref() == Some(commit)))
    }

    /// All files of a commit, page by page.
    pub async fn list(&self, repo: &str, commit: &str) -> Result<Vec<RemoteFile>, Fault> {
        let bad = |cause: String| Fault::Fatal(FetchError::BadAnswer { repo: repo.to_owned(), cause });
        let first = format!("{}/api/models/{repo}/tree/{commit}?recursive=true", self.settings.endpoint);
        let mut next: Option<Url> = Some(first.parse().map_err(|_| bad(format!("{first} is no URL")))?);
        let mut files = Vec::new();
        while let Some(url) = next.take() {
            if url.origin() != self.endpoint.origin() {
                return Err(bad(format!("the listing goes on at another host, {url}, which must not see the token")));
            }
            let (page, link) = self.in_time(self.page(repo, commit, url.clone())).await??;
            next = link.and_then(|link| url.join(&link).ok());
            let entries: Vec<TreeEntry> =
                serde_json::from_slice(&page).map_err(|error| bad(format!("{error} in the answer of {url}")))?;
            for entry in entries {
                if entry.kind == "file" {
                    files.push(entry.into_file().map_err(&bad)?);
                }
            }
            if files.len() > MOST_FILES {
                return Err(bad(format!("more than {MOST_FILES} files")));
            }
        }
        Ok(files)
    }

    async fn page(&self, repo: &str, commit: &str, url: Url) -> Result<(Vec<u8>, Option<String>), Fault> {
        let mut request = self.http(&url)?.get(url.clone()).header(ACCEPT, "application/json");
        if let Some(token) = &self.settings.token {
            request = request.bearer_auth(token.expose());
        }
        let answer = request.send().await.map_err(|error| self.transport(&error))?;
        let status = answer.status();
        if !status.is_success() {
            return Err(self.refuses(repo, commit, &answer));
        }
        let link = answer.headers().get(LINK).and_then(|v| v.to_str().ok()).and_then(next_link);
        let mut body = Vec::new();
        let mut stream = answer.bytes_stream();
        while let Some(chunk) = stream.next().await {
            body.extend_from_slice(&chunk.map_err(|error| self.transport(&error))?);
            if body.len() > LARGEST_PAGE {
                let cause = format!("a page of more than {LARGEST_PAGE} bytes");
                return Err(Fault::Fatal(FetchError::BadAnswer { repo: repo.to_owned(), cause }));
            }
        }
        Ok((body, link))
    }

    /// A head that does not come is a stall too.
    pub(super) async fn in_time<T>(&self, answer: impl Future<Output = T>) -> Result<T, Fault> {
        let limit = self.settings.patience.stall;
        tokio::time::timeout(limit, answer).await.map_err(|_| Fault::Again {
            cause: format!("no answer within {} s", limit.as_secs_f32()),
            after: None,
            scope: Scope::Stream,
        })
    }

    /// hf-hub's error, as what it means here.
    pub fn fault(&self, repo: &str, revision: &str, error: HFError) -> Fault {
        let (context, after) = match error {
            HFError::Request { source, .. } => return self.transport(&source),
            HFError::RateLimited { retry_after, context } => (context, retry_after),
            HFError::Http { context }
            | HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::Conflict { context }
            | HFError::RepoNotFound { context: Some(context), .. }
            | HFError::RevisionNotFound { context: Some(context), .. }
            | HFError::EntryNotFound { context: Some(context), .. } => (context, None),
            other => return Fault::again(other.to_string()),
        };
        let refusal = Refusal {
            status: context.status,
            url: &context.url,
            code: context.error_code.as_deref(),
            message: context.server_message.as_deref(),
            after,
        };
        self.refused(repo, revision, &refusal)
    }

    /// What an answer that is no success means.
    pub(super) fn refuses(&self, repo: &str, revision: &str, answer: &reqwest::Response) -> Fault {
        let header = |name: &str| answer.headers().get(name).and_then(|v| v.to_str().ok());
        let refusal = Refusal {
            status: answer.status(),
            url: answer.url().as_str(),
            code: header("x-error-code"),
            message: header("x-error-message"),
            after: retry_after(answer.headers(), jiff::Timestamp::now()),
        };
        self.refused(repo, revision, &refusal)
    }

    fn refused(&self, repo: &str, revision: &str, refusal: &Refusal<'_>) -> Fault {
        let status = refusal.status;
        let endpoint = || self.settings.endpoint.clone();
        let repo = || repo.to_owned();
        let from_hub = refusal.url.parse::<Url>().is_ok_and(|url| url.origin() == self.endpoint.origin());
        let cause = format!("{status} from {}", without_query(refusal.url));
        if status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::REQUEST_TIMEOUT || status.is_server_error()
        {
            return Fault::Again { cause, after: refusal.after, scope: Scope::Hub };
        }
        if !from_hub {
            // A signed URL that ran out, or a CDN without the file: the next attempt asks the hub for a new one.
            return Fault::again(cause);
        }
        let token_set = self.settings.token.is_some();
        let no_repo = || FetchError::NoRepo { endpoint: endpoint(), repo: repo(), token_set };
        Fault::Fatal(match (status.as_u16(), refusal.code) {
            (401 | 404, Some("RepoNotFound")) => no_repo(),
            (404, None) if revision == "main" => no_repo(),
            (404, Some("RevisionNotFound") | None) => {
                FetchError::NoRevision { repo: repo(), revision: revision.to_owned() }
            }
            // The hub answers 401 for what is hidden, and for a token it does not know.
            (401, _) if token_set && refusal.message.is_some_and(|m| m.contains("Invalid credentials")) => {
                FetchError::BadToken { endpoint: endpoint() }
            }
            (401 | 403, _) if !token_set => {
                FetchError::NoToken { endpoint: endpoint(), repo: repo(), status: status.as_u16() }
            }
            (401 | 403, _) => FetchError::Gated { endpoint: endpoint(), repo: repo(), status: status.as_u16() },
            _ => return Fault::again(cause),
        })
    }

    pub(super) fn transport(&self, error: &reqwest::Error) -> Fault {
        let text = chain(error);
        if error.is_redirect() {
            let url = error.url().map_or_else(|| self.settings.endpoint.clone(), |url| without_query(url.as_str()));
            let why = std::error::Error::source(error).map_or_else(|| text.clone(), ToString::to_string);
            return Fault::Fatal(FetchError::Redirect { url, why });
        }
        if CLOCK.iter().any(|said| text.contains(said)) {
            return Fault::Fatal(FetchError::Clock { cause: text });
        }
        let scope = if error.is_connect() { Scope::Network } else { Scope::Stream };
        Fault::Again { cause: text, after: None, scope }
    }
}

/// A refusal of the server, whoever made the request.
struct Refusal<'a> {
    status: StatusCode,
    url: &'a str,
    code: Option<&'a str>,
    message: Option<&'a str>,
    after: Option<Duration>,
}

fn unreachable(settings: &Settings, error: &reqwest::Error) -> FetchError {
    FetchError::Unreachable { endpoint: settings.endpoint.clone(), cause: chain(error) }
}

/// `Retry-After`, in seconds or as a date.
fn retry_after(headers: &HeaderMap, now: jiff::Timestamp) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?;
    // A date that has passed means now.
    Some(Duration::try_from(at.duration_since(now)).unwrap_or(Duration::ZERO))
}

/// An error with its causes: reqwest alone says "error sending request".
fn chain(error: &reqwest::Error) -> String {
    let mut causes = Vec::new();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        causes.push(cause.to_string());
        source = cause.source();
    }
    match (causes.last(), error.url()) {
        (Some(last), Some(url)) => format!("{last} ({})", without_query(url.as_str())),
        (Some(last), None) => last.clone(),
        (None, _) => without_query(&error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h03_retry_after_is_read_in_seconds_and_as_a_date() {
        let now: jiff::Timestamp = "2026-11-25T12:00:00Z".parse().unwrap();
        let read = |text: &str| retry_after(&HeaderMap::from_iter([(RETRY_AFTER, text.parse().unwrap())]), now);
        assert_eq!(read("17"), Some(Duration::from_secs(17)));
        assert_eq!(read("Wed, 25 Nov 2026 12:01:30 GMT"), Some(Duration::from_secs(90)));
        assert_eq!(read("Wed, 25 Nov 2026 11:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(read("soon"), None);
    }
}
