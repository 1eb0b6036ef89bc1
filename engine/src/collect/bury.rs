//! Writes down ids of which nothing else is needed, and removes their small objects (docs/protocol.md, "Graves").

use std::collections::BTreeSet;

use super::view::{Fate, View};
use super::{CollectOptions, CollectReport};
use crate::context::Context;
use crate::error::Result;
use crate::id::{PackId, SnapshotId};
use crate::key::{self, Key};
use crate::record::{Grave, MarkKind, kind};
use crate::repository::Repository;
use crate::store::list_all;

/// Ids in one grave. The rest waits for the next collection.
const MAX_IDS: usize = 100_000;

/// Buries what is dead in this view, if that is enough to be worth an object that every writer reads.
pub(super) async fn bury(
    repo: &Repository,
    view: &View,
    needed_moves: &BTreeSet<PackId>,
    options: &CollectOptions,
    report: &mut CollectReport,
    ctx: &Context,
) -> Result<()> {
    let purged = view
        .marks
        .iter()
        .filter(|(id, state)| state.mark == MarkKind::Purge && !view.held.contains_key(id))
        .map(|(id, _)| *id);
    let aborted = view.sessions.iter().filter(|(_, fate)| **fate == Fate::Dead).map(|(id, _)| *id);
    let mut dead: BTreeSet<SnapshotId> =
        purged.chain(aborted).chain(view.ended.iter().copied()).collect();
    dead.extend(spent_compactions(view, needed_moves));
    let (known, fresh): (BTreeSet<_>, BTreeSet<_>) =
        dead.into_iter().partition(|id| view.graves.contains(*id));
    // What is in a grave already was left by an interrupted burial, or brought back by late requests.
    let mut gone = known;
    if fresh.len() >= options.bury_from.max(1) {
        ctx.check()?;
        let fresh: Vec<SnapshotId> = fresh.into_iter().take(MAX_IDS).collect();
        report.buried += fresh.len() as u64;
        gone.extend(&fresh);
        let key = Key::grave(ctx.host.new_id());
        let body = repo.seal(kind::GRAVE, &key, &Grave { dead: fresh })?;
        repo.store().put(&key, body).await?;
    }
    for id in gone {
        ctx.check()?;
        // The decision goes before the marks: a commit without its Purge would look alive.
        repo.store().delete(&Key::snap(id)).await?;
        for prefix in [key::MARKS, key::PINS, key::STARTS] {
            let prefix = format!("{prefix}{id}/");
            for entry in list_all(repo.store(), &prefix).await? {
                repo.store().delete(&Key::from_listing(entry.key)).await?;
            }
        }
        repo.store().delete(&Key::end(id)).await?;
    }
    Ok(())
}

/// Compactions none of whose sources any root needs.
fn spent_compactions(view: &View, needed_moves: &BTreeSet<PackId>) -> BTreeSet<SnapshotId> {
    let all = view.sessions.iter().filter(|(_, fate)| **fate == Fate::Compacted);
    let mut spent: BTreeSet<SnapshotId> = all.map(|(id, _)| *id).collect();
    for source in needed_moves {
        for moved in view.moves.get(source).into_iter().flatten() {
            spent.remove(&moved.session);
        }
    }
    spent
}
