//! What a fetch is to do, before it does anything: each repository's revision, its files, and what of them is there. Asks
//! the hub, or the cache where there is none, and writes nothing.

use std::path::PathBuf;

use tokio::time::Instant;

use super::cache::{Access, Listing, Marker, RepoCache};
use super::error::FetchError;
use super::hold::Hold;
use super::hub::{Fault, Hub, Scope};
use super::plan::{self, Action, FetchPlan, Hash, Present, RemoteFile, Transport};
use super::settings::{Network, Settings};
use super::transfer::backoff;
use super::{Proof, RepoRequest, Request, local, name};

/// Attempts at the first contact: a machine without a network says so in seconds, and the caller decides
/// whether to come back.
const CONTACTS: u32 = 3;

/// One repository of the request, with what is to be done.
#[derive(Debug)]
pub struct PlannedRepo {
    pub request: RepoRequest,
    pub plan: FetchPlan,
    pub(super) cache: RepoCache,
    pub(super) hub: Option<Hub>,
    pub(super) listing: Listing,
    pub(super) access: Access,
}

impl PlannedRepo {
    /// Where the snapshot lies or will lie.
    pub fn folder(&self) -> PathBuf {
        self.cache.snapshot(&self.plan.commit)
    }

    pub(super) fn cache(&self) -> &RepoCache {
        &self.cache
    }

    /// Where there is something to do, nobody tidies the repository meanwhile.
    pub(super) async fn hold(&self) -> Option<Hold> {
        let idle = self.plan.files.iter().all(|f| f.action == Action::Keep);
        if idle || self.access == Access::ReadOnly {
            return None;
        }
        // What is wrong with the folder shows when the first file is put there, with the file's name.
        std::fs::create_dir_all(self.cache.dir()).ok()?;
        Hold::wait(&self.cache.dir()).await.ok()
    }
}

/// Finds out what is to be fetched, without writing anything. Whether it fits is `space`'s.
pub async fn prepare(request: &Request, settings: &Settings) -> Result<Vec<PlannedRepo>, FetchError> {
    let mut planned = Vec::new();
    for repo in &request.repos {
        planned.push(prepare_repo(repo, request.proof, settings).await?);
    }
    Ok(planned)
}

async fn prepare_repo(request: &RepoRequest, proof: Proof, settings: &Settings) -> Result<PlannedRepo, FetchError> {
    let refused = |what, value: &str, why| FetchError::BadRequest { what, value: value.to_owned(), why };
    if let Some(why) = name::refuse_repo(&request.repo) {
        return Err(refused("the repository", &request.repo, why));
    }
    if let Some(why) = name::refuse_revision(&request.revision) {
        return Err(refused("the revision", &request.revision, why));
    }
    let cache = RepoCache::new(&settings.cache, &request.repo);
    let access = settings.access.unwrap_or_else(|| cache.access());
    if let Network::Offline(why) = settings.network {
        return prepare_offline(request, proof, settings, cache, access, why);
    }
    let kept = |commit: &str| match proof {
        Proof::Kept => cache.read_marker(commit),
        Proof::Anew => None,
    };
    let complete = |commit: &str, marker: Option<&Marker>, hub: Option<Hub>| {
        let plan = known_complete(request, &cache, commit, marker?)?;
        Some(PlannedRepo { request: request.clone(), plan, cache: cache.clone(), hub, listing: Listing::Hub, access })
    };
    // A pinned commit that is complete needs no hub, and so no client of one either.
    if name::is_commit(&request.revision)
        && let Some(there) = complete(&request.revision, kept(&request.revision).as_ref(), None)
    {
        return Ok(there);
    }
    let hub = Hub::new(settings)?;
    let resolved = if name::is_commit(&request.revision) {
        Ok(request.revision.clone())
    } else {
        let known =
            cache.read_ref(&request.revision).filter(|commit| complete(commit, kept(commit).as_ref(), None).is_some());
        let (hub, known) = (&hub, known.as_ref());
        let ask = || async move {
            match known {
                Some(commit) if hub.is_still(&request.repo, &request.revision, commit).await? => Ok(commit.clone()),
                _ => hub.resolve(&request.repo, &request.revision).await,
            }
        };
        contact(settings, &request.repo, ask).await
    };
    let commit = match resolved {
        Ok(commit) => commit,
        Err(unreachable @ FetchError::Unreachable { .. }) => {
            // A node must come up again while the hub is down, if all it needs is here.
            let offline = prepare_offline(request, proof, settings, cache, access, "the hub cannot be reached");
            return offline.map_err(|_| unreachable).inspect(|repo| {
                tracing::warn!(repo = %request.repo, commit = %repo.plan.commit, "the hub cannot be reached: using what is cached");
            });
        }
        Err(error) => return Err(error),
    };
    let marker = kept(&commit);
    if let Some(there) = complete(&commit, marker.as_ref(), Some(hub.clone())) {
        return Ok(there);
    }
    let listing = contact(settings, &request.repo, || hub.list(&request.repo, &commit)).await?;
    let plan = plan::plan(request, &commit, listing, |file| cache.present(&commit, file, marker.as_ref()))?;
    if access == Access::ReadOnly {
        // Even a blob that is there needs a link where the snapshot lacks one.
        let snapshot = cache.snapshot(&commit);
        let missing: Vec<String> = plan
            .files
            .iter()
            .filter(|f| matches!(f.action, Action::Fetch { .. }) || !snapshot.join(&f.file.name).is_file())
            .map(|f| f.file.name.clone())
            .collect();
        if !missing.is_empty() {
            return Err(FetchError::ReadOnly { cache: settings.cache.clone(), repo: request.repo.clone(), missing });
        }
    }
    Ok(PlannedRepo { request: request.clone(), plan, cache, hub: Some(hub), listing: Listing::Hub, access })
}

/// The plan of a commit that an earlier run finished, if nothing changed since: no request at all.
fn known_complete(request: &RepoRequest, cache: &RepoCache, commit: &str, marker: &Marker) -> Option<FetchPlan> {
    if marker.listing != Listing::Hub {
        return None;
    }
    let proved = marker.files.iter().map(|(name, proved)| RemoteFile {
        name: name.clone(),
        size: proved.size,
        hash: proved.hash.clone(),
        transport: Transport::Http,
    });
    // What that run did not want stands for itself by name: if this one wants it, it is not there.
    let skipped = marker.skipped.iter().map(|name| RemoteFile {
        name: name.clone(),
        size: 0,
        hash: Hash::Unknown,
        transport: Transport::Http,
    });
    let look = |file: &RemoteFile| match file.hash {
        Hash::Unknown => Present::No,
        _ => cache.present(commit, file, Some(marker)),
    };
    let plan = plan::plan(request, commit, proved.chain(skipped).collect(), look).ok()?;
    plan.files.iter().all(|f| f.action == Action::Keep).then_some(plan)
}

fn prepare_offline(
    request: &RepoRequest,
    proof: Proof,
    settings: &Settings,
    cache: RepoCache,
    access: Access,
    why: &'static str,
) -> Result<PlannedRepo, FetchError> {
    let lacks = |missing: Vec<String>| FetchError::NotCached {
        repo: request.repo.clone(),
        revision: request.revision.clone(),
        cache: settings.cache.clone(),
        missing,
        why,
    };
    let commit = cache.read_ref(&request.revision).ok_or_else(|| lacks(vec![]))?;
    if !cache.snapshot(&commit).is_dir() {
        return Err(lacks(vec![]));
    }
    let marker = cache.read_marker(&commit);
    let local = local::list(request, &cache, &commit, marker.as_ref())?;
    if !local.missing.is_empty() {
        return Err(lacks(local.missing));
    }
    // The marker says what must be there in either case; whether it is believed is another question.
    let believed = marker.as_ref().filter(|_| proof == Proof::Kept);
    let plan = plan::plan(request, &commit, local.files, |file| match &file.hash {
        // Nothing to compare with but the header, which was looked at.
        Hash::Unknown => Present::Verified,
        _ => cache.present(&commit, file, believed),
    })?;
    if !plan.missing().is_empty() {
        return Err(lacks(plan.missing()));
    }
    Ok(PlannedRepo { request: request.clone(), plan, cache, hub: None, listing: Listing::Cache, access })
}

/// Asks the hub until it answers, for as long as patience lasts.
async fn contact<T, F>(settings: &Settings, repo: &str, mut ask: impl FnMut() -> F) -> Result<T, FetchError>
where
    F: Future<Output = Result<T, Fault>>,
{
    let patience = &settings.patience;
    let begun = Instant::now();
    let mut made = 0;
    loop {
        made += 1;
        let (cause, after, scope) = match ask().await {
            Ok(answer) => return Ok(answer),
            Err(Fault::Fatal(error)) => return Err(error),
            Err(Fault::RangeIgnored) => ("a range was ignored".to_owned(), None, Scope::Stream),
            Err(Fault::Again { cause, after, scope }) => (cause, after, scope),
        };
        let most = if scope == Scope::Hub { patience.attempts } else { CONTACTS.min(patience.attempts) };
        let endpoint = settings.endpoint.clone();
        if after.is_some_and(|after| after > patience.limit) {
            return Err(FetchError::RateLimited { endpoint, after });
        }
        if made >= most || begun.elapsed() >= patience.limit {
            return Err(match scope {
                Scope::Hub if cause.starts_with("429") => FetchError::RateLimited { endpoint, after },
                _ => FetchError::Unreachable { endpoint, cause },
            });
        }
        let pause = after.unwrap_or_else(|| backoff(patience.backoff, patience.backoff_max, made));
        tracing::info!(%repo, %cause, wait_ms = pause.as_millis() as u64, "the hub does not answer as it should: asking again");
        tokio::time::sleep(pause).await;
    }
}
