//! An incremental snapshot says the same as a full one, costs what has changed, and writes in the right order.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use petra_engine::format::node::Child;
use petra_engine::key::Key;
use petra_engine::repair::{RepairOptions, repair};
use petra_engine::snapshot::{Parent, SnapshotRequest, snapshot};
use petra_engine::source::Source;
use petra_engine::store::MemoryStore;
use petra_engine::tree::segments;
use petra_engine::{Context, Repository, Result, SnapshotId};
use petra_tests::lab::{check, context, init, name, request, request_of, take};
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

/// The bytes that an edit may change.
fn touched(edit: &Edit, len_before: u64) -> Range<u64> {
    match *edit {
        Edit::Overwrite { at, len, .. } => at..at + len as u64,
        Edit::Insert { at, .. } => at..at + 300_000,
        Edit::Zero { at, len } => at..at + len,
        Edit::Resize { len } => len.min(len_before)..u64::MAX,
    }
}

/// A volume that knows what has changed since a snapshot, and counts what is read.
#[derive(Debug)]
struct Told {
    volume: Volume,
    since: SnapshotId,
    changes: Vec<Range<u64>>,
    read: AtomicU64,
}

impl Told {
    fn new(volume: &Volume, since: SnapshotId, changes: Vec<Range<u64>>) -> Arc<Self> {
        Arc::new(Self { volume: volume.clone(), since, changes, read: AtomicU64::new(0) })
    }

    fn request(self: &Arc<Self>) -> SnapshotRequest {
        request_of("r", vec![(name("v"), self.clone() as Arc<dyn Source>)])
    }
}

impl Source for Told {
    fn len_bytes(&self) -> u64 {
        self.volume.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.volume.read_at(buf, offset)
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        self.volume.next_data(from)
    }

    fn changed(&self, segment: Range<u64>, parent: SnapshotId) -> Option<Vec<Range<u64>>> {
        let is_within =
            |range: &&Range<u64>| range.start < segment.end && range.end > segment.start;
        (parent == self.since).then(|| self.changes.iter().filter(is_within).cloned().collect())
    }

    fn check_unchanged(&self) -> Result<()> {
        Ok(())
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
        told: bool,
    ) {
        runtime().block_on(async {
            let series = new_repo().await;
            let mut volume = base();
            let ctx = small(threads, index_chunks);
            let first = snapshot(&series, request("r", &[("v", &volume)]), &ctx).await.unwrap();
            let mut last = first.id;
            for edits in &rounds {
                let mut changes = Vec::new();
                for edit in edits {
                    changes.push(touched(edit, volume.len()));
                    apply(&mut volume, edit);
                }
                let incremental = match told {
                    true => Told::new(&volume, last, changes).request(),
                    false => request("r", &[("v", &volume)]),
                };
                let taken = snapshot(&series, incremental, &ctx).await.unwrap();
                last = taken.id;
                assert!(taken.parent.is_some());
                let fresh = new_repo().await;
                let request =
                    SnapshotRequest { parent: Parent::None, ..request("other", &[("v", &volume)]) };
                let full = snapshot(&fresh, request, &small(2, 1 << 20)).await.unwrap();
                assert_eq!(taken.volumes[0].content, full.volumes[0].content);
                assert_eq!(taken.volumes[0].data_bytes, full.volumes[0].data_bytes);
                check(&series, &taken.volumes[0], &volume).await.unwrap();
            }
        });
    }
}

#[tokio::test]
async fn only_what_has_changed_is_read() {
    // The parent's leaves come from the index or from the store.
    for (threads, index_chunks) in [(2, 64), (0, 1 << 20)] {
        let ctx = small(threads, index_chunks);
        let repo = new_repo().await;
        let mut volume = base();
        let first = snapshot(&repo, request("r", &[("v", &volume)]), &ctx).await.unwrap();
        // Named, since ids of one millisecond are in no order.
        let after = |told: &Arc<Told>, id| SnapshotRequest {
            parent: Parent::Snapshot(id),
            ..told.request()
        };
        let same = Told::new(&volume, first.id, vec![]);
        let second = snapshot(&repo, after(&same, first.id), &ctx).await.unwrap();
        assert_eq!(same.read.load(Ordering::Relaxed), 0);
        assert_eq!(second.volumes[0].root, first.volumes[0].root);

        volume.write(400_000, b"changed");
        volume.write(SEGMENT - 5, b"across segments");
        let changes = vec![400_000..400_007, SEGMENT - 5..SEGMENT + 10];
        let edited = Told::new(&volume, second.id, changes.clone());
        let third = snapshot(&repo, after(&edited, second.id), &ctx).await.unwrap();
        let read = edited.read.load(Ordering::Relaxed);
        assert!(read < 300_000, "{read}");
        check(&repo, &third.volumes[0], &volume).await.unwrap();

        // What is known since another snapshot than the parent does not count.
        let other = Told::new(&volume, first.id, vec![]);
        let fourth = snapshot(&repo, after(&other, third.id), &ctx).await.unwrap();
        assert!(other.read.load(Ordering::Relaxed) >= volume.data_bytes());
        assert_eq!(fourth.volumes[0].root, third.volumes[0].root);
    }
}

/// However many there are.
#[tokio::test]
async fn leaves_of_segments_that_did_not_change_are_not_read() {
    let store = Arc::new(MemoryStore::new());
    let recording = Recording::new(store.clone());
    let repo = init(recording.clone()).await;
    let mut volume = Volume::zeros(70 * SEGMENT);
    for segment in 0..70 {
        volume.write(segment * SEGMENT + 5_000, &noise(segment, 6_000));
    }
    // The index has room for the chunks of the first leaves only.
    let ctx = small(2, 64);
    let first = snapshot(&repo, request("r", &[("v", &volume)]), &ctx).await.unwrap();
    volume.write(66 * SEGMENT, &noise(9, 1_000));
    volume.zero(67 * SEGMENT..68 * SEGMENT);
    let changes = vec![66 * SEGMENT..66 * SEGMENT + 1_000, 67 * SEGMENT..68 * SEGMENT];
    recording.reset();
    let after =
        |told: &Arc<Told>, id| SnapshotRequest { parent: Parent::Snapshot(id), ..told.request() };
    let told = Told::new(&volume, first.id, changes);
    let second = snapshot(&repo, after(&told, first.id), &ctx).await.unwrap();
    let log = recording.log();
    let reads = log.iter().filter(|call| call.is(Operation::GetRange, "packs/")).count();
    assert!((1..10).contains(&reads), "{log:#?}");
    let full = take(&new_repo().await, &volume).await.unwrap();
    assert_eq!(second.volumes[0].data_bytes, full.volumes[0].data_bytes);
    assert_eq!(second.volumes[0].content, full.volumes[0].content);

    // But they are once a repair has set packs aside, and what they hold is stored anew.
    let leaves = segments(&repo, &second.volumes[0], &ctx).await.unwrap().leaves;
    let Child::Block { block: leaf, .. } = leaves[69] else { panic!("no leaf") };
    store.damage(Key::pack(leaf.pack).as_str(), |mut pack| {
        pack[leaf.offset as usize + 60] ^= 1;
        Some(pack)
    });
    let repo = Repository::open(store).await.unwrap();
    let repaired = repair(&repo, &RepairOptions::default(), &context()).await.unwrap();
    assert_eq!(repaired.quarantined, [leaf.pack]);
    let told = Told::new(&volume, second.id, vec![]);
    let third = snapshot(&repo, after(&told, second.id), &ctx).await.unwrap();
    assert!(told.read.load(Ordering::Relaxed) >= 6_000);
    check(&repo, &third.volumes[0], &volume).await.unwrap();
}

#[tokio::test]
async fn a_parent_that_is_damaged_is_not_spliced() {
    let recording = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(recording.clone()).await;
    let volume = base();
    let first = take(&repo, &volume).await.unwrap();
    let Child::Block { block: root, .. } = first.volumes[0].root().0 else { panic!("no root") };
    let key = Key::pack(root.pack);
    let mut pack = repo.store().get(&key).await.unwrap().to_vec();
    // All leaves, but not the root: it comes last.
    pack[16..root.offset as usize].fill(0);
    repo.store().delete(&key).await.unwrap();
    repo.store().put(&key, pack.into()).await.unwrap();
    // With room for the chunks of both leaves in the index, and of one only: the other one is read for its segment.
    for index_chunks in [1 << 20, 64] {
        let told = Told::new(&volume, first.id, vec![10..20, SEGMENT + 30..SEGMENT + 40]);
        let request = SnapshotRequest { parent: Parent::Snapshot(first.id), ..told.request() };
        let taken = snapshot(&repo, request, &small(2, index_chunks)).await.unwrap();
        assert!(told.read.load(Ordering::Relaxed) >= volume.data_bytes());
        check(&repo, &taken.volumes[0], &volume).await.unwrap();
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

#[tokio::test]
async fn leaves_that_snapshots_share_are_read_once() {
    let recording = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(recording.clone()).await;
    let mut reads = Vec::new();
    for _ in 0..6 {
        recording.reset();
        take(&repo, &base()).await.unwrap();
        let log = recording.log();
        reads.push(log.iter().filter(|call| call.is(Operation::GetRange, "packs/")).count());
    }
    // The parent's node and its leaves, which are kept until they are compared. A further snapshot of the run adds its node.
    assert_eq!(reads[..2], [0, 2], "{reads:?}");
    let added: Vec<usize> = reads.windows(2).skip(1).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(added, [1; 4], "{reads:?}");
}
