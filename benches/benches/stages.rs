//! The stages of a snapshot and a restore, one by one: `cargo bench -p petra-benches`.

#![expect(clippy::expect_used, reason = "a measurement that can't run has nothing to report")]

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use petra_benches::{random, text};
use petra_engine::ChunkId;
use petra_engine::chunker::Chunking;
use petra_engine::format::frame::{self, FrameEncoder};
use petra_engine::scan::is_zero;

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
    let mut encoder = FrameEncoder::new().expect("memory for zstd");
    let frames: Vec<(Vec<u8>, u32)> = data
        .chunks(frame::TARGET_BYTES)
        .map(|raw| {
            let mut stored = Vec::new();
            encoder.encode(raw, &mut stored);
            (stored, raw.len() as u32)
        })
        .collect();
    let mut raw = Vec::new();
    bencher.counter(BytesCount::new(data.len())).bench_local(|| {
        for (stored, raw_len) in &frames {
            frame::decode(stored, *raw_len, &mut raw).expect("frames that were just made");
        }
        raw.len()
    });
}

fn sample(kind: &str) -> Vec<u8> {
    if kind == "text" { text(LEN) } else { random(LEN) }
}
