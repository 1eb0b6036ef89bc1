//! Uploading copies that were taken.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use petra_engine::context::Host;
use petra_engine::record::SnapshotRecord;
use petra_engine::session::Session;
use petra_engine::snapshot::{Ahead, Parent, SnapshotRequest, snapshot, snapshot_after};
use petra_engine::source::Source;
use petra_engine::{Context, Error as EngineError, Name, Repository, SnapshotId, SnapshotRef};

use tokio_util::sync::CancellationToken;

use super::state::{self as place, Target, UploadState, UploadVolume};
use crate::copy_source::CopySource;
use crate::error::{Error, Result};
use crate::idle::Rate;
use crate::pool::lock::Lock;
use crate::pool::pins::blocking;
use crate::pool::{BaseState, LARGEST_SECTOR_BYTES, Pool, entries, state};
use crate::sys::files;
use crate::volume::Volume;

/// Metadata of a snapshot: the id of the upload that made it.
const UPLOAD: &str = "petra.upload";

/// Metadata of a snapshot: the largest blocks, in bytes, that a device of any of its volumes may have.
const SECTOR_BYTES: &str = "petra.sector-bytes";

/// What is read for a snapshot.
struct Sources {
    volumes: Vec<(Name, Arc<dyn Source>)>,
    /// The snapshot that they are best compared with.
    parent: Option<SnapshotId>,
    /// The smallest blocks of their devices.
    sector_bytes: u32,
}

/// How often an upload looks whether anyone still wants it.
const LOOK: Duration = Duration::from_secs(1);
/// The most threads of an upload, each with some MiB of buffers.
const MOST_THREADS: usize = 16;

/// Copies on their way to a repository. No other process works on them while this is there.
#[derive(Debug)]
pub struct Upload {
    pool: Pool,
    state: UploadState,
    ahead: Option<Ahead>,
    _lock: Lock,
}

/// The id of the upload that made a snapshot: the one that [`resolve`](super::resolve) takes.
pub fn upload_of(record: &SnapshotRecord) -> SnapshotId {
    record.metadata.get(UPLOAD).and_then(|id| id.parse().ok()).unwrap_or(record.id)
}

/// The blocks that devices of a snapshot's volumes had, as far as that is known: file systems may not go with larger ones.
pub fn sector_bytes_of(record: &SnapshotRecord) -> Option<u32> {
    record.metadata.get(SECTOR_BYTES)?.parse().ok()
}

/// The ids of all uploads of a pool that have not ended, the oldest first. Someone may be working on them.
pub fn pending(pool: &Pool) -> Result<Vec<SnapshotId>> {
    let names = entries(&place::directory(pool))?.into_iter();
    let ids = names.filter_map(|name| name.to_str()?.strip_suffix(".json")?.parse().ok());
    let mut ids: Vec<SnapshotId> = ids.collect();
    ids.sort_unstable();
    Ok(ids)
}

/// Deletes uploads, with their copies, whose taking ended in a crash. Gives their files.
pub fn discard_unfinished(pool: &Pool) -> Result<Vec<PathBuf>> {
    let mut discarded = Vec::new();
    for id in pending(pool)? {
        match Upload::open_any(pool, id, Duration::ZERO) {
            Ok(upload) if !upload.state.ready => {
                upload.give_up()?;
                discarded.push(place::path(pool, id));
            }
            // Someone works on it or has just ended it.
            Ok(_) | Err(Error::Busy { .. } | Error::Unknown { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(discarded)
}

/// True while someone works on an upload.
pub fn is_being_done(pool: &Pool, id: SnapshotId) -> Result<bool> {
    match Upload::open_any(pool, id, Duration::ZERO) {
        Err(Error::Busy { .. }) => Ok(true),
        Ok(_) | Err(Error::Unknown { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Gives an upload up, and forgets it with its copies. Succeeds where there is none. [`Error::Busy`] while someone works on
/// it: he is told, and does the same soon.
pub fn discard(pool: &Pool, id: SnapshotId) -> Result<()> {
    let path = place::unwanted_path(pool, id);
    if !place::path(pool, id).exists() {
        remove(&path);
        return Ok(());
    }
    std::fs::write(&path, b"").map_err(Error::io("write", &path))?;
    match Upload::open_any(pool, id, Duration::ZERO) {
        Ok(upload) => upload.give_up(),
        Err(Error::Unknown { .. }) => {
            // It ended meanwhile, and removed this before it was written.
            remove(&path);
            Ok(())
        }
        Err(error) => Err(error),
    }
}

impl Upload {
    pub(super) fn new(pool: &Pool, state: UploadState, lock: Lock) -> Self {
        Self { pool: pool.clone(), state, ahead: None, _lock: lock }
    }

    /// Takes an upload to go on with it. Errors: [`Error::Busy`] while someone works on it, [`Error::Unknown`].
    pub fn open(pool: &Pool, id: SnapshotId) -> Result<Self> {
        Self::open_within(pool, id, Duration::ZERO)
    }

    /// The same with patience: others may just be looking at it.
    pub fn open_within(pool: &Pool, id: SnapshotId, wait: Duration) -> Result<Self> {
        let upload = Self::open_any(pool, id, wait)?;
        if upload.state.ready { Ok(upload) } else { Err(unknown(pool, "upload", id)) }
    }

    fn open_any(pool: &Pool, id: SnapshotId, wait: Duration) -> Result<Self> {
        let path = place::path(pool, id);
        if !path.exists() {
            return Err(unknown(pool, "upload", id));
        }
        let what = format!("upload {id}");
        let lock = Lock::acquire(&place::lock_path(pool, id), &what, wait)?;
        match state::read::<UploadState>(&path)? {
            Some(state) if state.id == id => Ok(Self::new(pool, state, lock)),
            Some(state) => {
                let detail = format!("it is that of upload {}", state.id);
                Err(Error::Damaged { path, detail })
            }
            None => {
                // It ended just now. The lock file was made again.
                let _ = std::fs::remove_file(place::lock_path(pool, id));
                Err(unknown(pool, "upload", id))
            }
        }
    }

    /// Gives it what was read ahead for it ([`read_ahead`](super::read_ahead)).
    pub fn set_ahead(&mut self, ahead: Ahead) {
        self.ahead = Some(ahead);
    }

    /// Its id.
    pub fn id(&self) -> SnapshotId {
        self.state.id
    }

    /// What is noted about it.
    pub fn state(&self) -> &UploadState {
        &self.state
    }

    /// Where it goes.
    pub fn target(&self) -> &Target {
        &self.state.target
    }

    pub(super) fn save(&self) -> Result<()> {
        state::write(&place::path(&self.pool, self.state.id), &self.state)
    }

    pub(super) fn set_ready(&mut self) -> Result<()> {
        self.state.ready = true;
        self.save()
    }

    /// Uploads the copies to the repository of its target, makes them the bases of the next snapshots, and gives the
    /// snapshot. After an error it can be done again, by this or another process. [`Error::Cancelled`] also where nobody
    /// wants it any more ([`discard`]): then it is given up.
    pub async fn run(&mut self, repo: &Repository, ctx: &Context) -> Result<SnapshotRecord> {
        let unwanted = place::unwanted_path(&self.pool, self.state.id);
        let is_unwanted = || async { tokio::fs::try_exists(&unwanted).await.unwrap_or(false) };
        let wanted = Context { cancel: ctx.cancel.child_token(), ..ctx.clone() };
        let uploaded = {
            let mut upload = pin!(self.upload(repo, &wanted));
            loop {
                if is_unwanted().await {
                    wanted.cancel.cancel();
                }
                tokio::select! {
                    uploaded = &mut upload => break uploaded,
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        };
        if uploaded.is_err() && is_unwanted().await {
            let (pool, state) = (self.pool.clone(), self.state.clone());
            blocking(move || delete_copies(&pool, &state)).await?;
            self.forget();
            return Err(Error::Cancelled);
        }
        uploaded
    }

    async fn upload(&mut self, repo: &Repository, ctx: &Context) -> Result<SnapshotRecord> {
        let mut committed = match self.state.committed {
            // It may have been deleted since.
            Some(id) => match repo.committed(id).await? {
                Some(record) => Some(record),
                None => Some(repo.find(&SnapshotRef::Id(id)).await?),
            },
            None => self.settle(repo, ctx).await?,
        };
        if committed.is_none() {
            committed = Some(self.store(repo, ctx).await?);
        }
        let record = committed.ok_or(Error::Internal("an upload without a snapshot"))?;
        if self.state.committed.is_none() {
            self.state.committed = Some(record.id);
            self.save()?;
        }
        let (pool, volumes) = (self.pool.clone(), self.state.volumes.clone());
        let (repository, snapshot) = (repo.config().id, record.id);
        blocking(move || {
            volumes.iter().try_for_each(|v| become_base(&pool, v, repository, snapshot))
        })
        .await?;
        self.forget();
        Ok(record)
    }

    /// Ends sessions of processes that died: none of them commits from now on. Gives the snapshot of one that has.
    async fn settle(&mut self, repo: &Repository, ctx: &Context) -> Result<Option<SnapshotRecord>> {
        let Target { experiment, run, .. } = &self.state.target;
        for session in &self.state.sessions {
            let settled = Session::settle(repo, *session, experiment, run, ctx).await?;
            if settled.is_some() {
                return Ok(settled);
            }
        }
        self.state.sessions.clear();
        Ok(None)
    }

    async fn store(&mut self, repo: &Repository, ctx: &Context) -> Result<SnapshotRecord> {
        let Target { experiment, run, name, labels, message, mut metadata, .. } =
            self.state.target.clone();
        metadata.insert(UPLOAD.to_owned(), self.state.id.to_string());
        let Sources { volumes, parent, sector_bytes } = self.sources(repo)?;
        metadata.insert(SECTOR_BYTES.to_owned(), sector_bytes.to_string());
        let request = SnapshotRequest {
            experiment,
            run,
            name,
            labels,
            message,
            metadata,
            parent: parent.map_or(Parent::Auto, Parent::Snapshot),
            volumes,
        };
        let cancel = ctx.cancel.child_token();
        let host = Arc::new(NotingHost {
            host: ctx.host.clone(),
            path: place::path(&self.pool, self.state.id),
            state: Mutex::new(self.state.clone()),
            failure: Mutex::default(),
            cancel: cancel.clone(),
        });
        let mut ctx = Context { host: host.clone(), cancel, ..ctx.clone() };
        ctx.limits.threads = threads(ctx.limits.threads);
        let ahead = self.ahead.take();
        let taken = match snapshot_after(ahead, repo, request.clone(), &ctx).await {
            // The parent was purged. What has changed since is not known then.
            Err(EngineError::Unknown { .. }) if parent.is_some() => {
                snapshot(repo, SnapshotRequest { parent: Parent::Auto, ..request }, &ctx).await
            }
            taken => taken,
        };
        self.state = host.state.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match host.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(failure) => Err(failure),
            None => Ok(taken?),
        }
    }

    /// The copies as sources.
    fn sources(&self, repo: &Repository) -> Result<Sources> {
        let rate = self.state.rate_bytes_per_s.map(|rate| Arc::new(Rate::new(rate)));
        let mut volumes: Vec<(Name, Arc<dyn Source>)> =
            Vec::with_capacity(self.state.volumes.len());
        let (mut parent, mut sector_bytes) = (None, LARGEST_SECTOR_BYTES);
        for part in &self.state.volumes {
            let Some((volume, state)) = find(&self.pool, part)? else {
                return Err(unknown(&self.pool, "volume", part.id));
            };
            if !state.copies.contains(&part.copy) {
                return Err(unknown(&self.pool, "copy", part.copy));
            }
            sector_bytes = sector_bytes.min(state.sector_bytes);
            let mut source =
                CopySource::open(&volume.copy_image(part.copy))?.with_rate(rate.clone());
            // What is known of the past of one volume says nothing about another of the same snapshot.
            let base = state
                .base
                .filter(|base| base.repository == repo.config().id && base.copy != part.copy);
            if let Some(base) = base {
                let path = volume.copy_image(base.copy);
                source = source.with_base(&path, base.snapshot, base.volume)?;
                parent.get_or_insert(base.snapshot);
            }
            volumes.push((part.name.clone(), Arc::new(source)));
        }
        Ok(Sources { volumes, parent, sector_bytes })
    }

    /// Deletes the copies and forgets the upload, without a snapshot.
    pub fn give_up(self) -> Result<()> {
        delete_copies(&self.pool, &self.state)?;
        self.forget();
        Ok(())
    }

    /// Removes its files.
    pub(super) fn forget(&self) {
        let (pool, id) = (&self.pool, self.state.id);
        // The lock's file last: while it is there, nobody takes the upload for one that can be gone on with.
        remove(&files::spare_of(&place::path(pool, id)));
        remove(&place::path(pool, id));
        remove(&place::unwanted_path(pool, id));
        remove(&place::lock_path(pool, id));
    }
}

/// How many threads to use where so many have work. A copy is read past the page cache, where nothing is read ahead, so
/// that each of them waits for the disk for half of the time.
pub(super) fn threads(busy: usize) -> usize {
    (2 * busy).min(MOST_THREADS).max(busy)
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "can't be removed");
    }
}

/// Deletes the copies of an upload, as far as they are there.
fn delete_copies(pool: &Pool, state: &UploadState) -> Result<()> {
    for part in &state.volumes {
        if let Some((volume, _)) = find(pool, part)? {
            let mut locked = volume.lock()?;
            if locked.state().copies.contains(&part.copy) {
                locked.delete_copy(part.copy)?;
            }
        }
    }
    Ok(())
}

/// The volume of a part, if it is still the same.
fn find(pool: &Pool, part: &UploadVolume) -> Result<Option<(Volume, state::VolumeState)>> {
    let volume = match pool.volume(&part.volume) {
        Err(Error::Unknown { .. }) => return Ok(None),
        volume => volume?,
    };
    match volume.state() {
        Ok(state) if state.id == part.id => Ok(Some((volume, state))),
        Ok(_) | Err(Error::Unknown { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes a copy that was stored the base of the next snapshot, unless there is a newer one. Can be repeated.
fn become_base(
    pool: &Pool,
    part: &UploadVolume,
    repository: SnapshotId,
    snapshot: SnapshotId,
) -> Result<()> {
    let Some((volume, _)) = find(pool, part)? else { return Ok(()) };
    let mut locked = volume.lock()?;
    let state = locked.state();
    if state.id != part.id || !state.copies.contains(&part.copy) {
        return Ok(());
    }
    if state.base.as_ref().is_some_and(|base| base.copy > part.copy) {
        return locked.delete_copy(part.copy);
    }
    let (copy, volume) = (part.copy, part.name.clone());
    locked.set_base(BaseState { copy, repository, snapshot, volume })
}

fn unknown(pool: &Pool, what: &'static str, id: SnapshotId) -> Error {
    Error::Unknown { what, name: id.to_string(), within: pool.to_string(), known: vec![] }
}

/// Gives sessions the ids that follow the upload's, and notes them before they begin.
#[derive(Debug)]
struct NotingHost {
    host: Arc<dyn Host>,
    path: PathBuf,
    state: Mutex<UploadState>,
    failure: Mutex<Option<Error>>,
    /// Ends the work of whoever got an id that could not be noted.
    cancel: CancellationToken,
}

impl NotingHost {
    fn note(&self) -> Result<SnapshotId> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut noted = state.clone();
        let id = noted.id.nth_after(noted.attempts);
        noted.attempts += 1;
        noted.sessions.push(id);
        state::write(&self.path, &noted)?;
        *state = noted;
        Ok(id)
    }
}

impl Host for NotingHost {
    fn unix_ms(&self) -> u64 {
        self.host.unix_ms()
    }

    fn random(&self) -> u128 {
        self.host.random()
    }

    fn new_id(&self) -> SnapshotId {
        self.note().unwrap_or_else(|error| {
            // After a crash the next process would use it again, and two sessions must never have one id.
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            self.cancel.cancel();
            self.host.new_id()
        })
    }
}
