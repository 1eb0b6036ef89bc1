//! Deleting and collecting next to writers, clones and other collectors (docs/protocol.md).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use petra_engine::collect::{CollectOptions, CollectReport, collect};
use petra_engine::format::envelope;
use petra_engine::key::Key;
use petra_engine::record::{Pin, PinOwner, SnapshotRecord, kind};
use petra_engine::snapshot::snapshot;
use petra_engine::store::{LocalStore, MemoryStore, Store};
use petra_engine::url::{Item, SnapshotRef};
use petra_engine::{Error, Name, Repository, SnapshotId};
use petra_tests::lab::{
    assert_tidy, at_once, check, collect_all, context, init, objects, request, take, verify_all,
};
use petra_tests::recording::{Fate, Gate, Operation, Recording};
use petra_tests::volume::{Volume, noise};

const SEGMENT: u64 = 64 << 20;
/// Long ago enough for nothing.
const NEVER: Duration = Duration::from_secs(1 << 40);

fn volume(seed: u64) -> Volume {
    Volume::noise(seed, 200_000)
}

/// Two segments with data in both.
fn two_segments(first: u64, second: u64) -> Volume {
    Volume::zeros(SEGMENT + 60_000)
        .with(0, &noise(first, 60_000))
        .with(SEGMENT, &noise(second, 60_000))
}

async fn new_repo() -> (Arc<Recording>, Repository) {
    let store = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(store.clone()).await;
    (store, repo)
}

async fn delete(repo: &Repository, record: &SnapshotRecord) {
    repo.delete(record.id, &context()).await.unwrap();
}

async fn packs(repo: &Repository) -> usize {
    objects(repo.store(), "packs/").await.len()
}

/// What a clone does before it reads.
async fn pin_as_clone(repo: &Repository, snapshot: SnapshotId) -> SnapshotId {
    let owner = context().host.new_id();
    let pin = Pin { stamp: owner.to_string(), owner: PinOwner::Clone, snapshots: vec![snapshot] };
    let body = envelope::seal(kind::PIN, &pin).unwrap();
    repo.store().put(&Key::pin(owner, 0), body).await.unwrap();
    owner
}

#[tokio::test]
async fn frees_what_is_deleted_and_keeps_what_others_use() {
    let (_, repo) = new_repo().await;
    let (mine, shared) = (volume(1), volume(2));
    let both = request("r", &[("mine", &mine), ("shared", &shared)]);
    let first = snapshot(&repo, both, &context()).await.unwrap();
    let second = take(&repo, &shared).await.unwrap();
    let third = take(&repo, &volume(3)).await.unwrap();
    delete(&repo, &third).await;
    let before = packs(&repo).await;
    let report = collect_all(&repo).await.unwrap();
    assert_eq!((report.purged, report.deleted_packs), (1, 2));
    assert!(report.freed_bytes > 200_000);
    assert_eq!(packs(&repo).await, before - 2);
    delete(&repo, &first).await;
    collect_all(&repo).await.unwrap();
    check(&repo, &second.volumes[0], &shared).await.unwrap();
    assert_tidy(&repo).await;
}

#[tokio::test]
async fn what_is_deleted_is_kept_for_its_grace_time() {
    let (_, repo) = new_repo().await;
    let taken = take(&repo, &volume(1)).await.unwrap();
    delete(&repo, &taken).await;
    let patient = CollectOptions { grace: NEVER, ..at_once() };
    let report = collect(&repo, &patient, &context()).await.unwrap();
    assert_eq!((report.in_grace, report.purged, report.deleted_packs), (1, 0, 0));
    check(&repo, &taken.volumes[0], &volume(1)).await.unwrap();
    collect_all(&repo).await.unwrap();
    assert_eq!(packs(&repo).await, 0);
}

#[tokio::test]
async fn a_dry_run_says_what_the_collection_then_does() {
    let (store, repo) = new_repo().await;
    let keep = take(&repo, &volume(1)).await.unwrap();
    let gone = take(&repo, &volume(2)).await.unwrap();
    delete(&repo, &gone).await;
    // A session that died before its commit.
    store.first(|call| call.is(Operation::Create, "snaps/"), Fate::Hang);
    let died = volume(3);
    let dying = take(&repo, &died);
    assert!(tokio::time::timeout(Duration::from_millis(500), dying).await.is_err());
    store.reset();
    let dry_run = CollectOptions { dry_run: true, ..at_once() };
    let said = collect(&repo, &dry_run, &context()).await.unwrap();
    assert!(!store.log().iter().any(|call| call.is_write()), "a dry run changes nothing");
    assert_eq!((said.purged, said.aborted_sessions), (1, 1));
    let done = collect_all(&repo).await.unwrap();
    assert_eq!(said, done);
    check(&repo, &keep.volumes[0], &volume(1)).await.unwrap();
}

#[tokio::test]
async fn an_empty_repository_has_nothing_to_collect() {
    let (_, repo) = new_repo().await;
    assert_eq!(collect_all(&repo).await.unwrap(), CollectReport::default());
}

#[tokio::test]
async fn deleting_twice_is_fine() {
    let (_, repo) = new_repo().await;
    let taken = take(&repo, &volume(1)).await.unwrap();
    for _ in 0..2 {
        delete(&repo, &taken).await;
    }
    collect_all(&repo).await.unwrap();
    delete(&repo, &taken).await;
    assert_eq!(objects(repo.store(), "marks/").await.len(), 2);
    let unknown = repo.delete(context().host.new_id(), &context()).await.unwrap_err();
    assert!(matches!(unknown, Error::Unknown { .. }), "{unknown}");
}

#[tokio::test]
async fn a_pin_keeps_what_a_running_session_reuses() {
    let (store, repo) = new_repo().await;
    let parent = take(&repo, &volume(1)).await.unwrap();
    let gate = Gate::default();
    store.first(|call| call.is(Operation::Create, "snaps/"), Fate::Pause(gate.clone()));
    let running = tokio::spawn({
        let repo = repo.clone();
        async move { take(&repo, &volume(1).with(5, b"changed")).await }
    });
    gate.reached().await;
    delete(&repo, &parent).await;
    let patient = CollectOptions { silent: NEVER, ..at_once() };
    let report = collect(&repo, &patient, &context()).await.unwrap();
    assert_eq!((report.purged, report.deleted_packs), (1, 0));
    gate.open();
    let taken = running.await.unwrap().unwrap();
    check(&repo, &taken.volumes[0], &volume(1).with(5, b"changed")).await.unwrap();
    assert_tidy(&repo).await;
}

/// The trap of checking existence before pinning: the check comes last, so it sees the purge.
#[tokio::test]
async fn a_purge_between_pin_and_check_is_seen() {
    for before_pin in [true, false] {
        let (store, repo) = new_repo().await;
        let parent = take(&repo, &volume(1)).await.unwrap();
        let gate = Gate::default();
        let key = format!("marks/{}/", parent.id);
        store.first(
            move |call| match before_pin {
                true => call.is(Operation::Put, "pins/"),
                false => call.is(Operation::List, &key),
            },
            Fate::Pause(gate.clone()),
        );
        let running = tokio::spawn({
            let repo = repo.clone();
            async move { take(&repo, &volume(1)).await }
        });
        gate.reached().await;
        delete(&repo, &parent).await;
        let patient = CollectOptions { silent: NEVER, ..at_once() };
        let report = collect(&repo, &patient, &context()).await.unwrap();
        assert_eq!(report.purged, 1);
        gate.open();
        let taken = running.await.unwrap().unwrap();
        assert!(taken.stats.new_bytes > 0, "a purged parent must not be reused");
        check(&repo, &taken.volumes[0], &volume(1)).await.unwrap();
        assert_tidy(&repo).await;
    }
}

#[tokio::test]
async fn a_session_that_was_aborted_starts_again_by_itself() {
    let (store, repo) = new_repo().await;
    let gate = Gate::default();
    store.first(|call| call.is(Operation::Create, "snaps/"), Fate::Pause(gate.clone()));
    let running = tokio::spawn({
        let repo = repo.clone();
        async move { take(&repo, &volume(1)).await }
    });
    gate.reached().await;
    let report = collect_all(&repo).await.unwrap();
    assert_eq!((report.aborted_sessions, report.deleted_packs), (1, 2));
    gate.open();
    let taken = running.await.unwrap().unwrap();
    check(&repo, &taken.volumes[0], &volume(1)).await.unwrap();
    assert_eq!(objects(repo.store(), "pins/").await, [], "no pin stays");
    assert_tidy(&repo).await;
}

/// The trap of taking a 412 for a loss: the retry of a lost acknowledgement meets its own object.
#[tokio::test]
async fn a_commit_whose_answer_got_lost_is_no_loss() {
    let (store, repo) = new_repo().await;
    store.first(|call| call.is(Operation::Create, "snaps/"), Fate::LoseAnswer);
    let taken = take(&repo, &volume(1)).await.unwrap();
    assert_eq!(repo.snapshots(&Item::Repository).await.unwrap(), [taken.clone()]);
    assert_eq!(objects(repo.store(), "snaps/").await.len(), 1);
    check(&repo, &taken.volumes[0], &volume(1)).await.unwrap();
    assert_tidy(&repo).await;
}

#[tokio::test]
async fn two_collectors_at_once_do_not_hurt() {
    let (store, repo) = new_repo().await;
    let first = take(&repo, &volume(1)).await.unwrap();
    let second = take(&repo, &volume(1).with(9, b"changed")).await.unwrap();
    delete(&repo, &first).await;
    let writes = 1 + 2 + 4;
    for n in 0..writes {
        // One stands still in the middle while the other goes through.
        let gate = Gate::default();
        let mut seen = 0;
        let pause = gate.clone();
        store.rule(move |_, call| {
            seen += usize::from(call.is_write());
            if call.is_write() && seen == n { Fate::Pause(pause.clone()) } else { Fate::Pass }
        });
        let running = tokio::spawn({
            let repo = repo.clone();
            async move { collect_all(&repo).await }
        });
        let stood = tokio::time::timeout(Duration::from_millis(100), gate.reached()).await;
        collect_all(&repo).await.unwrap();
        if stood.is_ok() {
            gate.open();
        }
        running.await.unwrap().unwrap();
        check(&repo, &second.volumes[0], &volume(1).with(9, b"changed")).await.unwrap();
    }
    store.reset();
    assert_tidy(&repo).await;
}

#[tokio::test]
async fn a_clone_keeps_a_purged_snapshot_until_it_ends() {
    let (_, repo) = new_repo().await;
    let taken = take(&repo, &volume(1)).await.unwrap();
    let clone = pin_as_clone(&repo, taken.id).await;
    delete(&repo, &taken).await;
    let report = collect_all(&repo).await.unwrap();
    assert_eq!((report.purged, report.aborted_sessions, report.deleted_packs), (1, 0, 0));
    check(&repo, &taken.volumes[0], &volume(1)).await.unwrap();
    let end = Key::from_listing(format!("ends/{clone}"));
    repo.store().put(&end, "ended".into()).await.unwrap();
    let report = collect_all(&repo).await.unwrap();
    assert_eq!(report.deleted_packs, 2);
    assert_eq!(objects(repo.store(), "pins/").await, [], "the pin of a clone that ended is void");
}

/// A pin that lands after the purge holds nothing, and must not hide what others need.
#[tokio::test]
async fn a_late_pin_on_a_purged_snapshot_does_not_cost_others_their_packs() {
    let (_, repo) = new_repo().await;
    let a = take(&repo, &two_segments(1, 1)).await.unwrap();
    let b = take(&repo, &two_segments(1, 2)).await.unwrap();
    let c = take(&repo, &two_segments(3, 2)).await.unwrap();
    delete(&repo, &a).await;
    delete(&repo, &b).await;
    collect_all(&repo).await.unwrap();
    pin_as_clone(&repo, b.id).await;
    collect_all(&repo).await.unwrap();
    check(&repo, &c.volumes[0], &two_segments(3, 2)).await.unwrap();
}

#[tokio::test]
async fn damage_stops_a_collection_before_it_deletes_anything() {
    let memory = Arc::new(MemoryStore::new());
    let repo = init(memory.clone()).await;
    let first = take(&repo, &volume(1)).await.unwrap();
    let second = take(&repo, &volume(2)).await.unwrap();
    delete(&repo, &second).await;
    let before = packs(&repo).await;
    let root = Key::pack(first.volumes[0].root.unwrap().pack);
    memory.damage(root.as_str(), |_| None);
    let error = collect_all(&repo).await.unwrap_err();
    assert!(error.to_string().contains(root.as_str()), "{error}");
    assert_eq!(packs(&repo).await, before - 1);
}

/// Writers, a deleter and collectors at once, for a while.
async fn traffic(store: Arc<dyn Store>, seconds: u64) {
    let repo = init(store).await;
    let over = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for writer in 0..4_u64 {
        let (repo, over) = (repo.clone(), over.clone());
        tasks.push(tokio::spawn(async move {
            let mut current = volume(writer % 2);
            for round in 0.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                current.write(round * 7_919 % 190_000, &noise(writer * 1000 + round, 3_000));
                let run = format!("run {writer}");
                let request = request(&run, &[("v", &current)]);
                match snapshot(&repo, request, &context()).await {
                    Ok(taken) => check_unless_deleted(&repo, &taken, &current).await,
                    // A collector without patience may win more than once.
                    Err(Error::Lost { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }));
    }
    for patience in [Duration::ZERO, Duration::from_secs(1)] {
        let (repo, over) = (repo.clone(), over.clone());
        tasks.push(tokio::spawn(async move {
            let options =
                CollectOptions { grace: Duration::ZERO, silent: patience, dry_run: false };
            while !over.load(Ordering::Relaxed) {
                collect(&repo, &options, &context()).await.unwrap();
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
        }));
    }
    tasks.push(tokio::spawn({
        let (repo, over) = (repo.clone(), over.clone());
        async move {
            while !over.load(Ordering::Relaxed) {
                let listed = repo.snapshots(&Item::Repository).await.unwrap();
                for record in listed.iter().rev().skip(3) {
                    repo.delete(record.id, &context()).await.unwrap();
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }));
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    over.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    assert!(!repo.snapshots(&Item::Repository).await.unwrap().is_empty());
    assert_eq!(verify_all(&repo, true).await.unwrap().problems, []);
    assert_tidy(&repo).await;
}

async fn check_unless_deleted(repo: &Repository, taken: &SnapshotRecord, volume: &Volume) {
    let restored = check(repo, &taken.volumes[0], volume).await;
    if repo.find(&SnapshotRef::Id(taken.id)).await.is_ok() {
        restored.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn traffic_in_memory_loses_nothing() {
    traffic(Arc::new(MemoryStore::new()), 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn traffic_in_a_directory_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    traffic(Arc::new(LocalStore::new(dir.path())), 4).await;
}

#[tokio::test]
async fn deleted_snapshots_are_not_listed() {
    let (_, repo) = new_repo().await;
    let taken = take(&repo, &volume(1)).await.unwrap();
    delete(&repo, &taken).await;
    let known: Vec<Name> = repo.experiments().await.unwrap();
    assert_eq!(known, []);
}
