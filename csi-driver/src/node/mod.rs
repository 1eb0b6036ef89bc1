//! The service Node: devices and mounts of this node.
//!
//! ```text
//! stage      (clone of its own for `ro/...`) -> device, with an image server for a lazy clone -> mount at the staging path
//! publish    bind mount of the staging path, or of the device's node, at the target path
//! unpublish  the bind mount ends                 unstage   unmount -> detach -> (the clone is deleted)
//! ```
//!
//! Nothing is noted here: what is attached and mounted is asked from the kernel, so that each call goes on from
//! wherever the one before it ended. A block volume has nothing at its staging path; it is staged when it is attached. A
//! call runs to its end even if its caller goes away, and until then other calls for the same volume are told to come
//! again.

mod expand;
mod publish;
mod read_only;
mod stage;
mod stats;

use std::collections::HashMap;
use std::future::Future;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use petra_engine::Name;
use petra_volume::pool::Pool;
use petra_volume::volume::{Attachment, Serving};
use petra_volume::{LockedVolume, MountOptions, Volume, binds};
use tonic::{Request, Response, Status};

pub use read_only::{ReadOnlyClone, ReadOnlyClones, clone_name};

use crate::TOPOLOGY;
use crate::capability::Usage;
use crate::failure::of_volume;
use crate::handle::VolumeHandle;
use crate::locks::Locks;
use crate::proto::csi;
use crate::proto::csi::node_service_capability::rpc::Type;
use crate::proto::csi::node_service_capability::{Rpc, Type as CapabilityType};

/// What this driver can do on a node.
const CAPABILITIES: [Type; 5] = [
    Type::StageUnstageVolume,
    Type::GetVolumeStats,
    Type::ExpandVolume,
    Type::VolumeCondition,
    Type::SingleNodeMultiWriter,
];

/// The service Node over one pool. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Node(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pool: Pool,
    serving: Serving,
    node: String,
    locks: Locks,
    /// Volumes that are being looked at.
    looks: Locks,
    clones: Arc<dyn ReadOnlyClones>,
    most_volumes: u64,
}

impl Node {
    /// The node of this name. Operations on a volume are locked by its id; whoever deletes or changes volumes in this
    /// process can use the same locks. No more than `most_volumes` are used at a time; 0 for any number.
    pub fn new(
        pool: Pool,
        serving: Serving,
        node: String,
        locks: Locks,
        clones: Arc<dyn ReadOnlyClones>,
        most_volumes: u64,
    ) -> Self {
        let looks = Locks::default();
        Self(Arc::new(Inner { pool, serving, node, locks, looks, clones, most_volumes }))
    }

    /// Runs an operation on a volume to its end, also when its caller goes away. Others on the same volume or path are told
    /// to come again.
    async fn operation<T: Send + 'static>(
        &self,
        volume_id: &str,
        path: &Path,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let path = path.to_string_lossy();
        let operation = self.0.locks.begin([volume_id, &path])?;
        let task = tokio::spawn(async move {
            let done = work.await;
            drop(operation);
            done
        });
        task.await.map_err(|_| Status::internal("an operation panicked"))?.map(Response::new)
    }

    /// The volume that an id names. Its directory in the pool may be missing.
    fn volume(&self, id: &str) -> Result<Named, Status> {
        let unknown = |why: &str| Status::not_found(format!("there is no volume {id:?}: {why}"));
        if id.is_empty() {
            return Err(Status::invalid_argument("the volume id is missing"));
        }
        let handle: VolumeHandle = id.parse().map_err(|error| unknown(&format!("{error}")))?;
        let name = match &handle {
            VolumeHandle::Local { pool, .. } if *pool != self.0.pool.state().id => {
                return Err(unknown("it is in the pool of another node"));
            }
            VolumeHandle::Local { name, .. } => name.clone(),
            VolumeHandle::ReadOnly { pin, .. } => clone_name(*pin),
        };
        Ok(Named { id: id.to_owned(), handle, name })
    }
}

/// A volume by its id and its name in the pool.
#[derive(Clone, Debug)]
struct Named {
    id: String,
    handle: VolumeHandle,
    name: Name,
}

impl Named {
    /// Finds it in the pool.
    fn find(&self, pool: &Pool) -> Result<Volume, Status> {
        match pool.volume(&self.name) {
            Err(petra_volume::Error::Unknown { .. }) => {
                Err(Status::not_found(format!("there is no volume {:?}", self.id)))
            }
            found => found.map_err(of_volume),
        }
    }

    fn is_read_only(&self) -> bool {
        matches!(self.handle, VolumeHandle::ReadOnly { .. })
    }
}

/// How a volume is to be used on this node.
#[derive(Clone, Debug)]
struct Access {
    usage: Usage,
    options: MountOptions,
}

impl Access {
    fn of(
        capability: Option<&csi::VolumeCapability>,
        volume: &Named,
        read_only: bool,
    ) -> Result<Self, Status> {
        let usage = Usage::of(capability)?;
        if volume.is_read_only() && !usage.is_read_only() {
            return Err(Status::failed_precondition(format!(
                "{} can only be read, and {} would write",
                volume.id,
                usage.mode.as_str_name()
            )));
        }
        let options = MountOptions::parse(&usage.mount_flags).map_err(of_volume)?;
        let options = options.read_only(read_only || usage.is_read_only());
        Ok(Self { usage, options })
    }

    fn is_read_only(&self) -> bool {
        self.options.is_read_only()
    }
}

/// A path of a call: the field's name is for errors.
fn path(text: &str, field: &str) -> Result<PathBuf, Status> {
    let path = Path::new(text);
    if text.is_empty() {
        return Err(Status::invalid_argument(format!("the {field} is missing")));
    }
    let is_plain = path.components().all(|part| part != Component::ParentDir);
    if !path.is_absolute() || !is_plain || path.file_name().is_none() || text.contains('\0') {
        return Err(Status::invalid_argument(format!("the {field} {text:?} is no absolute path")));
    }
    Ok(path.to_owned())
}

/// Runs what waits for disks and devices.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| Status::internal("work on a volume panicked"))?
}

/// Attaches a volume again that is attached in another way. Nobody must use it.
fn reattach(
    locked: &mut LockedVolume,
    serving: &Serving,
    read_only: bool,
) -> Result<Attachment, Status> {
    locked.detach().map_err(of_volume)?;
    locked.attach_served(serving, read_only).map_err(of_volume)
}

/// True where something is mounted, even if it is none of ours.
fn is_mount_point(at: &Path) -> Result<bool, Status> {
    binds::is_mount_point(at).map_err(of_volume)
}

#[tonic::async_trait]
impl csi::node_server::Node for Node {
    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Result<Response<csi::NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        // What is missing counts more than what is unknown.
        let at = path(&request.staging_target_path, "staging target path")?;
        Usage::of(request.volume_capability.as_ref())?;
        let volume = self.volume(&request.volume_id)?;
        let access = Access::of(request.volume_capability.as_ref(), &volume, false)?;
        let stage = self.clone().stage(volume, at.clone(), access, request.secrets);
        self.operation(&request.volume_id, &at, stage).await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Result<Response<csi::NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        let at = path(&request.staging_target_path, "staging target path")?;
        let unstage = self.clone().unstage(self.volume(&request.volume_id), at.clone());
        self.operation(&request.volume_id, &at, unstage).await
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let target = path(&request.target_path, "target path")?;
        Usage::of(request.volume_capability.as_ref())?;
        let volume = self.volume(&request.volume_id)?;
        let access = Access::of(request.volume_capability.as_ref(), &volume, request.readonly)?;
        if request.staging_target_path.is_empty() {
            return Err(Status::failed_precondition("the staging target path is missing"));
        }
        let staging = path(&request.staging_target_path, "staging target path")?;
        let publish = self.clone().publish(volume, staging, target.clone(), access);
        self.operation(&request.volume_id, &target, publish).await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let target = path(&request.target_path, "target path")?;
        let unpublish = self.clone().unpublish(self.volume(&request.volume_id), target.clone());
        self.operation(&request.volume_id, &target, unpublish).await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let at = &request.volume_path;
        if at.is_empty() {
            return Err(Status::invalid_argument("the volume path is missing"));
        }
        let volume = self.volume(&request.volume_id)?;
        let unknown = |_| Status::not_found(format!("{} is not at {at}", volume.id));
        let at = path(at, "volume path").map_err(unknown)?;
        self.stats(volume, at).await.map(Response::new)
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Result<Response<csi::NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        let volume = self.volume(&request.volume_id)?;
        let at = path(&request.volume_path, "volume path")?;
        let range = expand::Range::of(request.capacity_range)?;
        let expand = self.clone().expand(volume, at.clone(), range);
        self.operation(&request.volume_id, &at, expand).await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        let capability = |kind: Type| csi::NodeServiceCapability {
            r#type: Some(CapabilityType::Rpc(Rpc { r#type: kind.into() })),
        };
        let capabilities = CAPABILITIES.into_iter().map(capability).collect();
        Ok(Response::new(csi::NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        let node_id = self.0.node.clone();
        let segments = HashMap::from([(TOPOLOGY.to_owned(), node_id.clone())]);
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id,
            max_volumes_per_node: i64::try_from(self.0.most_volumes).unwrap_or(i64::MAX),
            accessible_topology: Some(csi::Topology { segments }),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute_and_plain() {
        assert_eq!(path("/a/b", "path").unwrap(), Path::new("/a/b"));
        for text in ["", "a", "./a", "/", "/a/../b", "/a/..", "/a\0b"] {
            let error = path(text, "target path").unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument, "{text}");
            assert!(error.message().contains("target path"));
        }
    }
}
