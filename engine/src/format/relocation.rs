//! Relocations: where a compaction copied what was needed of a pack.
//!
//! | field | encoding |
//! |---|---|
//! | source | 20 bytes: session, number |
//! | packs | count, then 20 bytes each |
//! | frames | count, then four varints each, as in a leaf: the new frames |
//! | runs | count, then five varints each: offset of the old frame, first byte in it, length, new frame, first byte in that |
//! | blocks | count, then five varints each: old offset, old length, pack, new offset, new length |
//!
//! Leaves and nodes never change, so they go on to name the old pack. Whoever finds it gone looks the new place up
//! here. Data packs have runs, manifest packs have blocks.

use super::block::{self, BlockKind, PackTable};
use super::codec::{Reader, put_varint};
use super::frame::FrameLocation;
use super::{FormatError, leaf};
use crate::id::{Digest, PackId, SnapshotId};

/// Where the pieces of one pack were copied to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relocation {
    /// The pack that they were in.
    pub source: PackId,
    /// The frames that they are in now.
    pub frames: Vec<FrameLocation>,
    /// Chunks, by old frame and first byte.
    pub runs: Vec<Run>,
    /// Manifest blocks, by old offset.
    pub blocks: Vec<MovedBlock>,
}

/// Chunks that were neighbours in an old frame and are neighbours in a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Offset of the old frame in the old pack.
    pub old_frame: u32,
    /// First byte within the old raw frame.
    pub old_start: u32,
    /// Raw bytes.
    pub len: u32,
    /// Position in [`Relocation::frames`].
    pub frame: u32,
    /// First byte within the new raw frame.
    pub start: u32,
}

/// A manifest block. It says the same in both places; its bytes differ where a repair put another block of the same
/// content in the place of a damaged one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MovedBlock {
    /// Offset in the old pack.
    pub old_offset: u32,
    /// Bytes there, with the header.
    pub old_len: u32,
    /// The pack that has it now.
    pub pack: PackId,
    /// Offset there.
    pub offset: u32,
    /// Bytes there.
    pub len: u32,
}

impl Relocation {
    /// One of which nothing was copied yet.
    pub fn new(source: PackId) -> Self {
        Self { source, frames: Vec::new(), runs: Vec::new(), blocks: Vec::new() }
    }

    /// Where `len` raw bytes from `start` of the old frame at `old_frame` are now: the frame, and the first byte in it.
    pub fn chunk(&self, old_frame: u32, start: u32, len: u32) -> Option<(FrameLocation, u32)> {
        let after =
            self.runs.partition_point(|run| (run.old_frame, run.old_start) <= (old_frame, start));
        let run = self.runs.get(after.checked_sub(1)?)?;
        let within = start.checked_sub(run.old_start)?;
        let fits = run.old_frame == old_frame && within.checked_add(len)? <= run.len;
        let frame = self.frames.get(usize::try_from(run.frame).ok()?).filter(|_| fits)?;
        Some((*frame, run.start.checked_add(within)?))
    }

    /// Where the block at `old_offset` is now.
    pub fn block(&self, old_offset: u32, old_len: u32) -> Option<MovedBlock> {
        let at = self.blocks.binary_search_by_key(&old_offset, |block| block.old_offset).ok()?;
        self.blocks.get(at).filter(|block| block.old_len == old_len).copied()
    }

    /// The digest by which a decision refers to the block: the hash of its payload.
    pub fn digest(&self) -> Digest {
        Digest(*blake3::hash(&self.payload()).as_bytes())
    }

    /// The block to store.
    pub fn encode(&self) -> Vec<u8> {
        block::seal(BlockKind::Relocation, &self.payload())
    }

    fn payload(&self) -> Vec<u8> {
        let mut packs = PackTable::default();
        let mut fields = Vec::new();
        put_varint(&mut fields, self.frames.len() as u64);
        for frame in &self.frames {
            put_varint(&mut fields, packs.intern(frame.pack));
            for number in [frame.offset, frame.stored_len, frame.raw_len] {
                put_varint(&mut fields, u64::from(number));
            }
        }
        put_varint(&mut fields, self.runs.len() as u64);
        for run in &self.runs {
            for number in [run.old_frame, run.old_start, run.len, run.frame, run.start] {
                put_varint(&mut fields, u64::from(number));
            }
        }
        put_varint(&mut fields, self.blocks.len() as u64);
        for block in &self.blocks {
            put_varint(&mut fields, u64::from(block.old_offset));
            put_varint(&mut fields, u64::from(block.old_len));
            put_varint(&mut fields, packs.intern(block.pack));
            put_varint(&mut fields, u64::from(block.offset));
            put_varint(&mut fields, u64::from(block.len));
        }
        let mut payload = Vec::with_capacity(64 + fields.len());
        payload.extend_from_slice(&self.source.session.to_bytes());
        payload.extend_from_slice(&self.source.number.to_le_bytes());
        packs.write(&mut payload);
        payload.extend_from_slice(&fields);
        payload
    }

    /// Reads a block, and checks that it is about `source` and agrees with the digest of the decision.
    pub fn decode(block: &[u8], source: PackId, digest: Digest) -> Result<Self, FormatError> {
        let relocation = Self::parse(block)?;
        if relocation.source != source {
            return Err(FormatError::invalid(format!(
                "a relocation of {source} expected, one of {} found",
                relocation.source
            )));
        }
        let actual = relocation.digest();
        if actual != digest {
            return Err(FormatError::Checksum {
                found: digest.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(relocation)
    }

    /// Reads a block that no decision vouches for.
    pub fn parse(block: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(block::unseal(BlockKind::Relocation, block)?);
        let session = SnapshotId::from_bytes(reader.array()?);
        let source = PackId { session, number: reader.u32()? };
        let packs = PackTable::read(&mut reader)?;
        let frames = leaf::read_frames(&packs, &mut reader)?;
        let count = reader.count("the number of runs", 5)?;
        let mut runs: Vec<Run> = Vec::with_capacity(count);
        for _ in 0..count {
            let run = Run {
                old_frame: reader.varint32("an old frame")?,
                old_start: reader.varint32("an old start")?,
                len: reader.varint32("a length")?,
                frame: reader.varint32("a frame")?,
                start: reader.varint32("a start")?,
            };
            let frame = usize::try_from(run.frame).ok().and_then(|at| frames.get(at));
            let end = run.start.checked_add(run.len);
            let within = frame.zip(end).is_some_and(|(frame, end)| end <= frame.raw_len);
            // In order and apart, so that a search finds the only one that fits.
            let after_last = runs.last().is_none_or(|last| {
                let last_end = last.old_start.saturating_add(last.len);
                (last.old_frame, last_end) <= (run.old_frame, run.old_start)
            });
            if run.len == 0 || !within || !after_last {
                return Err(FormatError::invalid(format!("impossible {run:?}")));
            }
            runs.push(run);
        }
        let count = reader.count("the number of blocks", 5)?;
        let mut blocks: Vec<MovedBlock> = Vec::with_capacity(count);
        for _ in 0..count {
            let moved = MovedBlock {
                old_offset: reader.varint32("an old offset")?,
                old_len: reader.varint32("an old length")?,
                pack: packs.get(reader.varint()?)?,
                offset: reader.varint32("an offset")?,
                len: reader.varint32("a length")?,
            };
            let after_last = blocks.last().is_none_or(|last| last.old_offset < moved.old_offset);
            if !after_last || moved.offset.checked_add(moved.len).is_none() {
                return Err(FormatError::invalid(format!("impossible {moved:?}")));
            }
            blocks.push(moved);
        }
        reader.finish()?;
        Ok(Self { source, frames, runs, blocks })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pack(number: u32) -> PackId {
        PackId { session: SnapshotId::from_parts(7, 7), number }
    }

    /// A relocation that moves every second one of `lens` chunks, four old chunks to a frame, to frames of three.
    fn example(lens: &[u32]) -> (Relocation, Vec<(u32, u32, u32, bool)>) {
        let mut relocation =
            Relocation { source: pack(0), frames: vec![], runs: vec![], blocks: vec![] };
        let (mut old, mut start, mut chunks) = (100, 0, vec![]);
        for (n, len) in lens.iter().enumerate() {
            if n % 4 == 0 {
                (old, start) = (old + 1000, 0);
            }
            let moved = n % 2 == 0;
            if moved {
                if n % 6 == 0 {
                    let offset = 16 + relocation.frames.len() as u32;
                    let frame = FrameLocation { pack: pack(1), offset, stored_len: 1, raw_len: 0 };
                    relocation.frames.push(frame);
                }
                let frame = relocation.frames.len() as u32 - 1;
                let to = &mut relocation.frames[frame as usize].raw_len;
                relocation.runs.push(Run {
                    old_frame: old,
                    old_start: start,
                    len: *len,
                    frame,
                    start: *to,
                });
                *to += len;
            }
            chunks.push((old, start, *len, moved));
            start += len;
        }
        (relocation, chunks)
    }

    proptest! {
        #[test]
        fn finds_what_moved_and_nothing_else(lens in prop::collection::vec(1_u32..1000, 0..40)) {
            let (relocation, chunks) = example(&lens);
            let block = relocation.encode();
            prop_assert_eq!(&Relocation::decode(&block, pack(0), relocation.digest()).unwrap(), &relocation);
            for (frame, start, len, moved) in chunks {
                prop_assert_eq!(relocation.chunk(frame, start, len).is_some(), moved);
                prop_assert_eq!(relocation.chunk(frame, start, len + 1), None);
                prop_assert_eq!(relocation.chunk(frame + 1, start, len), None);
            }
            prop_assert!(Relocation::decode(&block, pack(1), relocation.digest()).is_err());
        }

        #[test]
        fn finds_blocks_by_offset(offsets in prop::collection::btree_set(0_u32..1 << 30, 0..30)) {
            let blocks: Vec<MovedBlock> = offsets.iter().zip(0..)
                .map(|(at, n)| MovedBlock { old_offset: *at, old_len: 50 + n, pack: pack(2 + n % 3), offset: n, len: 60 + n })
                .collect();
            let relocation = Relocation { source: pack(0), frames: vec![], runs: vec![], blocks };
            let read = Relocation::parse(&relocation.encode()).unwrap();
            for block in &relocation.blocks {
                prop_assert_eq!(read.block(block.old_offset, block.old_len), Some(*block));
                prop_assert_eq!(read.block(block.old_offset, block.old_len + 1), None);
            }
        }
    }
}
