//! Every kind of damage to every kind of object: it is named, never restored as if it were right, and costs nothing
//! but what it hits.

use std::ops::Range;
use std::sync::Arc;

use petra_engine::clone::ClonePin;
use petra_engine::collect::{CollectOptions, collect};
use petra_engine::format::envelope;
use petra_engine::format::node::Child;
use petra_engine::key::Key;
use petra_engine::record::{Pin, PinOwner, SnapshotRecord, kind};
use petra_engine::restore::{ByteRange, RestoreReport};
use petra_engine::snapshot::snapshot;
use petra_engine::store::{MemoryStore, Store};
use petra_engine::tree::segments;
use petra_engine::url::{Item, SnapshotRef};
use petra_engine::verify::VerifyReport;
use petra_engine::{Error, PackId, Repository};
use petra_tests::lab::{
    at_once, check, check_rest, collect_all, context, init, name, objects, request, take,
    verify_all,
};
use petra_tests::volume::{Volume, noise, prose};

const SEGMENT: u64 = 64 << 20;

/// What happens to an object.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Damage {
    Truncated,
    Flipped,
    Missing,
    Emptied,
    Replaced,
}

const DAMAGES: [Damage; 5] =
    [Damage::Truncated, Damage::Flipped, Damage::Missing, Damage::Emptied, Damage::Replaced];

/// Two snapshots of two volumes each, the second incremental; a deleted third; a clone's pin.
struct Site {
    memory: Arc<MemoryStore>,
    repo: Repository,
    records: Vec<SnapshotRecord>,
    /// By snapshot, then by volume.
    volumes: Vec<[Volume; 2]>,
    pin: Key,
}

impl Site {
    async fn new() -> Self {
        let memory = Arc::new(MemoryStore::new());
        let repo = init(memory.clone()).await;
        let long = Volume::zeros(SEGMENT + 90_000)
            .with(0, &noise(1, 70_000))
            .with(300_000, &prose(2, 60_000))
            .with(SEGMENT, &noise(3, 60_000));
        let changed = long.clone().with(30_000, &noise(4, 9_000));
        let short = Volume::noise(5, 40_000);
        let volumes = vec![[long, short.clone()], [changed, short]];
        let mut records = Vec::new();
        for [long, short] in &volumes {
            let request = request("r", &[("long", long), ("short", short)]);
            records.push(snapshot(&repo, request, &context()).await.unwrap());
        }
        let deleted = take(&repo, &Volume::noise(9, 20_000)).await.unwrap();
        repo.delete(deleted.id, &context()).await.unwrap();
        let owner = context().host.new_id();
        let pin = Key::pin(owner, 0);
        let body = Pin {
            stamp: String::new(),
            owner: PinOwner::Clone,
            snapshots: vec![records[0].id],
            metadata: [].into(),
        };
        repo.store().put(&pin, envelope::seal(kind::PIN, &pin, &body).unwrap()).await.unwrap();
        Self { memory, repo, records, volumes, pin }
    }

    /// The pack of the first snapshot's data, and that of its manifest.
    fn packs(&self) -> [PackId; 2] {
        [0, 1].map(|number| PackId { session: self.records[0].id, number })
    }

    /// Damages an object, at a place of it where that makes a difference.
    async fn damage(&self, key: &Key, damage: Damage, place: usize, other: &Key) {
        let other = self.memory.get(other).await.unwrap();
        self.memory.damage(key.as_str(), |mut body| match damage {
            Damage::Truncated => {
                body.truncate(place);
                Some(body)
            }
            Damage::Flipped => {
                body[place] ^= 1;
                Some(body)
            }
            Damage::Missing => None,
            Damage::Emptied => Some(Vec::new()),
            Damage::Replaced => Some(other.to_vec()),
        });
    }

    /// Restores everything as far as it goes: what is damaged, by snapshot and volume.
    async fn restore_all(&self, key: &Key) -> Vec<Vec<RestoreReport>> {
        let mut reports = Vec::new();
        for (record, volumes) in self.records.iter().zip(&self.volumes) {
            let mut of_snapshot = Vec::new();
            for (record, volume) in record.volumes.iter().zip(volumes) {
                let strict = check(&self.repo, record, volume).await;
                // The ranges are not known before: everything is excused, and checked again with them.
                let all = 0..volume.len();
                let found = check_rest(&self.repo, record, volume, vec![all]).await.unwrap();
                let excused = ranges(&found);
                let report = check_rest(&self.repo, record, volume, excused).await.unwrap();
                assert_eq!(report.damaged, found.damaged);
                assert_eq!(strict.is_ok(), report.damaged.is_empty());
                if let Err(error) = strict {
                    assert!(error.is_damage() || matches!(error, Error::Version { .. }), "{error}");
                    assert!(error.to_string().contains(key.as_str()), "{error}");
                }
                assert!(report.damaged.iter().all(|damage| damage.object.contains(key.as_str())));
                of_snapshot.push(report);
            }
            reports.push(of_snapshot);
        }
        reports
    }

    /// What a verification says is damaged, in the same form.
    fn verified(&self, report: &VerifyReport) -> Vec<Vec<Vec<ByteRange>>> {
        let of = |record: &SnapshotRecord, volume: &petra_engine::Name| {
            let affected = report.problems.iter().flat_map(|problem| &problem.affected);
            let of_volume = affected.filter(|a| a.snapshot == record.id && a.volume == *volume);
            join(of_volume.flat_map(|a| a.ranges.iter().map(|r| r.start..r.end)).collect())
        };
        let records = self.records.iter();
        records.map(|r| r.volumes.iter().map(|v| of(r, &v.name)).collect()).collect()
    }
}

fn ranges(report: &RestoreReport) -> Vec<Range<u64>> {
    report.damaged.iter().flat_map(|d| d.ranges.iter().map(|r| r.start..r.end)).collect()
}

fn join(mut ranges: Vec<Range<u64>>) -> Vec<ByteRange> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<ByteRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => joined.push(range.into()),
        }
    }
    joined
}

/// Damages a pack of the first snapshot in every way and looks at everything.
async fn damaged_pack(which: usize, place: impl AsyncFn(&Site) -> usize, is_body: bool) {
    for damage in DAMAGES {
        let site = Site::new().await;
        let key = Key::pack(site.packs()[which]);
        let other = Key::pack(PackId { session: site.records[1].id, number: which as u32 });
        site.damage(&key, damage, place(&site).await, &other).await;

        let restored = site.restore_all(&key).await;
        let damaged: Vec<Vec<Vec<ByteRange>>> = restored
            .iter()
            .map(|reports| reports.iter().map(|report| join(ranges(report))).collect())
            .collect();
        let is_hit = |snapshot: usize| damaged[snapshot].iter().any(|ranges| !ranges.is_empty());
        let part = matches!(damage, Damage::Truncated | Damage::Flipped);
        assert_eq!(is_hit(0), is_body || !part, "{damage:?}");

        let deep = verify_all(&site.repo, true).await.unwrap();
        assert_eq!(site.verified(&deep), damaged, "{damage:?}");
        assert!(!deep.problems.is_empty(), "{damage:?}");
        assert!(deep.problems.iter().all(|p| p.object.contains(key.as_str())), "{deep:?}");
        let shallow = verify_all(&site.repo, false).await.unwrap();
        if matches!(damage, Damage::Missing | Damage::Emptied) || (which == 1 && is_body) {
            assert_eq!(site.verified(&shallow), damaged, "{damage:?} structure");
        }

        // A new snapshot can be taken, and is whole if it does not rely on what is damaged.
        let ctx = context();
        let mut fresh = request("r", &[("long", &site.volumes[1][0])]);
        fresh.parent = petra_engine::snapshot::Parent::None;
        let fresh = snapshot(&site.repo, fresh, &ctx).await.unwrap();
        check(&site.repo, &fresh.volumes[0], &site.volumes[1][0]).await.unwrap();
        take(&site.repo, &site.volumes[1][0]).await.unwrap();

        // A collection stops at damage, or takes nothing away that can be restored.
        match collect_all(&site.repo).await {
            Ok(_) => {}
            Err(error) => assert!(error.to_string().contains(key.as_str()), "{error}"),
        }
        let again = site.restore_all(&key).await;
        for (before, after) in restored.iter().flatten().zip(again.iter().flatten()) {
            assert_eq!(before.damaged, after.damaged, "{damage:?}");
        }
    }
}

#[tokio::test]
async fn a_data_pack() {
    damaged_pack(0, async |_| 20_000, true).await;
}

#[tokio::test]
async fn the_footer_of_a_data_pack() {
    damaged_pack(0, async |site| len(site, 0).await - 10, false).await;
}

#[tokio::test]
async fn a_leaf() {
    let leaf = async |site: &Site| {
        let volume = &site.records[0].volumes[0];
        let found = segments(&site.repo, volume, &context()).await.unwrap();
        let Child::Block { block: leaf, .. } = found.leaves[1] else { panic!("no leaf") };
        leaf.offset as usize + 60
    };
    damaged_pack(1, leaf, true).await;
}

#[tokio::test]
async fn the_version_of_a_leaf() {
    let version = async |site: &Site| {
        let volume = &site.records[0].volumes[0];
        let found = segments(&site.repo, volume, &context()).await.unwrap();
        let Child::Block { block: leaf, .. } = found.leaves[1] else { panic!("no leaf") };
        leaf.offset as usize + 4
    };
    damaged_pack(1, version, true).await;
}

#[tokio::test]
async fn a_node() {
    let node = async |site: &Site| site.records[0].volumes[0].root.unwrap().offset as usize + 50;
    damaged_pack(1, node, true).await;
}

async fn len(site: &Site, which: usize) -> usize {
    site.memory.get(&Key::pack(site.packs()[which])).await.unwrap().len()
}

#[tokio::test]
async fn a_record() {
    for damage in DAMAGES {
        let site = Site::new().await;
        let [bad, good] = [0, 1].map(|n| site.records[n].id);
        let key = Key::snap(bad);
        site.damage(&key, damage, 200, &Key::snap(good)).await;
        let found = site.repo.find(&SnapshotRef::Id(bad)).await;
        let error = found.unwrap_err();
        if damage == Damage::Missing {
            assert!(matches!(error, Error::Unknown { .. }), "{error}");
        } else {
            assert!(matches!(error, Error::Damaged { .. }), "{error}");
            assert!(error.to_string().contains(key.as_str()), "{error}");
            let report = verify_all(&site.repo, false).await.unwrap();
            assert_eq!(report.problems.len(), 1, "{report:?}");
            assert_eq!(report.problems[0].object, key.as_str());
            assert_eq!(report.snapshots, 1);
            let packs = objects(site.repo.store(), "packs/").await;
            let error = collect_all(&site.repo).await.unwrap_err();
            assert!(error.to_string().contains(key.as_str()), "{error}");
            assert_eq!(objects(site.repo.store(), "packs/").await, packs);
        }
        let found = site.repo.find(&SnapshotRef::Id(good)).await.unwrap();
        check(&site.repo, &found.volumes[0], &site.volumes[1][0]).await.unwrap();
        take(&site.repo, &site.volumes[1][0]).await.unwrap();
    }
}

#[tokio::test]
async fn the_configuration() {
    for damage in DAMAGES {
        let site = Site::new().await;
        let other = Key::snap(site.records[0].id);
        site.damage(&Key::config(), damage, 100, &other).await;
        let error = Repository::open(site.memory.clone()).await.unwrap_err();
        match damage {
            Damage::Missing => assert!(matches!(error, Error::NotARepository { .. }), "{error}"),
            _ => assert!(error.to_string().starts_with("config is damaged"), "{error}"),
        }
    }
}

/// Pins, marks and entries of the catalogue: collections stop, restores and new snapshots go on.
async fn damaged_object(key: &Key, site: &Site, damage: Damage, stops_collections: bool) {
    site.damage(key, damage, 100, &Key::config()).await;
    let packs = objects(site.repo.store(), "packs/").await;
    if stops_collections && damage != Damage::Missing {
        let error = collect_all(&site.repo).await.unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        assert!(error.to_string().contains(key.as_str()), "{error}");
        assert_eq!(objects(site.repo.store(), "packs/").await, packs);
    } else {
        collect_all(&site.repo).await.unwrap();
    }
    for (record, volumes) in site.records.iter().zip(&site.volumes) {
        let found = site.repo.find(&SnapshotRef::Id(record.id)).await.unwrap();
        check(&site.repo, &found.volumes[0], &volumes[0]).await.unwrap();
    }
    if let Err(error) = verify_all(&site.repo, true).await {
        assert!(error.to_string().contains(key.as_str()), "{error}");
    }
    take(&site.repo, &site.volumes[1][0]).await.unwrap();
}

#[tokio::test]
async fn a_pin() {
    for damage in DAMAGES {
        let site = Site::new().await;
        damaged_object(&site.pin, &site, damage, true).await;
    }
}

#[tokio::test]
async fn a_mark() {
    for damage in DAMAGES {
        let site = Site::new().await;
        let marks = objects(site.repo.store(), "marks/").await;
        damaged_object(&Key::from_listing(marks[0].key.clone()), &site, damage, true).await;
    }
}

/// Such a snapshot is still listed, but nothing new relies on it.
#[tokio::test]
async fn a_mark_of_one_that_came_back() {
    for damage in DAMAGES {
        let site = Site::new().await;
        let last = site.records[1].id;
        site.repo.delete(last, &context()).await.unwrap();
        site.repo.undelete(last, &context()).await.unwrap();
        let key = Key::mark(last, 2);
        site.damage(&key, damage, 40, &Key::mark(last, 1)).await;
        let next = site.volumes[1][0].clone().with(0, b"next");
        let taken = take(&site.repo, &next).await.unwrap();
        assert_ne!(taken.parent, Some(last), "{damage:?}");
        check(&site.repo, &taken.volumes[0], &next).await.unwrap();
        let pins = objects(site.repo.store(), "pins/").await;
        assert_eq!(pins.len(), 1, "{damage:?}: {pins:?}");
    }
}

/// What is left of a snapshot that only a clone needs stays, whatever else of it is lost.
#[tokio::test]
async fn a_part_of_what_a_clone_reads() {
    let memory = Arc::new(MemoryStore::new());
    let repo = init(memory.clone()).await;
    let segments_of = |seed| {
        (0..3).fold(Volume::zeros(2 * SEGMENT + 90_000), |volume, n| {
            volume.with(n * SEGMENT, &noise(10 * n + seed, 80_000))
        })
    };
    let volume = segments_of(0).with(2 * SEGMENT, &noise(99, 80_000));
    let first = take(&repo, &segments_of(0)).await.unwrap();
    let second = take(&repo, &volume).await.unwrap();
    let pin = ClonePin::take(&repo, second.id, &context()).await.unwrap();
    for record in [&first, &second] {
        repo.delete(record.id, &context()).await.unwrap();
    }
    let keep_packs = CollectOptions { max_waste_percent: None, ..at_once() };
    collect(&repo, &keep_packs, &context()).await.unwrap();
    check(&repo, &second.volumes[0], &volume).await.unwrap();
    // The leaf of the first segment is in a pack of the first snapshot.
    let found = segments(&repo, &second.volumes[0], &context()).await.unwrap();
    let Child::Block { block: leaf, .. } = found.leaves[0] else { panic!("no leaf") };
    assert_eq!(leaf.pack.session, first.id);
    memory.damage(Key::pack(leaf.pack).as_str(), |_| None);
    collect(&repo, &keep_packs, &context()).await.unwrap();
    let excused = 0..2 * SEGMENT;
    check_rest(&repo, &second.volumes[0], &volume, vec![excused]).await.unwrap();
    pin.end(&context()).await.unwrap();
    collect(&repo, &keep_packs, &context()).await.unwrap();
    assert_eq!(objects(repo.store(), "packs/").await, []);
}

#[tokio::test]
async fn an_entry_of_the_catalogue() {
    for damage in DAMAGES {
        let site = Site::new().await;
        let key = Key::catalogue(site.repo.keys(), &name("e"), &name("r"), site.records[0].id);
        damaged_object(&key, &site, damage, false).await;
    }
}

#[tokio::test]
async fn newer_versions_are_told_apart_from_damage() {
    let site = Site::new().await;
    let key = Key::snap(site.records[0].id);
    for (key, kind) in [(&key, "decision"), (&Key::config(), "repository")] {
        site.memory.damage(key.as_str(), |body| {
            let text = String::from_utf8(body).unwrap();
            Some(text.replacen(&format!("{kind} 1 "), &format!("{kind} 2 "), 1).into_bytes())
        });
    }
    let error = site.repo.find(&SnapshotRef::Id(site.records[0].id)).await.unwrap_err();
    assert!(matches!(error, Error::Version { found: 2, .. }), "{error}");
    assert!(error.to_string().contains(key.as_str()), "{error}");
    let error = Repository::open(site.memory.clone()).await.unwrap_err();
    assert!(matches!(error, Error::Version { found: 2, .. }), "{error}");
}

/// What the structure check can't see, reading the data does.
#[tokio::test]
async fn only_reading_finds_a_flipped_bit_in_data() {
    let site = Site::new().await;
    let key = Key::pack(site.packs()[0]);
    site.damage(&key, Damage::Flipped, 30_000, &key).await;
    assert_eq!(verify_all(&site.repo, false).await.unwrap().problems, []);
    let found = verify_all(&site.repo, true).await.unwrap().problems;
    assert!(!found.is_empty());
    assert_eq!(site.repo.snapshots(&Item::Repository).await.unwrap().len(), 2);
}
