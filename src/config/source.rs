//! Texts that configuration was said in: files, one environment variable, one `--set`.
//!
//! Reads whole files and nothing else: no device, no FIFO, nothing above [`MAX_FILE`].

use std::fmt;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use miette::NamedSource;

use super::error::Mistake;

/// Largest configuration file, in bytes. The shipped one has 5 KiB; what is larger is a wrong file.
pub const MAX_FILE: u64 = 1 << 20;

/// A text with a name.
#[derive(Debug)]
pub struct Source {
    pub kind: SourceKind,
    /// As shown: `./config.yaml`, `SGLANGD_LIMITS_MAX`, `--set`.
    pub name: String,
    pub text: String,
    /// What snippets are cut from: `text` with secrets replaced, same length.
    shown: NamedSource<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceKind {
    /// A file, by name.
    File,
    /// The text compiled in.
    BuiltIn,
    Environment,
    CommandLine,
}

impl Source {
    pub fn new(kind: SourceKind, name: impl Into<String>, text: impl Into<String>) -> Arc<Self> {
        let (name, text) = (name.into(), text.into());
        // Neither secrets nor escape codes reach a terminal in a snippet; offsets stay true.
        let visible = |c: char| if c.is_ascii_control() && !matches!(c, '\n' | '\r' | '\t') { '?' } else { c };
        let shown = crate::config::redact::same_length(&text).chars().map(visible).collect();
        let shown = NamedSource::new(&name, shown);
        Arc::new(Self { kind, name, text, shown })
    }

    pub(super) fn shown(&self) -> &NamedSource<String> {
        &self.shown
    }

    /// Line and column (in characters), both from 1, of a byte offset.
    pub fn line_col(&self, offset: usize) -> (usize, usize) {
        let before = &self.text[..floor_char_boundary(&self.text, offset)];
        let line = before.matches('\n').count() + 1;
        let col = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        (line, col)
    }
}

fn floor_char_boundary(text: &str, offset: usize) -> usize {
    let mut at = offset.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// A stretch of a source, in bytes.
#[derive(Debug, Clone)]
pub struct Place {
    pub source: Arc<Source>,
    pub start: usize,
    pub len: usize,
}

impl Place {
    pub fn whole(source: &Arc<Source>) -> Self {
        Self { source: Arc::clone(source), start: 0, len: source.text.len() }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source.kind {
            SourceKind::File | SourceKind::BuiltIn => {
                let (line, col) = self.source.line_col(self.start);
                write!(f, "{}:{line}:{col}", self.source.name)
            }
            SourceKind::Environment | SourceKind::CommandLine => f.write_str(&self.source.name),
        }
    }
}

/// Reads a whole file or says why not. `shown` is how it was named.
pub fn read(path: &Path, shown: &str) -> Result<Arc<Source>, Box<Mistake>> {
    // Not blocking: opening a FIFO that nobody writes to would wait for ever.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let io = |error: &std::io::Error| cannot_read(shown, path, error);
    let mut file = opened.map_err(|error| io(&error))?;
    let meta = file.metadata().map_err(|error| io(&error))?;
    let kind = meta.file_type();
    if !kind.is_file() {
        let what = match () {
            () if kind.is_dir() => "a folder",
            () if kind.is_fifo() => "a FIFO",
            () if kind.is_socket() => "a socket",
            () => "a device",
        };
        return Err(Box::new(Mistake::new(
            format!("{shown} is {what}, not a file"),
            if kind.is_dir() { "name the file in it, e.g. config.yaml" } else { "write the configuration to a file" },
        )));
    }
    let mut bytes = Vec::new();
    file.by_ref().take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|error| io(&error))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Box::new(Mistake::new(
            format!("{shown} is larger than 1 MiB ({} bytes)", meta.len().max(bytes.len() as u64)),
            "a configuration is some KiB: is this the right file?",
        )));
    }
    text(shown, bytes)
}

/// Checks that the bytes are text that YAML allows.
fn text(shown: &str, bytes: Vec<u8>) -> Result<Arc<Source>, Box<Mistake>> {
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let offset = error.utf8_error().valid_up_to();
            let byte = error.as_bytes()[offset];
            let source = Source::new(SourceKind::File, shown, String::from_utf8_lossy(error.as_bytes()));
            // Everything before the first bad byte is unchanged by the lossy copy, so the offset holds.
            let place = Place { source, start: offset, len: '\u{fffd}'.len_utf8() };
            return Err(Box::new(
                Mistake::new(
                    format!("{shown} is not UTF-8: byte 0x{byte:02x} at offset {offset}"),
                    "save it as UTF-8 (`iconv -f latin1 -t utf-8` if it is Latin-1)",
                )
                .at(&place, "this byte"),
            ));
        }
    };
    let text = text.strip_prefix('\u{feff}').map(ToOwned::to_owned).unwrap_or(text);
    let control = |c: char| (c < ' ' && !matches!(c, '\t' | '\n' | '\r')) || c == '\u{7f}';
    let bad = text.char_indices().find(|&(_, c)| control(c));
    let source = Source::new(SourceKind::File, shown, text);
    if let Some((offset, c)) = bad {
        let what =
            if c == '\0' { "a NUL byte".to_owned() } else { format!("the control character U+{:04X}", u32::from(c)) };
        return Err(Box::new(
            Mistake::new(format!("{shown} holds {what}, which YAML forbids"), "remove it; is this a text file?")
                .at(&Place { source, start: offset, len: 1 }, "here"),
        ));
    }
    Ok(source)
}

fn cannot_read(shown: &str, path: &Path, error: &std::io::Error) -> Box<Mistake> {
    let (message, help) = match error.kind() {
        ErrorKind::NotFound => (
            format!("{shown} does not exist"),
            "give the path of an existing file, or leave --config out to use the shipped configuration".to_owned(),
        ),
        ErrorKind::PermissionDenied => (
            format!("{shown} may not be read by this user"),
            format!("allow it (`chmod a+r {}`), or run as its owner", path.display()),
        ),
        _ if error.raw_os_error() == Some(libc::ELOOP) => (
            format!("{shown} is a loop of symbolic links"),
            format!("`ls -l {}` shows where it points", path.display()),
        ),
        _ => (format!("{shown} cannot be read: {error}"), "name a readable file".to_owned()),
    };
    Box::new(Mistake::new(message, help))
}

/// How a path is shown: relative to the working folder where it lies in it.
pub fn shown(path: &Path, cwd: &Path) -> String {
    path.strip_prefix(cwd).map_or_else(|_| path.to_path_buf(), Path::to_path_buf).display().to_string()
}

/// Makes a path absolute: `~/x` by `home`, anything relative by `base`.
pub fn absolute(path: &str, base: &Path, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => base.join(path),
    }
}
