//! The shapes of JSON documents, where they are not the engine's own reports.
//!
//! They are an interface: docs/cli.md lists them and tests pin them. What a snapshot record holds for the engine
//! alone is not part of them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use petra_engine::record::{Origin, SnapshotRecord, SnapshotStats, VolumeRecord};
use petra_engine::{
    Digest, Item, Name, PetraUrl, RepositoryUrl, Selector, SnapshotId, SnapshotRef,
};
use serde::Serialize;

/// A snapshot.
#[derive(Debug, Serialize)]
pub struct Snapshot<'a> {
    /// With its id.
    pub url: String,
    id: SnapshotId,
    experiment: &'a Name,
    run: &'a Name,
    name: Option<&'a Name>,
    created: Timestamp,
    labels: &'a BTreeMap<String, String>,
    message: Option<&'a str>,
    metadata: &'a BTreeMap<String, String>,
    parent: Option<SnapshotId>,
    origin: Option<Origin>,
    volumes: Vec<Volume<'a>>,
    stats: &'a SnapshotStats,
}

/// A volume of a snapshot.
#[derive(Debug, Serialize)]
pub struct Volume<'a> {
    name: &'a Name,
    url: String,
    len_bytes: u64,
    data_bytes: u64,
    content: Digest,
}

impl<'a> Snapshot<'a> {
    /// A snapshot of this repository.
    pub fn new(repository: &RepositoryUrl, record: &'a SnapshotRecord) -> Self {
        Self {
            url: snapshot_url(repository, record, None),
            id: record.id,
            experiment: &record.experiment,
            run: &record.run,
            name: record.name.as_ref(),
            created: record.created,
            labels: &record.labels,
            message: record.message.as_deref(),
            metadata: &record.metadata,
            parent: record.parent,
            origin: record.origin,
            volumes: record.volumes.iter().map(|v| Volume::new(repository, record, v)).collect(),
            stats: &record.stats,
        }
    }
}

impl<'a> Volume<'a> {
    /// A volume of this snapshot.
    pub fn new(
        repository: &RepositoryUrl,
        record: &SnapshotRecord,
        volume: &'a VolumeRecord,
    ) -> Self {
        Self {
            name: &volume.name,
            url: snapshot_url(repository, record, Some(&volume.name)),
            len_bytes: volume.len_bytes,
            data_bytes: volume.data_bytes,
            content: volume.content,
        }
    }
}

/// A named thing and the URL that leads to it.
#[derive(Debug, Serialize)]
pub struct Entry {
    name: Name,
    url: String,
}

impl Entry {
    /// An entry for this item.
    pub fn new(repository: &RepositoryUrl, name: Name, item: Item) -> Self {
        Self { name, url: PetraUrl { repository: repository.clone(), item }.to_string() }
    }
}

/// The URL of a snapshot by its id, or of one of its volumes.
pub fn snapshot_url(
    repository: &RepositoryUrl,
    record: &SnapshotRecord,
    volume: Option<&Name>,
) -> String {
    let snapshot = by_id(&record.experiment, &record.run, record.id);
    let item = Item::Snapshot { snapshot, volume: volume.cloned() };
    PetraUrl { repository: repository.clone(), item }.to_string()
}

/// The URL of a snapshot of which no more is known than this.
pub fn url_of(repository: &RepositoryUrl, experiment: &Name, run: &Name, id: SnapshotId) -> String {
    let item = Item::Snapshot { snapshot: by_id(experiment, run, id), volume: None };
    PetraUrl { repository: repository.clone(), item }.to_string()
}

fn by_id(experiment: &Name, run: &Name, id: SnapshotId) -> SnapshotRef {
    match Name::new("snapshot", id.to_string()) {
        Ok(text) => SnapshotRef::InRun {
            experiment: experiment.clone(),
            run: run.clone(),
            selector: Selector::Text(text),
        },
        // An id is always a name; the other form says the same.
        Err(_) => SnapshotRef::Id(id),
    }
}
