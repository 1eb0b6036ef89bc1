//! The deduplication index: where chunks are that may be reused.
//!
//! Correctness never depends on it: a chunk that it has forgotten is stored again. So it is bounded, and forgets
//! the older half when it is full. It is filled from the leaves of pinned snapshots, the most relevant first, and
//! from this session's own frames. Large volumes do not rely on it alone: each segment is compared with the
//! parent's leaf of the same segment first (see [`crate::snapshot`]), which needs no index.

use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

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
///
/// Leaves are added by one thread at a time. Locks are taken in this order: generations, a shard.
#[derive(Debug)]
pub struct DedupIndex {
    generations: RwLock<Generations>,
    /// A generation is complete when its leaves have so many extents.
    complete: usize,
}

#[derive(Debug, Default)]
struct Generations {
    young: Generation,
    old: Option<Generation>,
}

#[derive(Debug, Default)]
struct Generation {
    leaves: Vec<Arc<Leaf>>,
    /// In all leaves: what they take of the memory, however few of their chunks are remembered.
    extents: usize,
    shards: [Mutex<HashTable<Place>>; SHARDS],
}

/// Where a chunk of a generation is: a position among its leaves, and one among the extents of that leaf.
#[derive(Clone, Copy, Debug)]
struct Place {
    leaf: u32,
    extent: u32,
}

impl Generation {
    fn get(&self, id: &ChunkId) -> Option<ChunkLocation> {
        let shard = self.shards.get(shard_of(id))?.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |place: &Place| chunk(&self.leaves, *place).is_some_and(|(_, c)| c.id == *id);
        let place = *shard.find(hash(id), is_it)?;
        drop(shard);
        let (leaf, chunk) = chunk(&self.leaves, place)?;
        let frame = *leaf.frames.get(chunk.frame as usize)?;
        Some(ChunkLocation { frame, offset: chunk.offset })
    }

    /// Remembers chunks of a leaf, unless there are some of those names.
    fn insert(&self, leaf: u32, parts: [Vec<(u32, &ChunkId)>; SHARDS]) {
        let leaves = &self.leaves;
        for (shard, part) in self.shards.iter().zip(parts) {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for (extent, id) in part {
                let is_it = |place: &Place| chunk(leaves, *place).is_some_and(|(_, c)| c.id == *id);
                let entry = shard.entry(hash(id), is_it, |place| hash_at(leaves, *place));
                if let Entry::Vacant(vacant) = entry {
                    vacant.insert(Place { leaf, extent });
                }
            }
        }
    }

    fn reserve(&self, more: usize) {
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.reserve(more / SHARDS, |place| hash_at(&self.leaves, *place));
        }
    }
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
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
    /// An index that keeps leaves with `capacity` extents, and at most two leaves more: always those with the last half.
    pub fn new(capacity: usize) -> Self {
        Self { generations: RwLock::default(), complete: (capacity / 2).max(1) }
    }

    /// Where the chunk is, if that is remembered.
    pub fn get(&self, id: &ChunkId) -> Option<ChunkLocation> {
        let generations = read(&self.generations);
        generations.young.get(id).or_else(|| generations.old.as_ref()?.get(id))
    }

    /// Makes room for about so many chunks more at once, as far as the bound allows.
    pub fn reserve(&self, chunks: usize) {
        read(&self.generations).young.reserve(chunks.min(self.complete));
    }

    /// Remembers the chunks of a leaf that are in usable frames. Of a chunk that was remembered lately, the place stays the
    /// one that was given first.
    pub fn insert(&self, leaf: &Arc<Leaf>, is_usable: impl Fn(&FrameLocation) -> bool) {
        // Apart first: a lock that is taken for each chunk would make each wait for the memory of the one before.
        let mut parts: [Vec<_>; SHARDS] = Default::default();
        for (number, extent) in leaf.extents.iter().enumerate() {
            if let Extent::Chunk(chunk) = extent
                && leaf.frames.get(chunk.frame as usize).is_some_and(&is_usable)
                && let Some(part) = parts.get_mut(shard_of(&chunk.id))
            {
                part.push((number as u32, &chunk.id));
            }
        }
        let mut generations = self.generations.write().unwrap_or_else(PoisonError::into_inner);
        let mut forgotten = None;
        if generations.young.extents >= self.complete {
            let complete = std::mem::take(&mut generations.young);
            forgotten = generations.old.replace(complete);
        }
        let Generation { leaves, extents, .. } = &mut generations.young;
        let number = leaves.len() as u32;
        leaves.push(leaf.clone());
        *extents += leaf.extents.len();
        // Others may look for chunks meanwhile.
        RwLockWriteGuard::downgrade(generations).young.insert(number, parts);
        drop(forgotten);
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
        // Leaves of 100 chunks and as many zeros: five fill half of it.
        let index = DedupIndex::new(2_000);
        index.reserve(10);
        for first in (0..10_000).step_by(100) {
            index.insert(&leaf(first..first + 100, 0), |_| true);
            for n in first.saturating_sub(400)..first + 100 {
                let found = index.get(&id(n)).unwrap();
                assert_eq!((found.offset, found.frame.pack.number), (n, n % 2));
            }
            let known = (0..first + 100).filter(|n| index.get(&id(*n)).is_some()).count();
            assert!(known <= 1_000, "{known}");
        }
    }

    #[test]
    fn leaves_of_which_little_is_new_count_as_a_whole() {
        let index = DedupIndex::new(2_000);
        let leaves: Vec<_> = (0..50).map(|n| leaf((0..99).chain([100 + n]), 0)).collect();
        for leaf in &leaves {
            index.insert(leaf, |_| true);
        }
        let kept = leaves.iter().filter(|leaf| Arc::strong_count(leaf) > 1).count();
        assert!((5..=10).contains(&kept), "{kept}");
        assert!(index.get(&id(149)).is_some() && index.get(&id(5)).is_some());
    }

    #[test]
    fn a_leaf_that_is_larger_than_it_is_kept_until_as_much_came() {
        let index = DedupIndex::new(10);
        index.insert(&leaf(0..5_000, 0), |_| true);
        assert!((0..5_000).all(|n| index.get(&id(n)).is_some_and(|found| found.offset == n)));
        index.insert(&leaf(5_000..5_001, 0), |_| true);
        index.insert(&leaf(5_001..5_010, 0), |_| true);
        assert!(index.get(&id(0)).is_some());
        index.insert(&leaf(5_010..5_011, 0), |_| true);
        assert!((0..5_000).all(|n| index.get(&id(n)).is_none()));
        assert!(index.get(&id(5_005)).is_some());
    }

    #[test]
    fn the_first_place_stays_and_unusable_frames_are_not_remembered() {
        let index = DedupIndex::new(10_000);
        index.insert(&leaf(0..500, 0), |frame| frame.pack.number == 1);
        index.insert(&leaf(0..600, 2), |_| true);
        for n in 0..600 {
            let expected = if n < 500 && n % 2 == 1 { 1 } else { 2 + n % 2 };
            assert_eq!(index.get(&id(n)).unwrap().frame.pack.number, expected);
        }
        assert_eq!(index.get(&id(600)), None);
    }
}
