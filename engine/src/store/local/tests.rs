//! What only this store has: two ways to publish, direct I/O, directories that come and go. The behaviour that all
//! stores share is tested in `tests/tests/stores.rs`.

use std::os::unix::fs::symlink;

use super::*;
use crate::error::ErrorKind;

/// Both ways to publish: by unnamed files, and by names in `tmp/`.
fn stores() -> Vec<(tempfile::TempDir, LocalStore)> {
    let store = |unnamed_files| {
        let dir = tempfile::tempdir().unwrap();
        // Not there yet, nor the one above.
        let root = dir.path().join("new/repository");
        (dir, LocalStore { directory: Arc::new(Directory { root, unnamed_files }) })
    };
    vec![store(true), store(false)]
}

fn key(key: &str) -> Key {
    Key::from_listing(key.to_owned())
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n / 3 % 251) as u8).collect()
}

async fn keys(store: &LocalStore) -> Vec<String> {
    store.list("", None).await.unwrap().entries.into_iter().map(|entry| entry.key).collect()
}

#[tokio::test]
async fn every_size_and_alignment_is_written_whole() {
    for (_dir, store) in stores() {
        let mib = 1 << 20;
        for (n, len) in
            [0, 1, 4095, mib - 1, mib, mib + 1, 5 * mib + 4097, 9 * mib].into_iter().enumerate()
        {
            for offset in [0, 1, 512] {
                // Whatever alignment the allocator chose, these three can't all share it.
                let body = Bytes::from(bytes(len + offset)).slice(offset..);
                let key = key(&format!("packs/{n}/{offset}"));
                store.put(&key, body.clone()).await.unwrap();
                assert!(store.get(&key).await.unwrap() == body, "{len} bytes at offset {offset}");
            }
        }
    }
}

#[tokio::test]
async fn publishing_leaves_nothing_else_behind() {
    for (_dir, store) in stores() {
        store.put(&key("a/b"), Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(store.create(&key("a/b"), Bytes::new()).await.unwrap(), Creation::Exists);
        store.put(&key("a/b"), Bytes::from_static(b"y")).await.unwrap_err();
        assert_eq!(keys(&store).await, ["a/b"]);
        let tmp = store.directory.root.join(TMP);
        assert!(!tmp.exists() || fs::read_dir(tmp).unwrap().next().is_none());
    }
}

#[tokio::test]
async fn a_put_never_changes_an_object() {
    for (_dir, store) in stores() {
        let key = key("packs/1/0");
        let body = Bytes::from(bytes(3 << 20));
        store.put(&key, body.clone()).await.unwrap();
        store.put(&key, body.clone()).await.unwrap();
        let mut other = body.to_vec();
        other[(2 << 20) + 1] ^= 1;
        for other in [other, vec![], bytes(3)] {
            let error = store.put(&key, other.into()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Fix);
        }
        assert!(store.get(&key).await.unwrap() == body);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directories_may_vanish_under_writers() {
    for (_dir, store) in stores() {
        let mut tasks = tokio::task::JoinSet::new();
        for writer in 0..4 {
            let store = store.clone();
            tasks.spawn(async move {
                for n in 0..40 {
                    let key = key(&format!("pins/owner/folder/{writer}-{n}"));
                    let body = Bytes::from(format!("{writer} {n}"));
                    assert_eq!(store.create(&key, body.clone()).await.unwrap(), Creation::Created);
                    assert_eq!(store.get(&key).await.unwrap(), body);
                    store.delete(&key).await.unwrap();
                }
            });
        }
        tasks.join_all().await;
        assert_eq!(keys(&store).await, <[&str; 0]>::default());
        assert!(!store.directory.root.join("pins").exists());
    }
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_said_to_be_so() {
    for (dir, store) in stores() {
        let cause = |error: StoreError| error.cause;
        assert_eq!(store.get(&key("a")).await.map_err(cause), Err(StoreErrorCause::NoContainer));
        assert_eq!(store.list("", None).await.map_err(cause), Err(StoreErrorCause::NoContainer));
        assert_eq!(store.delete(&key("a")).await.map_err(cause), Err(StoreErrorCause::NoContainer));
        fs::create_dir(dir.path().join("new")).unwrap();
        fs::write(&store.directory.root, "a file").unwrap();
        let error = store.get(&key("a")).await.unwrap_err();
        assert_eq!(
            (error.cause, error.detail.as_str()),
            (StoreErrorCause::NoContainer, "it is not a directory")
        );
    }
}

#[tokio::test]
async fn keys_can_not_lead_elsewhere() {
    for (dir, store) in stores() {
        store.put(&key("a/b"), Bytes::new()).await.unwrap();
        fs::write(dir.path().join("secret"), "secret").unwrap();
        for bad in [
            "",
            "/etc/passwd",
            "../../secret",
            "a/../a/b",
            "a//b",
            "a/",
            "./a",
            "tmp/x",
            "lost+found/x",
        ] {
            let error = store.get(&key(bad)).await.unwrap_err();
            assert_eq!(error.cause, StoreErrorCause::Other, "{bad}");
            store.put(&key(bad), Bytes::new()).await.unwrap_err();
            store.delete(&key(bad)).await.unwrap_err();
        }
    }
}

#[tokio::test]
async fn what_is_no_object_is_not_listed() {
    for (_dir, store) in stores() {
        store.put(&key("a/b"), Bytes::new()).await.unwrap();
        let root = &store.directory.root;
        fs::create_dir_all(root.join("tmp")).unwrap();
        fs::write(root.join("tmp/1-1"), "half").unwrap();
        fs::create_dir_all(root.join("empty/er")).unwrap();
        fs::create_dir(root.join("lost+found")).unwrap();
        symlink("a", root.join("link")).unwrap();
        assert_eq!(keys(&store).await, ["a/b"]);
        // A folder is no object, nor has an object objects below it.
        assert!(store.get(&key("a")).await.unwrap_err().is_not_found());
        assert!(store.get(&key("a/b/c")).await.unwrap_err().is_not_found());
        store.delete(&key("a")).await.unwrap();
        store.delete(&key("a/b/c")).await.unwrap();
        assert_eq!(keys(&store).await, ["a/b"]);
    }
}

#[tokio::test]
async fn large_directories_come_in_pages() {
    for (_dir, store) in stores() {
        store.put(&key("many/first"), Bytes::new()).await.unwrap();
        for n in 0..20_100 {
            fs::write(store.directory.root.join(format!("many/{n:05}")), "").unwrap();
        }
        let first = store.list("many/", None).await.unwrap();
        assert_eq!((first.entries.len(), first.more), (10_000, true));
        let second = store.list("many/", Some("many/09999")).await.unwrap();
        assert_eq!((second.entries.len(), second.more), (10_000, true));
        let all = crate::store::list_all(&store, "").await.unwrap();
        assert_eq!(all.len(), 20_101);
        assert!(all.is_sorted_by(|a, b| a.key < b.key));
    }
}
