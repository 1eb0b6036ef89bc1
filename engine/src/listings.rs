//! Whether the catalogue leads to every snapshot and nowhere else, and putting it right.
//!
//! The catalogue only helps to find snapshots by name, and every record has all that its entry says. So entries can
//! be made again and removed beside any number of writers and collectors; nothing is decided by them.

use std::collections::BTreeMap;

use crate::context::Context;
use crate::error::Result;
use crate::key::Key;
use crate::record::{CatalogueEntry, Decision, SnapshotRecord, kind};
use crate::repository::Repository;
use crate::survey::Survey;
use crate::verify::describe;

/// What is wrong with the catalogue.
#[derive(Debug)]
pub(crate) enum Finding<'a> {
    /// A committed snapshot that can't be found by name.
    Lost {
        /// The snapshot.
        record: &'a SnapshotRecord,
        /// Where its entry should be.
        key: Key,
        /// What is there.
        detail: String,
    },
    /// An entry that leads to no snapshot.
    Stray(&'a Key),
}

/// Compares the catalogue with the records. Sessions that are undecided, or whose decision can't be read, may have an
/// entry.
pub(crate) fn findings(survey: &Survey) -> Vec<Finding<'_>> {
    let by_key: BTreeMap<&Key, &Result<CatalogueEntry>> =
        survey.entries.iter().map(|(entry, content)| (&entry.key, content)).collect();
    let lost = survey.committed().filter_map(|record| {
        let SnapshotRecord { id, experiment, run, .. } = record;
        let key = Key::catalogue(&survey.keys, experiment, run, *id);
        let detail = match by_key.get(&key) {
            None => format!("it is missing, so that {experiment}/{run} does not list the snapshot"),
            Some(Err(error)) => describe(error).1,
            Some(Ok(names)) if (&names.experiment, &names.run) != (experiment, run) => {
                format!(
                    "it names {}/{}, the snapshot {experiment}/{run}",
                    names.experiment, names.run
                )
            }
            Some(Ok(_)) => return None,
        };
        Some(Finding::Lost { record, key, detail })
    });
    let stray = survey.entries.iter().filter_map(|(entry, _)| {
        let is_stray = match survey.decisions.get(&entry.session) {
            _ if survey.is_purged(entry.session) => true,
            Some(Ok(Decision::Commit { snapshot, .. })) => {
                let SnapshotRecord { id, experiment, run, .. } = &**snapshot;
                entry.key != Key::catalogue(&survey.keys, experiment, run, *id)
            }
            Some(Ok(_)) => true,
            Some(Err(_)) | None => false,
        };
        is_stray.then_some(Finding::Stray(&entry.key))
    });
    lost.chain(stray).collect()
}

/// Puts one finding right.
pub(crate) async fn mend(repo: &Repository, finding: &Finding<'_>, ctx: &Context) -> Result<()> {
    ctx.check()?;
    match finding {
        Finding::Lost { record, key, .. } => {
            let names =
                CatalogueEntry { experiment: record.experiment.clone(), run: record.run.clone() };
            // What a damaged one must have said. Stores may refuse to change an object.
            repo.store().delete(key).await?;
            repo.store().put(key, repo.seal(kind::CATALOGUE, key, &names)?).await?;
        }
        Finding::Stray(key) => repo.store().delete(key).await?,
    }
    Ok(())
}
