//! Taking a snapshot: from sources to a committed record.
//!
//! ```text
//! planner (async)      segments in order, with the parent's leaf where the index does not have it
//!   v bounded queue
//! workers (rayon)      read, scan, hash, look up, compress      -> frames and leaves
//!   v packer           frames and leaves are appended to the open packs
//!   v bounded queue
//! uploader (async)     complete packs are stored, some at a time
//!   v
//! commit               one object, after every pack is acknowledged
//! ```
//!
//! Memory is bounded by the two queues, one window per worker, the packs in flight and the index, whatever the
//! size of the volumes.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::try_join;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::format::node::Child;
use crate::id::SnapshotId;
use crate::name::Name;
use crate::progress::Event;
use crate::record::{Origin, SnapshotRecord, SnapshotStats, VolumeRecord};
use crate::repository::{Repository, timestamp};
use crate::session::Session;
use crate::source::Source;
use crate::url::SnapshotRef;

mod fill;
mod halt;
mod packer;
mod past;
mod pipeline;
mod worker;

pub use past::Ahead;
use past::Past;
use pipeline::{Pipeline, VolumeJob};

/// Recent snapshots of the experiment, and then of the repository, that are searched for duplicates besides the parent.
const MAX_WITNESSES: usize = 8;
/// A session that lost to a collector starts again this often.
const ATTEMPTS: usize = 3;
/// Labels and metadata of one snapshot, in bytes.
const MAX_TEXT_BYTES: usize = 1 << 20;

/// What to snapshot, and under which names.
#[derive(Clone, Debug)]
pub struct SnapshotRequest {
    /// The experiment it belongs to.
    pub experiment: Name,
    /// The run it belongs to.
    pub run: Name,
    /// A name for the snapshot.
    pub name: Option<Name>,
    /// For selection.
    pub labels: BTreeMap<String, String>,
    /// For people.
    pub message: Option<String>,
    /// For programs.
    pub metadata: BTreeMap<String, String>,
    /// What to compare with first.
    pub parent: Parent,
    /// The volumes, by name, in order.
    pub volumes: Vec<(Name, Arc<dyn Source>)>,
}

/// Which snapshot the new one is most like. Only the cost depends on it, never the content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Parent {
    /// The newest of the run, else of the experiment, else of the repository.
    #[default]
    Auto,
    /// None: everything is stored anew.
    None,
    /// This one.
    Snapshot(SnapshotId),
}

/// Takes a snapshot. When it returns, the snapshot is durable and visible; on an error it is neither. Only where
/// the store goes away during the commit itself, and stays away, can it be visible later although this failed.
pub async fn snapshot(
    repo: &Repository,
    request: SnapshotRequest,
    ctx: &Context,
) -> Result<SnapshotRecord> {
    snapshot_after(None, repo, request, ctx).await
}

/// The same with what was read ahead for it.
pub async fn snapshot_after(
    ahead: Option<Ahead>,
    repo: &Repository,
    request: SnapshotRequest,
    ctx: &Context,
) -> Result<SnapshotRecord> {
    take(repo, &request, None, ahead, ctx).await
}

/// Takes a snapshot, which may be a copy of another.
pub(crate) async fn take(
    repo: &Repository,
    request: &SnapshotRequest,
    origin: Option<Origin>,
    mut ahead: Option<Ahead>,
    ctx: &Context,
) -> Result<SnapshotRecord> {
    validate(request)?;
    let taking = Taking { repo, request, origin, ctx };
    let mut result = Err(Error::Internal("no attempt was made"));
    for _ in 0..ATTEMPTS {
        result = taking.attempt(ahead.take()).await;
        let Err(Error::Lost { .. }) = &result else { break };
        ctx.progress.event(Event::Warning {
            text: "a garbage collection took this snapshot for dead; it starts again",
        });
    }
    result
}

fn validate(request: &SnapshotRequest) -> Result<()> {
    if request.volumes.is_empty() {
        return Err(Error::Request("a snapshot needs at least one volume".to_owned()));
    }
    let mut names = HashSet::new();
    if let Some((name, _)) = request.volumes.iter().find(|(name, _)| !names.insert(name)) {
        return Err(Error::Request(format!("two volumes are named {name}")));
    }
    if let Some(name) = request.name.as_ref().filter(|name| name.as_str().starts_with('@')) {
        return Err(Error::Name {
            what: "snapshot",
            name: name.to_string(),
            reason: "'@' begins words with a meaning of their own, like @latest",
        });
    }
    let text = request.labels.iter().chain(&request.metadata).map(|(k, v)| k.len() + v.len());
    let message = request.message.as_ref().map_or(0, String::len);
    if text.sum::<usize>() + message > MAX_TEXT_BYTES {
        return Err(Error::Request("labels, metadata and message exceed 1 MiB".to_owned()));
    }
    Ok(())
}

/// Snapshots whose chunks may be reused once they are pinned: the parent first.
async fn relatives(
    repo: &Repository,
    experiment: &Name,
    run: &Name,
    parent: Parent,
) -> Result<Vec<SnapshotRecord>> {
    let mut all = Vec::new();
    match parent {
        Parent::None => return Ok(all),
        Parent::Snapshot(id) => all.push(repo.find(&SnapshotRef::Id(id)).await?),
        Parent::Auto => {}
    }
    let others = repo.relatives(experiment, run, MAX_WITNESSES).await;
    // A damaged mark costs duplicates, not the snapshot.
    let others = others.or_else(|error| if error.is_damage() { Ok(vec![]) } else { Err(error) })?;
    for record in others {
        if !all.iter().any(|known| known.id == record.id) {
            all.push(record);
        }
    }
    Ok(all)
}

/// The name of the parent's volume that a source is compared with.
fn compared_with<'a>(
    parent: Option<&SnapshotRecord>,
    name: &'a Name,
    source: &'a dyn Source,
) -> &'a Name {
    parent.and_then(|parent| source.parent_volume(parent.id)).unwrap_or(name)
}

/// A snapshot that is being taken.
struct Taking<'a> {
    repo: &'a Repository,
    request: &'a SnapshotRequest,
    origin: Option<Origin>,
    ctx: &'a Context,
}

impl Taking<'_> {
    async fn attempt(&self, ahead: Option<Ahead>) -> Result<SnapshotRecord> {
        let Self { repo, ctx, request, .. } = *self;
        let started = ctx.host.unix_ms();
        let relatives = relatives(repo, &request.experiment, &request.run, request.parent);
        let (relatives, ()) = try_join!(relatives, repo.ready_to_write(ctx))?;
        let ids: Vec<SnapshotId> = relatives.iter().map(|record| record.id).collect();
        let (mut session, valid) = Session::begin(repo, &ids, ctx).await?;
        let witnesses: Vec<SnapshotRecord> =
            relatives.into_iter().filter(|record| valid.contains(&record.id)).collect();
        let result = async {
            let past = self.past(&mut session, &witnesses, ahead).await?;
            self.write(&mut session, witnesses.first(), past, started).await
        };
        match result.await {
            Ok(record) => Ok(record),
            Err(error @ Error::Lost { .. }) => Err(error),
            // A commit whose acknowledgement was lost is a commit all the same.
            Err(error) => session.abandon().await.ok_or(error),
        }
    }

    /// What is known once the witnesses are pinned. The first of them is the parent.
    async fn past(
        &self,
        session: &mut Session,
        witnesses: &[SnapshotRecord],
        ahead: Option<Ahead>,
    ) -> Result<Past> {
        let Self { repo, ctx, request, .. } = *self;
        let parent = witnesses.first();
        if let Parent::Snapshot(id) = request.parent
            && parent.is_none_or(|parent| parent.id != id)
        {
            // It was purged between finding and pinning it.
            let (name, within) = (id.to_string(), repo.location());
            return Err(Error::Unknown { what: "snapshot", name, within, known: vec![] });
        }
        let (shunned, ()) =
            try_join!(repo.quarantined(), session.enter(&request.experiment, &request.run))?;
        let volumes = request.volumes.iter();
        let compared: Vec<Name> =
            volumes.map(|(name, source)| compared_with(parent, name, &**source).clone()).collect();
        match ahead.and_then(|ahead| ahead.take(witnesses, &compared, &shunned)) {
            Some(past) => Ok(past),
            None => Past::read(repo, witnesses, &compared, shunned, ctx).await,
        }
    }

    async fn write(
        &self,
        session: &mut Session,
        parent: Option<&SnapshotRecord>,
        past: Past,
        started: u64,
    ) -> Result<SnapshotRecord> {
        let Self { repo, ctx, request, origin } = *self;
        let parent = parent.map(|parent| parent.id);
        for (_, source) in &request.volumes {
            ctx.progress.event(Event::Planned { bytes: source.data_bytes_hint() });
        }
        let Past { known, workers, volumes } = past;
        let pipeline = Pipeline::new(repo, session.id(), known, workers, ctx);
        let sources = request.volumes.iter().map(|(_, source)| source.clone());
        let jobs = sources.zip(volumes).map(|(source, past)| VolumeJob::new(source, parent, past));
        let written = pipeline.run(jobs.collect()).await?;
        for (_, source) in &request.volumes {
            source.check_unchanged()?;
        }

        let counts = &written.counts;
        let stats = SnapshotStats {
            data_bytes: written.roots.iter().map(Child::data_bytes).sum(),
            new_bytes: counts.new_bytes.load(Ordering::Relaxed),
            stored_bytes: counts.stored_bytes.load(Ordering::Relaxed),
            puts: counts.packs.load(Ordering::Relaxed) + session.puts() + 1,
            elapsed_ms: ctx.host.unix_ms().saturating_sub(started),
        };
        let named = request.volumes.iter().zip(&written.roots);
        let record = SnapshotRecord {
            id: session.id(),
            experiment: request.experiment.clone(),
            run: request.run.clone(),
            name: request.name.clone(),
            created: timestamp(ctx),
            labels: request.labels.clone(),
            message: request.message.clone(),
            metadata: request.metadata.clone(),
            parent,
            origin,
            volumes: named
                .map(|((name, source), root)| {
                    VolumeRecord::new(name.clone(), source.len_bytes(), *root)
                })
                .collect(),
            stats,
        };
        ctx.check()?;
        session.commit(record.clone()).await?;
        Ok(record)
    }
}
