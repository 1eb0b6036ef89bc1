//! A directory lists what a sorted map does, whatever the keys.

use std::collections::BTreeSet;

use bytes::Bytes;
use petra_engine::store::{LocalStore, MemoryStore, Store};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::conformance::key;

/// Few characters, around `/` in byte order, so that keys share prefixes and every order matters.
fn any_key() -> impl Strategy<Value = String> {
    let part = "[-.%0a~]{1,3}".prop_filter("a name", |part| part != "." && part != "..");
    vec(part, 1..4).prop_map(|parts| parts.join("/"))
}

/// Keys of which none is the folder of another, as in a repository.
fn any_keys() -> impl Strategy<Value = Vec<String>> {
    vec(any_key(), 1..30).prop_map(|keys| {
        let all: BTreeSet<String> = keys.iter().cloned().collect();
        let is_folder =
            |key: &String| all.iter().any(|other| other.starts_with(&format!("{key}/")));
        all.iter().filter(|key| !is_folder(key)).cloned().collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn list_the_same(
        keys in any_keys(),
        deleted in vec(any::<Index>(), 0..5),
        cuts in vec((any::<Index>(), any::<Index>(), any_key()), 1..8),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (local, memory) = (LocalStore::new(dir.path()), MemoryStore::new());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            for name in &keys {
                local.put(&key(name), Bytes::from(name.clone())).await.unwrap();
                memory.put(&key(name), Bytes::from(name.clone())).await.unwrap();
            }
            for index in deleted {
                local.delete(&key(index.get::<String>(&keys))).await.unwrap();
                memory.delete(&key(index.get::<String>(&keys))).await.unwrap();
            }
            for (which, cut, other) in cuts {
                let name = which.get(&keys);
                let prefix = &name[..cut.index(name.len() + 1)];
                let folder = prefix.rfind('/').map_or("", |end| &prefix[..=end]);
                for after in [None, Some(name.as_str()), Some(prefix), Some(folder), Some(other.as_str())] {
                    let there = local.list(prefix, after).await.unwrap();
                    let expected = memory.list(prefix, after).await.unwrap();
                    let pairs = |page: petra_engine::store::Page| -> Vec<(String, u64)> {
                        page.entries.into_iter().map(|entry| (entry.key, entry.len)).collect()
                    };
                    prop_assert_eq!(pairs(there), pairs(expected), "prefix {:?} after {:?}", prefix, after);
                }
            }
            Ok(())
        })?;
    }
}
