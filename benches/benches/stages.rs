//! The stages of a snapshot and a restore, one by one: `cargo bench -p petra-benches`.

#![expect(clippy::expect_used, reason = "a measurement that can't run has nothing to report")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use petra_benches::{CHUNK_BYTES, CHUNKS, frames, leaf, random, text};
use petra_engine::ChunkId;
use petra_engine::chunker::Chunking;
use petra_engine::context::Context;
use petra_engine::crypto::{Keys, Piece};
use petra_engine::format::frame::{self, FrameEncoder};
use petra_engine::format::leaf::Leaf;
use petra_engine::index::DedupIndex;
use petra_engine::scan::is_zero;
use petra_volume::extents::{ExtentMap, differing};

const LEN: usize = 16 << 20;

fn main() {
    divan::main();
}

/// Reads and compares every byte, since all are zeros.
#[divan::bench]
fn zero_scan(bencher: Bencher<'_, '_>) {
    let zeros = vec![0; LEN];
    bencher.counter(BytesCount::new(LEN)).bench(|| black_box(&zeros).chunks(4096).all(is_zero));
}

#[divan::bench]
fn cut(bencher: Bencher<'_, '_>) {
    let data = random(LEN);
    let cutter = Chunking::default().cutter();
    bencher.counter(BytesCount::new(LEN)).bench(|| {
        let mut rest = black_box(data.as_slice());
        let mut chunks = 0;
        while !rest.is_empty() {
            rest = rest.split_at(cutter.first(rest)).1;
            chunks += 1;
        }
        chunks
    });
}

#[divan::bench]
fn hash(bencher: Bencher<'_, '_>) {
    let data = random(LEN);
    bencher
        .counter(BytesCount::new(LEN))
        .bench(|| data.chunks(16 << 10).map(ChunkId::of).fold(0, |sum, id| sum ^ id.0[0]));
}

/// With a key, as in an encrypted repository.
#[divan::bench]
fn hash_keyed(bencher: Bencher<'_, '_>) {
    let (data, keys) = (random(LEN), keys());
    bencher.counter(BytesCount::new(LEN)).bench(|| {
        data.chunks(16 << 10).map(|chunk| keys.chunk_id(chunk)).fold(0, |sum, id| sum ^ id.0[0])
    });
}

/// Frames of a session, each under a key of its own.
#[divan::bench]
fn seal(bencher: Bencher<'_, '_>) {
    let (data, keys, host) = (random(LEN), keys(), Context::default().host);
    let mut frame = Vec::with_capacity(2 * frame::TARGET_BYTES);
    bencher.counter(BytesCount::new(LEN)).bench_local(|| {
        for raw in data.chunks(frame::TARGET_BYTES) {
            frame.clear();
            frame.extend_from_slice(raw);
            keys.seal(Piece::Frame, &mut frame, &*host);
        }
        frame.len()
    });
}

#[divan::bench]
fn open(bencher: Bencher<'_, '_>) {
    let (data, keys, host) = (random(LEN), keys(), Context::default().host);
    let sealed = data.chunks(frame::TARGET_BYTES).map(|raw| {
        let mut frame = raw.to_vec();
        keys.seal(Piece::Frame, &mut frame, &*host);
        frame
    });
    let sealed: Vec<Vec<u8>> = sealed.collect();
    let mut scratch = Vec::new();
    bencher.counter(BytesCount::new(LEN)).bench_local(|| {
        for frame in &sealed {
            keys.open(Piece::Frame, frame, &mut scratch).expect("frames that were just sealed");
        }
        scratch.len()
    });
}

fn keys() -> Keys {
    Keys::generate(&*Context::default().host)
}

#[divan::bench(args = ["random", "text"])]
fn compress(bencher: Bencher<'_, '_>, kind: &str) {
    let data = sample(kind);
    let mut stored = Vec::new();
    bencher.counter(BytesCount::new(data.len())).bench_local(|| {
        let mut encoder = FrameEncoder::new().expect("memory for zstd");
        for raw in data.chunks(frame::TARGET_BYTES) {
            encoder.encode(raw, &mut stored);
        }
        stored.len()
    });
}

#[divan::bench(args = ["random", "text"])]
fn decompress(bencher: Bencher<'_, '_>, kind: &str) {
    let data = sample(kind);
    let frames = frames(&data);
    let mut raw = Vec::new();
    bencher.counter(BytesCount::new(data.len())).bench_local(|| {
        for (stored, raw_len) in &frames {
            frame::decode(stored, *raw_len, &mut raw).expect("frames that were just made");
        }
        raw.len()
    });
}

/// Chunks that were not there before.
#[divan::bench]
fn index_insert(bencher: Bencher<'_, '_>) {
    let leaf = Arc::new(leaf());
    bencher
        .counter(ItemsCount::new(CHUNKS))
        .with_inputs(|| DedupIndex::new(4 * CHUNKS as usize))
        .bench_refs(|index| index.insert(&leaf, |_| true));
}

/// Half of them are there.
#[divan::bench]
fn index_get(bencher: Bencher<'_, '_>) {
    let (leaf, index) = (leaf(), DedupIndex::new(4 * CHUNKS as usize));
    let extents = leaf.extents.iter().copied().step_by(2).collect();
    index.insert(&Arc::new(Leaf { frames: leaf.frames.clone(), extents }), |_| true);
    bencher.counter(ItemsCount::new(CHUNKS)).bench(|| {
        leaf.chunks().filter(|(_, chunk)| index.get(black_box(&chunk.id)).is_some()).count()
    });
}

#[divan::bench]
fn leaf_encode(bencher: Bencher<'_, '_>) {
    let leaf = leaf();
    bencher.counter(ItemsCount::new(CHUNKS)).bench(|| black_box(&leaf).encode());
}

/// With its checksum and its content digest.
#[divan::bench]
fn leaf_decode(bencher: Bencher<'_, '_>) {
    let leaf = leaf();
    let (block, digest) = (leaf.encode(), leaf.digest());
    let len = u64::from(CHUNKS) * u64::from(CHUNK_BYTES);
    bencher
        .counter(ItemsCount::new(CHUNKS))
        .bench(|| Leaf::decode(black_box(&block), len, digest).expect("what was encoded"));
}

/// As the kernel tells it.
#[divan::bench]
fn extent_map(bencher: Bencher<'_, '_>) {
    let file = fragmented();
    bencher.counter(ItemsCount::new(EXTENTS)).bench(|| map(&file));
}

/// Between two files that share nothing.
#[divan::bench]
fn extent_difference(bencher: Bencher<'_, '_>) {
    let (a, b) = (map(&fragmented()), map(&fragmented()));
    bencher.counter(ItemsCount::new(EXTENTS)).bench(|| differing(black_box(&a), &b).len());
}

const EXTENTS: u64 = 4096;

/// A file of so many extents, of 4 KiB each.
fn fragmented() -> File {
    let file = tempfile::tempfile().expect("room for a file");
    for n in 0..EXTENTS {
        file.write_all_at(&[1; 4096], n * 8192).expect("room for its data");
    }
    file.sync_all().expect("a disk that works");
    file
}

fn map(file: &File) -> ExtentMap {
    ExtentMap::read(file, 0..EXTENTS * 8192).expect("a file system that knows FIEMAP")
}

fn sample(kind: &str) -> Vec<u8> {
    if kind == "text" { text(LEN) } else { random(LEN) }
}
