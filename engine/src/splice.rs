//! Makes a segment from the parent's leaf and the ranges that have changed since, reading little more than those.
//!
//! The pieces are those of a scan of the whole segment. That rests on the following.
//!
//! An extent `p..q` of the parent's leaf is also a piece of the new segment if `p` is a boundary between two of the
//! new pieces and nothing has changed from the start of the block of `p` to [`AHEAD_BYTES`] behind `q`, or to the end
//! of the segment. For then:
//!
//! - *Zeros* `p..q`: the run of zero blocks from `p` ends at `q` as before, since the block at `q` is as before. A
//!   longer run that began before `p` would be one extent, and `p` no boundary.
//! - *A chunk*: no run of zeros begins at `p` that is an extent of zeros, since its first four blocks, or all up to the
//!   end of the segment, are as before, and were no such extent. The block of `p` belongs to data, else `p` were no
//!   boundary. So a chunk begins at `p`, and where it ends depends on the bytes from `p` on, up to the next extent of
//!   zeros.
//!   - If zeros, or the end of the segment, followed at `q`, they still do: the data ends where it did, with the same
//!     bytes.
//!   - If another chunk followed, `q` was cut within the data, which takes the bytes up to `q + 2` to see
//!     ([`Cutter::first`](crate::chunker::Cutter::first)). They are as before, and the data still goes as far: zeros
//!     that now began before `q + 2` would have their first four blocks, or all up to the end of the segment, in
//!     the range that has not changed, and would have been there before.
//!
//! `0` is a boundary, and so is the end of each piece that was taken or scanned. Where an extent can't be taken, the
//! scanner goes on from its start `p`. It needs to know no byte before `p`: either `p` is `0`, or the extent before was
//! taken, so that nothing has changed up to [`AHEAD_BYTES`] behind `p`. Then a chunk begins at `p` if one did in the
//! parent; and zero blocks around that place are a run as short as in the parent, all of them data. The scanner stops
//! at the first boundary that is one of the parent's too, and whose extent can be taken.

use std::collections::VecDeque;
use std::ops::Range;

use crate::crypto::Keys;
use crate::error::Result;
use crate::format::leaf::Extent;
use crate::format::{BLOCK_BYTES, ZERO_RUN_BYTES};
use crate::scan::{Part, Piece, Receiver, Scanner, Stop, WINDOW_BYTES, round_down, round_up};
use crate::source::Source;

/// What must be unchanged behind an extent: a run of zeros, and a block for the two bytes that a cut looks at.
const AHEAD_BYTES: u64 = (ZERO_RUN_BYTES + BLOCK_BYTES) as u64;
/// Bytes behind a cut within which it shows.
const SEEN_BYTES: usize = 2;
/// Old chunks that are compared together.
const CHUNKS_AT_ONCE: usize = 32;
/// Bytes read at once where the old and the new pieces are expected to meet: about two chunks.
const STEP_BYTES: u64 = 32 << 10;

/// A piece of a spliced segment.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Spliced<'a> {
    /// An extent of the parent's leaf.
    Kept(Extent),
    /// A piece that was scanned.
    Scanned(Piece<'a>),
}

/// Which parts of a segment have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Ascending, apart from each other, not empty.
    ranges: Vec<Range<u64>>,
}

impl Changes {
    /// Takes ranges in any order; what is outside of the segment does not count.
    pub fn within(segment: &Range<u64>, mut ranges: Vec<Range<u64>>) -> Self {
        for range in &mut ranges {
            *range = range.start.max(segment.start)..range.end.min(segment.end);
        }
        ranges.retain(|range| !range.is_empty());
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.dedup_by(|next, last| {
            let joined = next.start <= last.end;
            if joined {
                last.end = last.end.max(next.end);
            }
            joined
        });
        Self { ranges }
    }

    /// True when nothing has changed.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The changes that end after an address.
    fn after(&self, at: u64) -> &[Range<u64>] {
        let first = self.ranges.partition_point(|range| range.end <= at);
        self.ranges.get(first..).unwrap_or_default()
    }

    /// The first change that ends after an address.
    fn next(&self, at: u64) -> Option<&Range<u64>> {
        self.after(at).first()
    }

    fn touches(&self, range: Range<u64>) -> bool {
        self.next(range.start).is_some_and(|change| change.start < range.end)
    }

    /// How many bytes to read from `at` on: the changes that are near, and a little more.
    fn step(&self, at: u64) -> usize {
        let mut until = at;
        for change in self.after(at) {
            if change.start >= until + 2 * STEP_BYTES || until >= at + WINDOW_BYTES as u64 {
                break;
            }
            until = change.end;
        }
        round_up(until - at + STEP_BYTES).min(WINDOW_BYTES as u64) as usize
    }
}

/// Calls `sink` for every piece of a segment, which was `before` in the parent. All bytes outside of `changes` are the
/// same as there.
pub(crate) fn splice(
    scanner: &mut Scanner,
    source: &dyn Source,
    segment: Range<u64>,
    before: &[Extent],
    changes: &Changes,
    sink: &mut dyn FnMut(Spliced<'_>) -> Result<()>,
) -> Result<()> {
    let source = KnownZeros::new(source, segment.start, before, changes);
    let mut old = Old { segment: &segment, changes, extents: before, at: segment.start };
    let mut at = segment.start;
    while at < segment.end {
        if old.can_take(at)
            && let Some(extent) = old.advance()
        {
            sink(Spliced::Kept(extent))?;
            at = old.at;
            continue;
        }
        let begins_with_data =
            at > segment.start && matches!(old.extents.first(), Some(Extent::Chunk(_)));
        let part = Part {
            range: at..segment.end,
            begins_with_data,
            step: &|at| changes.step(at),
            at_once: true,
        };
        scanner.scan_part(&source, &part, &mut |piece: Piece<'_>| {
            sink(Spliced::Scanned(piece))?;
            at += piece.len_bytes();
            old.seek(at);
            if old.can_take(at) { Err(Stop::Enough) } else { Ok(()) }
        })?;
    }
    Ok(())
}

/// Calls `sink` for every piece of a segment, which was `before` in the parent, and of which all bytes are read. Where
/// the bytes of an old chunk are still in its place it is the next piece, and no cut is looked for.
///
/// That holds for a chunk behind which another one followed: it was cut within the data, and the same bytes are cut
/// there again, as long as the two bytes are there that show it ([`Cutter::first`](crate::chunker::Cutter::first)).
pub(crate) fn compare(
    scanner: &mut Scanner,
    source: &dyn Source,
    segment: Range<u64>,
    before: &[Extent],
    keys: &Keys,
    sink: &mut dyn FnMut(Spliced<'_>) -> Result<()>,
) -> Result<()> {
    let changes = Changes { ranges: vec![] };
    let at = segment.start;
    let old = Old { segment: &segment, changes: &changes, extents: before, at };
    let known = VecDeque::new();
    let mut comparison = Comparison { old, keys, at, known, same: None, sink };
    scanner.scan_knowing(source, segment.clone(), &mut comparison)
}

/// Receives the pieces of a segment that is compared with what it was.
struct Comparison<'a> {
    old: Old<'a>,
    keys: &'a Keys,
    /// Where the next piece begins.
    at: u64,
    /// Where old chunks begin, and whether the same bytes are in their places now.
    known: VecDeque<(u64, bool)>,
    /// The next piece, if it is an old one.
    same: Option<Extent>,
    sink: &'a mut dyn FnMut(Spliced<'_>) -> Result<()>,
}

impl Receiver for Comparison<'_> {
    fn take(&mut self, piece: Piece<'_>) -> Result<(), Stop> {
        self.at += piece.len_bytes();
        let spliced = self.same.take().map_or(Spliced::Scanned(piece), Spliced::Kept);
        Ok((self.sink)(spliced)?)
    }

    fn known_cut(&mut self, data: &[u8]) -> Option<usize> {
        self.old.seek(self.at);
        let old = *self.old.extents.first().filter(|_| self.old.at == self.at)?;
        while self.known.front().is_some_and(|(at, _)| *at < self.at) {
            self.known.pop_front();
        }
        if self.known.front().is_none_or(|(at, _)| *at > self.at) {
            self.look_at(data);
        }
        let (_, is_same) = self.known.pop_front().filter(|(at, _)| *at == self.at)?;
        self.same = is_same.then_some(old);
        is_same.then_some(old.len_bytes() as usize)
    }
}

impl Comparison<'_> {
    /// Compares old chunks with what is in their places, the first of them with the beginning of `data`.
    fn look_at(&mut self, data: &[u8]) {
        self.known.clear();
        let (mut chunks, mut ids) = (Vec::with_capacity(CHUNKS_AT_ONCE), vec![]);
        let (mut at, mut rest) = (self.at, data);
        for pair in self.old.extents.windows(2).take(CHUNKS_AT_ONCE) {
            let [Extent::Chunk(chunk), Extent::Chunk(_)] = pair else { break };
            let Some((bytes, behind)) = rest.split_at_checked(chunk.len as usize) else { break };
            if behind.len() < SEEN_BYTES {
                break;
            }
            chunks.push(bytes);
            ids.push((at, chunk.id));
            at += u64::from(chunk.len);
            rest = behind;
        }
        let found = self.keys.chunk_ids(&chunks);
        self.known.extend(ids.into_iter().zip(found).map(|((at, id), found)| (at, found == id)));
    }
}

/// The extents of the parent's leaf from an address on.
#[derive(Debug)]
struct Old<'a> {
    segment: &'a Range<u64>,
    changes: &'a Changes,
    extents: &'a [Extent],
    /// Where the first of them begins.
    at: u64,
}

impl Old<'_> {
    /// Goes to the first extent that begins at or after an address.
    fn seek(&mut self, at: u64) {
        while self.at < at && self.advance().is_some() {}
    }

    fn advance(&mut self) -> Option<Extent> {
        let (first, rest) = self.extents.split_first()?;
        self.at += u64::from(first.len_bytes());
        self.extents = rest;
        Some(*first)
    }

    /// True when the first extent begins at a boundary `at` of the new pieces and is one of them.
    fn can_take(&self, at: u64) -> bool {
        let Some(extent) = self.extents.first().filter(|_| self.at == at) else { return false };
        let end = at + u64::from(extent.len_bytes());
        let seen = (end + AHEAD_BYTES).min(self.segment.end);
        end <= self.segment.end && !self.changes.touches(round_down(at)..seen)
    }
}

/// A source that need not be read where the parent had zeros that have not changed.
#[derive(Debug)]
struct KnownZeros<'a> {
    source: &'a dyn Source,
    /// Ascending.
    zeros: Vec<Range<u64>>,
}

impl<'a> KnownZeros<'a> {
    fn new(source: &'a dyn Source, start: u64, before: &[Extent], changes: &Changes) -> Self {
        let (mut at, mut zeros) = (start, Vec::new());
        for extent in before {
            let end = at + u64::from(extent.len_bytes());
            if let Extent::Zero { .. } = extent {
                for change in changes.after(at).iter().take_while(|change| change.start < end) {
                    zeros.push(at..change.start.max(at));
                    at = change.end;
                }
                zeros.push(at..end.max(at));
            }
            at = end;
        }
        zeros.retain(|range| !range.is_empty());
        Self { source, zeros }
    }
}

impl Source for KnownZeros<'_> {
    fn len_bytes(&self) -> u64 {
        self.source.len_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.source.read_at(buf, offset)
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        let mut from = from;
        loop {
            let Some(data) = self.source.next_data(from)? else { return Ok(None) };
            let next = self.zeros.partition_point(|zeros| zeros.end <= data.start);
            match self.zeros.get(next) {
                Some(zeros) if zeros.start <= data.start => from = zeros.end,
                Some(zeros) => return Ok(Some(data.start..data.end.min(zeros.start))),
                None => return Ok(Some(data)),
            }
        }
    }

    fn will_read(&self, range: Range<u64>) {
        self.source.will_read(range);
    }

    fn check_unchanged(&self) -> Result<()> {
        self.source.check_unchanged()
    }
}

#[cfg(test)]
#[path = "splice_tests.rs"]
mod tests;
