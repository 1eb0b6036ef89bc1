//! One hot path at a time, once, on the same bytes at every run: `benches/gate.py` counts its instructions.
//!
//! `hot_paths NAME`; without a name it lists them. Only what runs in [`measured`] is counted.

#![expect(clippy::expect_used, reason = "a measurement that can't run has nothing to report")]

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;

use petra_benches::{CHUNK_BYTES, CHUNKS, frames, leaf, random, text};
use petra_engine::ChunkId;
use petra_engine::chunker::Chunking;
use petra_engine::crypto::Keys;
use petra_engine::format::frame::{self, FrameEncoder};
use petra_engine::format::leaf::Leaf;
use petra_engine::index::DedupIndex;
use petra_engine::scan::is_zero;

/// Input of those that take bytes.
const LEN: usize = 4 << 20;

type Path = (&'static str, fn());

const PATHS: [Path; 10] = [
    ("zero_scan", zero_scan),
    ("cut", cut),
    ("hash", hash),
    ("hash_many", hash_many),
    ("compress_text", || compress(&text(LEN))),
    ("compress_random", || compress(&random(LEN))),
    ("decompress_text", decompress),
    ("index", index),
    ("leaf_encode", leaf_encode),
    ("leaf_decode", leaf_decode),
];

fn main() -> ExitCode {
    let wanted = std::env::args().nth(1);
    match PATHS.iter().find(|(name, _)| Some(*name) == wanted.as_deref()) {
        Some((_, path)) => {
            path();
            ExitCode::SUCCESS
        }
        None if wanted.is_none() => {
            let mut out = std::io::stdout().lock();
            let listed = PATHS.iter().try_for_each(|(name, _)| {
                std::io::Write::write_fmt(&mut out, format_args!("{name}\n"))
            });
            listed.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
        }
        None => ExitCode::FAILURE,
    }
}

/// The counter knows this function by its name.
#[inline(never)]
fn measured<T>(work: impl FnOnce() -> T) {
    black_box(work());
}

fn zero_scan() {
    let zeros = vec![0; LEN];
    measured(|| black_box(&zeros).chunks(4096).all(is_zero));
}

fn cut() {
    let data = random(LEN);
    let cutter = Chunking::default().cutter();
    measured(|| {
        let (mut rest, mut chunks) = (black_box(data.as_slice()), 0);
        while !rest.is_empty() {
            rest = rest.split_at(cutter.first(rest)).1;
            chunks += 1;
        }
        chunks
    });
}

fn hash() {
    let data = random(LEN);
    measured(|| {
        data.chunks(CHUNK_BYTES as usize).map(ChunkId::of).fold(0, |sum, id| sum ^ id.0[0])
    });
}

/// As many together as are looked at together.
fn hash_many() {
    let data = random(LEN);
    let chunks: Vec<&[u8]> = data.chunks(CHUNK_BYTES as usize).collect();
    let keys = Keys::none();
    measured(|| {
        chunks
            .chunks(32)
            .flat_map(|together| keys.chunk_ids(together))
            .fold(0, |sum, id| sum ^ id.0[0])
    });
}

fn compress(data: &[u8]) {
    let mut encoder = FrameEncoder::new().expect("memory for zstd");
    let mut stored = Vec::with_capacity(2 * LEN);
    measured(|| {
        for raw in data.chunks(frame::TARGET_BYTES) {
            encoder.encode(raw, &mut stored);
        }
        stored.len()
    });
}

fn decompress() {
    let frames = frames(&text(LEN));
    let mut raw = Vec::with_capacity(frame::TARGET_BYTES);
    measured(|| {
        for (stored, raw_len) in &frames {
            frame::decode(stored, *raw_len, &mut raw).expect("frames that were just made");
        }
        raw.len()
    });
}

/// Chunks that are remembered and found again, and as many that are not there.
fn index() {
    let leaf = Arc::new(leaf());
    let index = DedupIndex::new(4 * CHUNKS as usize);
    let others: Vec<ChunkId> = (0..CHUNKS).map(|n| ChunkId::of(&n.to_le_bytes())).collect();
    measured(|| {
        index.insert(&leaf, |_| true);
        let found = leaf.chunks().filter(|(_, chunk)| index.get(&chunk.id).is_some()).count();
        found + others.iter().filter(|id| index.get(id).is_some()).count()
    });
}

fn leaf_encode() {
    let leaf = leaf();
    measured(|| leaf.encode().len());
}

fn leaf_decode() {
    let leaf = leaf();
    let (block, digest) = (leaf.encode(), leaf.digest());
    let segment_bytes = u64::from(CHUNKS) * u64::from(CHUNK_BYTES);
    measured(|| Leaf::decode(&block, segment_bytes, digest).expect("a leaf that was just made"));
}
