//! The service SnapshotMetadata: what a snapshot holds, and what has changed since another, from manifests alone. Any node
//! can answer, at any time.

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::Pin;

use futures::{Stream, stream};
use petra_engine::diff::Differences;
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

/// Ranges of a volume, as both calls answer. They are found while they are sent.
pub(super) struct Ranges {
    pub size_bytes: i64,
    pub r#type: BlockMetadataType,
    differences: Differences,
    blocks: Blocks,
    /// Found, and not sent yet: those of one part of the manifests, and fewer than a message holds.
    ready: VecDeque<Range<u64>>,
    is_at_end: bool,
    per_message: usize,
}

impl Ranges {
    /// The messages that hold them: one at least.
    pub fn messages<T: Send + 'static>(
        self,
        message: impl Fn(Vec<BlockMetadata>) -> T + Send + 'static,
    ) -> Messages<T> {
        let state = (self, message, true);
        Box::pin(stream::try_unfold(state, |(mut ranges, message, is_first)| async move {
            let some = ranges.next().await?;
            if some.is_empty() && !is_first {
                return Ok(None);
            }
            let said = message(some);
            Ok(Some((said, (ranges, message, false))))
        }))
    }

    /// What the next message holds; nothing after the last.
    async fn next(&mut self) -> Result<Vec<BlockMetadata>, Status> {
        while self.ready.len() < self.per_message && !self.is_at_end {
            match self.differences.next().await.map_err(failure::of_engine)? {
                Some(ranges) => {
                    for range in ranges {
                        self.ready.extend(self.blocks.take(range.start..range.end));
                    }
                }
                None => {
                    self.is_at_end = true;
                    self.ready.extend(self.blocks.last.take());
                }
            }
        }
        let count = self.ready.len().min(self.per_message);
        let block = |range: Range<u64>| BlockMetadata {
            byte_offset: signed(range.start),
            size_bytes: signed(range.end - range.start),
        };
        Ok(self.ready.drain(..count).map(block).collect())
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
        let zeros = VolumeRecord::new(volume.name.clone(), volume.len_bytes, Child::Zero);
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
        let differences = Differences::begin(repository, before, after, from, &self.ctx).await;
        Ok(Ranges {
            size_bytes: signed(len_bytes),
            r#type: BlockMetadataType::VariableLength,
            differences: differences.map_err(failure::of_engine)?,
            blocks: Blocks { len_bytes, from, last: None },
            ready: VecDeque::new(),
            is_at_end: false,
            per_message,
        })
    }
}

/// Makes whole blocks of ranges that come in order, from an offset on.
struct Blocks {
    len_bytes: u64,
    from: u64,
    /// The next range may go on where this one ends.
    last: Option<Range<u64>>,
}

impl Blocks {
    /// Takes a range, and gives what is complete by that.
    fn take(&mut self, range: Range<u64>) -> Option<Range<u64>> {
        let start = (range.start / BLOCK_BYTES * BLOCK_BYTES).max(self.from);
        let end = range.end.next_multiple_of(BLOCK_BYTES).min(self.len_bytes);
        match &mut self.last {
            _ if start >= end => None,
            Some(last) if start <= last.end => {
                last.end = last.end.max(end);
                None
            }
            last => last.replace(start..end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "a list of ranges is what is meant")]
    fn ranges_become_blocks() {
        let blocks = |from: u64| {
            let mut blocks = Blocks { len_bytes: 20_001, from, last: None };
            let ranges = [1..2, 4000..4100, 8192..8193, 20_000..20_001].into_iter();
            let mut all: Vec<_> = ranges.filter_map(|range| blocks.take(range)).collect();
            all.extend(blocks.last);
            all
        };
        assert_eq!(blocks(0), [0..12_288, 16_384..20_001]);
        assert_eq!(blocks(8193), [8193..12_288, 16_384..20_001]);
        assert_eq!(blocks(13_000), [16_384..20_001]);
        assert_eq!(blocks(20_001), Vec::<Range<u64>>::new());
    }
}
