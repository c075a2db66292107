//! One file's bytes out of the hub's content-addressed store (xet), a range of them in order, through the library's own
//! client: which chunks they are made of, fetching those in parallel and checking each is its part. What is put on top
//! is `transfer`'s, the same as for plain files: resuming, stalls, patience, the whole file's hash.

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use reqwest::Url;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use serde::Deserialize;
use tokio::sync::Mutex;
use xet::XetError;
use xet::xet_session::{XetConfig, XetDownloadStreamGroup, XetFileInfo, XetSessionBuilder};

use super::error::FetchError;
use super::hops::refuse_hop;
use super::hub::{ByteStream, Fault, Hub, Scope};
use super::settings::Settings;

/// A right to read is asked for anew when it ends this soon: xet would ask for itself, but not know our patience.
const SOON: Duration = Duration::from_mins(2);
/// Attempts of xet's own at one chunk; ours follow, where everybody's patience counts.
const ATTEMPTS: usize = 2;
/// Below this xet waits for itself: one block with its unpacked content.
const SMALLEST_MEMORY: u64 = 128 << 20;

/// The store as one repository sees it.
#[derive(Default)]
pub struct Xet {
    open: Mutex<Option<Open>>,
    given_up: AtomicBool,
}

struct Open {
    group: XetDownloadStreamGroup,
    /// Seconds since 1970, as the hub says it.
    until: u64,
}

/// The hub's answer to who wants to read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Right {
    access_token: String,
    exp: u64,
    cas_url: String,
}

impl std::fmt::Debug for Xet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Xet(…)")
    }
}

impl Xet {
    /// Whether files are to be had from the store; by plain HTTP the hub gives the same bytes.
    pub fn is_of_use(&self) -> bool {
        !self.given_up.load(Relaxed)
    }

    /// The store gave nothing: for the rest of this fetch its files come by plain HTTP.
    pub fn give_up(&self, repo: &str, why: &str) {
        if !self.given_up.swap(true, Relaxed) {
            tracing::warn!(%repo, %why, "the hub's xet store gives nothing: fetching by plain HTTP");
        }
    }

    /// These bytes of the file that the store knows as `hash`.
    pub async fn open(
        &self,
        hub: &Hub,
        repo: &str,
        commit: &str,
        hash: &str,
        size: u64,
        range: Range<u64>,
    ) -> Result<ByteStream, Fault> {
        let group = self.group(hub, repo, commit).await?;
        let file = XetFileInfo::new(hash.to_owned(), size);
        let opened = hub.in_time(group.download_stream(file, Some(range))).await?;
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => {
                // A right that is refused, a group that an error closed: begin with a new one.
                *self.open.lock().await = None;
                return Err(fault(&error));
            }
        };
        let chunks = stream::try_unfold(opened, |mut opened| async move {
            let chunk: Option<Bytes> = opened.next().await.map_err(|error| fault(&error))?;
            Ok(chunk.map(|chunk| (chunk, opened)))
        });
        Ok(Box::pin(chunks))
    }

    async fn group(&self, hub: &Hub, repo: &str, commit: &str) -> Result<XetDownloadStreamGroup, Fault> {
        let mut open = self.open.lock().await;
        if let Some(open) = open.as_ref().filter(|open| {
            u64::try_from(jiff::Timestamp::now().as_second()).is_ok_and(|now| open.until > now + SOON.as_secs())
        }) {
            return Ok(open.group.clone());
        }
        let (url, right) = right(hub, repo, commit).await?;
        let mut headers = HeaderMap::new();
        if let Some(token) = &hub.settings.token {
            let bearer = HeaderValue::from_str(&format!("Bearer {}", token.expose()));
            let mut bearer = bearer.map_err(|_| Fault::again("the token is no header's value"))?;
            bearer.set_sensitive(true);
            headers.insert(AUTHORIZATION, bearer);
        }
        // It makes folders, even to read; below its own cache's root, since a home may be none or read-only.
        let folder = hub.settings.cache.join(".locks/.sglangd-xet");
        let builder = XetSessionBuilder::new_with_config(config(&hub.settings)).with_cache_dir(folder);
        let session = builder.build().map_err(|error| fault(&error))?;
        let group = session
            .new_download_stream_group()
            .map_err(|error| fault(&error))?
            .with_endpoint(right.cas_url.trim_end_matches('/').to_owned())
            .with_token_info(right.access_token, right.exp)
            .with_token_refresh_url(url.as_str(), headers);
        let group = hub.in_time(group.build()).await?.map_err(|error| fault(&error))?;
        *open = Some(Open { group: group.clone(), until: right.exp });
        Ok(group)
    }
}

/// Asks the hub for the store's address and the right to read there.
async fn right(hub: &Hub, repo: &str, commit: &str) -> Result<(Url, Right), Fault> {
    let address = format!("{}/api/models/{repo}/xet-read-token/{commit}", hub.settings.endpoint);
    let url: Url = address.parse().map_err(|_| Fault::again(format!("{address} is no URL")))?;
    let mut request = hub.http(&url)?.get(url.clone());
    if let Some(token) = &hub.settings.token {
        request = request.bearer_auth(token.expose());
    }
    let answer = hub.in_time(request.send()).await?.map_err(|error| hub.transport(&error))?;
    if !answer.status().is_success() {
        return Err(hub.refuses(repo, commit, &answer));
    }
    let right: Right = hub.in_time(answer.json()).await?.map_err(|error| hub.transport(&error))?;
    let store: Url = right.cas_url.parse().map_err(|_| Fault::again(format!("{} is no URL", right.cas_url)))?;
    // The store gets a right of its own and never the hub's token; but the file's bytes come from there.
    if let Some(why) = refuse_hop(Some(&hub.endpoint), &store, 1, hub.is_local()) {
        return Err(Fault::Fatal(FetchError::Redirect { url: address, why }));
    }
    Ok((url, right))
}

fn config(settings: &Settings) -> XetConfig {
    let mut config = XetConfig::new();
    // A copy of the chunks on the disk would be the whole model once more.
    config.chunk_cache.size_bytes = 0;
    config.telemetry.enabled = false;
    config.client.read_timeout = settings.patience.stall;
    config.client.connect_timeout = settings.patience.stall;
    config.client.retry_max_attempts = ATTEMPTS;
    config.client.retry_base_delay = settings.patience.backoff;
    if let Some(memory) = settings.xet_memory {
        let memory = memory.max(SMALLEST_MEMORY);
        let buffers = &mut config.reconstruction;
        buffers.download_buffer_size = memory.into();
        buffers.download_buffer_limit = memory.into();
        buffers.min_prefetch_buffer = (memory / 2).into();
        buffers.min_reconstruction_fetch_size = (memory / 4).min(*buffers.min_reconstruction_fetch_size).into();
        buffers.max_reconstruction_fetch_size = (memory / 2).into();
    }
    config
}

fn fault(error: &XetError) -> Fault {
    let scope = match error {
        XetError::RateLimited(_) | XetError::ServerError(_) => Scope::Hub,
        _ => Scope::Stream,
    };
    Fault::Again { cause: format!("xet: {error}"), after: None, scope }
}
