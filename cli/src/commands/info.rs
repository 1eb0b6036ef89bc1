//! `petra info`.

use std::collections::BTreeMap;

use petra_engine::record::{Config, SnapshotRecord, VolumeRecord, Writers};
use petra_engine::{Item, PetraUrl, Repository};
use serde::Serialize;

use crate::failure::{At, Failure};
use crate::session::Session;
use crate::text::{Fields, bytes, count, duration_ms, ratio, time};
use crate::{lookup, view};

/// Options of `petra info`.
#[derive(Debug, clap::Args)]
pub struct Info {
    /// A repository, experiment, run, snapshot or volume
    #[arg(value_name = "URL")]
    url: String,
}

#[derive(Serialize)]
struct Document<'a> {
    url: String,
    #[serde(flatten)]
    about: About<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum About<'a> {
    Repository { config: &'a Config, experiments: usize },
    Experiment(Group),
    Run(Group),
    Snapshot(view::Snapshot<'a>),
    Volume(view::Volume<'a>),
}

/// An experiment or run in numbers.
#[derive(Serialize)]
struct Group {
    runs: usize,
    snapshots: usize,
    new_bytes: u64,
    stored_bytes: u64,
    first: Option<jiff::Timestamp>,
    last: Option<jiff::Timestamp>,
}

impl Group {
    fn of(records: &[SnapshotRecord]) -> Self {
        let runs: std::collections::BTreeSet<_> = records.iter().map(|r| &r.run).collect();
        Self {
            runs: runs.len(),
            snapshots: records.len(),
            new_bytes: records.iter().map(|r| r.stats.new_bytes).sum(),
            stored_bytes: records.iter().map(|r| r.stats.stored_bytes).sum(),
            first: records.first().map(|r| r.created),
            last: records.last().map(|r| r.created),
        }
    }
}

impl Info {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let url = session.url(&self.url)?;
        let repository = session.open(&url).await?;
        session.unless_cancelled(show(session, &repository, &url)).await
    }
}

async fn show(session: &Session, repository: &Repository, url: &PetraUrl) -> Result<(), Failure> {
    let at = &url.repository;
    let mut fields = Fields::default();
    fields.add("url", url.to_string());
    let print = |about: About<'_>, text: String| {
        session.out.report(&Document { url: url.to_string(), about }, || text)
    };
    match &url.item {
        Item::Repository => {
            let config = repository.config();
            let experiments = repository.experiments().await.at(url)?.len();
            fields
                .add("id", config.id.to_string())
                .add("created", time(config.created))
                .add("chunking", config.chunking.to_string())
                .add_some("writers", (config.writers == Writers::Single).then_some("one at a time"))
                .add_some("encryption", config.encryption.map(|_| "aes-256-gcm"))
                .add("experiments", experiments.to_string());
            print(About::Repository { config, experiments }, fields.render())
        }
        Item::Snapshot { volume, .. } => {
            let record = lookup::snapshot(repository, url).await?;
            match volume {
                Some(name) => {
                    let volume = lookup::volume(&record, name, url)?;
                    let view = view::Volume::new(at, &record, volume);
                    print(About::Volume(view), volume_text(fields, &record, volume))
                }
                None => {
                    let view = view::Snapshot::new(at, &record);
                    let mut fields = Fields::default();
                    fields.add("url", &view.url);
                    print(About::Snapshot(view), snapshot_text(fields, &record))
                }
            }
        }
        scope => {
            let records = repository.snapshots(scope).await.at(url)?;
            let group = Group::of(&records);
            fields
                .add("runs", group.runs.to_string())
                .add("snapshots", group.snapshots.to_string())
                .add("new data", bytes(group.new_bytes))
                .add("stored", bytes(group.stored_bytes))
                .add_some("first", group.first.map(time))
                .add_some("last", group.last.map(time));
            let is_run = matches!(scope, Item::Run { .. });
            let about = if is_run { About::Run(group) } else { About::Experiment(group) };
            print(about, fields.render())
        }
    }
}

fn snapshot_text(mut fields: Fields, record: &SnapshotRecord) -> String {
    let stats = &record.stats;
    let some = |map: &BTreeMap<String, String>| (!map.is_empty()).then(|| pairs(map));
    fields
        .add("id", record.id.to_string())
        .add("experiment", record.experiment.as_str())
        .add("run", record.run.as_str())
        .add_some("name", record.name.as_ref().map(|name| name.as_str()))
        .add("created", time(record.created))
        .add_some("labels", some(&record.labels))
        .add_some("message", record.message.as_deref())
        .add_some("metadata", some(&record.metadata))
        .add_some("parent", record.parent.map(|id| id.to_string()))
        .add("data", bytes(stats.data_bytes))
        .add("new", bytes(stats.new_bytes))
        .add(
            "stored",
            format!(
                "{} ({}) in {}",
                bytes(stats.stored_bytes),
                ratio(stats.new_bytes, stats.stored_bytes),
                count(stats.puts, "object")
            ),
        )
        .add("took", duration_ms(stats.elapsed_ms));
    format!("{}\n{}", fields.render(), super::ls::volume_table(record))
}

fn volume_text(mut fields: Fields, record: &SnapshotRecord, volume: &VolumeRecord) -> String {
    fields
        .add("snapshot", record.id.to_string())
        .add("volume", volume.name.as_str())
        .add("size", format!("{} ({} bytes)", bytes(volume.len_bytes), volume.len_bytes))
        .add("data", format!("{} ({} bytes)", bytes(volume.data_bytes), volume.data_bytes))
        .add("content", volume.content.to_string());
    fields.render()
}

/// Labels or metadata in a line.
pub(super) fn pairs(map: &BTreeMap<String, String>) -> String {
    let pairs: Vec<String> = map.iter().map(|(key, value)| format!("{key}={value}")).collect();
    pairs.join(" ")
}
