//! Where objects live: one narrow trait and its implementations.
//!
//! The protocol (docs/protocol.md) rests on what this trait promises and nothing else: objects never change, a
//! [`create`](Store::create) has one winner, what was acknowledged is seen by every later read and listing.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::error::{ErrorKind, Result};
use crate::key::Key;
use crate::url::RepositoryUrl;

mod credentials;
mod local;
mod memory;
#[cfg(feature = "s3")]
mod s3;

pub use credentials::S3Credentials;
pub use local::LocalStore;
pub use memory::MemoryStore;
#[cfg(feature = "s3")]
pub use s3::{S3Options, S3Store};

/// Opens the store of a repository. Makes no request yet, so a bucket or directory that is not there is found by
/// the first one.
pub async fn open(url: &RepositoryUrl) -> Result<Arc<dyn Store>> {
    open_with(url, None).await
}

/// The same with given credentials, where the store wants any, instead of those of the AWS default chain.
pub async fn open_with(
    url: &RepositoryUrl,
    credentials: Option<&S3Credentials>,
) -> Result<Arc<dyn Store>> {
    Ok(match url {
        RepositoryUrl::Directory(path) => Arc::new(LocalStore::new(path)),
        #[cfg(feature = "s3")]
        RepositoryUrl::S3(location) => {
            let options = S3Options { credentials: credentials.cloned(), ..S3Options::default() };
            Arc::new(S3Store::connect_with(location, options).await?)
        }
        #[cfg(not(feature = "s3"))]
        RepositoryUrl::S3(_) => {
            let _ = credentials;
            return Err(crate::Error::Request("this program was built without S3".to_owned()));
        }
    })
}

/// The longest object: a pack that was nearly full has room for one more block or frame, and a footer.
pub const MAX_OBJECT_BYTES: u64 = 64 << 20;

/// An object store. Implementations are cheap to share and safe to use from many tasks.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// The repository's URL, for messages and for the URLs of snapshots. Holds no secrets.
    fn location(&self) -> String;

    /// Reads a whole object. One of more than [`MAX_OBJECT_BYTES`] is foreign, and refused.
    async fn get(&self, key: &Key) -> Result<Bytes, StoreError>;

    /// Reads a range of an object. An object that ends before the range does gives a shorter answer.
    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError>;

    /// Stores an object under a name that no one else uses. Atomic and durable when it returns: the object is
    /// whole or not there. A repeated `put` of the same bytes is harmless.
    async fn put(&self, key: &Key, body: Bytes) -> Result<(), StoreError>;

    /// Stores an object if there is none of this name: of any number of callers at any time, one wins. Atomic and
    /// durable like [`put`](Self::put). [`Creation::Exists`] may also answer the retry of an earlier success, so
    /// callers compare the object with theirs ([`publish`](crate::publish::publish) does).
    async fn create(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError>;

    /// Objects whose keys begin with `prefix`, in byte order of their keys, after `after`. One page; a last page
    /// has `more == false`.
    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, StoreError>;

    /// Removes an object. Removing one that is not there succeeds.
    async fn delete(&self, key: &Key) -> Result<(), StoreError>;

    /// True where [`create`](Self::create) is known to have one winner. Where it is not, since a server of someone
    /// else's decides, a repository tries it before it writes (docs/protocol.md, "Probing").
    fn create_is_exclusive(&self) -> bool {
        false
    }
}

/// The answer of [`Store::create`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Creation {
    /// This call made the object.
    Created,
    /// There is an object of this name: someone else's, or this call's own after a lost acknowledgement.
    Exists,
}

/// Some objects of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// In byte order of their keys.
    pub entries: Vec<Entry>,
    /// There are more: ask again with `after` set to the last entry's key.
    pub more: bool,
}

/// An object in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The object's key.
    pub key: String,
    /// Its size in bytes.
    pub len: u64,
    /// When it was written, by the store's clock, in milliseconds since the Unix epoch; 0 where unknown. For
    /// policies only.
    pub modified_unix_ms: u64,
}

/// Why a store did not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreErrorCause {
    /// No object of this name.
    NotFound,
    /// No such bucket, or the directory does not exist.
    NoContainer,
    /// The credentials do not allow it.
    Denied,
    /// There are no credentials, or they are wrong or expired.
    Credentials,
    /// No room left.
    Full,
    /// The server does not know this operation, or not in this form.
    Unsupported,
    /// The server lets several creates of one object win, so that it can't be written to safely.
    NotExclusive,
    /// The store was away, too slow or busy, and retries did not help.
    Unavailable,
    /// Anything else.
    Other,
}

/// A failed request: which, on what, and why.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {key} in {location}: {detail}")]
pub struct StoreError {
    /// `read`, `write`, `create`, `list`, `delete`.
    pub operation: &'static str,
    /// The object's key, or the prefix of a listing.
    pub key: String,
    /// The repository.
    pub location: String,
    /// What kind of failure it is.
    pub cause: StoreErrorCause,
    /// The system's or server's own words.
    pub detail: String,
}

impl StoreError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self.cause {
            StoreErrorCause::Unavailable => ErrorKind::Retry,
            StoreErrorCause::NotFound => ErrorKind::Stop,
            _ => ErrorKind::Fix,
        }
    }

    /// True when the object is not there.
    pub fn is_not_found(&self) -> bool {
        self.cause == StoreErrorCause::NotFound
    }
}

/// Collects a listing of any number of pages.
pub(crate) async fn list_all(store: &dyn Store, prefix: &str) -> Result<Vec<Entry>, StoreError> {
    let mut entries = Vec::new();
    list_each(store, prefix, |entry| entries.push(entry.clone())).await?;
    Ok(entries)
}

/// Goes through a listing of any number of pages, with one in memory.
pub(crate) async fn list_each(
    store: &dyn Store,
    prefix: &str,
    mut each: impl FnMut(&Entry) + Send,
) -> Result<(), StoreError> {
    let mut after: Option<String> = None;
    loop {
        let page = store.list(prefix, after.as_deref()).await?;
        page.entries.iter().for_each(&mut each);
        after = page.entries.into_iter().next_back().map(|entry| entry.key);
        if !page.more || after.is_none() {
            return Ok(());
        }
    }
}
