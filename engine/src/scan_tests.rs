use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::chunker::Chunking;
use crate::error::Error;

/// Bytes with a chosen map of holes.
#[derive(Debug)]
struct Bytes {
    bytes: Vec<u8>,
    holes: Vec<Range<u64>>,
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
        Ok(())
    }

    fn next_data(&self, mut from: u64) -> Result<Option<Range<u64>>> {
        while let Some(hole) = self.holes.iter().find(|hole| hole.contains(&from)) {
            from = hole.end;
        }
        let next = self.holes.iter().map(|hole| hole.start).filter(|start| *start > from).min();
        let end = next.unwrap_or(u64::MAX).min(self.len_bytes());
        Ok((from < self.len_bytes()).then_some(from..end))
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }
}

/// Takes chunks so many at once.
struct Pieces {
    at_once: usize,
    pieces: Vec<(bool, Vec<u8>)>,
}

impl Receiver for Pieces {
    fn take(&mut self, piece: Piece<'_>) -> std::result::Result<(), Stop> {
        self.pieces.push(match piece {
            Piece::Zero(len) => (true, vec![0; len as usize]),
            Piece::Chunk(chunk) => (false, chunk.to_vec()),
        });
        Ok(())
    }

    fn take_chunks(&mut self, chunks: &[&[u8]]) -> std::result::Result<(), Stop> {
        assert!(chunks.len() <= self.at_once);
        chunks.iter().try_for_each(|chunk| self.take(Piece::Chunk(chunk)))
    }

    fn chunks_at_once(&self) -> usize {
        self.at_once
    }
}

fn pieces(source: &Bytes, chunking: Chunking, at_once: usize) -> Vec<(bool, Vec<u8>)> {
    let mut to = Pieces { at_once, pieces: vec![] };
    let mut scanner = Scanner::new(chunking.cutter());
    scanner.scan_knowing(source, 0..source.len_bytes(), &mut to).unwrap();
    to.pieces
}

/// The rule of the module's header, said as directly as possible.
fn model(bytes: &[u8], chunking: Chunking) -> Vec<(bool, Vec<u8>)> {
    let blocks: Vec<&[u8]> = bytes.chunks(BLOCK_BYTES).collect();
    let mut runs: Vec<(bool, Vec<u8>)> = Vec::new();
    for block in blocks {
        let zero = block.iter().all(|byte| *byte == 0);
        match runs.last_mut() {
            Some((was_zero, run)) if *was_zero == zero => run.extend_from_slice(block),
            _ => runs.push((zero, block.to_vec())),
        }
    }
    let last = runs.len().saturating_sub(1);
    let mut joined: Vec<(bool, Vec<u8>)> = Vec::new();
    for (n, (zero, run)) in runs.into_iter().enumerate() {
        let zero = zero && (run.len() >= ZERO_RUN_BYTES || n == 0 || n == last);
        match joined.last_mut() {
            Some((false, data)) if !zero => data.extend_from_slice(&run),
            _ => joined.push((zero, run)),
        }
    }
    let cutter = chunking.cutter();
    let mut pieces = Vec::new();
    for (zero, run) in joined {
        let mut rest = run.as_slice();
        while !zero && !rest.is_empty() {
            let (chunk, after) = rest.split_at(cutter.first(rest));
            pieces.push((false, chunk.to_vec()));
            rest = after;
        }
        if zero {
            pieces.push((true, run));
        }
    }
    pieces
}

/// Segments of random, repeated and zero stretches, with holes over some of the zeros.
fn any_source() -> impl Strategy<Value = Bytes> {
    let stretch = (0_u8..5, 1_usize..90, 0_usize..3, any::<bool>());
    (prop::collection::vec(stretch, 0..24), 0_usize..5000).prop_map(|(stretches, tail)| {
        let mut bytes: Vec<u8> = Vec::new();
        let mut holes: Vec<Range<u64>> = Vec::new();
        for (kind, blocks, odd, hole) in stretches {
            let len = if kind < 2 { (blocks % 7) * BLOCK_BYTES } else { blocks * BLOCK_BYTES * 2 };
            let len = len + odd * 1111;
            let start = bytes.len();
            if kind % 2 == 0 {
                bytes.resize(start + len, 0);
                if hole && len > 0 {
                    holes.push(start as u64..(start + len) as u64);
                }
            } else {
                let mut data = vec![7; len];
                blake3::Hasher::new()
                    .update(&[blocks as u8])
                    .finalize_xof()
                    .fill(&mut data[len / 3..]);
                bytes.extend_from_slice(&data);
            }
        }
        bytes.extend(std::iter::repeat_n(9, tail));
        Bytes { bytes, holes }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn agrees_with_the_rule(source in any_source(), fixed: bool, at_once in 1_usize..40) {
        let chunking = if fixed { Chunking::Fixed { len: 16384 } } else { Chunking::default() };
        let found = pieces(&source, chunking, at_once);
        prop_assert!(found == model(&source.bytes, chunking), "pieces differ");
        let bytes: Vec<u8> = found.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
        prop_assert!(bytes == source.bytes, "bytes differ");
        prop_assert!(found.windows(2).all(|pair| !(pair[0].0 && pair[1].0)), "zeros not joined");
    }

    #[test]
    fn zero_test(mut block in prop::collection::vec(0_u8..1, 0..300), at: prop::sample::Index, byte: u8) {
        prop_assert!(is_zero(&block));
        if !block.is_empty() {
            let at = at.index(block.len());
            block[at] = byte;
            prop_assert_eq!(is_zero(&block), byte == 0);
        }
    }
}
