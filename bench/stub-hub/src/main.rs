//! A Hugging Face hub look-alike for download benchmarks: one repository of synthetic safetensors
//! shards, no disk, no network beyond 127.0.0.1.
//!
//!   stub-hub --port 9300 [--shards 8] [--shard-mib 512] [--seed 1] [--threads 1]
//!            [--rate-mib 0]        cap of one response body, MiB/s (0: none)
//!            [--latency-ms 0]      before every response head
//!            [--ttl-s 3600]        how long a signed /cdn/ URL is good
//!            [--f503 0] [--fdrop 0] [--f403 0] [--flen 0]
//!                 every k-th /cdn/ GET: answers 503; drops the connection mid-body; answers 403
//!                 (expired URL); promises a Content-Length longer than what it sends.
//!
//!   GET /api/models/{repo}[/revision/{rev}][?blobs=true]      GET /api/models/{repo}/tree/{rev}
//!   HEAD/GET /{repo}/resolve/{rev}/{file}   302 to /cdn/ for shards, the bytes for small files
//!   GET /cdn/{file}?exp=&sig=               on the port above (another host, to a client, as the real
//!                                           CDN is: huggingface_hub follows a redirect to its own host
//!                                           where it means to read the first answer); one Range
//!   GET /_stats, /_reset, /_files (name, size, sha256), /_log (the last 400 requests)
//!
//! Any repository name is answered. A shard is an 8-byte length, a JSON header and bytes out of one
//! pool of random words; where a shard begins in the pool is its own, and the pool's length is odd,
//! so that bytes written at a wrong offset do not hash right.
use std::{
    convert::Infallible,
    fmt::Write as _,
    future::Future,
    pin::Pin,
    sync::{
        atomic::{AtomicU64, Ordering::Relaxed},
        Arc, Mutex,
    },
    task::{Context, Poll},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use hyper::{
    body::{Body, Frame, Incoming, SizeHint},
    header::{self, HeaderMap, HeaderName, HeaderValue},
    service::service_fn, Method, Request, Response, StatusCode,
};
use hyper_util::rt::TokioIo;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, Sleep};

const COMMIT: &str = "5f0b02c75b57c5855da9ae460ce51323ea669d8a";
const POOL: usize = (16 << 20) + 4099;
const STEP: usize = 256 << 10;

fn arg(name: &str, default: u64) -> u64 {
    let a: Vec<String> = std::env::args().collect();
    a.iter().position(|x| x == name).and_then(|i| a.get(i + 1)).map_or(default, |v| v.parse().expect("a number"))
}

/// splitmix64, the words of the pool.
fn pool(seed: u64) -> &'static [u8] {
    let mut v = Vec::with_capacity(POOL + 8);
    let mut s = seed;
    while v.len() < POOL {
        s = s.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = s;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        v.extend_from_slice(&(z ^ (z >> 31)).to_le_bytes());
    }
    v.truncate(POOL);
    v.leak()
}

struct File {
    name: String,
    head: Bytes,
    start: usize,
    size: u64,
    lfs: bool,
    /// sha256 of an LFS file; the blob id of a small one.
    etag: String,
}

impl File {
    /// The piece at `at`, at most `most` bytes, without copying.
    fn piece(&self, pool: &'static [u8], at: u64, most: usize) -> Bytes {
        let h = self.head.len() as u64;
        if at < h {
            let end = (at as usize + most).min(self.head.len());
            return self.head.slice(at as usize..end);
        }
        let p = (self.start as u64 + (at - h)) as usize % POOL;
        let n = most.min(POOL - p).min((self.size - at) as usize);
        Bytes::from_static(&pool[p..p + n])
    }
}

/// git's id of a small file: sglangd checks it, as `git hash-object` would.
fn blob_id(b: &[u8]) -> String {
    hex(&Sha1::new().chain_update(format!("blob {}\0", b.len())).chain_update(b).finalize())
}

fn hex(b: &[u8]) -> String {
    b.iter().fold(String::new(), |mut s, x| {
        let _ = write!(s, "{x:02x}");
        s
    })
}

fn build(pool: &'static [u8], shards: u64, mib: u64) -> Vec<File> {
    let mut files: Vec<File> = Vec::new();
    let mut map = String::new();
    for k in 0..shards {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", k + 1);
        let size = mib << 20;
        let tensor = |data: u64| {
            format!("{{\"__metadata__\":{{\"format\":\"pt\"}},\"layers.{k}.weight\":{{\"dtype\":\"U8\",\"shape\":[{data}],\"data_offsets\":[0,{data}]}}}}")
        };
        // The header is padded to 4 KiB, so that its length does not hang on the numbers in it.
        let data = size - 8 - 4096;
        let mut h = 4096u64.to_le_bytes().to_vec();
        h.extend_from_slice(format!("{:<4096}", tensor(data)).as_bytes());
        let _ = write!(map, "{}\"layers.{k}.weight\":\"{name}\"", if k > 0 { "," } else { "" });
        files.push(File { name, head: h.into(), start: (k as usize * 1_000_003) % POOL, size, lfs: true, etag: String::new() });
    }
    // Hashed two at a time: the machine may have no more cores.
    std::thread::scope(|s| {
        for half in files.chunks_mut((shards as usize).div_ceil(2).max(1)) {
            s.spawn(move || {
                for f in half {
                    let mut h = Sha256::new();
                    let mut at = 0;
                    while at < f.size {
                        let b = f.piece(pool, at, POOL);
                        h.update(&b);
                        at += b.len() as u64;
                    }
                    f.etag = hex(&h.finalize());
                }
            });
        }
    });
    let mut small = |name: &str, text: String| {
        let etag = blob_id(text.as_bytes());
        files.push(File { name: name.into(), size: text.len() as u64, head: text.into(), start: 0, lfs: false, etag });
    };
    small("config.json", r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":4096}"#.into());
    small("generation_config.json", r#"{"do_sample":true}"#.into());
    small("tokenizer_config.json", r#"{"model_max_length":131072}"#.into());
    small("tokenizer.json", format!("{{\"version\":\"1.0\",\"pad\":\"{}\"}}", "t".repeat(1 << 20)));
    small("README.md", "# stub\n".into());
    small("model.safetensors.index.json", format!("{{\"metadata\":{{\"total_size\":{}}},\"weight_map\":{{{map}}}}}", shards * (mib << 20)));
    files
}

#[derive(Default)]
struct Stats {
    requests: AtomicU64,
    api: AtomicU64,
    head: AtomicU64,
    resolve: AtomicU64,
    cdn: AtomicU64,
    ranged: AtomicU64,
    conns: AtomicU64,
    bytes: AtomicU64,
    faults: AtomicU64,
    open: AtomicU64,
    max_open: AtomicU64,
}

struct Hub {
    pool: &'static [u8],
    files: Vec<File>,
    port: u16,
    rate: u64,
    latency: u64,
    ttl: u64,
    f503: u64,
    fdrop: u64,
    f403: u64,
    flen: u64,
    st: Stats,
    nth: AtomicU64,
    log: Mutex<Vec<String>>,
}

/// Bytes `at..end` of one file, paced if there is a rate; `cut` ends it with an error there.
struct Out {
    hub: Arc<Hub>,
    file: Option<usize>,
    text: Option<Bytes>,
    at: u64,
    end: u64,
    cut: Option<u64>,
    short: u64,
    t0: Instant,
    sent: u64,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Drop for Out {
    fn drop(&mut self) {
        if self.file.is_some() {
            self.hub.st.open.fetch_sub(1, Relaxed);
        }
    }
}

impl Body for Out {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        let me = self.get_mut();
        if let Some(t) = me.text.take() {
            return Poll::Ready((!t.is_empty()).then(|| Ok(Frame::data(t))));
        }
        let Some(f) = me.file else { return Poll::Ready(None) };
        if me.cut.is_some_and(|c| me.at >= c) || (me.short > 0 && me.at >= me.end) {
            return Poll::Ready(Some(Err(std::io::Error::other("fault"))));
        }
        if me.at >= me.end {
            return Poll::Ready(None);
        }
        if me.hub.rate > 0 {
            let due = me.t0 + Duration::from_secs_f64(me.sent as f64 / (me.hub.rate << 20) as f64);
            if Instant::now() < due {
                let s = me.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
                if s.deadline() != due {
                    s.as_mut().reset(due);
                }
                if s.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
            }
        }
        let stop = me.cut.unwrap_or(me.end).min(me.end);
        let b = me.hub.files[f].piece(me.hub.pool, me.at, STEP.min((stop - me.at) as usize));
        me.at += b.len() as u64;
        me.sent += b.len() as u64;
        me.hub.st.bytes.fetch_add(b.len() as u64, Relaxed);
        Poll::Ready(Some(Ok(Frame::data(b))))
    }

    fn size_hint(&self) -> SizeHint {
        match (&self.text, self.file) {
            (Some(t), _) => SizeHint::with_exact(t.len() as u64),
            (None, Some(_)) => SizeHint::with_exact(self.end - self.at + self.short),
            _ => SizeHint::with_exact(0),
        }
    }
}

fn text(hub: &Arc<Hub>, code: u16, ctype: &'static str, t: impl Into<Bytes>) -> Response<Out> {
    let out = Out { hub: hub.clone(), file: None, text: Some(t.into()), at: 0, end: 0, cut: None, short: 0, t0: Instant::now(), sent: 0, sleep: None };
    let mut r = Response::new(out);
    *r.status_mut() = StatusCode::from_u16(code).unwrap();
    r.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(ctype));
    r
}

fn put(h: &mut HeaderMap, k: &'static str, v: &str) {
    h.insert(HeaderName::from_static(k), HeaderValue::from_str(v).unwrap());
}

/// `bytes=A-B`, `bytes=A-` or `bytes=-N`; None: the whole file; Err: not satisfiable.
fn range(h: &HeaderMap, size: u64) -> Result<Option<(u64, u64)>, ()> {
    let Some(r) = h.get(header::RANGE).and_then(|v| v.to_str().ok()).and_then(|v| v.strip_prefix("bytes=")) else { return Ok(None) };
    let Some((a, b)) = r.split_once('-') else { return Ok(None) };
    let (from, to) = match (a.parse::<u64>(), b.parse::<u64>()) {
        (Ok(a), Ok(b)) => (a, (b + 1).min(size)),
        (Ok(a), _) => (a, size),
        (_, Ok(n)) => (size.saturating_sub(n), size),
        _ => return Ok(None),
    };
    if from >= to { Err(()) } else { Ok(Some((from, to))) }
}

fn file_reply(hub: &Arc<Hub>, req: &Request<Incoming>, k: usize) -> Response<Out> {
    let f = &hub.files[k];
    let r = range(req.headers(), f.size);
    let Ok(r) = r else {
        let mut e = text(hub, 416, "text/plain", "range");
        put(e.headers_mut(), "content-range", &format!("bytes */{}", f.size));
        return e;
    };
    let (from, to) = r.unwrap_or((0, f.size));
    let open = hub.st.open.fetch_add(1, Relaxed) + 1;
    hub.st.max_open.fetch_max(open, Relaxed);
    let out = Out { hub: hub.clone(), file: Some(k), text: None, at: from, end: to, cut: None, short: 0, t0: Instant::now(), sent: 0, sleep: None };
    let mut p = Response::new(out);
    if r.is_some() {
        hub.st.ranged.fetch_add(1, Relaxed);
        *p.status_mut() = StatusCode::PARTIAL_CONTENT;
        put(p.headers_mut(), "content-range", &format!("bytes {from}-{}/{}", to - 1, f.size));
    }
    put(p.headers_mut(), "content-length", &(to - from).to_string());
    put(p.headers_mut(), "accept-ranges", "bytes");
    put(p.headers_mut(), "etag", &format!("\"{}\"", f.etag));
    put(p.headers_mut(), "content-type", "application/octet-stream");
    p
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn siblings(hub: &Hub, blobs: bool, tree: bool) -> String {
    let list: Vec<String> = hub.files.iter().map(|f| {
        let lfs = if f.lfs && tree {
            format!(",\"lfs\":{{\"oid\":\"{}\",\"size\":{},\"pointerSize\":135}}", f.etag, f.size)
        } else if f.lfs {
            format!(",\"lfs\":{{\"sha256\":\"{}\",\"size\":{},\"pointerSize\":135}}", f.etag, f.size)
        } else {
            String::new()
        };
        let blob = &f.etag[..40];
        if tree {
            format!("{{\"type\":\"file\",\"oid\":\"{blob}\",\"size\":{},\"path\":\"{}\"{lfs}}}", f.size, f.name)
        } else if blobs {
            format!("{{\"rfilename\":\"{}\",\"size\":{},\"blobId\":\"{blob}\"{lfs}}}", f.name, f.size)
        } else {
            format!("{{\"rfilename\":\"{}\"}}", f.name)
        }
    }).collect();
    format!("[{}]", list.join(","))
}

async fn handle(req: Request<Incoming>, hub: Arc<Hub>) -> Result<Response<Out>, Infallible> {
    let st = &hub.st;
    let path = req.uri().path().to_string();
    let query = req.uri().query().unwrap_or("").to_string();
    if path.starts_with("/_") {
        return Ok(control(&hub, &path));
    }
    st.requests.fetch_add(1, Relaxed);
    {
        let mut l = hub.log.lock().unwrap();
        if l.len() < 400 {
            let rg = req.headers().get(header::RANGE).and_then(|v| v.to_str().ok()).unwrap_or("");
            l.push(format!("{} {path}?{query} {rg}", req.method()));
        }
    }
    if hub.latency > 0 {
        tokio::time::sleep(Duration::from_millis(hub.latency)).await;
    }
    let head = req.method() == Method::HEAD;
    if head {
        st.head.fetch_add(1, Relaxed);
    }
    if let Some(rest) = path.strip_prefix("/api/models/") {
        st.api.fetch_add(1, Relaxed);
        if rest.contains("/tree/") {
            return Ok(text(&hub, 200, "application/json", siblings(&hub, true, true)));
        }
        let id = rest.split("/revision/").next().unwrap_or(rest);
        let s = siblings(&hub, query.contains("blobs="), false);
        return Ok(text(&hub, 200, "application/json", format!(
            "{{\"_id\":\"1\",\"id\":\"{id}\",\"modelId\":\"{id}\",\"author\":\"stub\",\"sha\":\"{COMMIT}\",\"lastModified\":\"2026-01-01T00:00:00.000Z\",\"createdAt\":\"2026-01-01T00:00:00.000Z\",\"private\":false,\"gated\":false,\"disabled\":false,\"downloads\":1,\"likes\":0,\"tags\":[],\"library_name\":\"transformers\",\"siblings\":{s}}}"
        )));
    }
    if let Some(name) = path.strip_prefix("/cdn/") {
        let exp = query.split('&').find_map(|kv| kv.strip_prefix("exp=")).and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
        let Some(k) = hub.files.iter().position(|f| f.name == name) else { return Ok(text(&hub, 404, "text/plain", "no such file")) };
        if exp < now_s() {
            return Ok(text(&hub, 403, "application/xml", "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"));
        }
        if head {
            return Ok(file_reply(&hub, &req, k));
        }
        st.cdn.fetch_add(1, Relaxed);
        let n = hub.nth.fetch_add(1, Relaxed) + 1;
        let hit = |every: u64| every > 0 && n % every == 0;
        if hit(hub.f503) {
            st.faults.fetch_add(1, Relaxed);
            return Ok(text(&hub, 503, "text/plain", "slow down"));
        }
        if hit(hub.f403) {
            st.faults.fetch_add(1, Relaxed);
            return Ok(text(&hub, 403, "application/xml", "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"));
        }
        let mut r = file_reply(&hub, &req, k);
        if hit(hub.fdrop) {
            st.faults.fetch_add(1, Relaxed);
            let b = r.body_mut();
            b.cut = Some(b.at + (b.end - b.at) / 2);
        } else if hit(hub.flen) {
            st.faults.fetch_add(1, Relaxed);
            let b = r.body_mut();
            b.short = 1000;
            let n = b.end - b.at + b.short;
            put(r.headers_mut(), "content-length", &n.to_string());
        }
        return Ok(r);
    }
    let Some((_, rest)) = path.split_once("/resolve/") else { return Ok(text(&hub, 404, "text/plain", "not found")) };
    st.resolve.fetch_add(1, Relaxed);
    let name = rest.split_once('/').map_or("", |x| x.1);
    let Some(k) = hub.files.iter().position(|f| f.name == name) else {
        let mut r = text(&hub, 404, "text/plain", "Entry not found");
        put(r.headers_mut(), "x-error-code", "EntryNotFound");
        put(r.headers_mut(), "x-repo-commit", COMMIT);
        return Ok(r);
    };
    let f = &hub.files[k];
    let mut r = if f.lfs {
        let exp = now_s() + hub.ttl;
        let mut r = text(&hub, 302, "text/plain; charset=utf-8", "Found. Redirecting");
        let h = r.headers_mut();
        put(h, "location", &format!("http://127.0.0.1:{}/cdn/{}?exp={exp}&sig={}", hub.port + 1, f.name, &f.etag[..16]));
        put(h, "x-linked-etag", &format!("\"{}\"", f.etag));
        put(h, "x-linked-size", &f.size.to_string());
        put(h, "etag", &format!("\"{}\"", f.etag));
        r
    } else {
        file_reply(&hub, &req, k)
    };
    put(r.headers_mut(), "x-repo-commit", COMMIT);
    put(r.headers_mut(), "accept-ranges", "bytes");
    Ok(r)
}

fn control(hub: &Arc<Hub>, path: &str) -> Response<Out> {
    let s = &hub.st;
    let all = [
        ("requests", &s.requests), ("api", &s.api), ("head", &s.head), ("resolve", &s.resolve), ("cdn", &s.cdn),
        ("ranged", &s.ranged), ("connections", &s.conns), ("bytes", &s.bytes), ("faults", &s.faults), ("max_open", &s.max_open),
    ];
    let j = match path {
        "/_reset" => {
            for (_, a) in all {
                a.store(0, Relaxed);
            }
            hub.nth.store(0, Relaxed);
            hub.log.lock().unwrap().clear();
            "{}".to_string()
        }
        "/_files" => {
            let l: Vec<String> = hub.files.iter().map(|f| format!("{{\"name\":\"{}\",\"size\":{},\"sha256\":\"{}\",\"lfs\":{}}}", f.name, f.size, f.etag, f.lfs)).collect();
            format!("[{}]", l.join(","))
        }
        "/_log" => serde_json::to_string(&*hub.log.lock().unwrap()).unwrap(),
        _ => {
            let l: Vec<String> = all.iter().map(|(k, a)| format!("\"{k}\":{}", a.load(Relaxed))).collect();
            format!("{{{}}}", l.join(","))
        }
    };
    text(hub, 200, "application/json", j)
}

async fn serve(hub: Arc<Hub>, port: u16) {
    let sock = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    sock.set_reuse_address(true).unwrap();
    sock.set_nonblocking(true).unwrap();
    sock.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], port)).into()).expect("bind");
    sock.listen(1024).unwrap();
    let l = tokio::net::TcpListener::from_std(sock.into()).unwrap();
    loop {
        let Ok((s, _)) = l.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let _ = s.set_nodelay(true);
        let hub = hub.clone();
        hub.st.conns.fetch_add(1, Relaxed);
        tokio::spawn(async move {
            let svc = service_fn(move |r| handle(r, hub.clone()));
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(s), svc).await;
        });
    }
}

fn main() {
    let pool = pool(arg("--seed", 1));
    let hub = Arc::new(Hub {
        pool,
        files: build(pool, arg("--shards", 8), arg("--shard-mib", 512)),
        port: arg("--port", 9300) as u16,
        rate: arg("--rate-mib", 0),
        latency: arg("--latency-ms", 0),
        ttl: arg("--ttl-s", 3600),
        f503: arg("--f503", 0),
        fdrop: arg("--fdrop", 0),
        f403: arg("--f403", 0),
        flen: arg("--flen", 0),
        st: Stats::default(),
        nth: AtomicU64::new(0),
        log: Mutex::default(),
    });
    eprintln!("stub-hub on 127.0.0.1:{}, {} files", hub.port, hub.files.len());
    let threads = arg("--threads", 1) as usize;
    let rt = if threads <= 1 {
        tokio::runtime::Builder::new_current_thread().enable_all().build()
    } else {
        tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()
    };
    rt.unwrap().block_on(async {
        tokio::spawn(serve(hub.clone(), hub.port + 1));
        serve(hub.clone(), hub.port).await;
    });
}
