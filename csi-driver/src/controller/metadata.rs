//! The service SnapshotMetadata: what a snapshot holds, and what has changed since another, from manifests alone. Any node
//! can answer, at any time.

use std::ops::Range;
use std::pin::Pin;

use futures::{Stream, stream};
use petra_engine::diff::diff;
use petra_engine::format::node::Child;
use petra_engine::record::VolumeRecord;
use tonic::Status;

use super::volumes::signed;
use super::{Controller, check};
use crate::failure;
use crate::handle::SnapshotHandle;
use crate::proto::csi::{BlockMetadata, BlockMetadataType};
use crate::repositories::{Found, Secrets};

/// Ranges begin and end at multiples of this, or at the volume's end: whoever reads them reads blocks.
const BLOCK_BYTES: u64 = 4096;
/// Ranges in one message of a stream, where the caller does not say.
const MESSAGE_RANGES: usize = 256;
/// The most in one message: some 24 bytes each.
const MAX_MESSAGE_RANGES: usize = 1 << 16;

/// The messages of a stream.
pub(super) type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Ranges of a volume, as both calls answer.
pub(super) struct Ranges {
    pub size_bytes: i64,
    pub r#type: BlockMetadataType,
    ranges: Vec<Range<u64>>,
    per_message: usize,
}

impl Ranges {
    /// The messages that hold them: one at least.
    pub fn messages<T: Send + 'static>(
        self,
        message: impl Fn(Vec<BlockMetadata>) -> T + Send + 'static,
    ) -> Messages<T> {
        let block = |range: &Range<u64>| BlockMetadata {
            byte_offset: signed(range.start),
            size_bytes: signed(range.end - range.start),
        };
        let mut messages: Vec<Vec<BlockMetadata>> = self
            .ranges
            .chunks(self.per_message)
            .map(|some| some.iter().map(block).collect())
            .collect();
        if messages.is_empty() {
            messages.push(vec![]);
        }
        Box::pin(stream::iter(messages.into_iter().map(move |blocks| Ok(message(blocks)))))
    }
}

impl Controller {
    /// What a snapshot holds that is not zeros.
    pub(super) async fn allocated(
        &self,
        id: &str,
        from: i64,
        max_results: i32,
        secrets: &Secrets,
    ) -> Result<Ranges, Status> {
        let found = self.volume_of(id, secrets).await?;
        let (volume, _) = found.volume()?;
        let zeros = VolumeRecord::new(volume.name.clone(), volume.len_bytes, 0, Child::Zero);
        self.ranges(&found, &zeros, volume, from, max_results).await
    }

    /// What differs between two snapshots.
    pub(super) async fn delta(
        &self,
        (base, target): (&str, &str),
        from: i64,
        max_results: i32,
        secrets: &Secrets,
    ) -> Result<Ranges, Status> {
        let base = self.volume_of(base, secrets).await?;
        let target = self.volume_of(target, secrets).await?;
        if base.url != target.url {
            return Err(Status::invalid_argument(
                "the snapshots are in two repositories, whose chunks can't be compared",
            ));
        }
        let ((before, _), (after, _)) = (base.volume()?, target.volume()?);
        self.ranges(&target, before, after, from, max_results).await
    }

    async fn volume_of(&self, id: &str, secrets: &Secrets) -> Result<Found, Status> {
        check("snapshot id", id)?;
        let unknown = |_| Status::not_found(format!("no snapshot {id}"));
        let handle: SnapshotHandle = id.parse().map_err(unknown)?;
        self.repositories.find(&handle, secrets).await
    }

    async fn ranges(
        &self,
        found: &Found,
        before: &VolumeRecord,
        after: &VolumeRecord,
        from: i64,
        max_results: i32,
    ) -> Result<Ranges, Status> {
        let len_bytes = after.len_bytes;
        let from = u64::try_from(from)
            .ok()
            .filter(|from| *from <= len_bytes)
            .ok_or_else(|| Status::out_of_range(format!("the volume has {len_bytes} bytes")))?;
        let per_message = match usize::try_from(max_results) {
            Ok(0) => MESSAGE_RANGES,
            Ok(max) => max.min(MAX_MESSAGE_RANGES),
            Err(_) => return Err(Status::invalid_argument("max_results is negative")),
        };
        let repository = &found.opened.repository;
        let changed =
            diff(repository, before, after, &self.ctx).await.map_err(failure::of_engine)?;
        let changed = changed.ranges.into_iter().map(|range| range.start..range.end);
        Ok(Ranges {
            size_bytes: signed(len_bytes),
            r#type: BlockMetadataType::VariableLength,
            ranges: blocks(changed, len_bytes, from),
            per_message,
        })
    }
}

/// Whole blocks that hold some ranges, which are in order, from an offset on.
fn blocks(ranges: impl Iterator<Item = Range<u64>>, len_bytes: u64, from: u64) -> Vec<Range<u64>> {
    let mut blocks: Vec<Range<u64>> = vec![];
    for range in ranges {
        let start = (range.start / BLOCK_BYTES * BLOCK_BYTES).max(from);
        let end = range.end.next_multiple_of(BLOCK_BYTES).min(len_bytes);
        match blocks.last_mut() {
            _ if start >= end => {}
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => blocks.push(start..end),
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "a list of ranges is what is meant")]
    fn ranges_become_blocks() {
        let ranges = [1..2, 4000..4100, 8192..8193, 20_000..20_001].into_iter();
        assert_eq!(blocks(ranges.clone(), 20_001, 0), [0..12_288, 16_384..20_001]);
        assert_eq!(blocks(ranges.clone(), 20_001, 8193), [8193..12_288, 16_384..20_001]);
        assert_eq!(blocks(ranges.clone(), 20_001, 13_000), [16_384..20_001]);
        assert_eq!(blocks(ranges, 20_001, 20_001), Vec::<Range<u64>>::new());
    }
}
