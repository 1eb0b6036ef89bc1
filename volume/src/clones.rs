//! Making a volume of a pool from a snapshot of a repository.
//!
//! Where the pool has a copy that holds what the snapshot holds, the volume is a copy by reference and complete at once.
//! Elsewhere it is *lazy*: an empty image, whose data is fetched when it is touched and in the background
//! ([`crate::lazy`]). Until all of it is here, a pin in the repository keeps the snapshot readable.
//!
//! A clone may be larger than what it is made from: its file system then grows at the next mount.

mod live;

use std::collections::BTreeMap;
use std::time::Duration;

pub use live::{CopyRequest, copy};

use petra_engine::clone::ClonePin;
use petra_engine::record::{SnapshotRecord, VolumeRecord};
use petra_engine::{Context, Name, Repository};

use crate::error::{Error, Result};
use crate::pool::pins::{self, blocking};
use crate::pool::{
    BaseState, Content, CreateRequest, Filesystem, LARGEST_SECTOR_BYTES, LazyState, Pool,
};
use crate::snapshot::sector_bytes_of;
use crate::volume::{LockedVolume, Volume};

/// The blocks of a clone's device where nobody knows those of its origin: whatever was used before works with the
/// smallest ones.
const SMALLEST_SECTOR_BYTES: u32 = 512;

/// How long a clone by reference waits for its turn: another one takes milliseconds.
const REFERENCE_WAIT: Duration = Duration::from_secs(2);

/// A clone to make.
#[derive(Clone, Debug)]
pub struct CloneRequest {
    /// The name of the new volume.
    pub name: Name,
    /// The snapshot.
    pub snapshot: SnapshotRecord,
    /// The volume of it.
    pub volume: VolumeRecord,
    /// The repository's URL, by which the agent opens it later.
    pub repository: String,
    /// The whole URL, for people.
    pub origin: String,
    /// Delete the volume when it is unmounted.
    pub ephemeral: bool,
    /// Something else keeps the snapshot's data as long as there is the volume, which then has no pin of its own: the
    /// snapshot may be a purged one, of which none can be taken any more.
    pub held: bool,
    /// The new volume's length in bytes, if it is not that of the snapshot's.
    pub size_bytes: Option<u64>,
    /// Whatever is to be remembered with the new volume.
    pub metadata: BTreeMap<String, String>,
}

impl CloneRequest {
    /// The length of the new volume.
    fn len_bytes(&self) -> Result<u64> {
        larger(&self.name, self.size_bytes, self.volume.len_bytes)
    }

    /// The volume's number in the snapshot, from 1.
    fn number(&self) -> u32 {
        let before =
            self.snapshot.volumes.iter().take_while(|volume| volume.name != self.volume.name);
        before.count() as u32 + 1
    }
}

/// How a clone was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// By reference to a copy on this machine: all its data is here.
    Reference,
    /// Its data comes when it is needed.
    Lazy,
}

/// Makes a volume from a snapshot. After an error there is neither a volume nor, as far as the repository can be
/// reached, a pin.
pub async fn clone(
    pool: &Pool,
    repo: &Repository,
    request: &CloneRequest,
    ctx: &Context,
) -> Result<(Volume, How)> {
    request.len_bytes()?;
    if let Some(volume) = by_reference(pool, repo, request).await? {
        return Ok((volume, How::Reference));
    }
    let pin = ctx.host.new_id();
    let (url, snapshot) = (request.repository.clone(), request.snapshot.id);
    let noted = blocking({
        let pool = pool.clone();
        move || pool.note_pin(&url, snapshot, pin)
    })
    .await?;
    let number = request.number();
    let taking = async {
        match request.held {
            true => Ok(ClonePin::taken(repo, pin, snapshot)),
            false => ClonePin::take_as(repo, pin, snapshot, ctx).await,
        }
    };
    let (pin, start) = futures::join!(taking, repo.start_list(snapshot, number));
    let pin = pin?;
    let mut create = create_request(request, Content::Empty)?;
    create.lazy = Some(LazyState {
        repository: request.repository.clone(),
        snapshot,
        number,
        volume: request.volume.clone(),
        pin: pin.id(),
        // Without one the mount takes longer.
        start: start.unwrap_or_default(),
        hydrated: false,
        fill: false,
    });
    let made = create_volume(pool, create).await;
    // Where the repository is away now, the note makes someone end the pin later.
    if made.is_ok() || pin.end(ctx).await.is_ok() {
        noted.forget()?;
    }
    Ok((made?, How::Lazy))
}

/// Makes the clone from a copy in the pool, if there is one.
async fn by_reference(
    pool: &Pool,
    repo: &Repository,
    request: &CloneRequest,
) -> Result<Option<Volume>> {
    let (pool, repository, request) = (pool.clone(), repo.config().id, request.clone());
    blocking(move || {
        for volume in pool.volumes()? {
            let Some(base) = base_of(&volume, repository, &request) else { continue };
            // Its lock keeps the copy where it is. A volume that is busy for long is no reason to wait: there is another way.
            let Ok(locked) = volume.lock_for(REFERENCE_WAIT) else { continue };
            if base_of(&volume, repository, &request).as_ref() != Some(&base) {
                continue;
            }
            let sector_bytes = locked.state().sector_bytes;
            let filesystem = locked.state().filesystem;
            let copy = volume.copy(base.copy);
            let mut create = create_request(&request, Content::CopyOf(copy))?;
            (create.sector_bytes, create.filesystem) = (sector_bytes, filesystem);
            // Nobody takes a snapshot of what lives for one mount.
            create.base = (!request.ephemeral).then_some(base);
            return pool.create(create).map(Some);
        }
        Ok(None)
    })
    .await
}

/// The base of a volume, if it holds what is to be cloned. A volume that can't be read is not asked.
fn base_of(
    volume: &Volume,
    repository: petra_engine::SnapshotId,
    request: &CloneRequest,
) -> Option<BaseState> {
    let fits = |base: &BaseState| {
        base.repository == repository
            && base.snapshot == request.snapshot.id
            && base.volume == request.volume.name
    };
    volume.state().ok()?.base.filter(fits)
}

fn create_request(request: &CloneRequest, content: Content) -> Result<CreateRequest> {
    let size_bytes = request.len_bytes()?;
    let sector_bytes = sector_bytes_of(&request.snapshot).filter(|sector_bytes| {
        *sector_bytes == LARGEST_SECTOR_BYTES && size_bytes.is_multiple_of((*sector_bytes).into())
    });
    Ok(CreateRequest {
        name: request.name.clone(),
        size_bytes,
        sector_bytes: sector_bytes.unwrap_or(SMALLEST_SECTOR_BYTES),
        // What it holds shows when it is mounted.
        filesystem: Filesystem::Raw,
        content,
        base: None,
        origin: Some(request.origin.clone()),
        lazy: None,
        ephemeral: request.ephemeral,
        grow_filesystem: size_bytes > request.volume.len_bytes,
        metadata: request.metadata.clone(),
    })
}

/// The length of a volume that is made from one of `source_bytes`.
fn larger(name: &Name, asked: Option<u64>, source_bytes: u64) -> Result<u64> {
    let size_bytes = asked.unwrap_or(source_bytes);
    if size_bytes >= source_bytes {
        return Ok(size_bytes);
    }
    Err(Error::Request(format!(
        "volume {name} can't have {size_bytes} bytes: what it is made from has {source_bytes}"
    )))
}

async fn create_volume(pool: &Pool, request: CreateRequest) -> Result<Volume> {
    let pool = pool.clone();
    blocking(move || pool.create(request)).await
}

/// Deletes a volume. If it is a lazy clone, its pin stays noted in the pool until [`pins::settle`] has ended it.
pub fn delete(volume: LockedVolume, copies_matter: bool) -> Result<()> {
    let pool = volume.volume().pool().clone();
    let Some(lazy) = volume.state().lazy.clone().filter(|lazy| !lazy.hydrated) else {
        return volume.delete(copies_matter).map(drop);
    };
    match pins::note_end(&pool, &lazy) {
        // In a full pool there is room for the note when the volume is gone.
        Err(error) if error.is_full() => {
            volume.delete(copies_matter)?;
            pins::note_end(&pool, &lazy).map(drop)
        }
        // If the volume stays after all, settling forgets the note.
        noted => noted.and_then(|_noted| volume.delete(copies_matter).map(drop)),
    }
}

impl LockedVolume {
    /// Makes a clone whose data is all here, and that nobody uses, a volume like any other. Says whether it is one now.
    pub fn become_plain(&mut self) -> Result<bool> {
        let Some(lazy) = &self.state().lazy else { return Ok(true) };
        if !lazy.hydrated || self.volume().attachment()?.is_some() {
            return Ok(false);
        }
        self.end_server()?;
        self.change(|state| state.lazy = None)?;
        let presence = self.volume().presence();
        match std::fs::remove_file(&presence) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("delete", presence)(error))
            }
            _ => Ok(true),
        }
    }
}

/// What a volume's beginning says about the file system on it.
pub fn detect(beginning: &[u8]) -> Filesystem {
    let holds = |at: usize, magic: &[u8]| beginning.get(at..at + magic.len()) == Some(magic);
    if holds(0, b"XFSB") {
        Filesystem::Xfs
    } else if holds(0x10040, b"_BHRfS_M") {
        Filesystem::Btrfs
    } else if holds(0x438, &[0x53, 0xef]) {
        Filesystem::Ext4
    } else {
        Filesystem::Raw
    }
}

/// Bytes of a volume's beginning that [`detect`] looks at.
pub const DETECT_BYTES: usize = 0x10048;

impl From<How> for &'static str {
    fn from(how: How) -> Self {
        match how {
            How::Reference => "reference",
            How::Lazy => "lazy",
        }
    }
}
