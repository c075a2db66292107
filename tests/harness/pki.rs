//! Certificates made for one test, and clients that look at whichever they are shown.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use rcgen::{CertificateParams, KeyPair, date_time_ymd};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use sglangd::link::{Expired, TlsFiles};

/// A certificate and its key, in PEM and DER.
#[derive(Debug, Clone)]
pub struct Pair {
    pub cert: String,
    pub key: String,
    pub der: Vec<u8>,
}

impl Pair {
    /// Good for long.
    pub fn new() -> Self {
        Self::made(&CertificateParams::new(["sglangd".to_owned()]).unwrap())
    }

    /// Its time ends (or ended) so long from now.
    pub fn ending(from_now: SignedDuration) -> Self {
        let mut params = CertificateParams::new(["sglangd".to_owned()]).unwrap();
        let end = (Timestamp::now() + from_now).as_second();
        params.not_before = date_time_ymd(2000, 1, 1);
        // rcgen has its own type of time: moved from a date that it can make.
        let epoch = date_time_ymd(1970, 1, 1);
        params.not_after = epoch + std::time::Duration::from_secs(u64::try_from(end).unwrap());
        Self::made(&params)
    }

    /// Its time begins so long from now; the name is one that a client can ask for on this machine.
    pub fn beginning(from_now: SignedDuration) -> Self {
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        let begin = (Timestamp::now() + from_now).as_second();
        params.not_before = date_time_ymd(1970, 1, 1) + std::time::Duration::from_secs(u64::try_from(begin).unwrap());
        params.not_after = date_time_ymd(2100, 1, 1);
        Self::made(&params)
    }

    fn made(params: &CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let cert = params.self_signed(&key).unwrap();
        Self { cert: cert.pem(), key: key.serialize_pem(), der: cert.der().to_vec() }
    }
}

/// Where a server finds its pair.
#[derive(Debug)]
pub struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    pub fn with(pair: &Pair) -> Self {
        let folder = Self { folder: tempfile::tempdir().unwrap() };
        folder.put(pair);
        folder
    }

    pub fn cert(&self) -> PathBuf {
        self.folder.path().join("tls.crt")
    }

    pub fn key(&self) -> PathBuf {
        self.folder.path().join("tls.key")
    }

    pub fn files(&self) -> TlsFiles {
        TlsFiles { cert: self.cert(), key: self.key(), expired: Expired::Warned }
    }

    pub fn put(&self, pair: &Pair) {
        replace(&self.cert(), &pair.cert);
        replace(&self.key(), &pair.key);
    }
}

/// As a careful operator does it: the new file takes the old one's name at once.
pub fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(new, path).unwrap();
}

/// Takes any certificate: what is shown is what is tested.
#[derive(Debug)]
struct Any(Arc<CryptoProvider>);

impl ServerCertVerifier for Any {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A client that names these protocols (ALPN).
pub fn client(protocols: &[&str]) -> Arc<ClientConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Any(provider)))
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}
