//! Snapshots of one volume or of a group: cut on a node, then in a repository.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use petra_engine::record::SnapshotRecord;
use petra_engine::{Name, RepositoryUrl, SnapshotId};
use tonic::{Code, Status};

use super::volumes::{local, signed};
use super::{Controller, check, paging};
use crate::agent::nodes::Node;
use crate::agent::{CSI_NAME, NodeAgent, Repository, SnapshotMember, TakeSnapshotRequest, Upload};
use crate::failure;
use crate::handle::SnapshotHandle;
use crate::locks::Operation;
use crate::proto::csi;
use crate::repositories::{Found, Secrets};
use crate::template::{Parameters, Place, REPOSITORY};

/// Metadata of a snapshot: `csi.volume.MEMBER` is the id of the volume that it was taken of.
const CSI_VOLUME: &str = "csi.volume.";
/// How groups are told from snapshots that have the same name in their call.
const GROUP: &str = "group/";

/// A snapshot to take, of one volume or several.
pub(super) struct Wanted {
    /// The name in the call, with `group/` before it for a group.
    pub name: String,
    /// The ids of the volumes.
    pub volumes: Vec<String>,
    pub parameters: HashMap<String, String>,
    pub secrets: Secrets,
}

/// A snapshot that was cut, whether it is uploaded or not.
#[derive(Clone, Debug)]
pub(super) struct Cut {
    /// The repository, as ids have it.
    repository: String,
    /// The id that was given out.
    id: SnapshotId,
    /// Names and sizes of the members, with the ids of the volumes that they were taken of.
    members: Vec<(Name, u64, String)>,
    csi_name: String,
    ready: bool,
}

impl Cut {
    fn of_upload(upload: &Upload, repository: &str) -> Result<Self, Status> {
        let bad = |_| Status::internal(format!("upload {:?} can't be understood", upload.id));
        let members = upload.members.iter().map(|member| {
            let name = Name::new("volume", &member.name).map_err(|_| bad(""))?;
            let of = remembered(&upload.metadata, &name);
            Ok((name, member.size_bytes, of))
        });
        Ok(Self {
            repository: repository.to_owned(),
            id: upload.id.parse().map_err(bad)?,
            members: members.collect::<Result<_, Status>>()?,
            csi_name: upload.metadata.get(CSI_NAME).cloned().unwrap_or_default(),
            ready: false,
        })
    }

    fn of_record(record: &SnapshotRecord, repository: &str) -> Self {
        let members = record.volumes.iter().map(|volume| {
            (volume.name.clone(), volume.len_bytes, remembered(&record.metadata, &volume.name))
        });
        Self {
            repository: repository.to_owned(),
            id: petra_volume::snapshot::upload_of(record),
            members: members.collect(),
            csi_name: record.metadata.get(CSI_NAME).cloned().unwrap_or_default(),
            ready: true,
        }
    }

    fn is_group(&self) -> bool {
        self.csi_name.starts_with(GROUP) || self.members.len() > 1
    }

    fn group_id(&self) -> String {
        SnapshotHandle::group(&self.repository, self.id).to_string()
    }

    /// What a call is told of each member.
    pub(super) fn snapshots(&self) -> Vec<csi::Snapshot> {
        self.members.iter().map(|member| self.snapshot_of(member)).collect()
    }

    /// What a call is told of the member of this name; without a name of the only one.
    fn member(&self, name: Option<&Name>) -> Option<csi::Snapshot> {
        let found = match (name, self.members.as_slice()) {
            (Some(name), members) => members.iter().find(|(member, ..)| member == name),
            (None, [only]) => Some(only),
            (None, _) => None,
        };
        found.map(|member| self.snapshot_of(member))
    }

    fn snapshot_of(&self, (name, size_bytes, volume): &(Name, u64, String)) -> csi::Snapshot {
        csi::Snapshot {
            size_bytes: signed(*size_bytes),
            snapshot_id: SnapshotHandle::member(&self.repository, self.id, name).to_string(),
            source_volume_id: volume.clone(),
            creation_time: Some(self.time()),
            ready_to_use: self.ready,
            group_snapshot_id: if self.is_group() { self.group_id() } else { String::new() },
        }
    }

    pub(super) fn group(&self) -> csi::VolumeGroupSnapshot {
        csi::VolumeGroupSnapshot {
            group_snapshot_id: self.group_id(),
            snapshots: self.snapshots(),
            creation_time: Some(self.time()),
            ready_to_use: self.ready,
        }
    }

    fn time(&self) -> prost_types::Timestamp {
        let ms = self.id.unix_ms();
        prost_types::Timestamp {
            seconds: signed(ms / 1000),
            nanos: i32::try_from(ms % 1000).unwrap_or_default() * 1_000_000,
        }
    }
}

fn remembered<'a, M>(metadata: &'a M, member: &Name) -> String
where
    &'a M: IntoIterator<Item = (&'a String, &'a String)>,
{
    let of = |key: &str| key.strip_prefix(CSI_VOLUME) == Some(member.as_str());
    let found = metadata.into_iter().find(|(key, _)| of(key));
    found.map(|(_, volume)| volume.clone()).unwrap_or_default()
}

impl Controller {
    /// Takes a snapshot, or finds the one that an earlier call of this name took.
    pub(super) async fn take(&self, wanted: Wanted) -> Result<Cut, Status> {
        let _named = self.named("snapshot", &wanted.name)?;
        let (pool, _) = local(wanted.volumes.first().map_or("", String::as_str))?;
        let (agent, request, place) = match self.prepare(&wanted, pool).await {
            // A volume that is gone may have left the snapshot that an earlier call began.
            Err(status) if status.code() == Code::NotFound => {
                return self.taken_of_gone(&wanted).await?.ok_or(status);
            }
            prepared => prepared?,
        };
        let repository = request.repository.as_ref().map(|repository| repository.url.clone());
        let repository = repository.unwrap_or_default();
        let short = self.repositories.short(&repository).to_owned();
        // First what is uploading, then what is uploaded: an upload is forgotten only when it is there.
        if let Some((uploading, cut)) = self.uploading(&wanted).await? {
            let _changing = self.changing_snapshot(cut.id)?;
            // Goes on with it if nobody does.
            let going_on = TakeSnapshotRequest { go_on: true, ..request.clone() };
            match uploading.take_snapshot(going_on).await {
                Ok(_) => return Ok(cut),
                // It has just ended, so the snapshot is there; or it was given up.
                Err(status) if status.code() == Code::NotFound => {}
                Err(status) => return Err(status),
            }
        }
        let url: RepositoryUrl = repository.parse().map_err(failure::of_engine)?;
        if let Some(cut) = self.uploaded(&wanted, &url).await? {
            return Ok(cut);
        }
        // What would be the ids must fit before anything is taken.
        for member in &request.members {
            let name = Name::new("volume", &member.name).map_err(failure::of_engine)?;
            let id = SnapshotHandle::member(&short, pool, &name).to_string();
            check("snapshot id (give the repository a name, or its volumes shorter ones)", &id)?;
        }
        tracing::info!(experiment = %place.experiment, run = %place.run, name = %place.snapshot, "a snapshot is taken");
        Cut::of_upload(&agent.take_snapshot(request).await?, &short)
    }

    /// The upload that an earlier call of this name began, and the node that it is on.
    async fn uploading(
        &self,
        wanted: &Wanted,
    ) -> Result<Option<(Arc<dyn NodeAgent>, Cut)>, Status> {
        for (agent, upload) in self.uploads().await? {
            if upload.metadata.get(CSI_NAME) == Some(&wanted.name) {
                let short = self.repositories.short(&upload.repository);
                return Ok(Some((agent, same(Cut::of_upload(&upload, short)?, wanted)?)));
            }
        }
        Ok(None)
    }

    /// The snapshot that an earlier call of this name took into a repository.
    async fn uploaded(&self, wanted: &Wanted, url: &RepositoryUrl) -> Result<Option<Cut>, Status> {
        let opened = self.repositories.open(url, &wanted.secrets).await?;
        let records = opened.records().await?;
        let is_wanted =
            |record: &&Arc<SnapshotRecord>| record.metadata.get(CSI_NAME) == Some(&wanted.name);
        let Some(record) = records.iter().find(is_wanted) else { return Ok(None) };
        self.metrics.snapshot_uploaded(record.id, &record.stats);
        let url = url.to_string();
        same(Cut::of_record(record, self.repositories.short(&url)), wanted).map(Some)
    }

    /// The same where the volume can't say any more which repository its snapshots go to.
    async fn taken_of_gone(&self, wanted: &Wanted) -> Result<Option<Cut>, Status> {
        if let Some((_, cut)) = self.uploading(wanted).await? {
            return Ok(Some(cut));
        }
        let class = Parameters::read(&wanted.parameters, false)?;
        let names = match class.get(REPOSITORY) {
            Some(name) => vec![name],
            None => self.repositories.names().collect(),
        };
        for name in names {
            let url = self.repositories.url(name)?;
            if url.is_template() {
                continue;
            }
            match self.uploaded(wanted, &url).await {
                Ok(None) => {}
                // Those of others need not open with the secrets of this call.
                Err(status) if status.code() == Code::InvalidArgument => {}
                found => return found,
            }
        }
        Ok(None)
    }

    /// What a node is asked for, and the node.
    async fn prepare(
        &self,
        wanted: &Wanted,
        pool: SnapshotId,
    ) -> Result<(Arc<dyn NodeAgent>, TakeSnapshotRequest, Place), Status> {
        let agent = self.nodes.by_pool(pool).await?;
        let (request, place) = self.take_request(wanted, &agent, pool).await?;
        Ok((agent, request, place))
    }

    /// What a node is asked for: all volumes are on it.
    async fn take_request(
        &self,
        wanted: &Wanted,
        agent: &Arc<dyn NodeAgent>,
        pool: SnapshotId,
    ) -> Result<(TakeSnapshotRequest, Place), Status> {
        let class = Parameters::read(&wanted.parameters, false)?;
        let mut metadata = HashMap::from([(CSI_NAME.to_owned(), wanted.name.clone())]);
        let mut members = vec![];
        let mut place = None;
        for id in &wanted.volumes {
            let (on, name) = local(id)?;
            if on != pool {
                return Err(Status::failed_precondition(
                    "the volumes are on several nodes, which have no point in time in common",
                ));
            }
            let volume = agent.volume(name.as_str()).await?;
            let parameters = class.clone().over(&Parameters::of_metadata(&volume.metadata));
            let mut member = parameters.member(name.as_str())?;
            if metadata.contains_key(&format!("{CSI_VOLUME}{member}")) {
                // Claims of two namespaces may have one name.
                member = crate::handle::member_name(name.as_str());
            }
            metadata.insert(format!("{CSI_VOLUME}{member}"), id.clone());
            members.push(SnapshotMember { volume: name.to_string(), name: member.to_string() });
            if place.is_none() {
                let name = wanted.name.strip_prefix(GROUP).unwrap_or(&wanted.name);
                place = Some(parameters.place(name, volume.name.as_str())?);
            }
        }
        let place = place.ok_or_else(|| Status::invalid_argument("there are no volumes"))?;
        let repository = match &place.repository {
            Some(repository) => repository,
            None => self.repositories.default_name()?,
        };
        let mut url = self.repositories.url(repository)?;
        if url.is_template() {
            url = url.for_experiment(&place.experiment).map_err(failure::of_engine)?;
        }
        let request = TakeSnapshotRequest {
            repository: Some(Repository { url: url.to_string(), secrets: wanted.secrets.clone() }),
            experiment: place.experiment.to_string(),
            run: place.run.to_string(),
            name: place.snapshot.to_string(),
            labels: place.labels.clone().into_iter().collect(),
            metadata,
            members,
            go_on: false,
        };
        Ok((request, place))
    }

    /// Uploads of all nodes that can be reached.
    async fn uploads(&self) -> Result<Vec<(Arc<dyn NodeAgent>, Upload)>, Status> {
        let mut all = vec![];
        for Node { agent, .. } in self.nodes.all().await.there {
            let uploads = agent.uploads().await?;
            all.extend(uploads.into_iter().map(|upload| (agent.clone(), upload)));
        }
        Ok(all)
    }

    /// Follows the id of a snapshot or group: `NOT_FOUND`. With the name of the volume, where the id has one.
    async fn cut(&self, id: &str, secrets: &Secrets) -> Result<(Cut, Option<Name>), Status> {
        let handle: SnapshotHandle = id.parse().map_err(|_| unknown(id))?;
        let named = self.repositories.named(&handle)?;
        if let Some(id) = handle.id() {
            let id = id.to_string();
            for (_, upload) in self.uploads().await? {
                if upload.id == id {
                    let cut = Cut::of_upload(&upload, &handle.repository)?;
                    return Ok((cut, named.volume));
                }
            }
        }
        let found = match self.repositories.find(&handle, secrets).await {
            // It may be uploading on a node that is away.
            Err(status) if status.code() == Code::NotFound && handle.id().is_some() => {
                self.everyone().await?;
                return Err(status);
            }
            found => found?,
        };
        Ok((Cut::of_record(&found.record, &handle.repository), named.volume))
    }

    /// The snapshot that an id names, as it is listed.
    pub(super) async fn snapshot(
        &self,
        id: &str,
        secrets: &Secrets,
    ) -> Result<csi::Snapshot, Status> {
        let (cut, volume) = self.cut(id, secrets).await?;
        let member = cut.member(volume.as_ref()).ok_or_else(|| unknown(id))?;
        // The id that the caller knows: it may be a URL of another form, which someone wrote down himself.
        Ok(csi::Snapshot { snapshot_id: id.to_owned(), ..member })
    }

    /// Begins a call that changes the snapshot of an id, if that names one for ever: no other can be changed.
    fn changing_handle(&self, id: &str) -> Result<Option<Operation>, Status> {
        let known = id.parse::<SnapshotHandle>().ok().and_then(|handle| handle.id());
        known.map(|id| self.changing_snapshot(id)).transpose()
    }

    /// Deletes a snapshot of one volume.
    pub(super) async fn delete_snapshot(&self, id: &str, secrets: &Secrets) -> Result<(), Status> {
        check("snapshot id", id)?;
        let _changing = self.changing_handle(id)?;
        let (cut, volume) = match self.cut(id, secrets).await {
            Ok(found) => found,
            Err(status) => return gone(status),
        };
        if cut.member(volume.as_ref()).is_none() {
            return Ok(());
        }
        if cut.is_group() {
            return Err(Status::invalid_argument(format!(
                "{id} belongs to the group {}, which is deleted as a whole",
                cut.group_id()
            )));
        }
        self.delete_cut(id, &cut, secrets).await
    }

    /// Deletes a group with all its members, which must be those that the caller knows, if he names them.
    pub(super) async fn delete_group(
        &self,
        id: &str,
        members: &[String],
        secrets: &Secrets,
    ) -> Result<(), Status> {
        check("group snapshot id", id)?;
        let _changing = self.changing_handle(id)?;
        match self.cut_of_group(id, members, secrets).await {
            Ok(cut) => self.delete_cut(id, &cut, secrets).await,
            Err(status) => gone(status),
        }
    }

    /// Deletes what an id led to: the upload, and what came of it.
    async fn delete_cut(&self, id: &str, cut: &Cut, secrets: &Secrets) -> Result<(), Status> {
        let handle: SnapshotHandle = id.parse().map_err(|_| unknown(id))?;
        let Some(known) = handle.id() else {
            return Err(Status::invalid_argument(format!(
                "{id} may be another snapshot tomorrow: to delete this one, say {}",
                cut.group_id()
            )));
        };
        if !cut.ready {
            let known = known.to_string();
            for (agent, upload) in self.uploads().await? {
                if upload.id == known {
                    agent.discard_upload(&known).await?;
                }
            }
        }
        // It may have been committed at the last moment.
        match self.repositories.find(&handle, secrets).await {
            Ok(Found { opened, record, .. }) => {
                let deleted = opened.repository.delete(record.id, &self.ctx).await;
                deleted.map_err(failure::of_engine).or_else(gone)
            }
            Err(status) => gone(status),
        }
    }

    pub(super) async fn list_snapshots(
        &self,
        request: csi::ListSnapshotsRequest,
    ) -> Result<csi::ListSnapshotsResponse, Status> {
        let mut all = BTreeMap::new();
        if !request.snapshot_id.is_empty() {
            match self.snapshot(&request.snapshot_id, &request.secrets).await {
                Ok(snapshot) => {
                    all.insert(snapshot.snapshot_id.clone(), snapshot);
                }
                Err(status) if status.code() == Code::NotFound => {}
                Err(status) => return Err(status),
            }
        } else {
            let mut cuts = vec![];
            let nodes = self.nodes.all().await.there;
            for (name, opened) in self.known_repositories(&nodes, &request.secrets).await? {
                let records = opened.records().await?;
                let ours = records.iter().filter(|r| r.metadata.contains_key(CSI_NAME));
                cuts.extend(ours.map(|record| Cut::of_record(record, &name)));
            }
            for (_, upload) in self.uploads().await? {
                if upload.metadata.contains_key(CSI_NAME) {
                    cuts.push(Cut::of_upload(
                        &upload,
                        self.repositories.short(&upload.repository),
                    )?);
                }
            }
            // One that is both was committed between the two questions.
            for snapshot in cuts.iter().flat_map(Cut::snapshots) {
                all.entry(snapshot.snapshot_id.clone()).or_insert(snapshot);
            }
        }
        let of = &request.source_volume_id;
        all.retain(|_, snapshot| of.is_empty() || snapshot.source_volume_id == *of);
        let is_id = |token: &str| token.parse::<SnapshotHandle>().is_ok();
        let (snapshots, next_token) = paging::page(
            all.into_iter().collect(),
            request.max_entries,
            &request.starting_token,
            is_id,
        )?;
        let entries = snapshots
            .into_iter()
            .map(|snapshot| csi::list_snapshots_response::Entry { snapshot: Some(snapshot) })
            .collect();
        Ok(csi::ListSnapshotsResponse { entries, next_token })
    }

    pub(super) async fn take_one(
        &self,
        request: csi::CreateSnapshotRequest,
    ) -> Result<csi::Snapshot, Status> {
        check("name", &request.name)?;
        check("source volume id", &request.source_volume_id)?;
        let csi::CreateSnapshotRequest { source_volume_id, name, secrets, parameters } = request;
        let wanted = Wanted { name, volumes: vec![source_volume_id], parameters, secrets };
        let snapshots = self.take(wanted).await?.snapshots();
        snapshots.into_iter().next().ok_or_else(|| Status::internal("a snapshot without volumes"))
    }

    pub(super) async fn take_group(
        &self,
        request: csi::CreateVolumeGroupSnapshotRequest,
    ) -> Result<csi::VolumeGroupSnapshot, Status> {
        check("name", &request.name)?;
        let csi::CreateVolumeGroupSnapshotRequest { name, source_volume_ids, secrets, parameters } =
            request;
        if source_volume_ids.is_empty() {
            return Err(Status::invalid_argument("there are no source volume ids"));
        }
        for id in &source_volume_ids {
            check("source volume id", id)?;
        }
        let mut volumes = source_volume_ids;
        volumes.sort_unstable();
        volumes.dedup();
        let name = format!("{GROUP}{name}");
        Ok(self.take(Wanted { name, volumes, parameters, secrets }).await?.group())
    }

    /// A group that an id names. The members must be those that the caller knows, if he names them.
    pub(super) async fn group(
        &self,
        id: &str,
        members: &[String],
        secrets: &Secrets,
    ) -> Result<csi::VolumeGroupSnapshot, Status> {
        check("group snapshot id", id)?;
        Ok(self.cut_of_group(id, members, secrets).await?.group())
    }

    async fn cut_of_group(
        &self,
        id: &str,
        members: &[String],
        secrets: &Secrets,
    ) -> Result<Cut, Status> {
        let (cut, volume) = self.cut(id, secrets).await?;
        // A member of a group is no group, and a snapshot that was taken alone is none either.
        if volume.is_some() || !cut.is_group() {
            return Err(unknown(id));
        }
        let known: Vec<_> = cut.snapshots().into_iter().map(|member| member.snapshot_id).collect();
        if members.iter().any(|member| !known.contains(member)) {
            return Err(Status::invalid_argument(format!("{id} has other members")));
        }
        Ok(cut)
    }
}

/// What is not there is deleted.
fn gone(status: Status) -> Result<(), Status> {
    match status.code() {
        Code::NotFound => Ok(()),
        _ => Err(status),
    }
}

fn unknown(id: &str) -> Status {
    Status::not_found(format!("no snapshot {id}"))
}

/// The snapshot that was found, if it is of the same volumes as the one that is wanted.
fn same(cut: Cut, wanted: &Wanted) -> Result<Cut, Status> {
    let mut volumes: Vec<_> = cut.members.iter().map(|(_, _, volume)| volume).collect();
    volumes.sort_unstable();
    if volumes.into_iter().eq(&wanted.volumes) {
        Ok(cut)
    } else {
        let name = wanted.name.strip_prefix(GROUP).unwrap_or(&wanted.name);
        Err(Status::already_exists(format!("there is a snapshot {name} of other volumes")))
    }
}
