//! The pin of a clone: what keeps a snapshot readable while a volume is made from it (docs/protocol.md, "Clone").

use std::collections::{BTreeMap, BTreeSet};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::id::SnapshotId;
use crate::key::{self, Key};
use crate::record::{End, Pin, PinOwner, kind};
use crate::repository::{Repository, stamp};
use crate::store::list_each;

/// Keeps the data of a snapshot until it is ended: even when the snapshot is deleted and purged, and however long
/// its owner is silent.
///
/// Dropping it ends nothing: a clone outlives the processes that serve it.
#[derive(Clone, Debug)]
pub struct ClonePin {
    repo: Repository,
    id: SnapshotId,
    snapshot: SnapshotId,
}

impl ClonePin {
    /// Pins a snapshot, which may be deleted but not purged. When this returns, the whole snapshot can be read
    /// until the pin is ended. After an error nothing needs to be ended, as far as the store could still be reached.
    pub async fn take(repo: &Repository, snapshot: SnapshotId, ctx: &Context) -> Result<Self> {
        Self::take_as(repo, ctx.host.new_id(), snapshot, ctx).await
    }

    /// The same with a fresh id that the caller has written down before, so that a crash leaves no pin that nobody knows.
    pub async fn take_as(
        repo: &Repository,
        id: SnapshotId,
        snapshot: SnapshotId,
        ctx: &Context,
    ) -> Result<Self> {
        repo.ready_to_write(ctx).await?;
        let pin = Self { repo: repo.clone(), id, snapshot };
        let result = pin.put(&Key::pin(id, 0), BTreeMap::new(), ctx).await;
        if result.is_err() {
            // The pin may be there although its answer was lost, and no one would ever end it.
            let _ = pin.end(ctx).await;
        }
        result.map(|()| pin)
    }

    /// The same with an id that is made of a name, for calls that are repeated until they succeed. If there is one
    /// already, see [`find`](Self::find), this has to be for the same snapshot. `metadata` says what it is for. Calls for one
    /// id must not overlap.
    ///
    /// Each call puts a pin of its own: one that an earlier call has put may be about to go, since that call failed and
    /// took it back. After an error the clone is not ended, since that is for good, and the call could never succeed again.
    /// The pin is taken back, as far as the store can be reached.
    pub async fn take_named(
        repo: &Repository,
        id: SnapshotId,
        snapshot: SnapshotId,
        metadata: BTreeMap<String, String>,
        ctx: &Context,
    ) -> Result<Self> {
        repo.ready_to_write(ctx).await?;
        let pin = Self { repo: repo.clone(), id, snapshot };
        // A number that never comes again: the deletion below may be carried out much later.
        let key = Key::pin(id, ctx.host.random() as u32);
        let result = pin.put(&key, metadata, ctx).await;
        if result.is_err() {
            // Nobody has read by it: it is as if it had never been.
            let _ = repo.store().delete(&key).await;
        }
        result.map(|()| pin)
    }

    /// What an earlier call for this id has pinned. It may hold nothing: that call may have died before it knew.
    pub async fn find(repo: &Repository, id: SnapshotId) -> Result<Option<SnapshotId>> {
        Ok(repo.pin(id).await?.and_then(|pin| pin.snapshots.first().copied()))
    }

    /// A pin that was taken before, maybe by another process.
    pub fn taken(repo: &Repository, id: SnapshotId, snapshot: SnapshotId) -> Self {
        Self { repo: repo.clone(), id, snapshot }
    }

    async fn put(
        &self,
        key: &Key,
        metadata: BTreeMap<String, String>,
        ctx: &Context,
    ) -> Result<()> {
        ctx.check()?;
        let snapshots = vec![self.snapshot];
        let pin = Pin { stamp: stamp(ctx), owner: PinOwner::Clone, snapshots, metadata };
        self.repo.store().put(key, self.repo.seal(kind::PIN, key, &pin)?).await?;
        // Only now: a Purge that comes later finds the pin.
        if self.repo.is_purged(self.snapshot).await? {
            return Err(Error::Unknown {
                what: "snapshot",
                name: self.snapshot.to_string(),
                within: self.repo.location(),
                known: vec![],
            });
        }
        Ok(())
    }

    /// The clone's id, which names its pin in the repository.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// The snapshot that is pinned.
    pub fn snapshot(&self) -> SnapshotId {
        self.snapshot
    }

    /// Ends the clone: it will not read from the repository again. Can be repeated.
    pub async fn end(&self, ctx: &Context) -> Result<()> {
        let end = End { stamp: stamp(ctx) };
        let key = Key::end(self.id);
        // Whoever ended it before ended it as well.
        self.repo.store().create(&key, self.repo.seal(kind::END, &key, &end)?).await?;
        // Pins that stay are void all the same; collectors remove them.
        for pin in self.repo.pins_of(self.id).await.unwrap_or_default() {
            let _ = self.repo.store().delete(&pin).await;
        }
        Ok(())
    }
}

impl Repository {
    /// Whose pins there are, of those whose ids begin with this text.
    pub async fn pinned_by(&self, prefix: &str) -> Result<Vec<SnapshotId>> {
        let mut owners = Vec::new();
        list_each(self.store(), &format!("{}{prefix}", key::PINS), |entry| {
            owners.extend(key::parse_numbered(&entry.key, key::PINS).map(|pin| pin.session));
        })
        .await?;
        Ok(owners)
    }

    /// The first pin of an owner, whether it holds anything or not.
    pub async fn pin(&self, owner: SnapshotId) -> Result<Option<Pin>> {
        for key in self.pins_of(owner).await? {
            match self.store().get(&key).await {
                Ok(body) => return self.unseal(kind::PIN, &key, &body).map(Some),
                // It has just ended.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    async fn pins_of(&self, owner: SnapshotId) -> Result<Vec<Key>> {
        let mut pins = Vec::new();
        list_each(self.store(), &format!("{}{owner}/", key::PINS), |entry| {
            pins.push(Key::from_listing(entry.key.clone()));
        })
        .await?;
        Ok(pins)
    }

    /// The clones that need their pins no longer, as far as they are not in a grave.
    pub async fn ended(&self) -> Result<BTreeSet<SnapshotId>> {
        let mut ended = BTreeSet::new();
        list_each(self.store(), key::ENDS, |entry| {
            ended.extend(key::parse_id(&entry.key, key::ENDS));
        })
        .await?;
        Ok(ended)
    }

    /// True when a clone needs its pins no longer, as far as that is not in a grave.
    pub async fn has_ended(&self, clone: SnapshotId) -> Result<bool> {
        match self.store().get(&Key::end(clone)).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
