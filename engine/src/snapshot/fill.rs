//! What is known before the work begins: the leaves of the parent and of other snapshots, and from them the index.
//!
//! What can't be read, or is in packs that are set aside, is not known: damage costs duplicates, not the snapshot.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::{Stream, StreamExt, TryStreamExt, stream};

use super::MAX_WITNESSES;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::format::leaf::Leaf;
use crate::format::node::Child;
use crate::id::{Digest, PackId};
use crate::index::DedupIndex;
use crate::record::VolumeRecord;
use crate::repository::Repository;
use crate::tree::{self, SegmentLeaf};
use crate::workers::Workers;

/// Segments of witnesses of which the places are read ahead: 4 TiB of volumes, some MiB of places.
const SEGMENTS_AHEAD: usize = 1 << 16;
/// Batches of leaves that are read while others are put into the index.
const BATCHES_AHEAD: usize = 4;
/// Bytes that a chunk takes in a leaf, at least: its id, and one of its length.
const LEAF_CHUNK_BYTES: usize = 33;

/// What may be used again.
#[derive(Clone, Debug)]
pub struct Known {
    /// Chunks that are stored.
    pub index: Arc<DedupIndex>,
    /// Packs that were found damaged: what they hold is stored anew, so that it is whole again from now on.
    pub shunned: Arc<HashSet<PackId>>,
}

impl Known {
    /// Puts the chunks of one leaf into the index.
    pub fn remember(&self, leaf: &Arc<Leaf>) {
        self.index.insert(leaf, |frame| !self.shunned.contains(&frame.pack));
    }

    /// True for a leaf that must not be used as a whole.
    pub fn shuns(&self, child: &Child, leaf: &Leaf) -> bool {
        let own = match child {
            Child::Zero => None,
            Child::Block { block, .. } => Some(block.pack),
        };
        let mut packs = leaf.frames.iter().map(|frame| frame.pack).chain(own);
        !self.shunned.is_empty() && packs.any(|pack| self.shunned.contains(&pack))
    }
}

/// Puts the chunks of volumes into the index before the work begins.
pub struct Fill<'a> {
    /// The repository.
    pub repo: &'a Repository,
    /// What it fills.
    pub known: &'a Known,
    workers: &'a Workers,
    /// Chunks that may still be put into it.
    budget: usize,
    /// Leaves that are taken: snapshots of one volume have most of them in common.
    seen: HashSet<Digest>,
    /// The operation.
    pub ctx: &'a Context,
}

/// Some leaves of a volume of this length, by segment.
type Batch = (u64, Vec<(usize, Child)>);

impl<'a> Fill<'a> {
    /// Half of the index at most is filled: the rest is for what comes.
    pub fn new(
        repo: &'a Repository,
        known: &'a Known,
        workers: &'a Workers,
        ctx: &'a Context,
    ) -> Self {
        let budget = ctx.limits.index_chunks / 2;
        Self { repo, known, workers, budget, seen: HashSet::new(), ctx }
    }

    /// Takes leaves of a volume, from its first segment, while the budget lasts. Gives them, without those that can't be
    /// read or refer to packs that are set aside: their segments come second.
    pub async fn parent(
        &mut self,
        len_bytes: u64,
        leaves: &[Child],
    ) -> Result<(HashMap<usize, Arc<Leaf>>, HashSet<usize>)> {
        let (mut usable, mut unusable) = (HashMap::new(), HashSet::new());
        let budget = self.budget;
        // Each of them is checked, also one with the content of another: it may be kept as it is.
        let batches = self.batches(len_bytes, leaves, |_is_new| true);
        self.known.index.reserve(budget - self.budget);
        let mut read = std::pin::pin!(self.read(batches));
        while let Some(read) = read.next().await {
            for (segment, leaf) in self.remember(read?).await? {
                match leaf {
                    Some(leaf) => drop(usable.insert(segment, leaf)),
                    None => drop(unusable.insert(segment)),
                }
            }
        }
        Ok((usable, unusable))
    }

    /// Takes leaves of some volumes, one after the other, while the budget lasts.
    pub async fn witnesses(&mut self, volumes: Vec<VolumeRecord>) -> Result<()> {
        let (repo, ctx) = (self.repo, self.ctx);
        let longest = volumes.iter().map(|volume| tree::segment_count(volume.len_bytes)).max();
        let at_once = (SEGMENTS_AHEAD / longest.unwrap_or_default().max(1)).clamp(1, MAX_WITNESSES);
        let nodes = volumes.into_iter().map(|volume| async move {
            let segments = tree::segments(repo, &volume, ctx).await?;
            Ok::<_, Error>((volume.len_bytes, segments.leaves))
        });
        let mut nodes = std::pin::pin!(stream::iter(nodes).buffered(at_once));
        let mut batches = Vec::new();
        while self.budget > 0
            && let Some((len_bytes, leaves)) = nodes.try_next().await?
        {
            batches.extend(self.batches(len_bytes, &leaves, |is_new| is_new));
        }
        let mut read = std::pin::pin!(self.read(batches));
        while let Some(read) = read.next().await {
            self.remember(read?).await?;
        }
        Ok(())
    }

    /// What to read of a volume; `wants` is told whether a leaf's content is new.
    fn batches(
        &mut self,
        len_bytes: u64,
        leaves: &[Child],
        wants: impl Fn(bool) -> bool,
    ) -> Vec<Batch> {
        let mut wanted = Vec::new();
        for (segment, child) in leaves.iter().enumerate() {
            if let Child::Block { block, .. } = child
                && self.budget > 0
                && wants(self.seen.insert(block.digest))
            {
                self.budget = self.budget.saturating_sub(block.len as usize / LEAF_CHUNK_BYTES);
                wanted.push((segment, *child));
            }
        }
        wanted.chunks(tree::BATCH_SEGMENTS).map(|batch| (len_bytes, batch.to_vec())).collect()
    }

    /// Reads batches, the next ones while one is worked on.
    fn read(
        &self,
        batches: Vec<Batch>,
    ) -> impl Stream<Item = Result<Vec<(usize, Child, SegmentLeaf)>>> + use<'_> {
        let read = batches.into_iter().map(async |(len_bytes, batch)| {
            let read = tree::leaves(self.repo, len_bytes, batch.clone(), self.workers, self.ctx);
            let read = batch.into_iter().zip(read.await?);
            Ok(read.map(|((segment, child), (_, leaf))| (segment, child, leaf)).collect())
        });
        stream::iter(read).buffered(BATCHES_AHEAD)
    }

    /// Puts leaves into the index, and gives them back; None for those that must not be used as a whole.
    async fn remember(
        &self,
        read: Vec<(usize, Child, SegmentLeaf)>,
    ) -> Result<Vec<(usize, Option<Arc<Leaf>>)>> {
        let known = self.known.clone();
        let remember = move |(segment, child, leaf): (usize, Child, SegmentLeaf)| {
            let leaf = leaf.ok().flatten().map(Arc::new);
            if let Some(leaf) = &leaf {
                known.remember(leaf);
            }
            (segment, leaf.filter(|leaf| !known.shuns(&child, leaf)))
        };
        self.workers.each(self.ctx, read, remember).await
    }
}
