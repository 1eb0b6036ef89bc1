//! Deleted snapshots: which can come back, and bringing them back (docs/protocol.md, "Deleter").

use std::time::Duration;

use jiff::Timestamp;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::id::SnapshotId;
use crate::key::{self, Key};
use crate::name::Name;
use crate::publish::{Published, publish};
use crate::record::{Mark, MarkKind, SnapshotRecord, kind};
use crate::repository::{Repository, timestamp};
use crate::store::list_all;
use crate::url::{Item, Selector, SnapshotRef};

/// How long collectors keep what was deleted, unless they are told otherwise.
pub const DEFAULT_GRACE: Duration = Duration::from_hours(7 * 24);

/// A snapshot that was deleted, and whose data no collector has given up.
#[derive(Clone, Debug, PartialEq)]
pub struct Deleted {
    /// The snapshot.
    pub record: SnapshotRecord,
    /// When it was deleted, by the deleter's clock.
    pub at: Timestamp,
}

impl Deleted {
    /// Until when collectors with this grace time leave it alone.
    pub fn until(&self, grace: Duration) -> Timestamp {
        end_of_grace(self.at, grace)
    }
}

/// Until when what is deleted now can come back, where collectors keep the [`DEFAULT_GRACE`].
pub fn undelete_until(ctx: &Context) -> Timestamp {
    end_of_grace(timestamp(ctx), DEFAULT_GRACE)
}

fn end_of_grace(at: Timestamp, grace: Duration) -> Timestamp {
    at.checked_add(grace).unwrap_or(Timestamp::MAX)
}

impl Repository {
    /// Brings a deleted snapshot back, unless a collector has given up its data. What is not deleted stays as it is,
    /// so an undelete whose answer got lost can be repeated.
    pub async fn undelete(&self, id: SnapshotId, ctx: &Context) -> Result<()> {
        let (committed, ()) = futures::try_join!(self.committed(id), self.ready_to_write(ctx))?;
        if committed.is_none() {
            return Err(self.gone_or_unknown(id).await);
        }
        let outcome = match self.last_mark(id).await? {
            Some(state) if state.mark == MarkKind::Delete => {
                self.mark_undelete(id, state.k + 1, ctx).await
            }
            Some(state) if state.mark == MarkKind::Purge => Err(purged(id, Some(state.at))),
            _ => Ok(None),
        };
        if let Err(Error::Purged { .. }) = outcome {
            return outcome.map(drop);
        }
        // The graves come last: of a snapshot that was purged and buried since, the marks are gone, and the key may
        // have been free again.
        if !self.graves().await?.contains(id) {
            return outcome.map(drop);
        }
        if let Ok(Some(ours)) = outcome {
            // A mark on nothing. If it stays it says nothing.
            let _ = self.store().delete(&ours).await;
        }
        Err(purged(id, None))
    }

    /// Publishes an Undelete; gives its key if no other one was there. Fails if a Purge was there.
    async fn mark_undelete(&self, id: SnapshotId, k: u32, ctx: &Context) -> Result<Option<Key>> {
        let key = Key::mark(id, k);
        let body = self.mark(&key, MarkKind::Undelete, ctx)?;
        let Published::Theirs(body) = publish(self.store(), &key, body).await? else {
            return Ok(Some(key));
        };
        let theirs: Mark = self.unseal(kind::MARK, &key, &body)?;
        match theirs.mark {
            MarkKind::Undelete => Ok(None),
            MarkKind::Purge => Err(purged(id, Some(theirs.at))),
            MarkKind::Delete => {
                let detail = "a Delete where only a Purge or an Undelete can be".to_owned();
                Err(Error::Damaged { object: key.to_string(), detail })
            }
        }
    }

    /// Snapshots that were deleted and can still come back, the last deleted last. `scope` is the repository, an
    /// experiment, a run, or one snapshot.
    pub async fn deleted(&self, scope: &Item) -> Result<Vec<Deleted>> {
        let prefix = match scope {
            Item::Repository => key::RUNS.to_owned(),
            Item::Experiment(experiment) => key::experiment_prefix(self.keys(), experiment),
            Item::Run { experiment, run } => key::run_prefix(self.keys(), experiment, run),
            Item::Snapshot { snapshot, .. } => {
                return Ok(vec![Box::pin(self.find_deleted(snapshot)).await?]);
            }
        };
        let marks = self.marks().await?;
        let entries = list_all(self.store(), &prefix).await?;
        let sessions = entries.iter().filter_map(|entry| key::parse_catalogued(&entry.key));
        let is_deleted =
            |id: &SnapshotId| marks.get(id).is_some_and(|state| state.mark == MarkKind::Delete);
        // What can't be read could not come back.
        let listing = self.read_records(sessions.filter(is_deleted).collect()).await?;
        let graves = self.graves().await?;
        let records = listing.records.into_iter().filter(|record| !graves.contains(record.id));
        let deleted = records.filter_map(|record| {
            let at = marks.get(&record.id)?.at;
            Some(Deleted { record, at })
        });
        let mut deleted: Vec<Deleted> = deleted.collect();
        deleted.sort_by_key(|deleted| (deleted.at, deleted.record.id));
        Ok(deleted)
    }

    /// The deleted snapshot that this names: by its id; within its run also by its name or the beginning of its id;
    /// `@latest` is the one that was deleted last.
    pub async fn find_deleted(&self, snapshot: &SnapshotRef) -> Result<Deleted> {
        let (experiment, run, selector) = match snapshot {
            SnapshotRef::Id(id) => return self.deleted_by_id(*id).await,
            SnapshotRef::InRun { experiment, run, selector } => (experiment, run, selector),
        };
        if let Selector::Text(text) = selector
            && let Ok(id) = text.as_str().parse()
        {
            let found = self.deleted_by_id(id).await?;
            let is_here = (&found.record.experiment, &found.record.run) == (experiment, run);
            return if is_here { Ok(found) } else { Err(self.unknown_snapshot(id)) };
        }
        let scope = Item::Run { experiment: experiment.clone(), run: run.clone() };
        choose(self.deleted(&scope).await?, selector, format!("{experiment}/{run}"))
    }

    /// Why there is no record of this id.
    async fn gone_or_unknown(&self, id: SnapshotId) -> Error {
        match self.graves().await {
            Ok(graves) if graves.contains(id) => purged(id, None),
            Ok(_) => self.unknown_snapshot(id),
            Err(error) => error,
        }
    }

    async fn deleted_by_id(&self, id: SnapshotId) -> Result<Deleted> {
        let (record, last) = futures::try_join!(self.committed(id), self.last_mark(id))?;
        let Some(record) = record else { return Err(self.gone_or_unknown(id).await) };
        match last {
            Some(state) if state.mark == MarkKind::Delete => Ok(Deleted { record, at: state.at }),
            Some(state) if state.mark == MarkKind::Purge => Err(purged(id, Some(state.at))),
            _ => Err(Error::Unknown {
                what: UNKNOWN,
                name: id.to_string(),
                within: self.location(),
                known: vec![],
            }),
        }
    }
}

fn purged(snapshot: SnapshotId, at: Option<Timestamp>) -> Error {
    Error::Purged { snapshot, at }
}

/// What is not found, in errors.
const UNKNOWN: &str = "deleted snapshot";

/// The one of `deleted`, the last deleted last, that is selected.
fn choose(mut deleted: Vec<Deleted>, selector: &Selector, within: String) -> Result<Deleted> {
    let unknown = |name: &str, within: String, known: Vec<String>| Error::Unknown {
        what: UNKNOWN,
        name: name.to_owned(),
        within,
        known,
    };
    let text = match selector {
        Selector::Latest => {
            return deleted.pop().ok_or_else(|| unknown("@latest", within, vec![]));
        }
        Selector::Text(text) => text,
    };
    let named = |deleted: &Deleted| deleted.record.name.as_ref() == Some(text);
    if let Some(at) = deleted.iter().rposition(named) {
        return Ok(deleted.swap_remove(at));
    }
    let fits = |deleted: &&Deleted| deleted.record.id.to_string().starts_with(text.as_str());
    let matches: Vec<SnapshotId> = deleted.iter().filter(fits).map(|d| d.record.id).collect();
    match matches.as_slice() {
        [] => {
            let shown = |deleted: &Deleted| {
                let record = &deleted.record;
                record.name.as_ref().map_or(record.id.to_string(), Name::to_string)
            };
            Err(unknown(text.as_str(), within, deleted.iter().rev().map(shown).collect()))
        }
        [only] => deleted
            .into_iter()
            .find(|deleted| deleted.record.id == *only)
            .ok_or(Error::Internal("a snapshot got lost in a list")),
        _ => Err(Error::Ambiguous { name: text.to_string(), within, matches }),
    }
}
