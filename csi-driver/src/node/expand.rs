//! Making a volume larger while it is used.

use std::path::PathBuf;

use petra_volume::binds;
use petra_volume::pool::MAX_VOLUME_BYTES;
use tonic::{Code, Status};

use super::{Named, Node, blocking};
use crate::failure::of_volume;
use crate::proto::csi::{CapacityRange, NodeExpandVolumeResponse};

/// The sizes that are asked for, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    required: u64,
    limit: Option<u64>,
}

impl Range {
    /// Checks what a call asks for; nothing means the size that the volume has.
    pub(super) fn of(range: Option<CapacityRange>) -> Result<Self, Status> {
        let CapacityRange { required_bytes, limit_bytes } = range.unwrap_or_default();
        match (u64::try_from(required_bytes), u64::try_from(limit_bytes)) {
            (Ok(required), Ok(limit)) if limit == 0 || limit >= required => {
                Ok(Self { required, limit: (limit > 0).then_some(limit) })
            }
            _ => Err(Status::invalid_argument(format!(
                "the capacity range is none: at least {required_bytes}, at most {limit_bytes} bytes"
            ))),
        }
    }

    /// The size to give to a volume of `now` bytes, in whole blocks of its device.
    fn choose(self, now: u64, block_bytes: u64) -> Result<u64, Status> {
        let out_of_range = |text: String| Status::new(Code::OutOfRange, text);
        let wanted = self.required.checked_next_multiple_of(block_bytes.max(1));
        let size = wanted.ok_or_else(|| out_of_range("the size is too large".to_owned()))?.max(now);
        let limit = self.limit.unwrap_or(MAX_VOLUME_BYTES).min(MAX_VOLUME_BYTES);
        if size > limit {
            return Err(out_of_range(format!(
                "the volume has or would have {size} bytes, more than the limit of {limit}"
            )));
        }
        Ok(size)
    }
}

impl Node {
    pub(super) async fn expand(
        self,
        named: Named,
        at: PathBuf,
        range: Range,
    ) -> Result<NodeExpandVolumeResponse, Status> {
        let capacity = blocking(move || expand(&self, &named, at, range)).await?;
        Ok(NodeExpandVolumeResponse { capacity_bytes: i64::try_from(capacity).unwrap_or(i64::MAX) })
    }
}

fn expand(node: &Node, named: &Named, at: PathBuf, range: Range) -> Result<u64, Status> {
    let volume = named.find(&node.0.pool)?;
    let mut locked = volume.lock().map_err(of_volume)?;
    let places = volume.places().map_err(of_volume)?;
    let at = binds::resolve(&at).map_err(of_volume)?.unwrap_or(at);
    // A block volume that is staged and not published is nowhere, but attached.
    let is_only_attached = places.is_empty() && volume.attachment().map_err(of_volume)?.is_some();
    if !is_only_attached && places.iter().all(|place| place.at != at) {
        return Err(Status::not_found(format!("{volume} is not at {}", at.display())));
    }
    let (now, block_bytes) = (locked.state().size_bytes, locked.state().sector_bytes);
    let size = range.choose(now, block_bytes.into())?;
    if size > now && (named.is_read_only() || locked.state().lazy.is_some()) {
        let why =
            if named.is_read_only() { "it can only be read" } else { "its data is not all here" };
        return Err(Status::failed_precondition(format!("{volume} can't grow: {why}")));
    }
    // Also where a controller has made the volume larger already, or a call before was interrupted.
    locked.grow(size).map_err(of_volume)?;
    Ok(locked.state().size_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(required_bytes: i64, limit_bytes: i64) -> Result<Range, Code> {
        Range::of(Some(CapacityRange { required_bytes, limit_bytes })).map_err(|error| error.code())
    }

    #[test]
    fn sizes_are_whole_blocks_in_the_range() {
        for (required, limit, size) in [
            (0, 0, Ok(8192)),
            (1, 0, Ok(8192)),
            (8193, 0, Ok(12288)),
            (8193, 12288, Ok(12288)),
            (8193, 12287, Err(Code::OutOfRange)),
            (0, 4096, Err(Code::OutOfRange)),
        ] {
            let chosen = range(required, limit).unwrap().choose(8192, 4096);
            assert_eq!(chosen.map_err(|error| error.code()), size, "{required} {limit}");
        }
        assert_eq!(Range::of(None).unwrap(), range(0, 0).unwrap());
        for (required, limit) in [(-1, 0), (0, -1), (2, 1)] {
            assert_eq!(range(required, limit), Err(Code::InvalidArgument));
        }
    }
}
