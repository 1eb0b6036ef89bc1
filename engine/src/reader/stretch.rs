//! Reading much of a volume, in no order: planned at once, so that few large requests bring all of it.
//!
//! ```text
//! ranges -> leaves -> frames of all segments -> portions, one request each -> whole blocks, as they are
//!                                                                         \-> parts of blocks, until all are there
//! ```
//!
//! Writers work on several segments at one time, so that frames of neighbouring segments lie between each other: what is
//! planned for one segment alone asks for twice as many pieces. Bytes are handed on as they came, without a copy; only
//! a block that two chunks share is put together.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::{
    BLOCK, DamagedRange, Part, Piece, Reading, SegmentPlan, VolumeReader, blocks_around,
    blocks_within, overlap, overlaps, plan, requests,
};
use crate::error::{Error, Result};
use crate::format::SEGMENT_BYTES;
use crate::format::leaf::{Extent, Leaf};
use crate::tree;

/// Leaves that are read at one time.
const LEAVES_IN_FLIGHT: usize = 4;
/// Bytes of the volume that a portion brings, unless one frame alone holds more.
const MAX_PORTION: u64 = 16 << 20;

/// A plan for some ranges of a volume.
#[derive(Debug)]
pub struct Stretch {
    /// What is known without any frame: zeros, and what lies below damaged nodes and leaves.
    pub known: Reading,
    /// The rest, for [`VolumeReader::read_portion`].
    pub portions: Vec<Portion>,
}

/// What one request brings of a [`Stretch`], and some MiB at most.
#[derive(Debug)]
pub struct Portion {
    plans: Vec<SegmentPlan>,
    blocks: Arc<Mutex<Blocks>>,
}

impl VolumeReader {
    /// Plans the reading of ranges, which are in order, do not overlap, and are widened to whole blocks. Memory is that
    /// of the leaves. Damage is in the answer; any other error says nothing about the data.
    pub async fn stretch(&self, ranges: &[Range<u64>]) -> Result<Stretch, Arc<Error>> {
        let len_bytes = self.volume.len_bytes;
        let wanted: Vec<_> =
            ranges.iter().map(|range| blocks_around(range.clone(), len_bytes)).collect();
        let leaves = segments(&wanted).into_iter().map(|(segment, wanted)| async move {
            let bounds = tree::segment_range(len_bytes, segment as usize);
            match self.leaf(segment, &bounds).await {
                Err(error) if !error.is_unreadable() => Err(Arc::new(error)),
                leaf => Ok((segment, bounds.start, wanted, leaf)),
            }
        });
        // Collected, since with a closure in it the future would not be Send for every lifetime.
        let leaves: Vec<_> = leaves.collect();
        let leaves: Vec<_> = stream::iter(leaves).buffered(LEAVES_IN_FLIGHT).try_collect().await?;

        let mut known = Reading::default();
        let mut plans = Vec::new();
        let mut blocks = Blocks { wanted, len_bytes, parts: HashMap::new() };
        for (segment, start, wanted, leaf) in leaves {
            match leaf {
                Ok(Some(leaf)) => {
                    let of_segment = |plan| (segment, plan);
                    plans.extend(plan(&leaf, start, &wanted).into_iter().map(of_segment));
                    blocks.add_zeros(&leaf, start, &mut known.pieces);
                }
                Ok(None) => known.pieces.extend(wanted.into_iter().map(Piece::Zeros)),
                Err(error) => {
                    let error = Arc::new(error);
                    let damaged = |range| DamagedRange { range, error: error.clone() };
                    known.damaged.extend(wanted.into_iter().map(damaged));
                }
            }
        }
        join_zeros(&mut known.pieces);
        let blocks = Arc::new(Mutex::new(blocks));
        let portions = requests(plans)
            .into_iter()
            .flat_map(|request| portions(request.spans.into_iter().map(|span| span.tag), &blocks));
        Ok(Stretch { known, portions: portions.collect() })
    }

    /// Reads a portion. Blocks that it shares with another one come with the one that is read last. Damage is in the
    /// answer; after any other error it can be read again.
    pub async fn read_portion(&self, portion: &Portion) -> Result<Reading, Arc<Error>> {
        let mut batches = Vec::new();
        for fetching in self.fetch(portion.plans.clone()) {
            batches.push(fetching.await?);
        }
        let mut reading = Reading::default();
        let mut blocks = portion.blocks();
        for batch in batches {
            for (at, bytes) in &batch.pieces {
                let range = *at..at + bytes.len() as u64;
                blocks.add(range, Some(bytes.clone()), &mut reading.pieces);
            }
            for lost in &batch.lost {
                reading.damaged.extend(blocks.damage(lost));
            }
        }
        drop(blocks);
        reading.pieces.sort_unstable_by_key(|piece| piece.range().start);
        Ok(reading)
    }
}

impl Portion {
    /// Bytes of the volume that it brings.
    pub fn len_bytes(&self) -> u64 {
        self.plans.iter().map(len_bytes).sum()
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        // Only added to, so a panic elsewhere does not spoil it.
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Divides what one request could bring by what becomes of it: well compressed, it is many times as much.
fn portions(plans: impl Iterator<Item = SegmentPlan>, blocks: &Arc<Mutex<Blocks>>) -> Vec<Portion> {
    let mut portions: Vec<Portion> = Vec::new();
    for plan in plans {
        match portions.last_mut() {
            Some(last) if last.len_bytes() + len_bytes(&plan) <= MAX_PORTION => {
                last.plans.push(plan);
            }
            _ => portions.push(Portion { plans: vec![plan], blocks: blocks.clone() }),
        }
    }
    portions
}

fn len_bytes((_, (_, placements)): &SegmentPlan) -> u64 {
    placements.iter().map(|placement| u64::from(placement.len)).sum()
}

/// The segments that ranges lie in, with the parts that lie in each.
fn segments(ranges: &[Range<u64>]) -> Vec<(u64, Vec<Range<u64>>)> {
    let mut segments: Vec<(u64, Vec<Range<u64>>)> = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let segment = at / SEGMENT_BYTES;
            let part = at..((segment + 1) * SEGMENT_BYTES).min(range.end);
            at = part.end;
            match segments.last_mut() {
                Some((last, parts)) if *last == segment => parts.push(part),
                _ => segments.push((segment, vec![part])),
            }
        }
    }
    segments
}

fn join_zeros(pieces: &mut Vec<Piece>) {
    pieces.sort_unstable_by_key(|piece| piece.range().start);
    pieces.dedup_by(|next, last| match (next, last) {
        (Piece::Zeros(next), Piece::Zeros(last)) if last.end == next.start => {
            last.end = next.end;
            true
        }
        _ => false,
    });
}

/// Makes whole blocks of what comes.
#[derive(Debug)]
struct Blocks {
    /// In order.
    wanted: Vec<Range<u64>>,
    /// Of the volume, whose last block may be short.
    len_bytes: u64,
    /// Of blocks that are not whole, by number: what is there.
    parts: HashMap<u64, Vec<Part>>,
}

impl Blocks {
    /// Takes zeros in, which need no frame.
    fn add_zeros(&mut self, leaf: &Leaf, start: u64, pieces: &mut Vec<Piece>) {
        let mut run = start..start;
        for extent in &leaf.extents {
            let end = run.end + u64::from(extent.len_bytes());
            if let Extent::Zero { .. } = extent {
                run.end = end;
                continue;
            }
            self.add(run, None, pieces);
            run = end..end;
        }
        self.add(run, None, pieces);
    }

    /// Takes in what is known of a range, as far as it is of use: bytes, or zeros.
    fn add(&mut self, range: Range<u64>, bytes: Option<Bytes>, pieces: &mut Vec<Piece>) {
        if !overlaps(&self.wanted, &range) {
            return;
        }
        let whole = blocks_within(&range, self.len_bytes);
        let cut = |part: &Range<u64>| {
            let at = |place: u64| (place - range.start) as usize;
            bytes.as_ref().map(|bytes| bytes.slice(at(part.start)..at(part.end)))
        };
        if !whole.is_empty() {
            pieces.push(match cut(&whole) {
                Some(bytes) => Piece::Data { offset: whole.start, bytes },
                None => Piece::Zeros(whole.clone()),
            });
        }
        for edge in [range.start..whole.start.min(range.end), whole.end..range.end] {
            if !edge.is_empty() {
                // A copy, so that few bytes do not keep many alive.
                let bytes = cut(&edge).map(|bytes| Bytes::copy_from_slice(&bytes));
                pieces.extend(self.complete(edge, bytes));
            }
        }
    }

    /// Adds a part of a block; gives the block when it is whole.
    fn complete(&mut self, range: Range<u64>, bytes: Option<Bytes>) -> Option<Piece> {
        let number = range.start / BLOCK;
        let block = number * BLOCK..((number + 1) * BLOCK).min(self.len_bytes);
        let parts = self.parts.entry(number).or_default();
        parts.push((range, bytes));
        parts.sort_unstable_by_key(|(range, _)| range.start);
        let reached =
            parts.iter().fold(
                block.start,
                |at, (range, _)| {
                    if range.start <= at { at.max(range.end) } else { at }
                },
            );
        if reached < block.end {
            return None;
        }
        let mut whole = vec![0; (block.end - block.start) as usize];
        for (range, bytes) in self.parts.remove(&number)? {
            let at = |place: u64| (place - block.start) as usize;
            if let (Some(bytes), Some(place)) =
                (bytes, whole.get_mut(at(range.start)..at(range.end)))
            {
                place.copy_from_slice(&bytes);
            }
        }
        Some(Piece::Data { offset: block.start, bytes: whole.into() })
    }

    /// The wanted blocks of a chunk that is lost.
    fn damage(&self, lost: &DamagedRange) -> Vec<DamagedRange> {
        let blocks = blocks_around(lost.range.clone(), self.len_bytes);
        let wanted = self.wanted.iter().filter(|wanted| overlap(wanted, &blocks));
        let within =
            wanted.map(|wanted| wanted.start.max(blocks.start)..wanted.end.min(blocks.end));
        within.map(|range| DamagedRange { range, error: lost.error.clone() }).collect()
    }
}
