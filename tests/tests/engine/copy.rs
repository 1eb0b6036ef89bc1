//! Copies between repositories: byte for byte, only what is missing, again after any end in the middle.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use petra_engine::chunker::Chunking;
use petra_engine::collect::{CollectOptions, collect};
use petra_engine::copy::{CopyOptions, CopyReport, copy};
use petra_engine::key::Key;
use petra_engine::record::SnapshotRecord;
use petra_engine::snapshot::{Parent, snapshot};
use petra_engine::source::Source;
use petra_engine::store::{LocalStore, MemoryStore, StoreErrorCause};
use petra_engine::stored_source::StoredSource;
use petra_engine::url::{Item, SnapshotRef};
use petra_engine::{Error, Repository};
use petra_tests::lab::{
    assert_tidy, at_once, check, context, init, name, objects, request, take, verify_all,
};
use petra_tests::recording::{Fate, Operation, Recording};
use petra_tests::volume::{Volume, noise, prose};

const SEGMENT: u64 = 64 << 20;
const MIB: usize = 1 << 20;

async fn new_repo() -> Repository {
    init(Arc::new(MemoryStore::new())).await
}

async fn with_chunking(chunking: &str) -> Repository {
    let chunking: Chunking = chunking.parse().unwrap();
    Repository::init(Arc::new(MemoryStore::new()), chunking, &context()).await.unwrap()
}

async fn copy_all(from: &Repository, to: &Repository) -> CopyReport {
    copy(from, &Item::Repository, to, &CopyOptions::default(), &context()).await.unwrap()
}

/// A volume of three segments with holes, and what became of it.
fn history() -> Vec<Volume> {
    let first = Volume::zeros(2 * SEGMENT + 3_000_000)
        .with(0, &noise(1, 3 * MIB))
        .with(5_000_000, &prose(2, MIB))
        .with(SEGMENT - 70_000, &noise(3, 140_000))
        .with(2 * SEGMENT, &noise(4, 2_999_999));
    let second = first.clone().with(1_000_000, &noise(5, 5_000));
    let mut third = second.clone();
    third.zero(SEGMENT..SEGMENT + 70_000);
    third.resize(2 * SEGMENT + 4_000_000);
    vec![first, second, third]
}

/// Takes the history in run `r`, with all that a snapshot can have; and one more run.
async fn filled(repo: &Repository) -> Vec<(SnapshotRecord, Vec<Volume>)> {
    let mut all = Vec::new();
    let small = Volume::noise(9, 70_000);
    for (n, volume) in history().into_iter().enumerate() {
        let mut request = request("r", &[("v", &volume), ("small", &small)]);
        request.name = Some(name(&format!("step {n}")));
        request.labels.insert("step".to_owned(), n.to_string());
        request.message = Some("a message".to_owned());
        request.metadata.insert("image".to_owned(), "x:1".to_owned());
        let record = snapshot(repo, request, &context()).await.unwrap();
        all.push((record, vec![volume, small.clone()]));
    }
    let other = history().remove(1);
    let record = snapshot(repo, request("other", &[("v", &other)]), &context()).await.unwrap();
    all.push((record, vec![other]));
    all
}

/// Checks that `to` has exactly copies of these.
async fn assert_copied(to: &Repository, from: &Repository, all: &[(SnapshotRecord, Vec<Volume>)]) {
    let mut copies = to.snapshots(&Item::Repository).await.unwrap();
    assert_eq!(copies.len(), all.len());
    copies.sort_by_key(|copy| copy.origin.unwrap().snapshot);
    for (copy, (record, volumes)) in copies.iter().zip(all) {
        let origin = copy.origin.unwrap();
        assert_eq!((origin.repository, origin.snapshot), (from.config().id, record.id));
        assert_eq!(origin.created, record.created);
        assert_ne!(copy.id, record.id);
        assert_eq!((&copy.experiment, &copy.run), (&record.experiment, &record.run));
        assert_eq!((&copy.name, &copy.labels), (&record.name, &record.labels));
        assert_eq!((&copy.message, &copy.metadata), (&record.message, &record.metadata));
        assert_eq!(copy.stats.data_bytes, record.stats.data_bytes);
        for (stored, volume) in copy.volumes.iter().zip(volumes) {
            check(to, stored, volume).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_repository_with_everything_and_then_nothing() {
    let (source, target) = (
        Recording::new(Arc::new(MemoryStore::new())),
        Recording::new(Arc::new(MemoryStore::new())),
    );
    let (from, to) = (init(source.clone()).await, init(target.clone()).await);
    let all = filled(&from).await;
    source.reset();
    target.reset();
    let dry_run = CopyOptions { dry_run: true };
    let said = copy(&from, &Item::Repository, &to, &dry_run, &context()).await.unwrap();
    assert!(!target.log().iter().any(|call| call.is_write()));
    let done = copy_all(&from, &to).await;
    assert_eq!((done.copied.len(), done.present, done.failed.len()), (4, 0, 0));
    assert_eq!(said.data_bytes, done.data_bytes);
    assert!(!source.log().iter().any(|call| call.is_write()), "the source is only read");
    assert_copied(&to, &from, &all).await;
    // Equal chunking and names: the copy takes the same space, and shares as much.
    let size = async |repo: &Repository| -> u64 {
        objects(repo.store(), "packs/").await.iter().map(|entry| entry.len).sum()
    };
    assert!(size(&to).await <= size(&from).await * 11 / 10);
    let content = |record: &SnapshotRecord| record.volumes[0].content;
    let copies = to.snapshots(&Item::Repository).await.unwrap();
    assert!(copies.iter().zip(&all).all(|(copy, (record, _))| content(copy) == content(record)));

    source.reset();
    target.reset();
    let again = copy_all(&from, &to).await;
    assert_eq!((again.copied.len(), again.present, again.stored_bytes), (0, 4, 0));
    assert!(!source.log().iter().any(|call| call.is(Operation::GetRange, "packs/")));
    assert!(!target.log().iter().any(|call| call.is_write()));
    assert_tidy(&to).await;
}

#[tokio::test]
async fn only_chunks_that_are_missing_are_read_and_stored() {
    let (from, to) = (new_repo().await, new_repo().await);
    let volume = Volume::noise(1, 24 * MIB);
    take(&from, &volume).await.unwrap();
    let first = copy_all(&from, &to).await;
    assert!(first.fetched_bytes >= 24 * MIB as u64);
    let changed = volume.with(10_000_000, &noise(2, 4096));
    let taken = take(&from, &changed).await.unwrap();
    let second = copy_all(&from, &to).await;
    assert_eq!(second.new_bytes, taken.stats.new_bytes);
    assert!(second.fetched_bytes < MIB as u64, "{} bytes", second.fetched_bytes);
    let copies = to.snapshots(&Item::Repository).await.unwrap();
    check(&to, &copies[1].volumes[0], &changed).await.unwrap();
}

#[tokio::test]
async fn segments_that_are_the_same_are_not_read_whatever_the_chunking() {
    for chunking in ["fixed-16k", "cdc-16k", "cdc-64k"] {
        let (from, to) = (new_repo().await, with_chunking(chunking).await);
        let all = filled(&from).await;
        let report = copy_all(&from, &to).await;
        assert_copied(&to, &from, &all).await;
        assert_tidy(&to).await;
        // Snapshots 1 and 2 differ from their parents in one or two of three segments.
        let data: u64 = all.iter().map(|(record, _)| record.stats.data_bytes).sum();
        assert!(report.fetched_bytes < data, "{chunking}: {} of {data}", report.fetched_bytes);
        assert_eq!(copy_all(&from, &to).await.present, 4);
    }
}

#[tokio::test]
async fn an_unchanged_parent_is_not_read_at_all() {
    let (from, to) = (new_repo().await, with_chunking("fixed-16k").await);
    let volume = history().remove(0);
    take(&from, &volume).await.unwrap();
    copy_all(&from, &to).await;
    let taken = take(&from, &volume).await.unwrap();
    let report = copy_all(&from, &to).await;
    assert_eq!((report.copied.len(), report.fetched_bytes, report.new_bytes), (1, 0, 0));
    let copies = to.snapshots(&Item::Repository).await.unwrap();
    check(&to, &copies[1].volumes[0], &volume).await.unwrap();
    assert_eq!(copies[0].volumes[0].content, copies[1].volumes[0].content);
    assert_eq!(copies[1].stats.data_bytes, taken.stats.data_bytes);
}

#[tokio::test]
async fn scopes_and_the_way_back() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (init(Arc::new(LocalStore::new(dir.path()))).await, new_repo().await);
    let c = new_repo().await;
    let all = filled(&a).await;
    let ctx = context();
    let one = Item::Snapshot { snapshot: SnapshotRef::Id(all[1].0.id), volume: None };
    let run = Item::Run { experiment: name("e"), run: name("r") };
    let experiment = Item::Experiment(name("e"));
    for (scope, copied, present) in [(&one, 1, 0), (&run, 2, 1), (&experiment, 1, 3), (&one, 0, 1)]
    {
        let report = copy(&a, scope, &b, &CopyOptions::default(), &ctx).await.unwrap();
        assert_eq!((report.copied.len(), report.present), (copied, present), "{scope:?}");
    }
    assert_copied(&b, &a, &all).await;
    // What came from there is there; and a copy of a copy is one of the original.
    assert_eq!(copy_all(&b, &a).await.present, 4);
    assert_eq!(copy_all(&b, &c).await.copied.len(), 4);
    assert_copied(&c, &a, &all).await;
    assert_eq!(copy_all(&a, &c).await.present, 4);
    // What was deleted there is copied again.
    let copies = b.snapshots(&run).await.unwrap();
    b.delete(copies[0].id, &ctx).await.unwrap();
    assert_eq!(copy_all(&a, &b).await.copied.len(), 1);
    let error = copy(&a, &experiment, &a, &CopyOptions::default(), &ctx).await.unwrap_err();
    assert!(matches!(error, Error::Request(_)), "{error}");
    let nowhere = Item::Experiment(name("nowhere"));
    let error = copy(&a, &nowhere, &b, &CopyOptions::default(), &ctx).await.unwrap_err();
    assert!(matches!(error, Error::Unknown { .. }), "{error}");
}

#[tokio::test]
async fn an_end_at_any_moment_costs_nothing_that_was_copied() {
    let from = new_repo().await;
    let all = filled(&from).await;
    let target = Recording::new(Arc::new(MemoryStore::new()));
    let to = init(target.clone()).await;
    let (mut n, mut committed) = (0, 0);
    loop {
        target.from_nth(n, Fate::Fail(StoreErrorCause::Unavailable));
        let done = copy(&from, &Item::Repository, &to, &CopyOptions::default(), &context()).await;
        target.reset();
        let copies = to.snapshots(&Item::Repository).await.unwrap();
        assert!(copies.len() >= committed, "what is committed stays");
        committed = copies.len();
        if done.is_ok() {
            break;
        }
        n += 3;
    }
    assert!(n > 30, "{n} requests");
    assert_copied(&to, &from, &all).await;
    assert_tidy(&to).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_collections_of_both_repositories() {
    let (from, to) = (new_repo().await, new_repo().await);
    let all = filled(&from).await;
    // Something to collect.
    for seed in 20..23 {
        for repo in [&from, &to] {
            let gone = take(repo, &Volume::noise(seed, 90_000)).await.unwrap();
            repo.delete(gone.id, &context()).await.unwrap();
        }
    }
    let over = Arc::new(AtomicBool::new(false));
    let collectors: Vec<_> = [&from, &to]
        .into_iter()
        .map(|repo| {
            let (repo, over) = (repo.clone(), over.clone());
            tokio::spawn(async move {
                // Patient with writers, not with what was deleted.
                let options = CollectOptions { silent: Duration::from_secs(3600), ..at_once() };
                while !over.load(Ordering::Relaxed) {
                    collect(&repo, &options, &context()).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
        })
        .collect();
    let done = copy_all(&from, &to).await;
    assert_eq!((done.copied.len(), done.failed.len()), (4, 0));
    over.store(true, Ordering::Relaxed);
    for collector in collectors {
        collector.await.unwrap();
    }
    assert_copied(&to, &from, &all).await;
    assert_tidy(&to).await;
    assert_tidy(&from).await;
}

#[tokio::test]
async fn damage_costs_only_the_snapshots_that_it_hits() {
    let memory = Arc::new(MemoryStore::new());
    let (from, to) = (init(memory.clone()).await, new_repo().await);
    let mut records = Vec::new();
    for seed in 0..3 {
        let volume = Volume::noise(seed, 90_000);
        let mut request = request("r", &[("v", &volume)]);
        request.parent = Parent::None;
        records.push(snapshot(&from, request, &context()).await.unwrap());
    }
    memory.damage(&format!("packs/{}/000000", records[0].id), |mut body| {
        body[40_000] ^= 1;
        Some(body)
    });
    memory.damage(Key::snap(records[1].id).as_str(), |mut body| {
        body[200] ^= 1;
        Some(body)
    });
    let report = copy_all(&from, &to).await;
    let mut failed: Vec<_> = report.failed.iter().map(|failed| failed.snapshot).collect();
    failed.sort();
    assert_eq!(failed, [records[0].id, records[1].id]);
    assert_eq!(report.copied.len(), 1);
    let copies = to.snapshots(&Item::Repository).await.unwrap();
    assert_eq!(copies.len(), 1);
    check(&to, &copies[0].volumes[0], &Volume::noise(2, 90_000)).await.unwrap();
    assert_eq!(verify_all(&to, true).await.unwrap().problems, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stored_volume_reads_as_it_was() {
    let repo = new_repo().await;
    for (seed, volume) in history().into_iter().enumerate() {
        let taken = take(&repo, &volume).await.unwrap();
        let ctx = context();
        let source = StoredSource::open(&repo, &taken.volumes[0], None, true, &ctx).await.unwrap();
        let compare = move || {
            assert_eq!(source.len_bytes(), volume.len());
            // Random ranges, some across segments, some of zeros.
            let numbers = noise(seed as u64, 16 * 60);
            for pair in numbers.chunks_exact(16) {
                let number = |at: usize| u64::from_le_bytes(pair[at..at + 8].try_into().unwrap());
                let start = number(0) % volume.len();
                let len = (number(8) % 700_000).min(volume.len() - start);
                let mut bytes = vec![0xa5; len as usize];
                source.read_at(&mut bytes, start).unwrap();
                assert!(bytes == volume.read(start..start + len), "{seed}: {start}+{len}");
            }
            // What is no data is zeros, and all data is found.
            let mut at = 0;
            while let Some(data) = source.next_data(at).unwrap() {
                assert!(data.start >= at && data.end > data.start);
                assert!(volume.next_data(at).unwrap().is_none_or(|next| next.start >= data.start));
                at = data.end;
            }
            assert!(volume.next_data(at).unwrap().is_none());
        };
        tokio::task::spawn_blocking(compare).await.unwrap();
    }
}
