//! Data for the measurements: the same bytes at every run.

#![expect(clippy::expect_used, reason = "a measurement that can't run has nothing to report")]

use petra_engine::format::frame::{self, FrameEncoder, FrameLocation};
use petra_engine::format::leaf::{ChunkRef, Extent, Leaf};
use petra_engine::{ChunkId, PackId, SnapshotId};

/// A common length of chunks.
pub const CHUNK_BYTES: u32 = 16 << 10;
/// Chunks in a leaf.
pub const CHUNKS: u32 = 4096;

/// Bytes that do not compress.
pub fn random(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(b"petra benches").finalize_xof().fill(&mut bytes);
    bytes
}

/// Lines that compress as logs and tables do.
pub fn text(len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 64);
    let numbers = random(8 << 10);
    for (n, pair) in numbers.as_chunks::<2>().0.iter().cycle().enumerate() {
        if bytes.len() >= len {
            break;
        }
        let line = format!("{n},user-{},{}.{:02},ok\n", pair[0], pair[1], n % 97);
        bytes.extend_from_slice(line.as_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The frames that hold some bytes, each as it is stored, with the length of what it holds.
pub fn frames(data: &[u8]) -> Vec<(Vec<u8>, u32)> {
    let mut encoder = FrameEncoder::new().expect("memory for zstd");
    let frames = data.chunks(frame::TARGET_BYTES).map(|raw| {
        let mut stored = Vec::new();
        encoder.encode(raw, &mut stored);
        (stored, raw.len() as u32)
    });
    frames.collect()
}

/// A segment full of chunks, 64 in each frame.
pub fn leaf() -> Leaf {
    let in_frame = 64;
    let pack = PackId { session: SnapshotId::from_parts(1, 1), number: 7 };
    let frames = (0..CHUNKS / in_frame).map(|n| FrameLocation {
        pack,
        offset: n * 400_000,
        stored_len: 400_000,
        raw_len: in_frame * CHUNK_BYTES,
    });
    let extents = (0..CHUNKS).map(|n| {
        Extent::Chunk(ChunkRef {
            id: ChunkId::of(&[&b"chunk "[..], &n.to_le_bytes()].concat()),
            len: CHUNK_BYTES,
            frame: n / in_frame,
            offset: n % in_frame * CHUNK_BYTES,
        })
    });
    Leaf { frames: frames.collect(), extents: extents.collect() }
}
