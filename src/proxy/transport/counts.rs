//! Counts of what happens to connections before HTTP: rare enough to be shared by all workers.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::seldom::Seldom;

/// Why a connection ended before a request of it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turned {
    /// No whole handshake in time.
    HandshakeSlow,
    /// TLS itself failed, or the client left in the middle of it.
    HandshakeFailed,
    /// The oldest of too many handshakes at once.
    HandshakeCrowded,
    /// Plain HTTP where TLS is spoken.
    PlainToTls,
    /// TLS where plain HTTP is spoken.
    TlsToPlain,
    /// No header of the PROXY protocol, or a bad one, where it is asked for.
    ProxyHeader,
    /// TLS is asked for, and there is no certificate that could be used.
    NoCertificate,
    /// As many connections are open as may, and none of them is idle.
    Crowded,
    /// As many connections of its address are open as may.
    PeerCrowded,
    /// There was no descriptor for it but the one that is held back.
    NoDescriptor,
}

impl Turned {
    /// What an operator must see; none: it happens, and the count is enough.
    fn complaint(self) -> Option<&'static str> {
        match self {
            Self::PlainToTls => Some("a client speaks plain HTTP to the TLS port: it needs https://"),
            Self::TlsToPlain => Some("a client speaks TLS to the plain port: it needs http://"),
            Self::NoCertificate => Some("there is no certificate that can be used: TLS connections are closed"),
            Self::ProxyHeader => Some(
                "a connection does not begin with a good header of the PROXY protocol, version 2: \
                 listen.proxy_protocol asks for one",
            ),
            Self::HandshakeCrowded => Some("too many TLS handshakes at once: the oldest are closed"),
            Self::Crowded => Some("as many connections are open as may (limits.connections): new ones get a 503"),
            Self::NoDescriptor => {
                Some("there are no descriptors for new connections: they get a 503; raise the limit of open files")
            }
            Self::HandshakeSlow | Self::HandshakeFailed | Self::PeerCrowded => None,
        }
    }
}

const TURNED: [(Turned, &str); 10] = [
    (Turned::HandshakeSlow, "handshake_timeout"),
    (Turned::HandshakeFailed, "handshake_failed"),
    (Turned::HandshakeCrowded, "handshake_crowded"),
    (Turned::PlainToTls, "plain_to_tls"),
    (Turned::TlsToPlain, "tls_to_plain"),
    (Turned::ProxyHeader, "proxy_header"),
    (Turned::NoCertificate, "no_certificate"),
    (Turned::Crowded, "crowded"),
    (Turned::PeerCrowded, "peer_crowded"),
    (Turned::NoDescriptor, "no_descriptor"),
];

#[derive(Debug, Default)]
pub struct Counts {
    turned: [(AtomicU64, Seldom); TURNED.len()],
    /// Idle ones that were closed to make room.
    pub let_go: AtomicU64,
    /// What `accept` complains of.
    pub unaccepted: Seldom,
    pub handshakes: AtomicU64,
    pub certificates_read: AtomicU64,
    pub certificates_refused: AtomicU64,
}

impl Counts {
    pub fn turn_away(&self, why: Turned, client: Option<IpAddr>) {
        let (count, seldom) = &self.turned[why as usize];
        count.fetch_add(1, Relaxed);
        if let Some(text) = why.complaint() {
            seldom.say(|more| tracing::warn!(?client, more, "{text}"));
        } else {
            tracing::debug!(?client, ?why, "a connection ended before HTTP");
        }
    }

    /// Lines for the metrics page, in Prometheus' text format.
    pub fn write(&self, not_after: Option<i64>, out: &mut String) {
        let begin = |name: &str, kind: &str, help: &str| {
            format!("# HELP sglangd_{name} {help}\n# TYPE sglangd_{name} {kind}\n")
        };
        let name = "connections_turned_away_total";
        out.push_str(&begin(name, "counter", "Connections ended before their first request, by reason."));
        for (why, label) in TURNED {
            // Writing into a String does not fail.
            let _ = writeln!(out, "sglangd_{name}{{reason=\"{label}\"}} {}", self.turned[why as usize].0.load(Relaxed));
        }
        let name = "connections_let_go_total";
        out.push_str(&begin(name, "counter", "Idle connections closed, the oldest first, to make room for new ones."));
        let _ = writeln!(out, "sglangd_{name} {}", self.let_go.load(Relaxed));
        let name = "tls_handshakes_total";
        out.push_str(&begin(name, "counter", "TLS handshakes that came to their end."));
        let _ = writeln!(out, "sglangd_{name} {}", self.handshakes.load(Relaxed));
        let name = "tls_certificate_reads_total";
        out.push_str(&begin(name, "counter", "Readings of the certificate's files; refused: the old one stayed."));
        for (label, count) in [("used", &self.certificates_read), ("refused", &self.certificates_refused)] {
            let _ = writeln!(out, "sglangd_{name}{{outcome=\"{label}\"}} {}", count.load(Relaxed));
        }
        if let Some(at) = not_after {
            let name = "tls_not_after_seconds";
            out.push_str(&begin(name, "gauge", "End of the certificate in use, in seconds since 1970."));
            let _ = writeln!(out, "sglangd_{name} {at}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_line_of_its_own() {
        let counts = Counts::default();
        for (at, (why, _)) in TURNED.into_iter().enumerate() {
            assert_eq!(why as usize, at, "the table is in the order of the variants");
        }
        counts.turn_away(Turned::PlainToTls, None);
        let mut page = String::new();
        counts.write(Some(7), &mut page);
        assert!(page.contains("sglangd_connections_turned_away_total{reason=\"plain_to_tls\"} 1\n"), "{page}");
        assert!(page.contains("sglangd_connections_turned_away_total{reason=\"handshake_timeout\"} 0\n"), "{page}");
        assert!(page.contains("sglangd_tls_not_after_seconds 7\n"), "{page}");
    }
}
