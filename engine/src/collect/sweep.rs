//! Removes packs that nothing needs, then the small objects that nothing reads any more.

use super::inventory::Inventory;
use super::view::View;
use super::{CollectOptions, CollectReport};
use crate::context::Context;
use crate::error::Result;
use crate::id::SnapshotId;
use crate::key::{self, Key};
use crate::progress::Event;
use crate::relocation::parse_move;
use crate::repository::Repository;
use crate::store::list_each;

/// 7: deletes packs of decided sessions that nothing needs.
pub(super) async fn sweep(
    repo: &Repository,
    view: &View,
    inventory: &Inventory,
    options: &CollectOptions,
    report: &mut CollectReport,
    ctx: &Context,
) -> Result<()> {
    (report.kept_packs, report.kept_bytes, report.wasted_bytes) = (0, 0, 0);
    for pack in inventory.iter() {
        ctx.check()?;
        let is_decided = view.is_decided(pack.id.session);
        if pack.needed > 0 || !is_decided {
            report.kept_packs += 1;
            report.kept_bytes += pack.len;
            if is_decided {
                report.wasted_bytes += pack.len - pack.needed.min(pack.len);
            }
            continue;
        }
        if !options.dry_run {
            repo.store().delete(&Key::pack(pack.id)).await?;
            ctx.progress.event(Event::Freed { bytes: pack.len });
        }
        report.deleted_packs += 1;
        report.freed_bytes += pack.len;
        report.compacted_packs += u64::from(view.moves.contains_key(&pack.id));
    }
    if options.dry_run {
        return Ok(());
    }
    for (owner, key) in &view.pins {
        if view.is_void(*owner) {
            repo.store().delete(key).await?;
        }
    }
    // The catalogue only helps to find snapshots, so entries of those that will never be found can go.
    remove(repo, key::RUNS, |listed| {
        key::parse_catalogued(listed).filter(|id| view.is_dead(*id) || view.is_purged(*id))
    })
    .await?;
    // And hints only help to find decisions.
    remove(repo, key::MOVES, |listed| {
        parse_move(listed).map(|(_, session)| session).filter(|id| view.is_dead(*id))
    })
    .await
}

/// Deletes the listed objects that `dead` says are.
async fn remove(
    repo: &Repository,
    prefix: &str,
    dead: impl Fn(&str) -> Option<SnapshotId> + Send + Sync,
) -> Result<()> {
    let mut gone = Vec::new();
    list_each(repo.store(), prefix, |entry| {
        if dead(&entry.key).is_some() {
            gone.push(Key::from_listing(entry.key.clone()));
        }
    })
    .await?;
    for key in gone {
        repo.store().delete(&key).await?;
    }
    Ok(())
}
