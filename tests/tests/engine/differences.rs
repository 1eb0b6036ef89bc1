//! Differences a part at a time, from any byte on.

use std::ops::Range;
use std::sync::Arc;

use petra_engine::Repository;
use petra_engine::diff::{Differences, diff};
use petra_engine::format::SEGMENT_BYTES;
use petra_engine::record::VolumeRecord;
use petra_engine::store::MemoryStore;
use petra_tests::lab::{context, init, take};
use petra_tests::recording::{Operation, Recording};
use petra_tests::volume::{Volume, noise};

/// More than one part holds.
const SEGMENTS: u64 = 80;

struct Lab {
    store: Arc<Recording>,
    repo: Repository,
    before: VolumeRecord,
    after: VolumeRecord,
}

/// Two volumes that differ in most segments, the second one longer.
async fn lab() -> Lab {
    let store = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(store.clone()).await;
    let mut volume = Volume::zeros(SEGMENTS * SEGMENT_BYTES);
    for segment in 0..SEGMENTS {
        volume.write(segment * SEGMENT_BYTES + 10_000, &noise(segment, 40_000));
    }
    let before = take(&repo, &volume).await.unwrap().volumes.remove(0);
    for segment in (0..SEGMENTS).filter(|segment| segment % 7 != 3) {
        volume.write(segment * SEGMENT_BYTES + 20_000, &noise(1000 + segment, 3_000));
    }
    // Across the border of two segments.
    volume.write(64 * SEGMENT_BYTES - 50_000, &noise(7, 100_000));
    volume.resize(SEGMENTS * SEGMENT_BYTES + 5_000_000);
    let after = take(&repo, &volume).await.unwrap().volumes.remove(0);
    store.reset();
    Lab { store, repo, before, after }
}

impl Lab {
    async fn from(&self, start: u64) -> Vec<Range<u64>> {
        let begun =
            Differences::begin(&self.repo, &self.before, &self.after, start, &context()).await;
        let (mut differences, mut all) = (begun.unwrap(), vec![]);
        while let Some(ranges) = differences.next().await.unwrap() {
            all.extend(ranges.into_iter().map(|range| range.start..range.end));
        }
        all
    }

    /// Requests for data since the last call.
    fn reads(&self) -> usize {
        let log = self.store.log();
        self.store.reset();
        log.iter().filter(|call| call.is(Operation::GetRange, "packs/")).count()
    }
}

#[tokio::test]
async fn parts_are_the_whole_from_any_byte_on() {
    let lab = lab().await;
    let whole = diff(&lab.repo, &lab.before, &lab.after, &context()).await.unwrap();
    let whole: Vec<_> = whole.ranges.iter().map(|range| range.start..range.end).collect();
    assert!(whole.len() as u64 > SEGMENTS / 2, "{whole:?}");
    assert!(whole.windows(2).all(|pair| pair[0].end < pair[1].start), "{whole:?}");
    assert!(whole.iter().any(|range| range.contains(&(64 * SEGMENT_BYTES))), "{whole:?}");
    assert_eq!(whole.last().unwrap().end, lab.after.len_bytes);
    let middle = whole[whole.len() / 2].start + 100;
    let ends = [lab.before.len_bytes, lab.after.len_bytes - 1, lab.after.len_bytes];
    for start in [0, 1, SEGMENT_BYTES, middle, 64 * SEGMENT_BYTES + 7].into_iter().chain(ends) {
        let rest = whole.iter().map(|range| range.start.max(start)..range.end);
        let rest: Vec<_> = rest.filter(|range| !range.is_empty()).collect();
        assert_eq!(lab.from(start).await, rest, "from {start}");
    }
}

#[tokio::test]
async fn what_is_not_wanted_is_not_read() {
    let lab = lab().await;
    // Leaves are read as they are asked for.
    let ctx = context();
    let mut differences =
        Differences::begin(&lab.repo, &lab.before, &lab.after, 0, &ctx).await.unwrap();
    let nodes = lab.reads();
    differences.next().await.unwrap().unwrap();
    let first = lab.reads();
    differences.next().await.unwrap().unwrap();
    let second = lab.reads();
    assert!(nodes > 0 && first > 0 && second > 0, "{nodes} {first} {second}");
    // Nor those before the first byte: the last segment that both have is in the second part.
    lab.from((SEGMENTS - 1) * SEGMENT_BYTES).await;
    assert!(lab.reads() <= nodes + second);
    lab.from(lab.before.len_bytes).await;
    assert_eq!(lab.reads(), nodes, "the rest is known without any leaf");
}
