//! Reading and writing of manifest trees.
//!
//! ```text
//! record -> root node -> ... -> node of level 1 -> leaf -> chunks of one segment
//! ```

use std::collections::BTreeSet;
use std::ops::Range;

use futures::{StreamExt, TryStreamExt, stream};

use crate::context::Context;
use crate::crypto::Piece;
use crate::error::{Error, Result};
use crate::fetch::{Request, Span, coalesce};
use crate::format::block::{self, BlockKind, BlockRef};
use crate::format::leaf::{Extent, Leaf};
use crate::format::node::{self, Child, FAN_OUT, Node};
use crate::format::{self, SEGMENT_BYTES};
use crate::id::Digest;
use crate::key::Key;
use crate::record::VolumeRecord;
use crate::relocation;
use crate::repository::Repository;
use crate::workers::Workers;

/// A part of a volume that can't be read: which bytes of it, and why.
#[derive(Debug)]
pub struct Unreadable {
    /// Bytes of the volume.
    pub range: Range<u64>,
    /// Why.
    pub error: Error,
    /// The node that is missing or damaged.
    pub node: BlockRef,
    /// Its level.
    pub level: u8,
}

/// The leaves of a volume, one child for each segment.
#[derive(Debug, Default)]
pub struct Segments {
    /// In address order.
    pub leaves: Vec<Child>,
    /// The nodes above them.
    pub nodes: Vec<BlockRef>,
    /// Parts below nodes that could not be read. Their leaves are [`Child::Zero`].
    pub unreadable: Vec<Unreadable>,
}

/// Reads the nodes of a volume. Damage is collected in the result; other errors end the call.
pub async fn segments(repo: &Repository, volume: &VolumeRecord, ctx: &Context) -> Result<Segments> {
    segments_from(repo, volume, 0, ctx).await
}

/// The same from the byte `start` on: nodes of which all lies before it are not read, and their leaves are
/// [`Child::Zero`].
pub(crate) async fn segments_from(
    repo: &Repository,
    volume: &VolumeRecord,
    start: u64,
    ctx: &Context,
) -> Result<Segments> {
    let (root, mut level) = volume.root();
    let mut found = Segments::default();
    let mut children = vec![root];
    while level >= 1 {
        let child_bytes = node::child_bytes(level);
        let node_bytes = node::child_bytes(level + 1);
        let total = volume.len_bytes.div_ceil(child_bytes);
        let before = usize::try_from(start / node_bytes).unwrap_or(usize::MAX);
        for child in children.iter_mut().take(before) {
            *child = Child::Zero;
        }
        // By value: with references in it the future would not be Send for every lifetime.
        let read = children.iter().copied().enumerate().map(|(n, child)| async move {
            let before = n as u64 * FAN_OUT as u64;
            let count = (total - before.min(total)).min(FAN_OUT as u64) as usize;
            match child {
                Child::Zero => (n, Ok(vec![Child::Zero; count])),
                Child::Block { block, .. } => {
                    let node = read_node(repo, &block, level, count, ctx).await;
                    (n, node.map(|node| node.children))
                }
            }
        });
        let mut below: Vec<_> = stream::iter(read).buffered(ctx.limits.requests).collect().await;
        let mut next = Vec::with_capacity(usize::try_from(total).unwrap_or_default());
        for ((n, result), child) in below.drain(..).zip(&children) {
            match (result, child) {
                (Ok(grandchildren), child) => {
                    if let Child::Block { block, .. } = child {
                        found.nodes.push(*block);
                    }
                    next.extend(grandchildren);
                }
                (Err(error), Child::Block { block: node, .. }) if error.is_unreadable() => {
                    let start = n as u64 * node_bytes;
                    let end = start.saturating_add(node_bytes).min(volume.len_bytes);
                    let count = (end - start).div_ceil(child_bytes) as usize;
                    next.resize(next.len() + count, Child::Zero);
                    let node = *node;
                    found.unreadable.push(Unreadable { range: start..end, error, node, level });
                }
                (Err(error), _) => return Err(error),
            }
        }
        children = next;
        level -= 1;
    }
    found.leaves = children;
    Ok(found)
}

/// Reads one node.
pub(crate) async fn read_node(
    repo: &Repository,
    block: &BlockRef,
    level: u8,
    children: usize,
    ctx: &Context,
) -> Result<Node> {
    ctx.check()?;
    read_as(repo, block, |bytes| {
        let mut opened = Vec::new();
        repo.keys()
            .open(Piece::Block(BlockKind::Node), bytes, &mut opened)
            .and_then(|bytes| Node::decode(bytes, level, children, block.digest))
            .map_err(|error| error.of(describe(block)))
    })
    .await
}

/// Reads a block that may be damaged where it was written, and whole where it was copied.
async fn read_as<T>(
    repo: &Repository,
    block: &BlockRef,
    decode: impl Fn(&[u8]) -> Result<T>,
) -> Result<T> {
    let bytes = read_block(repo, block).await?;
    let decoded = decode(&bytes);
    if !matches!(&decoded, Err(error) if error.is_unreadable()) {
        return decoded;
    }
    let copies = match repo.relocated_block(block).await {
        Err(error) if !error.is_damage() => return Err(error),
        copies => copies.unwrap_or_default(),
    };
    for moved in copies {
        match read_block(repo, &moved).await {
            Ok(bytes) => {
                if let Ok(decoded) = decode(&bytes) {
                    return Ok(decoded);
                }
            }
            Err(error) if error.is_unreadable() => {}
            Err(error) => return Err(error),
        }
    }
    decoded
}

/// The bytes of the volume that a segment covers.
pub fn segment_range(volume_len: u64, segment: usize) -> Range<u64> {
    let start = segment as u64 * SEGMENT_BYTES;
    start..(start + SEGMENT_BYTES).min(volume_len)
}

/// The segments that a range of the volume is in.
pub fn segments_of(range: &Range<u64>) -> Range<usize> {
    let number = |segment: u64| usize::try_from(segment).unwrap_or(usize::MAX);
    number(range.start / SEGMENT_BYTES)..number(range.end.div_ceil(SEGMENT_BYTES))
}

/// Reads one leaf.
pub async fn read_leaf(repo: &Repository, block: &BlockRef, segment_bytes: u64) -> Result<Leaf> {
    read_as(repo, block, |bytes| decode_leaf(repo, bytes, block, segment_bytes)).await
}

/// Checks and reads one leaf.
pub fn decode_leaf(
    repo: &Repository,
    bytes: &[u8],
    block: &BlockRef,
    segment_bytes: u64,
) -> Result<Leaf> {
    let mut opened = Vec::new();
    repo.keys()
        .open(Piece::Block(BlockKind::Leaf), bytes, &mut opened)
        .and_then(|bytes| Leaf::decode(bytes, segment_bytes, block.digest))
        .map_err(|error| error.of(describe(block)))
}

/// Reads a block, wherever compactions moved it.
pub(crate) async fn read_block(repo: &Repository, block: &BlockRef) -> Result<bytes::Bytes> {
    if block.len as usize > block::MAX_STORED_BYTES {
        let detail = "no block is so long".to_owned();
        return Err(Error::Damaged { object: describe(block), detail });
    }
    let mut places = vec![*block];
    let mut tried = BTreeSet::new();
    while let Some(place) = places.pop() {
        let start = u64::from(place.offset);
        let range = start..start + u64::from(place.len);
        match repo.store().get_range(&Key::pack(place.pack), range).await {
            Ok(bytes) => return Ok(bytes),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
        // Of several copies one is enough. A damaged repository may point in circles.
        if tried.insert(place.pack) {
            places.extend(repo.relocated_block(&place).await?);
        }
    }
    Err(missing(block))
}

/// How messages name a block.
pub fn describe(block: &BlockRef) -> String {
    format!("manifest block {}+{} of {}", block.offset, block.len, Key::pack(block.pack))
}

/// Segments whose leaves are read together: 4 GiB of a volume, some MiB of leaves.
pub const BATCH_SEGMENTS: usize = 64;

/// What a segment holds, or why that can't be read. `None` stands for zeros.
pub type SegmentLeaf = Result<Option<Leaf>>;

/// A leaf to read: its position in the list, its block as the parent names it, and the bytes that its segment covers.
type Wanted = Span<(usize, BlockRef, u64)>;

/// Reads the leaves of some segments with few requests, in the order given. Damage is in the items; other
/// errors end the call.
pub(crate) async fn leaves(
    repo: &Repository,
    volume_len: u64,
    children: Vec<(usize, Child)>,
    workers: &Workers,
    ctx: &Context,
) -> Result<Vec<(usize, SegmentLeaf)>> {
    let spans =
        children.iter().enumerate().filter_map(|(position, (segment, child))| match child {
            Child::Zero => None,
            Child::Block { block, .. } => {
                let range = segment_range(volume_len, *segment);
                let tag = (position, *block, range.end - range.start);
                Some(Span { pack: block.pack, offset: block.offset, len: block.len, tag })
            }
        });
    let mut leaves: Vec<(usize, SegmentLeaf)> =
        children.iter().map(|(segment, _)| (*segment, Ok(None))).collect();
    let mut wanted: Vec<Wanted> = spans.collect();
    let mut several = BTreeSet::new();
    for moves in 0..=relocation::MAX_MOVES {
        let read: Vec<_> = stream::iter(coalesce(std::mem::take(&mut wanted)))
            .map(|request| read_leaves(repo, request, workers, ctx))
            .buffered(ctx.limits.requests)
            .try_collect()
            .await?;
        for (span, leaf) in read.into_iter().flatten() {
            let (position, block, _) = span.tag;
            let Some((_, slot)) = leaves.get_mut(position) else { continue };
            let is_gone = matches!(&leaf, Err(Error::Missing { .. }));
            *slot = leaf.map(Some);
            if !matches!(slot, Err(error) if error.is_unreadable()) {
                continue;
            }
            // The pack is gone or damaged. A compaction or repair may have copied the leaf.
            let Span { pack, offset, len, .. } = span;
            let place = BlockRef { pack, offset, len, ..block };
            match repo.relocated_block(&place).await {
                Ok(moved) => {
                    if moved.len() > 1 {
                        several.insert(position);
                    }
                    if let Some(BlockRef { pack, offset, len, .. }) =
                        moved.into_iter().next().filter(|_| moves < relocation::MAX_MOVES)
                    {
                        wanted.push(Span { pack, offset, len, ..span });
                    }
                }
                Err(error) if error.is_damage() && is_gone => *slot = Err(error),
                Err(error) if error.is_damage() => {}
                Err(error) => return Err(error),
            }
        }
        if wanted.is_empty() {
            break;
        }
    }
    // Of several copies only the first was tried.
    for position in several {
        if let Some((segment, leaf)) = leaves.get_mut(position)
            && let Some((_, Child::Block { block, .. })) = children.get(position)
            && leaf.as_ref().is_err_and(Error::is_unreadable)
        {
            let range = segment_range(volume_len, *segment);
            match read_leaf(repo, block, range.end - range.start).await {
                Ok(read) => *leaf = Ok(Some(read)),
                Err(error) if error.is_unreadable() => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(leaves)
}

/// Fetches and decodes the leaves of one request.
async fn read_leaves(
    repo: &Repository,
    request: Request<(usize, BlockRef, u64)>,
    workers: &Workers,
    ctx: &Context,
) -> Result<Vec<(Wanted, Result<Leaf>)>> {
    let fetched = match request.fetch(repo, ctx).await {
        Ok(fetched) => Some(fetched),
        Err(error) if error.is_damage() => None,
        Err(error) => return Err(error),
    };
    let repo = repo.clone();
    let decode = move |span: Wanted| {
        let (_, block, segment_bytes) = &span.tag;
        let leaf = match &fetched {
            Some(fetched) => fetched
                .span(&span)
                .and_then(|bytes| decode_leaf(&repo, bytes, block, *segment_bytes)),
            None => Err(missing(block)),
        };
        (span, leaf)
    };
    workers.each(ctx, request.spans, decode).await
}

fn missing(block: &BlockRef) -> Error {
    Error::Missing {
        object: Key::pack(block.pack).to_string(),
        needed_by: "the manifest of a committed snapshot".to_owned(),
    }
}

/// A leaf's extents, or the one extent of a segment of zeros.
pub fn extents(leaf: Option<&Leaf>, segment_bytes: u64) -> std::borrow::Cow<'_, [Extent]> {
    match leaf {
        Some(leaf) => leaf.extents.as_slice().into(),
        None => vec![Extent::Zero { len: segment_bytes as u32 }].into(),
    }
}

/// Stores a block, given its encoding and content digest, and says where it is.
pub type BlockWriter<'a> = dyn FnMut(BlockKind, &[u8], Digest) -> Result<BlockRef> + 'a;

/// Builds the nodes above a volume's leaves and gives the root. `write` stores a block, given its encoding and
/// digest; nodes that `known` already holds are not written again.
pub fn build(
    mut children: Vec<Child>,
    known: &[BlockRef],
    write: &mut BlockWriter<'_>,
) -> Result<Child> {
    let root_level = node::root_level(children.len() as u64);
    for level in 1..=root_level {
        let mut above = Vec::with_capacity(children.len().div_ceil(FAN_OUT));
        for group in children.chunks(FAN_OUT) {
            if group.iter().all(|child| *child == Child::Zero) {
                above.push(Child::Zero);
                continue;
            }
            let node = Node { level, children: group.to_vec() };
            let digest = node.digest();
            let block = match known.iter().find(|block| block.digest == digest) {
                Some(block) => *block,
                None => write(BlockKind::Node, &node.encode(), digest)?,
            };
            let data_bytes = group.iter().map(Child::data_bytes).sum();
            above.push(Child::Block { block, data_bytes });
        }
        children = above;
    }
    debug_assert!(children.len() <= 1);
    Ok(children.pop().unwrap_or(Child::Zero))
}

/// The number of segments of a volume, as an index type.
pub fn segment_count(len_bytes: u64) -> usize {
    usize::try_from(format::segments(len_bytes)).unwrap_or(usize::MAX)
}
