//! Copying snapshots from one repository to another (docs/protocol.md, "Copy").
//!
//! A copy is an ordinary snapshot of the destination whose sources are stored volumes. It remembers where it came
//! from, so that copying again copies only what is new, also after an end in the middle. Segments that are the same
//! as in a snapshot that was copied before are not read; where both repositories cut and name chunks alike, of the
//! others only chunks that the destination lacks are.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use crate::context::{Context, Limits};
use crate::error::{Error, Result};
use crate::id::SnapshotId;
use crate::name::Name;
use crate::record::{Origin, SnapshotRecord};
use crate::repository::{Listing, Repository};
use crate::snapshot::{self, Parent, SnapshotRequest};
use crate::source::Source;
use crate::stored_source::StoredSource;
use crate::url::Item;
use crate::workers::Workers;

/// How to copy.
#[derive(Clone, Copy, Debug, Default)]
pub struct CopyOptions {
    /// Only say what would be copied.
    pub dry_run: bool,
}

/// What a copy did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CopyReport {
    /// Snapshots that were copied, in the order of their ids.
    pub copied: Vec<Copied>,
    /// Snapshots that the destination has already.
    pub present: u64,
    /// Snapshots that can't be copied, since something of them is missing or damaged.
    pub failed: Vec<Uncopied>,
    /// Bytes of volumes that were copied and are not zeros. Without what is stored already, far less is read.
    pub data_bytes: u64,
    /// Bytes of data read from the packs of the source.
    pub fetched_bytes: u64,
    /// Bytes of chunks that the destination did not have, uncompressed.
    pub new_bytes: u64,
    /// Bytes of packs sent to the destination.
    pub stored_bytes: u64,
    /// From start to end.
    pub elapsed_ms: u64,
}

/// A snapshot and its copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Copied {
    /// Its experiment.
    pub experiment: Name,
    /// Its run.
    pub run: Name,
    /// Its name.
    pub name: Option<Name>,
    /// The snapshot that was copied.
    pub from: SnapshotId,
    /// The copy; None where nothing was done.
    pub to: Option<SnapshotId>,
    /// Bytes of its volumes that are not zeros.
    pub data_bytes: u64,
}

/// A snapshot that can't be copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Uncopied {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Why.
    pub reason: String,
}

/// Copies the snapshots of `scope` that `to` does not have, the oldest first.
pub async fn copy(
    from: &Repository,
    scope: &Item,
    to: &Repository,
    options: &CopyOptions,
    ctx: &Context,
) -> Result<CopyReport> {
    if from.config().id == to.config().id {
        let both = "source and destination are the same repository".to_owned();
        return Err(Error::Request(both));
    }
    let started = ctx.host.unix_ms();
    // Stored volumes are read by threads that may wait for them.
    let limits = Limits { threads: ctx.limits.threads.max(1), ..ctx.limits.clone() };
    let ctx = &Context { limits, ..ctx.clone() };
    let Listing { records, unreadable } = from.listing(scope).await?;
    let failed = unreadable
        .into_iter()
        .map(|(snapshot, error)| Uncopied { snapshot, reason: error.to_string() });
    let report = CopyReport { failed: failed.collect(), ..CopyReport::default() };
    let copies = copies(to, scope, records.first()).await?;
    let mut job = Job { from, to, records: &records, copies, report, ctx };
    for record in &records {
        ctx.check()?;
        if job.copies.contains_key(&job.identity(record)) {
            job.report.present += 1;
            continue;
        }
        let done = if options.dry_run { Ok(None) } else { job.snapshot(record).await.map(Some) };
        match done {
            Ok(copy) => job.note(record, copy.as_ref()),
            Err(error) if error.is_unreadable() => {
                // A snapshot that was purged meanwhile is none that can't be copied.
                if !from.is_purged(record.id).await? {
                    let reason = error.to_string();
                    job.report.failed.push(Uncopied { snapshot: record.id, reason });
                }
            }
            Err(error) => return Err(error),
        }
    }
    let mut report = job.report;
    report.elapsed_ms = ctx.host.unix_ms().saturating_sub(started);
    Ok(report)
}

/// What a snapshot is a copy of, or itself: the repository and the snapshot there.
type Identity = (SnapshotId, SnapshotId);

/// What the destination has of a scope, by identity.
async fn copies(
    to: &Repository,
    scope: &Item,
    first: Option<&SnapshotRecord>,
) -> Result<BTreeMap<Identity, SnapshotId>> {
    let scope = match (scope, first) {
        (Item::Snapshot { .. }, Some(record)) => {
            Item::Run { experiment: record.experiment.clone(), run: record.run.clone() }
        }
        (scope, _) => scope.clone(),
    };
    let listing = match to.listing(&scope).await {
        // It has nothing of this experiment or run yet.
        Err(Error::Unknown { .. }) => Listing::default(),
        listing => listing?,
    };
    let here = to.config().id;
    let identity = |record: &SnapshotRecord| match record.origin {
        Some(origin) => (origin.repository, origin.snapshot),
        None => (here, record.id),
    };
    Ok(listing.records.iter().map(|record| (identity(record), record.id)).collect())
}

struct Job<'a> {
    from: &'a Repository,
    to: &'a Repository,
    records: &'a [SnapshotRecord],
    copies: BTreeMap<Identity, SnapshotId>,
    report: CopyReport,
    ctx: &'a Context,
}

impl<'a> Job<'a> {
    fn origin(&self, record: &SnapshotRecord) -> Origin {
        record.origin.unwrap_or(Origin {
            repository: self.from.config().id,
            snapshot: record.id,
            created: record.created,
        })
    }

    fn identity(&self, record: &SnapshotRecord) -> Identity {
        let origin = self.origin(record);
        (origin.repository, origin.snapshot)
    }

    /// The copied snapshot that this one is most like, and its copy: its parent, else the last one of its run.
    fn base(&self, record: &SnapshotRecord) -> Option<(&'a SnapshotRecord, SnapshotId)> {
        let copied =
            |base: &'a SnapshotRecord| Some((base, *self.copies.get(&self.identity(base))?));
        let older = || self.records.iter().take_while(|other| other.id < record.id);
        let parent = older().find(|other| record.parent == Some(other.id)).and_then(copied);
        let same_run = |other: &&SnapshotRecord| {
            (&other.experiment, &other.run) == (&record.experiment, &record.run)
        };
        parent.or_else(|| older().filter(same_run).filter_map(copied).last())
    }

    async fn snapshot(&mut self, record: &SnapshotRecord) -> Result<SnapshotRecord> {
        let base = self.base(record);
        match self.attempt(record, base).await {
            // The copy of its parent was deleted at this moment.
            Err(Error::Unknown { .. }) if base.is_some() => self.attempt(record, None).await,
            done => done,
        }
    }

    async fn attempt(
        &mut self,
        record: &SnapshotRecord,
        base: Option<(&SnapshotRecord, SnapshotId)>,
    ) -> Result<SnapshotRecord> {
        let plain = !self.from.keys().is_some() && !self.to.keys().is_some();
        let gives_ids = plain && self.from.config().chunking == self.to.config().chunking;
        let workers = Workers::start(self.ctx)?;
        let mut sources: Vec<Arc<StoredSource>> = Vec::with_capacity(record.volumes.len());
        let mut volumes: Vec<(Name, Arc<dyn Source>)> = Vec::with_capacity(record.volumes.len());
        for volume in &record.volumes {
            let copied = base.and_then(|(base, copy)| Some((copy, base.volume(&volume.name)?)));
            let source =
                StoredSource::open_with(self.from, volume, copied, gives_ids, &workers, self.ctx);
            let source = Arc::new(source.await?);
            sources.push(source.clone());
            volumes.push((volume.name.clone(), source));
        }
        let request = SnapshotRequest {
            experiment: record.experiment.clone(),
            run: record.run.clone(),
            name: record.name.clone(),
            labels: record.labels.clone(),
            message: record.message.clone(),
            metadata: record.metadata.clone(),
            parent: base.map_or(Parent::Auto, |(_, copy)| Parent::Snapshot(copy)),
            volumes,
        };
        let taken =
            snapshot::take(self.to, &request, Some(self.origin(record)), None, self.ctx).await;
        self.report.fetched_bytes +=
            sources.iter().map(|source| source.fetched_bytes()).sum::<u64>();
        taken
    }

    fn note(&mut self, record: &SnapshotRecord, copy: Option<&SnapshotRecord>) {
        if let Some(copy) = copy {
            self.copies.insert(self.identity(record), copy.id);
            self.report.new_bytes += copy.stats.new_bytes;
            self.report.stored_bytes += copy.stats.stored_bytes;
        }
        let data_bytes = record.volumes.iter().map(|volume| volume.data_bytes).sum();
        self.report.data_bytes += data_bytes;
        self.report.copied.push(Copied {
            experiment: record.experiment.clone(),
            run: record.run.clone(),
            name: record.name.clone(),
            from: record.id,
            to: copy.map(|copy| copy.id),
            data_bytes,
        });
    }
}
