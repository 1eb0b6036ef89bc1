//! Creating an object exactly once, whatever gets lost on the way.

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::key::Key;
use crate::store::{Creation, Store};

/// An object that is there and gone again this often is no burial.
const ATTEMPTS: usize = 5;

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
    for _ in 0..ATTEMPTS {
        match store.create(key, body.clone()).await? {
            Creation::Created => return Ok(Published::Ours),
            Creation::Exists => {}
        }
        match store.get(key).await {
            Ok(there) if there == body => return Ok(Published::Ours),
            Ok(there) => return Ok(Published::Theirs(there)),
            // It was buried between the two (docs/protocol.md, "Graves"). The graves tell that to those whom it
            // concerns; here the place is free again.
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Error::Missing {
        object: key.to_string(),
        needed_by: "a create that was told that it exists".to_owned(),
    })
}
