//! From the roots to every piece of a pack that they need.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use super::inventory::Inventory;
use super::view::View;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::format::block::{BlockKind, BlockRef};
use crate::format::frame::FrameLocation;
use crate::format::leaf::Leaf;
use crate::format::node::Child;
use crate::format::relocation::Relocation;
use crate::id::{ChunkId, PackId, SnapshotId};
use crate::key::Key;
use crate::record::VolumeRecord;
use crate::repository::Repository;
use crate::tree;
use crate::workers::Workers;

/// Relocations in memory at one time.
const MAX_TABLES: usize = 1024;

/// A part of a pack that a root needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// A manifest block.
    Block(BlockKind, BlockRef),
    /// A chunk.
    Chunk { id: ChunkId, frame: FrameLocation, offset: u32, len: u32 },
}

impl Piece {
    pub fn pack(&self) -> PackId {
        match self {
            Self::Block(_, block) => block.pack,
            Self::Chunk { frame, .. } => frame.pack,
        }
    }

    /// Its pack, its offset there, and its first byte in a frame.
    fn place(&self) -> (PackId, u32, u32) {
        match self {
            Self::Block(_, block) => (block.pack, block.offset, 0),
            Self::Chunk { frame, offset, .. } => (frame.pack, frame.offset, *offset),
        }
    }

    /// Where a compaction copied it.
    fn moved(&self, relocation: &Relocation) -> Option<Self> {
        match *self {
            Self::Block(kind, block) => relocation.block(block.offset, block.len).map(|to| {
                let digest = block.digest;
                Self::Block(
                    kind,
                    BlockRef { digest, pack: to.pack, offset: to.offset, len: to.len },
                )
            }),
            Self::Chunk { id, frame, offset, len } => relocation
                .chunk(frame.offset, offset, len)
                .map(|(frame, offset)| Self::Chunk { id, frame, offset, len }),
        }
    }
}

/// Takes the pieces that roots need, where they are now; the same one more than once.
pub(super) trait Needed: Send {
    /// One piece.
    fn need(&mut self, piece: Piece);

    /// True when it is known that a pack is stored.
    fn knows(&self, pack: PackId) -> bool;
}

impl Needed for Inventory {
    fn need(&mut self, piece: Piece) {
        match piece {
            Piece::Block(_, block) => {
                let start = u64::from(block.offset);
                self.need(block.pack, start, start + u64::from(block.len));
            }
            Piece::Chunk { frame, offset, len, .. } => {
                // The chunk's share of the frame, as if every byte had been compressed alike.
                let scale = |raw: u32| {
                    let share = u64::from(raw) * u64::from(frame.stored_len);
                    u64::from(frame.offset) + share / u64::from(frame.raw_len.max(1))
                };
                self.need(frame.pack, scale(offset), scale(offset + len));
            }
        }
    }

    fn knows(&self, pack: PackId) -> bool {
        self.has(pack)
    }
}

/// A walk over all roots of a view.
pub(super) struct Walk<'a> {
    repo: &'a Repository,
    view: &'a View,
    workers: Workers,
    ctx: &'a Context,
    /// Leaves that were walked, by place: two of equal content may name different packs.
    walked: HashSet<(PackId, u32)>,
    tables: BTreeMap<PackId, Arc<Vec<(BlockRef, Relocation)>>>,
    /// Packs that some root needs where they were before a compaction.
    moved: BTreeSet<PackId>,
}

impl<'a> Walk<'a> {
    pub fn new(repo: &'a Repository, view: &'a View, ctx: &'a Context) -> Result<Self> {
        let (walked, tables, moved) = (HashSet::new(), BTreeMap::new(), BTreeSet::new());
        Ok(Self { repo, view, workers: Workers::start(ctx)?, ctx, walked, tables, moved })
    }

    /// Walks. Gives the copied packs that are needed through their copies; None when a root was purged while it was
    /// walked: start over.
    pub async fn run(mut self, needed: &mut dyn Needed) -> Result<Option<BTreeSet<PackId>>> {
        for root in &self.view.roots {
            match self.root(&root.volumes, needed).await {
                Ok(()) => {}
                // 8: a pin that came after the purge holds nothing, and nobody relies on it. But a pin that held does
                // so until its owner is decided: what the owner's snapshot uses must not go with the rest.
                Err(Error::Missing { .. }) if root.purged => {
                    if self.was_let_go(root.id).await? {
                        return Ok(None);
                    }
                }
                Err(Error::Missing { .. }) if self.is_purged_by_now(root.id).await? => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Some(self.moved))
    }

    /// True when an owner of a pin on this snapshot was decided or ended since the view was read.
    async fn was_let_go(&self, snapshot: SnapshotId) -> Result<bool> {
        for owner in self.view.held.get(&snapshot).into_iter().flatten() {
            if self.repo.decision(*owner).await?.is_some()
                || self.repo.has_ended(*owner).await?
                || self.repo.graves().await?.contains(*owner)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn is_purged_by_now(&self, snapshot: SnapshotId) -> Result<bool> {
        self.repo.is_purged(snapshot).await
    }

    async fn root(&mut self, volumes: &[VolumeRecord], needed: &mut dyn Needed) -> Result<()> {
        for volume in volumes {
            // The root's own pack counts even if it can't be read.
            if let Some(root) = volume.root {
                self.settle(Piece::Block(BlockKind::Node, root.into()), needed).await?;
            }
            let segments = tree::segments(self.repo, volume, self.ctx).await?;
            if let Some(unreadable) = segments.unreadable.into_iter().next() {
                return Err(unreadable.error);
            }
            for node in segments.nodes {
                self.settle(Piece::Block(BlockKind::Node, node), needed).await?;
            }
            let mut fresh = Vec::new();
            for (segment, child) in segments.leaves.into_iter().enumerate() {
                let Child::Block { block, .. } = child else { continue };
                if !self.walked.contains(&(block.pack, block.offset)) {
                    self.settle(Piece::Block(BlockKind::Leaf, block), needed).await?;
                    fresh.push((segment, child));
                }
            }
            for batch in fresh.chunks(tree::BATCH_SEGMENTS) {
                self.ctx.check()?;
                let leaves = tree::leaves(
                    self.repo,
                    volume.len_bytes,
                    batch.to_vec(),
                    &self.workers,
                    self.ctx,
                )
                .await?;
                for ((_, child), (_, leaf)) in batch.iter().zip(leaves) {
                    if let Some(leaf) = leaf? {
                        self.leaf(&leaf, needed).await?;
                    }
                    // Only now: where the walk ends early, other roots must still go through the rest.
                    if let Child::Block { block, .. } = child {
                        self.walked.insert((block.pack, block.offset));
                    }
                }
            }
        }
        Ok(())
    }

    async fn leaf(&mut self, leaf: &Leaf, needed: &mut dyn Needed) -> Result<()> {
        for (_, chunk) in leaf.chunks() {
            let Some(frame) = leaf.frames.get(chunk.frame as usize) else { continue };
            let piece =
                Piece::Chunk { id: chunk.id, frame: *frame, offset: chunk.offset, len: chunk.len };
            if self.view.moves.contains_key(&frame.pack) {
                self.settle(piece, needed).await?;
            } else {
                needed.need(piece);
            }
        }
        Ok(())
    }

    /// Notes a piece where it is now: in all copies that compactions made of it, or where it was.
    async fn settle(&mut self, piece: Piece, needed: &mut dyn Needed) -> Result<()> {
        let mut work = vec![piece];
        let mut tried = BTreeSet::new();
        while let Some(piece) = work.pop() {
            // A damaged repository may point in circles.
            if !self.view.moves.contains_key(&piece.pack()) || !tried.insert(piece.place()) {
                needed.need(piece);
                continue;
            }
            let mut covered = false;
            for (table, relocation) in self.tables(piece.pack()).await?.iter() {
                if let Some(copy) = piece.moved(relocation) {
                    covered = true;
                    work.push(copy);
                    work.push(Piece::Block(BlockKind::Relocation, *table));
                }
            }
            if covered {
                self.moved.insert(piece.pack());
            } else {
                if !needed.knows(piece.pack()) {
                    self.must_be_in_place(piece.pack()).await?;
                }
                needed.need(piece);
            }
        }
        Ok(())
    }

    /// Fails for a pack that was copied and is gone, of which a piece is needed that no list of copies names: the piece's
    /// copies can't be told from garbage then.
    async fn must_be_in_place(&self, pack: PackId) -> Result<()> {
        match self.repo.store().get_range(&Key::pack(pack), 0..1).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_not_found() => Err(Error::Missing {
                object: Key::pack(pack).to_string(),
                needed_by: "a snapshot, and no list of copies that is left has this part of it"
                    .to_owned(),
            }),
            Err(error) => Err(error.into()),
        }
    }

    async fn tables(&mut self, pack: PackId) -> Result<Arc<Vec<(BlockRef, Relocation)>>> {
        if let Some(tables) = self.tables.get(&pack) {
            return Ok(tables.clone());
        }
        let mut tables = Vec::new();
        for moved in self.view.moves.get(&pack).into_iter().flatten() {
            match self.repo.read_relocation(pack, &moved.table).await {
                Ok(relocation) => tables.push((moved.table.into(), relocation)),
                // Nothing needed this copy any more: then the pack itself, or another copy, must do.
                Err(Error::Missing { .. }) => {}
                // What was copied would look like garbage.
                Err(error) => return Err(error),
            }
        }
        let tables = Arc::new(tables);
        if self.tables.len() >= MAX_TABLES {
            self.tables.clear();
        }
        self.tables.insert(pack, tables.clone());
        Ok(tables)
    }
}
