//! What simulations found, each as a test of its own.

use std::sync::Arc;

use petra_engine::collect::{CollectOptions, collect};
use petra_engine::key::Key;
use petra_engine::store::MemoryStore;
use petra_engine::url::{Item, SnapshotRef};
use petra_engine::{Error, Repository};
use petra_tests::lab::{assert_tidy, at_once, check, context, init, take};
use petra_tests::recording::{Fate, Gate, Operation, Recording};
use petra_tests::volume::Volume;

async fn new_repo() -> (Arc<Recording>, Repository) {
    let store = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(store.clone()).await;
    (store, repo)
}

/// Aborts what is silent, and buries it.
async fn collect_and_bury(repo: &Repository) {
    let options = CollectOptions { bury_from: 1, ..at_once() };
    for _ in 0..2 {
        collect(repo, &options, &context()).await.unwrap();
    }
}

/// The place of the decision was free again, so the commit came through, and the next collection removed it.
#[tokio::test]
async fn a_session_whose_abort_was_buried_does_not_commit() {
    let volume = Volume::noise(1, 100_000);
    // Once before its commit, and once between the commit that meets the Abort and the look at that.
    for operation in [Operation::Create, Operation::Get] {
        let (store, repo) = new_repo().await;
        let gate = Gate::default();
        store.first(|call| call.is(Operation::Create, "snaps/"), Fate::Pause(gate.clone()));
        let running = tokio::spawn({
            let (repo, volume) = (repo.clone(), volume.clone());
            async move { take(&repo, &volume).await }
        });
        gate.reached().await;
        if operation == Operation::Get {
            let only_abort = CollectOptions { bury_from: usize::MAX, ..at_once() };
            collect(&repo, &only_abort, &context()).await.unwrap();
            let next = Gate::default();
            store.first(|call| call.is(Operation::Get, "snaps/"), Fate::Pause(next.clone()));
            gate.open();
            next.reached().await;
            collect_and_bury(&repo).await;
            next.open();
        } else {
            collect_and_bury(&repo).await;
            gate.open();
        }
        let taken = running.await.unwrap().unwrap();
        collect_and_bury(&repo).await;
        assert_eq!(
            repo.snapshots(&Item::Repository).await.unwrap(),
            std::slice::from_ref(&taken),
            "{operation:?}"
        );
        check(&repo, &taken.volumes[0], &volume).await.unwrap();
        assert_tidy(&repo).await;
    }
}

/// A decision that is applied again after its burial has no marks beside it.
#[tokio::test]
async fn a_buried_snapshot_does_not_come_back() {
    let (_, repo) = new_repo().await;
    let taken = take(&repo, &Volume::noise(1, 100_000)).await.unwrap();
    let entry = Key::catalogue(&taken.experiment, &taken.run, taken.id);
    let mut again = Vec::new();
    for key in [Key::snap(taken.id), entry] {
        let body = repo.store().get(&key).await.unwrap();
        again.push((key, body));
    }
    repo.delete(taken.id, &context()).await.unwrap();
    collect_and_bury(&repo).await;
    for (key, body) in again {
        repo.store().put(&key, body).await.unwrap();
    }
    assert_eq!(repo.snapshots(&Item::Repository).await.unwrap(), []);
    let found = repo.find(&SnapshotRef::Id(taken.id)).await.unwrap_err();
    assert!(matches!(found, Error::Unknown { .. }), "{found}");
    collect_and_bury(&repo).await;
    assert!(repo.store().get(&Key::snap(taken.id)).await.is_err(), "it is buried once more");
}
