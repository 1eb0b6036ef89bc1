//! Which bytes two volumes differ in, from their manifests alone.

use futures::try_join;
use serde::Serialize;

use crate::context::Context;
use crate::error::Result;
use crate::format::leaf::{Extent, Leaf};
use crate::format::node::Child;
use crate::record::VolumeRecord;
use crate::repository::Repository;
use crate::restore::{ByteRange, join};
use crate::tree;

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
    if from.content == to.content {
        return Ok(VolumeDiff::default());
    }
    let (before, after) =
        try_join!(tree::segments(repo, from, ctx), tree::segments(repo, to, ctx))?;
    if let Some(unreadable) = before.unreadable.into_iter().chain(after.unreadable).next() {
        return Err(unreadable.error);
    }
    let common = from.len_bytes.min(to.len_bytes);
    let longest = from.len_bytes.max(to.len_bytes);
    let mut changed = Vec::new();
    let pairs = before.leaves.iter().zip(&after.leaves).enumerate();
    let differing: Vec<(usize, Child, Child)> =
        pairs.filter(|(_, (a, b))| !same(a, b)).map(|(n, (a, b))| (n, *a, *b)).collect();
    for batch in differing.chunks(tree::BATCH_SEGMENTS) {
        let left = batch.iter().map(|(n, a, _)| (*n, *a)).collect();
        let right = batch.iter().map(|(n, _, b)| (*n, *b)).collect();
        let (left, right) = try_join!(
            tree::leaves(repo, from.len_bytes, left, ctx),
            tree::leaves(repo, to.len_bytes, right, ctx),
        )?;
        for ((segment, a), (_, b)) in left.into_iter().zip(right) {
            let (a, b) = (a?, b?);
            let start = tree::segment_range(longest, segment).start;
            let a_len = tree::segment_range(from.len_bytes, segment).end - start;
            let b_len = tree::segment_range(to.len_bytes, segment).end - start;
            compare((a.as_ref(), a_len), (b.as_ref(), b_len), start, &mut changed);
        }
    }
    if longest > common {
        changed.push(common..longest);
    }
    let ranges = join(changed.into_iter().map(|r| r.start..r.end.min(longest)).collect());
    let changed_bytes = ranges.iter().map(|range| range.end - range.start).sum();
    Ok(VolumeDiff { ranges, changed_bytes })
}

fn same(a: &Child, b: &Child) -> bool {
    match (a, b) {
        (Child::Zero, Child::Zero) => true,
        (Child::Block(a), Child::Block(b)) => a.digest == b.digest,
        _ => false,
    }
}

/// Walks the extents of two leaves side by side.
fn compare(
    (a, a_len): (Option<&Leaf>, u64),
    (b, b_len): (Option<&Leaf>, u64),
    start: u64,
    changed: &mut Vec<std::ops::Range<u64>>,
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
