//! `petra undelete`.

use std::collections::BTreeSet;

use petra_engine::record::SnapshotRecord;
use petra_engine::{Error, Item, PetraUrl, Repository};
use serde::Serialize;

use crate::failure::{At, Failure};
use crate::session::Session;
use crate::text::{count, quoted};
use crate::view;

/// Options of `petra undelete`.
#[derive(Debug, clap::Args)]
pub struct Undelete {
    /// Deleted snapshots to bring back; @latest is the one that was deleted last
    #[arg(value_name = "URL", required = true)]
    urls: Vec<String>,
    /// Bring back all deleted snapshots of a run, experiment or repository
    #[arg(long, short)]
    recursive: bool,
}

#[derive(Serialize)]
struct Document {
    undeleted: Vec<String>,
}

impl Undelete {
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        // Everything is found before anything is brought back, so that a wrong URL changes nothing.
        let mut found = vec![];
        for text in &self.urls {
            let url = session.url(text)?;
            let repository = session.open(&url).await?;
            let records =
                session.unless_cancelled(select(&repository, &url, self.recursive)).await?;
            found.push((url, repository, records));
        }
        let activity = session.activity("undelete");
        let mut undeleted = vec![];
        let mut seen = BTreeSet::new();
        for (url, repository, records) in &found {
            for record in records.iter().filter(|record| seen.insert(record.id)) {
                activity.context.check()?;
                repository.undelete(record.id, &activity.context).await.at(url)?;
                undeleted.push(view::snapshot_url(&url.repository, record, None));
            }
        }
        drop(activity);
        session.out.say(&format!("{} back", there(undeleted.len())));
        let document = Document { undeleted };
        session
            .out
            .report(&document, || document.undeleted.iter().map(|url| format!("{url}\n")).collect())
    }
}

fn there(n: usize) -> String {
    let verb = if n == 1 { "is" } else { "are" };
    format!("{} {verb}", count(n, "snapshot"))
}

async fn select(
    repository: &Repository,
    url: &PetraUrl,
    recursive: bool,
) -> Result<Vec<SnapshotRecord>, Failure> {
    match &url.item {
        Item::Snapshot { volume: Some(_), .. } => {
            Err(Failure::fix(format!("{url} names a volume, and snapshots come back as a whole"))
                .hint("leave out the volume"))
        }
        Item::Snapshot { snapshot, volume: None } => {
            let error = match repository.find_deleted(snapshot).await {
                Ok(found) => return Ok(vec![found.record]),
                Err(error) => error,
            };
            // What is there needs no bringing back: the same command may be repeated.
            match (&error, repository.find(snapshot).await) {
                (Error::Unknown { .. }, Ok(record)) => Ok(vec![record]),
                _ => Err(error).at(url),
            }
        }
        scope if recursive => {
            let found = repository.deleted(scope).await.at(url)?;
            if found.is_empty() {
                return Err(Failure::fix(format!("nothing in {url} is deleted and can come back"))
                    .hint(format!(
                        "petra ls --deleted {} lists what can",
                        quoted(&url.repository.to_string())
                    )));
            }
            Ok(found.into_iter().map(|found| found.record).collect())
        }
        _ => Err(Failure::fix(format!("{url} is more than a snapshot")).hint(format!(
            "petra undelete --recursive {} brings all its deleted snapshots back",
            quoted(&url.to_string())
        ))),
    }
}
