//! Small volumes that have much in common.

use petra_tests::volume::{Volume, noise, prose};

const SEGMENT: u64 = 64 << 20;
/// Different pieces of content in the world: few, so that volumes share them.
const PIECES: u64 = 10;

/// A new volume: some pieces in one to three segments.
pub fn fresh(rng: &mut fastrand::Rng) -> Volume {
    let tail = rng.u64(1..=120_000);
    let len = tail + SEGMENT * [0, 0, 0, 1, 2].get(rng.usize(..5)).copied().unwrap_or_default();
    let mut volume = Volume::zeros(len);
    for _ in 0..rng.u32(0..=4) {
        write_piece(rng, &mut volume);
    }
    volume
}

/// What a writer does to its volume between two snapshots.
pub fn change(rng: &mut fastrand::Rng, volume: &mut Volume) {
    let at = place(rng, volume.len());
    let end = (at + rng.u64(1..=40_000)).min(volume.len());
    match rng.u32(..10) {
        0 => {}
        1 => volume.zero(at..end),
        2 => volume.insert(at..end, b"some new bytes in the middle"),
        3 => volume.resize(rng.u64(1..=2 * SEGMENT)),
        4 => volume.write(at, &rng.u64(..).to_le_bytes()),
        _ => write_piece(rng, volume),
    }
}

fn write_piece(rng: &mut fastrand::Rng, volume: &mut Volume) {
    let (piece, len) = (rng.u64(..PIECES), rng.usize(1..=30_000));
    let bytes = if rng.bool() { noise(piece, len) } else { prose(piece, len) };
    let at = place(rng, volume.len());
    volume.write(at, &bytes);
}

/// Somewhere near the beginning of a segment, where other pieces are, too.
fn place(rng: &mut fastrand::Rng, len: u64) -> u64 {
    let segment = rng.u64(..len.div_ceil(SEGMENT).max(1));
    let block = rng.u64(..20) * 4096;
    (segment * SEGMENT + if rng.bool() { block } else { block + rng.u64(..4096) }).min(len)
}
