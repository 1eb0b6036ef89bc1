//! The deduplication index: where chunks are that may be reused.
//!
//! Correctness never depends on it: a chunk that it has forgotten is stored again. So it is bounded, and forgets
//! the oldest half when it is full. It is filled from the leaves of pinned snapshots, the most relevant first, and
//! from this session's own frames. Large volumes do not rely on it alone: each segment is compared with the
//! parent's leaf of the same segment first (see [`crate::snapshot`]), which needs no index.

use std::sync::{Arc, Mutex, PoisonError};

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use crate::format::frame::FrameLocation;
use crate::format::leaf::{ChunkRef, Extent, Leaf};
use crate::id::ChunkId;

/// Where a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkLocation {
    /// Its frame.
    pub frame: FrameLocation,
    /// First byte within the raw frame.
    pub offset: u32,
}

const SHARDS: usize = 16;

/// A bounded map from chunk ids to their locations, shared by all workers.
///
/// It keeps the leaves, and a place of a chunk is its position there: half a million chunks are put here before a snapshot
/// begins, and each touches 9 bytes of a table, not a copy of its id and location.
#[derive(Debug)]
pub struct DedupIndex {
    shards: Vec<Mutex<Shard>>,
    /// A generation of a shard is complete at this size.
    generation: usize,
}

#[derive(Debug, Default)]
struct Shard {
    young: Generation,
    old: Generation,
}

#[derive(Debug, Default)]
struct Generation {
    table: HashTable<Place>,
    leaves: Vec<Arc<Leaf>>,
}

/// Where a chunk of a generation is: a position among its leaves, and one among the extents of that leaf.
#[derive(Clone, Copy, Debug)]
struct Place {
    leaf: u32,
    extent: u32,
}

impl Generation {
    fn get(&self, id: &ChunkId) -> Option<ChunkLocation> {
        let is_it = |place: &Place| chunk(&self.leaves, *place).is_some_and(|(_, c)| c.id == *id);
        let place = self.table.find(hash(id), is_it)?;
        let (leaf, chunk) = chunk(&self.leaves, *place)?;
        let frame = *leaf.frames.get(chunk.frame as usize)?;
        Some(ChunkLocation { frame, offset: chunk.offset })
    }

    /// Remembers a chunk of the leaf that came last, unless there is one of that name.
    fn insert(&mut self, id: &ChunkId, extent: u32) {
        let Self { table, leaves } = self;
        let is_it = |place: &Place| chunk(leaves, *place).is_some_and(|(_, c)| c.id == *id);
        let entry = table.entry(hash(id), is_it, |place| hash_at(leaves, *place));
        if let (Entry::Vacant(vacant), Some(leaf)) = (entry, leaves.len().checked_sub(1)) {
            vacant.insert(Place { leaf: leaf as u32, extent });
        }
    }

    fn reserve(&mut self, more: usize) {
        let Self { table, leaves } = self;
        table.reserve(more, |place| hash_at(leaves, *place));
    }
}

fn chunk(leaves: &[Arc<Leaf>], place: Place) -> Option<(&Leaf, &ChunkRef)> {
    let leaf = leaves.get(place.leaf as usize)?;
    match leaf.extents.get(place.extent as usize)? {
        Extent::Chunk(chunk) => Some((leaf, chunk)),
        Extent::Zero { .. } => None,
    }
}

fn hash_at(leaves: &[Arc<Leaf>], place: Place) -> u64 {
    chunk(leaves, place).map_or(0, |(_, chunk)| hash(&chunk.id))
}

/// Chunk ids are hashes already: their first bytes serve as they are.
fn hash(id: &ChunkId) -> u64 {
    id.0.first_chunk().map_or(0, |first| u64::from_le_bytes(*first))
}

/// The last byte, since the first ones choose the place within the shard's table.
fn shard_of(id: &ChunkId) -> usize {
    let [.., last] = id.0;
    usize::from(last) % SHARDS
}

impl DedupIndex {
    /// An index that remembers between half of `capacity` and `capacity` chunks.
    pub fn new(capacity: usize) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, generation: (capacity / SHARDS / 2).max(1) }
    }

    /// Where the chunk is, if that is remembered.
    pub fn get(&self, id: &ChunkId) -> Option<ChunkLocation> {
        let shard = self.shards.get(shard_of(id))?.lock().unwrap_or_else(PoisonError::into_inner);
        shard.young.get(id).or_else(|| shard.old.get(id))
    }

    /// Makes room for about so many chunks more at once, as far as the bound allows.
    pub fn reserve(&self, chunks: usize) {
        for shard in &self.shards {
            let young = &mut shard.lock().unwrap_or_else(PoisonError::into_inner).young;
            let room = self.generation.saturating_sub(young.table.len());
            young.reserve((chunks / SHARDS).min(room));
        }
    }

    /// Remembers the chunks of a leaf that are in usable frames. Of a chunk that was remembered lately, the place stays the
    /// one that was given first.
    pub fn insert(&self, leaf: &Arc<Leaf>, is_usable: impl Fn(&FrameLocation) -> bool) {
        // Apart first: a lock that is taken for each chunk would make each wait for the memory of the one before.
        let mut parts = vec![vec![]; SHARDS];
        for (number, extent) in leaf.extents.iter().enumerate() {
            if let Extent::Chunk(chunk) = extent
                && leaf.frames.get(chunk.frame as usize).is_some_and(&is_usable)
                && let Some(part) = parts.get_mut(shard_of(&chunk.id))
            {
                part.push((number as u32, &chunk.id));
            }
        }
        for (shard, part) in self.shards.iter().zip(parts) {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let mut is_there = false;
            for (number, id) in part {
                if shard.young.table.len() >= self.generation {
                    shard.old = std::mem::take(&mut shard.young);
                    is_there = false;
                }
                if !std::mem::replace(&mut is_there, true) {
                    shard.young.leaves.push(leaf.clone());
                }
                shard.young.insert(id, number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{PackId, SnapshotId};

    /// A leaf of some chunks, each one byte long, in two frames.
    fn leaf(numbers: impl Iterator<Item = u32>, pack: u32) -> Arc<Leaf> {
        let frame = |number| FrameLocation {
            pack: PackId { session: SnapshotId::from_parts(0, 0), number },
            offset: 0,
            stored_len: 1,
            raw_len: 1,
        };
        let chunk = |n: u32| Extent::Chunk(ChunkRef { id: id(n), len: 1, frame: n % 2, offset: n });
        let extents = numbers.flat_map(|n| [Extent::Zero { len: 1 }, chunk(n)]).collect();
        Arc::new(Leaf { frames: vec![frame(pack), frame(pack + 1)], extents })
    }

    fn id(number: u32) -> ChunkId {
        ChunkId::of(&number.to_le_bytes())
    }

    #[test]
    fn remembers_the_youngest_within_its_bound() {
        let index = DedupIndex::new(SHARDS * 80);
        index.reserve(SHARDS * 10);
        for first in (0..10_000).step_by(100) {
            index.insert(&leaf(first..first + 100, 0), |_| true);
            for n in first..first + 100 {
                let found = index.get(&id(n)).unwrap();
                assert_eq!((found.offset, found.frame.pack.number), (n, n % 2));
            }
        }
        let known = (0..10_000).filter(|n| index.get(&id(*n)).is_some()).count();
        assert!((SHARDS * 40..=SHARDS * 80).contains(&known), "{known}");
    }

    #[test]
    fn forgets_within_a_leaf_that_is_larger_than_it() {
        let index = DedupIndex::new(SHARDS * 10);
        index.insert(&leaf(0..5_000, 0), |_| true);
        let known: Vec<u32> = (0..5_000).filter(|n| index.get(&id(*n)).is_some()).collect();
        assert!((SHARDS * 5..=SHARDS * 10).contains(&known.len()), "{}", known.len());
        assert!(known.iter().all(|n| index.get(&id(*n)).unwrap().offset == *n && *n > 4_500));
    }

    #[test]
    fn the_first_place_stays_and_unusable_frames_are_not_remembered() {
        let index = DedupIndex::new(SHARDS * 1_000);
        index.insert(&leaf(0..500, 0), |frame| frame.pack.number == 1);
        index.insert(&leaf(0..600, 2), |_| true);
        for n in 0..600 {
            let expected = if n < 500 && n % 2 == 1 { 1 } else { 2 + n % 2 };
            assert_eq!(index.get(&id(n)).unwrap().frame.pack.number, expected);
        }
        assert_eq!(index.get(&id(600)), None);
    }
}
