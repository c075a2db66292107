//! The server's certificate and key: read from their files and checked as a pair.
//!
//! A pair is used whole or not at all: what cannot be parsed, does not belong together or is past its
//! end under `listen.tls.strict` never reaches a listener. When to read them again is
//! [`super::renewal`]'s.

use std::fs::OpenOptions;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{InconsistentKeys, ServerConfig};
use x509_cert::certificate::{CertificateInner, Raw};
use x509_cert::der::Decode as _;

use crate::link::{Expired, TlsFiles};

/// What is spoken over TLS, the most wanted first.
pub const ALPN: &[&[u8]] = &[ALPN_HTTP2, b"http/1.1"];
pub const ALPN_HTTP2: &[u8] = b"h2";

/// Largest file of certificates: a chain has some KiB.
const MAX_FILE: u64 = 1 << 20;
/// Before a certificate's end by so much it is said each day.
const SOON: SignedDuration = SignedDuration::from_hours(7 * 24);

/// What is wrong with the files.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{what} {path} cannot be read: {source}")]
    Unreadable { what: Kind, path: PathBuf, source: std::io::Error },
    #[error("{what} {path} is no plain file of at most {MAX_FILE} bytes")]
    NoFile { what: Kind, path: PathBuf },
    #[error("{what} {path} is no PEM file: {why}")]
    Malformed { what: Kind, path: PathBuf, why: String },
    #[error("{what} {path} holds {missing}")]
    Empty { what: Kind, path: PathBuf, missing: &'static str },
    #[error("the key {key} does not belong to the first certificate of {cert}")]
    Mismatch { cert: PathBuf, key: PathBuf },
    #[error("the certificate {cert} with the key {key} cannot be used: {source}")]
    Unusable { cert: PathBuf, key: PathBuf, source: rustls::Error },
    #[error("the certificate {path} ended at {at}")]
    Expired { path: PathBuf, at: Timestamp },
}

impl TlsError {
    /// The key of the configuration that named the file.
    pub fn key(&self) -> &'static str {
        match self {
            Self::Unreadable { what, .. }
            | Self::NoFile { what, .. }
            | Self::Malformed { what, .. }
            | Self::Empty { what, .. } => match what {
                Kind::Certificate => "listen.tls.cert",
                Kind::Key => "listen.tls.key",
            },
            Self::Mismatch { .. } => "listen.tls.key",
            Self::Unusable { .. } | Self::Expired { .. } => "listen.tls.cert",
        }
    }
}

/// Which of the two files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Certificate,
    Key,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Certificate => "the certificate",
            Self::Key => "the key",
        })
    }
}

/// Who the server is: a certificate and its key, ready for handshakes.
#[derive(Debug)]
pub struct Identity {
    pub config: Arc<ServerConfig>,
    path: PathBuf,
    /// None: the certificate's dates cannot be read, though TLS itself takes it.
    dates: Option<Dates>,
    key_is_exposed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Dates {
    begin: Timestamp,
    end: Timestamp,
}

impl Identity {
    pub fn load(files: &TlsFiles, now: Timestamp) -> Result<Self, TlsError> {
        let (cert, _) = read(Kind::Certificate, &files.cert)?;
        let (key, mode) = read(Kind::Key, &files.key)?;
        let chain = chain(&files.cert, &cert)?;
        let key = private_key(&files.key, &key)?;
        let dates = chain.first().and_then(|leaf| dates(leaf));
        let unusable = |source| TlsError::Unusable { cert: files.cert.clone(), key: files.key.clone(), source };
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|error| match error {
                rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                    TlsError::Mismatch { cert: files.cert.clone(), key: files.key.clone() }
                }
                source => unusable(source),
            })?;
        config.alpn_protocols = ALPN.iter().map(|name| name.to_vec()).collect();
        // A client that comes back brings what is needed: nothing is kept here for it. Of this pair
        // alone: with another one every client sees the new certificate.
        config.ticketer = aws_lc_rs::Ticketer::new().map_err(unusable)?;
        let identity =
            Self { config: Arc::new(config), path: files.cert.clone(), dates, key_is_exposed: mode & 0o004 != 0 };
        match identity.dates {
            Some(Dates { end, .. }) if files.expired == Expired::Refused && end <= now => {
                Err(TlsError::Expired { path: files.cert.clone(), at: end })
            }
            _ => Ok(identity),
        }
    }

    /// The end of the certificate's time.
    pub fn not_after(&self) -> Option<Timestamp> {
        self.dates.map(|dates| dates.end)
    }

    pub fn has_expired(&self, now: Timestamp) -> bool {
        self.not_after().is_some_and(|end| end <= now)
    }

    /// What is not as it should be, though it works.
    pub fn warnings(&self, now: Timestamp) -> Vec<String> {
        let path = self.path.display();
        let mut warnings = Vec::new();
        if let Some(Dates { begin, end }) = self.dates {
            if end <= now {
                warnings.push(format!("the certificate {path} ended at {end}: clients refuse it"));
            } else if end.duration_since(now) <= SOON {
                warnings.push(format!("the certificate {path} ends at {end}: renew it"));
            } else if begin > now {
                warnings.push(format!("the certificate {path} begins only at {begin}: clients refuse it"));
            }
        }
        if self.key_is_exposed {
            warnings.push(format!("everybody on this machine can read the key of the certificate {path}"));
        }
        warnings
    }
}

/// The whole file and its mode; never waits on a FIFO or a device.
fn read(what: Kind, path: &Path) -> Result<(Vec<u8>, u32), TlsError> {
    let unreadable = |source| TlsError::Unreadable { what, path: path.to_owned(), source };
    let no_file = || TlsError::NoFile { what, path: path.to_owned() };
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return Err(no_file());
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok((bytes, metadata.mode()))
}

fn chain(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let chain = chain.map_err(|error| malformed(Kind::Certificate, path, &error))?;
    if chain.is_empty() {
        let missing = "no certificate (no `-----BEGIN CERTIFICATE-----`)";
        return Err(TlsError::Empty { what: Kind::Certificate, path: path.to_owned(), missing });
    }
    Ok(chain)
}

fn private_key(path: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| match error {
        PemError::NoItemsFound => {
            let locked = b"-----BEGIN ENCRYPTED PRIVATE KEY-----";
            let missing = if pem.windows(locked.len()).any(|window| window == locked) {
                "a key under a pass phrase, which nobody is there to type: give it without one"
            } else {
                "no key (no `-----BEGIN PRIVATE KEY-----`)"
            };
            TlsError::Empty { what: Kind::Key, path: path.to_owned(), missing }
        }
        error => malformed(Kind::Key, path, &error),
    })
}

/// Without a byte of what the file holds: it may be a key.
fn malformed(what: Kind, path: &Path, error: &PemError) -> TlsError {
    let why = match error {
        PemError::MissingSectionEnd { .. } => "it stops in the middle (no `-----END …-----` line)",
        PemError::IllegalSectionStart { .. } => "a `-----BEGIN` line is broken",
        PemError::Base64Decode(_) => "what stands between its lines is no base64",
        _ => "it cannot be understood",
    };
    TlsError::Malformed { what, path: path.to_owned(), why: why.to_owned() }
}

/// Read as loosely as TLS itself reads a certificate.
fn dates(leaf: &[u8]) -> Option<Dates> {
    let certificate = CertificateInner::<Raw>::from_der(leaf).ok()?;
    let validity = certificate.tbs_certificate().validity();
    let at = |time: x509_cert::time::Time| {
        Timestamp::from_second(i64::try_from(time.to_unix_duration().as_secs()).ok()?).ok()
    };
    Some(Dates { begin: at(validity.not_before)?, end: at(validity.not_after)? })
}
