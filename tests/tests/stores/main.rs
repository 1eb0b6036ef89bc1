//! The stores, each against the same promises, and what they say when something is wrong.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "in tests a panic is the right way to fail"
)]

mod conformance;
mod failures;
mod local_and_memory;

use std::any::Any;
use std::sync::Arc;

use petra_engine::store::{LocalStore, MemoryStore, S3Store};
use petra_tests::s3::{Access, InProcessS3, VersityGw};

use self::conformance::Shared;

/// A store, and what must live as long as it.
type Fixture = Option<(Shared, Box<dyn Any>)>;

async fn memory() -> Fixture {
    Some((Arc::new(MemoryStore::new()), Box::new(())))
}

async fn local() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    // The store makes the directory.
    let store = LocalStore::new(&dir.path().join("a repository"));
    store_nothing(&store).await;
    Some((Arc::new(store), Box::new(dir)))
}

/// Listing a directory that no one made is an error.
async fn store_nothing(store: &LocalStore) {
    use petra_engine::store::Store;
    let key = conformance::key("config");
    store.put(&key, bytes::Bytes::new()).await.unwrap();
    store.delete(&key).await.unwrap();
}

async fn s3(access: &Access, prefix: &str) -> Shared {
    Arc::new(S3Store::connect_with(&access.location(prefix), access.options()).await.unwrap())
}

async fn s3_in_process() -> Fixture {
    let server = InProcessS3::start();
    Some((s3(server.access(), "").await, Box::new(server)))
}

async fn s3_in_process_prefix() -> Fixture {
    let server = InProcessS3::start();
    // Others' objects beside it must not show.
    let outside = s3(server.access(), "").await;
    conformance::put_all(&outside, ["team/repo2/config", "team/config", "aaa", "zzz/config"]).await;
    Some((s3(server.access(), "team/repo").await, Box::new(server)))
}

async fn s3_versitygw() -> Fixture {
    let server = VersityGw::start()?;
    Some((s3(server.access(), "team/repo").await, Box::new(server)))
}

/// Makes a module for a store, with a test for each promise.
macro_rules! conformance {
    ($store:ident as $module:ident: $($promise:ident),* $(,)?) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $promise() {
                    if let Some((store, _keep)) = super::$store().await {
                        super::conformance::$promise(store).await;
                    }
                }
            )*
        }
    };
}

/// What even the server inside the test's process keeps.
macro_rules! basics {
    ($($store:ident),*) => {
        $(conformance! {
            $store as $store:
            whole_objects_come_back,
            ranges_end_where_the_object_does,
            listings_are_in_byte_order_of_keys,
            long_listings_come_in_full,
            keys_are_taken_literally,
            deleting_twice_is_fine,
            the_first_create_stays,
            a_put_can_be_repeated,
        })*
    };
}

/// What that server does not: it stumbles over folders.
macro_rules! strict {
    ($($store:ident as $module:ident),*) => {
        $(conformance! { $store as $module: one_of_many_creates_wins, a_folder_is_no_object })*
    };
}

basics!(memory, local, s3_in_process, s3_in_process_prefix, s3_versitygw);
strict!(memory as memory_strict, local as local_strict, s3_versitygw as s3_versitygw_strict);
conformance!(s3_in_process as s3_in_process_creates: one_of_many_creates_wins);
