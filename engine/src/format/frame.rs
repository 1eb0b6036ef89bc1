//! Frames: consecutive new chunks compressed together.
//!
//! Small chunks find more duplicates but compress badly one by one; a frame gives zstd up to 256 KiB of context
//! while a lazy read still fetches little more than it asked for.

use std::cell::RefCell;

use zstd::bulk::{Compressor, Decompressor};

use super::FormatError;
use crate::id::PackId;

/// A frame holds chunks until one more would exceed this many bytes.
pub const TARGET_BYTES: usize = 256 << 10;

/// The largest frame, raw: one chunk of the largest size that any profile allows.
pub const MAX_BYTES: usize = 1 << 20;

/// Where a frame is and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameLocation {
    /// The pack that holds it.
    pub pack: PackId,
    /// First byte within the pack.
    pub offset: u32,
    /// Bytes in the pack. Equal to `raw_len` when the frame is stored as it is, smaller when it is compressed.
    pub stored_len: u32,
    /// Bytes of its chunks.
    pub raw_len: u32,
}

thread_local! {
    // A zstd context is some hundred KiB to set up, so each worker thread keeps its own.
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compresses frames at one level.
pub struct FrameEncoder {
    compressor: Compressor<'static>,
}

impl FrameEncoder {
    /// An encoder for one worker.
    pub fn new(level: i32) -> std::io::Result<Self> {
        let mut compressor = Compressor::new(level)?;
        // The length and a checksum are in the leaf already.
        compressor.include_contentsize(false)?;
        compressor.include_checksum(false)?;
        Ok(Self { compressor })
    }

    /// Puts the stored form of `raw` into `out`: compressed if that saves at least a thirty-second, else as it is.
    pub fn encode(&mut self, raw: &[u8], out: &mut Vec<u8>) {
        out.clear();
        // zstd gives up with an error as soon as the output can't fit, so incompressible data costs little.
        let limit = raw.len() - raw.len() / 32;
        out.resize(limit, 0);
        match self.compressor.compress_to_buffer(raw, out.as_mut_slice()) {
            Ok(len) if len < limit => out.truncate(len),
            _ => {
                out.clear();
                out.extend_from_slice(raw);
            }
        }
    }
}

/// Decodes a stored frame into `out`. Its chunks are still to be verified.
pub fn decode(stored: &[u8], raw_len: u32, out: &mut Vec<u8>) -> Result<(), FormatError> {
    let raw_len = raw_len as usize;
    out.clear();
    if stored.len() == raw_len {
        out.extend_from_slice(stored);
        return Ok(());
    }
    if raw_len > MAX_BYTES {
        return Err(FormatError::invalid(format!("a frame of {raw_len} bytes")));
    }
    out.resize(raw_len, 0);
    let len = DECOMPRESSOR
        .with(|slot| {
            let mut slot = slot.borrow_mut();
            let decompressor = match slot.take() {
                Some(decompressor) => decompressor,
                None => Decompressor::new()?,
            };
            slot.insert(decompressor).decompress_to_buffer(stored, out.as_mut_slice())
        })
        .map_err(|error| FormatError::invalid(format!("zstd: {error}")))?;
    if len != raw_len {
        return Err(FormatError::invalid(format!("{raw_len} bytes expected in a frame, {len} found")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip(raw: &[u8]) -> usize {
        let (mut stored, mut back) = (Vec::new(), Vec::new());
        FrameEncoder::new(1).unwrap().encode(raw, &mut stored);
        decode(&stored, raw.len() as u32, &mut back).unwrap();
        assert_eq!(back, raw);
        stored.len()
    }

    #[test]
    fn stores_what_does_not_shrink_as_it_is() {
        let mut random = vec![0; 100_000];
        blake3::Hasher::new().finalize_xof().fill(&mut random);
        assert_eq!(round_trip(&random), random.len());
        assert!(round_trip(&b"petra ".repeat(10_000)) < 1_000);
    }

    proptest! {
        #[test]
        fn any_bytes_round_trip(raw: Vec<u8>) {
            prop_assume!(!raw.is_empty());
            round_trip(&raw);
        }

        #[test]
        fn foreign_bytes_never_panic(stored: Vec<u8>, raw_len in 0_u32..10_000) {
            let _ = decode(&stored, raw_len, &mut Vec::new());
        }
    }
}
