//! From the roots to every piece of a pack that they need.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::pin::pin;
use std::sync::Arc;

use futures::{StreamExt, stream};

use super::inventory::Inventory;
use super::view::View;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::format::block::{BlockKind, BlockRef};
use crate::format::frame::FrameLocation;
use crate::format::leaf::Leaf;
use crate::format::node::{self, Child, FAN_OUT};
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
pub(super) trait Needed: Send + Sync {
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

/// A manifest block to go on from.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Its position among those of its level.
    position: usize,
    block: BlockRef,
    /// False for one that was copied, and goes when nobody needs the rest of its pack.
    stays: bool,
}

/// What came of the blocks of one level, by position. A position that has several places, since it was copied, is lost only if
/// none of those that stay leads on.
#[derive(Debug, Default)]
struct Level {
    found: HashSet<usize>,
    lost: BTreeMap<usize, Error>,
}

impl Level {
    /// Goes on past what is missing.
    fn past<T>(&mut self, position: usize, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(found) => Ok(Some(found)),
            Err(error @ Error::Missing { .. }) => {
                self.lost.insert(position, error);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The first position that is lost.
    fn missing(self) -> Option<Error> {
        let Self { found, lost } = self;
        lost.into_iter().find(|(position, _)| !found.contains(position)).map(|(_, error)| error)
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
    /// Packs with copies that are not in the list of packs, and there.
    stored: HashSet<PackId>,
}

impl<'a> Walk<'a> {
    pub fn new(repo: &'a Repository, view: &'a View, ctx: &'a Context) -> Result<Self> {
        Ok(Self {
            repo,
            view,
            workers: Workers::start(ctx)?,
            ctx,
            walked: HashSet::new(),
            tables: BTreeMap::new(),
            moved: BTreeSet::new(),
            stored: HashSet::new(),
        })
    }

    /// Walks. Gives the copied packs that are needed through their copies; None when a root was purged while it was
    /// walked: start over.
    pub async fn run(mut self, needed: &mut dyn Needed) -> Result<Option<BTreeSet<PackId>>> {
        for root in &self.view.roots {
            let mut missing = None;
            for volume in &root.volumes {
                missing = missing.or(self.volume(volume, needed).await?);
            }
            let Some(error) = missing else { continue };
            if root.purged {
                // 8: a pin that came after the purge holds nothing, and nobody relies on it. But a pin that held does
                // so until its owner is decided: what the owner's snapshot uses must not go with the rest. Nor must what
                // is left of a snapshot that a clone reads, when a part of it is lost.
                if self.was_let_go(root.id).await? {
                    return Ok(None);
                }
            } else if self.is_purged_by_now(root.id).await? {
                return Ok(None);
            } else {
                return Err(error);
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

    /// Walks one volume. Gives the first part that is missing, after all the rest was walked.
    async fn volume(
        &mut self,
        volume: &VolumeRecord,
        needed: &mut dyn Needed,
    ) -> Result<Option<Error>> {
        let (root, top) = volume.root();
        let mut missing = None;
        let mut blocks = Vec::new();
        if let Child::Block { block, .. } = root {
            blocks.push((0, block));
        }
        for height in (1..=top).rev() {
            let mut level = Level::default();
            let nodes = self.places(BlockKind::Node, blocks, needed, &mut level).await?;
            blocks = self.children(volume.len_bytes, height, nodes, &mut level).await?;
            missing = missing.or(level.missing());
        }
        let mut level = Level::default();
        let leaves = self.places(BlockKind::Leaf, blocks, needed, &mut level).await?;
        for batch in leaves.chunks(tree::BATCH_SEGMENTS) {
            self.ctx.check()?;
            let child = |place: &Place| {
                (place.position, Child::Block { block: place.block, data_bytes: 0 })
            };
            let children = batch.iter().map(child).collect();
            let read = tree::leaves(self.repo, volume.len_bytes, children, &self.workers, self.ctx)
                .await?;
            for (Place { position, block, stays }, (_, leaf)) in batch.iter().zip(read) {
                let Some(leaf) = level.past(*position, leaf)?.flatten() else { continue };
                let all = self.leaf(&leaf, needed).await;
                if level.past(*position, all)?.is_some() && *stays {
                    level.found.insert(*position);
                    // Else other roots must still go through it, and find that something is missing.
                    self.walked.insert((block.pack, block.offset));
                }
            }
        }
        Ok(missing.or(level.missing()))
    }

    /// Notes blocks as needed where they are now, and gives the places to go on from, but for leaves that were walked.
    ///
    /// A repair puts another block of the same content in the place of one that is lost, which may lead to other packs. If the
    /// lost one is there again, readers go by it until it is deleted: then both lead on.
    async fn places(
        &mut self,
        kind: BlockKind,
        blocks: Vec<(usize, BlockRef)>,
        needed: &mut dyn Needed,
        level: &mut Level,
    ) -> Result<Vec<Place>> {
        let mut places = Vec::with_capacity(blocks.len());
        for (position, block) in blocks {
            self.ctx.check()?;
            if self.walked.contains(&(block.pack, block.offset)) {
                level.found.insert(position);
                continue;
            }
            let settled = self.settle(Piece::Block(kind, block), needed).await;
            let Some(mut settled) = level.past(position, settled)? else { continue };
            // Tables of copies are among them.
            settled.retain(|piece| matches!(piece, Piece::Block(found, _) if *found == kind));
            let is_walked = |piece: &Piece| {
                let (pack, offset, _) = piece.place();
                self.walked.contains(&(pack, offset))
            };
            if settled.iter().all(is_walked) {
                level.found.insert(position);
                self.walked.insert((block.pack, block.offset));
                continue;
            }
            if !settled.contains(&Piece::Block(kind, block)) && needed.knows(block.pack) {
                places.push(Place { position, block, stays: false });
            }
            places.extend(settled.into_iter().filter_map(|piece| match piece {
                Piece::Block(_, block) => Some(Place { position, block, stays: true }),
                Piece::Chunk { .. } => None,
            }));
        }
        Ok(places)
    }

    /// What is below nodes of one level, each place once.
    async fn children(
        &self,
        len_bytes: u64,
        height: u8,
        nodes: Vec<Place>,
        level: &mut Level,
    ) -> Result<Vec<(usize, BlockRef)>> {
        let (repo, ctx) = (self.repo, self.ctx);
        let total = len_bytes.div_ceil(node::child_bytes(height));
        let read = nodes.into_iter().map(|place| async move {
            let before = place.position as u64 * FAN_OUT as u64;
            let count = (total - before.min(total)).min(FAN_OUT as u64) as usize;
            (place, tree::read_node(repo, &place.block, height, count, ctx).await)
        });
        let mut read = pin!(stream::iter(read).buffered(ctx.limits.requests));
        let mut below: Vec<(usize, BlockRef)> = Vec::new();
        while let Some((Place { position, stays, .. }, node)) = read.next().await {
            let Some(node) = level.past(position, node)? else { continue };
            if stays {
                level.found.insert(position);
            }
            for (child, n) in node.children.iter().zip(position * FAN_OUT..) {
                if let Child::Block { block, .. } = *child {
                    below.push((n, block));
                }
            }
        }
        let place = |(position, block): &(usize, BlockRef)| (*position, block.pack, block.offset);
        below.sort_unstable_by_key(place);
        below.dedup_by_key(|below| place(below));
        Ok(below)
    }

    /// Notes all chunks of a leaf as needed. Fails for the first that is missing, after all the rest.
    async fn leaf(&mut self, leaf: &Leaf, needed: &mut dyn Needed) -> Result<()> {
        let mut level = Level::default();
        for (_, chunk) in leaf.chunks() {
            let Some(frame) = leaf.frames.get(chunk.frame as usize) else { continue };
            let piece =
                Piece::Chunk { id: chunk.id, frame: *frame, offset: chunk.offset, len: chunk.len };
            if self.view.moves.contains_key(&frame.pack) {
                level.past(0, self.settle(piece, needed).await)?;
            } else {
                needed.need(piece);
            }
        }
        level.missing().map_or(Ok(()), Err)
    }

    /// Notes a piece where it is now, in all copies that compactions made of it, or where it was; gives these places.
    async fn settle(&mut self, piece: Piece, needed: &mut dyn Needed) -> Result<Vec<Piece>> {
        let (mut work, mut settled) = (vec![piece], Vec::new());
        let mut tried = BTreeSet::new();
        while let Some(piece) = work.pop() {
            // A damaged repository may point in circles.
            if !self.view.moves.contains_key(&piece.pack()) || !tried.insert(piece.place()) {
                needed.need(piece);
                settled.push(piece);
                continue;
            }
            let (mut covered, mut is_there) = (false, false);
            for (table, relocation) in self.tables(piece.pack()).await?.iter() {
                if let Some(copy) = piece.moved(relocation) {
                    covered = true;
                    is_there = is_there || self.is_stored(copy.pack(), needed).await?;
                    work.push(copy);
                    work.push(Piece::Block(BlockKind::Relocation, *table));
                }
            }
            if covered && (is_there || !needed.knows(piece.pack())) {
                self.moved.insert(piece.pack());
            } else if covered {
                // The copies are lost, and it is not: it must not go.
                needed.need(piece);
                settled.push(piece);
            } else {
                if !needed.knows(piece.pack()) {
                    self.must_be_in_place(piece.pack()).await?;
                }
                needed.need(piece);
                settled.push(piece);
            }
        }
        Ok(settled)
    }

    /// False for a pack that is gone, unless it was copied.
    async fn is_stored(&mut self, pack: PackId, needed: &dyn Needed) -> Result<bool> {
        // Those that were stored since the packs were listed are asked for, once.
        if self.view.moves.contains_key(&pack) || needed.knows(pack) || self.stored.contains(&pack)
        {
            return Ok(true);
        }
        let is_stored = self.is_answered(pack).await?;
        if is_stored {
            self.stored.insert(pack);
        }
        Ok(is_stored)
    }

    /// Fails for a pack that was copied and is gone, of which a piece is needed that no list of copies names: the piece's
    /// copies can't be told from garbage then.
    async fn must_be_in_place(&self, pack: PackId) -> Result<()> {
        if self.is_answered(pack).await? {
            return Ok(());
        }
        Err(Error::Missing {
            object: Key::pack(pack).to_string(),
            needed_by: "a snapshot, and no list of copies that is left has this part of it"
                .to_owned(),
        })
    }

    /// True when the store has a pack now.
    async fn is_answered(&self, pack: PackId) -> Result<bool> {
        match self.repo.store().get_range(&Key::pack(pack), 0..1).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
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
