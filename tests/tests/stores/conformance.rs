//! What every store promises (`petra_engine::store::Store`), as one function for each promise.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use petra_engine::error::ErrorKind;
use petra_engine::key::Key;
use petra_engine::publish::{Published, publish};
use petra_engine::store::{Creation, Entry, Store};

pub type Shared = Arc<dyn Store>;

pub fn key(key: &str) -> Key {
    Key::from_listing(key.to_owned())
}

/// Bytes that differ from place to place.
pub fn body(len: usize) -> Bytes {
    (0..len).map(|n| (n / 7 % 253) as u8).collect()
}

pub async fn put_all(store: &Shared, keys: impl IntoIterator<Item = &str>) {
    let puts = keys
        .into_iter()
        .map(|name| async move { store.put(&key(name), Bytes::from(name.to_owned())).await });
    stream::iter(puts).buffer_unordered(8).try_collect::<()>().await.unwrap();
}

pub async fn list_all(store: &Shared, prefix: &str, after: Option<&str>) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    loop {
        let last = entries.last().map(|entry| entry.key.clone());
        let page = store.list(prefix, last.as_deref().or(after)).await.unwrap();
        assert!(!page.entries.is_empty() || !page.more, "an empty page must be the last");
        entries.extend(page.entries);
        if !page.more {
            return entries;
        }
    }
}

pub async fn keys(store: &Shared, prefix: &str, after: Option<&str>) -> Vec<String> {
    list_all(store, prefix, after).await.into_iter().map(|entry| entry.key).collect()
}

pub async fn whole_objects_come_back(store: Shared) {
    for (n, len) in [0, 1, 4096, 1 << 20, (5 << 20) + 12_345].into_iter().enumerate() {
        let key = key(&format!("packs/session/{n}"));
        store.put(&key, body(len)).await.unwrap();
        assert!(store.get(&key).await.unwrap() == body(len), "{len} bytes");
        let listed = list_all(&store, key.as_str(), None).await;
        assert_eq!((listed.len(), listed[0].len), (1, len as u64));
    }
    for missing in ["packs/session/9", "packs/other/1", "nothing"] {
        let error = store.get(&key(missing)).await.unwrap_err();
        assert!(error.is_not_found(), "{error:?}");
        assert_eq!(
            (error.kind(), error.operation, error.key.as_str()),
            (ErrorKind::Stop, "read", missing)
        );
    }
}

pub async fn ranges_end_where_the_object_does(store: Shared) {
    let whole = body(100_000);
    store.put(&key("packs/a"), whole.clone()).await.unwrap();
    store.put(&key("packs/empty"), Bytes::new()).await.unwrap();
    let max = u64::MAX;
    for (start, end) in [
        (0, 1),
        (0, 100_000),
        (4096, 8192),
        (99_999, 100_000),
        (99_999, 100_001),
        (50_000, max),
        (100_000, 100_001),
        (100_000, max),
        (1 << 40, max),
        (0, 0),
        (7, 7),
        (max, max),
    ] {
        let clamp = |at: u64| usize::try_from(at).unwrap().min(whole.len());
        let expected = whole.slice(clamp(start)..clamp(end));
        let got = store.get_range(&key("packs/a"), start..end).await.unwrap();
        assert!(
            got == expected,
            "{start}..{end}: {} bytes, expected {}",
            got.len(),
            expected.len()
        );
        let got = store.get_range(&key("packs/empty"), start..end).await.unwrap();
        assert!(got.is_empty(), "{start}..{end} of nothing: {} bytes", got.len());
        let error = store.get_range(&key("packs/none"), start..end).await.unwrap_err();
        assert!(error.is_not_found(), "{start}..{end}: {error}");
    }
}

pub async fn listings_are_in_byte_order_of_keys(store: Shared) {
    let sorted = [
        "config",
        "runs/a-b/x",
        "runs/a.b/x",
        "runs/a/b.c/x",
        "runs/a/b/x",
        "runs/a/b/y",
        "runs/a/b0",
        "runs/a0/x",
        "runs/aa/x",
        "snaps/1",
        "snaps/10",
        "snaps/2",
        "snaps2/1",
    ];
    put_all(&store, sorted.into_iter().rev()).await;
    assert_eq!(keys(&store, "", None).await, sorted);
    for prefix in [
        "runs/", "runs/a", "runs/a/", "runs/a.", "runs/a/b", "snaps/1", "snaps", "none/", "confi",
        "z",
    ] {
        let expected: Vec<_> = sorted.into_iter().filter(|key| key.starts_with(prefix)).collect();
        assert_eq!(keys(&store, prefix, None).await, expected, "prefix {prefix:?}");
        for after in
            sorted.into_iter().chain(["runs/a/b", "runs/a/b/", "runs/a/b/xx", "snaps/", "a", "zz"])
        {
            let expected: Vec<_> = expected.iter().copied().filter(|key| *key > after).collect();
            assert_eq!(
                keys(&store, prefix, Some(after)).await,
                expected,
                "prefix {prefix:?} after {after:?}"
            );
        }
    }
}

/// S3 gives at most 1000 keys at a time.
pub async fn long_listings_come_in_full(store: Shared) {
    let sorted: Vec<String> = (0..1050).map(|n| format!("pins/{n:04}/1")).collect();
    put_all(&store, sorted.iter().map(String::as_str)).await;
    put_all(&store, ["marks/x", "top"]).await;
    assert_eq!(keys(&store, "pins/", None).await, sorted);
    assert_eq!(keys(&store, "pins/", Some("pins/0049/1")).await, sorted[50..]);
    assert_eq!(keys(&store, "pins/", Some("pins/0049/2")).await, sorted[50..]);
    assert_eq!(keys(&store, "pins/", Some("pins/1049/1")).await, <[&str; 0]>::default());
    assert_eq!(keys(&store, "", None).await.len(), 1052);
}

pub async fn keys_are_taken_literally(store: Shared) {
    let mut sorted = [
        "runs/Iris%20flowers/r",
        "runs/%D0%B6/r",
        "runs/~a%2Fb~0/r",
        "runs/a+b=c/r",
        "runs/a_b-c.d/r",
        "runs/%/r",
    ];
    sorted.sort_unstable();
    put_all(&store, sorted).await;
    assert_eq!(keys(&store, "runs/", None).await, sorted);
    for name in sorted {
        assert_eq!(store.get(&key(name)).await.unwrap(), name);
        assert_eq!(store.get_range(&key(name), 1..3).await.unwrap(), name[1..3]);
        assert_eq!(keys(&store, name, None).await, [name]);
        store.delete(&key(name)).await.unwrap();
    }
    assert_eq!(keys(&store, "", None).await, <[&str; 0]>::default());
}

pub async fn deleting_twice_is_fine(store: Shared) {
    put_all(&store, ["pins/a/1", "pins/a/2"]).await;
    for _ in 0..2 {
        store.delete(&key("pins/a/1")).await.unwrap();
    }
    assert!(store.get(&key("pins/a/1")).await.unwrap_err().is_not_found());
    assert_eq!(keys(&store, "pins/", None).await, ["pins/a/2"]);
    for absent in ["pins/a/1", "pins/b/1", "none"] {
        store.delete(&key(absent)).await.unwrap();
    }
    store.delete(&key("pins/a/2")).await.unwrap();
    assert_eq!(keys(&store, "", None).await, <[&str; 0]>::default());
    assert_eq!(store.create(&key("pins/a/1"), body(3)).await.unwrap(), Creation::Created);
}

pub async fn a_folder_is_no_object(store: Shared) {
    put_all(&store, ["pins/a/1"]).await;
    for folder in ["pins", "pins/a"] {
        assert!(store.get(&key(folder)).await.unwrap_err().is_not_found());
        assert!(store.get_range(&key(folder), 0..5).await.unwrap_err().is_not_found());
        store.delete(&key(folder)).await.unwrap();
        assert_eq!(keys(&store, folder, None).await, ["pins/a/1"]);
    }
    assert_eq!(store.get(&key("pins/a/1")).await.unwrap(), "pins/a/1");
}

pub async fn the_first_create_stays(store: Shared) {
    let key = key("snaps/1");
    assert_eq!(store.create(&key, body(10)).await.unwrap(), Creation::Created);
    assert_eq!(store.create(&key, body(11)).await.unwrap(), Creation::Exists);
    assert_eq!(store.create(&key, body(10)).await.unwrap(), Creation::Exists);
    assert_eq!(store.get(&key).await.unwrap(), body(10));
    assert_eq!(publish(&*store, &key, body(10)).await.unwrap(), Published::Ours);
    assert_eq!(publish(&*store, &key, body(11)).await.unwrap(), Published::Theirs(body(10)));
    assert_eq!(publish(&*store, &self::key("snaps/2"), body(11)).await.unwrap(), Published::Ours);
}

pub async fn a_put_can_be_repeated(store: Shared) {
    let key = key("packs/a/1");
    for _ in 0..3 {
        store.put(&key, body(2 << 20)).await.unwrap();
    }
    assert!(store.get(&key).await.unwrap() == body(2 << 20));
    assert_eq!(list_all(&store, "", None).await.len(), 1);
}

pub async fn one_of_many_creates_wins(store: Shared) {
    for round in 0..20 {
        let key = key(&format!("marks/{round}/000002"));
        let mut tasks = tokio::task::JoinSet::new();
        for writer in 0..16 {
            let (store, key) = (Arc::clone(&store), key.clone());
            tasks.spawn(async move {
                let stamp = Bytes::from(format!("writer {writer}"));
                let published = publish(&*store, &key, stamp.clone()).await.unwrap();
                match published {
                    Published::Ours => (true, stamp),
                    Published::Theirs(theirs) => (false, theirs),
                }
            });
        }
        let results = tasks.join_all().await;
        let winners: Vec<_> =
            results.iter().filter(|(won, _)| *won).map(|(_, stamp)| stamp).collect();
        assert_eq!(winners.len(), 1, "round {round}: {results:?}");
        assert!(results.iter().all(|(_, seen)| seen == winners[0]), "round {round}: {results:?}");
        assert_eq!(store.get(&key).await.unwrap(), winners[0]);
    }
}
