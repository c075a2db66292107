//! The order of a fetch: prepare (resolve, list, plan, preflight: nothing is written), then the files, several at
//! once, then the ref and the marker. How one file comes is `transfer`'s.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::board::{Board, Slot};
use super::cache::{Access, Listing, Marker, RepoCache};
use super::error::{FetchError, bytes};
use super::hold::Hold;
use super::hub::{Fault, Hub, Scope};
use super::plan::{self, Action, FetchPlan, Hash, Present, RemoteFile, Transport};
use super::progress::{Meter, Progress, Snapshot};
use super::settings::{Network, Settings};
use super::space::Space;
use super::transfer::{Repo, backoff};
use super::{Proof, RepoRequest, Request, local, name};

/// Between two reports.
const TICK: Duration = Duration::from_millis(250);
/// Notes of waiting that may lie unread; a lost one is repeated by the next change of holder.
const NOTES: usize = 16;
/// Attempts at the first contact: a machine without a network says so in seconds, and the caller decides
/// whether to come back.
const CONTACTS: u32 = 3;

/// One repository of the request, with what is to be done.
#[derive(Debug)]
pub struct PlannedRepo {
    pub request: RepoRequest,
    pub plan: FetchPlan,
    cache: RepoCache,
    hub: Option<Hub>,
    listing: Listing,
    access: Access,
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
    async fn hold(&self) -> Option<Hold> {
        let idle = self.plan.files.iter().all(|f| f.action == Action::Keep);
        if idle || self.access == Access::ReadOnly {
            return None;
        }
        // What is wrong with the folder shows when the first file is put there, with the file's name.
        std::fs::create_dir_all(self.cache.dir()).ok()?;
        Hold::wait(&self.cache.dir()).await.ok()
    }
}

/// Finds out what is to be fetched, without writing anything. Whether it fits is [`Space`]'s.
pub async fn prepare(request: &Request, settings: &Settings) -> Result<Vec<PlannedRepo>, FetchError> {
    let mut planned = Vec::new();
    for repo in &request.repos {
        planned.push(prepare_repo(repo, request.proof, settings).await?);
    }
    Ok(planned)
}

/// Brings everything onto the disk, verified. `report` hears how far it is, at most some times a second.
/// Dropping the future stops it; what was fetched stays and is continued by the next one.
pub async fn fetch(
    request: &Request,
    settings: &Settings,
    report: &mut (dyn FnMut(Progress) + Send),
) -> Result<Vec<Snapshot>, FetchError> {
    let planned = prepare(request, settings).await?;
    Space::look(&planned, settings)?.enough()?;
    let mut held = Vec::new();
    for repo in &planned {
        held.extend(repo.hold().await);
    }
    report(Progress::Plan {
        files: planned.iter().map(|p| p.plan.files.len()).sum(),
        bytes_total: planned.iter().map(|p| p.plan.bytes_total()).sum(),
        bytes_present: planned.iter().map(|p| p.plan.bytes_present()).sum(),
    });
    run(&planned, settings, report).await?;
    let mut snapshots = Vec::new();
    for repo in planned {
        snapshots.push(repo.conclude()?);
    }
    drop(held);
    report(Progress::Done { snapshots: snapshots.clone() });
    Ok(snapshots)
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
        contact(settings, &request.repo, || hub.resolve(&request.repo, &request.revision)).await
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

/// Fetches and verifies all files of all repositories, as many at once as there are connections.
async fn run(
    planned: &[PlannedRepo],
    settings: &Settings,
    report: &mut (dyn FnMut(Progress) + Send),
) -> Result<(), FetchError> {
    let (notes, mut heard) = mpsc::channel(NOTES);
    let board = Arc::new(Board::new(notes));
    let places = Arc::new(Semaphore::new(settings.connections.max(1)));
    let mut tasks = JoinSet::new();
    for repo in planned {
        let shared = repo.hub.as_ref().map(|hub| {
            Arc::new(Repo {
                id: repo.request.repo.clone(),
                commit: repo.plan.commit.clone(),
                cache: repo.cache.clone(),
                hub: hub.clone(),
                settings: settings.clone(),
                board: board.clone(),
            })
        });
        for (file, names, action) in by_content(&repo.plan) {
            let slot = board.slot(&file, action);
            if action == Action::Keep {
                continue;
            }
            let (places, cache, commit) = (places.clone(), repo.cache.clone(), repo.plan.commit.clone());
            let (shared, access, request) = (shared.clone(), repo.access, repo.request.clone());
            tasks.spawn(async move {
                let _place = places.acquire_owned().await.expect("the semaphore is never closed");
                let _shown = slot.shown();
                match &shared {
                    Some(repo) if access == Access::ReadWrite => {
                        let right = action == Action::Verify && repo.keep_if_right(&file, &slot).await?;
                        if !right {
                            repo.bring(&file, &slot).await?;
                        }
                    }
                    _ => prove(&request, &cache, &commit, &file, &slot, access).await?,
                }
                if access == Access::ReadWrite {
                    cache.link_all(&commit, &file, &names)?;
                }
                Ok::<(), FetchError>(())
            });
        }
    }
    let mut meter = Meter::new(Instant::now(), board.done(), board.total());
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            ended = tasks.join_next() => match ended {
                None => {
                    report(board.bytes(&mut meter));
                    return Ok(());
                }
                Some(Ok(Ok(()))) => {}
                // The others stop where they are; what they fetched is continued next time.
                Some(Ok(Err(error))) => return Err(error),
                Some(Err(join)) => return Err(FetchError::Disk { path: settings.cache.clone(), source: std::io::Error::other(join) }),
            },
            Some((file, holder)) = heard.recv() => report(Progress::Waiting { file, holder }),
            _ = tick.tick() => board.reports(&mut meter).for_each(&mut *report),
        }
    }
}

/// Without the hub, or in a cache that cannot be mended: the file is right, or it is named.
async fn prove(
    request: &RepoRequest,
    cache: &RepoCache,
    commit: &str,
    file: &RemoteFile,
    slot: &Slot,
    access: Access,
) -> Result<(), FetchError> {
    let path = cache.snapshot(commit).join(&file.name);
    let (there, hash, size, read) = (path.clone(), file.hash.clone(), file.size, slot.verifying());
    let hashed = tokio::task::spawn_blocking(move || super::verify::hash_file(&there, &hash, size, &read)).await;
    let got = hashed
        .map_err(std::io::Error::other)
        .flatten()
        .map_err(|source| FetchError::Disk { path: path.clone(), source })?;
    if got == file.hash.hex() {
        slot.set(file.size);
        return Ok(());
    }
    Err(match access {
        Access::ReadOnly => FetchError::ReadOnly {
            cache: cache.root.clone(),
            repo: request.repo.clone(),
            missing: vec![format!("{} (its content is wrong)", file.name)],
        },
        Access::ReadWrite => FetchError::Corrupt {
            repo: request.repo.clone(),
            file: file.name.clone(),
            attempts: 1,
            expected: file.hash.hex().to_owned(),
            got,
        },
    })
}

/// Files with the same content are one blob, fetched once; each keeps its names.
fn by_content(plan: &FetchPlan) -> Vec<(RemoteFile, Vec<String>, Action)> {
    let mut order: Vec<(RemoteFile, Vec<String>, Action)> = Vec::new();
    let mut place: HashMap<(String, Action), usize> = HashMap::new();
    for planned in &plan.files {
        let key = (planned.file.hash.hex().to_owned(), planned.action);
        match place.get(&key) {
            Some(&at) if !key.0.is_empty() => order[at].1.push(planned.file.name.clone()),
            _ => {
                place.insert(key, order.len());
                order.push((planned.file.clone(), vec![planned.file.name.clone()], planned.action));
            }
        }
    }
    order
}

impl PlannedRepo {
    /// Everything is there: says so to the next start and to the Hugging Face tools.
    fn conclude(self) -> Result<Snapshot, FetchError> {
        let path = self.cache.snapshot(&self.plan.commit);
        for planned in &self.plan.files {
            let file = path.join(&planned.file.name);
            // The last word is the disk's: whatever was counted above, the engine gets only what is there.
            let size =
                std::fs::metadata(&file).map_err(|source| FetchError::Disk { path: file.clone(), source })?.len();
            if size != planned.file.size {
                return Err(FetchError::File {
                    repo: self.request.repo.clone(),
                    file: planned.file.name.clone(),
                    attempts: 1,
                    cause: format!("{} on the disk where the hub has {}", bytes(size), bytes(planned.file.size)),
                });
            }
        }
        if self.access == Access::ReadWrite {
            let files: Vec<RemoteFile> = self.plan.files.into_iter().map(|f| f.file).collect();
            self.cache.write_marker(&self.plan.commit, &files, &self.plan.skipped, self.listing)?;
            self.cache.write_ref(&self.request.revision, &self.plan.commit)?;
        }
        Ok(Snapshot {
            flag: self.request.flag,
            repo: self.request.repo,
            revision: self.request.revision,
            commit: self.plan.commit,
            path,
        })
    }
}
