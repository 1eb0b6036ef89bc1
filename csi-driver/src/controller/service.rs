//! The gRPC services, call by call.

use std::sync::Arc;

use async_trait::async_trait;
use tonic::{Request, Response, Status};

use super::Controller;
use super::metadata::Messages;
use crate::proto::csi::controller_server::Controller as ControllerService;
use crate::proto::csi::group_controller_server::GroupController as GroupService;
use crate::proto::csi::snapshot_metadata_server::SnapshotMetadata as MetadataService;
use crate::proto::csi::*;

type Answer<T> = Result<Response<T>, Status>;

fn answer<T>(result: Result<T, Status>) -> Answer<T> {
    result.map(Response::new)
}

/// What is served, since services must be of this crate.
#[derive(Clone, Debug)]
pub struct Services(pub Arc<Controller>);

#[async_trait]
impl ControllerService for Services {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Answer<CreateVolumeResponse> {
        let volume = Some(self.0.create(request.into_inner()).await?);
        answer(Ok(CreateVolumeResponse { volume }))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Answer<DeleteVolumeResponse> {
        answer(self.0.delete(request.into_inner()).await.map(|()| DeleteVolumeResponse {}))
    }

    async fn controller_publish_volume(
        &self,
        request: Request<ControllerPublishVolumeRequest>,
    ) -> Answer<ControllerPublishVolumeResponse> {
        let published = self.0.publish(request.into_inner()).await;
        answer(published.map(|()| ControllerPublishVolumeResponse::default()))
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<ControllerUnpublishVolumeRequest>,
    ) -> Answer<ControllerUnpublishVolumeResponse> {
        let unpublished = self.0.unpublish(request.into_inner()).await;
        answer(unpublished.map(|()| ControllerUnpublishVolumeResponse {}))
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Answer<ValidateVolumeCapabilitiesResponse> {
        answer(self.0.validate(request.into_inner()).await)
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Answer<ListVolumesResponse> {
        answer(self.0.list(request.into_inner()).await)
    }

    async fn get_capacity(
        &self,
        request: Request<GetCapacityRequest>,
    ) -> Answer<GetCapacityResponse> {
        answer(self.0.capacity(request.into_inner()).await)
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Answer<ControllerGetCapabilitiesResponse> {
        use controller_service_capability::rpc::Type;
        let capabilities = [
            Type::CreateDeleteVolume,
            Type::PublishUnpublishVolume,
            Type::PublishReadonly,
            Type::ModifyVolume,
            Type::ListVolumes,
            Type::GetCapacity,
            Type::CreateDeleteSnapshot,
            Type::ListSnapshots,
            Type::CloneVolume,
            Type::ExpandVolume,
            Type::VolumeCondition,
            Type::GetVolume,
            // Not GET_SNAPSHOT, although it works: it is new, and the conformance suite refuses what it does not know.
            Type::SingleNodeMultiWriter,
        ];
        let capability = |kind: Type| ControllerServiceCapability {
            r#type: Some(controller_service_capability::Type::Rpc(
                controller_service_capability::Rpc { r#type: kind.into() },
            )),
        };
        let capabilities = capabilities.map(capability).into();
        answer(Ok(ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn create_snapshot(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Answer<CreateSnapshotResponse> {
        let snapshot = Some(self.0.take_one(request.into_inner()).await?);
        answer(Ok(CreateSnapshotResponse { snapshot }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Answer<DeleteSnapshotResponse> {
        let request = request.into_inner();
        let deleted = self.0.delete_snapshot(&request.snapshot_id, &request.secrets).await;
        answer(deleted.map(|()| DeleteSnapshotResponse {}))
    }

    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Answer<ListSnapshotsResponse> {
        answer(self.0.list_snapshots(request.into_inner()).await)
    }

    async fn get_snapshot(
        &self,
        request: Request<GetSnapshotRequest>,
    ) -> Answer<GetSnapshotResponse> {
        let request = request.into_inner();
        super::check("snapshot id", &request.snapshot_id)?;
        let snapshot = Some(self.0.snapshot(&request.snapshot_id, &request.secrets).await?);
        answer(Ok(GetSnapshotResponse { snapshot }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Answer<ControllerExpandVolumeResponse> {
        answer(self.0.expand(request.into_inner()).await)
    }

    async fn controller_get_volume(
        &self,
        request: Request<ControllerGetVolumeRequest>,
    ) -> Answer<ControllerGetVolumeResponse> {
        answer(self.0.get(&request.into_inner().volume_id).await)
    }

    async fn controller_modify_volume(
        &self,
        request: Request<ControllerModifyVolumeRequest>,
    ) -> Answer<ControllerModifyVolumeResponse> {
        let modified = self.0.modify(request.into_inner()).await;
        answer(modified.map(|()| ControllerModifyVolumeResponse {}))
    }
}

#[async_trait]
impl GroupService for Services {
    async fn group_controller_get_capabilities(
        &self,
        _: Request<GroupControllerGetCapabilitiesRequest>,
    ) -> Answer<GroupControllerGetCapabilitiesResponse> {
        use group_controller_service_capability::{Rpc, Type, rpc};
        let kind = rpc::Type::CreateDeleteGetVolumeGroupSnapshot;
        let capability = GroupControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })),
        };
        answer(Ok(GroupControllerGetCapabilitiesResponse { capabilities: vec![capability] }))
    }

    async fn create_volume_group_snapshot(
        &self,
        request: Request<CreateVolumeGroupSnapshotRequest>,
    ) -> Answer<CreateVolumeGroupSnapshotResponse> {
        let group_snapshot = Some(self.0.take_group(request.into_inner()).await?);
        answer(Ok(CreateVolumeGroupSnapshotResponse { group_snapshot }))
    }

    async fn delete_volume_group_snapshot(
        &self,
        request: Request<DeleteVolumeGroupSnapshotRequest>,
    ) -> Answer<DeleteVolumeGroupSnapshotResponse> {
        let request = request.into_inner();
        let deleted = self
            .0
            .delete_group(&request.group_snapshot_id, &request.snapshot_ids, &request.secrets)
            .await;
        answer(deleted.map(|()| DeleteVolumeGroupSnapshotResponse {}))
    }

    async fn get_volume_group_snapshot(
        &self,
        request: Request<GetVolumeGroupSnapshotRequest>,
    ) -> Answer<GetVolumeGroupSnapshotResponse> {
        let request = request.into_inner();
        let group = self
            .0
            .group(&request.group_snapshot_id, &request.snapshot_ids, &request.secrets)
            .await?;
        answer(Ok(GetVolumeGroupSnapshotResponse { group_snapshot: Some(group) }))
    }
}

#[async_trait]
impl MetadataService for Services {
    type GetMetadataAllocatedStream = Messages<GetMetadataAllocatedResponse>;

    async fn get_metadata_allocated(
        &self,
        request: Request<GetMetadataAllocatedRequest>,
    ) -> Answer<Self::GetMetadataAllocatedStream> {
        let request = request.into_inner();
        let (id, from, max) = (&request.snapshot_id, request.starting_offset, request.max_results);
        let ranges = self.0.allocated(id, from, max, &request.secrets).await?;
        let (size, kind) = (ranges.size_bytes, ranges.r#type);
        answer(Ok(ranges.messages(move |block_metadata| GetMetadataAllocatedResponse {
            block_metadata_type: kind.into(),
            volume_capacity_bytes: size,
            block_metadata,
        })))
    }

    type GetMetadataDeltaStream = Messages<GetMetadataDeltaResponse>;

    async fn get_metadata_delta(
        &self,
        request: Request<GetMetadataDeltaRequest>,
    ) -> Answer<Self::GetMetadataDeltaStream> {
        let request = request.into_inner();
        let ids = (request.base_snapshot_id.as_str(), request.target_snapshot_id.as_str());
        let (from, max) = (request.starting_offset, request.max_results);
        let ranges = self.0.delta(ids, from, max, &request.secrets).await?;
        let (size, kind) = (ranges.size_bytes, ranges.r#type);
        answer(Ok(ranges.messages(move |block_metadata| GetMetadataDeltaResponse {
            block_metadata_type: kind.into(),
            volume_capacity_bytes: size,
            block_metadata,
        })))
    }
}
