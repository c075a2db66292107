//! The hub as seen from here: a revision's commit, a commit's files, and what its refusals mean. Retries nothing and
//! writes nothing. A file's bytes are `content`'s and `xet`'s.
//!
//! hf-hub resolves the revision. Own requests are made for the listing (hf-hub 1.0.0 reads `lfs.sha256` from the tree
//! API, which calls it `lfs.oid`, so its listing has no hash to verify against, and it follows a `Link` to any host
//! with the token) and for the bytes (it drops the headers of refusals and does not tell 200 from 206).

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use hf_hub::{HFClient, HFError, split_id};
use reqwest::header::{ACCEPT, HeaderMap, LINK, RETRY_AFTER};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{StatusCode, Url};
use serde::Deserialize;

use super::error::FetchError;
use super::name;
use super::plan::{Hash, RemoteFile, Transport};
use super::settings::Settings;

/// Hops of one request. Browsers take 20, the hub needs 2.
const REDIRECTS: usize = 10;
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

/// Where a redirect may lead. reqwest itself drops the token when host or port change.
fn follow(attempt: Attempt<'_>, hub_is_local: bool) -> reqwest::redirect::Action {
    // The first one is what was asked.
    if !attempt.previous().first().is_some_and(|asked| asked.path().contains("/api/models/")) {
        return attempt.stop();
    }
    let from = attempt.previous().last().cloned();
    match refuse_hop(from.as_ref(), attempt.url(), attempt.previous().len(), hub_is_local) {
        Some(why) => attempt.error(why),
        None => attempt.follow(),
    }
}

pub(super) fn refuse_hop(from: Option<&Url>, to: &Url, hops: usize, hub_is_local: bool) -> Option<String> {
    if hops > REDIRECTS {
        return Some(format!("more than {REDIRECTS} redirects"));
    }
    let to_shown = without_query(to.as_str());
    match to.scheme() {
        "https" => {}
        "http" if from.is_some_and(|from| from.scheme() == "http") => {}
        _ => return Some(format!("{to_shown} is not as safe as where it came from")),
    }
    // Metadata services of clouds answer on link-local addresses, and hand out the machine's credentials.
    if address(to).is_some_and(|ip| is_link_local(ip) || ip.is_unspecified() || ip.is_multicast()) {
        return Some(format!("{to_shown} is an address no hub has"));
    }
    (is_loopback(to) && !hub_is_local).then(|| format!("{to_shown} is this machine, and the hub is not"))
}

fn address(url: &Url) -> Option<IpAddr> {
    let host = url.host_str()?;
    let ip: IpAddr = host.trim_start_matches('[').trim_end_matches(']').parse().ok()?;
    Some(ip.to_canonical())
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

fn is_loopback(url: &Url) -> bool {
    url.host_str() == Some("localhost") || address(url).is_some_and(|ip| ip.is_loopback())
}

/// Signed URLs carry their right of access in the query.
pub(super) fn without_query(url: &str) -> String {
    url.split(['?', '#']).next().unwrap_or(url).to_owned()
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

/// The `rel="next"` of a `Link` header.
fn next_link(header: &str) -> Option<String> {
    header.split(',').find_map(|part| {
        let (url, rest) = part.trim().strip_prefix('<')?.split_once('>')?;
        rest.split(';').any(|p| matches!(p.trim(), "rel=\"next\"" | "rel=next")).then(|| url.to_owned())
    })
}

/// One entry of the tree API.
#[derive(Deserialize)]
struct TreeEntry {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    oid: String,
    #[serde(default)]
    size: u64,
    path: String,
    lfs: Option<TreeLfs>,
    #[serde(rename = "xetHash")]
    xet_hash: Option<String>,
}

#[derive(Deserialize)]
struct TreeLfs {
    #[serde(alias = "sha256")]
    oid: String,
    size: u64,
}

impl TreeEntry {
    fn into_file(self) -> Result<RemoteFile, String> {
        let (oid, size) = self.lfs.map_or((self.oid, self.size), |lfs| (lfs.oid, lfs.size));
        // It becomes a file's name; anything but a hash could be a path.
        let hash = Hash::from_hex(&oid).ok_or_else(|| format!("{oid:?}, the hash of {:?}, is no hash", self.path))?;
        let transport = self.xet_hash.map_or(Transport::Http, |hash| Transport::Xet { hash });
        Ok(RemoteFile { name: self.path, size, hash, transport })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(from: &str, to: &str) -> Option<String> {
        refuse_hop(Some(&from.parse().unwrap()), &to.parse().unwrap(), 1, false)
    }

    #[test]
    fn h05_redirects_lead_only_where_a_hub_may_lead() {
        assert_eq!(hop("https://hub.example/a", "https://cdn.example/b?sig=1"), None);
        assert_eq!(hop("http://mirror.example/a", "http://cdn.example/b"), None);
        assert!(hop("https://hub.example/a", "http://cdn.example/b").is_some(), "downgrade");
        assert!(hop("https://hub.example/a", "file:///etc/passwd").is_some());
        assert!(hop("http://hub.example/a", "http://169.254.169.254/latest/meta-data").is_some());
        assert!(hop("http://hub.example/a", "http://[::ffff:169.254.169.254]/").is_some(), "mapped");
        assert!(hop("http://hub.example/a", "http://[fe80::1]/").is_some());
        assert!(hop("http://hub.example/a", "http://127.0.0.1:8001/metrics").is_some());
        let url: Url = "https://hub.example/a".parse().unwrap();
        assert!(refuse_hop(Some(&url), &url, REDIRECTS + 1, false).is_some());
    }

    #[test]
    fn a_listing_whose_hashes_are_paths_is_refused() {
        let entry: TreeEntry =
            serde_json::from_str(r#"{"type":"file","oid":"../../../x","size":1,"path":"a.json"}"#).unwrap();
        assert!(entry.into_file().is_err());
    }

    #[test]
    fn h03_retry_after_is_read_in_seconds_and_as_a_date() {
        let now: jiff::Timestamp = "2026-11-25T12:00:00Z".parse().unwrap();
        let read = |text: &str| retry_after(&HeaderMap::from_iter([(RETRY_AFTER, text.parse().unwrap())]), now);
        assert_eq!(read("17"), Some(Duration::from_secs(17)));
        assert_eq!(read("Wed, 25 Nov 2026 12:01:30 GMT"), Some(Duration::from_secs(90)));
        assert_eq!(read("Wed, 25 Nov 2026 11:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(read("soon"), None);
    }

    #[test]
    fn the_next_page_is_found_among_links() {
        assert_eq!(next_link(r#"<https://h/a?cursor=x>; rel="next""#).as_deref(), Some("https://h/a?cursor=x"));
        assert_eq!(next_link(r#"<https://h/p>; rel="prev", </q>; rel="next""#).as_deref(), Some("/q"));
        assert_eq!(next_link(r#"<https://h/p>; rel="prev""#), None);
    }
}
