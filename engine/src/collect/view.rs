//! What a collector sees of the repository, read in the order that makes it safe to act on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{StreamExt, stream};

use super::CollectOptions;
use super::policy::is_over;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::graves::Graves;
use crate::id::{PackId, SnapshotId};
use crate::key::{self, Key};
use crate::marks::MarkState;
use crate::record::{Decision, MarkKind, Pin, RootRef, VolumeRecord, kind};
use crate::repository::{READS, Repository, timestamp};
use crate::store::list_each;

/// What was decided about a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It made a snapshot.
    Committed,
    /// It copied packs.
    Compacted,
    /// It was aborted, or is dead by a grave.
    Dead,
}

/// A snapshot whose data is needed.
#[derive(Debug)]
pub(super) struct Root {
    pub id: SnapshotId,
    /// It is only needed since it is pinned, and may lose its packs at any time.
    pub purged: bool,
    pub volumes: Vec<VolumeRecord>,
}

/// A compaction that copied a pack.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moved {
    pub session: SnapshotId,
    pub table: RootRef,
}

/// What a collector saw.
#[derive(Debug)]
pub(super) struct View {
    pub graves: Arc<Graves>,
    pub marks: BTreeMap<SnapshotId, MarkState>,
    /// Clones that need their pins no longer.
    pub ended: BTreeSet<SnapshotId>,
    /// Pins, by owner.
    pub pins: Vec<(SnapshotId, Key)>,
    /// Snapshots that are pinned by owners that still count.
    pub held: BTreeMap<SnapshotId, Vec<SnapshotId>>,
    pub sessions: BTreeMap<SnapshotId, Fate>,
    pub roots: Vec<Root>,
    /// Packs that were copied.
    pub moves: BTreeMap<PackId, Vec<Moved>>,
}

impl View {
    /// None when what was seen can't be acted on: start over.
    pub async fn read(
        repo: &Repository,
        options: &CollectOptions,
        would_abort: &[SnapshotId],
        ctx: &Context,
    ) -> Result<Option<Self>> {
        // First of all the graves: what was buried before is dead whatever the rest looks like.
        let graves = repo.graves().await?;
        // 2: marks and ends.
        let marks = repo.marks().await?;
        let ended = repo.ended().await?;
        // 3: pins.
        let mut pins = Vec::new();
        list_each(repo.store(), key::PINS, |entry| {
            if let Some(pin) = key::parse_numbered(&entry.key, key::PINS) {
                pins.push((pin.session, Key::from_listing(entry.key.clone())));
            }
        })
        .await?;
        let mut pinned = Vec::new();
        for (owner, key) in &pins {
            ctx.check()?;
            if let Some(pin) = read_pin(repo, key).await? {
                pinned.extend(pin.snapshots.into_iter().map(|snapshot| (*owner, snapshot)));
            }
        }
        // 4: decisions.
        let decided = repo.decided().await?;
        let mut view = Self {
            graves,
            marks,
            ended,
            pins,
            held: BTreeMap::new(),
            sessions: BTreeMap::new(),
            roots: Vec::new(),
            moves: BTreeMap::new(),
        };
        let now = timestamp(ctx);
        let is_purged = |view: &Self, id: &SnapshotId| {
            view.marks.get(id).is_some_and(|state| {
                // A dry run sees the repository as the purge before it would have left it.
                let would_be = options.dry_run
                    && state.mark == MarkKind::Delete
                    && is_over(now, state.at, options.grace);
                state.mark == MarkKind::Purge || would_be
            })
        };
        let read = decided.into_iter().map(|id| async move { (id, repo.decision(id).await) });
        let mut decisions = stream::iter(read).buffered(READS);
        let mut roots = Vec::new();
        while let Some((id, decision)) = decisions.next().await {
            ctx.check()?;
            let fate = match decision? {
                _ if view.graves.contains(id) => Fate::Dead,
                Some(Decision::Abort { .. }) => Fate::Dead,
                Some(Decision::Commit { snapshot, .. }) => {
                    let purged = is_purged(&view, &id);
                    roots.push(Root { id, purged, volumes: snapshot.volumes });
                    Fate::Committed
                }
                Some(Decision::Compaction { moves, .. }) => {
                    for moved in moves {
                        let copies = view.moves.entry(moved.source).or_default();
                        copies.push(Moved { session: id, table: moved.table });
                    }
                    Fate::Compacted
                }
                // It was buried since the listing; without a grave it is damage.
                None if repo.graves().await?.contains(id) => return Ok(None),
                None => {
                    return Err(Error::Missing {
                        object: Key::snap(id).to_string(),
                        needed_by: "the listing that shows it".to_owned(),
                    });
                }
            };
            view.sessions.insert(id, fate);
        }
        drop(decisions);
        if options.dry_run {
            // As the aborts before it would have left the repository.
            view.sessions.extend(would_abort.iter().map(|id| (*id, Fate::Dead)));
        }
        // 5: roots.
        for (owner, snapshot) in pinned {
            if !view.is_void(owner) {
                view.held.entry(snapshot).or_default().push(owner);
            }
        }
        roots.retain(|root| !root.purged || view.held.contains_key(&root.id));
        view.roots = roots;
        // 6: a chain of which only the second link is in view can't be followed.
        let broken = view.moves.keys().any(|source| !view.is_decided(source.session));
        Ok(if broken { None } else { Some(view) })
    }

    /// True when the graves are as they were before the rest was read: what was seen may be acted on.
    pub async fn holds(&self, repo: &Repository) -> Result<bool> {
        Ok(repo.graves().await?.same(&self.graves))
    }

    /// The pins of this owner no longer count.
    pub fn is_void(&self, owner: SnapshotId) -> bool {
        self.ended.contains(&owner) || self.is_decided(owner)
    }

    /// The session will write nothing more that counts.
    pub fn is_decided(&self, session: SnapshotId) -> bool {
        self.sessions.contains_key(&session) || self.graves.contains(session)
    }

    /// The session was aborted.
    pub fn is_dead(&self, session: SnapshotId) -> bool {
        self.sessions.get(&session) == Some(&Fate::Dead) || self.graves.contains(session)
    }

    /// The snapshot's data may go.
    pub fn is_purged(&self, snapshot: SnapshotId) -> bool {
        self.marks.get(&snapshot).is_some_and(|state| state.mark == MarkKind::Purge)
            || self.graves.contains(snapshot)
    }
}

/// A pin; None when it is gone, which it is only after it became void.
pub(super) async fn read_pin(repo: &Repository, key: &Key) -> Result<Option<Pin>> {
    match repo.store().get(key).await {
        Ok(body) => repo.unseal(kind::PIN, key, &body).map(Some),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}
