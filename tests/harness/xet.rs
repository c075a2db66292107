//! A content-addressed store on this machine (the library's own simulation of it), behind a pipe that can be slow, cut or
//! stalled; and a hub that hands it out.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sglangd::simulate::hub::{Options, XetStore};
use sglangd::simulate::model::ModelFile;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use xet::xet_session::{Sha256Policy, XetSessionBuilder};
use xet_client::cas_client::{LocalTestServer, LocalTestServerBuilder};

use super::hub::{Site, text_file};

/// What the pipe does to the answers.
#[derive(Debug, Default)]
pub struct Pipe {
    /// Bytes that came through to clients.
    pub carried: AtomicU64,
    /// Bytes a second of each connection; zero: as fast as it goes.
    pub rate: AtomicU64,
    /// So many connections are cut, each after this many bytes of answers.
    pub to_cut: AtomicU64,
    /// So many connections stand still for ever after this many bytes of answers.
    pub to_stall: AtomicU64,
    pub after: AtomicU64,
}

pub struct Store {
    server: LocalTestServer,
    pub pipe: Arc<Pipe>,
    addr: SocketAddr,
    accepting: AbortHandle,
}

impl Drop for Store {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// A hub whose one shard lies in a store.
pub struct XetSite {
    pub site: Site,
    pub store: Store,
    pub files: Vec<ModelFile>,
}

impl XetSite {
    pub async fn with(bytes: u64) -> Self {
        let shard = ModelFile::bytes("model.safetensors", sglangd::simulate::model::Storage::Lfs, noise(bytes));
        let files = vec![text_file("config.json", "{}"), shard.clone()];
        let store = Store::new().await;
        let hash = store.put(shard.piece(0, usize::try_from(bytes).unwrap()).unwrap().to_vec()).await;
        let xet =
            XetStore { url: format!("http://{}", store.addr), files: BTreeMap::from([(shard.name.clone(), hash)]) };
        let site = Site::with(files.clone(), Options { xet: Some(xet), ..Options::default() }).await;
        Self { site, store, files }
    }

    pub fn carried(&self) -> u64 {
        self.store.pipe.carried.load(Ordering::Relaxed)
    }
}

/// Bytes that neither compress nor repeat: each has to come.
fn noise(bytes: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut all = Vec::with_capacity(usize::try_from(bytes).unwrap() + 8);
    while (all.len() as u64) < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        all.extend_from_slice(&state.to_le_bytes());
    }
    all.truncate(usize::try_from(bytes).unwrap());
    all
}

impl Store {
    /// Takes no connection any more and ends those that are open.
    pub fn die(&self) {
        self.accepting.abort();
    }

    async fn new() -> Self {
        let server = LocalTestServerBuilder::new().start().await;
        let to: SocketAddr = server.http_endpoint().trim_start_matches("http://").parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let pipe = Arc::new(Pipe::default());
        let accepting = tokio::spawn(accept(listener, to, pipe.clone())).abort_handle();
        Self { server, pipe, addr, accepting }
    }

    /// Stores a file and says what it is called there.
    async fn put(&self, bytes: Vec<u8>) -> String {
        let dir = tempfile::tempdir().unwrap();
        let session = XetSessionBuilder::new().with_cache_dir(dir.path()).build().unwrap();
        let commit =
            session.new_upload_commit().unwrap().with_endpoint(self.server.http_endpoint()).build().await.unwrap();
        commit.upload_bytes(bytes, Sha256Policy::Compute, Some("shard".into())).await.unwrap();
        let report = commit.commit().await.unwrap();
        let uploaded = report.uploads.into_values().next().unwrap();
        uploaded.xet_info.hash().to_owned()
    }
}

async fn accept(listener: TcpListener, to: SocketAddr, pipe: Arc<Pipe>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                connections.spawn(carry(client, to, pipe.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn carry(mut client: TcpStream, to: SocketAddr, pipe: Arc<Pipe>) {
    let Ok(mut server) = TcpStream::connect(to).await else { return };
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let answers = async {
        let mut buffer = vec![0; 64 << 10];
        let mut sent = 0;
        loop {
            let Ok(n @ 1..) = from_server.read(&mut buffer).await else { return };
            let due = sent >= pipe.after.load(Ordering::Relaxed).max(1);
            let spend = |left: &AtomicU64| {
                due && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
            };
            if spend(&pipe.to_cut) {
                return;
            }
            if spend(&pipe.to_stall) {
                std::future::pending::<()>().await;
            }
            if to_client.write_all(&buffer[..n]).await.is_err() {
                return;
            }
            sent += n as u64;
            pipe.carried.fetch_add(n as u64, Ordering::Relaxed);
            let rate = pipe.rate.load(Ordering::Relaxed);
            if rate > 0 {
                tokio::time::sleep(Duration::from_secs_f64(n as f64 / rate as f64)).await;
            }
        }
    };
    let asked = async {
        // Either side's end is the connection's.
        let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
    };
    tokio::select! { () = answers => {}, () = asked => {} }
}
