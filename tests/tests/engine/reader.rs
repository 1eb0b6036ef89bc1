//! Random access to stored volumes.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use petra_engine::ErrorKind;
use petra_engine::reader::{Piece, Reading, Stretch, VolumeReader};
use petra_engine::record::VolumeRecord;
use petra_engine::store::{MemoryStore, StoreErrorCause};
use petra_tests::lab::{context, init, init_encrypted, objects, take};
use petra_tests::recording::{Fate, Recording};
use petra_tests::volume::{Volume, noise, prose};
use proptest::prelude::*;

use super::runtime;

const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;

struct Stored {
    memory: Arc<MemoryStore>,
    store: Arc<Recording>,
    repo: petra_engine::Repository,
    record: VolumeRecord,
}

async fn store(volume: &Volume, encrypted: bool) -> Stored {
    let memory = Arc::new(MemoryStore::new());
    let store = Recording::new(memory.clone());
    let repo = if encrypted {
        init_encrypted(store.clone(), &context()).await
    } else {
        init(store.clone()).await
    };
    let taken = take(&repo, volume).await.unwrap();
    store.reset();
    Stored { memory, store, repo, record: taken.volumes[0].clone() }
}

impl Stored {
    fn open(&self) -> VolumeReader {
        VolumeReader::open(&self.repo, &self.record, &context()).unwrap()
    }
}

/// Checks that pieces are whole blocks of the volume, in order, and gives how many bytes of a range they cover.
fn check(pieces: &[Piece], volume: &Volume, range: &std::ops::Range<u64>) -> u64 {
    let (mut last, mut covered) = (0, 0);
    for piece in pieces {
        let held = piece.range();
        assert!(held.start >= last && !held.is_empty(), "{held:?} after {last}");
        assert!(held.start % BLOCK == 0, "{held:?}");
        assert!(held.end % BLOCK == 0 || held.end == volume.len(), "{held:?}");
        let expected = volume.read(held.clone());
        match piece {
            Piece::Zeros(_) => assert!(expected.iter().all(|byte| *byte == 0), "{held:?}"),
            Piece::Data { bytes, .. } => assert!(*bytes == expected, "{held:?}"),
        }
        covered += held.end.min(range.end).saturating_sub(held.start.max(range.start));
        last = held.end;
    }
    covered
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_range_is_what_the_snapshot_has(
        seed: u32,
        parts in prop::collection::vec((0..70 * MIB, 1..2_000_000_usize, any::<bool>()), 0..6),
        len in 60 * MIB..70 * MIB,
        reads in prop::collection::vec((0..70 * MIB, 1..3 * MIB), 1..8),
        encrypted: bool,
    ) {
        let mut volume = Volume::zeros(len);
        for (n, (at, len, is_noise)) in parts.into_iter().enumerate() {
            let seed = u64::from(seed) + n as u64;
            volume.write(at, &if is_noise { noise(seed, len) } else { prose(seed, len) });
        }
        runtime().block_on(async {
            let stored = store(&volume, encrypted).await;
            let reader = stored.open();
            for (start, len) in reads {
                let range = start.min(volume.len())..(start + len).min(volume.len());
                let reading = reader.read(range.clone()).await.unwrap();
                assert!(reading.damaged.is_empty());
                let covered = check(&reading.pieces, &volume, &range);
                assert_eq!(covered, range.end - range.start, "of {range:?}");
            }
        });
    }
}

/// Reads some ranges as a stretch, and gives what came in order.
async fn read_stretch(reader: &VolumeReader, ranges: &[Range<u64>]) -> Reading {
    let Stretch { known: mut all, portions } = reader.stretch(ranges).await.unwrap();
    // Backwards: the order is the caller's.
    for portion in portions.iter().rev() {
        let Reading { pieces, damaged } = reader.read_portion(portion).await.unwrap();
        all.pieces.extend(pieces);
        all.damaged.extend(damaged);
    }
    all.pieces.sort_by_key(|piece| piece.range().start);
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_stretch_is_what_the_snapshot_has(
        seed: u32,
        parts in prop::collection::vec((0..140 * MIB, 1..9_000_000_usize, any::<bool>()), 0..6),
        len in 120 * MIB..140 * MIB,
        cuts in prop::collection::btree_set(0..140 * MIB / BLOCK, 0..7),
    ) {
        let mut volume = Volume::zeros(len);
        for (n, (at, len, is_noise)) in parts.into_iter().enumerate() {
            let seed = u64::from(seed) + n as u64;
            volume.write(at, &if is_noise { noise(seed, len) } else { prose(seed, len) });
        }
        let cuts: Vec<u64> = cuts.into_iter().map(|cut| (cut * BLOCK).min(len)).collect();
        let ranges: Vec<Range<u64>> = cuts.chunks_exact(2).map(|cut| cut[0]..cut[1]).collect();
        runtime().block_on(async {
            let stored = store(&volume, false).await;
            let reader = stored.open();
            let reading = read_stretch(&reader, &ranges).await;
            assert!(reading.damaged.is_empty());
            for range in ranges {
                let covered = check(&reading.pieces, &volume, &range);
                assert_eq!(covered, range.end - range.start, "of {range:?}");
            }
        });
    }
}

#[tokio::test]
async fn a_stretch_makes_few_requests_and_loses_what_is_damaged() {
    let volume = Volume::noise(1, 130 << 20);
    let stored = store(&volume, false).await;
    let reader = stored.open();
    let all = 0..volume.len();
    let reading = read_stretch(&reader, std::slice::from_ref(&all)).await;
    assert_eq!(check(&reading.pieces, &volume, &all), volume.len());
    let requests = stored.store.log().len();
    assert!(requests <= 4 + 130 / 4, "{requests} requests for 130 MiB");

    let packs = objects(stored.repo.store(), "packs/").await;
    let largest = packs.iter().max_by_key(|pack| pack.len).unwrap();
    stored.memory.damage(&largest.key, |mut body| {
        body[3_000_000] ^= 1;
        Some(body)
    });
    let reading = read_stretch(&stored.open(), std::slice::from_ref(&all)).await;
    let damaged: u64 = reading.damaged.iter().map(|lost| lost.range.end - lost.range.start).sum();
    assert!((BLOCK..200_000).contains(&damaged), "{damaged} bytes");
    // Blocks that it shares with others are damaged as well, so that nothing is left unsaid.
    assert!(check(&reading.pieces, &volume, &all) + damaged >= volume.len());
}

#[tokio::test]
async fn a_volume_of_any_size_is_a_handful_of_requests_away() {
    let len = 1 << 40;
    let volume = Volume::zeros(len).with(len - 300_000, &noise(1, 300_000));
    let stored = store(&volume, false).await;
    let reader = stored.open();
    assert_eq!(stored.store.log().len(), 0);
    let range = len - 5000..len - 4000;
    let reading = reader.read(range.clone()).await.unwrap();
    assert_eq!(check(&reading.pieces, &volume, &range), 1000);
    assert_eq!(stored.store.log().len(), 4, "two nodes, a leaf, a frame");
    let all: u64 = reading.pieces.iter().map(|piece| piece.range().end - piece.range().start).sum();
    assert!(all > 290_000, "what came along is handed over: {all} bytes");
    // Known to be zeros without a request.
    let reading = reader.read(0..3 * MIB).await.unwrap();
    assert_eq!(reading.pieces, [Piece::Zeros(0..3 * MIB)]);
    assert!(reader.is_zero_segment(17).await.unwrap());
    assert_eq!(stored.store.log().len(), 4, "the root says so");
}

#[tokio::test]
async fn what_many_want_at_one_time_is_fetched_once() {
    let volume = Volume::noise(1, 600_000);
    let stored = store(&volume, false).await;
    stored.store.rule(|_, _| Fate::Delay(Duration::from_millis(50)));
    let reader = stored.open();
    let reads = (0..20_u64).map(|n| {
        let (reader, volume) = (&reader, &volume);
        async move {
            let range = n * 20_000..n * 20_000 + 30_000;
            let reading = reader.read(range.clone()).await.unwrap();
            assert_eq!(check(&reading.pieces, volume, &range), 30_000);
        }
    });
    futures::future::join_all(reads).await;
    assert_eq!(stored.store.log().len(), 3, "a node, a leaf, a frame: {:?}", stored.store.log());
}

#[tokio::test]
async fn a_reader_that_gives_up_does_not_take_others_along() {
    let volume = Volume::noise(1, 600_000);
    let stored = store(&volume, false).await;
    stored.store.rule(|_, _| Fate::Delay(Duration::from_millis(100)));
    let reader = stored.open();
    let first = tokio::time::timeout(Duration::from_millis(250), reader.read(0..4096));
    let second = async {
        tokio::time::sleep(Duration::from_millis(220)).await;
        reader.read(0..4096).await.unwrap()
    };
    let (first, second) = tokio::join!(first, second);
    assert!(first.is_err(), "it was dropped amid the fetch");
    assert_eq!(check(&second.pieces, &volume, &(0..4096)), 4096);
}

#[tokio::test]
async fn a_store_that_is_away_says_nothing_about_the_data() {
    let volume = Volume::noise(1, 600_000);
    let stored = store(&volume, false).await;
    let reader = stored.open();
    // Away at the node, the leaf, the frame.
    for n in 0..3 {
        stored.store.nth(0, Fate::Fail(StoreErrorCause::Unavailable));
        let error = reader.read(0..4096).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Retry, "{n}");
        stored.store.nth(1, Fate::Fail(StoreErrorCause::Unavailable));
    }
    stored.store.reset();
    let reading = reader.read(0..4096).await.unwrap();
    assert_eq!(check(&reading.pieces, &volume, &(0..4096)), 4096);
}

#[tokio::test]
async fn damage_is_told_for_its_range_only() {
    let volume = Volume::noise(1, 70 << 20);
    let stored = store(&volume, false).await;
    let packs = objects(&*stored.memory, "packs/").await;
    let largest = packs.iter().max_by_key(|pack| pack.len).unwrap();
    stored.memory.damage(&largest.key, |mut body| {
        body[2_000_000] ^= 1;
        Some(body)
    });
    let reader = stored.open();
    let (mut bad, mut good) = (0, 0);
    for start in (0..volume.len()).step_by(5 << 20) {
        let range = start..(start + (5 << 20)).min(volume.len());
        let reading = reader.read(range.clone()).await.unwrap();
        let covered = check(&reading.pieces, &volume, &range);
        let lost: u64 = reading.damaged.iter().map(|d| d.range.end - d.range.start).sum();
        assert!(reading.damaged.iter().all(|damage| damage.error.is_damage()));
        assert_eq!(covered + lost, range.end - range.start);
        bad += lost;
        good += covered;
    }
    assert!(bad > 0 && bad <= 32 * 1024 + 2 * BLOCK, "{bad}");
    assert_eq!(good + bad, volume.len());

    // Without its leaf, a segment is lost, and the other is not.
    for pack in packs.iter().filter(|pack| pack.key != largest.key) {
        stored
            .memory
            .damage(&pack.key, |body| Some(if body.len() < 1 << 20 { vec![] } else { body }));
    }
    let reading = stored.open().read(0..MIB).await.unwrap();
    assert!(reading.pieces.is_empty());
    assert_eq!(reading.damaged.len(), 1);
    assert_eq!(reading.damaged[0].range, 0..MIB);
}
