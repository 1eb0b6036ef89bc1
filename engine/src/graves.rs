//! Graves: lists of ids of which nothing else is left (docs/protocol.md, "Graves").
//!
//! Decisions, marks and ends say what can't be said twice, so they could never be removed, and repositories would
//! grow for ever. A collector writes the ids of many dead ones into one object first, and removes theirs then.
//! Whoever pins, commits or collects reads the graves last, and so never takes a dead one for alive.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::id::SnapshotId;
use crate::key::{self, Key};
use crate::record::{Grave, kind};
use crate::repository::Repository;
use crate::store::list_each;

/// The graves that were seen at one time.
#[derive(Debug, Default, Clone)]
pub(crate) struct Graves {
    /// By key; a grave never changes.
    lists: BTreeMap<String, Arc<BTreeSet<SnapshotId>>>,
}

/// Graves that were read before.
#[derive(Debug, Default)]
pub(crate) struct GraveCache(Mutex<Arc<Graves>>);

impl Graves {
    /// True for sessions, snapshots and clones of which nothing else is left.
    pub fn contains(&self, id: SnapshotId) -> bool {
        self.lists.values().any(|dead| dead.contains(&id))
    }

    /// True when both hold the same lists.
    pub fn same(&self, other: &Self) -> bool {
        self.lists.len() == other.lists.len() && self.lists.keys().eq(other.lists.keys())
    }
}

impl Repository {
    /// The graves as they are now.
    pub(crate) async fn graves(&self) -> Result<Arc<Graves>> {
        let mut listed = BTreeSet::new();
        list_each(self.store(), key::GRAVES, |entry| {
            listed.insert(entry.key.clone());
        })
        .await?;
        let cache = &self.grave_cache().0;
        let known = cache.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // Graves are never removed, so what is known stays true.
        if listed.iter().all(|key| known.lists.contains_key(key)) {
            return Ok(known);
        }
        let mut graves = (*known).clone();
        for name in listed {
            if graves.lists.contains_key(&name) {
                continue;
            }
            let key = Key::from_listing(name.clone());
            let body = self.store().get(&key).await?;
            let grave: Grave = self.unseal(kind::GRAVE, &key, &body)?;
            graves.lists.insert(name, Arc::new(grave.dead.into_iter().collect()));
        }
        let graves = Arc::new(graves);
        *cache.lock().unwrap_or_else(PoisonError::into_inner) = graves.clone();
        Ok(graves)
    }
}
