//! Which bytes two volumes differ in, from their manifests alone.

use std::collections::VecDeque;
use std::ops::Range;

use futures::try_join;
use serde::Serialize;

use crate::context::Context;
use crate::error::Result;
use crate::format::SEGMENT_BYTES;
use crate::format::leaf::{Extent, Leaf};
use crate::format::node::Child;
use crate::record::VolumeRecord;
use crate::repository::Repository;
use crate::restore::{ByteRange, join};
use crate::tree;
use crate::workers::Workers;

/// The difference of two volumes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VolumeDiff {
    /// Bytes that differ, in chunks: a chunk that is not at the same place in both counts whole. Where one
    /// volume is longer, its tail counts.
    pub ranges: Vec<ByteRange>,
    /// The sum of the ranges.
    pub changed_bytes: u64,
}

/// Compares two volumes. Equal parts of the manifests are not read.
pub async fn diff(
    repo: &Repository,
    from: &VolumeRecord,
    to: &VolumeRecord,
    ctx: &Context,
) -> Result<VolumeDiff> {
    let mut differences = Differences::begin(repo, from, to, 0, ctx).await?;
    let mut found = VolumeDiff::default();
    while let Some(ranges) = differences.next().await? {
        found.ranges.extend(ranges);
    }
    found.changed_bytes = found.ranges.iter().map(|range| range.end - range.start).sum();
    Ok(found)
}

/// The difference of two volumes from some byte on, a part at a time: the same ranges as those of [`diff`].
///
/// What is held are the places of all leaves that differ, and the leaves of [`tree::BATCH_SEGMENTS`] segments.
#[derive(Debug)]
pub struct Differences {
    repo: Repository,
    workers: Workers,
    ctx: Context,
    from_bytes: u64,
    to_bytes: u64,
    start: u64,
    /// Segments whose leaves differ, in order.
    differing: VecDeque<(usize, Child, Child)>,
    /// What the longer volume has more, until it is told.
    tail: Option<Range<u64>>,
    /// The last range so far: the next part may go on where it ends.
    last: Option<Range<u64>>,
}

impl Differences {
    /// Begins to compare two volumes from the byte `start` on. No leaf before it is read, and no node of which all lies
    /// before it.
    pub async fn begin(
        repo: &Repository,
        from: &VolumeRecord,
        to: &VolumeRecord,
        start: u64,
        ctx: &Context,
    ) -> Result<Self> {
        let mut begun = Self {
            repo: repo.clone(),
            workers: Workers::start(ctx)?,
            ctx: ctx.clone(),
            from_bytes: from.len_bytes,
            to_bytes: to.len_bytes,
            start,
            differing: VecDeque::new(),
            tail: None,
            last: None,
        };
        if from.content == to.content {
            return Ok(begun);
        }
        let (before, after) = try_join!(
            tree::segments_from(repo, from, start, ctx),
            tree::segments_from(repo, to, start, ctx)
        )?;
        if let Some(unreadable) = before.unreadable.into_iter().chain(after.unreadable).next() {
            return Err(unreadable.error);
        }
        let first = usize::try_from(start / SEGMENT_BYTES).unwrap_or(usize::MAX);
        let pairs = before.leaves.iter().zip(&after.leaves).enumerate().skip(first);
        begun.differing = pairs
            .filter(|(_, (a, b))| !a.has_content_of(b))
            .map(|(n, (a, b))| (n, *a, *b))
            .collect();
        let common = from.len_bytes.min(to.len_bytes).max(start);
        begun.tail = Some(common..begun.longest()).filter(|tail| !tail.is_empty());
        Ok(begun)
    }

    fn longest(&self) -> u64 {
        self.from_bytes.max(self.to_bytes)
    }

    /// The next ranges, in order; none that touch each other, and none at all after the last. There may be no range in a
    /// part.
    pub async fn next(&mut self) -> Result<Option<Vec<ByteRange>>> {
        let mut changed: Vec<_> = self.last.take().into_iter().collect();
        if self.differing.is_empty() {
            changed.extend(self.tail.take());
            return Ok(Some(join(changed)).filter(|ranges| !ranges.is_empty()));
        }
        let batch = self.differing.len().min(tree::BATCH_SEGMENTS);
        let batch: Vec<_> = self.differing.drain(..batch).collect();
        let left = batch.iter().map(|(n, a, _)| (*n, *a)).collect();
        let right = batch.iter().map(|(n, _, b)| (*n, *b)).collect();
        let (left, right) = try_join!(
            tree::leaves(&self.repo, self.from_bytes, left, &self.workers, &self.ctx),
            tree::leaves(&self.repo, self.to_bytes, right, &self.workers, &self.ctx),
        )?;
        let longest = self.longest();
        for ((segment, a), (_, b)) in left.into_iter().zip(right) {
            let (a, b) = (a?, b?);
            let start = tree::segment_range(longest, segment).start;
            let a_len = tree::segment_range(self.from_bytes, segment).end - start;
            let b_len = tree::segment_range(self.to_bytes, segment).end - start;
            compare((a.as_ref(), a_len), (b.as_ref(), b_len), start, &mut changed);
        }
        let inside = changed.into_iter().map(|r| r.start.max(self.start)..r.end.min(longest));
        let mut ranges = join(inside.filter(|range| !range.is_empty()).collect());
        self.last = ranges.pop().map(|range| range.start..range.end);
        Ok(Some(ranges))
    }
}

/// Walks the extents of two leaves side by side.
fn compare(
    (a, a_len): (Option<&Leaf>, u64),
    (b, b_len): (Option<&Leaf>, u64),
    start: u64,
    changed: &mut Vec<Range<u64>>,
) {
    let (a, b) = (tree::extents(a, a_len), tree::extents(b, b_len));
    let (mut a, mut b) = (positioned(&a), positioned(&b));
    let (mut left, mut right) = (a.next(), b.next());
    while let (Some((a_at, a_extent)), Some((b_at, b_extent))) = (left, right) {
        let (a_end, b_end) =
            (a_at + u64::from(a_extent.len_bytes()), b_at + u64::from(b_extent.len_bytes()));
        let zeros = matches!((a_extent, b_extent), (Extent::Zero { .. }, Extent::Zero { .. }));
        let equal = zeros || (a_at == b_at && a_extent.same_content(b_extent));
        if !equal {
            changed.push(start + a_at.max(b_at)..start + a_end.min(b_end));
        }
        if a_end <= b_end {
            left = a.next();
        }
        if b_end <= a_end {
            right = b.next();
        }
    }
}

fn positioned(extents: &[Extent]) -> impl Iterator<Item = (u64, &Extent)> {
    extents.iter().scan(0, |at, extent| {
        let start = *at;
        *at += u64::from(extent.len_bytes());
        Some((start, extent))
    })
}
