//! Marks: deleting snapshots, which of them can come back, and bringing them back (docs/protocol.md, "Deleter").

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::id::SnapshotId;
use crate::key::{self, Key};
use crate::name::Name;
use crate::publish::{Published, publish};
use crate::record::{Mark, MarkKind, SnapshotRecord, kind};
use crate::repository::{READS, Repository, stamp, timestamp};
use crate::store::{list_all, list_each};
use crate::url::{Item, Selector, SnapshotRef};

/// What the marks of a snapshot say, and when they said it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkState {
    /// The number of the last mark.
    pub k: u32,
    /// What it says.
    pub mark: MarkKind,
    /// When it was made, by its writer's clock.
    pub at: Timestamp,
}

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
    /// Marks a snapshot as deleted. Its data goes with a later collection. Deleting it again changes nothing, so
    /// a delete whose answer got lost can be repeated.
    pub async fn delete(&self, id: SnapshotId, ctx: &Context) -> Result<()> {
        let (committed, ()) = futures::try_join!(self.committed(id), self.ready_to_write(ctx))?;
        if committed.is_none() {
            return Err(self.unknown_snapshot(id));
        }
        // Only after no mark or an Undelete: a Purge is final, and nothing may follow it.
        let k = match self.last_mark(id).await? {
            None => 1,
            Some(state) if state.mark == MarkKind::Undelete => state.k + 1,
            Some(_) => return Ok(()),
        };
        // If someone else's mark is there first, it is a Delete as well: odd marks are nothing else.
        let key = Key::mark(id, k);
        publish(self.store(), &key, self.mark(&key, MarkKind::Delete, ctx)?).await?;
        Ok(())
    }

    /// What each marked snapshot's last mark says.
    pub async fn marks(&self) -> Result<BTreeMap<SnapshotId, MarkState>> {
        let last = self.last_marks().await?;
        let read = last.into_iter().map(|(id, k)| async move {
            Ok::<_, Error>(self.read_mark(id, k).await?.map(|state| (id, state)))
        });
        let read = stream::iter(read).buffer_unordered(READS);
        read.try_filter_map(|mark| async move { Ok(mark) }).try_collect().await
    }

    /// The number of each marked snapshot's last mark.
    pub(crate) async fn last_marks(&self) -> Result<BTreeMap<SnapshotId, u32>> {
        let mut last = BTreeMap::new();
        list_each(self.store(), key::MARKS, |entry| {
            if let Some(mark) = key::parse_numbered(&entry.key, key::MARKS) {
                last.insert(mark.session, mark.number);
            }
        })
        .await?;
        Ok(last)
    }

    /// A mark; None when it is gone, which it is only after the snapshot was buried.
    pub(crate) async fn read_mark(&self, id: SnapshotId, k: u32) -> Result<Option<MarkState>> {
        let key = Key::mark(id, k);
        let body = match self.store().get(&key).await {
            Ok(body) => body,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mark: Mark = self.unseal(kind::MARK, &key, &body)?;
        Ok(Some(MarkState { k, mark: mark.mark, at: mark.at }))
    }

    /// True when a snapshot with this last mark is not listed. Odd marks are Deletes, whatever can be read of them.
    /// An even one that can't be read passes for an Undelete, since after a Purge the entry goes as well.
    pub(crate) async fn hides(&self, id: SnapshotId, k: u32) -> Result<bool> {
        if k % 2 == 1 {
            return Ok(true);
        }
        match self.read_mark(id, k).await {
            Ok(state) => Ok(state.is_none_or(|state| state.mark != MarkKind::Undelete)),
            Err(error) if error.is_unreadable() => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn last_mark(&self, id: SnapshotId) -> Result<Option<MarkState>> {
        let mut last = None;
        list_each(self.store(), &format!("{}{id}/", key::MARKS), |entry| {
            last = key::parse_numbered(&entry.key, key::MARKS).map(|mark| mark.number).max(last);
        })
        .await?;
        match last {
            Some(k) => self.read_mark(id, k).await,
            None => Ok(None),
        }
    }

    pub(crate) async fn is_deleted(&self, id: SnapshotId) -> Result<bool> {
        let last = self.last_mark(id).await?;
        Ok(last.is_some_and(|state| state.mark != MarkKind::Undelete))
    }

    /// True when the data of a snapshot may be gone: a Purge mark is there, which is always the last one, or was
    /// removed with all else of the snapshot.
    pub(crate) async fn is_purged(&self, id: SnapshotId) -> Result<bool> {
        let is_marked =
            self.last_mark(id).await?.is_some_and(|state| state.mark == MarkKind::Purge);
        // The graves come last: a mark that was gone already is in one.
        Ok(is_marked || self.graves().await?.contains(id))
    }

    /// Those of some snapshots that are not purged. One whose last mark can't be read is not among them: it is not known.
    pub(crate) async fn unpurged(&self, snapshots: &[SnapshotId]) -> Result<Vec<SnapshotId>> {
        let marks =
            snapshots.iter().copied().map(|id| async move { (id, self.last_mark(id).await) });
        let mut marks = pin!(stream::iter(marks).buffered(READS));
        let mut unpurged = Vec::with_capacity(snapshots.len());
        while let Some((id, mark)) = marks.next().await {
            match mark {
                Ok(Some(state)) if state.mark == MarkKind::Purge => {}
                Ok(_) => unpurged.push(id),
                Err(error) if error.is_unreadable() => {}
                Err(error) => return Err(error),
            }
        }
        // The graves come last: a mark that was gone already is in one.
        let graves = self.graves().await?;
        unpurged.retain(|id| !graves.contains(*id));
        Ok(unpurged)
    }

    /// A mark to publish under `key`.
    pub(crate) fn mark(&self, key: &Key, mark: MarkKind, ctx: &Context) -> Result<bytes::Bytes> {
        self.seal(kind::MARK, key, &Mark { stamp: stamp(ctx), mark, at: timestamp(ctx) })
    }

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
