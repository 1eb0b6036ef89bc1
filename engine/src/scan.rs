//! Splits one segment of a source into zeros and chunks, through a small window.
//!
//! The rule, which is part of the format (docs/format.md): a *zero run* is a sequence of all-zero blocks of
//! 4 KiB, aligned to the segment. A run of at least [`ZERO_RUN_BYTES`], or one that begins or ends the segment, is
//! an extent of zeros. What lies between is cut into chunks, beginning anew after each extent of zeros. The result depends on
//! the bytes alone: not on holes, window or buffer sizes.
//!
//! The window is small so that data is still in the processor's cache when it is hashed and compressed.

use crate::chunker::Cutter;
use crate::error::Result;
use crate::format::{BLOCK_BYTES, SEGMENT_BYTES, ZERO_RUN_BYTES};
use crate::source::Source;

/// Bytes read at once.
const WINDOW_BYTES: usize = 512 << 10;

/// What a segment is made of, in address order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Zeros, never two in a row.
    Zero(u32),
    /// One chunk's bytes.
    Chunk(&'a [u8]),
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
        let segment_end = start + len;
        let mut run = Run::default();
        let mut at = start;
        while at < segment_end {
            let data = source.next_data(at)?.filter(|data| data.start < segment_end);
            // Whole blocks only: a hole that ends within a block is read with it.
            let data_start = data.as_ref().map_or(segment_end, |d| round_down(d.start).max(at));
            let data_end = data.map_or(segment_end, |d| round_up(d.end).min(segment_end));
            self.zeros(&mut run, (data_start - at) as usize, sink)?;
            at = data_start;
            while at < data_end {
                let want = (data_end - at).min(WINDOW_BYTES as u64) as usize;
                source.will_read(at..(at + 4 * WINDOW_BYTES as u64).min(data_end));
                self.window(&mut run, source, at, want, sink)?;
                at += want as u64;
            }
        }
        self.close(&mut run, sink)?;
        emit_zeros(&mut run, sink)
    }

    /// Takes `len` bytes of zeros that need not be read.
    fn zeros(
        &mut self,
        run: &mut Run,
        len: usize,
        sink: &mut dyn FnMut(Piece<'_>) -> Result<()>,
    ) -> Result<()> {
        if run.open && run.zeros + len < ZERO_RUN_BYTES {
            let at = run.end + run.zeros;
            self.buf.get_mut(at..at + len).unwrap_or_default().fill(0);
        } else {
            self.close(run, sink)?;
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
        sink: &mut dyn FnMut(Piece<'_>) -> Result<()>,
    ) -> Result<()> {
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
                    self.close(run, sink)?;
                }
            } else {
                if !run.open {
                    emit_zeros(run, sink)?;
                    (run.open, run.start) = (true, offset);
                }
                (run.end, run.zeros) = (offset + block_len, 0);
            }
            offset += block_len;
        }
        if run.open {
            self.cut(run, false, sink)?;
            // Make room at the end of the buffer.
            let live = run.start..run.end + run.zeros;
            self.buf.copy_within(live.clone(), 0);
            (run.start, run.end) = (0, run.end - live.start);
        }
        Ok(())
    }

    /// Ends the run of data, if there is one.
    fn close(
        &mut self,
        run: &mut Run,
        sink: &mut dyn FnMut(Piece<'_>) -> Result<()>,
    ) -> Result<()> {
        if run.open {
            self.cut(run, true, sink)?;
            run.open = false;
        }
        Ok(())
    }

    /// Cuts chunks from the run: all of it when it has `ended`, else while what follows can't change the cut.
    fn cut(
        &mut self,
        run: &mut Run,
        ended: bool,
        sink: &mut dyn FnMut(Piece<'_>) -> Result<()>,
    ) -> Result<()> {
        let least = if ended { 1 } else { self.max_chunk };
        while run.end - run.start >= least {
            let data = self.buf.get(run.start..run.end).unwrap_or_default();
            let len = self.cutter.first(data);
            sink(Piece::Chunk(data.get(..len).unwrap_or_default()))?;
            run.start += len;
        }
        Ok(())
    }
}

fn emit_zeros(run: &mut Run, sink: &mut dyn FnMut(Piece<'_>) -> Result<()>) -> Result<()> {
    let zeros = std::mem::take(&mut run.zeros);
    if zeros > 0 { sink(Piece::Zero(zeros as u32)) } else { Ok(()) }
}

fn round_down(offset: u64) -> u64 {
    offset / BLOCK_BYTES as u64 * BLOCK_BYTES as u64
}

fn round_up(offset: u64) -> u64 {
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
