//! `petra rm`.

use std::collections::BTreeSet;

use petra_engine::marks::undelete_until;
use petra_engine::record::SnapshotRecord;
use petra_engine::{Item, PetraUrl, Repository};
use serde::Serialize;

use crate::failure::{At, Failure};
use crate::session::Session;
use crate::text::{count, quoted, time};
use crate::{lookup, view};

/// Options of `petra rm`.
#[derive(Debug, clap::Args)]
pub struct Rm {
    /// Snapshots to delete
    #[arg(value_name = "URL", required = true)]
    urls: Vec<String>,
    /// Delete all snapshots of a run or experiment
    #[arg(long, short)]
    recursive: bool,
}

#[derive(Serialize)]
struct Document {
    deleted: Vec<String>,
}

impl Rm {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        // Everything is found before anything is deleted, so that a wrong URL changes nothing.
        let mut found = vec![];
        for text in &self.urls {
            let url = session.url(text)?;
            let repository = session.open(&url).await?;
            let records =
                session.unless_cancelled(select(&repository, &url, self.recursive)).await?;
            found.push((url, repository, records));
        }
        let activity = session.activity("rm");
        let mut deleted = vec![];
        let mut seen = BTreeSet::new();
        for (url, repository, records) in &found {
            for record in records.iter().filter(|record| seen.insert(record.id)) {
                repository.delete(record.id, &activity.context).await.at(url)?;
                deleted.push(view::snapshot_url(&url.repository, record, None));
            }
        }
        let until = undelete_until(&activity.context);
        drop(activity);
        session.out.say(&format!(
            "deleted {}; petra undelete brings them back until {}, petra gc frees the data then",
            count(deleted.len(), "snapshot"),
            time(until)
        ));
        let document = Document { deleted };
        session
            .out
            .report(&document, || document.deleted.iter().map(|url| format!("{url}\n")).collect())
    }
}

async fn select(
    repository: &Repository,
    url: &PetraUrl,
    recursive: bool,
) -> Result<Vec<SnapshotRecord>, Failure> {
    match &url.item {
        Item::Snapshot { volume: None, .. } => Ok(vec![lookup::snapshot(repository, url).await?]),
        Item::Snapshot { volume: Some(_), .. } => {
            Err(Failure::fix(format!("{url} names a volume, and snapshots never change"))
                .hint("leave out the volume to delete the whole snapshot"))
        }
        Item::Repository => Err(Failure::fix(format!("{url} is a whole repository"))
            .hint("delete its directory, or the bucket or prefix, with the store's own tools")),
        scope if recursive => repository.snapshots(scope).await.at(url),
        _ => Err(Failure::fix(format!("{url} is more than a snapshot")).hint(format!(
            "petra rm --recursive {} deletes all its snapshots",
            quoted(&url.to_string())
        ))),
    }
}
