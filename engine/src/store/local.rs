//! To come.
use std::ops::Range;
use async_trait::async_trait;
use bytes::Bytes;
use super::{Creation, Page, Store, StoreError, MemoryStore};
use crate::key::Key;
/// A directory.
#[derive(Debug)]
pub struct LocalStore(MemoryStore);
impl LocalStore {
    /// A store in `directory`.
    pub fn new(_directory: &std::path::Path) -> Self { Self(MemoryStore::new()) }
}
#[async_trait]
impl Store for LocalStore {
    fn location(&self) -> String { String::new() }
    async fn get(&self, key: &Key) -> Result<Bytes, StoreError> { self.0.get(key).await }
    async fn get_range(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> { self.0.get_range(key, range).await }
    async fn put(&self, key: &Key, body: Bytes) -> Result<(), StoreError> { self.0.put(key, body).await }
    async fn create(&self, key: &Key, body: Bytes) -> Result<Creation, StoreError> { self.0.create(key, body).await }
    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page, StoreError> { self.0.list(prefix, after).await }
    async fn list_folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> { self.0.list_folders(prefix).await }
    async fn delete(&self, key: &Key) -> Result<(), StoreError> { self.0.delete(key).await }
}
