//! Making, deleting, growing and listing volumes.

use std::collections::BTreeMap;

use petra_engine::clone::ClonePin;
use petra_engine::{Name, SnapshotId};
use petra_volume::pool::{Filesystem, min_volume_bytes};
use tonic::{Code, Status};

use super::attributes::mutable;
use super::{Controller, check, paging};
use crate::TOPOLOGY;
use crate::agent::nodes::Node;
use crate::agent::{
    CSI_NAME, CreateVolumeRequest, ExpandVolumeRequest, NodeInfo, Repository, SnapshotSource,
    Source, Volume,
};
use crate::capability::Usage;
use crate::failure;
use crate::handle::{SnapshotHandle, VolumeHandle, volume_name};
use crate::proto::csi;
use crate::proto::csi::volume_capability::access_mode::Mode;
use crate::proto::csi::volume_content_source::Type as ContentType;
use crate::repositories::{Found, Secrets};
use crate::template::{FROM, Parameters};

/// Metadata of a volume: the id or URL of what it is a clone of.
const CSI_SOURCE: &str = "csi.content";
/// The size of a volume that nobody gave one.
const DEFAULT_BYTES: u64 = 1 << 30;
/// Sizes are multiples of this.
const BLOCK_BYTES: u64 = 4096;

/// What a new volume begins with.
pub(super) enum Origin {
    Empty,
    Snapshot(Box<Found>),
    Volume { pool: SnapshotId, name: Name, size_bytes: u64 },
}

/// The sizes that a caller takes.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub required_bytes: u64,
    limit_bytes: Option<u64>,
}

impl Sizes {
    fn of(range: Option<&csi::CapacityRange>) -> Result<Self, Status> {
        let range = range.copied().unwrap_or_default();
        let bytes = |what: &str, bytes: i64| {
            u64::try_from(bytes)
                .map_err(|_| Status::invalid_argument(format!("{what} is negative")))
        };
        let required_bytes = bytes("required_bytes", range.required_bytes)?;
        let limit_bytes = Some(bytes("limit_bytes", range.limit_bytes)?).filter(|limit| *limit > 0);
        if limit_bytes.is_some_and(|limit| limit < required_bytes) {
            return Err(Status::invalid_argument("limit_bytes is less than required_bytes"));
        }
        Ok(Self { required_bytes, limit_bytes })
    }

    /// The size to make, of at least so many bytes.
    fn choose(self, at_least: u64) -> Result<u64, Status> {
        let wanted = match self.required_bytes {
            0 if at_least > 0 => at_least,
            0 => DEFAULT_BYTES.min(self.limit_bytes.unwrap_or(u64::MAX)),
            required => required,
        };
        if wanted < at_least {
            return Err(Status::out_of_range(format!(
                "{wanted} bytes are asked for, and the source has {at_least}"
            )));
        }
        let size = wanted.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(u64::MAX);
        // A source whose size is odd is taken as it is.
        let size = if self.fits(size) { size } else { wanted };
        if self.fits(size) {
            Ok(size)
        } else {
            Err(Status::out_of_range(format!(
                "no size from {wanted} bytes to the limit is possible"
            )))
        }
    }

    pub fn fits(self, size_bytes: u64) -> bool {
        size_bytes >= self.required_bytes
            && self.limit_bytes.is_none_or(|limit| size_bytes <= limit)
    }
}

impl Controller {
    pub(super) async fn create(
        &self,
        request: csi::CreateVolumeRequest,
    ) -> Result<csi::Volume, Status> {
        check("name", &request.name)?;
        let usages = Usage::of_all(&request.volume_capabilities)?;
        let sizes = Sizes::of(request.capacity_range.as_ref())?;
        let parameters = Parameters::read(&request.parameters, true)?;
        let mutable = mutable(&request.mutable_parameters)?;
        let _named = self.named("volume", &request.name)?;
        let (origin, source) = self.origin(&request, &parameters).await?;
        if usages.iter().any(|usage| usage.mode == Mode::MultiNodeReaderOnly) {
            return self.create_read_only(&request, &usages, sizes, origin, &source).await;
        }
        let candidates = self.candidates(&request, &origin).await;
        let mut changing = vec![];
        for Node { info, .. } in &candidates {
            let id = format!("{}/{}", info.pool, volume_name(&request.name));
            changing.push(self.changing(&id)?);
        }
        for Node { info, agent } in &candidates {
            match agent.volume(volume_name(&request.name).as_str()).await {
                Ok(volume) => {
                    let same = same(&volume, &request.name, &source, sizes, &usages);
                    same.map_err(|what| {
                        Status::already_exists(format!(
                            "volume {} exists with {what}",
                            request.name
                        ))
                    })?;
                    return Ok(made(info, volume, &request));
                }
                Err(status) if status.code() == Code::NotFound => {}
                Err(status) => return Err(status),
            }
        }
        // A node that is away may have made it for an earlier call: a second one would be nobody's.
        if !matches!(origin, Origin::Volume { .. }) {
            self.nobody_away(&request).await?;
        }
        if candidates.is_empty() {
            return Err(Status::resource_exhausted(
                "none of the nodes asked for can have the volume",
            ));
        }
        let mut create =
            self.create_request(&request, &parameters, &usages, sizes, &origin, source)?;
        create.metadata.extend(mutable);
        let mut full = Status::resource_exhausted("no node can have the volume");
        for Node { info, agent } in &candidates {
            match agent.create_volume(create.clone()).await {
                Ok(volume) => return Ok(made(info, volume, &request)),
                // Maybe the next one has room.
                Err(status) if status.code() == Code::ResourceExhausted => full = status,
                Err(status) => return Err(status),
            }
        }
        Err(full)
    }

    /// What a volume begins with, and how that is called.
    async fn origin(
        &self,
        request: &csi::CreateVolumeRequest,
        parameters: &Parameters,
    ) -> Result<(Origin, String), Status> {
        let source = request.volume_content_source.as_ref();
        let snapshot = match source.and_then(|source| source.r#type.as_ref()) {
            Some(ContentType::Volume(volume)) => {
                let id = &volume.volume_id;
                let (pool, name) = local(id)?;
                let found = self.nodes.by_pool(pool).await?.volume(name.as_str()).await?;
                let size_bytes = found.size_bytes;
                return Ok((Origin::Volume { pool, name, size_bytes }, id.clone()));
            }
            Some(ContentType::Snapshot(snapshot)) => snapshot.snapshot_id.as_str(),
            None if source.is_some() => {
                return Err(Status::invalid_argument("the content source has no type"));
            }
            None => match parameters.get(FROM) {
                Some(url) => url,
                None => return Ok((Origin::Empty, String::new())),
            },
        };
        let unknown = |_| Status::not_found(format!("no snapshot {snapshot}"));
        let handle: SnapshotHandle = snapshot.parse().map_err(unknown)?;
        let found = self.repositories.find(&handle, &request.secrets).await?;
        found.volume()?;
        Ok((Origin::Snapshot(Box::new(found)), snapshot.to_owned()))
    }

    /// The nodes that may have a volume, the best first.
    async fn candidates(&self, request: &csi::CreateVolumeRequest, origin: &Origin) -> Vec<Node> {
        let mut nodes = self.nodes.all().await.there;
        nodes.sort_by_key(|node| std::cmp::Reverse(node.info.available_bytes));
        if let Some(wanted) = &request.accessibility_requirements {
            let place = |topologies: &[csi::Topology], node: &str| {
                topologies.iter().position(|topology| is_on(topology, node))
            };
            if !wanted.requisite.is_empty() {
                nodes.retain(|node| place(&wanted.requisite, &node.info.node).is_some());
            }
            nodes.sort_by_key(|node| {
                place(&wanted.preferred, &node.info.node).unwrap_or(usize::MAX)
            });
        }
        if let Origin::Volume { pool, .. } = origin {
            let pool = pool.to_string();
            nodes.retain(|node| node.info.pool == pool);
        }
        nodes
    }

    /// Makes sure that no node is away that may have the volume already: `UNAVAILABLE`.
    async fn nobody_away(&self, request: &csi::CreateVolumeRequest) -> Result<(), Status> {
        let wanted = request.accessibility_requirements.iter();
        let names: Vec<_> = wanted
            .flat_map(|wanted| &wanted.requisite)
            .filter_map(|topology| topology.segments.get(TOPOLOGY).map(String::as_str))
            .collect();
        self.nodes.nobody_away(&names).await
    }

    fn create_request(
        &self,
        request: &csi::CreateVolumeRequest,
        parameters: &Parameters,
        usages: &[Usage],
        sizes: Sizes,
        origin: &Origin,
        source: String,
    ) -> Result<CreateVolumeRequest, Status> {
        let filesystem =
            usages.iter().find(|usage| !usage.is_block()).map_or(Filesystem::Raw, |u| u.filesystem);
        // Nobody who names a file system and no size wants to know what the least is.
        let least = min_volume_bytes(filesystem);
        let (size_bytes, from) = match origin {
            Origin::Empty => {
                let wanted = sizes.choose(0)?.max(least);
                if !sizes.fits(wanted) {
                    return Err(Status::out_of_range(format!(
                        "a volume with {filesystem} has at least {least} bytes"
                    )));
                }
                (wanted, None)
            }
            Origin::Volume { name, size_bytes, .. } => {
                (sizes.choose(*size_bytes)?, Some(Source::Volume(name.to_string())))
            }
            Origin::Snapshot(found) => {
                let (volume, _) = found.volume()?;
                let snapshot = SnapshotSource {
                    repository: Some(Repository {
                        url: found.url.to_string(),
                        secrets: request.secrets.clone(),
                    }),
                    snapshot: found.record.id.to_string(),
                    volume: volume.name.to_string(),
                    origin: source.clone(),
                };
                (sizes.choose(volume.len_bytes)?, Some(Source::Snapshot(snapshot)))
            }
        };
        let mut metadata: BTreeMap<_, _> = parameters.to_metadata();
        metadata.insert(CSI_NAME.to_owned(), request.name.clone());
        metadata.insert(CSI_SOURCE.to_owned(), source);
        Ok(CreateVolumeRequest {
            name: volume_name(&request.name).to_string(),
            size_bytes,
            filesystem: filesystem.to_string(),
            metadata: metadata.into_iter().collect(),
            source: from,
        })
    }

    pub(super) async fn delete(&self, request: csi::DeleteVolumeRequest) -> Result<(), Status> {
        check("volume id", &request.volume_id)?;
        // An id that was never given out has no volume.
        let Ok(handle) = request.volume_id.parse::<VolumeHandle>() else { return Ok(()) };
        let _changing = self.changing(&request.volume_id)?;
        match handle {
            VolumeHandle::Local { pool, name } => match self.nodes.by_pool(pool).await {
                Ok(agent) => agent.delete_volume(name.as_str(), &request.secrets).await,
                Err(status) if status.code() == Code::NotFound => Ok(()),
                Err(status) => Err(status),
            },
            VolumeHandle::ReadOnly { pin, repository, snapshot, .. } => {
                let url = self.repositories.url(&repository)?;
                let opened = self.repositories.open(&url, &request.secrets).await?;
                let pin = ClonePin::taken(&opened.repository, pin, snapshot);
                pin.end(&self.ctx).await.map_err(failure::of_engine)
            }
        }
    }

    pub(super) async fn expand(
        &self,
        request: csi::ControllerExpandVolumeRequest,
    ) -> Result<csi::ControllerExpandVolumeResponse, Status> {
        check("volume id", &request.volume_id)?;
        if request.capacity_range.is_none() {
            return Err(Status::invalid_argument("the capacity range is missing"));
        }
        let sizes = Sizes::of(request.capacity_range.as_ref())?;
        let (pool, name) = local(&request.volume_id)?;
        let _changing = self.changing(&request.volume_id)?;
        let agent = self.nodes.by_pool(pool).await?;
        let now = agent.volume(name.as_str()).await?.size_bytes;
        if sizes.limit_bytes.is_some_and(|limit| limit < now) {
            return Err(Status::out_of_range(format!(
                "the volume has {now} bytes, and volumes don't shrink"
            )));
        }
        let size_bytes = sizes.choose(0)?.max(now);
        let request = ExpandVolumeRequest { name: name.to_string(), size_bytes };
        let volume = agent.expand_volume(request).await?;
        // The node's agent grows the file system too, now or when it is mounted next.
        Ok(csi::ControllerExpandVolumeResponse {
            capacity_bytes: signed(volume.size_bytes),
            node_expansion_required: false,
        })
    }

    pub(super) async fn validate(
        &self,
        request: csi::ValidateVolumeCapabilitiesRequest,
    ) -> Result<csi::ValidateVolumeCapabilitiesResponse, Status> {
        check("volume id", &request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(Status::invalid_argument("there are no volume capabilities"));
        }
        let unconfirmed =
            |message: String| csi::ValidateVolumeCapabilitiesResponse { confirmed: None, message };
        let found = self.found(&request.volume_id, &request.secrets).await?;
        let usages = match Usage::of_all(&request.volume_capabilities) {
            Ok(usages) => usages,
            Err(status) => return Ok(unconfirmed(status.message().to_owned())),
        };
        for usage in usages {
            let many = usage.mode == Mode::MultiNodeReaderOnly;
            if many != found.is_read_only {
                return Ok(unconfirmed(format!("{} is not possible", usage.mode.as_str_name())));
            }
            if let Some(filesystem) = &found.filesystem
                && usage.named
                && !usage.is_block()
                && usage.filesystem.as_str() != filesystem
            {
                return Ok(unconfirmed(format!("the volume has {filesystem}")));
            }
        }
        Ok(csi::ValidateVolumeCapabilitiesResponse {
            confirmed: Some(csi::validate_volume_capabilities_response::Confirmed {
                volume_context: request.volume_context,
                volume_capabilities: request.volume_capabilities,
                parameters: request.parameters,
                mutable_parameters: request.mutable_parameters,
            }),
            message: String::new(),
        })
    }

    /// Follows the id of a volume: `NOT_FOUND`.
    pub(super) async fn found(&self, id: &str, secrets: &Secrets) -> Result<FoundVolume, Status> {
        let unknown = || Status::not_found(format!("no volume {id}"));
        match id.parse::<VolumeHandle>().map_err(|_| unknown())? {
            VolumeHandle::Local { pool, name } => {
                let Node { info, agent } = self.node(pool).await?;
                let volume = agent.volume(name.as_str()).await?;
                // Of a clone, only its mount shows what is on it.
                let filesystem =
                    Some(volume.filesystem.clone()).filter(|_| volume.origin.is_empty());
                let entry = entry(&info, &volume);
                Ok(FoundVolume { filesystem, is_read_only: false, entry })
            }
            VolumeHandle::ReadOnly { number, repository, snapshot, .. } => {
                let url = self.repositories.url(&repository)?;
                let opened = self.repositories.open(&url, secrets).await?;
                let listing = opened.repository.records(vec![snapshot]).await;
                let listing = listing.map_err(failure::of_engine)?;
                let at = usize::try_from(number.saturating_sub(1)).unwrap_or(usize::MAX);
                let volume = listing.records.first().and_then(|record| record.volumes.get(at));
                let volume = volume.ok_or_else(unknown)?;
                let entry = csi::Volume {
                    capacity_bytes: signed(volume.len_bytes),
                    volume_id: id.to_owned(),
                    ..csi::Volume::default()
                };
                let entry = Entry { volume: entry, trouble: String::new() };
                Ok(FoundVolume { filesystem: None, is_read_only: true, entry })
            }
        }
    }

    pub(super) async fn get(&self, id: &str) -> Result<csi::ControllerGetVolumeResponse, Status> {
        check("volume id", id)?;
        let Entry { volume, trouble } = self.found(id, &[].into()).await?.entry;
        let status = csi::controller_get_volume_response::VolumeStatus {
            published_node_ids: vec![],
            volume_condition: Some(condition(trouble)),
        };
        Ok(csi::ControllerGetVolumeResponse { volume: Some(volume), status: Some(status) })
    }

    pub(super) async fn list(
        &self,
        request: csi::ListVolumesRequest,
    ) -> Result<csi::ListVolumesResponse, Status> {
        let nodes = self.everyone().await?;
        let mut found = self.all_readers(&nodes).await?;
        for Node { info, agent } in nodes {
            found.extend(agent.volumes().await?.iter().map(|volume| entry(&info, volume)));
        }
        let all = found.into_iter().map(|Entry { volume, trouble }| {
            let status = csi::list_volumes_response::VolumeStatus {
                published_node_ids: vec![],
                volume_condition: Some(condition(trouble)),
            };
            let id = volume.volume_id.clone();
            (id, csi::list_volumes_response::Entry { volume: Some(volume), status: Some(status) })
        });
        let all = all.collect();
        let is_id = |token: &str| token.parse::<VolumeHandle>().is_ok();
        let (entries, next_token) =
            paging::page(all, request.max_entries, &request.starting_token, is_id)?;
        Ok(csi::ListVolumesResponse { entries, next_token })
    }

    pub(super) async fn capacity(
        &self,
        request: csi::GetCapacityRequest,
    ) -> Result<csi::GetCapacityResponse, Status> {
        if !request.volume_capabilities.is_empty()
            && Usage::of_all(&request.volume_capabilities).is_err()
        {
            return Ok(csi::GetCapacityResponse::default());
        }
        let mut nodes = self.nodes.all().await.there;
        if let Some(topology) = &request.accessible_topology {
            nodes.retain(|node| is_on(topology, &node.info.node));
        }
        let available: u64 = nodes.iter().map(|node| node.info.available_bytes).sum();
        let largest = nodes.iter().map(|node| node.info.largest_volume_bytes).max();
        let smallest = nodes.iter().map(|node| node.info.smallest_volume_bytes).min();
        Ok(csi::GetCapacityResponse {
            available_capacity: signed(available),
            maximum_volume_size: largest.map(signed),
            minimum_volume_size: smallest.map(signed),
        })
    }
}

/// A volume, and what is wrong with it.
pub(super) struct Entry {
    pub volume: csi::Volume,
    pub trouble: String,
}

pub(super) struct FoundVolume {
    /// Where that is known.
    filesystem: Option<String>,
    pub is_read_only: bool,
    entry: Entry,
}

/// The pool and name of a volume that has a place: `NOT_FOUND` for ids that were never given out.
pub(super) fn local(id: &str) -> Result<(SnapshotId, Name), Status> {
    check("volume id", id)?;
    match id.parse() {
        Ok(VolumeHandle::Local { pool, name }) => Ok((pool, name)),
        Ok(VolumeHandle::ReadOnly { .. }) => {
            Err(Status::invalid_argument(format!("{id} is a snapshot that nodes read")))
        }
        Err(foreign) => Err(Status::not_found(format!("no volume {id}: {foreign}"))),
    }
}

/// What is different about a volume that exists, if anything is.
fn same(
    volume: &Volume,
    name: &str,
    source: &str,
    sizes: Sizes,
    usages: &[Usage],
) -> Result<(), String> {
    let remembered = |key: &str| volume.metadata.get(key).map_or("", String::as_str);
    if remembered(CSI_NAME) != name {
        return Err(format!("the name {:?}", remembered(CSI_NAME)));
    }
    if remembered(CSI_SOURCE) != source {
        return Err(format!("the source {:?}", remembered(CSI_SOURCE)));
    }
    if !sizes.fits(volume.size_bytes) {
        return Err(format!("{} bytes", volume.size_bytes));
    }
    let filesystem = usages.iter().find(|usage| !usage.is_block()).map(|usage| usage.filesystem);
    let filesystem = filesystem.unwrap_or(Filesystem::Raw);
    if source.is_empty() && volume.filesystem != filesystem.as_str() {
        return Err(volume.filesystem.clone());
    }
    Ok(())
}

fn made(info: &NodeInfo, volume: Volume, request: &csi::CreateVolumeRequest) -> csi::Volume {
    let content_source = request.volume_content_source.clone();
    csi::Volume { content_source, ..entry(info, &volume).volume }
}

fn entry(info: &NodeInfo, volume: &Volume) -> Entry {
    let segments = [(TOPOLOGY.to_owned(), info.node.clone())].into();
    let listed = csi::Volume {
        capacity_bytes: signed(volume.size_bytes),
        volume_id: format!("{}/{}", info.pool, volume.name),
        volume_context: [].into(),
        content_source: None,
        accessible_topology: vec![csi::Topology { segments }],
    };
    Entry { volume: listed, trouble: volume.trouble.clone() }
}

fn condition(trouble: String) -> csi::VolumeCondition {
    csi::VolumeCondition { abnormal: !trouble.is_empty(), message: trouble }
}

fn is_on(topology: &csi::Topology, node: &str) -> bool {
    topology.segments.get(TOPOLOGY).is_some_and(|name| name == node)
}

/// Sizes of CSI are signed.
pub(super) fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
