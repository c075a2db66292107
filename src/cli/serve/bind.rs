//! Takes what only one can have, before anything is started: the runtime folder, the ports.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use socket2::{Domain, Protocol, Socket, Type};

use crate::cli::public_socket::{self, BACKLOG, SocketError};
use crate::config::Config;
use crate::config::folders::Folders;
use crate::exit::Exit;
use crate::observe::admin;
use crate::sys::proc;

/// Everything is ours.
#[derive(Debug)]
pub struct Bound {
    /// Where clients connect: the address, the Unix socket, or both.
    pub public: Option<TcpListener>,
    pub unix: Option<(UnixListener, public_socket::Name)>,
    pub admin: TcpListener,
    pub admin_socket: UnixListener,
    pub socket_path: PathBuf,
    /// Held as long as we live; the kernel gives it back whatever way we end.
    pub lock: File,
}

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("{what} {path} cannot be used: {source}. Name a writable folder with --{flag}")]
    Folder { what: &'static str, path: PathBuf, flag: &'static str, source: io::Error },
    #[error(
        "another sglangd ({holder}) uses the runtime folder {path}. Stop it first, or give this one its own with --runtime-dir"
    )]
    Taken { path: PathBuf, holder: String },
    #[error("{key} {addr} cannot be had: {source}{holder}. Choose another with {flag}, or end who holds it")]
    Address { key: &'static str, addr: SocketAddr, flag: &'static str, holder: String, source: io::Error },
    #[error(transparent)]
    Public(#[from] SocketError),
    #[error("the admin socket {path} cannot be made: {source}")]
    Socket { path: PathBuf, source: io::Error },
}

impl BindError {
    pub fn exit(&self) -> Exit {
        match self {
            Self::Folder { .. } | Self::Taken { .. } | Self::Address { .. } | Self::Public(_) | Self::Socket { .. } => {
                Exit::Config
            }
        }
    }
}

pub fn all(config: &Config, folders: &Folders) -> Result<Bound, BindError> {
    folder("the runtime folder", &folders.runtime, "runtime-dir")?;
    folder("the state folder", &folders.state, "state-dir")?;
    let lock = lock(&folders.runtime)?;
    let public = config.listen.public.map(|addr| listen("listen.public", addr, "--listen")).transpose()?;
    let unix =
        config.listen.unix.as_ref().map(|path| public_socket::bind(path, config.listen.unix_mode)).transpose()?;
    let admin = listen("listen.admin", config.listen.admin, "--admin")?;
    let socket_path = folders.runtime.join("admin.sock");
    let admin_socket =
        admin::bind_unix(&socket_path).map_err(|source| BindError::Socket { path: socket_path.clone(), source })?;
    Ok(Bound { public, unix, admin, admin_socket, socket_path, lock })
}

fn folder(what: &'static str, path: &Path, flag: &'static str) -> Result<(), BindError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    // Created is not writable: a folder may lie on a read-only disk or belong to somebody else.
    let usable = made.and_then(|()| tempfile::tempfile_in(path).map(drop));
    usable.map_err(|source| BindError::Folder { what, path: path.to_owned(), flag, source })
}

/// One sglangd a runtime folder. A lock of the kernel's, not a pid file: a dead holder holds nothing.
fn lock(runtime: &Path) -> Result<File, BindError> {
    let path = runtime.join("lock");
    let failed = |source| BindError::Folder {
        what: "the runtime folder",
        path: runtime.to_owned(),
        flag: "runtime-dir",
        source,
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        // Whoever holds it wrote its pid; unreadable is as good as unknown.
        let _ = file.read_to_string(&mut holder);
        let holder = if holder.trim().is_empty() { "pid unknown".into() } else { format!("pid {}", holder.trim()) };
        return Err(BindError::Taken { path: runtime.to_owned(), holder });
    }
    let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{}", std::process::id()));
    written.map_err(failed)?;
    Ok(file)
}

fn listen(key: &'static str, addr: SocketAddr, flag: &'static str) -> Result<TcpListener, BindError> {
    let open = || -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
        // Connections of an earlier run in TIME_WAIT must not keep us out.
        socket.set_reuse_address(true)?;
        if addr.is_ipv6() {
            // `[::]` means both families, whatever the machine's default is.
            socket.set_only_v6(!addr.ip().is_unspecified())?;
        }
        socket.bind(&addr.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    open().map_err(|source| {
        let holder = if source.kind() == io::ErrorKind::AddrInUse { holder(addr.port()) } else { String::new() };
        BindError::Address { key, addr, flag, holder, source }
    })
}

/// Who listens on this port of whatever address, as far as it can be seen.
fn holder(port: u16) -> String {
    match proc::listeners(port, |_| true).first() {
        Some(process) => format!(" (held by pid {}: {})", process.pid, proc::command_line(process.pid)),
        None => " (who holds it cannot be seen from here)".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_names_its_holder() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = taken.local_addr().expect("bound");
        let error = listen("listen.public", addr, "--listen").expect_err("it is taken");
        let text = error.to_string();
        assert!(text.contains(&format!("pid {}", std::process::id())), "{text}");
        assert!(text.contains("--listen"), "{text}");
    }

    #[test]
    fn j13_a_second_one_in_the_same_folder_is_told_who_is_first() {
        let runtime = tempfile::tempdir().expect("a folder");
        let first = lock(runtime.path()).expect("free");
        let error = lock(runtime.path()).expect_err("held");
        assert!(error.to_string().contains(&format!("pid {}", std::process::id())), "{error}");
        drop(first);
        lock(runtime.path()).expect("free again");
    }
}
