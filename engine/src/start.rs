//! Start lists: what of a volume is read when it is mounted, so that the next clone fetches that first and at once.
//!
//! A mount reads some dozens of blocks, each where the one before said: a superblock, group descriptors, a journal.
//! One after the other over a network they take a second; known beforehand, one round trip. A start list is a hint
//! (docs/format.md): whoever mounts first writes it, and nothing but time is lost without it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::id::SnapshotId;
use crate::key::Key;
use crate::record::kind;
use crate::repository::Repository;

/// Ranges of one list: a mount needs some dozens.
const MAX_RANGES: usize = 4096;
/// Bytes of all ranges together: what is read later is not what a mount needs.
const MAX_BYTES: u64 = 16 << 20;
/// Neighbours closer than this are one range: fetching needs whole frames anyway.
const NEAR_BYTES: u64 = 64 << 10;

/// What of a volume is read first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct StartList(Vec<Range<u64>>);

/// The list as it is stored: offset and length, in bytes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    ranges: Vec<(u64, u64)>,
}

impl StartList {
    /// Makes a list from what was read, in any order. Of too many ranges, those read first stay.
    pub fn new(read: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut bytes = 0;
        let fits = |range: &Range<u64>| {
            bytes += range.end - range.start;
            bytes <= MAX_BYTES
        };
        let read = read.into_iter().filter(|range| !range.is_empty());
        let mut ranges: Vec<_> = read.take(MAX_RANGES).take_while(fits).collect();
        ranges.sort_by_key(|range| range.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.start <= last.end.saturating_add(NEAR_BYTES) => {
                    last.end = last.end.max(range.end);
                }
                _ => merged.push(range),
            }
        }
        Self(merged)
    }

    /// Disjoint ranges of bytes, ascending.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.0
    }
}

impl From<StartList> for Stored {
    fn from(list: StartList) -> Self {
        Self { ranges: list.0.iter().map(|range| (range.start, range.end - range.start)).collect() }
    }
}

impl TryFrom<Stored> for StartList {
    type Error = &'static str;

    fn try_from(stored: Stored) -> Result<Self, Self::Error> {
        let range = |(start, len): (u64, u64)| {
            start.checked_add(len).map(|end| start..end).ok_or("a range ends beyond 2^64")
        };
        let ranges: Vec<_> = stored.ranges.into_iter().map(range).collect::<Result<_, _>>()?;
        Ok(Self::new(ranges))
    }
}

impl Repository {
    /// What a mount of a snapshot's `number`-th volume (from 1) reads first, if somebody wrote that down. A list that can't
    /// be read counts as none.
    pub async fn start_list(&self, snapshot: SnapshotId, number: u32) -> Result<Option<StartList>> {
        let key = Key::start(snapshot, number);
        match self.store().get(&key).await {
            Ok(body) => Ok(self.unseal(kind::START, &key, &body).ok()),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes down what a mount of a snapshot's `number`-th volume reads first. The first list stays.
    pub async fn put_start_list(
        &self,
        snapshot: SnapshotId,
        number: u32,
        list: &StartList,
    ) -> Result<()> {
        let key = Key::start(snapshot, number);
        self.store().create(&key, self.seal(kind::START, &key, list)?).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_neighbours_and_keeps_the_first() {
        let list = StartList::new([4096..8192, 0..4096, 1 << 20..1 << 21, 70_000..71_000, 5..5]);
        assert_eq!(list.ranges(), [0..71_000, 1 << 20..1 << 21]);
        let many = (0..10_000_u64).rev().map(|n| n << 20..(n << 20) + 1);
        let list = StartList::new(many);
        assert_eq!(list.ranges().len(), MAX_RANGES);
        assert_eq!(list.ranges().last(), Some(&(9_999 << 20..(9_999 << 20) + 1)));
    }

    #[test]
    fn reads_what_it_writes_and_refuses_the_impossible() {
        let list = StartList::new([0..10, 1 << 40..(1 << 40) + 4096, 0..1 << 24]);
        let text = serde_json::to_string(&list).unwrap();
        assert_eq!(text, r#"{"ranges":[[0,10],[1099511627776,4096]]}"#);
        assert_eq!(serde_json::from_str::<StartList>(&text).unwrap(), list);
        assert!(
            serde_json::from_str::<StartList>(r#"{"ranges":[[18446744073709551615,2]]}"#).is_err()
        );
    }
}
