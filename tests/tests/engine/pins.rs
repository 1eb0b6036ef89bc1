//! Pins of clones whose calls fail.

use std::collections::BTreeMap;
use std::sync::Arc;

use petra_engine::clone::ClonePin;
use petra_engine::key::Key;
use petra_engine::store::{MemoryStore, Store, StoreErrorCause};
use petra_engine::{Repository, SnapshotId};
use petra_tests::lab::{at_once, collect_all, context, init, objects, take};
use petra_tests::recording::{Fate, Operation, Recording};
use petra_tests::volume::Volume;

async fn lab() -> (Arc<Recording>, Repository, SnapshotId) {
    let store = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(store.clone()).await;
    let snapshot = take(&repo, &Volume::noise(1, 10_000)).await.unwrap().id;
    (store, repo, snapshot)
}

#[tokio::test]
async fn a_pin_with_a_name_is_taken_in_the_end() {
    let (store, repo, snapshot) = lab().await;
    let metadata = BTreeMap::from([("for".to_owned(), "a test".to_owned())]);
    let named = |n| SnapshotId::from_parts(7, n);
    let ctx = context();
    let take = |n| ClonePin::take_named(&repo, named(n), snapshot, metadata.clone(), &ctx);
    // Nothing was put, it was put and nobody knows, or the snapshot could not be asked for.
    let away = Fate::Fail(StoreErrorCause::Unavailable);
    let steps = [
        (Operation::Put, "pins/", away.clone()),
        (Operation::Put, "pins/", Fate::LoseAnswer),
        (Operation::List, "marks/", away.clone()),
    ];
    for (n, (operation, prefix, fate)) in (0..).zip(steps) {
        store.first(move |call| call.is(operation, prefix), fate);
        take(n).await.unwrap_err();
        store.reset();
        assert!(!repo.has_ended(named(n)).await.unwrap(), "it could never be taken again");
        assert_eq!(objects(store.as_ref(), "pins/").await.len(), 0, "nobody would end it");
        assert!(ClonePin::find(&repo, named(n)).await.unwrap().is_none());
        take(n).await.unwrap();
        assert_eq!(repo.pin(named(n)).await.unwrap().unwrap().metadata, metadata);
        // Once more, as when the answer was lost: both are gone with the end.
        assert_eq!(ClonePin::find(&repo, named(n)).await.unwrap(), Some(snapshot));
        take(n).await.unwrap().end(&ctx).await.unwrap();
        assert_eq!(objects(store.as_ref(), "pins/").await.len(), 0);
        assert!(repo.ended().await.unwrap().contains(&named(n)));
    }
    // One that could not be taken back is found by the next call.
    store.rule(move |_, call| match call.operation {
        Operation::Put => Fate::LoseAnswer,
        Operation::Delete => away.clone(),
        _ => Fate::Pass,
    });
    take(9).await.unwrap_err();
    store.reset();
    assert_eq!(ClonePin::find(&repo, named(9)).await.unwrap(), Some(snapshot));
    // Its deletion may be carried out late: what the next call gives does not depend on it.
    let left = objects(store.as_ref(), "pins/").await;
    take(9).await.unwrap();
    for late in left {
        store.delete(&Key::from_listing(late.key)).await.unwrap();
    }
    repo.delete(snapshot, &ctx).await.unwrap();
    collect_all(&repo).await.unwrap();
    assert_eq!(repo.pin(named(9)).await.unwrap().unwrap().snapshots, [snapshot]);
    assert!(!objects(store.as_ref(), "packs/").await.is_empty());
}

#[tokio::test]
async fn a_pin_of_what_is_purged_is_none() {
    let (store, repo, snapshot) = lab().await;
    repo.delete(snapshot, &context()).await.unwrap();
    collect_all(&repo).await.unwrap();
    let id = SnapshotId::from_parts(7, 1);
    ClonePin::take_named(&repo, id, snapshot, BTreeMap::new(), &context()).await.unwrap_err();
    assert_eq!(objects(store.as_ref(), "pins/").await.len(), 0);
    // Its name may lead to another snapshot tomorrow.
    let other = take(&repo, &Volume::noise(2, 10_000)).await.unwrap().id;
    ClonePin::take_named(&repo, id, other, BTreeMap::new(), &context()).await.unwrap();
    petra_engine::collect::collect(&repo, &at_once(), &context()).await.unwrap();
    assert_eq!(repo.pin(id).await.unwrap().unwrap().snapshots, [other]);
}
