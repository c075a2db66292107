//! systemd's journal in its own protocol: rank, level and all other fields as fields of the entry.
//!
//! An entry is written as lines `KEY=value` into the same bounded ring as every other format, and the
//! ring's thread sends it: a journal that stands still costs lines, never a wait. (A layer that sends from
//! the thread that logs would block it with the socket.)

use std::fmt::{self, Write as _};
use std::io;
use std::os::unix::net::UnixDatagram;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

const SOCKET: &str = "/run/systemd/journal/socket";
/// Stands for a newline inside a value until the entry is sent; no message has it, since control
/// characters are taken out of everything that others say.
const NEWLINE: char = '\u{1}';

/// One entry as lines.
#[derive(Debug)]
pub struct Entry;

impl<S, N> FormatEvent<S, N> for Entry
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let meta = event.metadata();
        // As syslog counts.
        let priority = match *meta.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        writeln!(writer, "PRIORITY={priority}")?;
        writeln!(writer, "SYSLOG_IDENTIFIER=sglangd")?;
        writeln!(writer, "TARGET={}", meta.target())?;
        let mut lines = Lines(String::new());
        event.record(&mut lines);
        writer.write_str(&lines.0)
    }
}

struct Lines(String);

impl Lines {
    fn line(&mut self, field: &Field, value: &str) {
        if value.is_empty() {
            return;
        }
        // Names of the journal's fields are capital letters, digits and underscores.
        self.0
            .extend(field.name().chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }));
        self.0.push('=');
        self.0.extend(value.chars().map(|c| if c == '\n' { NEWLINE } else { c }));
        self.0.push('\n');
    }
}

impl Visit for Lines {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.line(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = write!(text, "{value:?}");
        self.line(field, &text);
    }
}

/// Sends each write as one entry.
#[derive(Debug)]
pub struct Journal(UnixDatagram);

impl Journal {
    /// The error: no journal runs here.
    pub fn open() -> io::Result<Self> {
        Self::at(SOCKET)
    }

    fn at(socket: &str) -> io::Result<Self> {
        let own = UnixDatagram::unbound()?;
        own.connect(socket)?;
        Ok(Self(own))
    }
}

impl io::Write for Journal {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        self.0.send(&entry(lines))?;
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Values with newlines in the journal's binary form: the name, a length of 64 bits, the value.
fn entry(lines: &[u8]) -> Vec<u8> {
    let newline = NEWLINE as u8;
    let mut out = Vec::with_capacity(lines.len() + 64);
    for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let equals = line.iter().position(|byte| *byte == b'=');
        match equals {
            Some(equals) if line.contains(&newline) => {
                let value = &line[equals + 1..];
                out.extend_from_slice(&line[..equals]);
                out.push(b'\n');
                out.extend_from_slice(&(value.len() as u64).to_le_bytes());
                out.extend(value.iter().map(|byte| if *byte == newline { b'\n' } else { *byte }));
            }
            _ => out.extend_from_slice(line),
        }
        out.push(b'\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use tracing_subscriber::layer::SubscriberExt;

    #[test]
    fn an_entry_has_its_rank_and_level_as_fields() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let journal = UnixDatagram::bind(&path).expect("bound");
        let open = move || Journal::at(path.to_str().expect("utf-8")).expect("it listens");
        let layer = tracing_subscriber::fmt::layer().event_format(Entry).with_writer(open);
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(target: "engine", rank = "TP3", "engine TP3: two\nlines");
        });
        let mut buffer = [0; 4096];
        let read = journal.recv(&mut buffer).expect("one datagram");
        let text = String::from_utf8_lossy(&buffer[..read]).into_owned();
        for field in ["PRIORITY=4\n", "SYSLOG_IDENTIFIER=sglangd\n", "TARGET=engine\n", "RANK=TP3\n"] {
            assert!(text.contains(field), "{field:?} in {text:?}");
        }
        assert!(text.contains("MESSAGE\n\u{15}\0\0\0\0\0\0\0engine TP3: two\nlines\n"), "{text:?}");
    }

    #[test]
    fn without_a_journal_it_is_an_error() {
        assert!(Journal::at("/nonexistent/socket").is_err());
        let (one, other) = UnixDatagram::pair().expect("a pair");
        drop(other);
        assert!(Journal(one).write(b"MESSAGE=x\n").is_err());
    }
}
