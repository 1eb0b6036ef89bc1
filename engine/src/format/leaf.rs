//! Leaves: the chunks of one segment, in address order, and where they are stored.
//!
//! | field | encoding |
//! |---|---|
//! | packs | count, then 20 bytes each: session, number |
//! | frames | count, then four varints each: pack, offset, stored length, raw length |
//! | extents | count, then a varint each: `length << 2 \| kind` |
//! | | kind 0: zeros; kind 1: the chunk that follows the previous one in its frame; |
//! | | kind 2: a chunk elsewhere, then two varints: frame, offset in the raw frame |
//! | ids | 32 bytes for each chunk |

use super::block::{self, BlockKind, PackTable};
use super::codec::{Reader, put_varint};
use super::frame::{self, FrameLocation};
use super::{FormatError, SEGMENT_BYTES};
use crate::id::{ChunkId, Digest};

/// Bytes of content that are hashed together.
const DIGESTED_AT_ONCE: usize = 32 << 10;

/// One segment of a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// The frames that hold its chunks.
    pub frames: Vec<FrameLocation>,
    /// What the segment is made of, without gaps.
    pub extents: Vec<Extent>,
}

/// A piece of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Zeros or a hole: nothing is stored.
    Zero {
        /// Bytes.
        len: u32,
    },
    /// A chunk.
    Chunk(ChunkRef),
}

/// A chunk and where it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRef {
    /// Its name.
    pub id: ChunkId,
    /// Bytes.
    pub len: u32,
    /// Position of its frame in [`Leaf::frames`].
    pub frame: u32,
    /// First byte within the raw frame.
    pub offset: u32,
}

impl Extent {
    /// Bytes of the address space.
    pub fn len_bytes(&self) -> u32 {
        match self {
            Self::Zero { len } => *len,
            Self::Chunk(chunk) => chunk.len,
        }
    }

    /// Equal content: where it is stored does not matter.
    pub fn same_content(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Zero { len: a }, Self::Zero { len: b }) => a == b,
            (Self::Chunk(a), Self::Chunk(b)) => a.len == b.len && a.id == b.id,
            _ => false,
        }
    }
}

impl Leaf {
    /// The content digest: over ids, lengths and zeros.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        // As much as the hash takes side by side, and still in the processor's cache then.
        let mut content = Vec::with_capacity(DIGESTED_AT_ONCE + 64);
        content.extend_from_slice(b"petra leaf 1\n");
        for extent in &self.extents {
            content.push(u8::from(matches!(extent, Extent::Chunk(_))));
            content.extend_from_slice(&extent.len_bytes().to_le_bytes());
            if let Extent::Chunk(chunk) = extent {
                content.extend_from_slice(&chunk.id.0);
            }
            // Exact pieces: the hash takes apart whatever is not a power of two.
            if let Some(piece) = content.get(..DIGESTED_AT_ONCE) {
                hasher.update(piece);
                content.drain(..DIGESTED_AT_ONCE);
            }
        }
        Digest(*hasher.update(&content).finalize().as_bytes())
    }

    /// Bytes that are not zeros.
    pub fn data_bytes(&self) -> u64 {
        self.chunks().map(|(_, chunk)| u64::from(chunk.len)).sum()
    }

    /// Its chunks with their offsets in the segment.
    pub fn chunks(&self) -> impl Iterator<Item = (u64, &ChunkRef)> {
        let mut at = 0;
        self.extents.iter().filter_map(move |extent| {
            let start = at;
            at += u64::from(extent.len_bytes());
            match extent {
                Extent::Chunk(chunk) => Some((start, chunk)),
                Extent::Zero { .. } => None,
            }
        })
    }

    /// The block to store.
    pub fn encode(&self) -> Vec<u8> {
        let mut packs = PackTable::default();
        let mut frames = Vec::with_capacity(self.frames.len() * 12);
        put_varint(&mut frames, self.frames.len() as u64);
        for frame in &self.frames {
            put_varint(&mut frames, packs.intern(frame.pack));
            for number in [frame.offset, frame.stored_len, frame.raw_len] {
                put_varint(&mut frames, u64::from(number));
            }
        }
        let mut payload = Vec::with_capacity(64 + frames.len() + self.extents.len() * 38);
        packs.write(&mut payload);
        payload.extend_from_slice(&frames);
        put_varint(&mut payload, self.extents.len() as u64);
        let mut next = None;
        for extent in &self.extents {
            let len = u64::from(extent.len_bytes()) << 2;
            match extent {
                Extent::Zero { .. } => put_varint(&mut payload, len),
                Extent::Chunk(chunk) => {
                    if next == Some((chunk.frame, chunk.offset)) {
                        put_varint(&mut payload, len | 1);
                    } else {
                        put_varint(&mut payload, len | 2);
                        put_varint(&mut payload, u64::from(chunk.frame));
                        put_varint(&mut payload, u64::from(chunk.offset));
                    }
                    next = Some((chunk.frame, chunk.offset + chunk.len));
                }
            }
        }
        for (_, chunk) in self.chunks() {
            payload.extend_from_slice(&chunk.id.0);
        }
        block::seal(BlockKind::Leaf, &payload)
    }

    /// Reads a block, and checks that it covers exactly `segment_bytes` and agrees with the digest of its parent.
    pub fn decode(block: &[u8], segment_bytes: u64, digest: Digest) -> Result<Self, FormatError> {
        let leaf = Self::parse(block)?;
        let covered: u64 = leaf.extents.iter().map(|extent| u64::from(extent.len_bytes())).sum();
        if covered != segment_bytes {
            return Err(FormatError::invalid(format!(
                "a leaf of {segment_bytes} bytes expected, {covered} covered"
            )));
        }
        let actual = leaf.digest();
        if actual != digest {
            return Err(FormatError::Checksum {
                found: digest.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(leaf)
    }

    /// Reads a block that no parent vouches for.
    pub fn parse(block: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(block::unseal(BlockKind::Leaf, block)?);
        let packs = PackTable::read(&mut reader)?;
        let frames = read_frames(&packs, &mut reader)?;
        let count = reader.count("the number of extents", 1)?;
        let mut extents = Vec::with_capacity(count);
        let mut next = None;
        let mut previous_is_zero = false;
        for _ in 0..count {
            let tag = reader.bounded("an extent", (SEGMENT_BYTES << 2) | 3)?;
            let (len, kind) = ((tag >> 2) as u32, tag & 3);
            if len == 0 || (kind == 0 && previous_is_zero) {
                return Err(FormatError::invalid(
                    "an extent is empty or not joined with the one before",
                ));
            }
            previous_is_zero = kind == 0;
            extents.push(match kind {
                0 => Extent::Zero { len },
                1 | 2 => {
                    let (frame, offset) = match (kind, next) {
                        (1, Some(next)) => next,
                        (1, None) => {
                            return Err(FormatError::invalid("the first chunk follows none"));
                        }
                        _ => (reader.varint32("a frame")?, reader.varint32("an offset")?),
                    };
                    let chunk = ChunkRef { id: ChunkId([0; 32]), len, frame, offset };
                    next = Some((frame, check_within(&frames, &chunk)?));
                    Extent::Chunk(chunk)
                }
                _ => return Err(FormatError::invalid("an extent of unknown kind")),
            });
        }
        for extent in &mut extents {
            if let Extent::Chunk(chunk) = extent {
                chunk.id = ChunkId(reader.array()?);
            }
        }
        reader.finish()?;
        Ok(Self { frames, extents })
    }
}

/// Reads a list of frames.
pub(super) fn read_frames(
    packs: &PackTable,
    reader: &mut Reader<'_>,
) -> Result<Vec<FrameLocation>, FormatError> {
    let count = reader.count("the number of frames", 4)?;
    let mut frames = Vec::with_capacity(count);
    for _ in 0..count {
        let pack = packs.get(reader.varint()?)?;
        let frame = FrameLocation {
            pack,
            offset: reader.varint32("an offset")?,
            stored_len: reader.varint32("a stored length")?,
            raw_len: reader.bounded("a raw length", frame::MAX_BYTES as u64)? as u32,
        };
        if frame.is_impossible() {
            return Err(FormatError::invalid(format!("impossible frame {frame:?}")));
        }
        frames.push(frame);
    }
    Ok(frames)
}

/// The end of a chunk in its frame, if it is within.
fn check_within(frames: &[FrameLocation], chunk: &ChunkRef) -> Result<u32, FormatError> {
    let frame = usize::try_from(chunk.frame).ok().and_then(|at| frames.get(at));
    let end = chunk.offset.checked_add(chunk.len);
    match (frame, end) {
        (Some(frame), Some(end)) if end <= frame.raw_len => Ok(end),
        _ => Err(FormatError::invalid("a chunk lies outside of its frame")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::id::{PackId, SnapshotId};

    pub(crate) fn any_leaf() -> impl Strategy<Value = Leaf> {
        let frame = (0_u32..3, any::<u16>(), 1_u32..=512, 0_u32..=512).prop_map(
            |(pack, offset, raw, less)| FrameLocation {
                pack: PackId { session: SnapshotId::from_parts(1, u128::from(pack)), number: pack },
                offset: u32::from(offset),
                stored_len: (raw + 1).saturating_sub(less).max(1),
                raw_len: raw,
            },
        );
        let extents =
            prop::collection::vec((any::<bool>(), any::<u32>(), any::<[u8; 32]>()), 0..60);
        (prop::collection::vec(frame, 1..8), extents).prop_map(|(frames, choices)| {
            let mut extents: Vec<Extent> = Vec::new();
            for (zero, number, id) in choices {
                let frame = number % frames.len() as u32;
                let raw = frames[frame as usize].raw_len;
                let offset = number / 16 % raw;
                let chunk = ChunkRef { id: ChunkId(id), len: raw - offset, frame, offset };
                extents.push(match extents.last() {
                    Some(Extent::Zero { .. }) => Extent::Chunk(chunk),
                    _ if zero => Extent::Zero { len: number % 9_000 + 1 },
                    _ => Extent::Chunk(chunk),
                });
            }
            Leaf { frames, extents }
        })
    }

    proptest! {
        #[test]
        fn round_trips(leaf in any_leaf()) {
            let block = leaf.encode();
            let len = leaf.extents.iter().map(|extent| u64::from(extent.len_bytes())).sum();
            prop_assert_eq!(&Leaf::decode(&block, len, leaf.digest()).unwrap(), &leaf);
            prop_assert!(Leaf::decode(&block, len + 1, leaf.digest()).is_err());
        }

        #[test]
        fn a_damaged_payload_never_panics(leaf in any_leaf(), at: prop::sample::Index, byte: u8) {
            let block = leaf.encode();
            let mut payload = block[block::HEADER_BYTES..].to_vec();
            let at = at.index(payload.len());
            payload[at] = byte;
            // Sealed again, so that the parser sees the damage rather than the checksum.
            let _ = Leaf::parse(&block::seal(BlockKind::Leaf, &payload));
        }

        #[test]
        fn any_flipped_bit_is_noticed(leaf in any_leaf(), at: prop::sample::Index, bit in 0..8) {
            let mut block = leaf.encode();
            let at = at.index(block.len());
            block[at] ^= 1_u8 << bit;
            prop_assert!(Leaf::parse(&block).is_err());
        }
    }
}
