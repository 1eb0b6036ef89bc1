//! The slots of a repository: unlock, list, add, remove.
//!
//! A slot is written before the configuration that it belongs to, so that a repository is never there without one. A
//! removed slot is put back if the last ones were removed by two people at once: who removes one has the data key.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::keys::DataKey;
use super::secret::{NewKey, Secret};
use super::slot::Slot;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::format::envelope;
use crate::id::{Digest, SnapshotId};
use crate::key::{self, Key};
use crate::record::kind;
use crate::repository::{READS, Repository, read_config, timestamp};
use crate::store::{Store, list_all};

/// Slots that are looked at. A passphrase is tried on each, which takes its time.
const MAX_SLOTS: usize = 64;

/// A key of a repository, without any secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyInfo {
    /// Its id.
    pub id: SnapshotId,
    /// What is stored.
    pub slot: Slot,
}

/// The keys of a repository, oldest first. Needs no secret.
pub async fn list_keys(store: &dyn Store) -> Result<Vec<KeyInfo>> {
    let (config, _) = read_config(store).await?;
    if config.encryption.is_none() {
        return Err(Error::NotEncrypted { location: store.location() });
    }
    slots(store).await?.into_iter().map(|(id, slot)| Ok(KeyInfo { id, slot: slot? })).collect()
}

/// All slots, oldest first; those that can't be read as errors.
async fn slots(store: &dyn Store) -> Result<Vec<(SnapshotId, Result<Slot>)>> {
    let entries = list_all(store, key::KEYS).await?;
    // By value: with references in it the future would not be Send for every lifetime.
    let ids: Vec<SnapshotId> =
        entries.iter().filter_map(|entry| key::parse_id(&entry.key, key::KEYS)).collect();
    let read = ids.into_iter().take(MAX_SLOTS).map(|id| async move {
        match read_slot(store, id).await {
            Err(error) if error.is_damage() || matches!(error, Error::Version { .. }) => {
                Ok((id, Err(error)))
            }
            Err(error) => Err(error),
            Ok(slot) => Ok((id, Ok(slot))),
        }
    });
    stream::iter(read).buffered(READS).try_collect().await
}

async fn read_slot(store: &dyn Store, id: SnapshotId) -> Result<Slot> {
    let key = Key::slot(id);
    envelope::unseal(kind::KEY, &key, &store.get(&key).await?).map_err(|error| error.of(&key))
}

/// Finds the slot that a secret opens, in a repository with this configuration.
pub async fn unlock(
    store: &dyn Store,
    config: Digest,
    secret: &Secret,
) -> Result<(DataKey, SnapshotId)> {
    let (mut tried, mut damaged) = (0, None);
    for (id, slot) in slots(store).await? {
        let slot = match slot {
            Ok(slot) => slot,
            Err(error) => {
                damaged = Some(error);
                continue;
            }
        };
        let (made_for, secret) = (slot.config, secret.clone());
        let unwrapped = heavy(move || slot.unwrap(&Key::slot(id), &secret)).await?;
        tried += 1;
        match unwrapped {
            Ok(Some(data)) if made_for == config => return Ok((data, id)),
            Ok(Some(_)) => {
                let detail = format!("{made_for} expected by key {id}, {config} computed");
                // Or the slot is that of an `init` that died, and another one fits.
                damaged = Some(Error::Damaged { object: Key::config().to_string(), detail });
            }
            Ok(None) => {}
            Err(error) => damaged = Some(error),
        }
    }
    Err(match damaged {
        Some(error) => error,
        None if tried == 0 => Error::Missing {
            object: key::KEYS.to_owned(),
            needed_by: "an encrypted repository".to_owned(),
        },
        None => Error::WrongKey { location: store.location(), kind: secret.kind(), tried },
    })
}

/// Stores the data key, wrapped for one more secret.
pub async fn put_slot(
    store: &dyn Store,
    config: Digest,
    data: &DataKey,
    new: &NewKey,
    ctx: &Context,
) -> Result<KeyInfo> {
    let id = ctx.host.new_id();
    let (data, new, host, created) = (data.clone(), new.clone(), ctx.host.clone(), timestamp(ctx));
    let wrap = move || Slot::wrap(&Key::slot(id), config, &data, &new, created, &*host);
    let slot = heavy(wrap).await??;
    store.put(&Key::slot(id), seal(id, &slot)?).await?;
    Ok(KeyInfo { id, slot })
}

fn seal(id: SnapshotId, slot: &Slot) -> Result<Bytes> {
    let sealed = envelope::seal(kind::KEY, &Key::slot(id), slot);
    sealed.map_err(|_| Error::Internal("a slot can't be written as JSON"))
}

/// Runs what takes long and much memory outside of the async runtime.
async fn heavy<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Error::Internal("argon2 panicked"))
}

impl Repository {
    /// The key that the repository was opened with; None for one that is not encrypted.
    pub fn opened_with(&self) -> Option<SnapshotId> {
        self.unlocked().map(|unlocked| unlocked.slot)
    }

    /// Lets one more secret open the repository.
    pub async fn add_key(&self, new: &NewKey, ctx: &Context) -> Result<KeyInfo> {
        let (Some(data), Some(unlocked)) = (self.keys().data_key(), self.unlocked()) else {
            return Err(Error::NotEncrypted { location: self.location() });
        };
        if slots(self.store()).await?.len() >= MAX_SLOTS {
            return Err(Error::Request(format!("a repository has at most {MAX_SLOTS} keys")));
        }
        put_slot(self.store(), unlocked.config, data, new, ctx).await
    }

    /// Takes a key away, unless it is the last one. Whoever used it may have kept the data key.
    pub async fn remove_key(&self, id: SnapshotId) -> Result<()> {
        if self.usable_keys().await?.iter().all(|known| *known == id) {
            let text = format!("{id} is the only key: without it all data would be lost");
            return Err(Error::Request(text));
        }
        let key = Key::slot(id);
        let body = match self.store().get(&key).await {
            Ok(body) => body,
            Err(error) if error.is_not_found() => return Err(self.unknown_key(id).await),
            Err(error) => return Err(error.into()),
        };
        self.store().delete(&key).await?;
        if self.usable_keys().await?.is_empty() {
            self.store().put(&key, body).await?;
            let text = format!("{id} stays: another key was removed at the same time");
            return Err(Error::Request(text));
        }
        Ok(())
    }

    /// Keys that some secret opens, as far as one can tell without it.
    async fn usable_keys(&self) -> Result<Vec<SnapshotId>> {
        let Some(unlocked) = self.unlocked() else {
            return Err(Error::NotEncrypted { location: self.location() });
        };
        let fits = |slot: &Slot| slot.config == unlocked.config;
        let slots = slots(self.store()).await?.into_iter();
        Ok(slots.filter(|(_, slot)| slot.as_ref().is_ok_and(fits)).map(|(id, _)| id).collect())
    }

    async fn unknown_key(&self, id: SnapshotId) -> Error {
        let known = slots(self.store()).await.unwrap_or_default();
        Error::Unknown {
            what: "key",
            name: id.to_string(),
            within: self.location(),
            known: known.iter().map(|(id, _)| id.to_string()).collect(),
        }
    }
}
