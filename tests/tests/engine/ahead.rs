//! What a snapshot is compared with can be read before its sources are there, and is used only where it still holds.

use std::sync::Arc;

use petra_engine::format::node::Child;
use petra_engine::key::Key;
use petra_engine::record::SnapshotRecord;
use petra_engine::repair::{RepairOptions, repair};
use petra_engine::snapshot::{Ahead, Parent, snapshot, snapshot_after};
use petra_engine::store::MemoryStore;
use petra_engine::{Repository, SnapshotId};
use petra_tests::lab::{
    assert_tidy, check, collect_all, context, init, name, request, take, verify_all,
};
use petra_tests::recording::{Operation, Recording};
use petra_tests::volume::{Volume, noise};

const LEN: u64 = 1_000_000;

fn base() -> Volume {
    Volume::noise(1, LEN as usize)
}

fn changed() -> Volume {
    base().with(300_000, &noise(2, 1_000))
}

async fn read_ahead(repo: &Repository, parent: Parent, compared: &[&str]) -> Ahead {
    let compared = compared.iter().map(|volume| name(volume)).collect();
    Ahead::read(repo, (&name("e"), &name("r")), parent, compared, &context()).await.unwrap()
}

async fn take_after(ahead: Ahead, repo: &Repository, volume: &Volume) -> SnapshotRecord {
    let request = request("r", &[("v", volume)]);
    let taken = snapshot_after(Some(ahead), repo, request, &context()).await.unwrap();
    check(repo, &taken.volumes[0], volume).await.unwrap();
    assert_eq!(verify_all(repo, true).await.unwrap().problems, []);
    taken
}

#[tokio::test]
async fn is_not_read_again() {
    let store = Recording::new(Arc::new(MemoryStore::new()));
    let repo = init(store.clone()).await;
    let first = take(&repo, &base()).await.unwrap();
    let manifest_reads = || {
        let log = store.log();
        log.iter().filter(|call| call.is(Operation::GetRange, "packs/")).count()
    };
    for parent in [Parent::Auto, Parent::Snapshot(first.id)] {
        store.reset();
        let ahead = read_ahead(&repo, parent, &["v"]).await;
        assert_ne!(manifest_reads(), 0);
        assert!(!store.log().iter().any(|call| call.is_write()), "it only reads");
        store.reset();
        let request = request("r", &[("v", &changed())]);
        let taken = snapshot_after(Some(ahead), &repo, request, &context()).await.unwrap();
        assert_eq!(manifest_reads(), 0);
        check(&repo, &taken.volumes[0], &changed()).await.unwrap();
        // The same as without.
        let plain = init(Arc::new(MemoryStore::new())).await;
        take(&plain, &base()).await.unwrap();
        let plain = take(&plain, &changed()).await.unwrap();
        assert_eq!(taken.volumes[0].content, plain.volumes[0].content);
        assert_eq!(taken.stats.new_bytes, plain.stats.new_bytes);
        repo.delete(taken.id, &context()).await.unwrap();
        collect_all(&repo).await.unwrap();
    }
}

#[tokio::test]
async fn of_a_parent_that_is_purged_meanwhile_nothing_is_reused() {
    let repo = init(Arc::new(MemoryStore::new())).await;
    let first = take(&repo, &base()).await.unwrap();
    let ahead = read_ahead(&repo, Parent::Auto, &["v"]).await;
    repo.delete(first.id, &context()).await.unwrap();
    assert_eq!(collect_all(&repo).await.unwrap().purged, 1);
    let taken = take_after(ahead, &repo, &changed()).await;
    assert_eq!((taken.parent, taken.stats.new_bytes), (None, LEN));
    assert_tidy(&repo).await;
}

#[tokio::test]
async fn a_newer_snapshot_is_the_parent_all_the_same() {
    let repo = init(Arc::new(MemoryStore::new())).await;
    take(&repo, &base()).await.unwrap();
    let ahead = read_ahead(&repo, Parent::Auto, &["v"]).await;
    let newer = take(&repo, &changed()).await.unwrap();
    let taken = take_after(ahead, &repo, &changed()).await;
    assert_eq!((taken.parent, taken.stats.new_bytes), (Some(newer.id), 0));
}

#[tokio::test]
async fn what_is_set_aside_meanwhile_is_stored_anew() {
    let store = Arc::new(MemoryStore::new());
    let repo = init(store.clone()).await;
    let first = take(&repo, &base()).await.unwrap();
    let ahead = read_ahead(&repo, Parent::Auto, &["v"]).await;
    let Child::Block { block: root, .. } = first.volumes[0].root().0 else { panic!("no root") };
    store.damage(Key::pack(root.pack).as_str(), |mut pack| {
        pack[root.offset as usize + 60] ^= 1;
        Some(pack)
    });
    let repaired = repair(&repo, &RepairOptions::default(), &context()).await.unwrap();
    assert_eq!(repaired.quarantined, [root.pack]);
    let request = request("r", &[("v", &base())]);
    let taken = snapshot_after(Some(ahead), &repo, request, &context()).await.unwrap();
    check(&repo, &taken.volumes[0], &base()).await.unwrap();
    assert_ne!(taken.volumes[0].root().0, first.volumes[0].root().0);
}

/// Whoever was told wrong names reads the right ones.
#[tokio::test]
async fn another_volume_than_the_one_compared_with_is_no_past() {
    let repo = init(Arc::new(MemoryStore::new())).await;
    let other = Volume::noise(7, LEN as usize);
    let both = request("r", &[("v", &base()), ("w", &other)]);
    let first = snapshot(&repo, both, &context()).await.unwrap();
    for compared in [&["w"][..], &[], &["v", "w"]] {
        let ahead = read_ahead(&repo, Parent::Snapshot(first.id), compared).await;
        let taken = take_after(ahead, &repo, &base()).await;
        assert_eq!(taken.stats.new_bytes, 0);
        // The manifest is its own, and that of `v`.
        assert_eq!(taken.volumes[0].root().0, first.volumes[0].root().0);
    }
}

#[tokio::test]
async fn an_unknown_parent_can_not_be_read() {
    let repo = init(Arc::new(MemoryStore::new())).await;
    let nobody = Parent::Snapshot(SnapshotId::from_parts(1, 2));
    let run = (&name("e"), &name("r"));
    assert!(Ahead::read(&repo, run, nobody, vec![name("v")], &context()).await.is_err());
}
