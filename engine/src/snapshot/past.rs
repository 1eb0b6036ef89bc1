//! What is known of the past before a snapshot's volumes are gone through, and how to know it ahead of time.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::fill::{Fill, Known};
use super::{Parent, relatives};
use crate::context::Context;
use crate::error::Result;
use crate::format::block::BlockRef;
use crate::format::leaf::Leaf;
use crate::format::node::Child;
use crate::id::{PackId, SnapshotId};
use crate::index::DedupIndex;
use crate::name::Name;
use crate::record::{SnapshotRecord, VolumeRecord};
use crate::repository::Repository;
use crate::tree::{self, Segments};
use crate::workers::Workers;

/// What is known of the past of all volumes of a snapshot.
#[derive(Debug)]
pub struct Past {
    /// The chunks that may be reused.
    pub known: Known,
    /// The threads that found it out, for the work to come.
    pub workers: Workers,
    /// The volumes of the parent that those of the snapshot are compared with, one for each.
    pub volumes: Vec<VolumePast>,
}

/// A volume of the parent: of length 0 where the parent has none of that name, or there is no parent.
#[derive(Debug, Default)]
pub struct VolumePast {
    /// Its length.
    pub len_bytes: u64,
    /// Its leaves, or zeros where nothing is known.
    pub children: Vec<Child>,
    /// Its nodes.
    pub nodes: Vec<BlockRef>,
    /// Segments of which nothing is known, since what describes them is damaged or set aside.
    pub unknown: HashSet<usize>,
    /// Leaves whose chunks the index has already.
    pub leaves: HashMap<usize, Arc<Leaf>>,
    /// The manifest is damaged: no node of it may be used again, since equal digests do not make it whole.
    pub distrusted: bool,
}

impl Past {
    /// Reads what `witnesses` have, the first of which is the parent. `compared` are the names of its volumes that those
    /// of the snapshot are compared with.
    pub async fn read(
        repo: &Repository,
        witnesses: &[SnapshotRecord],
        compared: &[Name],
        shunned: HashSet<PackId>,
        ctx: &Context,
    ) -> Result<Self> {
        let index = Arc::new(DedupIndex::new(ctx.limits.index_chunks));
        let known = Known { index, shunned: Arc::new(shunned) };
        let workers = Workers::start(ctx)?;
        let mut fill = Fill::new(repo, &known, &workers, ctx);
        let mut volumes = Vec::with_capacity(compared.len());
        for name in compared {
            let volume = witnesses.first().and_then(|parent| parent.volume(name));
            volumes.push(match volume {
                Some(volume) => VolumePast::read(&mut fill, volume).await?,
                None => VolumePast::default(),
            });
        }
        let mut others = Vec::new();
        for (number, record) in witnesses.iter().enumerate() {
            let is_read = |volume: &&VolumeRecord| number == 0 && compared.contains(&volume.name);
            others.extend(record.volumes.iter().filter(|volume| !is_read(volume)).cloned());
        }
        fill.witnesses(others).await?;
        Ok(Self { known, workers, volumes })
    }
}

impl VolumePast {
    async fn read(fill: &mut Fill<'_>, volume: &VolumeRecord) -> Result<Self> {
        let len_bytes = volume.len_bytes;
        let Segments { leaves: mut children, nodes, unreadable, .. } =
            tree::segments(fill.repo, volume, fill.ctx).await?;
        let (leaves, mut unknown) = fill.parent(len_bytes, &children).await?;
        let shunned = |node: &BlockRef| fill.known.shunned.contains(&node.pack);
        let distrusted = !unknown.is_empty() || !unreadable.is_empty() || nodes.iter().any(shunned);
        for segment in &unknown {
            if let Some(child) = children.get_mut(*segment) {
                *child = Child::Zero;
            }
        }
        for part in unreadable {
            unknown.extend(tree::segments_of(&part.range));
        }
        Ok(Self { len_bytes, children, nodes, unknown, leaves, distrusted })
    }
}

/// What a snapshot will be compared with, read before its volumes can be: while they are frozen, the processors have nothing
/// to do.
///
/// It only reads, and promises nothing: of what it knows nothing is reused before the snapshot's session has pinned
/// the same snapshots, and found that they hold. Where they are other ones by then, all is read again.
#[derive(Debug)]
pub struct Ahead {
    witnesses: Vec<SnapshotId>,
    compared: Vec<Name>,
    past: Past,
}

impl Ahead {
    /// Reads for a snapshot with this experiment, run and parent. `compared` has for each of its volumes the name of the
    /// volume that its source will be compared with: what [`Source::parent_volume`](crate::source::Source::parent_volume)
    /// gives, else its own. The limits have to be those of the snapshot.
    pub async fn read(
        repo: &Repository,
        (experiment, run): (&Name, &Name),
        parent: Parent,
        compared: Vec<Name>,
        ctx: &Context,
    ) -> Result<Self> {
        let relatives = relatives(repo, experiment, run, parent).await?;
        let ids: Vec<SnapshotId> = relatives.iter().map(|record| record.id).collect();
        let (witnesses, shunned) = futures::try_join!(repo.unpurged(&ids), repo.quarantined())?;
        let records: Vec<SnapshotRecord> =
            relatives.into_iter().filter(|record| witnesses.contains(&record.id)).collect();
        let past = Past::read(repo, &records, &compared, shunned, ctx).await?;
        Ok(Self { witnesses, compared, past })
    }

    /// What was read, if it is what would be read now.
    pub(super) fn take(
        self,
        witnesses: &[SnapshotRecord],
        compared: &[Name],
        shunned: &HashSet<PackId>,
    ) -> Option<Past> {
        let is_same = self.witnesses.iter().eq(witnesses.iter().map(|record| &record.id))
            && self.compared == compared
            && *self.past.known.shunned == *shunned;
        is_same.then_some(self.past)
    }
}
