//! What every operation of a store answers, for tests of stores in wrong surroundings.

use bytes::Bytes;
use petra_engine::key::Key;
use petra_engine::store::{Store, StoreError, StoreErrorCause};

/// Every operation's outcome, as the cause of its failure.
pub async fn causes(store: &dyn Store) -> Vec<(&'static str, Result<(), StoreErrorCause>)> {
    let key = Key::from_listing("snaps/1".to_owned());
    let body = || Bytes::from_static(b"ten bytes.");
    let cause = |error: StoreError| {
        assert!(!error.detail.is_empty() && !error.to_string().contains("secret"), "{error}");
        error.cause
    };
    vec![
        ("get", store.get(&key).await.map(drop).map_err(cause)),
        ("get_range", store.get_range(&key, 0..10).await.map(drop).map_err(cause)),
        ("put", store.put(&key, body()).await.map_err(cause)),
        ("create", store.create(&key, body()).await.map(drop).map_err(cause)),
        ("list", store.list("snaps/", None).await.map(drop).map_err(cause)),
        ("delete", store.delete(&key).await.map_err(cause)),
    ]
}
