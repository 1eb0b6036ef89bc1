//! Repairs put right what can be known, leave the rest, and can end at any moment.

use std::sync::Arc;

use petra_engine::Repository;
use petra_engine::key::Key;
use petra_engine::record::{MarkKind, SnapshotRecord};
use petra_engine::repair::{RepairOptions, RepairReport, repair};
use petra_engine::session::Session;
use petra_engine::store::{MemoryStore, Store, StoreErrorCause};
use petra_engine::url::Item;
use petra_tests::lab::{
    assert_tidy, check, collect_all, context, init, name, objects, take, verify_all,
};
use petra_tests::recording::{Fate, Recording};
use petra_tests::volume::Volume;

async fn repair_all(repo: &Repository) -> RepairReport {
    repair(repo, &RepairOptions::default(), &context()).await.unwrap()
}

fn flip(memory: &MemoryStore, key: &Key, at: usize) {
    memory.damage(key.as_str(), |mut body| {
        body[at] ^= 1;
        Some(body)
    });
}

/// Three snapshots: one without an entry in the catalogue, one with a damaged entry, one whose entry names another
/// run; and entries of an aborted session, and of a snapshot in a place that is not its own.
struct Disorder {
    memory: Arc<MemoryStore>,
    store: Arc<Recording>,
    repo: Repository,
    records: Vec<SnapshotRecord>,
    stray: Vec<String>,
}

impl Disorder {
    async fn new() -> Self {
        let memory = Arc::new(MemoryStore::new());
        let store = Recording::new(memory.clone());
        let repo = init(store.clone()).await;
        let mut records = Vec::new();
        for seed in 0..3 {
            records.push(take(&repo, &Volume::noise(seed, 30_000)).await.unwrap());
        }
        let entry = |n: usize| Key::catalogue(repo.keys(), &name("e"), &name("r"), records[n].id);
        memory.delete(&entry(0)).await.unwrap();
        flip(&memory, &entry(1), 100);
        let ctx = context();
        let (mut aborted, _) = Session::begin(&repo, &[], &ctx).await.unwrap();
        aborted.enter(&name("e"), &name("r")).await.unwrap();
        let dead = Key::catalogue(repo.keys(), &name("e"), &name("r"), aborted.id());
        let body = memory.get(&dead).await.unwrap();
        assert!(aborted.abandon().await.is_none());
        memory.put(&dead, body).await.unwrap();
        let (mut elsewhere, _) = Session::begin(&repo, &[], &ctx).await.unwrap();
        elsewhere.enter(&name("e"), &name("other")).await.unwrap();
        let written = Key::catalogue(repo.keys(), &name("e"), &name("other"), elsewhere.id());
        let body = memory.get(&written).await.unwrap();
        let misplaced = Key::catalogue(repo.keys(), &name("e"), &name("other"), records[2].id);
        memory.put(&misplaced, body.clone()).await.unwrap();
        memory.delete(&entry(2)).await.unwrap();
        memory.put(&entry(2), body).await.unwrap();
        let stray = vec![dead.to_string(), misplaced.to_string()];
        Self { memory, store, repo, records, stray }
    }

    async fn assert_order(&self) {
        assert_eq!(verify_all(&self.repo, true).await.unwrap().problems, []);
        let run = Item::Run { experiment: name("e"), run: name("r") };
        assert_eq!(self.repo.snapshots(&run).await.unwrap(), self.records);
        assert_eq!(self.repo.runs(&name("e")).await.unwrap(), [name("r")]);
    }
}

#[tokio::test]
async fn the_catalogue_is_made_again_from_the_records() {
    let site = Disorder::new().await;
    assert_eq!(verify_all(&site.repo, false).await.unwrap().problems.len(), 3);
    let before = objects(&*site.memory, "").await;
    site.store.reset();
    let dry_run = RepairOptions { dry_run: true, ..RepairOptions::default() };
    let said = repair(&site.repo, &dry_run, &context()).await.unwrap();
    assert!(!site.store.log().iter().any(|call| call.is_write()));
    assert_eq!(objects(&*site.memory, "").await, before);

    let done = repair_all(&site.repo).await;
    assert_eq!(said, done);
    let ids: Vec<_> = site.records.iter().map(|record| record.id).collect();
    assert_eq!((done.listed, done.unresolved), (ids, vec![]));
    let mut unlisted = done.unlisted;
    unlisted.sort();
    let mut stray = site.stray.clone();
    stray.sort();
    assert_eq!(unlisted, stray);
    site.assert_order().await;
    assert_eq!(repair_all(&site.repo).await, RepairReport::default());
}

#[tokio::test]
async fn a_repair_that_ends_at_any_request_harms_nothing() {
    let site = Disorder::new().await;
    let mut n = 0;
    loop {
        site.store.from_nth(n, Fate::Fail(StoreErrorCause::Unavailable));
        let done = repair(&site.repo, &RepairOptions::default(), &context()).await;
        site.store.reset();
        for record in &site.records {
            let volume = Volume::noise(record.id.index_in(&site.records), 30_000);
            check(&site.repo, &record.volumes[0], &volume).await.unwrap();
        }
        if done.is_ok() {
            break;
        }
        n += 1;
    }
    assert!(n > 10, "{n} requests");
    site.assert_order().await;
}

trait IndexIn {
    fn index_in(&self, records: &[SnapshotRecord]) -> u64;
}

impl IndexIn for petra_engine::SnapshotId {
    fn index_in(&self, records: &[SnapshotRecord]) -> u64 {
        records.iter().position(|record| record.id == *self).unwrap() as u64
    }
}

#[tokio::test]
async fn sessions_under_way_keep_their_entries() {
    let memory = Arc::new(MemoryStore::new());
    let repo = init(memory.clone()).await;
    let ctx = context();
    let (mut session, _) = Session::begin(&repo, &[], &ctx).await.unwrap();
    session.enter(&name("e"), &name("r")).await.unwrap();
    assert_eq!(repair_all(&repo).await, RepairReport::default());
    assert_eq!(objects(&*memory, "runs/").await.len(), 1);
}

#[tokio::test]
async fn deletes_and_void_pins_are_put_right_and_collections_go_on() {
    let memory = Arc::new(MemoryStore::new());
    let repo = init(memory.clone()).await;
    let kept = take(&repo, &Volume::noise(1, 30_000)).await.unwrap();
    let gone = take(&repo, &Volume::noise(2, 30_000)).await.unwrap();
    let ctx = context();
    repo.delete(gone.id, &ctx).await.unwrap();
    let mark = Key::mark(gone.id, 1);
    flip(&memory, &mark, 100);
    // A pin of a session that was decided, and one of a session that was not.
    let (mut decided, _) = Session::begin(&repo, &[kept.id], &ctx).await.unwrap();
    let (void, held) = (Key::pin(decided.id(), 0), memory.get(&Key::pin(decided.id(), 0)).await);
    assert!(decided.abandon().await.is_none());
    memory.put(&void, held.unwrap()).await.unwrap();
    flip(&memory, &void, 100);
    let (open, _) = Session::begin(&repo, &[kept.id], &ctx).await.unwrap();
    let needed = Key::pin(open.id(), 0);
    flip(&memory, &needed, 100);
    assert!(collect_all(&repo).await.unwrap_err().is_damage());

    let report = repair_all(&repo).await;
    assert_eq!(report.rewritten, [mark.to_string()]);
    assert_eq!(report.unpinned, [void.to_string()]);
    let left: Vec<&str> = report.unresolved.iter().map(|p| p.object.as_str()).collect();
    assert_eq!(left, [needed.as_str()], "whose it is, a person must say");
    assert_eq!(repo.marks().await.unwrap()[&gone.id].mark, MarkKind::Delete);
    let aside = objects(&*memory, "quarantine/").await;
    let aside: Vec<&str> = aside.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(aside, [format!("quarantine/{mark}"), format!("quarantine/{void}")]);
    memory.delete(&needed).await.unwrap();
    collect_all(&repo).await.unwrap();
    assert_tidy(&repo).await;
    check(&repo, &kept.volumes[0], &Volume::noise(1, 30_000)).await.unwrap();
}
