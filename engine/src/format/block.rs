//! Manifest blocks: the envelope of leaves and nodes, and references to them.
//!
//! | bytes | field |
//! |---|---|
//! | 4 | magic `PtBk` |
//! | 1 | format version |
//! | 1 | kind: 1 leaf, 2 node, 3 relocation |
//! | 2 | zero |
//! | 4 | length of the payload |
//! | 32 | BLAKE3 of the payload |
//! | ... | payload |

use super::codec::{Reader, put_varint};
use super::{FormatError, VERSION};
use crate::id::{Digest, PackId, SnapshotId};

const MAGIC: &[u8; 4] = b"PtBk";
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 44;
/// The largest block: a leaf of the smallest chunks stays below.
pub const MAX_BYTES: usize = 4 << 20;

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockKind {
    /// The chunks of one segment.
    Leaf = 1,
    /// References to leaves or nodes.
    Node = 2,
    /// Where a compaction copied the pieces of a pack.
    Relocation = 3,
}

/// Where a block is, and what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRef {
    /// The content digest of all below.
    pub digest: Digest,
    /// The pack that holds the block.
    pub pack: PackId,
    /// First byte within the pack.
    pub offset: u32,
    /// Bytes with the header.
    pub len: u32,
}

/// Wraps a payload.
pub fn seal(kind: BlockKind, payload: &[u8]) -> Vec<u8> {
    let mut block = Vec::with_capacity(HEADER_BYTES + payload.len());
    block.extend_from_slice(MAGIC);
    block.extend_from_slice(&[VERSION as u8, kind as u8, 0, 0]);
    block.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    block.extend_from_slice(blake3::hash(payload).as_bytes());
    block.extend_from_slice(payload);
    block
}

/// Checks a block and gives its payload.
pub fn unseal(kind: BlockKind, block: &[u8]) -> Result<&[u8], FormatError> {
    let mut reader = Reader::new(block);
    if reader.array()? != *MAGIC {
        return Err(FormatError::invalid("no manifest block begins here"));
    }
    match u32::from(reader.u8()?) {
        found if found > VERSION => return Err(FormatError::Version { found }),
        VERSION => {}
        found => return Err(FormatError::invalid(format!("format version {found}"))),
    }
    let found_kind = reader.u8()?;
    if found_kind != kind as u8 || reader.array()? != [0, 0] {
        return Err(FormatError::invalid(format!("a {kind:?} expected, kind {found_kind} found")));
    }
    let len = reader.u32()? as usize;
    if len > MAX_BYTES {
        return Err(FormatError::invalid(format!("a block of {len} bytes")));
    }
    let checksum: [u8; 32] = reader.array()?;
    let payload = reader.bytes(len)?;
    reader.finish()?;
    let actual = blake3::hash(payload);
    if actual != checksum {
        return Err(FormatError::Checksum {
            found: blake3::Hash::from_bytes(checksum).to_string(),
            actual: actual.to_string(),
        });
    }
    Ok(payload)
}

/// The packs that a block refers to, each written once.
#[derive(Debug, Default)]
pub struct PackTable {
    packs: Vec<PackId>,
}

impl PackTable {
    /// The position of a pack, added at the end if it is new.
    pub fn intern(&mut self, pack: PackId) -> u64 {
        // Blocks refer to few packs, mostly to the last one again.
        let position = self.packs.iter().rposition(|known| *known == pack).unwrap_or_else(|| {
            self.packs.push(pack);
            self.packs.len() - 1
        });
        position as u64
    }

    /// Appends the table.
    pub fn write(&self, out: &mut Vec<u8>) {
        put_varint(out, self.packs.len() as u64);
        for pack in &self.packs {
            out.extend_from_slice(&pack.session.to_bytes());
            out.extend_from_slice(&pack.number.to_le_bytes());
        }
    }

    /// Reads a table.
    pub fn read(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let count = reader.count("the number of packs", 20)?;
        let mut packs = Vec::with_capacity(count);
        for _ in 0..count {
            let session = SnapshotId::from_bytes(reader.array()?);
            packs.push(PackId { session, number: reader.u32()? });
        }
        Ok(Self { packs })
    }

    /// The pack at a position that was read.
    pub fn get(&self, position: u64) -> Result<PackId, FormatError> {
        let pack = usize::try_from(position).ok().and_then(|at| self.packs.get(at));
        pack.copied().ok_or_else(|| {
            FormatError::invalid(format!("pack {position} of a table of {}", self.packs.len()))
        })
    }
}
