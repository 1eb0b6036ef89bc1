use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::chunker::Chunking;
use crate::error::Error;
use crate::format::leaf::ChunkRef;
use crate::id::ChunkId;

/// Bytes that remember what was read of them. All of it counts as data.
#[derive(Debug, Default)]
struct Bytes {
    bytes: Vec<u8>,
    holes: bool,
    read: Mutex<u64>,
}

impl Source for Bytes {
    fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let at = offset as usize;
        let data =
            self.bytes.get(at..at + buf.len()).ok_or(Error::Internal("read past the end"))?;
        buf.copy_from_slice(data);
        *self.read.lock().unwrap() += buf.len() as u64;
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        let end = self.len_bytes();
        let rest = self.bytes.get(from as usize..).unwrap_or_default();
        let zeros = rest.iter().take_while(|byte| self.holes && **byte == 0).count();
        let start = from + zeros as u64;
        let data = rest[zeros..].iter().take_while(|byte| !self.holes || **byte != 0).count();
        Ok((start < end).then_some(start..start + data as u64))
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }
}

fn extent(piece: Piece<'_>) -> Extent {
    match piece {
        Piece::Zero(len) => Extent::Zero { len },
        Piece::Chunk(bytes) => Extent::Chunk(ChunkRef {
            id: ChunkId::of(bytes),
            len: bytes.len() as u32,
            frame: 0,
            offset: 0,
        }),
    }
}

fn full(source: &Bytes, chunking: Chunking) -> Vec<Extent> {
    let mut extents = Vec::new();
    let mut scanner = Scanner::new(chunking.cutter());
    let take = &mut |piece: Piece<'_>| {
        extents.push(extent(piece));
        Ok(())
    };
    scanner.scan(source, 0, source.len_bytes(), take).unwrap();
    extents
}

fn spliced(
    source: &Bytes,
    chunking: Chunking,
    before: &[Extent],
    ranges: Vec<Range<u64>>,
) -> Vec<Extent> {
    let mut extents = Vec::new();
    let mut scanner = Scanner::new(chunking.cutter());
    let segment = 0..source.len_bytes();
    let changes = Changes::within(&segment, ranges);
    let take = &mut |piece: Spliced<'_>| {
        extents.push(match piece {
            Spliced::Kept(extent) => extent,
            Spliced::Scanned(piece) => extent(piece),
        });
        Ok(())
    };
    splice(&mut scanner, source, segment, before, &changes, take).unwrap();
    extents
}

#[derive(Clone, Copy, Debug)]
enum Content {
    Zero,
    Noise(u8),
    /// Bytes that repeat, so that no cut is found in them.
    Flat(u8),
    /// A block whose only byte that is not zero is at this place of it.
    Speck(u16),
}

fn any_content() -> impl Strategy<Value = Content> {
    prop_oneof![
        4 => Just(Content::Zero),
        4 => any::<u8>().prop_map(Content::Noise),
        1 => (1_u8..3).prop_map(Content::Flat),
        2 => (0_u16..4096).prop_map(Content::Speck),
    ]
}

fn fill(bytes: &mut [u8], content: Content) {
    match content {
        Content::Zero => bytes.fill(0),
        Content::Flat(byte) => bytes.fill(byte),
        Content::Noise(seed) => {
            blake3::Hasher::new().update(&[seed]).finalize_xof().fill(bytes);
        }
        Content::Speck(at) => {
            bytes.fill(0);
            for block in bytes.chunks_mut(BLOCK_BYTES) {
                if let Some(byte) = block.get_mut(usize::from(at)) {
                    *byte = 1;
                }
            }
        }
    }
}

/// Stretches of content, in blocks, and some bytes more.
fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    let stretch = (any_content(), prop_oneof![3 => 1_usize..6, 1 => 1_usize..24], 0_usize..4);
    (prop::collection::vec(stretch, 1..14), 0_usize..5000).prop_map(|(stretches, tail)| {
        let mut bytes = Vec::new();
        for (content, blocks, odd) in stretches {
            let start = bytes.len();
            bytes.resize(start + blocks * BLOCK_BYTES + odd / 3 * 1111, 0);
            fill(&mut bytes[start..], content);
        }
        let start = bytes.len();
        bytes.resize(start + tail, 0);
        bytes
    })
}

/// What becomes of a range: blocks, or some bytes.
type Change = (prop::sample::Index, usize, bool, Option<Content>);

fn any_change() -> impl Strategy<Value = Change> {
    let len = prop_oneof![3 => 1_usize..4, 1 => 1_usize..20];
    // Without content it only counts as changed.
    (
        any::<prop::sample::Index>(),
        len,
        prop::bool::weighted(0.8),
        prop::option::weighted(0.9, any_content()),
    )
}

fn any_chunking() -> impl Strategy<Value = Chunking> {
    prop_oneof![
        4 => Just(Chunking::FastCdc { min: 2048, average: 4096, max: 8192 }),
        1 => Just(Chunking::FastCdc { min: 2048, average: 4096, max: 5000 }),
        1 => Just(Chunking::FastCdc { min: 3000, average: 8192, max: 40_000 }),
        1 => Just(Chunking::default()),
        1 => Just(Chunking::Fixed { len: 4096 }),
        1 => Just(Chunking::Fixed { len: 12288 }),
    ]
}

fn apply(bytes: &mut [u8], changes: &[Change]) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    for (at, len, in_blocks, content) in changes {
        let unit = if *in_blocks { BLOCK_BYTES } else { 700 };
        let start = at.index(bytes.len()) / unit * unit;
        let end = (start + len * unit).min(bytes.len());
        if let Some(content) = content {
            fill(&mut bytes[start..end], *content);
        }
        ranges.push(start as u64..end as u64);
    }
    ranges
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn equals_a_full_scan(
        bytes in any_bytes(),
        rounds in prop::collection::vec(prop::collection::vec(any_change(), 0..5), 1..3),
        chunking in any_chunking(),
        holes: bool,
    ) {
        let mut source = Bytes { bytes, holes, ..Bytes::default() };
        let mut before = full(&source, chunking);
        for changes in rounds {
            let ranges = apply(&mut source.bytes, &changes);
            let after = full(&source, chunking);
            prop_assert_eq!(&spliced(&source, chunking, &before, ranges), &after);
            before = after;
        }
    }
}

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(b"splice").finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn reads_little_more_than_what_has_changed() {
    let mut source = Bytes { bytes: noise(16 << 20), ..Bytes::default() };
    let before = full(&source, Chunking::default());
    let read = |source: &mut Bytes, ranges: Vec<Range<u64>>| {
        for range in &ranges {
            for byte in &mut source.bytes[range.start as usize..range.end as usize] {
                *byte ^= 0x55;
            }
        }
        let after = full(source, Chunking::default());
        *source.read.lock().unwrap() = 0;
        assert!(spliced(source, Chunking::default(), &before, ranges) == after);
        *source.read.lock().unwrap()
    };
    assert_eq!(read(&mut source, vec![]), 0);
    let scattered: Vec<_> = (0..16_u64).map(|n| (n << 20) + 40_960..(n << 20) + 45_056).collect();
    let bytes = read(&mut source, scattered.clone());
    assert!(bytes < 16 * (100 << 10), "{bytes} for 16 changed blocks");
    // Back as it was, so that one change is left.
    let bytes = read(&mut source, scattered);
    assert!(bytes < 16 * (100 << 10), "{bytes} for 16 changed blocks");
    let bytes = read(&mut source, std::iter::once(5_000_000..9_000_000).collect());
    assert!(bytes < 4_000_000 + (300 << 10), "{bytes} for 4,000,000 changed bytes");
}

#[test]
fn zeros_that_have_not_changed_are_not_read() {
    let mut source = Bytes { bytes: vec![0; 16 << 20], ..Bytes::default() };
    let before = full(&source, Chunking::default());
    source.bytes[9_000_000..9_004_000].fill(3);
    let after = full(&source, Chunking::default());
    *source.read.lock().unwrap() = 0;
    let range = 9_000_000..9_004_000;
    assert_eq!(spliced(&source, Chunking::default(), &before, vec![range]), after);
    let read = *source.read.lock().unwrap();
    assert!(read <= 8192, "{read}");
}

#[test]
fn changes_are_put_in_order() {
    let changes = Changes::within(&(10..100), vec![50..60, 0..12, 55..70, 70..71, 30..30, 99..500]);
    assert_eq!(changes.ranges, [10..12, 50..71, 99..100]);
    assert!(!changes.touches(12..50) && changes.touches(12..51) && changes.touches(70..71));
    assert!(Changes::within(&(10..100), vec![0..10, 100..101]).is_empty());
}
