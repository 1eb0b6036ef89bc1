//! Volumes of the pool: empty ones, and those made from snapshots and from other volumes.
//!
//! A volume remembers the call that made it, so that the same call finds it again, and another one that wants something
//! else by its name is refused. Two such calls at a time both try, and the slower one finds what the other has made.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use petra_engine::record::VolumeRecord;
use petra_engine::{Name, SnapshotId};
use petra_volume::clones::{self, CloneRequest, CopyRequest};
use petra_volume::pool::{
    CreateRequest, Filesystem, MAX_VOLUME_BYTES, VolumeState, min_volume_bytes, pins,
};
use petra_volume::snapshot::{MAX_ATTEMPTS, resolve};
use petra_volume::{Error, LockedVolume, Volume as PoolVolume, freeze};
use tonic::Status;

use super::{LocalAgent, name_of};
use crate::agent::{
    ASKED_FILESYSTEM, ASKED_SIZE, ASKED_SOURCE, AnnotateVolumeRequest, CSI_NAME,
    CreateVolumeRequest, ExpandVolumeRequest, Repository, SnapshotSource, Source, Volume,
};
use crate::failure::{of_engine, of_volume};
use crate::repositories::Secrets;

/// Sizes are multiples of this, except that of a clone that is as large as its source.
pub(super) const ROUND_BYTES: u64 = 4096;

impl LocalAgent {
    pub(super) async fn make_volume(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        let name = name_of("volume", &request.name)?;
        let wanted = Wanted::of(&request)?;
        if let Some(volume) = self.made_before(&name, &wanted).await? {
            return Ok(volume);
        }
        let made = match &request.source {
            None => self.make_empty(name.clone(), &wanted, request.size_bytes).await,
            Some(Source::Volume(source)) => {
                let source = name_of("volume", source)?;
                self.make_from_volume(name.clone(), &wanted, source, request.size_bytes).await
            }
            Some(Source::Snapshot(source)) => {
                self.make_from_snapshot(name.clone(), &wanted, source, request.size_bytes).await
            }
        };
        match made {
            Ok(volume) => pins::blocking(move || describe(&volume)).await.map_err(of_volume),
            // Another call was faster.
            Err(Failed::Volume(exists @ Error::Exists { .. })) => {
                match self.made_before(&name, &wanted).await? {
                    Some(volume) => Ok(volume),
                    None => Err(of_volume(exists)),
                }
            }
            Err(Failed::Volume(error)) => Err(of_volume(error)),
            Err(Failed::Status(status)) => Err(status),
        }
    }

    /// The volume that was made by the same call. `ALREADY_EXISTS` where it was another one.
    async fn made_before(&self, name: &Name, wanted: &Wanted) -> Result<Option<Volume>, Status> {
        let found = match self.find_volume(name.clone()).await {
            Err(status) if status.code() == tonic::Code::NotFound => return Ok(None),
            found => found?,
        };
        match wanted.differs(&found.metadata) {
            None => Ok(Some(found)),
            Some(how) => Err(Status::already_exists(format!("volume {name} exists already {how}"))),
        }
    }

    async fn make_empty(
        &self,
        name: Name,
        wanted: &Wanted,
        asked_bytes: u64,
    ) -> Result<PoolVolume, Failed> {
        let size_bytes = size_of(asked_bytes, None)?;
        let min_bytes = min_volume_bytes(wanted.filesystem);
        if size_bytes < min_bytes {
            return Err(Failed::Status(Status::out_of_range(format!(
                "a volume with {} has at least {min_bytes} bytes, not {size_bytes}",
                wanted.filesystem
            ))));
        }
        let mut create = CreateRequest::new(name, size_bytes, wanted.filesystem);
        create.metadata = wanted.metadata.clone();
        let pool = self.pool().clone();
        Ok(pins::blocking(move || pool.create(create)).await?)
    }

    async fn make_from_volume(
        &self,
        name: Name,
        wanted: &Wanted,
        source: Name,
        asked_bytes: u64,
    ) -> Result<PoolVolume, Failed> {
        let (pool, guard) = (self.pool().clone(), self.0.guard.clone());
        let (metadata, of) = (wanted.metadata.clone(), source.clone());
        let made = tokio::task::spawn_blocking(move || {
            let state = pool.volume(&source)?.state()?;
            let request = CopyRequest {
                name,
                source,
                size_bytes: Some(size_of(asked_bytes, Some(state.size_bytes))?),
                metadata,
                guard,
                limit: freeze::TIME_LIMIT,
            };
            Ok(clones::copy(&pool, &request)?)
        });
        let made = made.await.map_err(|_| Status::internal("work on a pool panicked"))?;
        if let Err(Failed::Volume(Error::Hydrating { .. })) = &made {
            self.fill(vec![of]).await;
        }
        made
    }

    /// Has the data of lazy clones brought here for who needs all of it, also while no pod uses them. Whoever asked comes
    /// again until it is there.
    pub(super) async fn fill(&self, names: Vec<Name>) {
        let inner = self.0.clone();
        let filled = pins::blocking(move || {
            for name in names {
                inner.pool.volume(&name)?.lock()?.fill(&inner.serving)?;
            }
            Ok(())
        });
        if let Err(error) = filled.await {
            tracing::warn!(%error, "a lazy clone is not filled yet");
        }
    }

    async fn make_from_snapshot(
        &self,
        name: Name,
        wanted: &Wanted,
        source: &SnapshotSource,
        asked_bytes: u64,
    ) -> Result<PoolVolume, Failed> {
        let missing = || Status::invalid_argument("the snapshot's repository is missing");
        let (url, repository) = self.open(source.repository.as_ref().ok_or_else(missing)?).await?;
        let snapshot = resolve(&repository, id_of(&source.snapshot)?, MAX_ATTEMPTS).await;
        let snapshot = snapshot.map_err(of_engine)?;
        let volume = snapshot.volumes.iter().find(|volume| volume.name.as_str() == source.volume);
        let unknown = || {
            let text = format!("snapshot {} has no volume {:?}", snapshot.id, source.volume);
            Status::not_found(text)
        };
        let volume: VolumeRecord = volume.ok_or_else(unknown)?.clone();
        let request = CloneRequest {
            name,
            size_bytes: Some(size_of(asked_bytes, Some(volume.len_bytes))?),
            repository: url.to_string(),
            origin: source.origin.clone(),
            ephemeral: false,
            held: false,
            metadata: wanted.metadata.clone(),
            snapshot,
            volume,
        };
        let ctx = &self.0.ctx;
        Ok(clones::clone(self.pool(), &repository, &request, ctx).await?.0)
    }

    /// Makes an ephemeral clone of a snapshot's volume, for a volume that many nodes read: number `number` of the
    /// snapshot, from 1. Finds one that was made before. Something else holds the snapshot, so it may be a deleted one.
    pub async fn clone_read_only(
        &self,
        repository: &Repository,
        snapshot: SnapshotId,
        number: u32,
        name: Name,
    ) -> Result<PoolVolume, Status> {
        let (agent, repository) = (self.clone(), repository.clone());
        super::to_its_end(
            async move { agent.make_read_only(&repository, snapshot, number, name).await },
        )
        .await
    }

    async fn make_read_only(
        &self,
        repository: &Repository,
        snapshot: SnapshotId,
        number: u32,
        name: Name,
    ) -> Result<PoolVolume, Status> {
        let origin = format!("{}#@{snapshot}/{number}", repository.url);
        if let Some(volume) = self.ephemeral(&name, &origin).await? {
            return Ok(volume);
        }
        let (url, opened) = self.open(repository).await?;
        let record = match opened.committed(snapshot).await.map_err(of_engine)? {
            Some(record) => record,
            None => resolve(&opened, snapshot, MAX_ATTEMPTS).await.map_err(of_engine)?,
        };
        let position = usize::try_from(number).ok().and_then(|number| number.checked_sub(1));
        let volume = position.and_then(|position| record.volumes.get(position));
        let unknown = || Status::not_found(format!("there is no {origin}"));
        let request = CloneRequest {
            name: name.clone(),
            volume: volume.ok_or_else(unknown)?.clone(),
            snapshot: record,
            repository: url.to_string(),
            origin: origin.clone(),
            ephemeral: true,
            held: true,
            size_bytes: None,
            metadata: BTreeMap::new(),
        };
        match clones::clone(self.pool(), &opened, &request, &self.0.ctx).await {
            Ok((volume, _)) => Ok(volume),
            Err(exists @ Error::Exists { .. }) => {
                self.ephemeral(&name, &origin).await?.ok_or_else(|| of_volume(exists))
            }
            Err(error) => Err(of_volume(error)),
        }
    }

    /// The ephemeral volume of this name. `ALREADY_EXISTS` where it is of something else.
    async fn ephemeral(&self, name: &Name, origin: &str) -> Result<Option<PoolVolume>, Status> {
        let (pool, wanted) = (self.pool().clone(), name.clone());
        let found = pins::blocking(move || {
            let volume = pool.volume(&wanted)?;
            volume.state().map(|state| (volume, state))
        });
        match found.await {
            Err(Error::Unknown { .. }) => Ok(None),
            Ok((volume, state)) if state.ephemeral && state.origin.as_deref() == Some(origin) => {
                Ok(Some(volume))
            }
            Ok(_) => {
                Err(Status::already_exists(format!("volume {name} exists, and is no {origin}")))
            }
            Err(error) => Err(of_volume(error)),
        }
    }

    pub(super) async fn find_volume(&self, name: Name) -> Result<Volume, Status> {
        let pool = self.pool().clone();
        let found = pins::blocking(move || describe(&pool.volume(&name)?));
        found.await.map_err(of_volume)
    }

    pub(super) async fn list_volumes(&self) -> Result<Vec<Volume>, Status> {
        let pool = self.pool().clone();
        let listed = pins::blocking(move || {
            let mut listed = vec![];
            for volume in pool.volumes()? {
                match describe(&volume) {
                    Ok(described) if described.metadata.contains_key(CSI_NAME) => {
                        listed.push(described);
                    }
                    // Somebody else's, or deleted meanwhile.
                    Ok(_) | Err(Error::Unknown { .. }) => {}
                    // Nobody can say whose it is.
                    Err(error) => tracing::warn!(%volume, %error, "a volume can't be read"),
                }
            }
            Ok(listed)
        });
        listed.await.map_err(of_volume)
    }

    pub(super) async fn grow_volume(&self, request: ExpandVolumeRequest) -> Result<Volume, Status> {
        let (pool, name) = (self.pool().clone(), name_of("volume", &request.name)?);
        let of = name.clone();
        let grown = tokio::task::spawn_blocking(move || {
            let mut locked = pool.volume(&name)?.lock()?;
            grow(&mut locked, request.size_bytes)?;
            Ok(describe(locked.volume())?)
        });
        match grown.await.map_err(|_| Status::internal("work on a pool panicked"))? {
            Ok(volume) => Ok(volume),
            Err(Failed::Volume(error)) => {
                if let Error::Hydrating { .. } = &error {
                    self.fill(vec![of]).await;
                }
                Err(of_volume(error))
            }
            Err(Failed::Status(status)) => Err(status),
        }
    }

    pub(super) async fn change_metadata(
        &self,
        request: AnnotateVolumeRequest,
    ) -> Result<Volume, Status> {
        let (pool, name) = (self.pool().clone(), name_of("volume", &request.name)?);
        let changed = pins::blocking(move || {
            let mut locked = pool.volume(&name)?.lock()?;
            locked.change(|state| {
                state.metadata.retain(|key, _| !request.remove.contains(key));
                state.metadata.extend(request.set);
            })?;
            describe(locked.volume())
        });
        changed.await.map_err(of_volume)
    }

    pub(super) async fn remove_volume(&self, name: Name, secrets: Secrets) -> Result<(), Status> {
        let pool = self.pool().clone();
        let removed = pins::blocking(move || {
            let locked = match pool.volume(&name).and_then(|volume| volume.lock()) {
                Err(Error::Unknown { .. }) => return Ok(None),
                locked => locked?,
            };
            let lazy = locked.state().lazy.clone().filter(|lazy| !lazy.hydrated);
            clones::delete(locked, true)?;
            Ok(lazy.map(|lazy| lazy.repository))
        });
        if let Some(url) = removed.await.map_err(of_volume)? {
            // It is noted: if it fails now, it is tried again.
            let agent = self.clone();
            tokio::spawn(async move {
                if let Err(status) = agent.keep_secrets(&url, &secrets).await {
                    tracing::warn!(url, error = status.message(), "the secrets don't open it");
                }
                agent.settle_pins_of(url).await;
            });
        }
        Ok(())
    }
}

/// Why there is no new volume.
enum Failed {
    Volume(Error),
    Status(Status),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Volume(error)
    }
}

impl From<Status> for Failed {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

/// What a call wants.
struct Wanted {
    filesystem: Filesystem,
    /// As the new volume will remember it.
    metadata: BTreeMap<String, String>,
}

impl Wanted {
    fn of(request: &CreateVolumeRequest) -> Result<Self, Status> {
        let filesystem: Filesystem =
            request.filesystem.parse().map_err(Status::invalid_argument)?;
        if !request.metadata.contains_key(CSI_NAME) {
            return Err(Status::invalid_argument(format!("the metadata {CSI_NAME} is missing")));
        }
        let source = match &request.source {
            None => String::new(),
            Some(Source::Volume(name)) => name.clone(),
            Some(Source::Snapshot(SnapshotSource { repository, snapshot, volume, .. })) => {
                let url = repository.as_ref().map_or("", |repository| &repository.url);
                format!("{url}#@{snapshot}/{volume}")
            }
        };
        let mut metadata: BTreeMap<String, String> =
            request.metadata.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        metadata.insert(ASKED_SIZE.to_owned(), request.size_bytes.to_string());
        metadata.insert(ASKED_FILESYSTEM.to_owned(), filesystem.to_string());
        metadata.insert(ASKED_SOURCE.to_owned(), source);
        Ok(Self { filesystem, metadata })
    }

    /// How a volume differs that remembers this; None where it was asked for in the same way.
    fn differs(&self, found: &HashMap<String, String>) -> Option<&'static str> {
        let names = [
            (CSI_NAME, "for something else"),
            (ASKED_SIZE, "with another size"),
            (ASKED_FILESYSTEM, "with another file system"),
            (ASKED_SOURCE, "with other content"),
        ];
        names
            .into_iter()
            .find(|(key, _)| found.get(*key) != self.metadata.get(*key))
            .map(|(_, how)| how)
    }
}

/// The size of a new volume: what was asked for, rounded up, or that of its source.
fn size_of(asked_bytes: u64, source_bytes: Option<u64>) -> Result<u64, Status> {
    if asked_bytes > MAX_VOLUME_BYTES {
        let text = format!("a volume has at most {MAX_VOLUME_BYTES} bytes, not {asked_bytes}");
        return Err(Status::out_of_range(text));
    }
    match (asked_bytes, source_bytes) {
        (0, None) => Err(Status::invalid_argument("the size is missing")),
        (0, Some(source_bytes)) => Ok(source_bytes),
        (_, Some(source_bytes)) if asked_bytes == source_bytes => Ok(source_bytes),
        (_, Some(source_bytes)) if asked_bytes < source_bytes => {
            Err(Status::out_of_range(format!(
                "the volume can't have {asked_bytes} bytes: what it is made from has {source_bytes}"
            )))
        }
        _ => Ok(asked_bytes.next_multiple_of(ROUND_BYTES)),
    }
}

/// Makes a volume at least this large.
fn grow(locked: &mut LockedVolume, asked_bytes: u64) -> Result<(), Failed> {
    let state = locked.state();
    let has_size = asked_bytes <= state.size_bytes;
    // The call before may have ended between the volume and its file system.
    if has_size && (!state.grow_filesystem || state.lazy.is_some()) {
        return Ok(());
    }
    let size_bytes = if has_size { state.size_bytes } else { size_of(asked_bytes, None)? };
    if !locked.become_plain()? {
        let volume = locked.volume();
        if locked.state().lazy.as_ref().is_some_and(|lazy| !lazy.hydrated) {
            return Err(Error::Hydrating { what: volume.to_string() }.into());
        }
        let text =
            format!("{volume} still has its image server: it can grow when it is staged again");
        return Err(Status::failed_precondition(text).into());
    }
    match locked.grow(size_bytes) {
        // Its file system grows when it is mounted next.
        Err(Error::Unsupported { path, detail }) if locked.state().size_bytes == size_bytes => {
            tracing::warn!(path = %path.display(), detail, "a file system did not grow yet");
            Ok(())
        }
        grown => Ok(grown?),
    }
}

/// A volume as the controller sees it.
fn describe(volume: &PoolVolume) -> petra_volume::Result<Volume> {
    let state = volume.state()?;
    let attached = volume.attachment()?.is_some();
    Ok(Volume {
        name: state.name.to_string(),
        id: state.id.to_string(),
        size_bytes: state.size_bytes,
        filesystem: filesystem_of(&state),
        origin: state.origin.clone().unwrap_or_default(),
        lazy: state.lazy.as_ref().is_some_and(|lazy| !lazy.hydrated),
        attached,
        trouble: trouble_with(volume, &state)?,
        metadata: state.metadata.into_iter().collect(),
    })
}

/// What is on a clone is not known before it is mounted; then what was asked for is said.
fn filesystem_of(state: &VolumeState) -> String {
    match (state.filesystem, state.metadata.get(ASKED_FILESYSTEM)) {
        (Filesystem::Raw, Some(asked)) => asked.clone(),
        (filesystem, _) => filesystem.to_string(),
    }
}

/// What is wrong, as far as that shows without reading the volume.
fn trouble_with(volume: &PoolVolume, state: &VolumeState) -> petra_volume::Result<String> {
    let image = volume.image();
    Ok(match std::fs::metadata(&image) {
        Err(error) => format!("{}: {error}", image.display()),
        // One that a crash kept from growing grows when it is attached.
        Ok(metadata) if metadata.len() < state.size_bytes && !state.grow_filesystem => {
            format!("{} has {} of {} bytes", image.display(), metadata.len(), state.size_bytes)
        }
        Ok(_) if !volume.is_alive(Duration::ZERO)? => {
            "its image server died: it must be staged again".to_owned()
        }
        Ok(_) => String::new(),
    })
}

fn id_of(text: &str) -> Result<SnapshotId, Status> {
    // What is no id is the id of nothing.
    text.parse().map_err(|_| Status::not_found(format!("there is no snapshot {text:?}")))
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn sizes_are_at_least_what_is_asked_for() {
        let code = |asked, source| size_of(asked, source).unwrap_err().code();
        assert_eq!(size_of(4097, None).unwrap(), 8192);
        assert_eq!(size_of(0, Some(512)).unwrap(), 512);
        assert_eq!(size_of(512, Some(512)).unwrap(), 512);
        assert_eq!(size_of(513, Some(512)).unwrap(), 4096);
        assert_eq!(code(0, None), Code::InvalidArgument);
        assert_eq!(code(511, Some(512)), Code::OutOfRange);
        assert_eq!(code(u64::MAX, None), Code::OutOfRange);
        assert_eq!(size_of(MAX_VOLUME_BYTES, None).unwrap(), MAX_VOLUME_BYTES);
    }
}
