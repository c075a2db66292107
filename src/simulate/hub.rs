//! A hub on this machine that speaks as much of the Hugging Face Hub's protocol as hf-hub and huggingface_hub need, for the
//! demo and for tests: any repository's name is answered with the same files. It misbehaves on request ([`Fault`]).
//! Of xet it has the address of a store that somebody else runs. Has no uploads, checks no token (a fault refuses), and
//! binds nothing itself.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use super::hub_answers;
use super::model::{self, ModelFile};

/// The commit that `main` is at first.
pub const COMMIT: &str = "5f0b02c75b57c5855da9ae460ce51323ea669d8a";
/// Requests that are remembered; a test that needs more counts bytes instead.
const REMEMBERED: usize = 10_000;

pub(super) type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What is served.
#[derive(Debug, Clone)]
pub enum Content {
    /// The made-up model: so many shards of so many bytes.
    Demo {
        shards: u64,
        shard_bytes: u64,
    },
    /// The files of a folder.
    Folder(PathBuf),
    Files(Vec<ModelFile>),
}

impl Default for Content {
    /// 64 MiB: some seconds of progress bar at the demo's rate.
    fn default() -> Self {
        Self::Demo { shards: 4, shard_bytes: 16 << 20 }
    }
}

impl Content {
    fn files(self) -> std::io::Result<Vec<ModelFile>> {
        match self {
            Self::Demo { shards, shard_bytes } => Ok(model::demo(shards, shard_bytes)),
            Self::Folder(path) => model::folder(&path),
            Self::Files(files) => Ok(files),
        }
    }
}

#[derive(Debug, Default)]
pub struct Options {
    /// Bytes a second, of all answers together; none: as fast as it goes.
    pub rate: Option<u64>,
    /// Before every answer.
    pub latency: Duration,
    /// Where LFS files are served: the hub redirects there. None: the hub serves them itself.
    pub cdn: Option<TcpListener>,
    /// Entries of one page of a listing; zero: the hub's own 1000.
    pub page: usize,
    /// Where the content of some files is kept besides.
    pub xet: Option<XetStore>,
}

/// A content-addressed store and what it knows of the files.
#[derive(Debug, Clone, Default)]
pub struct XetStore {
    pub url: String,
    /// The hash by which it knows a file, by the file's name.
    pub files: BTreeMap<String, String>,
}

/// One way to misbehave.
#[derive(Debug, Clone)]
pub struct Fault {
    pub on: Route,
    pub which: Which,
    /// Only about this file (of [`Route::Api`]: this repository); none: about any.
    pub about: Option<String>,
    pub what: What,
}

/// Which kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// `/api/…`
    Api,
    /// `/{repo}/resolve/…`, GET and HEAD.
    Resolve,
    /// GETs of LFS content.
    Cdn,
}

/// Which of the requests that match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    All,
    /// The first so many.
    First(u64),
    /// Every so-manieth.
    Each(u64),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// This status, with `Retry-After` and `X-Error-Code` if given.
    Refuse {
        status: u16,
        retry_after: Option<u64>,
        code: Option<&'static str>,
    },
    /// The connection ends after so many bytes of the body.
    Cut(u64),
    /// Nothing comes after so many bytes of the body, and the connection stays open.
    Stall(u64),
    /// The byte at this place of the file has a bit flipped.
    Flip(u64),
    /// Every byte is zero.
    Zeros,
    /// A whole, well-formed answer, but shorter than the file by so many bytes.
    Truncate(u64),
    /// Content-Length says so many more than come.
    Longer(u64),
    /// 200 and the whole file where a range was asked.
    IgnoreRange,
    /// The right bytes, as those of a content with this strong ETag.
    Etag(&'static str),
    /// 206, the right length, other bytes: those from the file's beginning.
    WrongRange,
    Redirect(String),
}

/// One request that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub method: String,
    /// Path and query.
    pub target: String,
    pub range: Option<String>,
    pub if_range: Option<String>,
    /// What the Authorization header said.
    pub authorization: Option<String>,
    pub route: Option<Route>,
    pub at: Instant,
}

/// A running hub; dropping it ends it.
#[derive(Debug)]
pub struct Hub {
    pub addr: SocketAddr,
    state: Arc<State>,
    tasks: Vec<AbortHandle>,
}

#[derive(Debug)]
pub(super) struct State {
    pub repo: Mutex<Repo>,
    pub cdn: Option<SocketAddr>,
    pub latency: Duration,
    pub page: usize,
    pub xet: Option<XetStore>,
    rate: Option<u64>,
    /// When the next byte may leave, if there is a rate.
    free_at: Mutex<Instant>,
    faults: Mutex<Vec<(Fault, u64)>>,
    seen: Mutex<Vec<Seen>>,
    sent: Mutex<u64>,
}

/// The commits of the one repository, and the one that `main` is.
#[derive(Debug)]
pub(super) struct Repo {
    pub head: String,
    pub commits: Vec<(String, Arc<Vec<ModelFile>>)>,
}

impl Hub {
    /// Serves `content` on `listener` until dropped. Needs a tokio runtime around it.
    pub async fn serve(listener: TcpListener, content: Content, options: Options) -> std::io::Result<Self> {
        // Listing a folder and hashing shards block.
        let files = tokio::task::spawn_blocking(move || content.files()).await.map_err(std::io::Error::other)??;
        let addr = listener.local_addr()?;
        let cdn = options.cdn.as_ref().map(TcpListener::local_addr).transpose()?;
        let state = Arc::new(State {
            repo: Mutex::new(Repo { head: COMMIT.to_owned(), commits: vec![(COMMIT.to_owned(), Arc::new(files))] }),
            cdn,
            latency: options.latency,
            page: if options.page == 0 { 1000 } else { options.page },
            xet: options.xet,
            rate: options.rate,
            free_at: Mutex::new(Instant::now()),
            faults: Mutex::default(),
            seen: Mutex::default(),
            sent: Mutex::default(),
        });
        let mut tasks = vec![tokio::spawn(accept(listen(listener)?, state.clone())).abort_handle()];
        if let Some(cdn) = options.cdn {
            tasks.push(tokio::spawn(accept(listen(cdn)?, state.clone())).abort_handle());
        }
        Ok(Self { addr, state, tasks })
    }

    /// What `HF_ENDPOINT` is set to.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Misbehaves from now on.
    pub fn fault(&self, fault: Fault) {
        locked(&self.state.faults).push((fault, 0));
    }

    /// Behaves from now on.
    pub fn heal(&self) {
        locked(&self.state.faults).clear();
    }

    /// A new commit of other files, and `main` is it.
    pub fn push(&self, commit: &str, files: Vec<ModelFile>) {
        let mut repo = locked(&self.state.repo);
        repo.commits.push((commit.to_owned(), Arc::new(files)));
        commit.clone_into(&mut repo.head);
    }

    /// All requests so far, in order.
    pub fn seen(&self) -> Vec<Seen> {
        locked(&self.state.seen).clone()
    }

    /// Bytes of content sent so far.
    pub fn sent(&self) -> u64 {
        *locked(&self.state.sent)
    }

    /// Forgets requests and bytes.
    pub fn forget(&self) {
        locked(&self.state.seen).clear();
        *locked(&self.state.sent) = 0;
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl State {
    pub(super) fn note(&self, seen: Seen) {
        let mut all = locked(&self.seen);
        if all.len() < REMEMBERED {
            all.push(seen);
        }
    }

    /// What to do wrong about this request.
    pub(super) fn misbehave(&self, route: Route, about: &str) -> Option<What> {
        let mut faults = locked(&self.faults);
        let mut chosen = None;
        for (fault, count) in faults.iter_mut() {
            if fault.on != route || fault.about.as_ref().is_some_and(|name| name != about) {
                continue;
            }
            *count += 1;
            let hit = match fault.which {
                Which::All => true,
                Which::First(n) => *count <= n,
                Which::Each(n) => n > 0 && *count % n == 0,
            };
            if hit && chosen.is_none() {
                chosen = Some(fault.what.clone());
            }
        }
        chosen
    }

    /// Counts `bytes` as sent, and waits until the rate lets them leave.
    pub(super) async fn send(&self, bytes: u64) {
        *locked(&self.sent) += bytes;
        let Some(rate) = self.rate.filter(|rate| *rate > 0) else { return };
        let leave = {
            let mut free_at = locked(&self.free_at);
            let leave = (*free_at).max(Instant::now());
            *free_at = leave + Duration::from_secs_f64(bytes as f64 / rate as f64);
            leave
        };
        tokio::time::sleep_until(leave).await;
    }

    /// The largest piece of one step: small when slow, so that a bar moves and a cut is where it was asked.
    pub(super) fn step(&self) -> usize {
        match self.rate {
            Some(rate) => usize::try_from(rate / 50).unwrap_or(usize::MAX).clamp(1024, 64 << 10),
            None => 64 << 10,
        }
    }
}

fn listen(listener: TcpListener) -> std::io::Result<tokio::net::TcpListener> {
    listener.set_nonblocking(true)?;
    tokio::net::TcpListener::from_std(listener)
}

async fn accept(listener: tokio::net::TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    // Small answers must not wait for the peer's delayed ACK; without it they are only slower.
                    let _ = stream.set_nodelay(true);
                    let state = state.clone();
                    connections.spawn(async move {
                        let service = service_fn(move |request| answer(request, state.clone()));
                        // A peer that went away is no error of the hub.
                        let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                    });
                }
                // Out of descriptors: some connection has to end first.
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer(request: Request<Incoming>, state: Arc<State>) -> Result<Response<Body>, Infallible> {
    if !state.latency.is_zero() {
        tokio::time::sleep(state.latency).await;
    }
    Ok(hub_answers::answer(&request, &state).await)
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
