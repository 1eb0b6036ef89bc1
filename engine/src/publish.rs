//! Creating an object exactly once, whatever gets lost on the way.

use bytes::Bytes;

use crate::error::Result;
use crate::key::Key;
use crate::store::{Creation, Store};

/// Who won a [`publish`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Published {
    /// The object is ours.
    Ours,
    /// Someone else's object was there first; here it is.
    Theirs(Bytes),
}

/// Creates an object that at most one caller in the world can create, and finds out who did.
///
/// A retried request can meet the object that its own first attempt made, so an "exists" is settled by reading
/// the object and comparing: every object published this way carries a stamp that no other writer has. Without
/// an answer the result is an error, never "lost" (docs/protocol.md).
pub async fn publish(store: &dyn Store, key: &Key, body: Bytes) -> Result<Published> {
    match store.create(key, body.clone()).await? {
        Creation::Created => Ok(Published::Ours),
        Creation::Exists => {
            let there = store.get(key).await?;
            Ok(if there == body { Published::Ours } else { Published::Theirs(there) })
        }
    }
}
