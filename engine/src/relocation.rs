//! Packs that are gone since a compaction copied what was needed of them (docs/protocol.md, "Compaction").
//!
//! Manifests never change, so they name the old pack for ever. A reader that finds it gone asks here. Which
//! sessions moved a pack is found by the hints `moves/PACK/SESSION`; only the session's decision counts.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::format::block::BlockRef;
use crate::format::relocation::Relocation;
use crate::id::{PackId, SnapshotId};
use crate::key::{self, Key};
use crate::record::{Decision, RootRef};
use crate::repository::Repository;
use crate::store::list_all;
use crate::tree;

/// A piece that was moved more often is taken for lost: a bound for what a damaged repository can make a reader do.
pub(crate) const MAX_MOVES: usize = 32;
/// What is remembered of relocations: they never change, so nothing is ever wrong, but memory is bounded.
const CACHE_ENTRIES: usize = 1 << 20;

/// Relocations that were read before.
#[derive(Debug, Default)]
pub(crate) struct RelocationCache(Mutex<Cached>);

#[derive(Debug, Default)]
struct Cached {
    by_pack: HashMap<PackId, Arc<[Relocation]>>,
    entries: usize,
}

impl RelocationCache {
    fn get(&self, pack: PackId) -> Option<Arc<[Relocation]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).by_pack.get(&pack).cloned()
    }

    fn insert(&self, pack: PackId, relocations: &Arc<[Relocation]>) {
        let size: usize = relocations.iter().map(|r| 1 + r.runs.len() + r.blocks.len()).sum();
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if cached.entries + size > CACHE_ENTRIES {
            *cached = Cached::default();
        }
        cached.entries += size;
        cached.by_pack.insert(pack, relocations.clone());
    }
}

impl Repository {
    /// The relocations of a pack that is known to have moved, if they were read before.
    pub(crate) fn known_relocations(&self, pack: PackId) -> Option<Arc<[Relocation]>> {
        self.relocation_cache().get(pack)
    }

    /// Where the pieces of a pack that is gone are now: one relocation for each compaction that copied it. Empty when
    /// there was none.
    pub(crate) async fn relocations(&self, pack: PackId) -> Result<Arc<[Relocation]>> {
        if let Some(known) = self.known_relocations(pack) {
            return Ok(known);
        }
        let mut found = Vec::new();
        for session in self.movers(pack).await? {
            let Some(Decision::Compaction { moves, .. }) = self.decision(session).await? else {
                continue;
            };
            for moved in moves.iter().filter(|moved| moved.source == pack) {
                found.push(self.read_relocation(pack, &moved.table).await?);
            }
        }
        let found: Arc<[Relocation]> = found.into();
        if !found.is_empty() {
            self.relocation_cache().insert(pack, &found);
        }
        Ok(found)
    }

    /// Sessions that set out to move a pack, whatever became of them.
    pub(crate) async fn movers(&self, pack: PackId) -> Result<Vec<SnapshotId>> {
        let prefix = key::moves_prefix(pack);
        let entries = list_all(self.store(), &prefix).await?;
        Ok(entries.iter().filter_map(|entry| key::parse_id(&entry.key, &prefix)).collect())
    }

    /// Reads one relocation.
    pub(crate) async fn read_relocation(
        &self,
        source: PackId,
        table: &RootRef,
    ) -> Result<Relocation> {
        let block: BlockRef = (*table).into();
        // The block itself may have been moved by a later compaction, of another pack.
        let bytes = Box::pin(tree::read_block(self, &block)).await?;
        Relocation::decode(&bytes, source, block.digest)
            .map_err(|error| error.of(tree::describe(&block)))
    }

    /// Where a manifest block is now whose pack is gone.
    pub(crate) async fn relocated_block(&self, block: &BlockRef) -> Result<Vec<BlockRef>> {
        let relocations = self.relocations(block.pack).await?;
        let moved = relocations.iter().filter_map(|r| r.block(block.offset, block.len));
        Ok(moved.map(|to| BlockRef { pack: to.pack, offset: to.offset, ..*block }).collect())
    }
}

impl Key {
    /// A hint that `session` moves `pack`.
    pub fn moves(pack: PackId, session: SnapshotId) -> Self {
        Self::from_listing(format!("{}{session}", key::moves_prefix(pack)))
    }
}

/// The pack and the session of a listed hint.
pub(crate) fn parse_move(listed: &str) -> Option<(PackId, SnapshotId)> {
    let (pack, session) = listed.strip_prefix(key::MOVES)?.rsplit_once('/')?;
    Some((pack.parse().ok()?, session.parse().ok()?))
}
