//! When a bundle is made, and what the driver itself puts into it.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Driver, Report};
use crate::observe::bundle::{self, Page};
use crate::supervisor::cause::Cause;
use crate::supervisor::findings::{Stacks, Subject, nvidia_smi};
use crate::supervisor::half::Half;

/// A disk that does not take some hundred kilobytes within this takes none.
const DISK: Duration = Duration::from_secs(20);

/// What everybody was told of it.
pub(super) fn cause(cause: &Cause) -> Page {
    Page::new("cause", format!("{}\n{}\n{}\n", cause.failure.class, cause.sentence, cause.advice))
}

/// By whom the engine was asked last, as the proxy knows it.
pub(super) async fn requests(half: Half) -> Page {
    let told = half.recent().await.unwrap_or_else(|| "(the proxy did not answer)\n".to_owned());
    Page::new("requests", told)
}

/// Writes it, off the runtime's workers, and adds what takes long.
pub(super) async fn written(
    state: PathBuf,
    why: &'static str,
    pages: Vec<Page>,
    spawner: &crate::launch::spawner::Spawner,
) -> Result<PathBuf, String> {
    let shown = bundle::folder(&state);
    let failed = |what: &str| format!("no bundle could be written to {}: {what}", shown.display());
    let write = tokio::task::spawn_blocking(move || bundle::write(&state, why, &pages));
    let path = match tokio::time::timeout(DISK, write).await {
        Ok(Ok(Ok(path))) => path,
        Ok(Ok(Err(error))) => return Err(failed(&error.to_string())),
        Ok(Err(error)) => return Err(failed(&error.to_string())),
        Err(_) => return Err(failed("the disk does not answer")),
    };
    let page = nvidia_smi(spawner).await;
    let at = path.clone();
    // Pruned meanwhile: then it is not missed either.
    let _ = tokio::task::spawn_blocking(move || bundle::add(&at, &page)).await;
    Ok(path)
}

impl Driver {
    /// What is known here: the status page, the GPUs.
    pub(super) fn about(&self) -> Vec<Page> {
        let pretty = |value: serde_json::Result<String>| value.unwrap_or_else(|error| format!("({error})"));
        let status = pretty(serde_json::to_string_pretty(&*self.status.borrow()));
        let gpus = match self.node.look() {
            Some(crate::node::gpus::Look::Seen(sight)) => pretty(serde_json::to_string_pretty(sight)),
            Some(crate::node::gpus::Look::Nothing(why)) => format!("({why})"),
            None => "(not looked at yet)".to_owned(),
        };
        vec![
            Page::new("status.json", crate::config::redact::text(&status)),
            Page::new("gpus.json", crate::config::redact::text(&gpus)),
        ]
    }

    /// Of the engine as it is now, whatever it is doing.
    fn make(&self, why: &'static str) -> impl Future<Output = Result<PathBuf, String>> + Send + use<> {
        let (state, spawner, about) = (self.means.folders.state.clone(), self.spawner.clone(), self.about());
        let half = self.half.clone();
        let subject = self
            .engine
            .as_ref()
            .map(|engine| (Subject::new(engine.tree.clone(), engine.spec.clone()), engine.heard.tail()));
        async move {
            let mut pages = about;
            pages.push(requests(half).await);
            if let Some((subject, tail)) = subject {
                pages.push(subject.tail(&tail));
                pages.extend(subject.start());
                pages.extend(subject.alive(&spawner, Stacks::Take).await);
            }
            written(state, why, pages, &spawner).await
        }
    }

    pub(super) fn bundle_on_demand(&self, tell: oneshot::Sender<Result<PathBuf, String>>) {
        let (made, reports) = (self.make("asked"), self.reports.clone());
        tokio::spawn(async move {
            let written = made.await;
            // Whoever asked may be gone; the bundle is there all the same.
            let _ = tell.send(written.clone());
            let _ = reports.send(Report::Bundled(written)).await;
        });
    }

    /// While it still hangs: afterwards nothing shows where.
    pub(super) fn bundle_of_a_suspicion(&self) {
        let (made, reports) = (self.make("suspected"), self.reports.clone());
        tokio::spawn(async move {
            let _ = reports.send(Report::Bundled(made.await)).await;
        });
    }

    pub(super) fn bundled(&mut self, written: Result<PathBuf, String>) {
        match written {
            Ok(path) => {
                tracing::info!("what was found is in {}", path.display());
                self.bundle = Some(path);
            }
            Err(what) => tracing::warn!("{what}"),
        }
    }
}
