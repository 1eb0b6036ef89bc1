//! Lost data is found elsewhere and stored once more; what is nowhere is said to be lost; nothing new relies on it.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use petra_engine::collect::{CollectOptions, collect};
use petra_engine::format::block::BlockRef;
use petra_engine::format::node::Child;
use petra_engine::key::Key;
use petra_engine::record::SnapshotRecord;
use petra_engine::repair::{Healed, Origin, RepairOptions, RepairReport, repair};
use petra_engine::restore::ByteRange;
use petra_engine::snapshot::{Parent, snapshot};
use petra_engine::source::Source;
use petra_engine::store::{MemoryStore, Store, StoreErrorCause};
use petra_engine::tree::segments;
use petra_engine::{PackId, Repository};
use petra_tests::lab::{
    assert_tidy, at_once, check, check_rest, collect_all, context, init, name, objects, request,
    take, verify_all,
};
use petra_tests::recording::{Fate, Recording};
use petra_tests::volume::{Volume, noise, prose};

const SEGMENT: u64 = 64 << 20;

#[derive(Clone, Copy, Debug)]
enum Damage {
    Flipped,
    Truncated,
    Emptied,
    Missing,
}

const DAMAGES: [Damage; 4] = [Damage::Flipped, Damage::Truncated, Damage::Emptied, Damage::Missing];

fn damage(memory: &MemoryStore, pack: PackId, damage: Damage, at: usize) {
    memory.damage(Key::pack(pack).as_str(), |mut body| match damage {
        Damage::Flipped => {
            body[at] ^= 1;
            Some(body)
        }
        Damage::Truncated => {
            body.truncate(at);
            Some(body)
        }
        Damage::Emptied => Some(Vec::new()),
        Damage::Missing => None,
    });
}

/// Two segments, with text whose chunks share a frame.
fn volume() -> Volume {
    Volume::zeros(SEGMENT + 200_000)
        .with(0, &noise(1, 90_000))
        .with(300_000, &prose(2, 90_000))
        .with(SEGMENT, &noise(3, 80_000))
}

async fn new_repo() -> (Arc<MemoryStore>, Repository) {
    let memory = Arc::new(MemoryStore::new());
    (memory.clone(), init(memory).await)
}

/// A snapshot that shares nothing with others.
async fn take_alone(repo: &Repository, volume: &Volume) -> SnapshotRecord {
    let mut request = request("r", &[("v", volume)]);
    request.parent = Parent::None;
    snapshot(repo, request, &context()).await.unwrap()
}

/// Puts other bytes in the place of an object, or brings it back.
async fn put_back(memory: &MemoryStore, key: &Key, body: Bytes) {
    memory.delete(key).await.unwrap();
    memory.put(key, body).await.unwrap();
}

fn data_pack(record: &SnapshotRecord) -> PackId {
    PackId { session: record.id, number: 0 }
}

fn manifest_pack(record: &SnapshotRecord) -> PackId {
    record.volumes[0].root.unwrap().pack
}

async fn repair_with(repo: &Repository, sources: &[&Volume]) -> RepairReport {
    let source = |volume: &&Volume| (name("v"), Arc::new((*volume).clone()) as Arc<dyn Source>);
    let sources = sources.iter().map(source).collect();
    let options = RepairOptions { sources, ..RepairOptions::default() };
    repair(repo, &options, &context()).await.unwrap()
}

fn sum(healed: &[Healed], from: &Origin) -> (u64, u64) {
    let of = || healed.iter().filter(|healed| healed.from == *from);
    (of().map(|healed| healed.chunks).sum(), of().map(|healed| healed.blocks).sum())
}

/// As another process would see it.
async fn opened(memory: &Arc<MemoryStore>) -> Repository {
    Repository::open(memory.clone()).await.unwrap()
}

/// Everything restores, verifies and outlives a collection.
async fn assert_whole(memory: &Arc<MemoryStore>, records: &[(&SnapshotRecord, &Volume)]) {
    let repo = opened(memory).await;
    assert_eq!(verify_all(&repo, true).await.unwrap().problems, []);
    for (record, volume) in records {
        check(&repo, &record.volumes[0], volume).await.unwrap();
    }
    collect_all(&repo).await.unwrap();
    let repo = opened(memory).await;
    for (record, volume) in records {
        check(&repo, &record.volumes[0], volume).await.unwrap();
    }
    assert_eq!(verify_all(&repo, true).await.unwrap().problems, []);
    assert_eq!(repair_with(&repo, &[]).await, RepairReport::default());
}

#[tokio::test]
async fn data_that_another_snapshot_has_in_another_pack() {
    for kind in DAMAGES {
        let (memory, repo) = new_repo().await;
        let volume = volume();
        let (first, second) = (take_alone(&repo, &volume).await, take_alone(&repo, &volume).await);
        let pack = data_pack(&first);
        damage(&memory, pack, kind, 40_000);
        let report = repair_with(&repo, &[]).await;
        assert_eq!((report.lost, report.unresolved), (vec![], vec![]), "{kind:?}");
        assert_eq!(report.quarantined, [pack], "{kind:?}");
        assert!(sum(&report.healed, &Origin::Repository).0 > 0, "{kind:?}");
        assert_whole(&memory, &[(&first, &volume), (&second, &volume)]).await;
    }
}

#[tokio::test]
async fn data_that_a_given_volume_has_in_its_place_or_elsewhere() {
    for kind in DAMAGES {
        for moved in [0_usize, 12_288] {
            let (memory, repo) = new_repo().await;
            let volume = volume();
            let taken = take_alone(&repo, &volume).await;
            let pack = data_pack(&taken);
            damage(&memory, pack, kind, 40_000);
            // Without it, exactly what can't be restored is lost.
            let report = repair_with(&repo, &[]).await;
            let found = check_rest(
                &repo,
                &taken.volumes[0],
                &volume,
                std::iter::once(0..volume.len()).collect(),
            )
            .await
            .unwrap();
            let ranges = |ranges: &[ByteRange]| -> Vec<Range<u64>> {
                ranges.iter().map(|range| range.start..range.end).collect()
            };
            let mut expected: Vec<Range<u64>> =
                found.damaged.iter().flat_map(|damage| ranges(&damage.ranges)).collect();
            expected.sort_by_key(|range| range.start);
            assert_eq!(report.lost.len(), 1, "{kind:?}");
            assert_eq!(report.lost[0].object, Key::pack(pack).as_str());
            assert_eq!(report.lost[0].affected.len(), 1);
            let lost = ranges(&report.lost[0].affected[0].ranges);
            let bytes = |ranges: &[Range<u64>]| ranges.iter().map(|r| r.end - r.start).sum::<u64>();
            assert_eq!(bytes(&lost), bytes(&expected), "{kind:?}");
            assert!(
                expected.iter().all(|r| lost.iter().any(|l| l.start <= r.start && r.end <= l.end))
            );

            let mut source = volume.clone();
            if moved > 0 {
                source.insert(0..SEGMENT, &noise(77, moved));
                source.insert(SEGMENT..SEGMENT + 200_000, &noise(78, moved));
            }
            let report = repair_with(&repo, &[&source]).await;
            assert!(sum(&report.healed, &Origin::Source(name("v"))).0 > 0, "{kind:?} {moved}");
            if moved == 0 {
                assert_eq!(report.lost, [], "{kind:?}");
                assert_whole(&memory, &[(&taken, &volume)]).await;
            } else {
                // The chunks around the insertions are others; nearly all the rest is the same.
                let left: u64 = report
                    .lost
                    .iter()
                    .flat_map(|problem| &problem.affected)
                    .map(|affected| bytes(&ranges(&affected.ranges)))
                    .sum();
                assert!(left <= bytes(&expected) / 2 + 65_536, "{kind:?}: {left} bytes left");
            }
        }
    }
}

#[tokio::test]
async fn data_and_manifests_that_a_later_snapshot_has() {
    for kind in DAMAGES {
        for manifest in [false, true] {
            let (memory, repo) = new_repo().await;
            let volume = volume();
            let taken = take(&repo, &volume).await.unwrap();
            let pack = if manifest { manifest_pack(&taken) } else { data_pack(&taken) };
            // The first leaf of a manifest, and whatever comes after the first half of it.
            let at = if manifest { 100 } else { 40_000 };
            damage(&memory, pack, kind, at);
            let report = repair_with(&repo, &[]).await;
            assert!(!report.lost.is_empty(), "{kind:?} {manifest}");
            assert_eq!((&report.healed[..], &report.quarantined[..]), (&[][..], &[pack][..]));

            // Nothing new relies on what is set aside, so the next snapshot is whole.
            let repo = opened(&memory).await;
            let later = take(&repo, &volume).await.unwrap();
            assert_eq!(later.parent, Some(taken.id));
            check(&repo, &later.volumes[0], &volume).await.unwrap();
            let report = repair_with(&repo, &[]).await;
            assert_eq!(report.lost, [], "{kind:?} {manifest}");
            let (chunks, blocks) = sum(&report.healed, &Origin::Repository);
            assert!(if manifest { blocks > 0 } else { chunks > 0 }, "{kind:?}: {report:?}");
            assert_whole(&memory, &[(&taken, &volume), (&later, &volume)]).await;
        }
    }
}

#[tokio::test]
async fn a_healed_manifest_leads_to_the_data_of_the_other_snapshot() {
    let (memory, repo) = new_repo().await;
    let volume = volume();
    let (first, second) = (take_alone(&repo, &volume).await, take_alone(&repo, &volume).await);
    let found = segments(&repo, &first.volumes[0], &context()).await.unwrap();
    let Child::Block { block: leaf, .. } = found.leaves[0] else { panic!("no leaf") };
    damage(&memory, leaf.pack, Damage::Flipped, leaf.offset as usize + 60);
    let report = repair_with(&repo, &[]).await;
    assert_eq!(report.lost, []);
    assert_eq!(report.quarantined, [manifest_pack(&first)]);
    assert_eq!(sum(&report.healed, &Origin::Repository), (0, 1));
    // What it leads to stays for as long as the healed snapshot does.
    let repo = opened(&memory).await;
    repo.delete(second.id, &context()).await.unwrap();
    collect_all(&repo).await.unwrap();
    assert_whole(&memory, &[(&first, &volume)]).await;
    // Then nothing is left of either.
    let repo = opened(&memory).await;
    repo.delete(first.id, &context()).await.unwrap();
    collect_all(&repo).await.unwrap();
    collect_all(&repo).await.unwrap();
    assert_eq!(objects(&*memory, "packs/").await, []);
}

/// A snapshot, one leaf of which is all that anybody needs of its manifest pack, and another one that has everything once more.
async fn lone_leaf(repo: &Repository) -> (SnapshotRecord, SnapshotRecord, Volume, BlockRef) {
    let volume = volume();
    let before = volume.clone().with(SEGMENT, &noise(8, 80_000));
    let before = take(repo, &before).await.unwrap();
    let first = take(repo, &volume).await.unwrap();
    repo.delete(before.id, &context()).await.unwrap();
    let keep_packs = CollectOptions { max_waste_percent: None, ..at_once() };
    collect(repo, &keep_packs, &context()).await.unwrap();
    let found = segments(repo, &first.volumes[0], &context()).await.unwrap();
    let Child::Block { block: leaf, .. } = found.leaves[0] else { panic!("no leaf") };
    assert_eq!(leaf.pack.session, before.id);
    let second = take_alone(repo, &volume).await;
    (first, second, volume, leaf)
}

/// A pack that comes back after it was healed: what either leads to stays as long as somebody may go by it.
#[tokio::test]
async fn a_lost_manifest_that_comes_back() {
    for damaged in [Damage::Flipped, Damage::Missing] {
        let (memory, repo) = new_repo().await;
        let (first, second, volume, leaf) = lone_leaf(&repo).await;
        let key = Key::pack(leaf.pack);
        let body = memory.get(&key).await.unwrap();
        damage(&memory, leaf.pack, damaged, leaf.offset as usize + 60);
        let report = repair_with(&repo, &[]).await;
        assert_eq!(report.lost, []);
        assert_eq!(sum(&report.healed, &Origin::Repository), (0, 1), "{report:?}");
        put_back(&memory, &key, body).await;
        opened(&memory).await.delete(second.id, &context()).await.unwrap();
        for _ in 0..3 {
            collect_all(&opened(&memory).await).await.unwrap();
            check(&opened(&memory).await, &first.volumes[0], &volume).await.unwrap();
        }
        assert!(memory.get(&key).await.is_err(), "a copy took its place");
        assert_whole(&memory, &[(&first, &volume)]).await;
    }
}

/// A copy that is lost while what it was made of is there: that stays.
#[tokio::test]
async fn a_lost_copy_takes_the_place_of_nothing() {
    let (memory, repo) = new_repo().await;
    let volume = volume();
    let (first, second) = (take_alone(&repo, &volume).await, take_alone(&repo, &volume).await);
    let key = Key::pack(data_pack(&first));
    let body = memory.get(&key).await.unwrap();
    memory.delete(&key).await.unwrap();
    let before = objects(&*memory, "packs/").await;
    assert_eq!(repair_with(&repo, &[]).await.lost, []);
    put_back(&memory, &key, body).await;
    for entry in objects(&*memory, "packs/").await {
        // The table of copies is in a pack of its own.
        if entry.len > 100_000 && !before.contains(&entry) && entry.key != key.as_str() {
            memory.delete(&Key::from_listing(entry.key)).await.unwrap();
        }
    }
    assert_eq!(objects(&*memory, "packs/").await.len(), before.len() + 2);
    opened(&memory).await.delete(second.id, &context()).await.unwrap();
    for _ in 0..2 {
        collect_all(&opened(&memory).await).await.unwrap();
        check(&opened(&memory).await, &first.volumes[0], &volume).await.unwrap();
    }
}

/// Two repairs that knew nothing of each other have copied a leaf, and one of the copies is damaged.
#[tokio::test]
async fn one_of_two_copies_of_a_leaf_is_damaged() {
    let (memory, repo) = new_repo().await;
    let (first, _, volume, leaf) = lone_leaf(&repo).await;
    damage(&memory, leaf.pack, Damage::Missing, 0);
    let copies = repair_twice(&memory).await;
    for copy in &copies {
        let [copy] = &copy[..] else { panic!("{copies:?}") };
        let body = memory.get(copy).await.unwrap();
        let mut flipped = body.to_vec();
        // The leaf comes first, the table last.
        flipped[60] ^= 1;
        put_back(&memory, copy, flipped.into()).await;
        check(&opened(&memory).await, &first.volumes[0], &volume).await.unwrap();
        put_back(&memory, copy, body).await;
    }
}

/// Repairs twice, the second time as if the first had not been; gives the packs that each has stored.
async fn repair_twice(memory: &Arc<MemoryStore>) -> [Vec<Key>; 2] {
    let (mut stored, mut hidden) = ([vec![], vec![]], vec![]);
    for packs in &mut stored {
        let before = objects(&**memory, "").await;
        assert_eq!(repair_with(&opened(memory).await, &[]).await.lost, []);
        for entry in objects(&**memory, "").await {
            if before.iter().any(|known| known.key == entry.key) {
                continue;
            }
            let key = Key::from_listing(entry.key.clone());
            if entry.key.starts_with("packs/") {
                packs.push(key);
            } else if entry.key.starts_with("snaps/") || entry.key.starts_with("moves/") {
                hidden.push((key.clone(), memory.get(&key).await.unwrap()));
                memory.delete(&key).await.unwrap();
            }
        }
    }
    for (key, body) in hidden {
        memory.put(&key, body).await.unwrap();
    }
    stored
}

/// Repairs that knew nothing of each other: any of the copies will do.
#[tokio::test]
async fn one_of_two_copies_is_lost() {
    for is_manifest in [false, true] {
        let (memory, repo) = new_repo().await;
        let volume = volume();
        let (first, second) = (take_alone(&repo, &volume).await, take_alone(&repo, &volume).await);
        let pack = if is_manifest { manifest_pack(&first) } else { data_pack(&first) };
        damage(&memory, pack, Damage::Missing, 0);
        let copies = repair_twice(&memory).await;
        // The first of them and, in another world, the second.
        for lost in &copies {
            assert!(!lost.is_empty());
            let world = Arc::new(MemoryStore::new());
            for entry in objects(&*memory, "").await {
                let key = Key::from_listing(entry.key);
                if !lost.iter().any(|pack| pack.as_str() == key.as_str()) {
                    world.put(&key, memory.get(&key).await.unwrap()).await.unwrap();
                }
            }
            let repo = opened(&world).await;
            check(&repo, &first.volumes[0], &volume).await.unwrap();
            repo.delete(second.id, &context()).await.unwrap();
            collect_all(&repo).await.unwrap();
            check(&opened(&world).await, &first.volumes[0], &volume).await.unwrap();
        }
    }
}

/// A copy whose table and pieces are in different packs, of which only the one with the pieces is lost.
#[tokio::test]
async fn a_copy_without_its_bytes() {
    let (memory, repo) = new_repo().await;
    let volume = volume();
    let (first, _) = (take_alone(&repo, &volume).await, take_alone(&repo, &volume).await);
    damage(&memory, data_pack(&first), Damage::Missing, 0);
    let mut data = Vec::new();
    for key in repair_twice(&memory).await.into_iter().flatten() {
        if memory.get(&key).await.unwrap().len() > 100_000 {
            data.push(key);
        }
    }
    assert_eq!(data.len(), 2, "{data:?}");
    for lost in data {
        let body = memory.get(&lost).await.unwrap();
        memory.delete(&lost).await.unwrap();
        check(&opened(&memory).await, &first.volumes[0], &volume).await.unwrap();
        // Damaged instead of gone.
        put_back(&memory, &lost, vec![1; body.len()].into()).await;
        check(&opened(&memory).await, &first.volumes[0], &volume).await.unwrap();
        put_back(&memory, &lost, body).await;
    }
}

/// What one repair has done is found even where the decision of another can't be read.
#[tokio::test]
async fn a_damaged_decision_hides_only_its_own_copies() {
    let (memory, repo) = new_repo().await;
    let volume = volume();
    let (first, _) = (take_alone(&repo, &volume).await, take_alone(&repo, &volume).await);
    let pack = data_pack(&first);
    let whole = memory.get(&Key::pack(pack)).await.unwrap();
    // Something at the beginning of the pack is healed, then something at its end.
    damage(&memory, pack, Damage::Flipped, 5_000);
    repair_with(&repo, &[]).await;
    let healed = objects(&*memory, "moves/").await;
    assert_eq!(healed.len(), 1);
    let session = healed[0].key.rsplit('/').next().unwrap().parse().unwrap();
    damage(&memory, pack, Damage::Truncated, 100_000);
    repair_with(&opened(&memory).await, &[]).await;
    assert_eq!(objects(&*memory, "moves/").await.len(), 2);
    memory.damage(Key::snap(session).as_str(), |mut body| {
        body[200] ^= 1;
        Some(body)
    });
    // What the damaged decision was for is there again.
    put_back(&memory, &Key::pack(pack), whole.slice(..100_000)).await;
    check(&opened(&memory).await, &first.volumes[0], &volume).await.unwrap();
}

#[tokio::test]
async fn a_repair_can_end_at_any_request_and_be_repeated() {
    let memory = Arc::new(MemoryStore::new());
    let store = Recording::new(memory.clone());
    let repo = init(store.clone()).await;
    let volume = volume();
    let (first, second) = (take_alone(&repo, &volume).await, take_alone(&repo, &volume).await);
    let other = take_alone(&repo, &Volume::noise(9, 50_000)).await;
    damage(&memory, data_pack(&first), Damage::Flipped, 40_000);
    damage(&memory, manifest_pack(&first), Damage::Missing, 0);
    let mut n = 0;
    loop {
        let repo = Repository::open(store.clone()).await.unwrap();
        let fate =
            if n % 2 == 0 { Fate::Fail(StoreErrorCause::Unavailable) } else { Fate::LoseAnswer };
        store.from_nth(n, fate);
        let done = repair(&repo, &RepairOptions::default(), &context()).await;
        store.reset();
        let fresh = opened(&memory).await;
        check(&fresh, &other.volumes[0], &Volume::noise(9, 50_000)).await.unwrap();
        if done.is_ok() {
            break;
        }
        // Each attempt leaves a pin or a hint that the next one reads, so the steps must grow faster.
        n += 1 + n / 8;
    }
    assert!(n > 20, "{n} requests");
    assert_whole(&memory, &[(&first, &volume), (&second, &volume)]).await;
}

#[tokio::test]
async fn a_dry_run_changes_nothing_and_says_what_is_healed() {
    let memory = Arc::new(MemoryStore::new());
    let store = Recording::new(memory.clone());
    let repo = init(store.clone()).await;
    let volume = volume();
    let (first, _) = (take_alone(&repo, &volume).await, take_alone(&repo, &volume).await);
    damage(&memory, data_pack(&first), Damage::Truncated, 60_000);
    store.reset();
    let before = objects(&*memory, "").await;
    let dry_run = RepairOptions { dry_run: true, ..RepairOptions::default() };
    let said = repair(&repo, &dry_run, &context()).await.unwrap();
    assert!(!store.log().iter().any(|call| call.is_write()));
    assert_eq!(objects(&*memory, "").await, before);
    assert_eq!(said, repair_with(&repo, &[]).await);
    assert!(!said.healed.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_repairs_and_a_collection_at_the_same_time() {
    let (memory, repo) = new_repo().await;
    let volume = volume();
    let (first, second) = (take_alone(&repo, &volume).await, take_alone(&repo, &volume).await);
    damage(&memory, data_pack(&first), Damage::Missing, 0);
    let repairs = [opened(&memory).await, opened(&memory).await]
        .map(|repo| tokio::spawn(async move { repair_with(&repo, &[]).await }));
    let collector = {
        let repo = opened(&memory).await;
        tokio::spawn(async move {
            let options = CollectOptions::default();
            collect(&repo, &options, &context()).await.unwrap()
        })
    };
    for repair in repairs {
        assert_eq!(repair.await.unwrap().lost, []);
    }
    collector.await.unwrap();
    assert_whole(&memory, &[(&first, &volume), (&second, &volume)]).await;
}

#[tokio::test]
async fn a_whole_repository_needs_no_repair() {
    let (memory, repo) = new_repo().await;
    let taken = take(&repo, &volume()).await.unwrap();
    assert_eq!(repair_with(&repo, &[&volume()]).await, RepairReport::default());
    assert_tidy(&repo).await;
    assert_whole(&memory, &[(&taken, &volume())]).await;
    assert!(memory.list("quarantine/", None).await.unwrap().entries.is_empty());
}
