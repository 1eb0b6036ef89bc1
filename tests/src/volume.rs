//! A volume as a naive model: what must come back from every restore.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use petra_engine::Result;
use petra_engine::scan::is_zero;
use petra_engine::source::{FileSource, Source};

/// The model's unit.
const BLOCK: u64 = 4096;
/// Bytes compared at once.
const STEP: u64 = 1 << 20;

/// Bytes of a volume: blocks that are not there are zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Volume {
    len: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
}

/// Bytes that no two seeds share and that do not compress.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Bytes that compress well and differ from seed to seed.
pub fn prose(seed: u64, len: usize) -> Vec<u8> {
    (0..).flat_map(|n: u64| format!("line {n} of text {seed}\n").into_bytes()).take(len).collect()
}

impl Volume {
    /// A volume of zeros.
    pub fn zeros(len: u64) -> Self {
        Self { len, blocks: BTreeMap::new() }
    }

    /// A volume of noise.
    pub fn noise(seed: u64, len: usize) -> Self {
        Self::zeros(len as u64).with(0, &noise(seed, len))
    }

    /// With these bytes.
    #[must_use]
    pub fn with(mut self, offset: u64, bytes: &[u8]) -> Self {
        self.write(offset, bytes);
        self
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True for a volume of no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of blocks that are not zeros.
    pub fn data_bytes(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK
    }

    /// Overwrites bytes; those past the end are dropped.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        let len = (bytes.len() as u64).min(self.len.saturating_sub(offset));
        while done < len {
            let at = offset + done;
            let within = at % BLOCK;
            let step = (BLOCK - within).min(len - done);
            let (number, from) = (at / BLOCK, done as usize);
            let block = self.blocks.entry(number).or_insert_with(|| vec![0; BLOCK as usize]);
            let (_, place) = block.split_at_mut(within as usize);
            let (place, _) = place.split_at_mut(step as usize);
            place.copy_from_slice(bytes.split_at(from).1.split_at(step as usize).0);
            if is_zero(block) {
                self.blocks.remove(&number);
            }
            done += step;
        }
    }

    /// Makes a range zeros.
    pub fn zero(&mut self, range: Range<u64>) {
        let end = range.end.min(self.len);
        let mut at = range.start;
        while at < end {
            let step = (BLOCK - at % BLOCK).min(end - at);
            if step == BLOCK {
                self.blocks.remove(&(at / BLOCK));
            } else if self.blocks.contains_key(&(at / BLOCK)) {
                self.write(at, &vec![0; step as usize]);
            }
            at += step;
        }
    }

    /// Moves what is in a range up by some bytes, as an insertion into a file does; new bytes come first.
    pub fn insert(&mut self, range: Range<u64>, bytes: &[u8]) {
        let end = range.end.min(self.len);
        let moved = self.read(range.start.min(end)..end);
        let (kept, _) = moved.split_at(moved.len().saturating_sub(bytes.len()));
        let bytes = bytes.split_at(bytes.len().min(moved.len())).0;
        self.write(range.start, bytes);
        self.write(range.start + bytes.len() as u64, kept);
    }

    /// Grows with zeros, or cuts.
    pub fn resize(&mut self, len: u64) {
        if len < self.len {
            let old = std::mem::replace(&mut self.len, len.next_multiple_of(BLOCK));
            self.zero(len..old);
            self.blocks.retain(|number, _| number * BLOCK < len);
        }
        self.len = len;
    }

    /// The bytes of a range.
    pub fn read(&self, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        for (number, block) in self.blocks.range(range.start / BLOCK..range.end.div_ceil(BLOCK)) {
            let at = number * BLOCK;
            let (start, end) = (at.max(range.start), (at + BLOCK).min(range.end));
            let from = block.split_at((start - at) as usize).1.split_at((end - start) as usize).0;
            let (_, place) = bytes.split_at_mut((start - range.start) as usize);
            place.split_at_mut(from.len()).0.copy_from_slice(from);
        }
        bytes
    }

    /// Writes a sparse file.
    pub fn save(&self, path: &Path) {
        let file = File::create(path).expect("a new file");
        file.set_len(self.len).expect("a sparse file");
        for (number, block) in &self.blocks {
            let len = BLOCK.min(self.len - number * BLOCK) as usize;
            file.write_all_at(block.split_at(len).0, number * BLOCK).expect("room for a block");
        }
    }

    /// Where a file differs from the volume: the first such place.
    pub fn difference(&self, path: &Path) -> Option<String> {
        let file = FileSource::open(path).expect("a file to compare");
        if file.len_bytes() != self.len {
            return Some(format!("{} bytes, not {}", file.len_bytes(), self.len));
        }
        // Where neither has data there is nothing to compare.
        let mut at = 0;
        loop {
            let data = [&file as &dyn Source, self].map(|s| s.next_data(at).expect("a data map"));
            let range = data.into_iter().flatten().min_by_key(|range| range.start)?;
            let range = range.start.max(at)..range.end.min(range.start.max(at) + STEP);
            let mut bytes = vec![0; (range.end - range.start) as usize];
            file.read_at(&mut bytes, range.start).expect("bytes to compare");
            let expected = self.read(range.clone());
            if bytes != expected {
                let n = bytes.iter().zip(&expected).take_while(|(a, b)| a == b).count();
                return Some(format!("other bytes at {}", range.start + n as u64));
            }
            at = range.end;
        }
    }
}

impl Source for Volume {
    fn len_bytes(&self) -> u64 {
        self.len
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.copy_from_slice(&self.read(offset..offset + buf.len() as u64));
        Ok(())
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        if from >= self.len {
            return Ok(None);
        }
        let mut numbers = self.blocks.range(from / BLOCK..).map(|(number, _)| *number);
        let Some(first) = numbers.next() else { return Ok(None) };
        let mut last = first;
        for number in numbers {
            if number != last + 1 {
                break;
            }
            last = number;
        }
        Ok(Some((first * BLOCK).max(from)..((last + 1) * BLOCK).min(self.len)))
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }
}

/// Takes a stream and compares it with a volume, without keeping it.
#[derive(Debug)]
pub struct Comparison {
    volume: Volume,
    at: u64,
    /// Ranges that may hold anything.
    excused: Vec<Range<u64>>,
}

impl Comparison {
    /// Expects all bytes of a volume.
    pub fn with(volume: &Volume) -> Self {
        Self { volume: volume.clone(), at: 0, excused: Vec::new() }
    }

    /// Expects all but some bytes of a volume.
    pub fn except(volume: &Volume, excused: Vec<Range<u64>>) -> Self {
        Self { volume: volume.clone(), at: 0, excused }
    }
}

impl Write for Comparison {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(STEP as usize);
        let (bytes, _) = bytes.split_at(len);
        let end = self.at + len as u64;
        if end > self.volume.len {
            return Err(io::Error::other(format!("more than {} bytes came", self.volume.len)));
        }
        // Most of a sparse volume.
        let mut blocks = self.volume.blocks.range(self.at / BLOCK..end.div_ceil(BLOCK));
        if blocks.next().is_none() && is_zero(bytes) {
            self.at = end;
            return Ok(len);
        }
        let expected = self.volume.read(self.at..end);
        if bytes != expected {
            for (n, _) in bytes.iter().zip(&expected).enumerate().filter(|(_, (a, b))| a != b) {
                let at = self.at + n as u64;
                if !self.excused.iter().any(|range| range.contains(&at)) {
                    return Err(io::Error::other(format!("other bytes came at {at}")));
                }
            }
        }
        self.at = end;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.at == self.volume.len {
            return Ok(());
        }
        Err(io::Error::other(format!("{} of {} bytes came", self.at, self.volume.len)))
    }
}
