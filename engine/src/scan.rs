//! Splits one segment of a source into zeros and chunks, through a small window.
//!
//! The rule, which is part of the format (docs/format.md): a *zero run* is a sequence of all-zero blocks of
//! 4 KiB, aligned to the segment. A run of at least [`ZERO_RUN_BYTES`], or one that begins or ends the segment, is
//! an extent of zeros. What lies between is cut into chunks, beginning anew after each extent of zeros. The result depends on
//! the bytes alone: not on holes, window or buffer sizes.
//!
//! The window is small so that data is still in the processor's cache when it is hashed and compressed.
//!
//! A part of a segment can be scanned by itself, from any boundary between two pieces: `splice` does.

use std::ops::Range;

use crate::chunker::Cutter;
use crate::error::{Error, Result};
use crate::format::{BLOCK_BYTES, SEGMENT_BYTES, ZERO_RUN_BYTES};
use crate::source::Source;

/// Bytes read at once.
pub(crate) const WINDOW_BYTES: usize = 512 << 10;

/// What a segment is made of, in address order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Zeros, never two in a row.
    Zero(u32),
    /// One chunk's bytes.
    Chunk(&'a [u8]),
}

impl Piece<'_> {
    /// Bytes of the address space.
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Zero(len) => u64::from(*len),
            Self::Chunk(bytes) => bytes.len() as u64,
        }
    }
}

/// A part of a segment to scan, up to the segment's end.
pub(crate) struct Part<'a> {
    /// From a boundary between two pieces to the end of the segment.
    pub range: Range<u64>,
    /// The boundary is the start of a chunk. Its block may be one of zeros, and so may the blocks around it, in a run
    /// that is too short for an extent of zeros: the caller knows that.
    pub begins_with_data: bool,
    /// How many bytes to read from some address on: whole blocks, [`WINDOW_BYTES`] at most.
    pub step: &'a dyn Fn(u64) -> usize,
    /// Gives every chunk as soon as it is known, at the price of looking at some bytes twice.
    pub at_once: bool,
}

/// Why a scan ends before its range does.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The receiver of the pieces needs no more.
    Enough,
    /// It failed.
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Takes the pieces.
pub(crate) trait Receiver {
    /// Takes the next piece.
    fn take(&mut self, piece: Piece<'_>) -> Result<(), Stop>;

    /// Takes chunks that follow each other.
    fn take_chunks(&mut self, chunks: &[&[u8]]) -> Result<(), Stop> {
        chunks.iter().try_for_each(|chunk| self.take(Piece::Chunk(chunk)))
    }

    /// How many chunks to cut before they are given: more than one only to who takes all and knows no cuts.
    fn chunks_at_once(&self) -> usize {
        1
    }

    /// The length of the next piece, which is a chunk at the beginning of `data`, where that is known without cutting.
    fn known_cut(&mut self, _data: &[u8]) -> Option<usize> {
        None
    }
}

impl<F: FnMut(Piece<'_>) -> Result<(), Stop>> Receiver for F {
    fn take(&mut self, piece: Piece<'_>) -> Result<(), Stop> {
        self(piece)
    }
}

/// Scans segments. Holds the window, so that workers reuse its memory.
#[derive(Debug)]
pub struct Scanner {
    cutter: Cutter,
    max_chunk: usize,
    buf: Vec<u8>,
}

/// The position within `buf`: `start..end` is the run of data not yet cut, followed by `zeros` bytes of zeros.
/// Zeros are in the buffer while they may still turn out to be part of the run.
#[derive(Debug, Default)]
struct Run {
    open: bool,
    start: usize,
    end: usize,
    zeros: usize,
}

impl Scanner {
    /// A scanner for one worker.
    pub fn new(cutter: Cutter) -> Self {
        let max_chunk = cutter.max_len();
        let len = 2 * max_chunk + WINDOW_BYTES + 2 * ZERO_RUN_BYTES;
        Self { cutter, max_chunk, buf: vec![0; len] }
    }

    /// Calls `sink` for every piece of the segment that begins at `start`. `len` is at most [`SEGMENT_BYTES`].
    pub fn scan(
        &mut self,
        source: &dyn Source,
        start: u64,
        len: u64,
        sink: &mut dyn FnMut(Piece<'_>) -> Result<()>,
    ) -> Result<()> {
        debug_assert!(start.is_multiple_of(SEGMENT_BYTES) && len <= SEGMENT_BYTES);
        self.scan_knowing(source, start..start + len, &mut |piece: Piece<'_>| Ok(sink(piece)?))
    }

    /// The same for a receiver that may know where chunks end.
    pub(crate) fn scan_knowing(
        &mut self,
        source: &dyn Source,
        range: Range<u64>,
        to: &mut dyn Receiver,
    ) -> Result<()> {
        let part = Part { range, begins_with_data: false, step: &|_| WINDOW_BYTES, at_once: false };
        self.scan_part(source, &part, to)
    }

    /// Gives every piece to `to` from a boundary on, until it has enough or the segment ends.
    pub(crate) fn scan_part(
        &mut self,
        source: &dyn Source,
        part: &Part<'_>,
        to: &mut dyn Receiver,
    ) -> Result<()> {
        match self.pieces(source, part, to) {
            Ok(()) | Err(Stop::Enough) => Ok(()),
            Err(Stop::Failed(error)) => Err(error),
        }
    }

    fn pieces(
        &mut self,
        source: &dyn Source,
        part: &Part<'_>,
        to: &mut dyn Receiver,
    ) -> Result<(), Stop> {
        let Range { start: mut at, end: segment_end } = part.range;
        let mut run = Run { open: part.begins_with_data, ..Run::default() };
        let whole_from = round_up(at).min(segment_end);
        if whole_from > at {
            // The rest of a block whose front belongs to the piece before.
            run.end = (whole_from - at) as usize;
            source.read_at(self.buf.get_mut(..run.end).unwrap_or_default(), at)?;
            at = whole_from;
        }
        while at < segment_end {
            let data = source.next_data(at)?.filter(|data| data.start < segment_end);
            // Whole blocks only: a hole that ends within a block is read with it.
            let data_start = data.as_ref().map_or(segment_end, |d| round_down(d.start).max(at));
            let data_end = data.map_or(segment_end, |d| round_up(d.end).min(segment_end));
            self.zeros(&mut run, (data_start - at) as usize, to)?;
            at = data_start;
            // What the source knows to be read soon.
            let mut told = at;
            while at < data_end {
                let step = (part.step)(at);
                debug_assert!(step > 0 && step <= WINDOW_BYTES && step.is_multiple_of(BLOCK_BYTES));
                let want = (data_end - at).min(step as u64) as usize;
                if !part.at_once {
                    let soon = (at + 4 * step as u64).min(data_end);
                    source.will_read(told.max(at)..soon);
                    told = soon;
                }
                self.window(&mut run, source, at, want, part.at_once, to)?;
                at += want as u64;
            }
        }
        self.close(&mut run, to)?;
        emit_zeros(&mut run, to)
    }

    /// Takes `len` bytes of zeros that need not be read.
    fn zeros(&mut self, run: &mut Run, len: usize, to: &mut dyn Receiver) -> Result<(), Stop> {
        if run.open && run.zeros + len < ZERO_RUN_BYTES {
            let at = run.end + run.zeros;
            self.buf.get_mut(at..at + len).unwrap_or_default().fill(0);
        } else {
            self.close(run, to)?;
        }
        run.zeros += len;
        Ok(())
    }

    /// Reads and takes one window.
    fn window(
        &mut self,
        run: &mut Run,
        source: &dyn Source,
        at: u64,
        len: usize,
        at_once: bool,
        to: &mut dyn Receiver,
    ) -> Result<(), Stop> {
        let base = if run.open { run.end + run.zeros } else { 0 };
        let window = self.buf.get_mut(base..base + len).unwrap_or_default();
        debug_assert_eq!(window.len(), len);
        source.read_at(window, at)?;
        let mut offset = base;
        while offset < base + len {
            let block_len = BLOCK_BYTES.min(base + len - offset);
            let is_zero = is_zero(self.buf.get(offset..offset + block_len).unwrap_or_default());
            if is_zero {
                run.zeros += block_len;
                if run.open && run.zeros >= ZERO_RUN_BYTES {
                    self.close(run, to)?;
                }
            } else {
                if !run.open {
                    emit_zeros(run, to)?;
                    (run.open, run.start) = (true, offset);
                }
                (run.end, run.zeros) = (offset + block_len, 0);
            }
            offset += block_len;
        }
        if run.open {
            self.cut(run, false, at_once, to)?;
            // Make room at the end of the buffer.
            let live = run.start..run.end + run.zeros;
            self.buf.copy_within(live.clone(), 0);
            (run.start, run.end) = (0, run.end - live.start);
        }
        Ok(())
    }

    /// Ends the run of data, if there is one.
    fn close(&mut self, run: &mut Run, to: &mut dyn Receiver) -> Result<(), Stop> {
        if run.open {
            self.cut(run, true, false, to)?;
            run.open = false;
        }
        Ok(())
    }

    /// Cuts chunks from the run: all of it when it has `ended`, else while what follows can't change the cut.
    fn cut(
        &mut self,
        run: &mut Run,
        ended: bool,
        at_once: bool,
        to: &mut dyn Receiver,
    ) -> Result<(), Stop> {
        let least = if ended || at_once { 1 } else { self.max_chunk };
        let mut data = self.buf.get(run.start..run.end).unwrap_or_default();
        let mut chunks = Vec::with_capacity(to.chunks_at_once());
        while data.len() >= least {
            let known = to.known_cut(data);
            let len = known.unwrap_or_else(|| self.cutter.first(data));
            // A cut within the data stays where it is whatever follows; one at its end may not.
            if len == data.len() && !ended && len < self.max_chunk {
                break;
            }
            let (chunk, rest) = data.split_at_checked(len).unwrap_or((data, &[]));
            chunks.push(chunk);
            if chunks.len() >= to.chunks_at_once() {
                to.take_chunks(&chunks)?;
                chunks.clear();
            }
            run.start += chunk.len();
            data = rest;
        }
        to.take_chunks(&chunks)
    }
}

fn emit_zeros(run: &mut Run, to: &mut dyn Receiver) -> Result<(), Stop> {
    let zeros = std::mem::take(&mut run.zeros);
    if zeros > 0 { to.take(Piece::Zero(zeros as u32)) } else { Ok(()) }
}

pub(crate) fn round_down(offset: u64) -> u64 {
    offset / BLOCK_BYTES as u64 * BLOCK_BYTES as u64
}

pub(crate) fn round_up(offset: u64) -> u64 {
    offset.div_ceil(BLOCK_BYTES as u64) * BLOCK_BYTES as u64
}

/// True when every byte is zero. Most blocks that are not zero show it in their first bytes; the rest is compared
/// 64 bytes at a time, which compilers turn into vector instructions.
pub fn is_zero(block: &[u8]) -> bool {
    let (chunks, rest) = block.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |acc, byte| acc | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
