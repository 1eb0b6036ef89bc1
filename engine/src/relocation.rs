//! Packs that are gone since a compaction copied what was needed of them (docs/protocol.md, "Compaction").
//!
//! Manifests never change, so they name the old pack for ever. A reader that finds it gone asks here. Which
//! sessions moved a pack is found by the hints `moves/PACK/SESSION`; only the session's decision counts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use crate::crypto::Piece;
use crate::error::Result;
use crate::format::block::{BlockKind, BlockRef};
use crate::format::frame::FrameLocation;
use crate::format::leaf::{Extent, Leaf};
use crate::format::relocation::{MovedBlock, Relocation};
use crate::id::{PackId, SnapshotId};
use crate::key::{self, Key};
use crate::record::{Decision, RootRef};
use crate::repository::Repository;
use crate::store::list_all;
use crate::tree;

/// A piece that was moved more often is taken for lost: a bound for what a damaged repository, one that points in
/// circles, can make a reader do. Each compaction of a piece is a move, so it is far above what years can bring.
pub(crate) const MAX_MOVES: usize = 10_000;
/// What is remembered of relocations. They never change, but a repair may add one, so what they don't have is looked for
/// again. Memory is bounded.
const CACHE_ENTRIES: usize = 1 << 20;

/// What one compaction made of a pack.
#[derive(Clone, Debug)]
pub(crate) struct Copied {
    /// Where the relocation is stored.
    pub table: BlockRef,
    /// Where the pieces are now.
    pub to: Relocation,
}

/// Relocations that were read before.
#[derive(Debug, Default)]
pub(crate) struct RelocationCache(Mutex<Cached>);

#[derive(Debug, Default)]
struct Cached {
    by_pack: HashMap<PackId, Arc<[Copied]>>,
    entries: usize,
}

impl RelocationCache {
    fn get(&self, pack: PackId) -> Option<Arc<[Copied]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).by_pack.get(&pack).cloned()
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Cached::default();
    }

    fn insert(&self, pack: PackId, copies: &Arc<[Copied]>) {
        let size = |copy: &Copied| 1 + copy.to.runs.len() + copy.to.blocks.len();
        let size = |copies: &[Copied]| -> usize { copies.iter().map(size).sum() };
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if cached.entries + size(copies) > CACHE_ENTRIES {
            *cached = Cached::default();
        }
        cached.entries += size(copies);
        if let Some(before) = cached.by_pack.insert(pack, copies.clone()) {
            cached.entries -= size(&before);
        }
    }
}

impl Repository {
    /// Where the pieces of a pack that is gone are now: one relocation for each compaction that copied it. Empty when
    /// there was none. Those that are remembered are not looked for again if they `suffice`.
    pub(crate) async fn relocations(
        &self,
        pack: PackId,
        suffice: impl Fn(&[Copied]) -> bool + Send,
    ) -> Result<Arc<[Copied]>> {
        if let Some(known) = self.relocation_cache().get(pack).filter(|known| suffice(known)) {
            return Ok(known);
        }
        let (mut found, mut damage) = (Vec::new(), None);
        for session in self.movers(pack).await? {
            let moves = match self.decision(session).await {
                Ok(Some(Decision::Compaction { moves, .. })) => moves,
                Ok(_) => continue,
                // As below.
                Err(error) if error.is_damage() => {
                    damage = Some(error);
                    continue;
                }
                Err(error) => return Err(error),
            };
            for moved in moves.iter().filter(|moved| moved.source == pack) {
                match self.read_relocation(pack, &moved.table).await {
                    Ok(to) => found.push(Copied { table: moved.table.into(), to }),
                    // Another copy will do as well.
                    Err(error) if error.is_damage() => damage = Some(error),
                    Err(error) => return Err(error),
                }
            }
        }
        let found: Arc<[Copied]> = found.into();
        match damage {
            Some(error) if found.is_empty() => Err(error),
            Some(_) => Ok(found),
            None => {
                if !found.is_empty() {
                    self.relocation_cache().insert(pack, &found);
                }
                Ok(found)
            }
        }
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
        let mut opened = Vec::new();
        self.keys()
            .open(Piece::Block(BlockKind::Relocation), &bytes, &mut opened)
            .and_then(|bytes| Relocation::decode(bytes, source, block.digest))
            .map_err(|error| error.of(tree::describe(&block)))
    }

    /// Where a manifest block is now whose pack is gone.
    pub(crate) async fn relocated_block(&self, block: &BlockRef) -> Result<Vec<BlockRef>> {
        let at = (block.offset, block.len);
        let has = |copies: &[Copied]| copies.iter().any(|copy| copy.to.block(at.0, at.1).is_some());
        let relocations = self.relocations(block.pack, has).await?;
        let moved = relocations.iter().filter_map(|copy| copy.to.block(block.offset, block.len));
        let digest = block.digest;
        let place =
            |to: MovedBlock| BlockRef { digest, pack: to.pack, offset: to.offset, len: to.len };
        Ok(moved.map(place).collect())
    }
}

/// Where needed pieces are now: what checks and sums need, who must not trust that a pack is gone for a good reason.
pub(crate) struct Relocator<'a> {
    /// The repository.
    pub repo: &'a Repository,
    /// True for packs that are there.
    pub is_there: &'a (dyn Fn(PackId) -> bool + Sync),
    /// Packs that hold copies of what was asked for, or the lists of them: all are kept.
    pub packs: BTreeSet<PackId>,
}

impl Relocator<'_> {
    /// A manifest block.
    pub async fn block(&mut self, block: BlockRef) -> Result<BlockRef> {
        let mut at = block;
        for _ in 0..MAX_MOVES {
            self.packs.insert(at.pack);
            if (self.is_there)(at.pack) {
                break;
            }
            let copies = self.repo.relocations(at.pack, |_| true).await?;
            let mut next = None;
            for copy in copies.iter() {
                if let Some(to) = copy.to.block(at.offset, at.len) {
                    self.packs.extend([to.pack, copy.table.pack]);
                    let (pack, offset, len) = (to.pack, to.offset, to.len);
                    next = Some(BlockRef { pack, offset, len, ..at });
                }
            }
            match next {
                Some(next) => at = next,
                None => break,
            }
        }
        Ok(at)
    }

    /// A leaf with its chunks in the frames where they are now. Those that are nowhere stay as they were.
    pub async fn leaf(&mut self, mut leaf: Leaf) -> Result<Leaf> {
        for _ in 0..MAX_MOVES {
            let gone: BTreeSet<PackId> = leaf.frames.iter().map(|frame| frame.pack).collect();
            self.packs.extend(&gone);
            let mut copies = BTreeMap::new();
            for pack in gone.into_iter().filter(|pack| !(self.is_there)(*pack)) {
                let found = self.repo.relocations(pack, |_| true).await?;
                if !found.is_empty() {
                    self.packs.extend(found.iter().map(|copy| copy.table.pack));
                    copies.insert(pack, found);
                }
            }
            if copies.is_empty() || !self.replace(&mut leaf, &copies) {
                break;
            }
        }
        Ok(leaf)
    }

    fn replace(&mut self, leaf: &mut Leaf, copies: &BTreeMap<PackId, Arc<[Copied]>>) -> bool {
        let mut positions: HashMap<FrameLocation, u32> =
            leaf.frames.iter().copied().zip(0..).collect();
        let mut replaced = false;
        for extent in &mut leaf.extents {
            let Extent::Chunk(chunk) = extent else { continue };
            let Some(frame) = leaf.frames.get(chunk.frame as usize).copied() else { continue };
            let start = chunk.offset;
            for copy in copies.get(&frame.pack).into_iter().flat_map(|found| found.iter()) {
                let Some((to, offset)) = copy.to.chunk(frame.offset, start, chunk.len) else {
                    continue;
                };
                self.packs.insert(to.pack);
                let next = leaf.frames.len() as u32;
                chunk.frame = *positions.entry(to).or_insert_with(|| {
                    leaf.frames.push(to);
                    next
                });
                chunk.offset = offset;
                replaced = true;
            }
        }
        replaced.then(|| drop_unused_frames(leaf));
        replaced
    }
}

fn drop_unused_frames(leaf: &mut Leaf) {
    let used: BTreeSet<u32> = leaf.chunks().map(|(_, chunk)| chunk.frame).collect();
    let renumbered: BTreeMap<u32, u32> = used.iter().copied().zip(0..).collect();
    leaf.frames = used.iter().filter_map(|n| leaf.frames.get(*n as usize).copied()).collect();
    for extent in &mut leaf.extents {
        if let Extent::Chunk(chunk) = extent {
            chunk.frame = renumbered.get(&chunk.frame).copied().unwrap_or(u32::MAX);
        }
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
