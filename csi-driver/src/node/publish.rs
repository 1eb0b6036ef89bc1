//! Publishing: a staged volume is shown at a path of a pod.

use std::path::{Path, PathBuf};

use petra_volume::binds::{self, Place};
use petra_volume::volume::Serving;
use petra_volume::{LockedVolume, Volume};
use tonic::{Code, Status};

use super::{Access, Named, Node, blocking, is_mount_point, reattach, stage};
use crate::failure::of_volume;
use crate::proto::csi::volume_capability::access_mode::Mode;
use crate::proto::csi::{NodePublishVolumeResponse, NodeUnpublishVolumeResponse};

impl Node {
    pub(super) async fn publish(
        self,
        named: Named,
        staging: PathBuf,
        target: PathBuf,
        access: Access,
    ) -> Result<NodePublishVolumeResponse, Status> {
        blocking(move || {
            let inner = &self.0;
            let volume = named.find(&inner.pool)?;
            let publication = Publication::new(volume, &staging, &target, &access)?;
            publication.publish(&inner.serving)
        })
        .await?;
        Ok(NodePublishVolumeResponse {})
    }

    pub(super) async fn unpublish(
        self,
        named: Result<Named, Status>,
        target: PathBuf,
    ) -> Result<NodeUnpublishVolumeResponse, Status> {
        blocking(move || {
            let pool = &self.0.pool;
            match named.and_then(|named| named.find(pool)) {
                Ok(volume) => unpublish(&volume, &target),
                Err(error) if error.code() == Code::NotFound => {
                    stage::not_there(&target, error)?;
                    binds::remove_place(&target).map_err(of_volume)
                }
                Err(error) => Err(error),
            }
        })
        .await?;
        Ok(NodeUnpublishVolumeResponse {})
    }
}

/// A volume that is to be shown at a target.
struct Publication<'a> {
    volume: Volume,
    staging: PathBuf,
    target: PathBuf,
    access: &'a Access,
}

impl<'a> Publication<'a> {
    fn new(
        volume: Volume,
        staging: &Path,
        target: &Path,
        access: &'a Access,
    ) -> Result<Self, Status> {
        let resolved = |path: &Path| {
            binds::resolve(path).map_err(of_volume)?.ok_or_else(|| {
                let path = path.display();
                Status::failed_precondition(format!("the directory of {path} does not exist"))
            })
        };
        Ok(Self { staging: resolved(staging)?, target: resolved(target)?, volume, access })
    }

    fn publish(self, serving: &Serving) -> Result<(), Status> {
        let Self { volume, target, access, .. } = &self;
        // Nobody unmounts or detaches it meanwhile.
        let mut locked = volume.lock().map_err(of_volume)?;
        let places = volume.places().map_err(of_volume)?;
        // The last one lies over others.
        if let Some(place) = places.iter().rfind(|place| place.at == *target) {
            return if self.is_as_wanted(place)? {
                Ok(())
            } else {
                let target = target.display();
                Err(Status::already_exists(format!("{volume} is at {target} in another way")))
            };
        }
        if is_mount_point(target)? {
            let text = format!("something else is mounted at {}", target.display());
            return Err(Status::already_exists(text));
        }
        let mut others = places.iter().filter(|place| place.is_device || place.at != self.staging);
        if access.usage.mode == Mode::SingleNodeSingleWriter
            && let Some(other) = others.next()
        {
            return Err(Status::failed_precondition(format!(
                "{volume} is for one pod at a time, and published at {}",
                other.at.display()
            )));
        }
        if access.usage.is_block() {
            self.show_device(&mut locked, serving, &places)
        } else {
            self.show_directory(&places)
        }
    }

    fn show_directory(&self, places: &[Place]) -> Result<(), Status> {
        let mut staged = places.iter().filter(|place| place.at == self.staging && !place.is_device);
        let Some(staged) = staged.next_back() else { return Err(self.not_staged()) };
        if staged.is_read_only() && !self.access.is_read_only() {
            let text = format!("{} is staged read-only", self.volume);
            return Err(Status::failed_precondition(text));
        }
        binds::bind_directory(&self.staging, &self.target, &self.access.options).map_err(of_volume)
    }

    fn show_device(
        &self,
        locked: &mut LockedVolume,
        serving: &Serving,
        places: &[Place],
    ) -> Result<(), Status> {
        let Self { volume, target, access, .. } = self;
        if let Some(other) = places.iter().find(|place| !place.is_device) {
            let text = format!("{volume} is mounted at {}", other.at.display());
            return Err(Status::failed_precondition(text));
        }
        let attachment = volume.attachment().map_err(of_volume)?;
        let mut attachment = attachment.ok_or_else(|| self.not_staged())?;
        // It is the device that lets nobody write, so all see the same.
        if attachment.read_only != access.is_read_only() {
            if let Some(other) = places.first() {
                let how = if attachment.read_only { "read-only" } else { "for writing" };
                let at = other.at.display();
                let text = format!("the device of {volume} is published {how} at {at}");
                return Err(Status::failed_precondition(text));
            }
            attachment = reattach(locked, serving, access.is_read_only())?;
        }
        binds::bind_device(&attachment.device, target).map_err(of_volume)
    }

    /// True for a place that a call like this one has made.
    fn is_as_wanted(&self, place: &Place) -> Result<bool, Status> {
        let access = self.access;
        if !access.usage.is_block() {
            return Ok(!place.is_device && place.is_bound_with(&access.options));
        }
        let attachment = self.volume.attachment().map_err(of_volume)?;
        let is_read_only = attachment.is_some_and(|attachment| attachment.read_only);
        Ok(place.is_device && is_read_only == access.is_read_only())
    }

    fn not_staged(&self) -> Status {
        let at = self.staging.display();
        Status::failed_precondition(format!("{} is not staged at {at}", self.volume))
    }
}

/// Ends what is at a target. The volume is not locked: this has to work with one whose state can't be read.
fn unpublish(volume: &Volume, target: &Path) -> Result<(), Status> {
    let Some(target) = binds::resolve(target).map_err(of_volume)? else { return Ok(()) };
    if is_mount_point(&target)? {
        let places = volume.places().map_err(of_volume)?;
        if !places.iter().any(|place| place.at == target) {
            let text = format!("what is mounted at {} is not {volume}", target.display());
            return Err(Status::failed_precondition(text));
        }
        binds::unbind(&target).map_err(of_volume)?;
    }
    binds::remove_place(&target).map_err(of_volume)
}
