//! Whether a store keeps the promise on which everything rests: of several creates of one object, one wins
//! (docs/protocol.md, "Probing").
//!
//! Servers and proxies are known that ignore the condition of a create, or look first and write then. A
//! [`CheckedStore`] therefore races some creates of an object that nobody else uses before it lets the first
//! create through, and refuses every write where the promise was broken.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::{join, join_all};
use tokio::sync::OnceCell;

use crate::context::Context;
use crate::key::Key;
use crate::record::Writers;
use crate::store::{Creation, Page, Store, StoreError, StoreErrorCause};

/// Creates that race when a repository is made.
const INIT_RACERS: usize = 8;
/// Creates that race before the first write to a repository that is there.
const RACERS: usize = 3;

/// What a probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// One create won.
    Kept,
    /// The promise was broken, in these words.
    Broken(String),
}

/// The store of a repository, which creates no object in a way that the store does not keep.
#[derive(Debug)]
pub(crate) struct CheckedStore {
    inner: Arc<dyn Store>,
    writers: Writers,
    racers: usize,
    verdict: OnceCell<Verdict>,
}

impl CheckedStore {
    /// A store where a repository is to be made: always probed, but for a single writer.
    pub(crate) fn for_init(inner: Arc<dyn Store>, writers: Writers) -> Self {
        Self { inner, writers, racers: INIT_RACERS, verdict: OnceCell::new() }
    }

    /// The store of a repository that is there.
    pub(crate) fn new(inner: Arc<dyn Store>, writers: Writers) -> Self {
        let known = inner.create_is_exclusive().then_some(Verdict::Kept);
        Self { inner, writers, racers: RACERS, verdict: OnceCell::new_with(known) }
    }

    /// Fails unless the store may be written to. Probes it the first time.
    pub(crate) async fn ready(&self, ctx: &Context) -> Result<(), StoreError> {
        self.probed(|| format!("{:032x}", ctx.host.random())).await
    }

    /// `name` gives 32 hex digits that no other probe has.
    async fn probed(&self, name: impl FnOnce() -> String) -> Result<(), StoreError> {
        if self.writers == Writers::Single {
            return Ok(());
        }
        // A failed request is no verdict, and the next write tries again.
        let probe = || async { probe(&*self.inner, &Key::probe(&name()), self.racers).await };
        match self.verdict.get_or_try_init(probe).await? {
            Verdict::Kept => Ok(()),
            Verdict::Broken(how) => Err(self.refusal(how)),
        }
    }

    /// Fails once the promise was found broken.
    fn check(&self) -> Result<(), StoreError> {
        match self.verdict.get() {
            Some(Verdict::Broken(how)) => Err(self.refusal(how)),
            Some(Verdict::Kept) | None => Ok(()),
        }
    }

    fn refusal(&self, how: &str) -> StoreError {
        StoreError {
            operation: "create",
            key: "objects".to_owned(),
            location: self.inner.location(),
            cause: StoreErrorCause::NotExclusive,
            detail: format!(
                "this endpoint does not keep create-if-absent: {how}; writers could overwrite each \
                 other's decisions, and snapshots would be lost"
            ),
        }
    }

    /// What a single writer can do without the promise.
    async fn look_then_put(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError> {
        match self.inner.get(key).await {
            Ok(_) => Ok(Creation::Exists),
            Err(error) if error.is_not_found() => {
                self.inner.put(key, body).await.map(|()| Creation::Created)
            }
            Err(error) => Err(error),
        }
    }
}

/// Races creates of one fresh object, reads it, and removes it.
async fn probe(store: &dyn Store, key: &Key, racers: usize) -> Result<Verdict, StoreError> {
    let verdict = race(store, key, racers).await;
    // What stays is a few bytes that nobody reads.
    let _ = store.delete(key).await;
    match verdict {
        Err(error) if error.cause == StoreErrorCause::Unsupported => {
            Ok(Verdict::Broken(format!("it knows no conditional writes ({})", error.detail)))
        }
        verdict => verdict,
    }
}

async fn race(store: &dyn Store, key: &Key, racers: usize) -> Result<Verdict, StoreError> {
    let broken = |how: String| Ok(Verdict::Broken(how));
    let body = |n: usize| Bytes::from(format!("petra probe {n}\n"));
    let answers = join_all((0..racers).map(|n| store.create(key, body(n)))).await;
    let mut won = Vec::new();
    for (n, answer) in answers.into_iter().enumerate() {
        if answer? == Creation::Created {
            won.push(body(n));
        }
    }
    if won.len() > 1 {
        return broken(format!("of {racers} creates of one object {} won", won.len()));
    }
    let (late, held) = join(store.create(key, body(racers)), store.get(key)).await;
    if late? == Creation::Created {
        return broken("an object that was there was created once more".to_owned());
    }
    match held {
        // The winner's answer may have got lost, and its repetition met its own object.
        Ok(held) if won.is_empty() && (0..racers).any(|n| held == body(n)) => Ok(Verdict::Kept),
        Ok(held) if won.contains(&held) => Ok(Verdict::Kept),
        Ok(_) => broken("an object does not hold what its creator wrote".to_owned()),
        Err(error) if error.is_not_found() => {
            broken("an object that was created is not there".to_owned())
        }
        Err(error) => Err(error),
    }
}

#[async_trait]
impl Store for CheckedStore {
    fn location(&self) -> String {
        self.inner.location()
    }

    fn create_is_exclusive(&self) -> bool {
        self.inner.create_is_exclusive()
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StoreError> {
        self.inner.get(key).await
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, range).await
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        self.check()?;
        self.inner.put(key, body).await
    }

    async fn create(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError> {
        if self.writers == Writers::Single {
            return self.look_then_put(key, body).await;
        }
        // Who did not ask before is probed now. Every body that is created bears a stamp or a new id, so that
        // its hash is a name that no other probe has.
        self.probed(|| blake3::hash(&body).to_hex().chars().take(32).collect()).await?;
        self.inner.create(key, body).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, StoreError> {
        self.inner.list(prefix, after).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.check()?;
        self.inner.delete(key).await
    }
}

#[cfg(test)]
#[path = "probe_tests.rs"]
mod tests;
