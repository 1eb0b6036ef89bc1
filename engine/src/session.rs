//! A writer's session: pin, packs, commit (docs/protocol.md, "Writer").
//!
//! The order is what makes it safe next to any number of collectors: first the pin is acknowledged, then the
//! pinned snapshots are checked for Purge marks, then their chunks may be reused. All packs are acknowledged
//! before the commit, and the commit is one object that an Abort may win.

use crate::context::Context;
use crate::error::{Error, Result};
use crate::id::SnapshotId;
use crate::key::Key;
use crate::name::Name;
use crate::publish::{Published, publish};
use crate::record::{CatalogueEntry, Decision, Move, Pin, PinOwner, SnapshotRecord, kind};
use crate::repository::{Repository, stamp};

/// A session that is not decided yet.
#[derive(Debug)]
pub struct Session {
    repo: Repository,
    id: SnapshotId,
    ctx: Context,
    pinned: bool,
    /// The session's entry in the catalogue.
    entry: Option<Key>,
    puts: u64,
}

impl Session {
    /// Begins a session and pins `witnesses`. Gives the session and which witnesses hold: purged ones do not.
    pub async fn begin(
        repo: &Repository,
        witnesses: &[SnapshotId],
        ctx: &Context,
    ) -> Result<(Self, Vec<SnapshotId>)> {
        repo.ready_to_write(ctx).await?;
        let id = ctx.host.new_id();
        let mut session =
            Self { repo: repo.clone(), id, ctx: ctx.clone(), pinned: false, entry: None, puts: 0 };
        if witnesses.is_empty() {
            return Ok((session, vec![]));
        }
        match session.pin(witnesses).await {
            Ok(valid) => Ok((session, valid)),
            Err(error) => {
                session.unpin().await;
                Err(error)
            }
        }
    }

    /// Pins snapshots, and gives those that hold.
    async fn pin(&mut self, snapshots: &[SnapshotId]) -> Result<Vec<SnapshotId>> {
        let (stamp, snapshots) = (stamp(&self.ctx), snapshots.to_vec());
        let pin = Pin { stamp, owner: PinOwner::Session, snapshots, metadata: [].into() };
        let key = Key::pin(self.id, 0);
        // Even if the answer is lost.
        self.pinned = true;
        self.repo.store().put(&key, self.repo.seal(kind::PIN, &key, &pin)?).await?;
        self.puts += 1;
        // Only now: a Purge that comes later finds the pin.
        self.repo.unpurged(&pin.snapshots).await
    }

    /// The session's id, which its snapshot will have.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// Objects written besides packs.
    pub fn puts(&self) -> u64 {
        self.puts
    }

    /// Enters the session in the catalogue. Before the commit, so that no committed snapshot can be missing there.
    pub async fn enter(&mut self, experiment: &Name, run: &Name) -> Result<()> {
        let entry = CatalogueEntry { experiment: experiment.clone(), run: run.clone() };
        let key = Key::catalogue(self.repo.keys(), experiment, run, self.id);
        self.repo.store().put(&key, self.repo.seal(kind::CATALOGUE, &key, &entry)?).await?;
        self.entry = Some(key);
        self.puts += 1;
        Ok(())
    }

    /// Commits. All packs must have been acknowledged.
    pub async fn commit(&mut self, snapshot: SnapshotRecord) -> Result<()> {
        let (stamp, snapshot) = (stamp(&self.ctx), Box::new(snapshot));
        self.decide(Decision::Commit { stamp, snapshot }).await
    }

    /// Commits where pieces of packs were copied. All packs and hints must have been acknowledged.
    pub(crate) async fn commit_moves(&mut self, moves: Vec<Move>) -> Result<()> {
        self.decide(Decision::Compaction { stamp: stamp(&self.ctx), moves }).await
    }

    async fn decide(&mut self, decision: Decision) -> Result<()> {
        let key = Key::snap(self.id);
        let body = self.repo.seal(kind::DECISION, &key, &decision)?;
        match publish(self.repo.store(), &key, body).await? {
            // An Abort that was there may have been buried; then a grave says so, and the commit does not count.
            Published::Ours if self.repo.graves().await?.contains(self.id) => {
                self.unpin().await;
                return Err(Error::Lost { session: self.id });
            }
            Published::Ours => {}
            Published::Theirs(body) => {
                // It can only be a collector's Abort; anything else is damage and says so.
                return match self.repo.unseal(kind::DECISION, &key, &body)? {
                    Decision::Abort { .. } => {
                        self.unpin().await;
                        Err(Error::Lost { session: self.id })
                    }
                    Decision::Commit { .. } | Decision::Compaction { .. } => {
                        Err(Error::Internal("two writers share a session"))
                    }
                };
            }
        }
        self.unpin().await;
        Ok(())
    }

    /// Gives up, so that the session's packs can be collected: unless it was committed after all, when the
    /// acknowledgement was lost; that snapshot is given. Best effort: an undecided session is aborted by a
    /// collector in the end.
    pub async fn abandon(&mut self) -> Option<SnapshotRecord> {
        self.give_up().await.ok().flatten()
    }

    /// Ends a session of a process that died before it knew how the session ended: gives its snapshot if there is one.
    /// If not, there will never be. `experiment` and `run` are those it was for.
    pub async fn settle(
        repo: &Repository,
        id: SnapshotId,
        experiment: &Name,
        run: &Name,
        ctx: &Context,
    ) -> Result<Option<SnapshotRecord>> {
        let entry = Some(Key::catalogue(repo.keys(), experiment, run, id));
        let (repo, ctx) = (repo.clone(), ctx.clone());
        Self { repo, id, ctx, pinned: true, entry, puts: 0 }.give_up().await
    }

    async fn give_up(&mut self) -> Result<Option<SnapshotRecord>> {
        let key = Key::snap(self.id);
        let abort = Decision::Abort { stamp: stamp(&self.ctx) };
        let body = self.repo.seal(kind::DECISION, &key, &abort)?;
        let published = publish(self.repo.store(), &key, body).await?;
        self.unpin().await;
        match published {
            Published::Ours => {
                // The catalogue is only for snapshots.
                if let Some(entry) = &self.entry {
                    let _ = self.repo.store().delete(entry).await;
                }
                Ok(None)
            }
            Published::Theirs(body) => match self.repo.unseal(kind::DECISION, &key, &body)? {
                // As in `commit`.
                Decision::Commit { snapshot, .. }
                    if !self.repo.graves().await?.contains(self.id) =>
                {
                    Ok(Some(*snapshot))
                }
                _ => Ok(None),
            },
        }
    }

    /// Once decided, the pin is void.
    async fn unpin(&mut self) {
        if std::mem::take(&mut self.pinned) {
            // A pin that stays is void all the same; collectors remove it.
            let _ = self.repo.store().delete(&Key::pin(self.id, 0)).await;
        }
    }
}
