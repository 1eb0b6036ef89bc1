//! Staging: a volume gets its device and, for a file system, its one mount on this node.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use petra_volume::binds::{self, Place};
use petra_volume::volume::Serving;
use petra_volume::{LockedVolume, Volume, clones};
use tonic::{Code, Status};

use super::{Access, Named, Node, ReadOnlyClone, blocking, is_mount_point};
use crate::failure::of_volume;
use crate::handle::VolumeHandle;
use crate::proto::csi::{NodeStageVolumeResponse, NodeUnstageVolumeResponse};

/// How long an image server that died may take to have a successor.
const SUCCESSOR: Duration = Duration::from_secs(5);

impl Node {
    pub(super) async fn stage(
        self,
        named: Named,
        at: PathBuf,
        access: Access,
        secrets: HashMap<String, String>,
    ) -> Result<NodeStageVolumeResponse, Status> {
        self.prepare(&named, secrets).await?;
        blocking(move || {
            let inner = &self.0;
            let volume = named.find(&inner.pool)?;
            stage(&volume, &inner.serving, &at, &access)
        })
        .await?;
        Ok(NodeStageVolumeResponse {})
    }

    /// Makes the clone of a volume that many nodes read, and keeps secrets for what is still to be fetched.
    async fn prepare(&self, named: &Named, secrets: HashMap<String, String>) -> Result<(), Status> {
        let (found, pool) = (named.clone(), self.0.pool.clone());
        let state = blocking(move || match found.find(&pool) {
            Ok(volume) => volume.state().map(Some).map_err(of_volume),
            Err(error) if error.code() == Code::NotFound => Ok(None),
            Err(error) => Err(error),
        })
        .await?;
        match (state, &named.handle) {
            (Some(state), _) => match state.lazy.filter(|lazy| !lazy.hydrated) {
                Some(lazy) if !secrets.is_empty() => {
                    self.0.clones.keep_secrets(&lazy.repository, &secrets).await
                }
                _ => Ok(()),
            },
            (None, VolumeHandle::ReadOnly { number, repository, snapshot, .. }) => {
                let request = ReadOnlyClone {
                    repository: repository.clone(),
                    secrets,
                    snapshot: *snapshot,
                    number: *number,
                    name: named.name.clone(),
                };
                self.0.clones.clone_read_only(request).await
            }
            // Told by who looks for it next.
            (None, VolumeHandle::Local { .. }) => Ok(()),
        }
    }

    pub(super) async fn unstage(
        self,
        named: Result<Named, Status>,
        at: PathBuf,
    ) -> Result<NodeUnstageVolumeResponse, Status> {
        blocking(move || {
            let pool = &self.0.pool;
            match named.and_then(|named| Ok((named.find(pool)?, named))) {
                Ok((volume, named)) => unstage(&volume, &named, &at),
                Err(error) if error.code() == Code::NotFound => not_there(&at, error),
                Err(error) => Err(error),
            }
        })
        .await?;
        Ok(NodeUnstageVolumeResponse {})
    }
}

/// Ends nothing for a volume that is not there: then there must be nothing to end.
pub(super) fn not_there(at: &Path, unknown: Status) -> Result<(), Status> {
    match binds::resolve(at).map_err(of_volume)? {
        Some(at) if is_mount_point(&at)? => Err(unknown),
        _ => Ok(()),
    }
}

fn stage(volume: &Volume, serving: &Serving, at: &Path, access: &Access) -> Result<(), Status> {
    // Before the volume is locked: a successor needs the lock.
    let is_alive = volume.is_alive(SUCCESSOR).map_err(of_volume)?;
    let mut locked = volume.lock().map_err(of_volume)?;
    let staging = binds::resolve(at).map_err(of_volume)?.unwrap_or_else(|| at.to_owned());
    if !is_alive {
        revive(&mut locked, &staging)?;
    }
    let places = volume.places().map_err(of_volume)?;
    let is_staged = |place: &&Place| place.at == staging && !place.is_device;
    match places.iter().find(is_staged) {
        Some(place) if access.usage.is_block() || !place.is_mounted_with(&access.options) => {
            let text = format!("{volume} is staged at {} in another way", staging.display());
            return Err(Status::already_exists(text));
        }
        Some(_) => {
            locked.attach_served(serving, attached_read_only(volume)?).map_err(of_volume)?;
            // Ends what a crash may have interrupted.
            return locked.mount_with(&staging, &access.options).map_err(of_volume);
        }
        None => {}
    }
    if let Some(place) = places.iter().find(|place| !(access.usage.is_block() && place.is_device)) {
        let text = format!("{volume} is used at {} already", place.at.display());
        return Err(Status::failed_precondition(text));
    }
    if !places.is_empty() {
        // A block volume that is published: its device is as it was published.
        return Ok(());
    }
    if !access.usage.is_block() && is_mount_point(&staging)? {
        let text = format!("something else is mounted at {}", staging.display());
        return Err(Status::already_exists(text));
    }
    attach(&mut locked, serving, access.is_read_only())?;
    if access.usage.is_block() {
        return Ok(());
    }
    let mounted = locked.mount_with(&staging, &access.options);
    if mounted.is_err() {
        // Refused by itself if it did get mounted. The first error tells more.
        let _ = locked.detach();
    }
    mounted.map_err(of_volume)
}

fn attached_read_only(volume: &Volume) -> Result<bool, Status> {
    let attachment = volume.attachment().map_err(of_volume)?;
    Ok(attachment.is_some_and(|attachment| attachment.read_only))
}

/// Attaches a volume that nobody uses. One that is attached in another way, as a call that was interrupted may have left
/// it, is attached again.
fn attach(locked: &mut LockedVolume, serving: &Serving, read_only: bool) -> Result<(), Status> {
    let attachment = locked.volume().attachment().map_err(of_volume)?;
    if attachment.is_some_and(|attachment| attachment.read_only != read_only) {
        return super::reattach(locked, serving, read_only).map(drop);
    }
    locked.attach_served(serving, read_only).map(drop).map_err(of_volume)
}

/// Takes the device away whose image server died. Only the mount of the staging itself may be left on it.
fn revive(locked: &mut LockedVolume, staging: &Path) -> Result<(), Status> {
    let volume = locked.volume().clone();
    let places = volume.places().map_err(of_volume)?;
    if let Some(place) = places.iter().find(|place| place.at != staging) {
        return Err(Status::failed_precondition(format!(
            "the image server of {volume} died; its use at {} has to end before it can be attached again",
            place.at.display()
        )));
    }
    tracing::warn!(%volume, "its image server died; it is attached again");
    locked.unmount().and_then(|()| locked.detach()).map_err(of_volume)
}

fn unstage(volume: &Volume, named: &Named, at: &Path) -> Result<(), Status> {
    let staging = binds::resolve(at).map_err(of_volume)?.unwrap_or_else(|| at.to_owned());
    let mut locked = volume.lock().map_err(of_volume)?;
    let places = volume.places().map_err(of_volume)?;
    let is_staged = places.iter().any(|place| place.at == staging);
    if let Some(place) = places.iter().find(|place| place.at != staging) {
        if !is_staged && !place.is_device {
            // It is staged somewhere else.
            return Ok(());
        }
        let text = format!("{volume} is still published at {}", place.at.display());
        return Err(Status::failed_precondition(text));
    }
    locked.unmount().map_err(of_volume)?;
    locked.detach().map_err(of_volume)?;
    if named.is_read_only() {
        // Nothing was written that is not in the snapshot.
        clones::delete(locked, false).map_err(of_volume)?;
    }
    Ok(())
}
