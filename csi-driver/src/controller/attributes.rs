//! What can be changed of a volume: where it may be used, and where its snapshots go.

use std::collections::HashMap;

use tonic::Status;

use super::volumes::local;
use super::{Controller, check};
use crate::agent::AnnotateVolumeRequest;
use crate::agent::nodes::Node;
use crate::capability::Usage;
use crate::handle::VolumeHandle;
use crate::proto::csi;
use crate::template::{Parameters, is_attribute};

/// Metadata of a volume that is published: how.
const PUBLISHED: &str = "csi.published";

impl Controller {
    /// Allows a node to use a volume. Only the node that has it may, and any node a volume for many readers.
    pub(super) async fn publish(
        &self,
        request: csi::ControllerPublishVolumeRequest,
    ) -> Result<(), Status> {
        check("volume id", &request.volume_id)?;
        if request.node_id.is_empty() {
            return Err(Status::invalid_argument("the node id is missing"));
        }
        let usage = Usage::of(request.volume_capability.as_ref())?;
        let found = self.found(&request.volume_id, &request.secrets).await?;
        let node = self.nodes.by_node(&request.node_id).await?;
        if found.is_read_only {
            return Ok(());
        }
        let (pool, name) = local(&request.volume_id)?;
        if node.info.pool != pool.to_string() {
            return Err(Status::failed_precondition(format!(
                "the volume is on another node than {}",
                request.node_id
            )));
        }
        let _changing = self.changing(&request.volume_id)?;
        // One after the other, so that no two get the last place.
        let _counting = self.locks.begin([format!("node {}", request.node_id)])?;
        let how = match request.readonly || usage.is_read_only() {
            true => "read-only",
            false => "read-write",
        };
        let volumes = node.agent.volumes().await?;
        let published = |volume: &crate::agent::Volume| volume.metadata.get(PUBLISHED).cloned();
        let now = volumes.iter().find(|volume| volume.name == name.as_str()).and_then(published);
        match now {
            Some(now) if now == how => return Ok(()),
            Some(now) => {
                return Err(Status::already_exists(format!("the volume is published {now}")));
            }
            None => {}
        }
        let count = volumes.iter().filter(|volume| published(volume).is_some()).count() as u64;
        let most = node.info.most_volumes;
        if most > 0 && count >= most {
            return Err(Status::resource_exhausted(format!(
                "node {} has {most} volumes, which is the most that it may have",
                request.node_id
            )));
        }
        let set = [(PUBLISHED.to_owned(), how.to_owned())].into();
        let request = AnnotateVolumeRequest { name: name.to_string(), set, remove: vec![] };
        node.agent.annotate_volume(request).await.map(drop)
    }

    pub(super) async fn unpublish(
        &self,
        request: csi::ControllerUnpublishVolumeRequest,
    ) -> Result<(), Status> {
        check("volume id", &request.volume_id)?;
        // What was never there is not published.
        let Ok(VolumeHandle::Local { pool, name }) = request.volume_id.parse() else {
            return Ok(());
        };
        let _changing = self.changing(&request.volume_id)?;
        let Node { agent, info } = match self.node(pool).await {
            Err(status) if status.code() == tonic::Code::NotFound => return Ok(()),
            node => node?,
        };
        if !request.node_id.is_empty() && request.node_id != info.node {
            return Ok(());
        }
        let remove = vec![PUBLISHED.to_owned()];
        let request = AnnotateVolumeRequest { name: name.to_string(), set: [].into(), remove };
        match agent.annotate_volume(request).await {
            Err(status) if status.code() == tonic::Code::NotFound => Ok(()),
            changed => changed.map(drop),
        }
    }

    /// Changes where the snapshots of a volume go, and their labels. The parameters are all those of a class: what an
    /// earlier class said and this one does not is as the StorageClass has it.
    pub(super) async fn modify(
        &self,
        request: csi::ControllerModifyVolumeRequest,
    ) -> Result<(), Status> {
        check("volume id", &request.volume_id)?;
        let set = mutable(&request.mutable_parameters)?;
        let (pool, name) = local(&request.volume_id)?;
        let _changing = self.changing(&request.volume_id)?;
        let agent = self.nodes.by_pool(pool).await?;
        let before = agent.volume(name.as_str()).await?.metadata;
        let gone = |key: &String| is_attribute(key) && !set.contains_key(key);
        let remove = before.into_keys().filter(gone).collect();
        let request = AnnotateVolumeRequest { name: name.to_string(), set, remove };
        agent.annotate_volume(request).await.map(drop)
    }
}

/// What a volume remembers of parameters that can be changed: those of a snapshot class.
pub(super) fn mutable(
    parameters: &HashMap<String, String>,
) -> Result<HashMap<String, String>, Status> {
    Ok(Parameters::read(parameters, false)?.to_attributes().into_iter().collect())
}
