//! What can't be read: lost chunks and manifest blocks, and where else the repository may still have them.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use crate::context::Context;
use crate::error::Result;
use crate::format::block::{BlockKind, BlockRef};
use crate::format::frame::FrameLocation;
use crate::format::leaf::Leaf;
use crate::format::node::Child;
use crate::id::{ChunkId, PackId, SnapshotId};
use crate::key::Key;
use crate::name::Name;
use crate::record::{SnapshotRecord, VolumeRecord};
use crate::repository::Repository;
use crate::restore::{Restore, join};
use crate::target::{Nowhere, Sink};
use crate::tree;
use crate::verify::{Affected, Problem, describe};
use crate::workers::Workers;

/// Other places of one chunk that are remembered.
const MAX_CANDIDATES: usize = 4;
/// Addresses in volumes of one chunk that are remembered.
const MAX_ADDRESSES: usize = 8;

/// Where a chunk should be: pack, offset of the frame, first byte in the raw frame.
pub(super) type Place = (PackId, u32, u32);

/// A chunk that can't be read.
#[derive(Debug, Default)]
pub(super) struct LostChunk {
    pub len: u32,
    /// Where it should be.
    pub places: BTreeSet<Place>,
    /// Where it may be as well.
    pub candidates: Vec<(FrameLocation, u32)>,
    /// Volumes that have it, and where.
    pub addresses: Vec<(Name, u64)>,
}

/// A manifest block that can't be read.
#[derive(Debug)]
pub(super) struct LostBlock {
    pub kind: BlockKind,
    pub block: BlockRef,
    /// Blocks of the same content elsewhere, and the snapshots that need them.
    pub candidates: Vec<(BlockRef, SnapshotId)>,
}

/// All that can't be read of some snapshots.
#[derive(Debug, Default)]
pub(super) struct Damage {
    pub chunks: BTreeMap<ChunkId, LostChunk>,
    /// By pack and offset.
    pub blocks: BTreeMap<(PackId, u32), LostBlock>,
    /// What is wrong with each pack.
    details: BTreeMap<PackId, String>,
}

impl Damage {
    /// Reads everything that the snapshots refer to.
    pub async fn find(
        repo: &Repository,
        records: &[&SnapshotRecord],
        ctx: &Context,
    ) -> Result<Self> {
        let mut found = Self::default();
        let mut seen = HashSet::new();
        for record in records {
            let (mut of_record, mut fresh) = (Self::default(), HashSet::new());
            for volume in &record.volumes {
                of_record.find_in(repo, volume, &seen, &mut fresh, ctx).await?;
            }
            // A snapshot that was purged under way may have lost its data, which is no damage; what others share with it
            // is looked at with them.
            if of_record.is_empty() || !repo.is_purged(record.id).await? {
                found.add(of_record);
                seen.extend(fresh);
            }
        }
        Ok(found)
    }

    /// Reads what a volume refers to, but for the leaves that were seen before, and notes those that it sees.
    async fn find_in(
        &mut self,
        repo: &Repository,
        volume: &VolumeRecord,
        seen: &HashSet<(PackId, u32)>,
        fresh: &mut HashSet<(PackId, u32)>,
        ctx: &Context,
    ) -> Result<()> {
        for node in tree::segments(repo, volume, ctx).await?.unreadable {
            let (_, detail) = describe(&node.error);
            self.block(BlockKind::Node, node.node, detail);
        }
        let sink: Arc<dyn Sink> = Arc::new(Nowhere);
        let mut walk = Restore::begin(repo, volume, sink, true, ctx).await?;
        for mut batch in walk.batches() {
            batch.retain(|(_, child)| match child {
                Child::Zero => false,
                Child::Block { block, .. } => {
                    let place = (block.pack, block.offset);
                    !seen.contains(&place) && fresh.insert(place)
                }
            });
            let children: BTreeMap<usize, Child> = batch.iter().copied().collect();
            let mut leaves = Vec::with_capacity(batch.len());
            for (segment, leaf) in walk.leaves(batch).await? {
                match (leaf, children.get(&segment)) {
                    (Err(error), Some(Child::Block { block, .. })) if error.is_unreadable() => {
                        self.block(BlockKind::Leaf, *block, describe(&error).1);
                    }
                    (leaf, _) => leaves.push((segment, leaf)),
                }
            }
            walk.write(leaves).await?;
            for (detail, (frame, placements)) in walk.take_losses() {
                self.details.entry(frame.pack).or_insert(detail);
                for placement in placements {
                    let chunk = self.chunks.entry(placement.id).or_default();
                    chunk.len = placement.len;
                    chunk.places.insert((frame.pack, frame.offset, placement.offset));
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, other: Self) {
        for (id, lost) in other.chunks {
            let chunk = self.chunks.entry(id).or_default();
            chunk.len = lost.len;
            chunk.places.extend(lost.places);
        }
        for (place, lost) in other.blocks {
            self.blocks.entry(place).or_insert(lost);
        }
        for (pack, detail) in other.details {
            self.details.entry(pack).or_insert(detail);
        }
    }

    fn block(&mut self, kind: BlockKind, block: BlockRef, detail: String) {
        self.details.entry(block.pack).or_insert(detail);
        let lost = LostBlock { kind, block, candidates: Vec::new() };
        self.blocks.entry((block.pack, block.offset)).or_insert(lost);
    }

    /// True when everything can be read.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.blocks.is_empty()
    }

    /// The packs that are missing or damaged.
    pub fn packs(&self) -> BTreeSet<PackId> {
        self.details.keys().copied().collect()
    }

    /// Looks through all manifests for other places of what is lost.
    pub async fn search(
        &mut self,
        repo: &Repository,
        records: &[&SnapshotRecord],
        ctx: &Context,
    ) -> Result<()> {
        let mut by_digest: BTreeMap<_, Vec<(PackId, u32)>> = BTreeMap::new();
        for (place, lost) in &self.blocks {
            by_digest.entry(lost.block.digest).or_default().push(*place);
        }
        let workers = Workers::start(ctx)?;
        for (snapshot, volume) in volumes(records) {
            let segments = tree::segments(repo, volume, ctx).await?;
            let mut sound = segments.nodes;
            each_leaf(repo, volume, &segments.leaves, &workers, ctx, |start, block, leaf| {
                if let Ok(leaf) = leaf {
                    sound.push(*block);
                    self.search_leaf(&volume.name, start, leaf);
                }
            })
            .await?;
            for block in sound {
                for place in by_digest.get(&block.digest).into_iter().flatten() {
                    if let Some(lost) = self.blocks.get_mut(place)
                        && (block.pack, block.offset) != *place
                        && lost.candidates.len() < MAX_CANDIDATES
                        && !lost.candidates.iter().any(|(known, _)| *known == block)
                    {
                        lost.candidates.push((block, snapshot));
                    }
                }
            }
        }
        Ok(())
    }

    fn search_leaf(&mut self, volume: &Name, start: u64, leaf: &Leaf) {
        for (at, chunk) in leaf.chunks() {
            let Some(lost) = self.chunks.get_mut(&chunk.id) else { continue };
            let Some(frame) = leaf.frames.get(chunk.frame as usize) else { continue };
            let address = (volume.clone(), start + at);
            if lost.addresses.len() < MAX_ADDRESSES && !lost.addresses.contains(&address) {
                lost.addresses.push(address);
            }
            let candidate = (*frame, chunk.offset);
            if !lost.places.contains(&(frame.pack, frame.offset, chunk.offset))
                && lost.candidates.len() < MAX_CANDIDATES
                && !lost.candidates.contains(&candidate)
            {
                lost.candidates.push(candidate);
            }
        }
    }

    /// What stays lost, by pack, and whom it hits.
    pub async fn report(
        &self,
        repo: &Repository,
        records: &[&SnapshotRecord],
        ctx: &Context,
    ) -> Result<Vec<Problem>> {
        let workers = Workers::start(ctx)?;
        let mut problems: BTreeMap<PackId, Vec<Affected>> = BTreeMap::new();
        for record in records {
            let mut of_record = Vec::new();
            for volume in &record.volumes {
                let mut hit: BTreeMap<PackId, Vec<std::ops::Range<u64>>> = BTreeMap::new();
                let segments = tree::segments(repo, volume, ctx).await?;
                for node in segments.unreadable {
                    hit.entry(node.node.pack).or_default().push(node.range);
                }
                each_leaf(repo, volume, &segments.leaves, &workers, ctx, |start, block, leaf| {
                    match leaf {
                        Ok(leaf) => {
                            for (at, chunk) in leaf.chunks() {
                                let lost = self.chunks.get(&chunk.id);
                                if let Some((pack, ..)) = lost.and_then(|lost| lost.places.first())
                                {
                                    let range = start + at..start + at + u64::from(chunk.len);
                                    hit.entry(*pack).or_default().push(range);
                                }
                            }
                        }
                        Err(_) => {
                            let end = (start + crate::format::SEGMENT_BYTES).min(volume.len_bytes);
                            hit.entry(block.pack).or_default().push(start..end);
                        }
                    }
                })
                .await?;
                of_record.extend(hit.into_iter().map(|(pack, ranges)| {
                    let affected = Affected {
                        snapshot: record.id,
                        experiment: record.experiment.clone(),
                        run: record.run.clone(),
                        volume: volume.name.clone(),
                        ranges: join(ranges),
                    };
                    (pack, affected)
                }));
            }
            if !of_record.is_empty() && repo.is_purged(record.id).await? {
                continue;
            }
            for (pack, affected) in of_record {
                problems.entry(pack).or_default().push(affected);
            }
        }
        let problem = |(pack, affected)| Problem {
            object: Key::pack(pack).to_string(),
            detail: self.details.get(&pack).cloned().unwrap_or_default(),
            affected,
        };
        Ok(problems.into_iter().map(problem).collect())
    }
}

/// All volumes. As a list, since a future that holds a closure over references may not be sent to another thread.
fn volumes<'a>(records: &[&'a SnapshotRecord]) -> Vec<(SnapshotId, &'a VolumeRecord)> {
    let of = |record: &&'a SnapshotRecord| {
        let (id, volumes): (SnapshotId, &'a [VolumeRecord]) = (record.id, &record.volumes);
        volumes.iter().map(move |volume| (id, volume))
    };
    records.iter().flat_map(of).collect()
}

/// Reads the leaves of a volume: where each one's segment begins, its block, and the leaf or why it can't be read.
async fn each_leaf(
    repo: &Repository,
    volume: &VolumeRecord,
    leaves: &[Child],
    workers: &Workers,
    ctx: &Context,
    mut see: impl FnMut(u64, &BlockRef, Result<&Leaf, ()>),
) -> Result<()> {
    let numbered: Vec<(usize, Child)> = leaves.iter().copied().enumerate().collect();
    for batch in numbered.chunks(tree::BATCH_SEGMENTS) {
        ctx.check()?;
        let read = tree::leaves(repo, volume.len_bytes, batch.to_vec(), workers, ctx).await?;
        for ((segment, child), (_, leaf)) in batch.iter().zip(read) {
            let start = tree::segment_range(volume.len_bytes, *segment).start;
            let Child::Block { block, .. } = child else { continue };
            match &leaf {
                Ok(Some(leaf)) => see(start, block, Ok(leaf)),
                Ok(None) => {}
                Err(error) if error.is_unreadable() => see(start, block, Err(())),
                Err(_) => leaf.map(drop)?,
            }
        }
    }
    Ok(())
}
