//! Compaction and graves (docs/protocol.md): packs that are mostly garbage shrink, and nothing is lost on the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use petra_engine::collect::{CollectOptions, CollectReport, collect};
use petra_engine::record::SnapshotRecord;
use petra_engine::restore::RestoreOptions;
use petra_engine::store::{Entry, MemoryStore, StoreErrorCause};
use petra_engine::url::{Item, SnapshotRef};
use petra_engine::usage::usage;
use petra_engine::{Error, Repository, Result};
use petra_tests::lab::{
    assert_tidy, at_once, check, collect_all, context, init, objects, request, take, verify_all,
};
use petra_tests::recording::{Fate, Gate, Operation, Recording};
use petra_tests::volume::{Volume, noise};
use proptest::prelude::*;

use super::runtime;

const PIECE: u64 = 100_000;
const PIECES: u64 = 40;

/// A volume of `PIECES` pieces, each of its own noise.
fn volume(seeds: impl Fn(u64) -> u64) -> Volume {
    (0..PIECES).fold(Volume::zeros(PIECES * PIECE), |volume, n| {
        volume.with(n * PIECE, &noise(seeds(n), PIECE as usize))
    })
}

async fn new_repo() -> (Arc<Recording>, Repository) {
    let store = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(store.clone()).await;
    (store, repo)
}

async fn stored(repo: &Repository) -> u64 {
    objects(repo.store(), "packs/").await.iter().map(|entry| entry.len).sum()
}

/// What the packs of these volumes take in a repository of their own.
async fn fresh_size(volumes: &[&Volume]) -> u64 {
    let (_, repo) = new_repo().await;
    for volume in volumes {
        take(&repo, volume).await.unwrap();
    }
    stored(&repo).await
}

/// A repository whose first packs are garbage but for some pieces that the second snapshot needs.
async fn sparse() -> (Arc<Recording>, Repository, Volume, SnapshotRecord) {
    let (store, repo) = new_repo().await;
    let first = take(&repo, &volume(|n| n)).await.unwrap();
    let after = volume(|n| if n % 5 == 0 { n } else { 100 + n });
    let second = take(&repo, &after).await.unwrap();
    repo.delete(first.id, &context()).await.unwrap();
    (store, repo, after, second)
}

fn without_compaction() -> CollectOptions {
    CollectOptions { max_waste_percent: None, ..at_once() }
}

#[tokio::test]
async fn sparse_packs_shrink_to_what_is_needed() {
    let (_, repo, after, record) = sparse().await;
    let wasteful = collect(&repo, &without_compaction(), &context()).await.unwrap();
    assert!(wasteful.wasted_bytes * 3 > wasteful.kept_bytes, "{wasteful:?}");
    let report = collect_all(&repo).await.unwrap();
    assert!(report.compacted_packs > 0 && report.copied_bytes > 0, "{report:?}");
    assert!(report.wasted_bytes * 20 <= report.kept_bytes, "{report:?}");
    check(&repo, &record.volumes[0], &after).await.unwrap();
    let (size, fresh) = (stored(&repo).await, fresh_size(&[&after]).await);
    assert!(size * 100 <= fresh * 105, "{size} bytes stored, {fresh} would do");
    assert_tidy(&repo).await;
    // There is nothing left to do.
    let again = collect_all(&repo).await.unwrap();
    assert_eq!((again.deleted_packs, again.copied_bytes), (0, 0), "{again:?}");
    let used = usage(&repo, &Item::Repository, &context()).await.unwrap();
    assert!(
        used.live_bytes <= used.packs_bytes && used.live_bytes * 100 > used.packs_bytes * 90,
        "{used:?}"
    );
}

/// Footers of large packs are longer than what is worth copying for.
#[tokio::test]
async fn a_collection_that_allows_no_waste_ends() {
    let (_, repo) = new_repo().await;
    let large = |seed| Volume::zeros(24 << 20).with(0, &noise(seed, 24 << 20));
    let first = take(&repo, &large(1)).await.unwrap();
    let after = large(1).with(0, &noise(2, 12 << 20));
    let second = take(&repo, &after).await.unwrap();
    repo.delete(first.id, &context()).await.unwrap();
    let options = CollectOptions { max_waste_percent: Some(0), ..at_once() };
    let report = collect(&repo, &options, &context()).await.unwrap();
    assert!(report.compacted_packs > 0, "{report:?}");
    let again = collect(&repo, &options, &context()).await.unwrap();
    assert_eq!((again.deleted_packs, again.copied_bytes), (0, 0), "{again:?}");
    assert!(again.wasted_bytes > 4 << 10, "the test must have something to tempt it: {again:?}");
    check(&repo, &second.volumes[0], &after).await.unwrap();
}

#[tokio::test]
async fn copies_are_compacted_again_and_again() {
    let (_, repo, mut last, mut record) = sparse().await;
    for round in 1..6_u64 {
        collect_all(&repo).await.unwrap();
        check(&repo, &record.volumes[0], &last).await.unwrap();
        // Less and less of what was there at first is left.
        let next = volume(|n| if n % 5 == 0 && n >= 5 * round { n } else { 1000 * round + n });
        let next_record = take(&repo, &next).await.unwrap();
        assert!(next_record.stats.new_bytes < next_record.stats.data_bytes, "round {round}");
        repo.delete(record.id, &context()).await.unwrap();
        (last, record) = (next, next_record);
    }
    collect_all(&repo).await.unwrap();
    check(&repo, &record.volumes[0], &last).await.unwrap();
    assert_tidy(&repo).await;
}

#[tokio::test]
async fn what_was_copied_is_still_a_duplicate() {
    let (_, repo, after, _) = sparse().await;
    collect_all(&repo).await.unwrap();
    let again = take(&repo, &after).await.unwrap();
    assert_eq!(again.stats.new_bytes, 0);
    let changed = after.clone().with(3 * PIECE, &noise(9999, 5000));
    let record = take(&repo, &changed).await.unwrap();
    assert!(record.stats.new_bytes < 200_000, "{:?}", record.stats);
    check(&repo, &record.volumes[0], &changed).await.unwrap();
    assert_tidy(&repo).await;
}

#[tokio::test]
async fn a_restore_that_runs_meanwhile_finds_the_copies() {
    let (store, repo, after, record) = sparse().await;
    let gate = Gate::default();
    store.first(|call| call.is(Operation::GetRange, "packs/"), Fate::Pause(gate.clone()));
    let running = tokio::spawn({
        let (repo, volume) = (repo.clone(), record.volumes[0].clone());
        async move { check(&repo, &volume, &after).await }
    });
    gate.reached().await;
    let other = Repository::open(store.clone()).await.unwrap();
    let report = collect_all(&other).await.unwrap();
    assert!(report.compacted_packs > 0, "{report:?}");
    gate.open();
    running.await.unwrap().unwrap();
}

/// An answer of the store with a bit that is wrong, once: nothing relies on it.
#[tokio::test]
async fn a_bit_that_flips_on_the_way_is_never_copied() {
    let mut hits = 0;
    for n in 0.. {
        let memory = Arc::new(MemoryStore::new());
        let store = Recording::new(memory.clone());
        let repo = init(store.clone()).await;
        // Half of what the first has stored is garbage, leaves and chunks.
        let halves = |seed| {
            let first = Volume::zeros((64 << 20) + (4 << 20)).with(0, &noise(1, 4 << 20));
            first.with(64 << 20, &noise(seed, 4 << 20))
        };
        let first = take(&repo, &halves(2)).await.unwrap();
        let after = halves(3);
        let second = take(&repo, &after).await.unwrap();
        repo.delete(first.id, &context()).await.unwrap();
        let (mut reads, mut flipped) = (0, None::<String>);
        let flip = |memory: &MemoryStore, key: &str| {
            memory.damage(key, |mut body| {
                let first_half = body.len() / 4;
                body[first_half] ^= 1;
                Some(body)
            });
        };
        let (to, is_hit) = (memory.clone(), Arc::new(AtomicBool::new(false)));
        let was_hit = is_hit.clone();
        store.rule(move |_, call| {
            if let Some(key) = flipped.take() {
                flip(&to, &key);
            }
            if call.is(Operation::GetRange, "packs/") {
                if reads == n {
                    flip(&to, &call.key);
                    flipped = Some(call.key.clone());
                    is_hit.store(true, Ordering::Relaxed);
                }
                reads += 1;
            }
            Fate::Pass
        });
        // It may fail, and be done again.
        let _ = collect(&repo, &everything(), &context()).await;
        // Lets the bit flip back if that was the last request.
        repo.store().list("config", None).await.unwrap();
        store.reset();
        let repo = Repository::open(store.clone()).await.unwrap();
        check(&repo, &second.volumes[0], &after).await.unwrap();
        collect(&repo, &everything(), &context()).await.unwrap();
        check(&repo, &second.volumes[0], &after).await.unwrap();
        assert_tidy(&repo).await;
        if !was_hit.load(Ordering::Relaxed) {
            break;
        }
        hits += 1;
    }
    assert!(hits > 5, "{hits} reads");
}

/// A collection that compacts whatever it can.
fn everything() -> CollectOptions {
    CollectOptions { max_waste_percent: Some(0), ..at_once() }
}

/// How many requests a collection of the sparse repository makes.
async fn requests_of(options: &CollectOptions) -> usize {
    let (store, repo, ..) = sparse().await;
    store.reset();
    collect(&repo, options, &context()).await.unwrap();
    store.log().len()
}

/// The sparse repository after a collection was dropped at its `n`-th request.
async fn dropped_at(
    n: usize,
    options: &CollectOptions,
) -> (Arc<Recording>, Repository, Volume, SnapshotRecord) {
    let (store, repo, after, record) = sparse().await;
    let (gate, ctx) = (Gate::default(), context());
    store.nth(n, Fate::Pause(gate.clone()));
    tokio::select! {
        done = collect(&repo, options, &ctx) => panic!("it ended before request {n}: {done:?}"),
        () = gate.reached() => {}
    }
    store.reset();
    (store, repo, after, record)
}

#[tokio::test]
async fn a_compaction_that_fails_anywhere_loses_nothing() {
    for cause in [Fate::Fail(StoreErrorCause::Unavailable), Fate::LoseAnswer] {
        for n in (0..requests_of(&at_once()).await).step_by(2) {
            let (store, repo, after, record) = sparse().await;
            store.nth(n, cause.clone());
            let _ = collect_all(&repo).await;
            store.reset();
            check(&repo, &record.volumes[0], &after).await.unwrap();
            assert_tidy(&repo).await;
        }
    }
}

#[tokio::test]
async fn a_compaction_that_is_dropped_anywhere_loses_nothing() {
    for n in (0..requests_of(&at_once()).await).step_by(2) {
        let (_, repo, after, record) = dropped_at(n, &at_once()).await;
        check(&repo, &record.volumes[0], &after).await.unwrap();
        assert_tidy(&repo).await;
    }
}

#[tokio::test]
async fn two_compactors_at_once() {
    for pause in (0..60).step_by(4) {
        let (store, repo, after, record) = sparse().await;
        let gate = Gate::default();
        store.nth(pause, Fate::Pause(gate.clone()));
        let mut slow = tokio::spawn({
            let repo = repo.clone();
            async move { collect_all(&repo).await }
        });
        tokio::select! {
            _ = &mut slow => {}
            () = gate.reached() => {
                let other = Repository::open(store.clone()).await.unwrap();
                collect_all(&other).await.unwrap();
                gate.open();
                slow.await.unwrap().unwrap();
            }
        }
        store.reset();
        check(&repo, &record.volumes[0], &after).await.unwrap();
        assert_tidy(&repo).await;
    }
}

#[tokio::test]
async fn damaged_packs_stay_as_they_are() {
    let (_, repo, after, record) = sparse().await;
    let pack = objects(repo.store(), "packs/").await.into_iter().next().unwrap();
    let key = petra_engine::key::Key::from_listing(pack.key);
    let mut bytes = repo.store().get(&key).await.unwrap().to_vec();
    let length = bytes.len();
    bytes[16..length / 2].fill(0);
    repo.store().delete(&key).await.unwrap();
    repo.store().put(&key, bytes.into()).await.unwrap();
    let report = collect_all(&repo).await.unwrap();
    assert!(report.damaged_packs > 0, "{report:?}");
    assert!(repo.store().get(&key).await.is_ok(), "it may be all there is");
    let error = check(&repo, &record.volumes[0], &after).await.unwrap_err();
    assert!(error.is_damage(), "{error}");
}

#[tokio::test]
async fn a_lost_copy_is_named() {
    let (store, repo, after, record) = sparse().await;
    collect_all(&repo).await.unwrap();
    for entry in objects(repo.store(), "packs/").await {
        let key = petra_engine::key::Key::from_listing(entry.key);
        let bytes = repo.store().get(&key).await.unwrap();
        repo.store().delete(&key).await.unwrap();
        let error = restore(store.clone(), &record, &after).await.unwrap_err();
        assert!(matches!(error, Error::Missing { .. } | Error::Damaged { .. }), "{error}");
        let fresh = Repository::open(store.clone()).await.unwrap();
        let problems = verify_all(&fresh, false).await.unwrap().problems;
        assert!(!problems.is_empty(), "without {key}");
        repo.store().put(&key, bytes).await.unwrap();
    }
    assert_tidy(&repo).await;
}

/// What is left of a copy may be all there is: a collection must not take it for garbage while the rest can't be read.
#[tokio::test]
async fn a_collection_beside_a_lost_copy_deletes_nothing() {
    let (store, repo, after, record) = sparse().await;
    collect_all(&repo).await.unwrap();
    let names = |entries: Vec<Entry>| -> Vec<String> {
        entries.into_iter().map(|entry| entry.key).collect()
    };
    for entry in objects(repo.store(), "packs/").await {
        let key = petra_engine::key::Key::from_listing(entry.key);
        let bytes = repo.store().get(&key).await.unwrap();
        let zeros = vec![0; bytes.len()];
        for damaged in [None, Some(zeros)] {
            repo.store().delete(&key).await.unwrap();
            if let Some(damaged) = damaged {
                repo.store().put(&key, damaged.into()).await.unwrap();
            }
            let before = names(objects(repo.store(), "packs/").await);
            let fresh = Repository::open(store.clone()).await.unwrap();
            let result = collect_all(&fresh).await;
            let left = names(objects(repo.store(), "packs/").await);
            let lost: Vec<_> = before.iter().filter(|pack| !left.contains(pack)).collect();
            assert!(lost.is_empty(), "without {key}: {lost:?} went; {result:?}");
            repo.store().delete(&key).await.unwrap();
            repo.store().put(&key, bytes.clone()).await.unwrap();
        }
    }
    restore(store, &record, &after).await.unwrap();
    collect_all(&repo).await.unwrap();
    assert_tidy(&repo).await;
    check(&repo, &record.volumes[0], &after).await.unwrap();
}

/// A restore with a repository that has not seen anything yet.
async fn restore(store: Arc<Recording>, record: &SnapshotRecord, volume: &Volume) -> Result<()> {
    let repo = Repository::open(store).await?;
    let options = RestoreOptions::default();
    let out = Box::new(petra_tests::volume::Comparison::with(volume));
    petra_engine::restore::stream(&repo, &record.volumes[0], out, &options, &context())
        .await
        .map(|_| ())
}

// ------------------------------------------------------------------------------------------------ graves

fn burying() -> CollectOptions {
    CollectOptions { bury_from: 1, ..at_once() }
}

async fn bury(repo: &Repository) -> CollectReport {
    collect(repo, &burying(), &context()).await.unwrap()
}

async fn small_objects(repo: &Repository) -> Vec<String> {
    let mut all = Vec::new();
    for prefix in ["snaps/", "marks/", "pins/", "ends/", "moves/"] {
        all.extend(objects(repo.store(), prefix).await.into_iter().map(|entry| entry.key));
    }
    all
}

#[tokio::test]
async fn only_the_living_keep_their_objects() {
    let (_, repo, after, record) = sparse().await;
    // A session that was given up.
    let (mut session, _) =
        petra_engine::session::Session::begin(&repo, &[record.id], &context()).await.unwrap();
    assert!(session.abandon().await.is_none());
    let report = bury(&repo).await;
    assert!(report.buried >= 2, "{report:?}");
    bury(&repo).await;
    let left = small_objects(&repo).await;
    let (snaps, others): (Vec<_>, Vec<_>) = left.iter().partition(|key| key.starts_with("snaps/"));
    // The snapshot and the compaction that it needs.
    assert_eq!(snaps.len(), 2, "{left:?}");
    assert!(others.iter().all(|key| key.starts_with("moves/")), "{left:?}");
    check(&repo, &record.volumes[0], &after).await.unwrap();
    assert_tidy(&repo).await;
    // Nothing needs the compaction any more once the snapshot is gone.
    repo.delete(record.id, &context()).await.unwrap();
    bury(&repo).await;
    bury(&repo).await;
    assert_eq!(small_objects(&repo).await, Vec::<String>::new());
    assert_eq!(stored(&repo).await, 0);
}

#[tokio::test]
async fn a_burial_that_is_dropped_anywhere_is_finished_later() {
    for n in (0..requests_of(&burying()).await).step_by(2) {
        let (_, repo, after, record) = dropped_at(n, &burying()).await;
        bury(&repo).await;
        bury(&repo).await;
        check(&repo, &record.volumes[0], &after).await.unwrap();
        let marks = objects(repo.store(), "marks/").await;
        assert!(marks.is_empty(), "dropped at request {n}: {marks:?}");
        assert_tidy(&repo).await;
    }
}

#[tokio::test]
async fn a_late_commit_of_a_buried_session_is_no_snapshot() {
    let (store, repo) = new_repo().await;
    let gate = Gate::default();
    store.first(|call| call.is(Operation::Create, "snaps/"), Fate::Pause(gate.clone()));
    let late = tokio::spawn({
        let repo = repo.clone();
        async move {
            petra_engine::snapshot::snapshot(
                &repo,
                request("r", &[("v", &volume(|n| n))]),
                &context(),
            )
            .await
        }
    });
    gate.reached().await;
    bury(&repo).await;
    assert_eq!(objects(repo.store(), "snaps/").await.len(), 0, "the abort was buried");
    gate.open();
    // It lost, notices, and stores everything again.
    let record = late.await.unwrap().unwrap();
    check(&repo, &record.volumes[0], &volume(|n| n)).await.unwrap();
    let listed = repo.snapshots(&Item::Repository).await.unwrap();
    assert_eq!(listed.iter().map(|r| r.id).collect::<Vec<_>>(), [record.id]);
    for entry in objects(repo.store(), "snaps/").await {
        let id = entry.key.trim_start_matches("snaps/").parse().unwrap();
        let found = repo.find(&SnapshotRef::Id(id)).await;
        assert_eq!(found.is_ok(), id == record.id, "{found:?}");
    }
    assert_tidy(&repo).await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Any history of snapshots and deletions, with collections in between: what was not deleted comes back.
    #[test]
    fn any_history_keeps_what_it_should(
        steps in prop::collection::vec((0_u64..6, 0_u64..PIECES, 1_u64..PIECES, any::<u8>()), 1..14),
        bury_from in 1_usize..3,
    ) {
        runtime().block_on(async {
            let (_, repo) = new_repo().await;
            let options = CollectOptions { bury_from, max_waste_percent: Some(0), ..at_once() };
            let mut current = Volume::zeros(PIECES * PIECE);
            let mut kept: Vec<(SnapshotRecord, Volume)> = Vec::new();
            for (step, from, count, seed) in steps {
                match step {
                    0..3 => {
                        let len = (count.min(PIECES - from) * PIECE) as usize;
                        current.write(from * PIECE, &noise(u64::from(seed), len));
                        let record = take(&repo, &current).await.unwrap();
                        kept.push((record, current.clone()));
                    }
                    3 if !kept.is_empty() => {
                        let (record, _) = kept.remove(usize::from(seed) % kept.len());
                        repo.delete(record.id, &context()).await.unwrap();
                    }
                    _ => {
                        collect(&repo, &options, &context()).await.unwrap();
                    }
                }
                for (record, volume) in &kept {
                    check(&repo, &record.volumes[0], volume).await.unwrap();
                }
            }
            collect(&repo, &options, &context()).await.unwrap();
            for (record, volume) in &kept {
                check(&repo, &record.volumes[0], volume).await.unwrap();
            }
            let listed = repo.snapshots(&Item::Repository).await.unwrap();
            assert_eq!(listed.len(), kept.len());
            assert_tidy(&repo).await;
        });
    }
}
