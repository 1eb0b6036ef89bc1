//! Verifications go to the end whatever is damaged, find what no listing shows, and can look at samples.

use std::collections::BTreeSet;
use std::sync::Arc;

use petra_engine::key::Key;
use petra_engine::record::SnapshotRecord;
use petra_engine::repository::Listing;
use petra_engine::sample::Sample;
use petra_engine::snapshot::snapshot;
use petra_engine::store::{MemoryStore, Store};
use petra_engine::url::{Item, Selector, SnapshotRef};
use petra_engine::verify::{VerifyOptions, VerifyReport, verify};
use petra_engine::{Error, Name, Repository};
use petra_tests::lab::{context, init, name, objects, request, take, verify_all};
use petra_tests::recording::{Operation, Recording};
use petra_tests::volume::{Volume, noise};

async fn new_repo() -> (Arc<MemoryStore>, Repository) {
    let memory = Arc::new(MemoryStore::new());
    (memory.clone(), init(memory).await)
}

async fn flip(memory: &MemoryStore, key: &str, at: usize) {
    memory.damage(key, |mut body| {
        body[at] ^= 1;
        Some(body)
    });
}

async fn sampled(repo: &Repository, share: &str, seed: u32) -> VerifyReport {
    let sample = Some(Sample { share: share.parse().unwrap(), seed });
    let options = VerifyOptions { read_data: true, sample };
    verify(repo, &Item::Repository, &options, &context()).await.unwrap()
}

#[tokio::test]
async fn samples_read_their_share_and_everything_in_the_end() {
    let memory = Arc::new(MemoryStore::new());
    let store = Recording::new(memory.clone());
    let repo = init(store.clone()).await;
    // 12 frames of 1 MiB in two volumes, one of them in two snapshots.
    let (mut a, b) = (Volume::noise(1, 8 << 20), Volume::noise(2, 4 << 20));
    snapshot(&repo, request("r", &[("a", &a), ("b", &b)]), &context()).await.unwrap();
    a.write(5 << 20, &noise(3, 9_000));
    snapshot(&repo, request("r", &[("a", &a)]), &context()).await.unwrap();
    let all = verify_all(&repo, true).await.unwrap();
    assert_eq!((all.sample, all.checked_bytes), (None, all.data_bytes));
    assert_eq!(sampled(&repo, "100%", 1).await.checked_bytes, all.data_bytes);

    let mut sizes = BTreeSet::new();
    for seed in 0..10 {
        let some = sampled(&repo, "25%", seed).await;
        assert_eq!(some, sampled(&repo, "25%", seed).await, "seed {seed}");
        assert_eq!(some.data_bytes, all.data_bytes);
        assert!(some.checked_bytes < all.data_bytes, "seed {seed}");
        sizes.insert(some.checked_bytes);
    }
    assert!(sizes.len() > 3, "seeds choose differently: {sizes:?}");

    // A flipped bit is found by those that look there, and by someone in the end.
    let pack = objects(&*memory, "packs/").await.remove(0);
    flip(&memory, &pack.key, 3 << 20).await;
    let mut found = Vec::new();
    for seed in 0..40 {
        store.reset();
        let report = sampled(&repo, "20%", seed).await;
        found.push(!report.problems.is_empty());
        assert!(report.problems.iter().all(|problem| problem.object.contains(&pack.key)));
        assert!(!store.log().iter().any(|call| call.is_write()));
        assert!(store.log().iter().any(|call| call.is(Operation::GetRange, "packs/")));
    }
    assert!(found.contains(&true) && found.contains(&false), "{found:?}");
}

#[tokio::test]
async fn a_snapshot_without_an_entry_is_found_and_checked() {
    let (memory, repo) = new_repo().await;
    let lost = take(&repo, &Volume::noise(1, 90_000)).await.unwrap();
    let known = take(&repo, &Volume::noise(2, 90_000)).await.unwrap();
    let entry = Key::catalogue(repo.keys(), &name("e"), &name("r"), lost.id);
    memory.delete(&entry).await.unwrap();
    let scopes = [
        Item::Repository,
        Item::Experiment(name("e")),
        Item::Run { experiment: name("e"), run: name("r") },
    ];
    for scope in &scopes {
        let options = VerifyOptions { read_data: true, sample: None };
        let report = verify(&repo, scope, &options, &context()).await.unwrap();
        assert_eq!(report.snapshots, 2);
        let objects: Vec<&str> = report.problems.iter().map(|p| p.object.as_str()).collect();
        assert_eq!(objects, [entry.as_str()]);
    }
    // Elsewhere there is nothing to see.
    let elsewhere = Item::Experiment(name("other"));
    let report = verify(&repo, &elsewhere, &VerifyOptions::default(), &context()).await.unwrap();
    assert_eq!((report.snapshots, report.problems.len()), (0, 0));
    // Its data is looked at as well.
    let pack = format!("packs/{}/000000", lost.id);
    flip(&memory, &pack, 30_000).await;
    let report = verify_all(&repo, true).await.unwrap();
    let hit = report.problems.iter().find(|problem| problem.object.contains(&pack)).unwrap();
    assert_eq!(hit.affected.len(), 1);
    assert_eq!(hit.affected[0].snapshot, lost.id);
    assert!(report.problems.iter().all(|p| p.affected.iter().all(|a| a.snapshot != known.id)));
}

#[tokio::test]
async fn every_damaged_small_object_is_reported_and_costs_no_other_finding() {
    let (memory, repo) = new_repo().await;
    let mut taken: Vec<SnapshotRecord> = Vec::new();
    for seed in 0..4 {
        taken.push(take(&repo, &Volume::noise(seed, 50_000)).await.unwrap());
    }
    let ctx = context();
    repo.delete(taken[0].id, &ctx).await.unwrap();
    // A session that holds a pin.
    let (session, _) =
        petra_engine::session::Session::begin(&repo, &[taken[1].id], &ctx).await.unwrap();
    let keys = [
        Key::mark(taken[0].id, 1),
        Key::pin(session.id(), 0),
        Key::snap(taken[1].id),
        Key::catalogue(repo.keys(), &name("e"), &name("r"), taken[2].id),
    ];
    for key in &keys {
        flip(&memory, key.as_str(), 100).await;
    }
    let report = verify_all(&repo, true).await.unwrap();
    let found: BTreeSet<&str> = report.problems.iter().map(|p| p.object.as_str()).collect();
    assert_eq!(found, keys.iter().map(Key::as_str).collect());
    assert_eq!(report.snapshots, 2, "the deleted one and the damaged one are not counted");
    // A Delete is one by its number.
    let Listing { records, unreadable } = repo.listing(&Item::Repository).await.unwrap();
    let ids: Vec<_> = records.iter().map(|record| record.id).collect();
    assert_eq!(ids, [taken[2].id, taken[3].id]);
    assert_eq!(unreadable.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [taken[1].id]);
}

#[tokio::test]
async fn a_damaged_record_hides_no_others_of_its_run() {
    let (memory, repo) = new_repo().await;
    let mut ids = Vec::new();
    for (n, text) in ["a", "b", "a", "c"].into_iter().enumerate() {
        let volume = Volume::noise(n as u64, 9_000);
        let mut request = request("r", &[("v", &volume)]);
        request.name = Some(name(text));
        ids.push(snapshot(&repo, request, &context()).await.unwrap().id);
    }
    flip(&memory, Key::snap(ids[1]).as_str(), 150).await;
    let run = Item::Run { experiment: name("e"), run: name("r") };
    let listing = repo.listing(&run).await.unwrap();
    assert_eq!(listing.records.iter().map(|r| r.id).collect::<Vec<_>>(), [ids[0], ids[2], ids[3]]);
    assert!(repo.snapshots(&run).await.unwrap_err().is_damage());
    let find = async |text: &str| {
        let selector = Selector::Text(Name::new("snapshot", text).unwrap());
        let (experiment, run) = (name("e"), name("r"));
        repo.find(&SnapshotRef::InRun { experiment, run, selector }).await
    };
    assert_eq!(find("a").await.unwrap().id, ids[2]);
    assert_eq!(find("c").await.unwrap().id, ids[3]);
    // It may have been the one of this name, which is not the same as that there is none.
    assert!(find("b").await.unwrap_err().is_damage());
    // A newer one that can't be read may bear the name as well.
    flip(&memory, Key::snap(ids[3]).as_str(), 150).await;
    assert!(find("a").await.unwrap_err().is_damage());
    assert!(matches!(find("a").await.unwrap_err(), Error::Damaged { .. }));
}
