//! Copying a file by reference while it is written, as live migration copies memory.
//!
//! FICLONE of an image with 300,000 extents takes seconds, in which all I/O to the image waits. So the image is copied in
//! pieces, between which writers go on. What was written since shows in the extent map: after a piece was copied, all of
//! its blocks are shared, and a write to a shared block goes to a new place. (Blocks that were holes, or allocated and
//! never written, are not in the copy's map, and in the image's once they are written.) So the pieces whose maps differ are
//! copied again, until only a few are left for the freeze, or it does not become better.
//!
//! Of each piece only a digest of its map is kept: memory is bounded by [`MAX_PIECES`].

use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};

use crate::sys::fiemap::{FiemapExtent, SYNC, fiemap};
use crate::sys::reflink;

/// The size of a piece: copying one that is badly fragmented takes some milliseconds.
const PIECE_BYTES: u64 = 4 << 20;
/// Larger images have larger pieces, so that there are not more than these.
const MAX_PIECES: u64 = 1 << 16;
/// With so few pieces left, the rest is for the freeze.
const FEW: usize = 4;
/// Rounds in which the number of pieces did not halve, after which it is for the freeze what is left.
const MAX_ROUNDS: usize = 10;

/// The map of a piece, in short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Map {
    /// All of it reads as zeros.
    Empty,
    /// Equal digests are equal places of all that was written.
    Placed([u8; 16]),
    /// Places say nothing about the data.
    Odd,
}

/// A copy in the making.
#[derive(Debug)]
pub(super) struct Precopy {
    live: File,
    copy: File,
    len_bytes: u64,
    piece_bytes: u64,
    /// The copy's map.
    maps: Vec<Map>,
}

impl Precopy {
    /// Copies all of `live` to `copy`, which is empty, and again what was written meanwhile.
    pub(super) fn begin(live: File, copy: File) -> io::Result<Self> {
        let len_bytes = live.metadata()?.len();
        copy.set_len(len_bytes)?;
        let piece_bytes =
            PIECE_BYTES.max(len_bytes.div_ceil(MAX_PIECES).next_multiple_of(PIECE_BYTES));
        let pieces = usize::try_from(len_bytes.div_ceil(piece_bytes)).unwrap_or(usize::MAX);
        let maps = vec![Map::Empty; pieces];
        let mut precopy = Self { live, copy, len_bytes, piece_bytes, maps };
        let mut before = usize::MAX;
        for _ in 0..MAX_ROUNDS {
            let differing = precopy.differing()?;
            for piece in &differing {
                precopy.copy_piece(*piece)?;
            }
            if differing.len() <= FEW || differing.len() > before / 2 {
                break;
            }
            before = differing.len();
        }
        Ok(precopy)
    }

    /// Copies what is left, while nobody writes.
    pub(super) fn finish_frozen(&mut self) -> io::Result<()> {
        self.check_length()?;
        for piece in self.differing()? {
            let range = self.range(piece);
            reflink::clone_range(&self.live, &self.copy, range)?;
        }
        Ok(())
    }

    /// Copies everything again at one point in time, for which writers wait. What has the same place already is passed over
    /// by the kernel.
    pub(super) fn finish_at_once(&mut self) -> io::Result<()> {
        self.check_length()?;
        reflink::clone_file(&self.live, &self.copy)
    }

    /// The copy.
    pub(super) fn copy(&self) -> &File {
        &self.copy
    }

    fn check_length(&self) -> io::Result<()> {
        let now = self.live.metadata()?.len();
        if now == self.len_bytes {
            return Ok(());
        }
        let was = self.len_bytes;
        Err(io::Error::other(format!("the image had {was} bytes, and now it has {now}")))
    }

    fn range(&self, piece: usize) -> Range<u64> {
        let start = (piece as u64).saturating_mul(self.piece_bytes);
        start..start.saturating_add(self.piece_bytes).min(self.len_bytes)
    }

    fn copy_piece(&mut self, piece: usize) -> io::Result<()> {
        let range = self.range(piece);
        reflink::clone_range(&self.live, &self.copy, range.clone())?;
        let mut map = Map::Empty;
        read_maps(&self.copy, range, self.piece_bytes, |_, found| map = found)?;
        if let Some(kept) = self.maps.get_mut(piece) {
            *kept = map;
        }
        Ok(())
    }

    /// The pieces that may differ.
    fn differing(&self) -> io::Result<Vec<usize>> {
        let mut differing = vec![];
        let mut next = 0;
        let mut compare = |piece: usize, map: Map| {
            if map == Map::Odd || self.maps.get(piece) != Some(&map) {
                differing.push(piece);
            }
        };
        read_maps(&self.live, 0..self.len_bytes, self.piece_bytes, |piece, map| {
            (next..piece).for_each(|hole| compare(hole, Map::Empty));
            compare(piece, map);
            next = piece + 1;
        })?;
        (next..self.maps.len()).for_each(|hole| compare(hole, Map::Empty));
        Ok(differing)
    }
}

/// Gives the maps of the pieces that a range consists of, in order, without those that are empty.
fn read_maps(
    file: &File,
    range: Range<u64>,
    piece_bytes: u64,
    mut each: impl FnMut(usize, Map),
) -> io::Result<()> {
    let mut open = Open::default();
    fiemap(file, range.clone(), SYNC, |extent| {
        if extent.is_unwritten() && extent.is_plain() {
            return ControlFlow::Continue(());
        }
        let end = extent.logical.saturating_add(extent.length).min(range.end);
        let mut at = extent.logical.max(range.start);
        while at < end {
            let piece = at / piece_bytes;
            let until = end.min((piece + 1).saturating_mul(piece_bytes));
            let piece = usize::try_from(piece).unwrap_or(usize::MAX);
            if piece != open.piece {
                open.close(&mut each);
                open.piece = piece;
            }
            open.add(&extent, at..until);
            at = until;
        }
        ControlFlow::Continue(())
    })?;
    open.close(&mut each);
    Ok(())
}

/// The piece whose extents are coming.
#[derive(Default)]
struct Open {
    piece: usize,
    is_odd: bool,
    /// What is not hashed yet, since the next extent may go on with it: its range, and its place.
    last: Option<(Range<u64>, u64)>,
    hasher: blake3::Hasher,
    is_begun: bool,
}

impl Open {
    fn add(&mut self, extent: &FiemapExtent, range: Range<u64>) {
        self.is_begun = true;
        if !extent.is_plain() {
            self.is_odd = true;
            return;
        }
        let place = extent.physical.wrapping_add(range.start.wrapping_sub(extent.logical));
        if let Some((before, first)) = &mut self.last
            && before.end == range.start
            && first.wrapping_add(before.end.wrapping_sub(before.start)) == place
        {
            // One extent is told as several where a part of it has more owners.
            before.end = range.end;
            return;
        }
        self.flush();
        self.last = Some((range, place));
    }

    fn flush(&mut self) {
        if let Some((range, place)) = self.last.take() {
            for number in [range.start, range.end, place] {
                self.hasher.update(&number.to_le_bytes());
            }
        }
    }

    fn close(&mut self, each: &mut impl FnMut(usize, Map)) {
        if !self.is_begun {
            return;
        }
        self.flush();
        let mut digest = [0; 16];
        self.hasher.finalize_xof().fill(&mut digest);
        each(self.piece, if self.is_odd { Map::Odd } else { Map::Placed(digest) });
        *self = Self::default();
    }
}
