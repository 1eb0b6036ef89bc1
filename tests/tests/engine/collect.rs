//! Deleting and collecting next to writers, clones and other collectors (docs/protocol.md).

use std::sync::Arc;
use std::time::Duration;

use petra_engine::collect::{CollectOptions, CollectReport, collect};
use petra_engine::crypto::Keys;
use petra_engine::format::block::{BlockKind, BlockRef};
use petra_engine::format::envelope;
use petra_engine::format::frame::FrameEncoder;
use petra_engine::format::leaf::{ChunkRef, Extent, Leaf};
use petra_engine::format::node::{Child, Node};
use petra_engine::format::pack::{PackBuilder, PackKind};
use petra_engine::key::Key;
use petra_engine::record::{Pin, PinOwner, SnapshotRecord, VolumeRecord, kind};
use petra_engine::session::Session;
use petra_engine::snapshot::snapshot;
use petra_engine::store::MemoryStore;
use petra_engine::url::Item;
use petra_engine::{ChunkId, Error, Name, PackId, Repository, SnapshotId};
use petra_tests::lab::{
    assert_tidy, at_once, check, collect_all, context, init, name, objects, request, take,
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
    let pin = Pin {
        stamp: owner.to_string(),
        owner: PinOwner::Clone,
        snapshots: vec![snapshot],
        metadata: [].into(),
    };
    let body = envelope::seal(kind::PIN, &Key::pin(owner, 0), &pin).unwrap();
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
    assert_eq!(repo.snapshots(&Item::Repository).await.unwrap(), std::slice::from_ref(&taken));
    assert_eq!(objects(repo.store(), "snaps/").await.len(), 1);
    check(&repo, &taken.volumes[0], &volume(1)).await.unwrap();
    assert_tidy(&repo).await;
}

#[tokio::test]
async fn two_collectors_at_once_do_not_hurt() {
    // One stands still before each of its writes while the other goes through.
    for n in 0.. {
        let (store, repo) = new_repo().await;
        let first = take(&repo, &volume(1)).await.unwrap();
        let second = take(&repo, &volume(1).with(9, b"changed")).await.unwrap();
        take(&repo, &volume(2)).await.unwrap();
        delete(&repo, &first).await;
        let third = repo.snapshots(&Item::Repository).await.unwrap().pop().unwrap();
        delete(&repo, &third).await;
        let gate = Gate::default();
        let pause = gate.clone();
        let mut writes = 0;
        store.rule(move |_, call| {
            writes += usize::from(call.is_write());
            if call.is_write() && writes == n + 1 { Fate::Pause(pause.clone()) } else { Fate::Pass }
        });
        let mut running = tokio::spawn({
            let repo = repo.clone();
            async move { collect_all(&repo).await }
        });
        let stands = tokio::select! {
            () = gate.reached() => true,
            done = &mut running => {
                done.unwrap().unwrap();
                false
            }
        };
        if stands {
            collect_all(&repo).await.unwrap();
            gate.open();
            running.await.unwrap().unwrap();
        }
        store.reset();
        check(&repo, &second.volumes[0], &volume(1).with(9, b"changed")).await.unwrap();
        assert_tidy(&repo).await;
        if !stands {
            assert!(n >= 4, "two purges and some packs");
            break;
        }
    }
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

#[tokio::test]
async fn deleted_snapshots_are_not_listed() {
    let (_, repo) = new_repo().await;
    let taken = take(&repo, &volume(1)).await.unwrap();
    delete(&repo, &taken).await;
    let known: Vec<Name> = repo.experiments().await.unwrap();
    assert_eq!(known, []);
}

/// Two leaves of equal content in one pack may list different packs: both must be read.
#[tokio::test]
async fn equal_leaves_keep_all_their_packs() {
    let (_, repo) = new_repo().await;
    let ctx = context();
    let (mut session, _) = Session::begin(&repo, &[], &ctx).await.unwrap();
    let pack = |number| PackId { session: session.id(), number };
    let mut manifest = PackBuilder::new(pack(2), PackKind::Manifest, &Keys::none());
    let mut children = Vec::new();
    let bytes = noise(1, 5_000);
    for number in 0..2 {
        let mut stored = Vec::new();
        FrameEncoder::new().unwrap().encode(&bytes, &mut stored);
        let mut data = PackBuilder::new(pack(number), PackKind::Data, &Keys::none());
        let frame = data.add_frame(&stored, std::iter::once(5_000));
        let (id, body) = data.finish();
        repo.store().put(&Key::pack(id), body).await.unwrap();
        let chunk = ChunkRef { id: ChunkId::of(&bytes), len: 5_000, frame: 0, offset: 0 };
        let extents = vec![Extent::Chunk(chunk), Extent::Zero { len: SEGMENT as u32 - 5_000 }];
        let leaf = Leaf { frames: vec![frame], extents };
        let (digest, block) = (leaf.digest(), leaf.encode());
        let offset = manifest.add_block(BlockKind::Leaf, &block);
        let len = block.len() as u32;
        let block = BlockRef { digest, pack: pack(2), offset, len };
        children.push(Child::Block { block, data_bytes: 5_000 });
    }
    let node = Node { level: 1, children };
    let (digest, block) = (node.digest(), node.encode());
    let offset = manifest.add_block(BlockKind::Node, &block);
    let block = BlockRef { digest, pack: pack(2), offset, len: block.len() as u32 };
    let root = Child::Block { block, data_bytes: 10_000 };
    let (id, body) = manifest.finish();
    repo.store().put(&Key::pack(id), body).await.unwrap();
    let like = take(&repo, &volume(9)).await.unwrap();
    let record = SnapshotRecord {
        id: session.id(),
        volumes: vec![VolumeRecord::new(name("v"), 2 * SEGMENT, root)],
        ..like
    };
    session.commit(record.clone()).await.unwrap();
    collect_all(&repo).await.unwrap();
    let volume = Volume::zeros(2 * SEGMENT).with(0, &bytes).with(SEGMENT, &bytes);
    check(&repo, &record.volumes[0], &volume).await.unwrap();
}

/// A pinned root that is missing something is not always one whose pin came too late: its owner may be decided since.
#[tokio::test]
async fn a_pinned_root_whose_owner_was_decided_since_is_not_passed_over() {
    let (store, repo) = new_repo().await;
    let a = take(&repo, &two_segments(1, 2)).await.unwrap();
    let b = take(&repo, &two_segments(1, 3)).await.unwrap();
    delete(&repo, &a).await;
    collect_all(&repo).await.unwrap();
    // It pins `b`, and through it uses a leaf of `a`.
    let commits = Gate::default();
    store.first(|call| call.is(Operation::Create, "snaps/"), Fate::Pause(commits.clone()));
    let writer = tokio::spawn({
        let repo = repo.clone();
        async move { take(&repo, &two_segments(1, 4)).await }
    });
    commits.reached().await;
    delete(&repo, &b).await;
    // A collector that has seen the pin and no commit, and goes on to walk `b`.
    let walks = Gate::default();
    let pack = format!("packs/{}/", b.id);
    store.first(
        move |call| {
            matches!(call.operation, Operation::Get | Operation::GetRange)
                && call.key.starts_with(&pack)
        },
        Fate::Pause(walks.clone()),
    );
    let patient = CollectOptions { silent: NEVER, ..at_once() };
    let collector = tokio::spawn({
        let repo = repo.clone();
        async move { collect(&repo, &patient, &context()).await }
    });
    walks.reached().await;
    commits.open();
    let c = writer.await.unwrap().unwrap();
    collect_all(&repo).await.unwrap();
    check(&repo, &c.volumes[0], &two_segments(1, 4)).await.unwrap();
    walks.open();
    collector.await.unwrap().unwrap();
    check(&repo, &c.volumes[0], &two_segments(1, 4)).await.unwrap();
    assert_tidy(&repo).await;
}
