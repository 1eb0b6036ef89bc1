//! Taking copies of some volumes at one point in time.

use std::collections::HashSet;
use std::fs::File;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use petra_engine::Name;

use super::hook::Hook;
use super::state::{self as place, Target, UploadState, UploadVolume};
use super::upload::Upload;
use crate::error::{Error, Result};
use crate::freeze::{GuardCommand, while_frozen};
use crate::pool::lock::{self, Lock};
use crate::pool::{Pool, state};
use crate::sys::files;
use crate::volume::{LockedVolume, NewCopy};

/// The longest wait for deletions that are under way: a later snapshot is better than a long pause.
pub(crate) const SETTLE: Duration = Duration::from_secs(20);

/// What to take a snapshot of.
#[derive(Clone, Debug)]
pub struct GroupRequest {
    /// What it is called, and where it goes.
    pub target: Target,
    /// The names of volumes in the pool, and of what they are in the snapshot, in its order.
    pub volumes: Vec<(Name, Name)>,
    /// Runs before the freeze. If it fails there is no snapshot.
    pub before: Option<Hook>,
    /// Runs after the thaw, and also when there is no snapshot.
    pub after: Option<Hook>,
    /// Starts a freeze guard.
    pub guard: GuardCommand,
    /// The longest freeze.
    pub limit: Duration,
    /// The most to read in a second while uploading, in bytes.
    pub rate_bytes_per_s: Option<u64>,
}

/// Copies that were taken.
#[derive(Debug)]
pub struct Taken {
    /// What remains to be done. It is noted in the pool, so that another process can do it as well.
    pub upload: Upload,
    /// How long applications could not write.
    pub pause: Duration,
    /// Why the hook after the freeze failed. The copies are good all the same.
    pub hook_failure: Option<Error>,
}

/// One volume of a group.
#[derive(Debug)]
struct Part {
    locked: LockedVolume,
    /// In the snapshot.
    name: Name,
    copy: NewCopy,
    /// Where its file system is mounted.
    mount: Option<PathBuf>,
    /// Its device, if it is attached.
    device: Option<PathBuf>,
}

impl Part {
    fn begin(locked: LockedVolume, name: Name) -> Result<Self> {
        let volume = locked.volume();
        let mount = volume.mounts()?.into_iter().next();
        let device = volume.attachment()?.map(|attachment| attachment.device);
        let copy = locked.begin_copy()?;
        Ok(Self { locked, name, copy, mount, device })
    }

    /// Takes the copy. A mounted file system is frozen meanwhile.
    fn finish(&self) -> Result<()> {
        if let (None, Some(device)) = (&self.mount, &self.device) {
            // Someone may write to the device itself. What he wrote before is to be in the copy.
            let opened = File::open(device).and_then(|file| file.sync_all());
            opened.map_err(Error::io("sync", device))?;
        }
        self.copy.finish()
    }
}

/// Takes copies of some volumes at one point in time, and notes that they are to be uploaded. After an error no copy is
/// left. Blocks.
pub fn take(pool: &Pool, request: &GroupRequest) -> Result<Taken> {
    pool.backend().settle(pool.root(), SETTLE)?;
    let parts = begin(pool, request)?;
    let run = |hook: &Option<Hook>| hook.as_ref().map_or(Ok(()), Hook::run);
    let mounts: Vec<PathBuf> = parts.iter().filter_map(|part| part.mount.clone()).collect();
    let frozen = run(&request.before).and_then(|()| {
        let refresh = || parts.iter().try_for_each(|part| part.copy.refresh());
        while_frozen(&mounts, &request.guard, request.limit, refresh, || finish_all(&parts))
    });
    let hook_failure = run(&request.after).err();
    let ((), pause) = frozen?;
    let upload = keep(pool, request, parts)?;
    Ok(Taken { upload, pause, hook_failure })
}

/// Locks the volumes and begins their copies.
fn begin(pool: &Pool, request: &GroupRequest) -> Result<Vec<Part>> {
    if request.volumes.is_empty() {
        return Err(Error::Request("a snapshot needs at least one volume".to_owned()));
    }
    let (mut volumes, mut names) = (HashSet::new(), HashSet::new());
    for (volume, name) in &request.volumes {
        if !volumes.insert(volume) {
            return Err(Error::Request(format!("volume {volume} is named twice")));
        }
        if !names.insert(name) {
            return Err(Error::Request(format!("two volumes are to be {name} in the snapshot")));
        }
    }
    // In one order for all, so that two groups do not wait for each other.
    let mut order: Vec<usize> = (0..request.volumes.len()).collect();
    order.sort_by_key(|at| request.volumes.get(*at));
    let mut locked = Vec::with_capacity(order.len());
    for at in order {
        if let Some((volume, name)) = request.volumes.get(at) {
            locked.push((at, pool.volume(volume)?.lock()?, name.clone()));
        }
    }
    locked.sort_by_key(|(at, ..)| *at);
    locked.into_iter().map(|(_, locked, name)| Part::begin(locked, name)).collect()
}

/// Takes all copies at the same time: the slowest one is waited for, and not the sum.
fn finish_all(parts: &[Part]) -> Result<()> {
    if let [part] = parts {
        return part.finish();
    }
    thread::scope(|scope| {
        let threads: Vec<_> = parts
            .iter()
            .map(|part| thread::Builder::new().spawn_scoped(scope, || part.finish()))
            .collect();
        let mut result = Ok(());
        for thread in threads {
            let finished = match thread {
                Ok(thread) => {
                    thread.join().unwrap_or(Err(Error::Internal("a copying thread panicked")))
                }
                Err(_) => Err(Error::Internal("no threads can be started")),
            };
            result = result.and(finished);
        }
        result
    })
}

/// Notes the upload and keeps the copies.
fn keep(pool: &Pool, request: &GroupRequest, parts: Vec<Part>) -> Result<Upload> {
    let id = pool.host().new_id();
    let directory = place::directory(pool);
    std::fs::create_dir_all(&directory).map_err(Error::io("create", &directory))?;
    files::sync_directory(pool.root()).map_err(Error::io("sync", pool.root()))?;
    let what = format!("upload {id}");
    let lock = Lock::acquire(&place::lock_path(pool, id), &what, lock::WAIT)?;
    let now = i64::try_from(pool.host().unix_ms()).unwrap_or_default();
    let state = UploadState {
        format: state::FORMAT,
        id,
        created: Timestamp::from_millisecond(now).unwrap_or(Timestamp::UNIX_EPOCH),
        ready: false,
        target: request.target.clone(),
        rate_bytes_per_s: request.rate_bytes_per_s,
        volumes: parts
            .iter()
            .map(|part| UploadVolume {
                volume: part.locked.volume().name().clone(),
                id: part.locked.state().id,
                name: part.name.clone(),
                copy: part.copy.id(),
            })
            .collect(),
        sessions: vec![],
        attempts: 0,
        committed: None,
    };
    let mut upload = Upload::new(pool, state, lock);
    let mut kept = Vec::with_capacity(parts.len());
    let keep_all = || {
        upload.save()?;
        for part in parts {
            let Part { mut locked, copy, .. } = part;
            let copy = locked.keep_copy(copy, |_| {})?;
            kept.push((locked, copy));
        }
        upload.set_ready()
    };
    if let Err(error) = keep_all() {
        for (mut locked, copy) in kept {
            if let Err(error) = locked.delete_copy(copy) {
                tracing::warn!(volume = %locked.volume(), %error, "a copy is left");
            }
        }
        upload.forget();
        return Err(error);
    }
    Ok(upload)
}
