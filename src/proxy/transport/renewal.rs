//! When the certificate's files are read again: when told to, and when they have changed.
//!
//! Only looks at names, sizes and times between two readings, so that it costs two `stat` calls each
//! [`LOOK`]. A pair that cannot be used leaves the old one where it is.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::counts::Counts;
use super::identity::{Identity, TlsError};
use crate::link::TlsFiles;

/// How often the files are looked at. A change counts when two looks see the same, so that a pair
/// which is just being written is not read in halves.
pub const LOOK: Duration = Duration::from_secs(2);
/// How often warnings are repeated in the log.
const AGAIN: SignedDuration = SignedDuration::from_hours(24);

/// One file as far as `stat` tells it from its successor; none: it is not there.
type Mark = Option<(u64, u64, u64, i64, i64, i64, i64)>;

fn mark(path: &Path) -> Mark {
    let data = fs::metadata(path).ok()?;
    Some((data.dev(), data.ino(), data.size(), data.mtime(), data.mtime_nsec(), data.ctime(), data.ctime_nsec()))
}

type Marks = (Mark, Mark);

fn marks(files: &TlsFiles) -> Marks {
    (mark(&files.cert), mark(&files.key))
}

/// The certificate in use and what is known of its files.
#[derive(Debug, Default)]
pub struct Renewal {
    files: Option<TlsFiles>,
    current: Option<Arc<Identity>>,
    /// Those last read, whatever came of it.
    judged: Option<Marks>,
    /// Those of the last look.
    seen: Option<Marks>,
    /// Why the files as they are now are not in use.
    refused: Option<String>,
    said: Option<(Timestamp, Vec<String>)>,
    warnings: Vec<String>,
}

/// What a reading came to.
pub type Read = Result<Arc<Identity>, TlsError>;

impl Renewal {
    /// Whether there are files to look at.
    pub fn is_on(&self) -> bool {
        self.files.is_some()
    }

    pub fn current(&self) -> Option<Arc<Identity>> {
        self.current.clone()
    }

    /// Uses these files from now on; none: no TLS. Where they are bad the old certificate stays until
    /// they are better.
    pub fn use_files(&mut self, files: Option<&TlsFiles>, counts: &Counts, now: Timestamp) -> Result<(), TlsError> {
        let Some(files) = files else {
            *self = Self::default();
            return Ok(());
        };
        (self.files, self.judged) = (Some(files.clone()), Some(marks(files)));
        let identity = self.read(files, counts, now)?;
        self.begin(identity, now);
        Ok(())
    }

    /// What is not as it should be, though TLS works.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Looks at the files. Something only where they have changed, and been read again.
    pub fn look(&mut self, counts: &Counts, now: Timestamp) -> Option<Read> {
        let files = self.files.clone()?;
        let found = Some(marks(&files));
        if found == self.judged {
            self.review(now);
            return None;
        }
        if found != self.seen {
            self.seen = found;
            return None;
        }
        self.judged = found;
        let read = self.read(&files, counts, now);
        if let Ok(identity) = &read {
            self.begin(Arc::clone(identity), now);
        }
        Some(read)
    }

    fn read(&mut self, files: &TlsFiles, counts: &Counts, now: Timestamp) -> Read {
        let read = Identity::load(files, now).and_then(|identity| {
            // An old backup put in the place of a good certificate would lock every client out.
            match identity.not_after().filter(|_| identity.has_expired(now)) {
                Some(at) if self.current.as_ref().is_some_and(|current| !current.has_expired(now)) => {
                    Err(TlsError::Expired { path: files.cert.clone(), at })
                }
                _ => Ok(Arc::new(identity)),
            }
        });
        let counter = if read.is_ok() { &counts.certificates_read } else { &counts.certificates_refused };
        counter.fetch_add(1, Relaxed);
        self.refused = read.as_ref().err().map(ToString::to_string);
        self.review(now);
        read
    }

    fn begin(&mut self, identity: Arc<Identity>, now: Timestamp) {
        let end = identity.not_after().map_or_else(|| "an unknown time".to_owned(), |end| end.to_string());
        tracing::info!("TLS uses the certificate that is good until {end}");
        self.current = Some(identity);
        self.review(now);
    }

    /// Says what is not as it should be when it becomes known, and again each day.
    fn review(&mut self, now: Timestamp) {
        let warnings = self.current.as_ref().map(|identity| identity.warnings(now)).unwrap_or_default();
        let said = self.said.as_ref().filter(|(at, said)| *said == warnings && now.duration_since(*at) < AGAIN);
        if said.is_none() {
            for warning in &warnings {
                tracing::warn!("{warning}");
            }
            self.said = Some((now, warnings));
        }
        self.warnings.clear();
        self.warnings.extend(self.said.iter().flat_map(|(_, said)| said).cloned());
        self.warnings.extend(self.refused.iter().map(|why| format!("the certificate's files are not used: {why}")));
    }
}
