//! A store in memory: for tests, simulations and for trying things out.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;

use super::{Creation, Entry, Page, Store, StoreError, StoreErrorCause};
use crate::key::Key;

/// Objects in a map. Forgets everything when dropped.
#[derive(Debug, Default)]
pub struct MemoryStore {
    objects: Mutex<BTreeMap<String, Bytes>>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Changes or removes an object behind the engine's back, as damage does. Tests use it.
    pub fn damage(&self, key: &str, change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>) {
        let mut objects = self.objects();
        if let Some(body) = objects.remove(key).and_then(|body| change(body.to_vec())) {
            objects.insert(key.to_owned(), body.into());
        }
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<String, Bytes>> {
        // Each method leaves the map whole, so a panic elsewhere does not spoil it.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn body(&self, key: &Key) -> Result<Bytes, StoreError> {
        self.objects().get(key.as_str()).cloned().ok_or_else(|| StoreError {
            operation: "read",
            key: key.to_string(),
            location: self.location(),
            cause: StoreErrorCause::NotFound,
            detail: "no such object".to_owned(),
        })
    }
}

#[async_trait]
impl Store for MemoryStore {
    fn location(&self) -> String {
        "memory:".to_owned()
    }

    fn create_is_exclusive(&self) -> bool {
        true
    }

    async fn get(&self, key: &Key) -> Result<Bytes, StoreError> {
        self.body(key)
    }

    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let body = self.body(key)?;
        let clamp = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(body.len());
        let (start, end) = (clamp(range.start), clamp(range.end));
        Ok(body.slice(start..end.max(start)))
    }

    async fn put(&self, key: &Key, body: Bytes) -> Result<(), StoreError> {
        let mut objects = self.objects();
        if objects.get(key.as_str()).is_some_and(|known| *known != body) {
            return Err(StoreError {
                operation: "write",
                key: key.to_string(),
                location: self.location(),
                cause: StoreErrorCause::Other,
                detail: "another object has this name, and objects never change".to_owned(),
            });
        }
        objects.insert(key.to_string(), body);
        Ok(())
    }

    async fn create(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError> {
        let mut objects = self.objects();
        if objects.contains_key(key.as_str()) {
            return Ok(Creation::Exists);
        }
        objects.insert(key.to_string(), body);
        Ok(Creation::Created)
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, StoreError> {
        let start = after.filter(|after| *after >= prefix).map(|after| format!("{after}\0"));
        let start = start.unwrap_or_else(|| prefix.to_owned());
        let objects = self.objects();
        let entries = objects
            .range(start..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, body)| Entry {
                key: key.clone(),
                len: body.len() as u64,
                modified_unix_ms: 0,
            })
            .collect();
        Ok(Page { entries, more: false })
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.objects().remove(key.as_str());
        Ok(())
    }
}
