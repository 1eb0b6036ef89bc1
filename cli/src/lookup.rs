//! From a URL to the snapshot or volume that it names.

use petra_engine::record::{SnapshotRecord, VolumeRecord};
use petra_engine::{Error, Item, Name, PetraUrl, Repository, Selector, SnapshotRef};

use crate::failure::{At, Failure};
use crate::text::quoted;

/// The snapshot that a URL names.
pub async fn snapshot(repository: &Repository, url: &PetraUrl) -> Result<SnapshotRecord, Failure> {
    let Item::Snapshot { snapshot, .. } = &url.item else { return Err(not_a_snapshot(url)) };
    repository.find(snapshot).await.at(url)
}

/// The volume of this name.
pub fn volume<'a>(
    record: &'a SnapshotRecord,
    name: &Name,
    url: &PetraUrl,
) -> Result<&'a VolumeRecord, Failure> {
    let unknown = || Error::Unknown {
        what: "volume",
        name: name.to_string(),
        within: format!("snapshot {}", record.id),
        known: record.volumes.iter().map(|volume| volume.name.to_string()).collect(),
    };
    record.volume(name).ok_or_else(unknown).at(url)
}

/// The volume that a URL names, or the only one of the snapshot that it names.
pub fn one_volume<'a>(
    record: &'a SnapshotRecord,
    url: &PetraUrl,
) -> Result<&'a VolumeRecord, Failure> {
    if let Item::Snapshot { volume: Some(name), .. } = &url.item {
        return volume(record, name, url);
    }
    match record.volumes.as_slice() {
        [only] => Ok(only),
        volumes => {
            let names: Vec<_> = volumes.iter().map(|volume| volume.name.encoded()).collect();
            let text = format!("{url} has {} volumes, and this takes one", volumes.len());
            Err(Failure::fix(text)
                .hint(format!("put one of them after it: /{}", names.join(", /"))))
        }
    }
}

/// Fails if a URL names an experiment or run that has no snapshots, with those that have some. For operations that
/// found nothing to do: a name with a typing error must not look like success.
pub async fn exists(repository: &Repository, url: &PetraUrl) -> Result<(), Failure> {
    match &url.item {
        Item::Experiment(_) | Item::Run { .. } => {
            repository.snapshots(&url.item).await.at(url).map(drop)
        }
        Item::Repository | Item::Snapshot { .. } => Ok(()),
    }
}

/// Fails if a URL names a part of a repository, for what concerns all of it: `command` says what is done to it.
pub fn whole_repository(url: &PetraUrl, command: &str, done: &str) -> Result<(), Failure> {
    if matches!(url.item, Item::Repository) || url.repository.is_template() {
        return Ok(());
    }
    Err(Failure::fix(format!("{url} is a part of a repository")).hint(format!(
        "experiments share data, so all of it is {done}: petra {command} {}",
        url.repository
    )))
}

/// The error for a URL that should name a snapshot.
pub fn not_a_snapshot(url: &PetraUrl) -> Failure {
    let (what, hint) = match &url.item {
        Item::Run { experiment, run } => {
            let (experiment, run) = (experiment.clone(), run.clone());
            let snapshot = SnapshotRef::InRun { experiment, run, selector: Selector::Latest };
            let item = Item::Snapshot { snapshot, volume: None };
            let latest = PetraUrl { repository: url.repository.clone(), item };
            ("a run", format!("its newest snapshot is {latest}; petra ls {} lists all", shown(url)))
        }
        Item::Experiment(_) => ("an experiment", list_hint(url)),
        _ => ("a repository", list_hint(url)),
    };
    Failure::fix(format!("{url} names {what}, not a snapshot")).hint(hint)
}

fn list_hint(url: &PetraUrl) -> String {
    format!("petra ls --recursive {} lists its snapshots", shown(url))
}

fn shown(url: &PetraUrl) -> String {
    quoted(&url.to_string())
}
