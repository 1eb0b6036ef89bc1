//! `petra ls`.

use jiff::Timestamp;
use petra_engine::marks::{self, DEFAULT_GRACE};
use petra_engine::record::SnapshotRecord;
use petra_engine::repository::Listing;
use petra_engine::{Item, Name, PetraUrl, Repository};
use serde::Serialize;

use crate::failure::{At, Failure};
use crate::session::Session;
use crate::text::{Side, Table, bytes, time};
use crate::{lookup, view};

/// Options of `petra ls`.
#[derive(Debug, clap::Args)]
pub struct Ls {
    /// A repository, experiment, run or snapshot [default: the repository of --repository]
    #[arg(value_name = "URL")]
    url: Option<String>,
    /// List all snapshots below, rather than what is directly there
    #[arg(long, short)]
    recursive: bool,
    /// List the snapshots below that were deleted and can be brought back
    #[arg(long)]
    deleted: bool,
}

/// One of the lists is there: the one that the URL asks for.
#[derive(Serialize)]
struct Document<'a> {
    url: String,
    #[serde(flatten)]
    list: List<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum List<'a> {
    Experiments(Vec<view::Entry>),
    Runs(Vec<view::Entry>),
    Snapshots(Vec<view::Snapshot<'a>>),
    Volumes(Vec<view::Volume<'a>>),
    Deleted(Vec<Deleted<'a>>),
}

/// A deleted snapshot.
#[derive(Serialize)]
struct Deleted<'a> {
    #[serde(flatten)]
    snapshot: view::Snapshot<'a>,
    deleted: Timestamp,
    /// With a collector's usual grace time.
    undelete_until: Timestamp,
}

impl Ls {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let url = match self.url.as_deref().or(session.default_repository()) {
            Some(text) => session.url(text)?,
            None => {
                return Err(Failure::fix("there is no repository to list").hint(
                    "give a URL or path such as /srv/petra, or set --repository or \
                     PETRA_REPOSITORY",
                ));
            }
        };
        let repository = session.open(&url).await?;
        if self.deleted {
            return session.unless_cancelled(list_deleted(session, &repository, &url)).await;
        }
        session.unless_cancelled(list(session, &repository, &url, self.recursive)).await
    }
}

async fn list_deleted(
    session: &Session,
    repository: &Repository,
    url: &PetraUrl,
) -> Result<(), Failure> {
    let found = repository.deleted(&url.item).await.at(url)?;
    let list = found.iter().map(|found| Deleted {
        snapshot: view::Snapshot::new(&url.repository, &found.record),
        deleted: found.at,
        undelete_until: found.until(DEFAULT_GRACE),
    });
    let document = Document { url: url.to_string(), list: List::Deleted(list.collect()) };
    session.out.report(&document, || deleted_table(&found, &url.item))
}

fn deleted_table(found: &[marks::Deleted], scope: &Item) -> String {
    use Side::Left;
    let mut columns = vec![
        ("ID", Left),
        ("NAME", Left),
        ("CREATED", Left),
        ("DELETED", Left),
        ("KEPT UNTIL", Left),
        ("LABELS", Left),
    ];
    let with_run = matches!(scope, Item::Repository | Item::Experiment(_));
    if with_run {
        columns.splice(0..0, [("EXPERIMENT", Left), ("RUN", Left)]);
    }
    let mut table = Table::new(&columns);
    for deleted in found {
        let record = &deleted.record;
        let mut cells = vec![
            record.id.to_string(),
            record.name.as_ref().map_or(String::new(), ToString::to_string),
            time(record.created),
            time(deleted.at),
            time(deleted.until(DEFAULT_GRACE)),
            super::info::pairs(&record.labels),
        ];
        if with_run {
            cells.splice(0..0, [record.experiment.to_string(), record.run.to_string()]);
        }
        table.row(cells);
    }
    table.render()
}

async fn list(
    session: &Session,
    repository: &Repository,
    url: &PetraUrl,
    recursive: bool,
) -> Result<(), Failure> {
    let at = &url.repository;
    let print = |list: List<'_>, text: String| {
        session.out.report(&Document { url: url.to_string(), list }, || text)
    };
    match &url.item {
        Item::Repository if !recursive => {
            let names = repository.experiments().await.at(url)?;
            let text = lines(&names);
            let entry = |name: Name| view::Entry::new(at, name.clone(), Item::Experiment(name));
            print(List::Experiments(names.into_iter().map(entry).collect()), text)
        }
        Item::Experiment(experiment) if !recursive => {
            let names = repository.runs(experiment).await.at(url)?;
            let text = lines(&names);
            let entry = |run: Name| {
                let item = Item::Run { experiment: experiment.clone(), run: run.clone() };
                view::Entry::new(at, run, item)
            };
            print(List::Runs(names.into_iter().map(entry).collect()), text)
        }
        Item::Snapshot { .. } => {
            let record = lookup::snapshot(repository, url).await?;
            let volumes =
                record.volumes.iter().map(|volume| view::Volume::new(at, &record, volume));
            print(List::Volumes(volumes.collect()), volume_table(&record))
        }
        scope => {
            let Listing { records, unreadable } = repository.listing(scope).await.at(url)?;
            let text = snapshot_table(&records, recursive && !matches!(scope, Item::Run { .. }));
            let snapshots = records.iter().map(|record| view::Snapshot::new(at, record));
            print(List::Snapshots(snapshots.collect()), text)?;
            match unreadable.first() {
                None => Ok(()),
                Some((_, error)) => Err(Failure::engine(error, Some(url))
                    .causes(unreadable.iter().skip(1).map(|(_, e)| e.to_string()).collect())),
            }
        }
    }
}

fn lines(names: &[Name]) -> String {
    names.iter().map(|name| format!("{name}\n")).collect()
}

fn snapshot_table(records: &[SnapshotRecord], with_run: bool) -> String {
    use Side::{Left, Right};
    let mut columns = vec![
        ("ID", Left),
        ("NAME", Left),
        ("CREATED", Left),
        ("VOLUMES", Right),
        ("DATA", Right),
        ("NEW", Right),
        ("STORED", Right),
        ("LABELS", Left),
    ];
    if with_run {
        columns.splice(0..0, [("EXPERIMENT", Left), ("RUN", Left)]);
    }
    let mut table = Table::new(&columns);
    for record in records {
        let stats = &record.stats;
        let mut cells = vec![
            record.id.to_string(),
            record.name.as_ref().map_or(String::new(), ToString::to_string),
            time(record.created),
            record.volumes.len().to_string(),
            bytes(stats.data_bytes),
            bytes(stats.new_bytes),
            bytes(stats.stored_bytes),
            super::info::pairs(&record.labels),
        ];
        if with_run {
            cells.splice(0..0, [record.experiment.to_string(), record.run.to_string()]);
        }
        table.row(cells);
    }
    table.render()
}

/// The volumes of a snapshot.
pub(super) fn volume_table(record: &SnapshotRecord) -> String {
    use Side::{Left, Right};
    let mut table =
        Table::new(&[("VOLUME", Left), ("SIZE", Right), ("DATA", Right), ("CONTENT", Left)]);
    for volume in &record.volumes {
        table.row([
            volume.name.to_string(),
            bytes(volume.len_bytes),
            bytes(volume.data_bytes),
            volume.content.to_string(),
        ]);
    }
    table.render()
}
