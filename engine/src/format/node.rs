//! Nodes: up to 1,024 references to leaves (level 1) or to nodes of the level below.
//!
//! | field | encoding |
//! |---|---|
//! | level | 1 byte |
//! | packs | as in a leaf |
//! | children | count, then for each run of zero children `length << 1`, for each other one `1` and four |
//! | | varints: pack, offset, length, bytes of the volume that are not zeros |
//! | digests | 32 bytes for each child that is not zero |

use super::block::{self, BlockKind, BlockRef, PackTable};
use super::codec::{Reader, put_varint};
use super::{FormatError, SEGMENT_BYTES};
use crate::id::Digest;

/// Children of a node. The last node of a level may have fewer.
pub const FAN_OUT: usize = 1024;

/// The greatest level that a volume of the largest size needs.
pub const MAX_LEVEL: u8 = 3;

/// A part of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Child {
    /// All zeros: nothing is stored.
    Zero,
    /// A leaf or node.
    Block {
        /// Where it is.
        block: BlockRef,
        /// Bytes of the volume below it that are not zeros. They let a new snapshot count what it does not read.
        data_bytes: u64,
    },
}

impl Child {
    /// Bytes of the volume that are not zeros.
    pub fn data_bytes(&self) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Block { data_bytes, .. } => *data_bytes,
        }
    }

    /// True for parts of volumes that are known to hold the same bytes.
    pub fn has_content_of(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Zero, Self::Zero) => true,
            (Self::Block { block: a, .. }, Self::Block { block: b, .. }) => a.digest == b.digest,
            _ => false,
        }
    }
}

/// A node of a manifest tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// 1 when its children are leaves.
    pub level: u8,
    /// In address order.
    pub children: Vec<Child>,
}

/// The level of the root of a volume with this many segments: at least 1.
pub fn root_level(segments: u64) -> u8 {
    let mut level = 1;
    let mut covered = FAN_OUT as u64;
    while covered < segments {
        level += 1;
        covered = covered.saturating_mul(FAN_OUT as u64);
    }
    level
}

/// Bytes of the address space that one child of a node of this level covers.
pub fn child_bytes(level: u8) -> u64 {
    (1..level).fold(SEGMENT_BYTES, |bytes, _| bytes.saturating_mul(FAN_OUT as u64))
}

impl Node {
    /// The content digest: over level and the children's digests.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"petra node 1\n");
        hasher.update(&[self.level]);
        for child in &self.children {
            match child {
                Child::Zero => hasher.update(&[0]),
                Child::Block { block, .. } => hasher.update(&[1]).update(&block.digest.0),
            };
        }
        Digest(*hasher.finalize().as_bytes())
    }

    /// The block to store.
    pub fn encode(&self) -> Vec<u8> {
        let mut packs = PackTable::default();
        let mut entries = Vec::new();
        let mut digests = Vec::new();
        let mut zeros = 0;
        let end_zeros = |zeros: &mut u64, entries: &mut Vec<u8>| {
            if *zeros > 0 {
                put_varint(entries, *zeros << 1);
                *zeros = 0;
            }
        };
        for child in &self.children {
            match child {
                Child::Zero => zeros += 1,
                Child::Block { block, data_bytes } => {
                    end_zeros(&mut zeros, &mut entries);
                    put_varint(&mut entries, 1);
                    put_varint(&mut entries, packs.intern(block.pack));
                    put_varint(&mut entries, u64::from(block.offset));
                    put_varint(&mut entries, u64::from(block.len));
                    put_varint(&mut entries, *data_bytes);
                    digests.extend_from_slice(&block.digest.0);
                }
            }
        }
        end_zeros(&mut zeros, &mut entries);
        let mut payload = vec![self.level];
        packs.write(&mut payload);
        put_varint(&mut payload, self.children.len() as u64);
        payload.extend_from_slice(&entries);
        payload.extend_from_slice(&digests);
        block::seal(BlockKind::Node, &payload)
    }

    /// Reads a block, and checks that it is of this level, has this many children, and agrees with the digest of
    /// its parent.
    pub fn decode(
        block: &[u8],
        level: u8,
        children: usize,
        digest: Digest,
    ) -> Result<Self, FormatError> {
        let node = Self::parse(block)?;
        if node.level != level || node.children.len() != children {
            return Err(FormatError::invalid(format!(
                "a node of level {level} with {children} children expected, one of level {} with {} found",
                node.level,
                node.children.len()
            )));
        }
        let actual = node.digest();
        if actual != digest {
            return Err(FormatError::Checksum {
                found: digest.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(node)
    }

    /// Reads a block that no parent vouches for.
    pub fn parse(block: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(block::unseal(BlockKind::Node, block)?);
        let level = reader.u8()?;
        if !(1..=MAX_LEVEL).contains(&level) {
            return Err(FormatError::invalid(format!("a node of level {level}")));
        }
        let packs = PackTable::read(&mut reader)?;
        let count = reader.bounded("the number of children", FAN_OUT as u64)? as usize;
        let mut children = Vec::with_capacity(count);
        while children.len() < count {
            let tag = reader.bounded("a child", (FAN_OUT as u64) << 1)?;
            let zeros = (tag >> 1) as usize;
            if tag == 1 {
                let pack = packs.get(reader.varint()?)?;
                let (offset, len) = (reader.varint32("an offset")?, reader.varint32("a length")?);
                if len as usize > block::MAX_STORED_BYTES || offset.checked_add(len).is_none() {
                    return Err(FormatError::invalid(format!("a block of {len} bytes")));
                }
                let data_bytes = reader.bounded("bytes of a child", child_bytes(level))?;
                let block = BlockRef { digest: Digest([0; 32]), pack, offset, len };
                children.push(Child::Block { block, data_bytes });
            } else if tag & 1 == 0 && zeros > 0 && children.len() + zeros <= count {
                children.resize(children.len() + zeros, Child::Zero);
            } else {
                return Err(FormatError::invalid("a child of unknown kind"));
            }
        }
        for child in &mut children {
            if let Child::Block { block, .. } = child {
                block.digest = Digest(reader.array()?);
            }
        }
        reader.finish()?;
        Ok(Self { level, children })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::id::{PackId, SnapshotId};

    fn any_node() -> impl Strategy<Value = Node> {
        let child = prop_oneof![
            Just(Child::Zero),
            (any::<[u8; 32]>(), 0_u32..3, any::<u16>(), 0_u32..100_000, 1..=SEGMENT_BYTES)
                .prop_map(|(digest, number, offset, len, data_bytes)| {
                    let pack = PackId { session: SnapshotId::from_parts(7, 7), number };
                    let (digest, offset) = (Digest(digest), offset.into());
                    Child::Block { block: BlockRef { digest, pack, offset, len }, data_bytes }
                }),
        ];
        (1_u8..=MAX_LEVEL, prop::collection::vec(child, 0..100))
            .prop_map(|(level, children)| Node { level, children })
    }

    #[test]
    fn levels() {
        assert_eq!(
            [root_level(0), root_level(1), root_level(1024), root_level(1025)],
            [1, 1, 1, 2]
        );
        assert_eq!(root_level(super::super::segments(super::super::MAX_VOLUME_BYTES)), MAX_LEVEL);
        assert_eq!([child_bytes(1), child_bytes(2)], [64 << 20, 64 << 30]);
    }

    proptest! {
        #[test]
        fn round_trips(node in any_node()) {
            let block = node.encode();
            let back = Node::decode(&block, node.level, node.children.len(), node.digest());
            prop_assert_eq!(back.unwrap(), node);
        }

        #[test]
        fn a_damaged_payload_never_panics(node in any_node(), at: prop::sample::Index, byte: u8) {
            let mut payload = node.encode()[block::HEADER_BYTES..].to_vec();
            let at = at.index(payload.len());
            payload[at] = byte;
            let _ = Node::parse(&block::seal(BlockKind::Node, &payload));
        }
    }
}
