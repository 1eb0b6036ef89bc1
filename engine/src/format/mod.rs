//! The bytes of every object, as docs/format.md defines them. Nothing here does I/O.
//!
//! Small objects are JSON in a checked [`envelope`]. Volumes' data are [`frame`]s in [`pack`]s. A volume's manifest
//! is a tree of [`block`]s: a [`leaf`] lists the chunks of one segment, a [`node`] lists many leaves or nodes.

pub mod block;
pub mod codec;
pub mod envelope;
pub mod frame;
pub mod leaf;
pub mod node;
pub mod pack;
pub mod relocation;

/// Version of the format that this engine writes, and the newest it reads.
pub const VERSION: u32 = 1;

/// Bytes of a volume's address space that one leaf covers.
pub const SEGMENT_BYTES: u64 = 64 << 20;

/// The unit in which zeros are found, aligned to the segment.
pub const BLOCK_BYTES: usize = 4096;

/// The shortest run of zero blocks within data that is kept as an extent of zeros. Shorter ones stay in their chunk:
/// compression removes them, and chunks stay long.
pub const ZERO_RUN_BYTES: usize = 4 * BLOCK_BYTES;

/// The largest volume: 2^24 segments, 1 PiB.
pub const MAX_VOLUME_BYTES: u64 = 1 << 50;

/// How many segments a volume of this length has.
pub fn segments(len_bytes: u64) -> u64 {
    len_bytes.div_ceil(SEGMENT_BYTES)
}

/// Why stored bytes were not accepted: what was expected and what was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes end too early, are out of bounds, or contradict themselves.
    #[error("{0}")]
    Invalid(String),
    /// Written by a newer Petra.
    #[error("format version {found}, but this Petra reads up to {VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// The checksum does not match.
    #[error("checksum {found} expected, {actual} computed")]
    Checksum {
        /// As stored beside or in the object.
        found: String,
        /// Of the bytes that were read.
        actual: String,
    },
}

impl FormatError {
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::Invalid(text.into())
    }

    /// As an error about a named object.
    pub fn of(self, object: impl std::fmt::Display) -> crate::Error {
        match self {
            Self::Version { found } => {
                crate::Error::Version { object: object.to_string(), found, supported: VERSION }
            }
            other => {
                crate::Error::Damaged { object: object.to_string(), detail: other.to_string() }
            }
        }
    }
}
