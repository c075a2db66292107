//! The order of a fetch: `prepare` (resolve, list, plan) and preflight, which write nothing, then the files, several at
//! once, then the ref and the marker. How one file comes is `transfer`'s.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::board::{Board, Slot};
use super::cache::{Access, RepoCache};
use super::direct_io::Blocks;
use super::drivers::Drivers;
use super::error::{FetchError, bytes};
use super::plan::{Action, FetchPlan, RemoteFile};
use super::prepare::{PlannedRepo, prepare};
use super::progress::{Meter, Progress, Snapshot};
use super::rate::Rate;
use super::room;
use super::settings::Settings;
use super::space::Space;
use super::transfer::Repo;
use super::xet::Xet;
use super::{PageCache, Request};

/// Between two reports.
const TICK: Duration = Duration::from_millis(250);
/// Notes of waiting that may lie unread; a lost one is repeated by the next change of holder.
const NOTES: usize = 16;

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

/// Memory for writes past the page cache, where bytes are to go past it. A network's file system has its own ways with such
/// writes, none of them measured.
fn past_cache(planned: &[PlannedRepo], settings: &Settings) -> Option<Arc<Blocks>> {
    let bytes: u64 = planned.iter().map(|repo| repo.plan.bytes_to_fetch()).sum();
    let is_to = match settings.page_cache {
        PageCache::Bypass => true,
        PageCache::WhatFits => bytes > room::room(),
        PageCache::Keep => false,
    };
    (is_to && planned.iter().all(|repo| repo.cache().is_on_own_disk())).then(Arc::default)
}

/// One content to be brought or proved, with all the names it has.
struct Job {
    repo: usize,
    /// Places in the plan; the first one stands for all.
    files: Vec<usize>,
}

/// Fetches and verifies all files of all repositories over as many connections as there are places.
async fn run(
    planned: &[PlannedRepo],
    settings: &Settings,
    report: &mut (dyn FnMut(Progress) + Send),
) -> Result<(), FetchError> {
    let (notes, mut heard) = mpsc::channel(NOTES);
    let board = Arc::new(Board::new(notes, planned.iter().map(|p| &p.plan)));
    let places = Arc::new(Semaphore::new(settings.connections.max(1)));
    let rate = Arc::new(Rate::new(settings.max_rate));
    let drivers = Arc::new(Drivers::start(settings.connections));
    let past_cache = past_cache(planned, settings);
    let shared: Vec<Option<Arc<Repo>>> = planned
        .iter()
        .map(|repo| {
            let hub = repo.hub.as_ref()?;
            Some(Arc::new(Repo {
                id: repo.request.repo.clone(),
                commit: repo.plan.commit.clone(),
                cache: repo.cache.clone(),
                hub: hub.clone(),
                xet: Xet::default(),
                settings: settings.clone(),
                board: board.clone(),
                rate: rate.clone(),
                places: places.clone(),
                drivers: drivers.clone(),
                past_cache: past_cache.clone(),
            }))
        })
        .collect();
    let mut jobs: VecDeque<Job> =
        planned.iter().enumerate().flat_map(|(at, repo)| by_content(at, &repo.plan)).collect();
    // What is fetched needs no place while its tail is hashed, so a few more are at it than there are connections.
    let most = 2 * settings.connections.max(1);
    let mut tasks = JoinSet::new();
    let mut meter = Meter::new(Instant::now(), board.done(), board.total());
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        if jobs.is_empty() {
            board.all_begun();
            if tasks.is_empty() {
                report(board.bytes(&mut meter));
                return Ok(());
            }
        }
        tokio::select! {
            place = places.clone().acquire_owned(), if !jobs.is_empty() && tasks.len() < most => {
                let place = place.expect("the semaphore is never closed");
                if let Some(job) = jobs.pop_front() {
                    let (repo, shared) = (&planned[job.repo], shared[job.repo].clone());
                    tasks.spawn(bring_or_prove(repo, shared, &job, &board, place));
                }
            }
            ended = tasks.join_next(), if !tasks.is_empty() => match ended {
                None | Some(Ok(Ok(()))) => {}
                // The others stop where they are; what they fetched is continued next time.
                Some(Ok(Err(error))) => return Err(error),
                Some(Err(join)) => return Err(FetchError::Disk { path: settings.cache.clone(), source: std::io::Error::other(join) }),
            },
            Some((file, holder)) = heard.recv() => report(Progress::Waiting { file, holder }),
            _ = tick.tick() => board.reports(&mut meter).for_each(&mut *report),
        }
    }
}

/// What is to be done about one content; owns all it needs, since it outlives the borrow of the plan.
fn bring_or_prove(
    repo: &PlannedRepo,
    shared: Option<Arc<Repo>>,
    job: &Job,
    board: &Arc<Board>,
    place: OwnedSemaphorePermit,
) -> impl Future<Output = Result<(), FetchError>> + Send + 'static {
    let first = &repo.plan.files[job.files[0]];
    let (file, action) = (first.file.clone(), first.action);
    let names: Vec<String> = job.files.iter().map(|&at| repo.plan.files[at].file.name.clone()).collect();
    let (cache, commit, access) = (repo.cache.clone(), repo.plan.commit.clone(), repo.access);
    let (id, board) = (repo.request.repo.clone(), board.clone());
    async move {
        let (slot, _shown) = board.slot(&file, action);
        match &shared {
            Some(repo) if access == Access::ReadWrite => {
                let right = action == Action::Verify && repo.keep_if_right(&file, &slot).await?;
                if !right {
                    repo.bring(&file, &slot, place).await?;
                }
            }
            _ => prove(&id, &cache, &commit, &file, &slot, access).await?,
        }
        if access == Access::ReadWrite {
            cache.link_all(&commit, &file, &names)?;
        }
        Ok(())
    }
}

/// Without the hub, or in a cache that cannot be mended: the file is right, or it is named.
async fn prove(
    id: &str,
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
            repo: id.to_owned(),
            missing: vec![format!("{} (its content is wrong)", file.name)],
        },
        Access::ReadWrite => FetchError::Corrupt {
            repo: id.to_owned(),
            file: file.name.clone(),
            attempts: 1,
            expected: file.hash.hex().to_owned(),
            got,
        },
    })
}

/// Files with the same content are one blob, fetched once; each keeps its names. What is proved needs nothing.
fn by_content(repo: usize, plan: &FetchPlan) -> Vec<Job> {
    let mut jobs: Vec<Job> = Vec::new();
    let mut place: HashMap<(&str, Action), usize> = HashMap::new();
    for (at, planned) in plan.files.iter().enumerate().filter(|(_, planned)| planned.action != Action::Keep) {
        let key = (planned.file.hash.hex(), planned.action);
        match place.get(&key) {
            Some(&job) if !key.0.is_empty() => jobs[job].files.push(at),
            _ => {
                place.insert(key, jobs.len());
                jobs.push(Job { repo, files: vec![at] });
            }
        }
    }
    jobs
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
