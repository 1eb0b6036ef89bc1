//! Data for the measurements: the same bytes at every run.

#![expect(clippy::expect_used, reason = "a measurement that can't run has nothing to report")]

use petra_engine::format::frame::{self, FrameEncoder};

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
