//! Encrypted repositories: they do what plain ones do, show nothing, and take nothing that was not written with their
//! keys.

use std::collections::BTreeMap;
use std::sync::Arc;

use petra_engine::collect::{CollectOptions, collect};
use petra_engine::crypto::list_keys;
use petra_engine::diff::diff;
use petra_engine::format::envelope;
use petra_engine::format::node::Child;
use petra_engine::key::Key;
use petra_engine::record::{Config, Mark, MarkKind, SnapshotRecord, VolumeRecord, Writers, kind};
use petra_engine::restore::{RestoreOptions, restore};
use petra_engine::snapshot::{Parent, SnapshotRequest, snapshot};
use petra_engine::store::{LocalStore, MemoryStore, Store};
use petra_engine::target::FileTarget;
use petra_engine::tree::segments;
use petra_engine::url::{Item, Selector, SnapshotRef};
use petra_engine::usage::usage;
use petra_engine::{Error, ErrorKind, NewKey, Repository, Secret};
use petra_tests::lab::{
    assert_tidy, at_once, check, check_rest, collect_all, context, init, init_encrypted, key, name,
    objects, request, secret, take, verify_all,
};
use petra_tests::recording::{Fate, Operation, Recording};
use petra_tests::volume::{Volume, noise, prose};
use proptest::prelude::*;

use super::roundtrip::any_volume;
use super::runtime;

const SEGMENT: u64 = 64 << 20;

async fn memory() -> (Arc<MemoryStore>, Repository) {
    let store = Arc::new(MemoryStore::new());
    let repo = init_encrypted(store.clone(), &context()).await;
    (store, repo)
}

async fn unlock(store: Arc<dyn Store>, passphrase: &str) -> Result<Repository, Error> {
    Repository::unlock(store, &secret(passphrase)).await
}

/// Every object: its key and its bytes.
async fn everything(store: &dyn Store) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in objects(store, "").await {
        let body = store.get(&Key::from_listing(entry.key.clone())).await.unwrap();
        all.push((entry.key, body.to_vec()));
    }
    all
}

/// Two snapshots that share most, with every text that a person can give.
async fn telling_story(repo: &Repository) -> (Vec<SnapshotRecord>, Vec<Volume>) {
    let first = Volume::zeros(SEGMENT + 50_000)
        .with(0, &noise(1, 60_000))
        .with(100_000, &prose(2, 40_000))
        .with(SEGMENT, &noise(3, 30_000));
    let second = first.clone().with(20_000, &noise(4, 3_000));
    let mut records = Vec::new();
    for volume in [&first, &second] {
        let request = SnapshotRequest {
            experiment: name("telling-experiment"),
            run: name("telling run"),
            name: Some(name("telling-name")),
            labels: BTreeMap::from([("telling-label".to_owned(), "telling-value".to_owned())]),
            message: Some("telling message".to_owned()),
            metadata: BTreeMap::from([("telling-field".to_owned(), "telling-data".to_owned())]),
            ..request("r", &[("telling-volume", volume)])
        };
        records.push(snapshot(repo, request, &context()).await.unwrap());
    }
    (records, vec![first, second])
}

async fn a_life(store: Arc<dyn Store>) {
    let repo = init_encrypted(store.clone(), &context()).await;
    let (records, volumes) = telling_story(&repo).await;
    assert!(records[1].stats.new_bytes < records[0].stats.new_bytes / 2, "{records:?}");

    // As on another machine, with nothing but the passphrase.
    let repo = unlock(store.clone(), "test").await.unwrap();
    assert_eq!(repo.experiments().await.unwrap(), [name("telling-experiment")]);
    assert_eq!(repo.runs(&name("telling-experiment")).await.unwrap(), [name("telling run")]);
    let experiment = name("telling-experiment");
    let selector = Selector::Text(name("telling-name"));
    let found = SnapshotRef::InRun { experiment, run: name("telling run"), selector };
    assert_eq!(repo.find(&found).await.unwrap(), records[1]);
    assert!(repo.runs(&name("other")).await.is_err());
    for (record, volume) in records.iter().zip(&volumes) {
        check(&repo, &record.volumes[0], volume).await.unwrap();
    }

    // Only what differs is read for a difference, and written in place.
    let [old, new] = [&records[0].volumes[0], &records[1].volumes[0]];
    let changed = diff(&repo, old, new, &context()).await.unwrap();
    let ranges = changed.ranges;
    assert!(ranges.iter().all(|r| r.end <= 100_000), "{ranges:?}");
    assert!(!ranges.is_empty());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("volume");
    volumes[0].save(&path);
    let options = RestoreOptions { in_place: true, ..RestoreOptions::default() };
    let target = FileTarget::open_existing(&path, new.len_bytes).unwrap();
    let report = restore(&repo, new, target, &options, &context()).await.unwrap();
    assert!((1..60_000).contains(&report.written_bytes), "{report:?}");
    assert_eq!(volumes[1].difference(&path), None);

    // The same data in another run is not stored again, and belongs to nobody alone.
    let again = request("other", &[("v", &volumes[1])]);
    let again = snapshot(&repo, again, &context()).await.unwrap();
    assert_eq!(again.stats.new_bytes, 0);
    assert_eq!(again.volumes[0].content, records[1].volumes[0].content);
    let used = usage(&repo, &Item::Repository, &context()).await.unwrap();
    assert!(used.live_bytes > 0 && used.live_bytes <= used.packs_bytes);

    // What is deleted goes, by compaction too, and the rest stays whole.
    repo.delete(records[0].id, &context()).await.unwrap();
    take(&repo, &Volume::noise(8, 300_000)).await.unwrap();
    let last = unlock(store, "test").await.unwrap();
    let options = CollectOptions { max_waste_percent: Some(0), ..at_once() };
    for _ in 0..2 {
        collect(&last, &options, &context()).await.unwrap();
    }
    assert_tidy(&last).await;
    check(&last, &records[1].volumes[0], &volumes[1]).await.unwrap();
    check(&last, &again.volumes[0], &volumes[1]).await.unwrap();
}

#[tokio::test]
async fn a_life_in_memory() {
    a_life(Arc::new(MemoryStore::new())).await;
}

#[tokio::test]
async fn a_life_in_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    a_life(Arc::new(LocalStore::new(dir.path()))).await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_volume_comes_back(first in any_volume(), second in any_volume()) {
        runtime().block_on(async {
            let (store, repo) = memory().await;
            let records = [take(&repo, &first).await.unwrap(), take(&repo, &second).await.unwrap()];
            let repo = unlock(store, "test").await.unwrap();
            for (record, volume) in records.iter().zip([&first, &second]) {
                check(&repo, &record.volumes[0], volume).await.unwrap();
            }
            assert_tidy(&repo).await;
        });
    }
}

/// Garbage in every pack: what is needed is taken out of sealed frames and sealed again, blocks move as they are.
#[tokio::test]
async fn compaction_of_sealed_packs() {
    let (store, repo) = memory().await;
    let mut volume = Volume::noise(1, 400_000);
    let first = take(&repo, &volume).await.unwrap();
    // With keys of chance, and cuts that follow from them, what stays is long enough for chunks to be found again.
    volume.write(0, &noise(2, 100_000));
    let second = take(&repo, &volume).await.unwrap();
    repo.delete(first.id, &context()).await.unwrap();
    let options = CollectOptions { max_waste_percent: Some(0), ..at_once() };
    let mut compacted = 0;
    for _ in 0..3 {
        compacted += collect(&repo, &options, &context()).await.unwrap().compacted_packs;
    }
    assert!(compacted > 0);
    let repo = unlock(store, "test").await.unwrap();
    assert_eq!(verify_all(&repo, true).await.unwrap().problems, []);
    check(&repo, &second.volumes[0], &volume).await.unwrap();
}

/// Bytes that someone may look for.
async fn tells(repo: &Repository, records: &[SnapshotRecord]) -> Vec<Vec<u8>> {
    let texts = ["telling", "stamp", "commit"].iter();
    let mut tells: Vec<Vec<u8>> = texts.map(|text| text.as_bytes().to_vec()).collect();
    for seed in [1, 3, 4] {
        tells.extend([100, 1_000, 2_000].map(|at| noise(seed, 3_000)[at..at + 24].to_vec()));
    }
    for record in records {
        tells.push(record.volumes[0].content.to_string().into_bytes());
        let leaves = segments(repo, &record.volumes[0], &context()).await.unwrap().leaves;
        for leaf in leaves {
            let Child::Block { block: leaf, .. } = leaf else { panic!("no leaf") };
            tells.push(leaf.digest.0.to_vec());
        }
    }
    // How blocks and what zstd made begin: below the seals nothing begins like anything.
    tells.extend([b"PtBk".to_vec(), vec![0x28, 0xb5, 0x2f, 0xfd]]);
    tells
}

fn found<'a>(tells: &'a [Vec<u8>], all: &[(String, Vec<u8>)]) -> Vec<&'a [u8]> {
    let within = |haystack: &[u8], tell: &[u8]| haystack.windows(tell.len()).any(|w| w == tell);
    let shown = |tell: &&Vec<u8>| {
        all.iter().any(|(key, body)| within(key.as_bytes(), tell) || within(body, tell))
    };
    tells.iter().filter(shown).map(Vec::as_slice).collect()
}

#[tokio::test]
async fn nothing_readable_is_in_the_store() {
    let (store, repo) = memory().await;
    let (records, _) = telling_story(&repo).await;
    repo.delete(records[0].id, &context()).await.unwrap();
    let all = everything(&*store).await;
    let mut tells_of_it = tells(&repo, &records).await;
    tells_of_it.push(b"test".to_vec());
    assert_eq!(found(&tells_of_it, &all), [] as [&[u8]; 0]);
    for (key, body) in &all {
        let text = String::from_utf8_lossy(body);
        let (first, rest) = text.split_once('\n').unwrap_or((&text, ""));
        match key.split('/').next().unwrap() {
            // For everyone to read: how to open the rest.
            "config" | "keys" => assert!(rest.starts_with("{\n"), "{key}"),
            "packs" => assert!(body.starts_with(b"petrapak") && body[10] == 1, "{key}"),
            _ => {
                assert!(first.ends_with(" 1 aes-256-gcm"), "{key}: {first}")
            }
        }
    }

    // The same search finds all that in a plain repository.
    let plain = Arc::new(MemoryStore::new());
    let repo = init(plain.clone()).await;
    let (records, _) = telling_story(&repo).await;
    let tells = tells(&repo, &records).await;
    assert_eq!(found(&tells, &everything(&*plain).await), tells);
}

/// Equal data in two repositories looks different: nobody can tell that both have it.
#[tokio::test]
async fn repositories_do_not_compare() {
    let volume = Volume::noise(1, 300_000);
    let mut seen: Vec<VolumeRecord> = Vec::new();
    for _ in 0..2 {
        let (_, repo) = memory().await;
        seen.push(take(&repo, &volume).await.unwrap().volumes.remove(0));
    }
    seen.push(
        take(&init(Arc::new(MemoryStore::new())).await, &volume).await.unwrap().volumes.remove(0),
    );
    let contents: std::collections::HashSet<_> = seen.iter().map(|v| v.content).collect();
    assert_eq!(contents.len(), 3);
    assert!(seen.iter().all(|v| v.data_bytes == seen[0].data_bytes));
}

/// Of the bodies of packs every 31st byte, of all else every byte.
#[tokio::test]
async fn every_changed_byte_is_noticed() {
    let (store, repo) = memory().await;
    let volume = Volume::noise(1, 20_000).with(9_000, &prose(2, 9_000));
    let record = take(&repo, &volume).await.unwrap();
    let deleted = take(&repo, &Volume::noise(2, 1_000)).await.unwrap();
    repo.delete(deleted.id, &context()).await.unwrap();
    let mut tried = 0;
    for (key, body) in everything(&*store).await {
        // Found by whoever opens the repository: below, and in the tests of slots.
        if key == "config" || key.starts_with("keys/") {
            continue;
        }
        // Those of the deleted snapshot matter to collectors only.
        if key.contains(&deleted.id.to_string()) && !key.starts_with("marks/") {
            continue;
        }
        for place in 0..body.len() {
            let in_body = key.starts_with("packs/") && (200..body.len() - 200).contains(&place);
            if in_body && place % 31 != 0 {
                continue;
            }
            store.damage(&key, |mut body| {
                body[place] ^= 0x40;
                Some(body)
            });
            let sees = async || -> Result<bool, Error> {
                repo.experiments().await?;
                Ok(!verify_all(&repo, true).await?.problems.is_empty())
            };
            match sees().await {
                Ok(noticed) => assert!(noticed, "byte {place} of {key}"),
                Err(error) => assert!(error.to_string().contains(&key), "{place}, {key}: {error}"),
            }
            let options = std::iter::once(0..volume.len()).collect();
            if let Ok(found) = repo.find(&SnapshotRef::Id(record.id)).await {
                // Whatever comes back is right.
                let report = check_rest(&repo, &found.volumes[0], &volume, options).await.unwrap();
                let excused = report.damaged.iter().flat_map(|d| &d.ranges).map(|r| r.start..r.end);
                check_rest(&repo, &found.volumes[0], &volume, excused.collect()).await.unwrap();
            }
            store.damage(&key, |_| Some(body.clone()));
            tried += 1;
        }
    }
    assert!(tried > 2_000, "{tried}");
    assert_tidy(&repo).await;
}

/// Objects that were all written with the right keys, in each other's places.
#[tokio::test]
async fn exchanged_objects_are_noticed() {
    let (store, repo) = memory().await;
    let mut deleted = Vec::new();
    for seed in 1..5 {
        let mut request = request(&format!("run {seed}"), &[("v", &Volume::noise(seed, 50_000))]);
        request.parent = Parent::None;
        let record = snapshot(&repo, request, &context()).await.unwrap();
        if seed > 2 {
            repo.delete(record.id, &context()).await.unwrap();
            deleted.push(record.id.to_string());
        }
    }
    let mut all = everything(&*store).await;
    // Of the deleted ones nobody reads more than the marks.
    all.retain(|(key, _)| key.starts_with("marks/") || !deleted.iter().any(|id| key.contains(id)));
    let mut exchanged = 0;
    for (n, (key, body)) in all.iter().enumerate() {
        for (other, other_body) in &all[n + 1..] {
            let folder = |key: &str| key.split('/').next().map(str::to_owned);
            if folder(key) != folder(other)
                || matches!(key.split('/').next(), Some("config" | "keys"))
            {
                continue;
            }
            store.damage(key, |_| Some(other_body.clone()));
            store.damage(other, |_| Some(body.clone()));
            let sees = async || -> Result<bool, Error> {
                repo.experiments().await?;
                repo.runs(&name("e")).await?;
                Ok(!verify_all(&repo, true).await?.problems.is_empty())
            };
            let noticed = sees().await.unwrap_or(true);
            assert!(noticed, "{key} and {other}");
            store.damage(key, |_| Some(body.clone()));
            store.damage(other, |_| Some(other_body.clone()));
            exchanged += 1;
        }
    }
    assert!(exchanged >= 7, "{exchanged}");
    assert_tidy(&repo).await;
}

#[tokio::test]
async fn who_may_open_what() {
    let (encrypted, repo) = memory().await;
    take(&repo, &Volume::noise(1, 10_000)).await.unwrap();
    let plain = Arc::new(MemoryStore::new());
    init(plain.clone()).await;
    let error = Repository::open(encrypted.clone()).await.unwrap_err();
    assert!(matches!(error, Error::Encrypted { .. }), "{error}");
    let error = unlock(plain, "test").await.unwrap_err();
    assert!(matches!(error, Error::NotEncrypted { .. }), "{error}");
    let error = unlock(encrypted.clone(), "tset").await.unwrap_err();
    assert!(matches!(error, Error::WrongKey { tried: 1, .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Fix);
    let file = Secret::key_file(vec![7; 32]).unwrap();
    let error = Repository::unlock(encrypted, &file).await.unwrap_err();
    assert!(error.to_string().starts_with("the key file opens none of the 1 keys"), "{error}");
    let error = unlock(Arc::new(MemoryStore::new()), "test").await.unwrap_err();
    assert!(matches!(error, Error::NotARepository { .. }), "{error}");
}

/// Who can write to the store can't weaken it: the slots know the configuration that they were made for.
#[tokio::test]
async fn a_changed_configuration_is_noticed() {
    let (store, _) = memory().await;
    let at = Key::config();
    let original = store.get(&at).await.unwrap();
    let config: Config = envelope::unseal(kind::CONFIG, &at, &original).unwrap();
    let put = |config: &Config| {
        let body = envelope::seal(kind::CONFIG, &at, config).unwrap();
        store.damage("config", |_| Some(body.to_vec()));
    };
    put(&Config { encryption: None, ..config.clone() });
    let error = unlock(store.clone(), "test").await.unwrap_err();
    assert!(matches!(error, Error::NotEncrypted { .. }), "{error}");
    for changed in [
        Config { chunking: "fixed-16k".parse().unwrap(), ..config.clone() },
        Config { id: context().host.new_id(), ..config.clone() },
    ] {
        put(&changed);
        let error = unlock(store.clone(), "test").await.unwrap_err();
        assert!(error.to_string().starts_with("config is damaged"), "{error}");
        // Who has the wrong passphrase learns no more than that.
        let error = unlock(store.clone(), "wrong").await.unwrap_err();
        assert!(matches!(error, Error::WrongKey { .. }), "{error}");
    }
    put(&config);
    unlock(store.clone(), "test").await.unwrap();

    // Without its slots nothing is left but to say so.
    let slot = objects(&*store, "keys/").await.remove(0).key;
    let body = store.get(&Key::from_listing(slot.clone())).await.unwrap();
    store.damage(&slot, |body| Some(body[..body.len() / 2].to_vec()));
    let error = unlock(store.clone(), "test").await.unwrap_err();
    assert!(matches!(&error, Error::Damaged { object, .. } if *object == slot), "{error}");
    store.damage(&slot, |_| None);
    let error = unlock(store.clone(), "test").await.unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    store.put(&Key::from_listing(slot), body).await.unwrap();
    unlock(store, "test").await.unwrap();
}

#[tokio::test]
async fn several_keys_and_rotation() {
    let (store, repo) = memory().await;
    let volume = Volume::noise(1, 30_000);
    let record = take(&repo, &volume).await.unwrap();
    let first = repo.opened_with().unwrap();
    let error = repo.remove_key(first).await.unwrap_err();
    assert!(error.to_string().contains("the only key"), "{error}");

    let file = Secret::key_file(vec![3; 40]).unwrap();
    let new = NewKey { label: Some(name("robot")), ..NewKey::new(file.clone()) };
    let second = repo.add_key(&new, &context()).await.unwrap().id;
    let listed = list_keys(&*store).await.unwrap();
    assert_eq!(listed.iter().map(|key| key.id).collect::<Vec<_>>(), [first, second]);
    assert_eq!(listed[1].slot.label, Some(name("robot")));
    for repo in [
        unlock(store.clone(), "test").await.unwrap(),
        Repository::unlock(store.clone(), &file).await.unwrap(),
    ] {
        check(&repo, &record.volumes[0], &volume).await.unwrap();
    }

    // One slot that is damaged does not keep others from opening.
    store.damage(Key::slot(first).as_str(), |body| Some(body[..9].to_vec()));
    let by_file = Repository::unlock(store.clone(), &file).await.unwrap();
    assert_eq!(by_file.opened_with(), Some(second));
    // And can't be the one that is left.
    let error = by_file.remove_key(second).await.unwrap_err();
    assert!(error.to_string().contains("the only key"), "{error}");

    // Rotation: the new one first.
    let third = by_file.add_key(&key("third"), &context()).await.unwrap().id;
    by_file.remove_key(first).await.unwrap();
    by_file.remove_key(second).await.unwrap();
    let error = by_file.remove_key(second).await.unwrap_err();
    assert!(matches!(error, Error::Unknown { .. }), "{error}");
    let error = Repository::unlock(store.clone(), &file).await.unwrap_err();
    assert!(matches!(error, Error::WrongKey { tried: 1, .. }), "{error}");
    let repo = unlock(store.clone(), "third").await.unwrap();
    assert_eq!(repo.opened_with(), Some(third));
    check(&repo, &record.volumes[0], &volume).await.unwrap();
    assert!(take(&repo, &volume).await.unwrap().stats.new_bytes == 0);
    let unknown = repo.remove_key(context().host.new_id()).await;
    assert!(unknown.is_err());
}

/// Two people who each remove the other's key: in the end there is one.
#[tokio::test]
async fn two_removals_at_once_leave_a_key() {
    let memory = Arc::new(MemoryStore::new());
    let store = Recording::new(memory.clone());
    let repo = init_encrypted(store.clone(), &context()).await;
    let first = repo.opened_with().unwrap();
    let second = repo.add_key(&key("second"), &context()).await.unwrap().id;
    // The other person's removal comes right before this one's: both saw two keys.
    let other = memory.clone();
    store.rule(move |_, call| {
        if call.is(Operation::Delete, "keys/") {
            other.damage(Key::slot(first).as_str(), |_| None);
        }
        Fate::Pass
    });
    let error = repo.remove_key(second).await.unwrap_err();
    assert!(error.to_string().contains("at the same time"), "{error}");
    store.reset();
    assert_eq!(unlock(memory, "second").await.unwrap().opened_with(), Some(second));
}

/// An `init` that dies leaves a slot at most, which is in nobody's way.
#[tokio::test]
async fn init_begins_again() {
    let store = Arc::new(MemoryStore::new());
    init_encrypted(store.clone(), &context()).await;
    store.damage("config", |_| None);
    assert_eq!(objects(&*store, "").await.len(), 1);
    let error = unlock(store.clone(), "test").await.unwrap_err();
    assert!(matches!(error, Error::NotARepository { .. }), "{error}");
    let chunking = "cdc-8k".parse().unwrap();
    let init = async |passphrase| {
        Repository::init_encrypted(
            Writers::Many,
            store.clone(),
            chunking,
            &key(passphrase),
            &context(),
        )
        .await
    };
    init("again").await.unwrap();
    let repo = unlock(store.clone(), "again").await.unwrap();
    take(&repo, &Volume::noise(1, 10_000)).await.unwrap();
    // The old slot holds the key of a repository that never was.
    let error = unlock(store.clone(), "test").await.unwrap_err();
    assert!(error.to_string().starts_with("config is damaged"), "{error}");
    let slots = objects(&*store, "keys/").await.len();
    assert!(matches!(init("third").await.unwrap_err(), Error::NotEmpty { .. }));
    assert_eq!(objects(&*store, "keys/").await.len(), slots);
}

#[tokio::test]
async fn a_collection_needs_the_key_and_stops_at_foreign_objects() {
    let (store, repo) = memory().await;
    let record = take(&repo, &Volume::noise(1, 30_000)).await.unwrap();
    // A mark that someone without the key made up: nothing is purged on its word.
    let mark = Key::mark(record.id, 1);
    let body = Mark { stamp: String::new(), mark: MarkKind::Delete, at: record.created };
    let forged = envelope::seal(kind::MARK, &mark, &body).unwrap();
    repo.store().put(&mark, forged).await.unwrap();
    let packs = objects(&*store, "packs/").await;
    let error = collect_all(&repo).await.unwrap_err();
    assert!(error.to_string().contains(mark.as_str()), "{error}");
    assert_eq!(objects(&*store, "packs/").await, packs);
}
