//! An incremental snapshot says the same as a full one, costs what has changed, and writes in the right order.

use std::sync::Arc;

use petra_engine::snapshot::{Parent, snapshot};
use petra_engine::store::MemoryStore;
use petra_engine::tree::segments;
use petra_engine::{Context, Repository};
use petra_tests::lab::{check, context, init, request, take};
use petra_tests::recording::{Call, Operation, Recording};
use petra_tests::volume::{Volume, noise, prose};
use proptest::collection::vec;
use proptest::prelude::*;

use super::runtime;

const SEGMENT: u64 = 64 << 20;

/// A change of a volume.
#[derive(Clone, Debug)]
enum Edit {
    Overwrite { at: u64, len: usize, seed: u64 },
    Insert { at: u64, len: usize, seed: u64 },
    Zero { at: u64, len: u64 },
    Resize { len: u64 },
}

fn any_edit() -> impl Strategy<Value = Edit> {
    let at = || prop_oneof![0_u64..900_000, SEGMENT - 100_000..SEGMENT + 100_000];
    prop_oneof![
        (at(), 1_usize..50_000, any::<u64>()).prop_map(|(at, len, seed)| Edit::Overwrite {
            at,
            len,
            seed
        }),
        (at(), 1_usize..5_000, any::<u64>()).prop_map(|(at, len, seed)| Edit::Insert {
            at,
            len,
            seed
        }),
        (at(), 1_u64..100_000).prop_map(|(at, len)| Edit::Zero { at, len }),
        prop_oneof![1_u64..1_000_000, SEGMENT - 9_000..SEGMENT + 90_000, Just(2 * SEGMENT + 1)]
            .prop_map(|len| Edit::Resize { len }),
    ]
}

fn apply(volume: &mut Volume, edit: &Edit) {
    match *edit {
        Edit::Overwrite { at, len, seed } => volume.write(at, &noise(seed, len)),
        Edit::Insert { at, len, seed } => volume.insert(at..at + 300_000, &prose(seed, len)),
        Edit::Zero { at, len } => volume.zero(at..at + len),
        Edit::Resize { len } => volume.resize(len),
    }
}

/// Data at the start and around the first border between segments.
fn base() -> Volume {
    Volume::zeros(SEGMENT + 200_000)
        .with(0, &noise(1, 700_000))
        .with(100_000, &prose(2, 150_000))
        .with(SEGMENT - 150_000, &noise(3, 300_000))
}

fn small(threads: usize, index_chunks: usize) -> Context {
    let mut ctx = context();
    ctx.limits.threads = threads;
    ctx.limits.index_chunks = index_chunks;
    ctx
}

async fn new_repo() -> Repository {
    init(Arc::new(MemoryStore::new())).await
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn equals_a_full_one(
        rounds in vec(vec(any_edit(), 1..4), 1..4),
        threads in prop_oneof![Just(1), Just(2), Just(4)],
        index_chunks in prop_oneof![Just(64), Just(1 << 20)],
    ) {
        runtime().block_on(async {
            let series = new_repo().await;
            let mut volume = base();
            let ctx = small(threads, index_chunks);
            snapshot(&series, request("r", &[("v", &volume)]), &ctx).await.unwrap();
            for edits in &rounds {
                edits.iter().for_each(|edit| apply(&mut volume, edit));
                let taken = snapshot(&series, request("r", &[("v", &volume)]), &ctx).await.unwrap();
                assert!(taken.parent.is_some());
                let fresh = new_repo().await;
                let request = petra_engine::snapshot::SnapshotRequest {
                    parent: Parent::None,
                    ..request("other", &[("v", &volume)])
                };
                let full = snapshot(&fresh, request, &small(2, 1 << 20)).await.unwrap();
                assert_eq!(taken.volumes[0].content, full.volumes[0].content);
                assert_eq!(taken.volumes[0].data_bytes, full.volumes[0].data_bytes);
                check(&series, &taken.volumes[0], &volume).await.unwrap();
            }
        });
    }
}

#[tokio::test]
async fn no_change_stores_no_pack() {
    let recording = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(recording.clone()).await;
    let first = take(&repo, &base()).await.unwrap();
    recording.reset();
    let second = take(&repo, &base()).await.unwrap();
    assert_eq!((second.stats.stored_bytes, second.stats.new_bytes), (0, 0));
    assert_eq!(second.volumes[0].root, first.volumes[0].root);
    assert_eq!(writes(&recording.log()), ["Put pins", "Put runs", "Create snaps", "Delete pins"]);
    assert_eq!(second.stats.puts, 3);
}

#[tokio::test]
async fn unchanged_segments_share_their_leaves() {
    let repo = new_repo().await;
    let mut volume = base();
    let first = take(&repo, &volume).await.unwrap();
    volume.write(10, b"changed");
    let second = take(&repo, &volume).await.unwrap();
    let leaves = async |record: &petra_engine::record::SnapshotRecord| {
        segments(&repo, &record.volumes[0], &context()).await.unwrap().leaves
    };
    let (before, after) = (leaves(&first).await, leaves(&second).await);
    assert_ne!(before[0], after[0]);
    assert_eq!(before[1], after[1]);
    assert!(second.stats.new_bytes < 100_000, "{}", second.stats.new_bytes);
}

/// Other runs, experiments and volumes are searched for duplicates too.
#[tokio::test]
async fn a_clone_of_a_volume_stores_no_data_again() {
    let repo = new_repo().await;
    take(&repo, &base()).await.unwrap();
    let mut other = request("another run", &[("another volume", &base())]);
    other.experiment = petra_tests::lab::name("another experiment");
    let taken = snapshot(&repo, other, &context()).await.unwrap();
    assert_eq!(taken.stats.new_bytes, 0);
}

/// The operations that change the store, with the first part of their keys.
fn writes(log: &[Call]) -> Vec<String> {
    let writes = log.iter().filter(|call| call.is_write());
    writes
        .map(|call| format!("{:?} {}", call.operation, call.key.split('/').next().unwrap()))
        .collect()
}

#[tokio::test]
async fn the_order_of_writes_is_that_of_the_protocol() {
    let recording = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(recording.clone()).await;
    take(&repo, &base()).await.unwrap();
    recording.reset();
    let changed = base().with(SEGMENT - 10, b"changed");
    take(&repo, &changed).await.unwrap();
    let log = recording.log();
    assert_eq!(
        writes(&log),
        ["Put pins", "Put runs", "Put packs", "Put packs", "Create snaps", "Delete pins"]
    );
    // What may be reused is looked at after the pin only: that is what keeps it.
    let pin = log.iter().position(|call| call.is(Operation::Put, "pins/")).unwrap();
    let leaf = log.iter().position(|call| call.is(Operation::GetRange, "packs/")).unwrap();
    let check = log.iter().rposition(|call| call.is(Operation::List, "marks/0")).unwrap();
    assert!(pin < check && check < leaf, "pin {pin}, check {check}, leaf {leaf}");
}

#[tokio::test]
async fn a_small_snapshot_makes_few_requests() {
    let recording = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(recording.clone()).await;
    take(&repo, &base()).await.unwrap();
    recording.reset();
    take(&repo, &base().with(5, b"changed")).await.unwrap();
    let log = recording.log();
    let count = |operation| log.iter().filter(|call| call.operation == operation).count();
    let counts = [Operation::Put, Operation::Create, Operation::Delete].map(count);
    assert_eq!(counts, [4, 1, 1], "{log:#?}");
    let reads = [Operation::Get, Operation::GetRange, Operation::List].map(count);
    assert!(reads.iter().sum::<usize>() <= 20, "{reads:?} {log:#?}");
}
