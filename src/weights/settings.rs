//! Where the cache is, which hub, which token, how patient: the standard variables of the Hugging Face
//! tools, resolved once. Reads no environment itself: the caller passes a function.

use std::fmt;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::FetchError;
use super::{Access, PageCache, Request};
use crate::config::Download;

/// The public hub.
const PUBLIC_HUB: &str = "https://huggingface.co";
/// Connections at once. huggingface_hub and hf-hub take 8 as well; more gains nothing over one link and
/// each costs an open file, a lock and two buffers.
pub const CONNECTIONS: usize = 8;
/// A token file larger than this is no token file.
const LARGEST_TOKEN_FILE: u64 = 4096;

/// Everything a fetch needs to know beside the [`Request`].
#[derive(Debug, Clone)]
pub struct Settings {
    /// The folder that holds `models--owner--name`.
    pub cache: PathBuf,
    /// Without a slash at its end.
    pub endpoint: String,
    pub token: Option<Token>,
    pub network: Network,
    pub patience: Patience,
    pub connections: usize,
    /// Bytes a second, of all connections together.
    pub max_rate: Option<NonZeroU64>,
    /// Most memory of xet's buffers; none: a share of the machine's, as xet takes it.
    pub xet_memory: Option<u64>,
    pub page_cache: PageCache,
    /// Free bytes of the cache's disk; none: the disk is asked.
    pub free_space: Option<u64>,
    /// Whether the cache may be written to; none: it is asked.
    pub access: Option<Access>,
}

/// A secret of the hub. Shown by nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Whether the hub may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    Allowed,
    /// Never a connection, for this reason.
    Offline(&'static str),
}

/// How long a misbehaving hub is borne.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// No byte on a connection for this long: it is opened anew.
    pub stall: Duration,
    /// Attempts at one file, or one request, without a single byte gained.
    pub attempts: u32,
    /// Nothing gained by anything for this long: given up, whatever the attempts.
    pub limit: Duration,
    /// First wait between attempts; doubles, with jitter, up to `backoff_max`.
    pub backoff: Duration,
    pub backoff_max: Duration,
    /// Whole files that arrive with the wrong hash before it is called corrupt.
    pub corrupt: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            stall: Duration::from_secs(30),
            attempts: 10,
            limit: Duration::from_mins(10),
            backoff: Duration::from_millis(500),
            backoff_max: Duration::from_secs(30),
            corrupt: 3,
        }
    }
}

impl Settings {
    /// Resolves what the request leaves open from the variables that `env` looks up.
    pub fn resolve(request: &Request, env: impl Fn(&str) -> Option<String>) -> Result<Self, FetchError> {
        let set = |name: &str| env(name).filter(|value| !value.is_empty());
        let endpoint = request.endpoint.clone().or_else(|| set("HF_ENDPOINT")).unwrap_or_else(|| PUBLIC_HUB.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !matches!(endpoint.parse::<reqwest::Url>(), Ok(url) if matches!(url.scheme(), "http" | "https")) {
            return Err(FetchError::BadRequest {
                what: "the hub's address",
                value: endpoint,
                why: "is no http or https URL: correct weights.endpoint or HF_ENDPOINT",
            });
        }
        let network = match request.download {
            Download::Never => Network::Offline("weights.download is never"),
            Download::Auto if set("HF_HUB_OFFLINE").is_some_and(|v| yes(&v)) => {
                Network::Offline("HF_HUB_OFFLINE is set")
            }
            Download::Auto if set("TRANSFORMERS_OFFLINE").is_some_and(|v| yes(&v)) => {
                Network::Offline("TRANSFORMERS_OFFLINE is set")
            }
            Download::Auto => Network::Allowed,
        };
        let home = |path: String| match (path.strip_prefix("~/"), set("HOME")) {
            (Some(rest), Some(home)) => Path::new(&home).join(rest),
            _ => PathBuf::from(path),
        };
        let hf_home = set("HF_HOME")
            .map(home)
            .or_else(|| set("XDG_CACHE_HOME").map(|dir| home(dir).join("huggingface")))
            .unwrap_or_else(|| home("~/.cache/huggingface".to_owned()));
        let cache = request
            .cache
            .clone()
            .or_else(|| set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")).map(home))
            .unwrap_or_else(|| hf_home.join("hub"));
        Ok(Self {
            cache,
            endpoint,
            token: token(&set, &home, &hf_home)?,
            network,
            patience: Patience::default(),
            connections: request.tuning.connections.map_or(CONNECTIONS, |n| n.get().into()),
            max_rate: request.tuning.max_rate,
            xet_memory: request.tuning.xet_memory,
            page_cache: request.tuning.page_cache,
            free_space: None,
            access: None,
        })
    }
}

/// `HF_TOKEN`, else the file of `HF_TOKEN_PATH`, else `HF_HOME/token`. A file that is named but cannot be
/// read is an error: going on without it would end in "gated", which sends people the wrong way.
fn token(
    set: &impl Fn(&str) -> Option<String>,
    home: &impl Fn(String) -> PathBuf,
    hf_home: &Path,
) -> Result<Option<Token>, FetchError> {
    let clean = |text: &str| Some(text.trim().to_owned()).filter(|t| !t.is_empty()).map(Token);
    if let Some(token) = set("HF_TOKEN").or_else(|| set("HUGGING_FACE_HUB_TOKEN")).as_deref().and_then(clean) {
        return Ok(Some(token));
    }
    if set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|v| yes(&v)) {
        return Ok(None);
    }
    let named = set("HF_TOKEN_PATH").map(home);
    let path = named.clone().unwrap_or_else(|| hf_home.join("token"));
    let read = || -> std::io::Result<String> {
        if std::fs::metadata(&path)?.len() > LARGEST_TOKEN_FILE {
            return Err(std::io::Error::other("too large for a token file"));
        }
        std::fs::read_to_string(&path)
    };
    match (read(), named) {
        (Ok(text), _) => Ok(clean(&text)),
        (Err(source), Some(path)) => Err(FetchError::Disk { path, source }),
        (Err(_), None) => Ok(None),
    }
}

/// What huggingface_hub takes for true.
fn yes(value: &str) -> bool {
    matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{Proof, RepoRequest, Tuning};

    fn resolve(request: &Request, vars: &[(&str, &str)]) -> Settings {
        Settings::resolve(request, |name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())).unwrap()
    }

    fn request() -> Request {
        let repos = vec![RepoRequest::model("a/b", "main")];
        Request {
            repos,
            cache: None,
            endpoint: None,
            download: Download::Auto,
            proof: Proof::default(),
            tuning: Tuning::default(),
        }
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_would_put_it() {
        let at = |vars: &[(&str, &str)]| resolve(&request(), vars).cache;
        assert_eq!(at(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(at(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(at(&[("HF_HOME", "/hf"), ("XDG_CACHE_HOME", "/x")]), Path::new("/hf/hub"));
        assert_eq!(at(&[("HF_HOME", "~/hf"), ("HOME", "/h")]), Path::new("/h/hf/hub"));
        assert_eq!(at(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/hf")]), Path::new("/c"));
        let named = Request { cache: Some("/named".into()), ..request() };
        assert_eq!(resolve(&named, &[("HF_HUB_CACHE", "/c")]).cache, Path::new("/named"));
    }

    #[test]
    fn the_token_comes_from_the_variable_or_the_file_and_is_never_shown() {
        let settings = resolve(&request(), &[("HF_TOKEN", " hf_secret\n")]);
        assert_eq!(settings.token.as_ref().map(Token::expose), Some("hf_secret"));
        assert!(!format!("{settings:?}").contains("hf_secret"));

        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        let home = dir.path().to_str().unwrap();
        let settings = resolve(&request(), &[("HF_HOME", home)]);
        assert_eq!(settings.token.as_ref().map(Token::expose), Some("hf_file"));
        let without = resolve(&request(), &[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]);
        assert_eq!(without.token, None);
    }

    #[test]
    fn a_token_file_that_is_named_and_missing_is_an_error() {
        let lookup = |name: &str| (name == "HF_TOKEN_PATH").then(|| "/nowhere/token".to_owned());
        assert_eq!(Settings::resolve(&request(), lookup).unwrap_err().name(), "disk");
    }

    #[test]
    fn offline_is_what_huggingface_hub_calls_offline() {
        assert_eq!(resolve(&request(), &[("HF_HUB_OFFLINE", "0")]).network, Network::Allowed);
        assert!(matches!(resolve(&request(), &[("HF_HUB_OFFLINE", "true")]).network, Network::Offline(_)));
        let never = Request { download: Download::Never, ..request() };
        assert!(matches!(resolve(&never, &[]).network, Network::Offline(_)));
    }

    #[test]
    fn an_endpoint_that_is_no_url_is_refused_by_name() {
        let bad = Request { endpoint: Some("file:///etc".into()), ..request() };
        assert_eq!(Settings::resolve(&bad, |_| None).unwrap_err().name(), "bad-request");
    }
}
