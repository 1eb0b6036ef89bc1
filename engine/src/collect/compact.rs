//! Compaction: copies what is needed of packs that are mostly garbage (docs/protocol.md, "Compaction").
//!
//! A compaction is a session of its own. It copies every piece that a root of the view needs, and commits where the
//! pieces are now. It deletes nothing: the next view finds the old packs covered by their copies.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::inventory::{Inventory, StoredPack};
use super::view::View;
use super::walk::{Needed, Piece, Walk};
use super::{CollectOptions, CollectReport};
use crate::context::Context;
use crate::crypto::{self, Keys};
use crate::error::{Error, Result};
use crate::fetch::{Fetched, Request, Span, coalesce};
use crate::format::block::{self, BlockKind, BlockRef};
use crate::format::frame::{self, FrameEncoder, FrameLocation};
use crate::format::pack::{PackBuilder, PackKind};
use crate::format::relocation::{MovedBlock, Relocation, Run};
use crate::id::{ChunkId, PackId, SnapshotId};
use crate::key::Key;
use crate::publish::{Published, publish};
use crate::record::{Decision, Move, kind};
use crate::repository::{Repository, stamp};
use crate::workers::Workers;

/// Bytes that are needed of the packs of one batch: what a collector that is killed does again.
const BATCH_BYTES: u64 = 16 << 30;
/// Packs of one batch.
const BATCH_PACKS: usize = 4096;
/// Chunks and manifest blocks of one batch: some 200 MiB of memory. Where there are more, some packs wait for the next.
const BATCH_PIECES: usize = 2 << 20;
/// Chunks and manifest blocks of one table of copies. Each takes some 50 bytes at most, and no block may have more than
/// [`block::MAX_BYTES`]: a pack with more of them gets several tables.
const TABLE_ENTRIES: usize = 1 << 16;
/// A pack with less garbage than a sixteenth is not worth copying, whatever share of garbage is allowed: headers and
/// footers count as garbage here, and every copy has them again. One that was copied for them would be copied for ever.
const MIN_WASTE_SHARE: u64 = 16;
/// Nor is one with less than this.
const MIN_WASTE_BYTES: u64 = 4 << 10;

/// Compacts one batch of packs. True when there is something new: look again.
pub(super) async fn compact(
    repo: &Repository,
    view: &View,
    inventory: &Inventory,
    options: &CollectOptions,
    report: &mut CollectReport,
    ctx: &Context,
) -> Result<bool> {
    let victims = choose(view, inventory, options, report.damaged_packs);
    if victims.packs.is_empty() {
        return Ok(false);
    }
    let session = ctx.host.new_id();
    let result = copy(repo, view, session, victims, report, ctx).await;
    match &result {
        Ok(true) => {}
        // Given up, so that what was stored can be collected at once. Best effort: silence would do in the end.
        Ok(false) | Err(_) => {
            let key = Key::snap(session);
            if let Ok(abort) =
                repo.seal(kind::DECISION, &key, &Decision::Abort { stamp: stamp(ctx) })
            {
                let _ = publish(repo.store(), &key, abort).await;
            }
        }
    }
    result
}

/// The packs with the largest share of garbage, as many as it takes to come below the allowed waste.
fn choose<'a>(
    view: &View,
    inventory: &'a Inventory,
    options: &CollectOptions,
    damaged: u64,
) -> Victims<'a> {
    let mut victims = Victims::new(BATCH_PIECES, inventory);
    // Damage was found by the last batch, and would be again.
    let Some(percent) = options.max_waste_percent.filter(|_| damaged == 0) else { return victims };
    let waste = |pack: &StoredPack| pack.len - pack.needed.min(pack.len);
    let kept = inventory.iter().filter(|pack| pack.needed > 0 && view.is_decided(pack.id.session));
    let (mut total, mut wasted) = (0, 0);
    let mut candidates = Vec::new();
    for pack in kept {
        total += pack.len;
        wasted += waste(&pack);
        // One that was copied before is still needed in place: copies of it did not cover all.
        let is_worth = waste(&pack) >= MIN_WASTE_BYTES.max(pack.len / MIN_WASTE_SHARE);
        if is_worth && !view.moves.contains_key(&pack.id) {
            candidates.push(pack);
        }
    }
    let allowed = total / 100 * u64::from(percent);
    candidates.sort_by_key(|pack| (pack.needed * 1000 / pack.len.max(1), pack.id));
    let mut bytes = 0;
    for pack in candidates {
        if wasted <= allowed || victims.packs.len() == BATCH_PACKS || bytes > BATCH_BYTES {
            break;
        }
        wasted -= waste(&pack);
        bytes += pack.needed;
        victims.packs.insert(pack.id, Wanted::default());
    }
    victims
}

/// What is needed of one pack, each piece once.
#[derive(Debug, Default)]
struct Wanted {
    /// By frame, then by first byte in it.
    frames: BTreeMap<u32, WantedFrame>,
    /// By offset.
    blocks: BTreeMap<u32, (BlockKind, BlockRef)>,
}

#[derive(Clone, Debug)]
struct WantedFrame {
    location: FrameLocation,
    chunks: BTreeMap<u32, (ChunkId, u32)>,
}

impl Wanted {
    fn pieces(&self) -> usize {
        self.blocks.len() + self.frames.values().map(|frame| frame.chunks.len()).sum::<usize>()
    }
}

/// The packs of one batch.
struct Victims<'a> {
    packs: BTreeMap<PackId, Wanted>,
    stored: &'a Inventory,
    /// What they have together.
    pieces: usize,
    most: usize,
}

impl<'a> Victims<'a> {
    fn new(most: usize, stored: &'a Inventory) -> Self {
        Self { packs: BTreeMap::new(), stored, pieces: 0, most }
    }
}

impl Needed for Victims<'_> {
    fn need(&mut self, piece: Piece) {
        let Some(wanted) = self.packs.get_mut(&piece.pack()) else { return };
        let is_new = match piece {
            Piece::Block(kind, block) => {
                wanted.blocks.insert(block.offset, (kind, block)).is_none()
            }
            Piece::Chunk { id, frame, offset, len } => {
                let frame = wanted
                    .frames
                    .entry(frame.offset)
                    .or_insert_with(|| WantedFrame { location: frame, chunks: BTreeMap::new() });
                frame.chunks.insert(offset, (id, len)).is_none()
            }
        };
        self.pieces += usize::from(is_new);
        if self.pieces > self.most && self.packs.len() > 1 {
            let last = self.packs.pop_last();
            self.pieces -= last.map_or(0, |(_, wanted)| wanted.pieces());
        }
    }

    fn knows(&self, pack: PackId) -> bool {
        self.stored.has(pack)
    }
}

/// Copies and commits. False when there was nothing to commit.
async fn copy(
    repo: &Repository,
    view: &View,
    session: SnapshotId,
    mut victims: Victims<'_>,
    report: &mut CollectReport,
    ctx: &Context,
) -> Result<bool> {
    // The same roots as before; a root that was purged meanwhile ends the batch.
    if Walk::new(repo, view, ctx)?.run(&mut victims).await?.is_none() {
        return Ok(false);
    }
    claim(repo, session, &mut victims.packs, ctx).await?;
    let workers = Workers::start(ctx)?;
    let mut copier = Copier::new(session, repo.keys(), ctx)?;
    for (pack, wanted) in victims.packs {
        ctx.check()?;
        let copied;
        (copier, copied) = copy_pack(repo, pack, wanted, copier, &workers, ctx).await?;
        report.damaged_packs += u64::from(!copied);
    }
    let moves = copier.finish();
    store(repo, &mut copier).await?;
    report.copied_bytes += copier.copied_bytes;
    if moves.is_empty() {
        return Ok(false);
    }
    let key = Key::snap(session);
    let decision = Decision::Compaction { stamp: stamp(ctx), moves };
    let body = repo.seal(kind::DECISION, &key, &decision)?;
    // Whoever was first: an Abort means that others took this for dead, and its packs will go.
    Ok(publish(repo.store(), &key, body).await? == Published::Ours)
}

/// Puts up the hints by which readers will find the copies, and leaves packs alone that others are at.
async fn claim(
    repo: &Repository,
    session: SnapshotId,
    victims: &mut BTreeMap<PackId, Wanted>,
    ctx: &Context,
) -> Result<()> {
    let all: Vec<PackId> = victims.keys().copied().collect();
    for pack in all {
        ctx.check()?;
        let key = Key::moves(pack, session);
        repo.store().put(&key, repo.seal(kind::MOVE, &key, &())?).await?;
        for other in repo.movers(pack).await? {
            if other == session {
                continue;
            }
            let is_at_it = match repo.decision(other).await? {
                None => true,
                Some(Decision::Compaction { moves, .. }) => {
                    moves.iter().any(|moved| moved.source == pack)
                }
                Some(_) => false,
            };
            if is_at_it {
                // Two copies would do no harm, but take twice the space.
                victims.remove(&pack);
            }
        }
        if !victims.contains_key(&pack) {
            repo.store().delete(&key).await?;
        }
    }
    Ok(())
}

/// Copies what is wanted of one pack; false when it can't be read, and stays as it is.
async fn copy_pack(
    repo: &Repository,
    pack: PackId,
    wanted: Wanted,
    mut copier: Copier,
    workers: &Workers,
    ctx: &Context,
) -> Result<(Copier, bool)> {
    let spans = wanted.frames.into_values().map(|frame| Span {
        pack,
        offset: frame.location.offset,
        len: frame.location.stored_len,
        tag: Source::Frame(frame),
    });
    let blocks = wanted.blocks.into_values().map(|(kind, block)| Span {
        pack,
        offset: block.offset,
        len: block.len,
        tag: Source::Block(kind),
    });
    for request in coalesce(spans.chain(blocks).collect()) {
        let fetched = match request.fetch(repo, ctx).await {
            Ok(fetched) => fetched,
            Err(error) if error.is_damage() => {
                copier.forget(pack);
                return Ok((copier, false));
            }
            Err(error) => return Err(error),
        };
        let taken = workers.run(ctx, move || {
            let result = copier.take(&request, &fetched);
            Ok((copier, result))
        });
        let result;
        (copier, result) = taken.await?;
        match result {
            Ok(()) => {}
            Err(error) if error.is_damage() => {
                copier.forget(pack);
                return Ok((copier, false));
            }
            Err(error) => return Err(error),
        }
        store(repo, &mut copier).await?;
    }
    Ok((copier, true))
}

/// Stores the packs that are complete.
async fn store(repo: &Repository, copier: &mut Copier) -> Result<()> {
    for (id, bytes) in std::mem::take(&mut copier.complete) {
        copier.copied_bytes += bytes.len() as u64;
        repo.store().put(&Key::pack(id), bytes).await?;
    }
    Ok(())
}

/// What a span of an old pack holds.
#[derive(Clone, Debug)]
enum Source {
    Frame(WantedFrame),
    Block(BlockKind),
}

/// Puts pieces together to new frames and packs, and remembers where they came from.
pub(crate) struct Copier {
    session: SnapshotId,
    keys: Keys,
    ctx: Context,
    next_number: u32,
    encoder: FrameEncoder,
    data: Option<PackBuilder>,
    manifest: Option<PackBuilder>,
    complete: Vec<(PackId, Bytes)>,
    /// The open frame.
    raw: Vec<u8>,
    chunk_lens: Vec<u32>,
    /// Chunks in the open frame: the old pack, and their run.
    waiting: Vec<(PackId, Run)>,
    stored: Vec<u8>,
    opened: Vec<u8>,
    decoded: Vec<u8>,
    relocations: BTreeMap<PackId, Relocation>,
    /// Tables of packs of which so much is needed that they get another one.
    full: Vec<Relocation>,
    copied_bytes: u64,
}

impl Copier {
    pub(crate) fn new(session: SnapshotId, keys: &Keys, ctx: &Context) -> Result<Self> {
        Ok(Self {
            session,
            keys: keys.clone(),
            ctx: ctx.clone(),
            next_number: 0,
            encoder: FrameEncoder::new().map_err(|_| Error::Internal("zstd has no memory"))?,
            data: None,
            manifest: None,
            complete: Vec::new(),
            raw: Vec::new(),
            chunk_lens: Vec::new(),
            waiting: Vec::new(),
            stored: Vec::new(),
            opened: Vec::new(),
            decoded: Vec::new(),
            relocations: BTreeMap::new(),
            full: Vec::new(),
            copied_bytes: 0,
        })
    }

    /// Takes over all pieces of one request, after checking each.
    fn take(&mut self, request: &Request<Source>, fetched: &Fetched) -> Result<()> {
        for span in &request.spans {
            let stored = fetched.span(span)?;
            match &span.tag {
                Source::Block(kind) => {
                    self.add_block(span.pack, span.offset, span.len, *kind, stored)?;
                }
                Source::Frame(frame) => self.take_frame(span, frame, stored)?,
            }
        }
        Ok(())
    }

    /// Adds a manifest block that says what one of `source` said, after checking that it is whole.
    pub(crate) fn add_block(
        &mut self,
        source: PackId,
        old_offset: u32,
        old_len: u32,
        kind: BlockKind,
        block: &[u8],
    ) -> Result<()> {
        self.keys
            .open(crypto::Piece::Block(kind), block, &mut self.opened)
            .and_then(|opened| block::unseal(kind, opened))
            .map_err(|error| {
                error.of(format!("manifest block {old_offset}+{old_len} of {}", Key::pack(source)))
            })?;
        let pack = self.open(PackKind::Manifest);
        let moved = MovedBlock {
            old_offset,
            old_len,
            pack: pack.id(),
            offset: pack.add_block(kind, block),
            len: block.len() as u32,
        };
        if pack.is_full() {
            self.complete.extend(self.manifest.take().map(PackBuilder::finish));
        }
        self.relocation(source).blocks.push(moved);
        Ok(())
    }

    fn take_frame(
        &mut self,
        span: &Span<Source>,
        wanted: &WantedFrame,
        stored: &[u8],
    ) -> Result<()> {
        let object = || format!("frame {}+{} of {}", span.offset, span.len, Key::pack(span.pack));
        let mut decoded = std::mem::take(&mut self.decoded);
        self.keys
            .open(crypto::Piece::Frame, stored, &mut self.opened)
            .and_then(|stored| frame::decode(stored, wanted.location.raw_len, &mut decoded))
            .map_err(|error| error.of(object()))?;
        for (old_start, (id, len)) in &wanted.chunks {
            let start = *old_start as usize;
            let bytes = decoded.get(start..start + *len as usize).unwrap_or_default();
            if self.keys.chunk_id(bytes) != *id {
                let detail = format!("chunk {id} expected, other bytes found");
                return Err(Error::Damaged { object: object(), detail });
            }
            self.add_chunk(span.pack, span.offset, *old_start, bytes);
        }
        self.decoded = decoded;
        Ok(())
    }

    /// Adds a chunk that was, or should have been, in a frame of `source`.
    pub(crate) fn add_chunk(
        &mut self,
        source: PackId,
        old_frame: u32,
        old_start: u32,
        bytes: &[u8],
    ) {
        if self.raw.len() + bytes.len() > frame::TARGET_BYTES {
            self.flush();
        }
        let (len, start) = (bytes.len() as u32, self.raw.len() as u32);
        let run = Run { old_frame, old_start, len, frame: 0, start };
        self.raw.extend_from_slice(bytes);
        self.chunk_lens.push(len);
        match self.waiting.last_mut() {
            Some((pack, last))
                if *pack == source
                    && last.old_frame == run.old_frame
                    && last.old_start + last.len == run.old_start =>
            {
                last.len += run.len;
            }
            _ => self.waiting.push((source, run)),
        }
    }

    /// The packs that are complete, to be stored.
    pub(crate) fn take_complete(&mut self) -> Vec<(PackId, Bytes)> {
        std::mem::take(&mut self.complete)
    }

    /// Compresses the open frame and puts it into the open pack.
    fn flush(&mut self) {
        if self.raw.is_empty() {
            return;
        }
        let mut stored = std::mem::take(&mut self.stored);
        self.encoder.encode(&self.raw, &mut stored);
        self.keys.seal(crypto::Piece::Frame, &mut stored, &*self.ctx.host);
        let chunk_lens = std::mem::take(&mut self.chunk_lens);
        let pack = self.open(PackKind::Data);
        let location = pack.add_frame(&stored, chunk_lens.into_iter());
        if pack.is_full() {
            self.complete.extend(self.data.take().map(PackBuilder::finish));
        }
        self.stored = stored;
        self.raw.clear();
        for (source, run) in std::mem::take(&mut self.waiting) {
            let relocation = self.relocation(source);
            if relocation.frames.last() != Some(&location) {
                relocation.frames.push(location);
            }
            let frame = relocation.frames.len() as u32 - 1;
            relocation.runs.push(Run { frame, ..run });
        }
    }

    /// The table for what is copied next of a pack.
    fn relocation(&mut self, source: PackId) -> &mut Relocation {
        let table = self.relocations.entry(source).or_insert_with(|| Relocation::new(source));
        if table.runs.len() + table.blocks.len() >= TABLE_ENTRIES {
            self.full.push(std::mem::replace(table, Relocation::new(source)));
        }
        table
    }

    /// Leaves a pack where it is. What was copied of it already is garbage.
    fn forget(&mut self, source: PackId) {
        self.relocations.remove(&source);
        self.full.retain(|table| table.source != source);
        self.waiting.retain(|(pack, _)| *pack != source);
    }

    /// Closes all packs, and says what was moved.
    pub(crate) fn finish(&mut self) -> Vec<Move> {
        self.flush();
        let mut moves = Vec::new();
        let open = std::mem::take(&mut self.relocations).into_values();
        for mut relocation in std::mem::take(&mut self.full).into_iter().chain(open) {
            relocation.runs.sort_unstable_by_key(|run| (run.old_frame, run.old_start));
            relocation.blocks.sort_unstable_by_key(|block| block.old_offset);
            let (kind, mut block) = (BlockKind::Relocation, relocation.encode());
            self.keys.seal(crypto::Piece::Block(kind), &mut block, &*self.ctx.host);
            let pack = self.open(PackKind::Manifest);
            let table = BlockRef {
                digest: relocation.digest(),
                pack: pack.id(),
                offset: pack.add_block(kind, &block),
                len: block.len() as u32,
            };
            if pack.is_full() {
                self.complete.extend(self.manifest.take().map(PackBuilder::finish));
            }
            moves.push(Move { source: relocation.source, table: table.into() });
        }
        let open = self.data.take().into_iter().chain(self.manifest.take());
        self.complete.extend(open.map(PackBuilder::finish));
        moves
    }

    /// The open pack of this kind.
    fn open(&mut self, kind: PackKind) -> &mut PackBuilder {
        let slot = match kind {
            PackKind::Data => &mut self.data,
            PackKind::Manifest => &mut self.manifest,
        };
        slot.get_or_insert_with(|| {
            let number = self.next_number;
            self.next_number += 1;
            PackBuilder::new(PackId { session: self.session, number }, kind, &self.keys)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_copied_of_a_pack_of_very_many_chunks_can_be_found() {
        let source = PackId { session: SnapshotId::from_parts(1, 1), number: 0 };
        let ctx = Context::default();
        let mut copier = Copier::new(SnapshotId::from_parts(2, 2), &Keys::none(), &ctx).unwrap();
        // Every second one, so that each is a run of its own.
        let count = TABLE_ENTRIES as u32 * 2 + 10;
        for n in 0..count {
            copier.add_chunk(source, n / 1000, n % 1000 * 2, &[n as u8]);
        }
        let moves = copier.finish();
        assert_eq!(moves.len(), 3);
        let packs: BTreeMap<PackId, Bytes> = copier.take_complete().into_iter().collect();
        let tables: Vec<Relocation> = moves
            .iter()
            .map(|moved| {
                let table: BlockRef = moved.table.into();
                assert!(table.len as usize <= block::MAX_BYTES, "{}", table.len);
                let start = table.offset as usize;
                let bytes = &packs[&table.pack][start..start + table.len as usize];
                Relocation::decode(bytes, source, table.digest).unwrap()
            })
            .collect();
        for n in 0..count {
            let found = tables.iter().filter_map(|table| table.chunk(n / 1000, n % 1000 * 2, 1));
            assert_eq!(found.count(), 1, "chunk {n}");
        }
    }

    #[test]
    fn a_batch_has_no_more_pieces_than_fit_in_memory() {
        let pack = |number| PackId { session: SnapshotId::from_parts(1, 1), number };
        let stored = Inventory::of(vec![]);
        let mut victims = Victims::new(10, &stored);
        victims.packs.extend((0..4).map(|number| (pack(number), Wanted::default())));
        for n in 0..40 {
            let location =
                FrameLocation { pack: pack(n % 4), offset: n / 8, stored_len: 1, raw_len: 1 };
            let piece =
                Piece::Chunk { id: ChunkId([0; 32]), frame: location, offset: n / 4 % 2, len: 1 };
            victims.need(piece);
            // The same once more is no more.
            victims.need(piece);
            assert!(victims.pieces <= 10, "{} after {n}", victims.pieces);
        }
        assert_eq!(victims.packs.keys().copied().collect::<Vec<_>>(), [pack(0)]);
        assert_eq!((victims.pieces, victims.packs.values().map(Wanted::pieces).sum()), (10, 10));
    }
}
