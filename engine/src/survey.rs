//! All small objects of a repository, with what can't be read told apart.
//!
//! Listings go by the catalogue, and collections stop at damage. Who looks for damage has to see everything: records
//! that no entry of the catalogue leads to, and marks and pins that can't be read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{StreamExt, stream};
use serde::de::DeserializeOwned;

use crate::context::Context;
use crate::crypto::Keys;
use crate::error::Result;
use crate::graves::Graves;
use crate::id::SnapshotId;
use crate::key::{self, Key};
use crate::marks::MarkState;
use crate::record::{CatalogueEntry, Decision, MarkKind, Pin, SnapshotRecord, kind};
use crate::repository::{Listed, READS, Repository};
use crate::store::list_all;
use crate::url::Item;

/// What is known of the small objects, each with its content or the reason why that can't be read.
#[derive(Debug)]
pub(crate) struct Survey {
    /// The keys of the repository, which names in keys depend on.
    pub keys: Keys,
    /// What was decided about each session.
    pub decisions: BTreeMap<SnapshotId, Result<Decision>>,
    /// The entries of the catalogue.
    pub entries: Vec<(Listed, Result<CatalogueEntry>)>,
    /// The number of each marked snapshot's last mark, and what it says.
    pub marks: BTreeMap<SnapshotId, (u32, Result<MarkState>)>,
    /// Clones that need their pins no longer.
    pub ended: BTreeSet<SnapshotId>,
    /// Ids of which nothing else is left.
    pub graves: Arc<Graves>,
    /// Pins, with their owners.
    pub pins: Vec<(SnapshotId, Key, Result<Pin>)>,
}

impl Survey {
    /// Reads everything. The order lets nothing seem to be missing that a writer or collector beside it has just made
    /// or removed: an entry is there before its commit, and goes only after a mark.
    pub async fn read(repo: &Repository, ctx: &Context) -> Result<Self> {
        let store = repo.store();
        let read = repo
            .decided()
            .await?
            .into_iter()
            .map(|id| async move { (id, repo.decision(id).await) });
        let decisions = told_apart(read, ctx).await?.into_iter().collect();
        let entries = repo.catalogue(key::RUNS).await?.into_iter();
        let read = entries.map(|entry| async move {
            let names = object(repo, kind::CATALOGUE, &entry.key).await;
            (entry, names)
        });
        let entries = told_apart(read, ctx).await?;
        let last = repo.last_marks().await?.into_iter();
        let read = last.map(|(id, k)| async move { ((id, k), repo.read_mark(id, k).await) });
        let marks = told_apart(read, ctx).await?.into_iter();
        let marks = marks.map(|((id, k), state)| (id, (k, state))).collect();
        let ended = repo.ended().await?;
        let pins = list_all(store, key::PINS).await?.into_iter().filter_map(|entry| {
            let owner = key::parse_numbered(&entry.key, key::PINS)?.session;
            Some((owner, Key::from_listing(entry.key)))
        });
        let read = pins.map(|(owner, key)| async move {
            let pin = object(repo, kind::PIN, &key).await;
            ((owner, key), pin)
        });
        let pins = told_apart(read, ctx).await?.into_iter();
        let pins = pins.map(|((owner, key), pin)| (owner, key, pin)).collect();
        // Last: what is buried may be half gone by now.
        let graves = repo.graves().await?;
        Ok(Self { keys: repo.keys().clone(), decisions, entries, marks, ended, graves, pins })
    }

    /// Snapshots that are committed and not purged, oldest first.
    pub fn committed(&self) -> impl Iterator<Item = &SnapshotRecord> {
        self.decisions.iter().filter_map(|(id, decision)| match decision {
            Ok(Decision::Commit { snapshot, .. }) if !self.is_purged(*id) => Some(&**snapshot),
            _ => None,
        })
    }

    /// True when a snapshot's data may be gone, by the marks that can be read.
    pub fn is_purged(&self, id: SnapshotId) -> bool {
        matches!(self.marks.get(&id), Some((_, Ok(state))) if state.mark == MarkKind::Purge)
            || self.graves.contains(id)
    }

    /// True when a snapshot is hidden. A Delete is one by its number, whatever can be read of it.
    pub fn is_deleted(&self, id: SnapshotId) -> bool {
        self.marks.get(&id).is_some_and(|(k, state)| match state {
            Ok(state) => state.mark != MarkKind::Undelete,
            Err(_) => k % 2 == 1,
        })
    }

    /// True when a session belongs to a scope, by its record or else by its entry in the catalogue.
    pub fn is_within(&self, id: SnapshotId, scope: &Item) -> bool {
        let (experiment, run) = match scope {
            Item::Repository => return true,
            Item::Experiment(experiment) => (experiment, None),
            Item::Run { experiment, run } => (experiment, Some(run)),
            Item::Snapshot { .. } => return false,
        };
        if let Some(Ok(Decision::Commit { snapshot, .. })) = self.decisions.get(&id) {
            return snapshot.experiment == *experiment
                && run.is_none_or(|run| snapshot.run == *run);
        }
        let prefix = match run {
            Some(run) => key::run_prefix(&self.keys, experiment, run),
            None => key::experiment_prefix(&self.keys, experiment),
        };
        let mut entries = self.entries.iter().map(|(entry, _)| entry);
        entries.any(|entry| entry.session == id && entry.key.as_str().starts_with(&prefix))
    }
}

/// A small object; None when it is gone.
async fn object<T: DeserializeOwned>(
    repo: &Repository,
    kind: &str,
    key: &Key,
) -> Result<Option<T>> {
    match repo.store().get(key).await {
        Ok(body) => repo.unseal(kind, key, &body).map(Some),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Reads some objects side by side. Why one of them can't be read is in its item; other errors end the call. What
/// went since it was listed was void.
async fn told_apart<K, T>(
    reads: impl Iterator<Item = impl Future<Output = (K, Result<Option<T>>)>>,
    ctx: &Context,
) -> Result<Vec<(K, Result<T>)>> {
    let mut reads = std::pin::pin!(stream::iter(reads).buffered(READS));
    let mut all = Vec::new();
    while let Some((key, value)) = reads.next().await {
        ctx.check()?;
        match value {
            Ok(Some(value)) => all.push((key, Ok(value))),
            Ok(None) => {}
            Err(error) if error.is_unreadable() => all.push((key, Err(error))),
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}
