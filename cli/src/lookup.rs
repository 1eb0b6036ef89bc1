//! From a URL to what it names, with errors that say what is there instead.

use petra_engine::error::{Error, Result};
use petra_engine::name::Name;
use petra_engine::record::{SnapshotRecord, VolumeRecord};
use petra_engine::repository::Repository;
use petra_engine::url::{Item, PetraUrl, Selector, SnapshotRef};

use crate::failure::{At, Failure};

/// How many names an error lists at most.
const KNOWN: usize = 20;

/// The snapshot that a URL names.
pub async fn snapshot(
    repository: &Repository,
    url: &PetraUrl,
) -> std::result::Result<SnapshotRecord, Failure> {
    let Item::Snapshot { snapshot, .. } = &url.item else { return Err(not_a_snapshot(url)) };
    match repository.find(snapshot).await {
        Err(error @ Error::Unknown { what: "snapshot", .. }) => {
            // The reason may lie further up, and that is the name to correct.
            let SnapshotRef::InRun { experiment, run, .. } = snapshot else {
                return Err(error).at(url);
            };
            let (experiment, run) = (experiment.clone(), run.clone());
            exists(repository, &Item::Run { experiment, run }).await.at(url)?;
            Err(error).at(url)
        }
        result => result.at(url),
    }
}

/// Fails unless the experiment or run has snapshots.
pub async fn exists(repository: &Repository, scope: &Item) -> Result<()> {
    let (Item::Experiment(experiment) | Item::Run { experiment, .. }) = scope else {
        return Ok(());
    };
    let location = repository.location();
    known("experiment", experiment, &location, &repository.experiments().await?)?;
    let Item::Run { run, .. } = scope else { return Ok(()) };
    let within = format!("experiment {experiment:?} of {location}");
    known("run", run, &within, &repository.runs(experiment).await?)
}

/// The snapshots of a repository, experiment or run, oldest first. A scope that does not exist is an error.
pub async fn snapshots(repository: &Repository, scope: &Item) -> Result<Vec<SnapshotRecord>> {
    let snapshots = repository.snapshots(scope).await?;
    if snapshots.is_empty() {
        exists(repository, scope).await?;
    }
    Ok(snapshots)
}

/// The volume of this name.
pub fn volume<'a>(record: &'a SnapshotRecord, name: &Name) -> Result<&'a VolumeRecord> {
    let found = record.volumes.iter().find(|volume| volume.name == *name);
    found.ok_or_else(|| {
        let names = record.volumes.iter().map(|volume| &volume.name);
        unknown("volume", name, &format!("snapshot {}", record.id), names)
    })
}

/// The error for a URL that should name a snapshot.
pub fn not_a_snapshot(url: &PetraUrl) -> Failure {
    let (found, hint) = match &url.item {
        Item::Run { experiment, run } => {
            let selector = Selector::Latest;
            let snapshot =
                SnapshotRef::InRun { experiment: experiment.clone(), run: run.clone(), selector };
            let item = Item::Snapshot { snapshot, volume: None };
            let latest = PetraUrl { repository: url.repository.clone(), item };
            ("a run", format!("its newest snapshot is {latest}; petra ls {url} lists all"))
        }
        Item::Experiment(_) => {
            ("an experiment", format!("petra ls --recursive {url} lists its snapshots"))
        }
        _ => ("a repository", format!("petra ls --recursive {url} lists its snapshots")),
    };
    Failure::fix(format!("{url} names {found}, not a snapshot")).hint(hint)
}

fn known(what: &'static str, name: &Name, within: &str, names: &[Name]) -> Result<()> {
    if names.contains(name) { Ok(()) } else { Err(unknown(what, name, within, names.iter())) }
}

fn unknown<'a>(
    what: &'static str,
    name: &Name,
    within: &str,
    names: impl Iterator<Item = &'a Name>,
) -> Error {
    Error::Unknown {
        what,
        name: name.to_string(),
        within: within.to_owned(),
        known: names.take(KNOWN).map(ToString::to_string).collect(),
    }
}
