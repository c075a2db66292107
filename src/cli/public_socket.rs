//! A Unix socket for clients: bound under its name, and the name removed with its owner.
//!
//! The name appears with its final mode and takes the place of one that nobody listens on, in one
//! step; one that somebody listens on, or that is no socket, is left alone.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::sys::proc;

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("`listen.unix` {path}: {source}. The folder must exist and be writable for sglangd")]
    Failed { path: PathBuf, source: io::Error },
    #[error("`listen.unix` {path} is too long: the kernel takes names of at most {max} bytes")]
    TooLong { path: PathBuf, max: usize },
    #[error("`listen.unix` {path} is there and is no socket: remove it, or name another")]
    NoSocket { path: PathBuf },
    #[error("`listen.unix` {path} is in use by {holder}: stop it, or name another")]
    Taken { path: PathBuf, holder: String },
}

/// A socket's name; removed at the end, if it is still this one's.
#[derive(Debug)]
pub struct Name {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for Name {
    fn drop(&mut self) {
        let ours = |data: fs::Metadata| (data.dev(), data.ino()) == (self.device, self.inode);
        if fs::symlink_metadata(&self.path).is_ok_and(ours) {
            // Gone already is as good.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Connections waiting to be accepted while the proxy is replaced; the kernel cuts it to somaxconn.
pub const BACKLOG: i32 = 4096;

/// Room for a name in the kernel's address, without its final zero.
const MAX_NAME: usize = 107;

pub fn bind(path: &Path, mode: u32) -> Result<(UnixListener, Name), SocketError> {
    let failed = |source| SocketError::Failed { path: path.to_owned(), source };
    // Bound under another name first: the public one never stands for a socket with the wrong mode, or
    // for none.
    let before = temporary(path);
    let max = MAX_NAME - (before.as_os_str().len() - path.as_os_str().len());
    if path.as_os_str().len() > max {
        return Err(SocketError::TooLong { path: path.to_owned(), max });
    }
    free(path)?;
    match fs::remove_file(&before) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = listen(&before, mode).map_err(failed)?;
    let named = fs::symlink_metadata(&before).and_then(|data| {
        fs::rename(&before, path)?;
        Ok(Name { path: path.to_owned(), device: data.dev(), inode: data.ino() })
    });
    match named {
        Ok(name) => Ok((listener, name)),
        Err(error) => {
            let _ = fs::remove_file(&before);
            Err(failed(error))
        }
    }
}

fn listen(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Whether the name may be taken.
fn free(path: &Path) -> Result<(), SocketError> {
    let data = match fs::symlink_metadata(path) {
        Ok(data) => data,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(SocketError::Failed { path: path.to_owned(), source }),
    };
    if !data.file_type().is_socket() {
        return Err(SocketError::NoSocket { path: path.to_owned() });
    }
    match UnixStream::connect(path) {
        Ok(stream) => {
            let holder = getsockopt(&stream, PeerCredentials).map_or_else(
                |_| "another process".to_owned(),
                |peer| format!("pid {}: {}", peer.pid(), proc::command_line(peer.pid())),
            );
            Err(SocketError::Taken { path: path.to_owned(), holder })
        }
        // Nobody has it open any more.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(source) => Err(SocketError::Failed { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODE: u32 = 0o620;

    #[test]
    fn a_name_is_taken_over_from_the_dead_alone_and_goes_with_its_owner() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("public.sock");
        drop(UnixListener::bind(&path).expect("bound"));
        let (listener, name) = bind(&path, MODE).expect("a stale one is no obstacle");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, MODE);
        let error = bind(&path, MODE).expect_err("somebody listens");
        assert!(error.to_string().contains(&format!("in use by pid {}", std::process::id())), "{error}");
        drop((listener, name));
        assert!(!path.exists(), "left behind");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("public.sock");
        fs::write(&path, "precious").expect("written");
        let error = bind(&path, MODE).expect_err("a file");
        assert!(error.to_string().contains("is no socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).expect("there"), "precious");
        fs::remove_file(&path).expect("removed");
        let (listener, name) = bind(&path, MODE).expect("free");
        // Somebody else's by now.
        fs::remove_file(&path).expect("removed");
        let other = UnixListener::bind(&path).expect("bound");
        drop((listener, name));
        assert!(path.exists(), "another's name was removed");
        drop(other);
        let long = folder.path().join("x".repeat(100));
        assert!(bind(&long, MODE).expect_err("long").to_string().contains("too long"));
        let nowhere = folder.path().join("none/public.sock");
        assert!(bind(&nowhere, MODE).expect_err("no folder").to_string().contains("must exist"));
    }
}
