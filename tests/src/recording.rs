//! A store that writes down what it is asked, and fails as a test wants it to.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use petra_engine::key::Key;
use petra_engine::store::{Creation, Page, Store, StoreError, StoreErrorCause};
use tokio::sync::Notify;

/// What a store was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// [`Store::get`].
    Get,
    /// [`Store::get_range`].
    GetRange,
    /// [`Store::put`].
    Put,
    /// [`Store::create`].
    Create,
    /// [`Store::list`].
    List,
    /// [`Store::delete`].
    Delete,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// What was asked.
    pub operation: Operation,
    /// The object's key, or a listing's prefix.
    pub key: String,
    /// Bytes sent.
    pub len_bytes: u64,
}

impl Call {
    /// True for requests that change the store.
    pub fn is_write(&self) -> bool {
        matches!(self.operation, Operation::Put | Operation::Create | Operation::Delete)
    }

    /// True for this operation on a key that begins so.
    pub fn is(&self, operation: Operation, prefix: &str) -> bool {
        self.operation == operation && self.key.starts_with(prefix)
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} ({} bytes)", self.operation, self.key, self.len_bytes)
    }
}

/// What becomes of a request.
#[derive(Clone, Debug)]
pub enum Fate {
    /// It is done.
    Pass,
    /// It is not done, and the caller is told why.
    Fail(StoreErrorCause),
    /// It is done, but the caller is told that the store was away.
    LoseAnswer,
    /// It is not done, and the caller never hears of it again: for a caller that is dropped there.
    Hang,
    /// It is done late.
    Delay(Duration),
    /// It waits before it is done, until the test lets it go on.
    Pause(Gate),
}

/// Holds a request until a test has done something else.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<(Notify, Notify)>);

impl Gate {
    /// Waits until a request stands at the gate.
    pub async fn reached(&self) {
        self.0.0.notified().await;
    }

    /// Lets the request go on.
    pub fn open(&self) {
        self.0.1.notify_one();
    }

    async fn pass(&self) {
        self.0.0.notify_one();
        self.0.1.notified().await;
    }
}

type Rule = Box<dyn FnMut(usize, &Call) -> Fate + Send>;

/// A store around another. Without a rule it only keeps the log.
pub struct Recording {
    inner: Arc<dyn Store>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    log: Vec<Call>,
    rule: Option<Rule>,
}

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recording").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl Recording {
    /// Wraps a store.
    pub fn new(inner: Arc<dyn Store>) -> Arc<Self> {
        Arc::new(Self { inner, state: Mutex::default() })
    }

    /// Sets what becomes of each request from now on, given its number from 0. Empties the log.
    pub fn rule(&self, rule: impl FnMut(usize, &Call) -> Fate + Send + 'static) {
        *self.state() = State { log: Vec::new(), rule: Some(Box::new(rule)) };
    }

    /// The `n`-th request from now on, from 0, meets this fate; all others pass.
    pub fn nth(&self, n: usize, fate: Fate) {
        self.rule(move |number, _| if number == n { fate.clone() } else { Fate::Pass });
    }

    /// Requests from the `n`-th on, from 0, meet this fate.
    pub fn from_nth(&self, n: usize, fate: Fate) {
        self.rule(move |number, _| if number >= n { fate.clone() } else { Fate::Pass });
    }

    /// The first request that `matches` meets this fate.
    pub fn first(&self, matches: impl Fn(&Call) -> bool + Send + 'static, fate: Fate) {
        let mut fate = Some(fate);
        self.rule(
            move |_, call| {
                if matches(call) { fate.take().unwrap_or(Fate::Pass) } else { Fate::Pass }
            },
        );
    }

    /// The store takes this many more bytes and is full then.
    pub fn full_after(&self, len_bytes: u64) {
        let mut left = len_bytes;
        self.rule(move |_, call| match left.checked_sub(call.len_bytes) {
            Some(rest) => {
                left = rest;
                Fate::Pass
            }
            None => Fate::Fail(StoreErrorCause::Full),
        });
    }

    /// Lets everything pass again. Empties the log.
    pub fn reset(&self) {
        *self.state() = State::default();
    }

    /// All requests since the last rule, in the order they came.
    pub fn log(&self) -> Vec<Call> {
        self.state().log.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run<T>(
        &self,
        operation: Operation,
        key: &str,
        len: usize,
        work: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        let call = Call { operation, key: key.to_owned(), len_bytes: len as u64 };
        let fate = {
            let mut state = self.state();
            let number = state.log.len();
            state.log.push(call.clone());
            state.rule.as_mut().map_or(Fate::Pass, |rule| rule(number, &call))
        };
        match fate {
            Fate::Pass => work.await,
            Fate::Fail(cause) => Err(self.error(&call, cause)),
            Fate::LoseAnswer => {
                work.await?;
                Err(self.error(&call, StoreErrorCause::Unavailable))
            }
            Fate::Hang => std::future::pending().await,
            Fate::Delay(time) => {
                tokio::time::sleep(time).await;
                work.await
            }
            Fate::Pause(gate) => {
                gate.pass().await;
                work.await
            }
        }
    }

    fn error(&self, call: &Call, cause: StoreErrorCause) -> StoreError {
        StoreError {
            operation: "write",
            key: call.key.clone(),
            location: self.location(),
            cause,
            detail: "a fault of the test".to_owned(),
        }
    }
}

#[async_trait]
impl Store for Recording {
    fn location(&self) -> String {
        self.inner.location()
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StoreError> {
        self.run(Operation::Get, key.as_str(), 0, self.inner.get(key)).await
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.run(Operation::GetRange, key.as_str(), 0, self.inner.get_range(key, range)).await
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        self.run(Operation::Put, key.as_str(), body.len(), self.inner.put(key, body)).await
    }

    async fn create(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError> {
        self.run(Operation::Create, key.as_str(), body.len(), self.inner.create(key, body)).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, StoreError> {
        self.run(Operation::List, prefix, 0, self.inner.list(prefix, after)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.run(Operation::Delete, key.as_str(), 0, self.inner.delete(key)).await
    }

    fn create_is_exclusive(&self) -> bool {
        self.inner.create_is_exclusive()
    }
}
