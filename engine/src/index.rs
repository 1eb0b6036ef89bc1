//! The deduplication index: where chunks are that may be reused.
//!
//! Correctness never depends on it: a chunk that it has forgotten is stored again. So it is bounded, and forgets
//! the oldest half when it is full. It is filled from the leaves of pinned snapshots, the most relevant first, and
//! from this session's own frames. Large volumes do not rely on it alone: each segment is compared with the
//! parent's leaf of the same segment first (see [`crate::snapshot`]), which needs no index.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Mutex, PoisonError};

use crate::format::frame::FrameLocation;
use crate::id::ChunkId;

/// Where a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkLocation {
    /// Its frame.
    pub frame: FrameLocation,
    /// First byte within the raw frame.
    pub offset: u32,
}

/// Chunk ids are hashes already: their first bytes serve as they are.
#[derive(Debug, Default)]
pub struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk::<8>() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    fn write_usize(&mut self, _: usize) {
        // The length prefix of arrays, equal for all ids.
    }
}

/// A map by chunk id.
pub type ChunkMap<T> = HashMap<ChunkId, T, BuildHasherDefault<IdHasher>>;

const SHARDS: usize = 64;

/// A bounded map from chunk ids to their locations, shared by all workers.
#[derive(Debug)]
pub struct DedupIndex {
    shards: Vec<Mutex<Shard>>,
    /// A generation of a shard is complete at this size.
    generation: usize,
}

#[derive(Debug, Default)]
struct Shard {
    young: ChunkMap<ChunkLocation>,
    old: ChunkMap<ChunkLocation>,
}

impl DedupIndex {
    /// An index that remembers between half of `capacity` and `capacity` chunks.
    pub fn new(capacity: usize) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, generation: (capacity / SHARDS / 2).max(1) }
    }

    /// Where the chunk is, if that is remembered.
    pub fn get(&self, id: &ChunkId) -> Option<ChunkLocation> {
        self.with(id, |shard| shard.young.get(id).or_else(|| shard.old.get(id)).copied()).flatten()
    }

    /// Makes room for about so many chunks more at once, as far as the bound allows.
    pub fn reserve(&self, chunks: usize) {
        for shard in &self.shards {
            let young = &mut shard.lock().unwrap_or_else(PoisonError::into_inner).young;
            let room = self.generation.saturating_sub(young.len());
            young.reserve((chunks / SHARDS).min(room));
        }
    }

    /// Remembers a chunk; where it was remembered lately, the place stays the one that was given first.
    pub fn insert(&self, id: ChunkId, location: ChunkLocation) {
        self.with(&id, |shard| {
            if shard.young.len() >= self.generation {
                shard.old = std::mem::take(&mut shard.young);
            }
            shard.young.entry(id).or_insert(location);
        });
    }

    fn with<T>(&self, id: &ChunkId, work: impl FnOnce(&mut Shard) -> T) -> Option<T> {
        // The last byte, since the first ones choose the place within the shard's map.
        let [.., last] = id.0;
        let shard = self.shards.get(usize::from(last) % SHARDS)?;
        Some(work(&mut shard.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{PackId, SnapshotId};

    #[test]
    fn remembers_the_youngest_within_its_bound() {
        let index = DedupIndex::new(SHARDS * 20);
        let pack = PackId { session: SnapshotId::from_parts(0, 0), number: 0 };
        let frame = FrameLocation { pack, offset: 0, stored_len: 1, raw_len: 1 };
        let ids: Vec<ChunkId> = (0..10_000_u32).map(|n| ChunkId::of(&n.to_le_bytes())).collect();
        for (n, id) in ids.iter().enumerate() {
            index.insert(*id, ChunkLocation { frame, offset: n as u32 });
            assert_eq!(index.get(id).unwrap().offset, n as u32);
        }
        let known = ids.iter().filter(|id| index.get(id).is_some()).count();
        assert!((SHARDS * 10..=SHARDS * 20).contains(&known), "{known}");
        assert!(ids[9_900..].iter().all(|id| index.get(id).is_some()));
    }
}
