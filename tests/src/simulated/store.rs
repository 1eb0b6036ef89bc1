//! The store as a process reaches it.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use petra_engine::key::{GRAVES, Key, SNAPS};
use petra_engine::store::{Creation, Entry, Page, Store, StoreError, StoreErrorCause};
use tokio::sync::oneshot;

use super::fate::{Fate, FateKind, spread};
use super::process::Process;
use super::world::{Betrayal, Change, State, World, Write, pause};

/// The store as one process reaches it.
#[derive(Debug)]
pub(super) struct SimulatedStore(pub(super) Arc<Process>);

impl SimulatedStore {
    fn world(&self) -> &Arc<World> {
        &self.0.world
    }

    /// Decides what becomes of a request, and writes it down.
    fn send(&self, operation: &'static str, key: &str, len: usize, is_write: bool) -> Fate {
        let at = self.world().began.elapsed();
        let fate = {
            let mut state = self.world().state();
            state.requests += 1;
            let faults = state.faults;
            let fate = faults.fate(&mut state.rng, operation, key, is_write);
            let kind = match fate.kind {
                FateKind::Done => String::new(),
                other => format!(" {other:?}"),
            };
            let again = fate.again.map(|after| format!(" again after {after:?}"));
            state.note(
                at,
                self.0.name(),
                format_args!(
                    "> {operation} {key} {len} {}+{} ms{kind}{}",
                    fate.there.as_millis(),
                    fate.back.as_millis(),
                    again.unwrap_or_default()
                ),
            );
            fate
        };
        if fate.kind != FateKind::Done {
            let mut life = self.0.life();
            life.troubles.errors += 1;
            let decides = key.starts_with(SNAPS) || key.starts_with(GRAVES);
            life.troubles.doubts += u32::from(decides);
        }
        fate
    }

    async fn write(
        &self,
        operation: &'static str,
        key: &Key,
        change: Change,
    ) -> Result<Creation, StoreError> {
        let dies = self.0.breathe();
        if dies && self.0.life().rng.bool() {
            self.0.die().await;
        }
        let len = match &change {
            Change::Put(body) | Change::Create(body) => body.len(),
            Change::Delete => 0,
        };
        let fate = self.send(operation, key.as_str(), len, true);
        let write = Write { process: self.0.clone(), key: key.to_string(), change };
        self.world().state().under_way += 1;
        let (reply, answer) = oneshot::channel();
        tokio::spawn(self.world().clone().deliver(write, fate, reply));
        if dies {
            self.0.die().await;
        }
        match answer.await {
            Ok(Ok(done)) => Ok(done),
            _ => Err(self.error(operation, key.as_str(), StoreErrorCause::Unavailable)),
        }
    }

    /// A read looks at the store at one moment.
    async fn read<T>(
        &self,
        operation: &'static str,
        key: &str,
        look: impl FnOnce(&State) -> Option<T> + Send,
    ) -> Result<T, StoreError> {
        if self.0.breathe() {
            self.0.die().await;
        }
        let fate = self.send(operation, key, 0, false);
        pause(fate.there).await;
        let seen = look(&self.world().state());
        pause(fate.back).await;
        if fate.kind != FateKind::Done {
            return Err(self.error(operation, key, StoreErrorCause::Unavailable));
        }
        seen.ok_or_else(|| self.error(operation, key, StoreErrorCause::NotFound))
    }

    fn error(&self, operation: &'static str, key: &str, cause: StoreErrorCause) -> StoreError {
        StoreError {
            operation,
            key: key.to_owned(),
            location: self.location(),
            cause,
            detail: "says the simulation".to_owned(),
        }
    }
}

#[async_trait]
impl Store for SimulatedStore {
    fn location(&self) -> String {
        "simulated:".to_owned()
    }

    fn create_is_exclusive(&self) -> bool {
        true
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StoreError> {
        let key = key.as_str();
        let body = |state: &State| state.objects.get(key).map(|object| object.body.clone());
        self.read("get", key, body).await
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let key = key.as_str();
        let piece = |state: &State| {
            let body = &state.objects.get(key)?.body;
            let clamp = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(body.len());
            let (start, end) = (clamp(range.start), clamp(range.end));
            Some(body.slice(start..end.max(start)))
        };
        self.read("get_range", key, piece).await
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        self.write("put", key, Change::Put(body)).await.map(|_| ())
    }

    async fn create(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError> {
        self.write("create", key, Change::Create(body)).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, StoreError> {
        let world = self.world().clone();
        let begins = self.read("list", prefix, |state| Some(state.matching(prefix, after))).await?;
        let latency = world.state().faults.latency;
        if !latency.is_zero() {
            let lasts = spread(&mut world.state().rng, 2 * latency);
            pause(lasts).await;
        }
        let state = &mut *world.state();
        let ends = state.matching(prefix, after);
        let keys: BTreeSet<&String> = begins.keys().chain(ends.keys()).collect();
        let bound = match state.rng.u8(..4) {
            0 if !latency.is_zero() => state.rng.usize(1..=5),
            _ => 1000,
        };
        let mut entries: Vec<Entry> = Vec::new();
        for key in keys {
            let seen = match (begins.get(key), ends.get(key)) {
                (Some(first), Some(last)) => Some(if state.rng.bool() { first } else { last }),
                (one, other) => one.or(other).filter(|_| state.rng.bool()),
            };
            let blind = state.betrayal == Some(Betrayal::BlindListings) && state.rng.u32(..10) == 0;
            let Some(entry) = seen.filter(|_| !blind) else { continue };
            if entries.len() == bound {
                return Ok(Page { entries, more: true });
            }
            entries.push(entry.clone());
        }
        Ok(Page { entries, more: false })
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.write("delete", key, Change::Delete).await.map(|_| ())
    }
}
