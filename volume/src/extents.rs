//! Where the bytes of a file lie on its file system, and what differs between two files that share extents.
//!
//! A copy by reference shares all extents with its original. What is written to the original later goes elsewhere, so
//! bytes that two files have in common are those that lie at the same place for both. The kernel tells (FIEMAP, or the
//! tree of a btrfs itself, which is several times as fast), and nothing of the files needs to be read. This holds as long as both files are there and neither is written: a place
//! that a file refers to is not used for anything else.
//!
//! Only a plain extent at a known place can be the same as another. Holes and extents that were allocated but never
//! written both read as zeros, so they are the same as each other. Whatever else the kernel may say (delayed, inline,
//! compressed, unaligned, unknown) counts as different from everything.
//!
//! A map is read in windows, so that memory does not depend on how fragmented a file is.

use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};

use crate::sys::btrfs;
use crate::sys::fiemap::{self, FiemapExtent, fiemap};

/// Bytes of a file that lie somewhere as one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stretch {
    range: Range<u64>,
    /// The place of its first byte; none where it can't be relied on.
    place: Option<u64>,
}

/// Where the bytes of a range of a file lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentMap {
    range: Range<u64>,
    /// Ascending. What is between them are zeros.
    stretches: Vec<Stretch>,
}

impl ExtentMap {
    /// Reads the map of a range of a file. Fails where the kernel does, or gives an answer that makes no sense.
    pub fn read(file: &File, range: Range<u64>) -> io::Result<Self> {
        if btrfs::is_on(file)? {
            let mut map = Self { range: range.clone(), stretches: Vec::new() };
            match btrfs::file_extents(file, range.clone(), |extent| map.add(&extent)) {
                Ok(()) => return Ok(map),
                // That is for root alone.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                Err(error) => return Err(error),
            }
        }
        Self::from_fiemap(file, range)
    }

    /// The same by FIEMAP on every file system.
    #[doc(hidden)]
    pub fn from_fiemap(file: &File, range: Range<u64>) -> io::Result<Self> {
        let mut map = Self { range: range.clone(), stretches: Vec::new() };
        fiemap(file, range, fiemap::SYNC, |extent| {
            map.add(&extent);
            ControlFlow::Continue(())
        })?;
        Ok(map)
    }

    /// The map that extents make, which are in the order of the file.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn of(range: Range<u64>, extents: impl IntoIterator<Item = FiemapExtent>) -> Self {
        let mut map = Self { range, stretches: Vec::new() };
        extents.into_iter().for_each(|extent| map.add(&extent));
        map
    }

    fn add(&mut self, extent: &FiemapExtent) {
        let end = extent.logical.saturating_add(extent.length).min(self.range.end);
        let start = extent.logical.max(self.range.start);
        let is_plain = extent.is_plain();
        if start >= end || is_plain && extent.is_unwritten() {
            return;
        }
        // One that would lie behind the end of all addresses lies nowhere.
        let is_placed = is_plain && extent.physical.checked_add(end - extent.logical).is_some();
        let place = is_placed.then(|| extent.physical + (start - extent.logical));
        let overlaps = self.stretches.last().is_some_and(|last| last.range.end > start);
        if overlaps {
            // The file is being changed. All from here on is as good as unknown.
            let start = self.stretches.last().map_or(start, |last| last.range.start);
            self.stretches.pop();
            self.stretches.push(Stretch { range: start..self.range.end, place: None });
            return;
        }
        self.stretches.push(Stretch { range: start..end, place });
    }
}

/// The ranges in which two maps of the same range of two files differ, ascending and apart from each other. All bytes
/// outside of them are the same in both files.
pub fn differing(a: &ExtentMap, b: &ExtentMap) -> Vec<Range<u64>> {
    let mut found = Vec::new();
    if a.range != b.range {
        add(&mut found, a.range.start.min(b.range.start)..a.range.end.max(b.range.end));
        return found;
    }
    let (mut left, mut right) = (Cursor::new(&a.stretches), Cursor::new(&b.stretches));
    let mut at = a.range.start;
    while at < a.range.end {
        let (here, left_end) = left.at(at, a.range.end);
        let (there, right_end) = right.at(at, a.range.end);
        let end = left_end.min(right_end);
        if here == Place::Unknown || here != there {
            add(&mut found, at..end);
        }
        at = end;
    }
    found
}

/// Joins ranges that touch.
fn add(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
        _ => ranges.push(range),
    }
}

/// What is at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Zeros,
    At(u64),
    Unknown,
}

/// Goes through the stretches of a map.
struct Cursor<'a> {
    stretches: &'a [Stretch],
}

impl<'a> Cursor<'a> {
    fn new(stretches: &'a [Stretch]) -> Self {
        Self { stretches }
    }

    /// What is at an address, and up to where. Addresses ascend.
    fn at(&mut self, at: u64, end: u64) -> (Place, u64) {
        while let Some((first, rest)) = self.stretches.split_first() {
            if first.range.end > at {
                if first.range.start > at {
                    return (Place::Zeros, first.range.start);
                }
                let place = first.place.map(|place| Place::At(place + (at - first.range.start)));
                return (place.unwrap_or(Place::Unknown), first.range.end);
            }
            self.stretches = rest;
        }
        (Place::Zeros, end)
    }
}

#[cfg(test)]
#[path = "extents_tests.rs"]
mod tests;
