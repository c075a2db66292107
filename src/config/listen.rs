//! The `listen` section: addresses, the Unix socket, TLS, and values of it that exclude each other.

use std::net::SocketAddr;

use super::Listen;
use super::build::Builder;
use super::error::Mistake;
use super::source::SourceKind;
use crate::link::{Expired, Http2, ProxyProtocol, TlsFiles};

impl Builder<'_> {
    pub(super) fn listen(&mut self) -> Listen {
        Listen {
            public: self.public(),
            unix: self.path("listen.unix"),
            unix_mode: self.mode("listen.unix_mode"),
            proxy_protocol: self
                .choice("listen.proxy_protocol", &[("off", ProxyProtocol::Off), ("require", ProxyProtocol::Require)]),
            admin: self.address("listen.admin"),
            http2: self.choice("listen.http2", &[("on", Http2::On), ("off", Http2::Off)]),
            tls: self.tls(),
        }
    }

    fn address(&mut self, path: &'static str) -> SocketAddr {
        let port_zero = self.port_zero(path);
        self.value(path, |text| address(text, port_zero))
    }

    /// Port 0 (the kernel chooses) is of use to who reads the answer at once, never in a file.
    fn port_zero(&self, path: &'static str) -> PortZero {
        match self.last(path) {
            Some(said) if said.node.place().source.kind == SourceKind::CommandLine => PortZero::Taken,
            _ => PortZero::Refused,
        }
    }

    fn public(&mut self) -> Option<SocketAddr> {
        let port_zero = self.port_zero("listen.public");
        let public = self.value("listen.public", |text| match text {
            "off" => Ok(None),
            _ => address(text, port_zero).map(Some),
        });
        if public.is_none() && self.last("listen.unix").is_none_or(|said| said.node.is_null()) {
            let mut mistake = Mistake::new(
                "`listen.public` is `off` and there is no `listen.unix`: no client could connect",
                "write ADDRESS:PORT, or name a Unix socket",
            );
            if let Some(place) = self.value_place("listen.public") {
                mistake = mistake.at(&place, "off");
            }
            self.mistakes.push(mistake);
        }
        public
    }

    fn mode(&mut self, path: &'static str) -> u32 {
        self.value(path, |text| {
            let octal = (3..=4).contains(&text.len()) && text.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
            let mode = u32::from_str_radix(text, 8).ok().filter(|mode| octal && *mode <= 0o777);
            mode.ok_or_else(|| "a mode of three octal digits, like 0660".to_owned())
        })
    }

    fn tls(&mut self) -> Option<TlsFiles> {
        let expired = self.choice("listen.tls.strict", &[("true", Expired::Refused), ("false", Expired::Warned)]);
        let files = (self.path("listen.tls.cert"), self.path("listen.tls.key"));
        match files {
            (Some(cert), Some(key)) => Some(TlsFiles { cert, key, expired }),
            (None, None) => None,
            (cert, _) => {
                let (said, missing) = match cert {
                    Some(_) => ("listen.tls.cert", "listen.tls.key"),
                    None => ("listen.tls.key", "listen.tls.cert"),
                };
                let mut mistake = Mistake::new(
                    format!("`{said}` stands without `{missing}`"),
                    "TLS needs both: the certificate and its private key, as PEM files",
                );
                if let Some(place) = self.value_place(said) {
                    mistake = mistake.at(&place, "only this one");
                }
                self.mistakes.push(mistake);
                None
            }
        }
    }
}

/// Whether the kernel may choose the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PortZero {
    Taken,
    Refused,
}

fn address(text: &str, zero: PortZero) -> Result<SocketAddr, String> {
    let address = text.parse::<SocketAddr>().map_err(|_| match text.rsplit_once(':') {
        Some((_, port)) if port.parse::<u64>().is_ok_and(|port| port > 65_535) => {
            "ADDRESS:PORT with a port from 1 to 65535".to_owned()
        }
        Some((host, port)) if port.parse::<u16>().is_ok() && !host.starts_with('[') => {
            "an IP address and a port: names are not looked up, 0.0.0.0 means every IPv4 address".to_owned()
        }
        _ => "ADDRESS:PORT, like 0.0.0.0:8000 or [::]:8000".to_owned(),
    })?;
    if address.port() == 0 && zero == PortZero::Refused {
        return Err("ADDRESS:PORT with a port from 1 to 65535".to_owned());
    }
    Ok(address)
}
