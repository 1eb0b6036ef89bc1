//! Packs: immutable objects of frames, or of manifest blocks, with a footer that lists them.
//!
//! | part | bytes |
//! |---|---|
//! | header | magic `petrapak`, format version (1), kind (1: 1 data, 2 manifest), sealed (1), zero (5) |
//! | body | frames or blocks, back to back |
//! | footer | data: count, then for each frame three varints (stored length, raw length, number of chunks) and a |
//! | | varint for each chunk's length. manifest: count, then for each block its kind and a |
//! | | varint for its length |
//! | trailer | length of the footer (4), BLAKE3 of header and footer (32), magic `petraend` |
//!
//! Where a pack is sealed, each frame, each block and the footer is sealed by itself (see [`crate::crypto`]), so that
//! a range of the pack is still all that a reader needs. Lengths are those of the sealed pieces.
//!
//! Snapshots never need the footer: leaves say where everything is. It lets a pack be verified, compacted or
//! salvaged by itself.

use bytes::Bytes;

use super::block::BlockKind;
use super::codec::{Reader, put_varint};
use super::frame::FrameLocation;
use super::{FormatError, VERSION, frame};
use crate::crypto::{Keys, Piece};
use crate::id::PackId;
use crate::memory;

const MAGIC: &[u8; 8] = b"petrapak";
/// How a pack ends.
pub const END_MAGIC: &[u8; 8] = b"petraend";
/// Bytes before the body.
pub const HEADER_BYTES: usize = 16;
/// Bytes after the footer.
pub const TRAILER_BYTES: usize = 44;
/// A pack is complete when its body reaches this size, or before: large enough for few requests, small enough to hold
/// some in memory and to send in one request.
pub const TARGET_BYTES: usize = 32 << 20;

/// What a pack holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackKind {
    /// Frames.
    Data = 1,
    /// Manifest blocks.
    Manifest = 2,
}

/// The list at the end of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Footer {
    /// Frames and their chunks.
    Data(Vec<FrameEntry>),
    /// Blocks: kind, offset and length with header.
    Manifest(Vec<BlockEntry>),
}

/// A frame in a footer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameEntry {
    /// Where it is.
    pub location: FrameLocation,
    /// The lengths of its chunks, in order. They fill the raw frame. Their names are the hashes of their bytes.
    pub chunk_lens: Vec<u32>,
}

/// A block in a footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockEntry {
    /// What it is.
    pub kind: BlockKind,
    /// First byte within the pack.
    pub offset: u32,
    /// Bytes with its header.
    pub len: u32,
}

/// Assembles one pack in memory.
#[derive(Debug)]
pub struct PackBuilder {
    id: PackId,
    kind: PackKind,
    keys: Keys,
    bytes: Vec<u8>,
    /// Where in `bytes` the pack begins: at a page, so that a disk takes it from here without another copy.
    start: usize,
    count: u64,
    entries: Vec<u8>,
}

impl PackBuilder {
    /// An empty pack of a repository with these keys. What is added must be sealed already; the footer will be.
    pub fn new(id: PackId, kind: PackKind, keys: &Keys) -> Self {
        Self::within(id, kind, keys, memory::buffer(TARGET_BYTES + (2 << 20)))
    }

    /// An empty pack in memory that was used before: what a pack takes is much to ask the system for again and again.
    pub fn within(id: PackId, kind: PackKind, keys: &Keys, mut bytes: Vec<u8>) -> Self {
        let start = memory::first_page(&bytes);
        bytes.clear();
        bytes.resize(start, 0);
        bytes.extend_from_slice(MAGIC);
        let sealed = u8::from(keys.is_some());
        bytes.extend_from_slice(&[VERSION as u8, kind as u8, sealed, 0, 0, 0, 0, 0]);
        Self { id, kind, keys: keys.clone(), bytes, start, count: 0, entries: Vec::new() }
    }

    /// The pack's name.
    pub fn id(&self) -> PackId {
        self.id
    }

    /// Nothing was added yet.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Large enough to be sent.
    pub fn is_full(&self) -> bool {
        self.len() >= TARGET_BYTES
    }

    /// Its bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Adds an encoded frame and says where it is.
    pub fn add_frame(
        &mut self,
        stored: &[u8],
        chunk_lens: impl Iterator<Item = u32>,
    ) -> FrameLocation {
        debug_assert_eq!(self.kind, PackKind::Data);
        let chunk_lens: Vec<u32> = chunk_lens.collect();
        let raw_len = chunk_lens.iter().sum();
        let location = FrameLocation {
            pack: self.id,
            offset: self.len() as u32,
            stored_len: stored.len() as u32,
            raw_len,
        };
        self.bytes.extend_from_slice(stored);
        self.count += 1;
        put_varint(&mut self.entries, stored.len() as u64);
        put_varint(&mut self.entries, u64::from(raw_len));
        put_varint(&mut self.entries, chunk_lens.len() as u64);
        for len in chunk_lens {
            put_varint(&mut self.entries, u64::from(len));
        }
        location
    }

    /// Adds a manifest block and says at which offset.
    pub fn add_block(&mut self, kind: BlockKind, block: &[u8]) -> u32 {
        debug_assert_eq!(self.kind, PackKind::Manifest);
        let offset = self.len() as u32;
        self.bytes.extend_from_slice(block);
        self.count += 1;
        self.entries.push(kind as u8);
        put_varint(&mut self.entries, block.len() as u64);
        offset
    }

    /// Closes the pack: its name and bytes.
    pub fn finish(mut self) -> (PackId, Bytes) {
        let mut footer = Vec::with_capacity(10 + self.entries.len());
        put_varint(&mut footer, self.count);
        footer.extend_from_slice(&self.entries);
        self.keys.seal_footer(self.id, self.kind, &mut footer);
        let header = self.bytes.get(self.start..self.start + HEADER_BYTES);
        let checksum = footer_checksum(header.unwrap_or_default(), &footer);
        self.bytes.extend_from_slice(&footer);
        self.bytes.extend_from_slice(&(footer.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(checksum.as_bytes());
        self.bytes.extend_from_slice(END_MAGIC);
        (self.id, Bytes::from(self.bytes).slice(self.start..))
    }
}

/// The checksum of a footer: over the header of its pack as well.
pub fn footer_checksum(header: &[u8], footer: &[u8]) -> blake3::Hash {
    blake3::Hasher::new().update(header).update(footer).finalize()
}

/// Reads the header of a pack: what it holds, and whether that is sealed.
pub fn read_header(header: &[u8]) -> Result<(PackKind, bool), FormatError> {
    let mut reader = Reader::new(header);
    if reader.array()? != *MAGIC {
        return Err(FormatError::invalid("it does not begin like a pack"));
    }
    match u32::from(reader.u8()?) {
        found if found > VERSION => return Err(FormatError::Version { found }),
        VERSION => {}
        found => return Err(FormatError::invalid(format!("format version {found}"))),
    }
    let (kind, sealed) = (reader.u8()?, reader.u8()?);
    if sealed > 1 || reader.array()? != [0; 5] {
        return Err(FormatError::invalid("its header has unknown fields"));
    }
    let kind = match kind {
        1 => PackKind::Data,
        2 => PackKind::Manifest,
        _ => return Err(FormatError::invalid(format!("a pack of unknown kind {kind}"))),
    };
    Ok((kind, sealed == 1))
}

/// Reads the trailer: how long the footer before it is, and its checksum.
pub fn read_trailer(trailer: &[u8]) -> Result<(usize, blake3::Hash), FormatError> {
    let mut reader = Reader::new(trailer);
    let len = reader.u32()? as usize;
    let checksum: [u8; 32] = reader.array()?;
    if reader.array()? != *END_MAGIC {
        return Err(FormatError::invalid("it does not end like a pack"));
    }
    reader.finish()?;
    Ok((len, checksum.into()))
}

/// Reads the footer of a pack of `pack_len` bytes, from its `header` and its `tail`: footer and trailer.
pub fn read_footer(
    id: PackId,
    keys: &Keys,
    header: &[u8],
    tail: &[u8],
    pack_len: u64,
) -> Result<Footer, FormatError> {
    let (kind, sealed) = read_header(header)?;
    if sealed != keys.is_some() {
        let not = if sealed { "" } else { "not " };
        return Err(FormatError::invalid(format!("it is {not}encrypted, unlike its repository")));
    }
    let trailer_at = tail.len().checked_sub(TRAILER_BYTES).unwrap_or(usize::MAX);
    let (len, checksum) = read_trailer(tail.get(trailer_at..).unwrap_or_default())?;
    let footer = tail.get(..trailer_at).unwrap_or_default();
    let body_end =
        pack_len.checked_sub(tail.len() as u64).filter(|end| *end >= HEADER_BYTES as u64);
    let (Some(body_end), true) = (body_end, footer.len() == len) else {
        return Err(FormatError::invalid(format!(
            "a footer of {len} bytes in a pack of {pack_len}"
        )));
    };
    let actual = footer_checksum(header, footer);
    if actual != checksum {
        return Err(FormatError::Checksum {
            found: checksum.to_string(),
            actual: actual.to_string(),
        });
    }
    let mut opened = Vec::new();
    let reader = Reader::new(keys.open(Piece::Footer(id, kind), footer, &mut opened)?);
    match kind {
        PackKind::Data => read_frames(id, reader, body_end).map(Footer::Data),
        PackKind::Manifest => read_blocks(reader, body_end).map(Footer::Manifest),
    }
}

/// Reads the footer of a whole pack.
pub fn read_whole(id: PackId, keys: &Keys, pack: &[u8]) -> Result<Footer, FormatError> {
    let trailer_at = pack.len().saturating_sub(TRAILER_BYTES);
    let (len, _) = read_trailer(pack.get(trailer_at..).unwrap_or_default())?;
    let footer_at = trailer_at.checked_sub(len).filter(|at| *at >= HEADER_BYTES);
    let (header, tail) = (pack.get(..HEADER_BYTES), footer_at.and_then(|at| pack.get(at..)));
    let (Some(header), Some(tail)) = (header, tail) else {
        return Err(FormatError::invalid(format!("a footer of {len} bytes")));
    };
    read_footer(id, keys, header, tail, pack.len() as u64)
}

fn read_frames(
    id: PackId,
    mut reader: Reader<'_>,
    body_end: u64,
) -> Result<Vec<FrameEntry>, FormatError> {
    let count = reader.count("the number of frames", 3)?;
    let mut frames = Vec::with_capacity(count);
    let mut at = HEADER_BYTES as u64;
    for _ in 0..count {
        let stored_len = reader.bounded("a stored length", body_end - at)?;
        let raw_len = reader.bounded("a raw length", frame::MAX_BYTES as u64)?;
        let chunk_count = reader.count("the number of chunks", 1)?;
        let mut chunk_lens = Vec::with_capacity(chunk_count);
        let mut sum = 0;
        for _ in 0..chunk_count {
            let len = reader.bounded("a chunk's length", raw_len - sum)?;
            sum += len;
            chunk_lens.push(len as u32);
        }
        if sum != raw_len || stored_len > raw_len + frame::MAX_OVERHEAD_BYTES as u64 {
            return Err(FormatError::invalid("a frame's lengths contradict each other"));
        }
        frames.push(FrameEntry {
            location: FrameLocation {
                pack: id,
                offset: at as u32,
                stored_len: stored_len as u32,
                raw_len: raw_len as u32,
            },
            chunk_lens,
        });
        at += stored_len;
    }
    reader.finish()?;
    check_body(at, body_end)?;
    Ok(frames)
}

fn read_blocks(mut reader: Reader<'_>, body_end: u64) -> Result<Vec<BlockEntry>, FormatError> {
    let count = reader.count("the number of blocks", 2)?;
    let mut blocks = Vec::with_capacity(count);
    let mut at = HEADER_BYTES as u64;
    for _ in 0..count {
        let kind = match reader.u8()? {
            1 => BlockKind::Leaf,
            2 => BlockKind::Node,
            3 => BlockKind::Relocation,
            kind => return Err(FormatError::invalid(format!("a block of unknown kind {kind}"))),
        };
        let len = reader.bounded("a block's length", body_end - at)?;
        blocks.push(BlockEntry { kind, offset: at as u32, len: len as u32 });
        at += len;
    }
    reader.finish()?;
    check_body(at, body_end)?;
    Ok(blocks)
}

fn check_body(listed_end: u64, body_end: u64) -> Result<(), FormatError> {
    if listed_end == body_end && body_end <= u64::from(u32::MAX) {
        return Ok(());
    }
    Err(FormatError::invalid(format!(
        "its footer lists {listed_end} bytes, its body has {body_end}"
    )))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::id::SnapshotId;

    fn id() -> PackId {
        PackId { session: SnapshotId::from_parts(1, 2), number: 3 }
    }

    fn pack(frames: &[Vec<Vec<u8>>]) -> (Vec<u8>, Vec<FrameEntry>) {
        let mut builder = PackBuilder::new(id(), PackKind::Data, &Keys::none());
        let mut entries = Vec::new();
        for chunks in frames {
            let raw = chunks.concat();
            let chunk_lens: Vec<u32> = chunks.iter().map(|chunk| chunk.len() as u32).collect();
            let location = builder.add_frame(&raw, chunk_lens.iter().copied());
            entries.push(FrameEntry { location, chunk_lens });
        }
        (builder.finish().1.to_vec(), entries)
    }

    #[test]
    fn begins_at_a_page_also_in_memory_that_was_used() {
        let (_, first) = PackBuilder::new(id(), PackKind::Data, &Keys::none()).finish();
        assert_eq!(first.as_ptr().addr() % 4096, 0);
        let (place, content) = (first.as_ptr(), first.to_vec());
        let mut used = first.try_into_mut().unwrap();
        used.clear();
        let mut second = PackBuilder::within(id(), PackKind::Data, &Keys::none(), used.into());
        assert!(second.bytes.capacity() > TARGET_BYTES + frame::MAX_BYTES);
        second.add_frame(&[1; 5000], [5000].into_iter());
        let (_, second) = second.finish();
        assert_eq!((second.as_ptr(), &second[..HEADER_BYTES]), (place, &content[..HEADER_BYTES]));
    }

    #[test]
    fn lists_manifest_blocks() {
        let mut builder = PackBuilder::new(id(), PackKind::Manifest, &Keys::none());
        let offsets =
            [builder.add_block(BlockKind::Leaf, b"abc"), builder.add_block(BlockKind::Node, b"de")];
        assert_eq!(offsets, [16, 19]);
        let (_, bytes) = builder.finish();
        let Footer::Manifest(blocks) = read_whole(id(), &Keys::none(), &bytes).unwrap() else {
            panic!()
        };
        assert_eq!(blocks[1], BlockEntry { kind: BlockKind::Node, offset: 19, len: 2 });
    }

    proptest! {
        #[test]
        fn round_trips(frames in prop::collection::vec(prop::collection::vec(
            prop::collection::vec(any::<u8>(), 1..50), 1..5), 0..6)) {
            let (bytes, entries) = pack(&frames);
            prop_assert_eq!(read_whole(id(), &Keys::none(), &bytes).unwrap(), Footer::Data(entries));
        }

        #[test]
        fn damage_outside_of_the_body_is_noticed(at: prop::sample::Index, bit in 0..8, cut in 1_usize..40) {
            let (bytes, _) = pack(&[vec![vec![1; 30], vec![2; 9]]]);
            let outside: Vec<usize> = (0..HEADER_BYTES).chain(HEADER_BYTES + 39..bytes.len()).collect();
            let mut flipped = bytes.clone();
            flipped[outside[at.index(outside.len())]] ^= 1_u8 << bit;
            prop_assert!(read_whole(id(), &Keys::none(), &flipped).is_err());
            prop_assert!(read_whole(id(), &Keys::none(), &bytes[..bytes.len() - cut]).is_err());
        }
    }
}
