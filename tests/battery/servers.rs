//! The three proxies, each with the configuration that its manual recommends before an engine that
//! streams: no buffering, keep-alive behind it, the same allow-list, time-outs and limits.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::harness::alone::Process;
use crate::harness::daemon::free_address;
use crate::harness::front::eventually;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    Sglangd,
    Nginx,
    Haproxy,
}

/// One that runs, and ends with the test.
pub struct Running {
    pub addr: SocketAddr,
    _process: Owned,
    _folder: TempDir,
}

#[allow(dead_code)] // held for what they do when they are dropped
enum Owned {
    Ours(Process),
    Theirs(Process),
}

impl Server {
    pub fn name(self) -> &'static str {
        match self {
            Self::Sglangd => "sglangd",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
        }
    }

    pub fn version(self) -> String {
        let (program, flag) = match self {
            Self::Sglangd => return format!("sglangd {}", env!("CARGO_PKG_VERSION")),
            Self::Nginx => ("nginx", "-v"),
            Self::Haproxy => ("haproxy", "-v"),
        };
        let output = Command::new(program).arg(flag).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        let number = said.split([' ', '/']).find(|word| word.starts_with(|c: char| c.is_ascii_digit())).unwrap_or("?");
        format!("{} {}", self.name(), number.trim())
    }

    pub fn start(self, engine: SocketAddr) -> Running {
        let folder = tempfile::tempdir().unwrap();
        if self == Self::Sglangd {
            let (process, addr) = Process::alone(engine, &["--set", "limits.workers=1", "--set", "limits.max=64"]);
            return Running { addr, _process: Owned::Ours(process), _folder: folder };
        }
        let addr = free_address();
        let file = folder.path().join("conf");
        let mut command = Command::new(self.name());
        if self == Self::Nginx {
            fs::write(&file, nginx(folder.path().to_str().unwrap(), addr, engine)).unwrap();
            command.arg("-c").arg(&file).arg("-p").arg(folder.path()).args(["-e", "stderr"]);
        } else {
            fs::write(&file, haproxy(addr, engine)).unwrap();
            command.arg("-f").arg(&file).arg("-db");
        }
        let child: Child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let process = Process(child);
        eventually("it listens", || TcpStream::connect(addr).is_ok());
        Running { addr, _process: Owned::Theirs(process), _folder: folder }
    }
}

fn nginx(folder: &str, addr: SocketAddr, engine: SocketAddr) -> String {
    format!(
        "daemon off; master_process off; pid {folder}/pid; error_log stderr crit; worker_processes 1;
events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  client_header_timeout 10s; client_max_body_size 64m; large_client_header_buffers 8 64k; keepalive_requests 2000;
  upstream engine {{ server {engine}; keepalive 32; }}
  server {{
    listen {addr};
    proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header X-Forwarded-For $remote_addr;
    proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 900s; proxy_connect_timeout 1s;
    location = /v1/chat/completions {{ proxy_pass http://engine; }}
    location /v1/models {{ proxy_pass http://engine; }}
    location / {{ return 404; }}
  }}
}}
"
    )
}

fn haproxy(addr: SocketAddr, engine: SocketAddr) -> String {
    format!(
        "defaults
  mode http
  option abortonclose
  option forwardfor
  option http-keep-alive
  timeout client 75s
  timeout http-request 10s
  timeout connect 1s
  timeout server 900s
frontend public
  bind {addr}
  acl open path /v1/chat/completions /v1/models
  acl open path_beg /v1/models/
  http-request del-header X-Forwarded-For
  http-request deny deny_status 404 unless open
  default_backend engine
backend engine
  server engine {engine}
"
    )
}
