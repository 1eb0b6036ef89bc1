//! The stages of a snapshot and a restore, one by one: `cargo bench -p petra-benches`.

#![expect(clippy::expect_used, reason = "a measurement that can't run has nothing to report")]

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use petra_benches::{frames, random, text};
use petra_engine::ChunkId;
use petra_engine::chunker::Chunking;
use petra_engine::context::Context;
use petra_engine::crypto::{Keys, Piece};
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

fn sample(kind: &str) -> Vec<u8> {
    if kind == "text" { text(LEN) } else { random(LEN) }
}
