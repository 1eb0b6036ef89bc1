//! Garbage collection (docs/protocol.md, "Collector"). Any number of collectors and writers at once: there is no lock.
//!
//! ```text
//! policy     purge what was deleted long ago, abort sessions that are silent
//! view       graves, marks and ends, *then* pins, *then* decisions, *then* graves again
//! walk       every root's manifest -> what of each pack is needed
//! sweep      delete packs of decided sessions that nothing needs
//! compact    copy what is needed of packs that are mostly garbage; the next round deletes those
//! bury       write down ids of which nothing else is needed, and remove their small objects
//! ```
//!
//! The order of the view is the safety. A pack goes only when its session is decided and no root refers to it, or
//! a compaction has copied all that roots need of it; since writers reuse only chunks of snapshots that they pinned
//! before, a pack without references stays so.

use std::time::Duration;

use serde::Serialize;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::repository::Repository;

mod bury;
mod compact;
mod inventory;
mod policy;
mod sweep;
mod view;
mod walk;

pub(crate) use compact::Copier;

use inventory::Inventory;
use view::View;
use walk::Walk;

/// A walk that meets a snapshot purged under way, or new graves, starts over this often.
const RESTARTS: usize = 10;
/// Packs are compacted in batches, each followed by a new view: at most so many.
const BATCHES: usize = 1000;

/// Policies of a collection. None of them matters for safety.
#[derive(Clone, Copy, Debug)]
pub struct CollectOptions {
    /// Snapshots deleted longer ago lose their data.
    pub grace: Duration,
    /// Undecided sessions that have stored nothing for longer are aborted.
    pub silent: Duration,
    /// Garbage within packs that are kept may take so many hundredths of them; what is above is compacted away.
    /// None compacts nothing.
    pub max_waste_percent: Option<u8>,
    /// From so many dead ids on, their small objects are removed and the ids written down in one list.
    pub bury_from: usize,
    /// Only say what would be done.
    pub dry_run: bool,
}

impl Default for CollectOptions {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self {
            grace: 7 * DAY,
            silent: DAY,
            max_waste_percent: Some(5),
            bury_from: 1000,
            dry_run: false,
        }
    }
}

/// What a collection did, or would do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CollectReport {
    /// Deleted snapshots whose grace time was over.
    pub purged: u64,
    /// Deleted snapshots that are still kept for their grace time.
    pub in_grace: u64,
    /// Silent sessions that were aborted.
    pub aborted_sessions: u64,
    /// Packs removed.
    pub deleted_packs: u64,
    /// Their bytes.
    pub freed_bytes: u64,
    /// Packs that were removed after what was needed of them had been copied.
    pub compacted_packs: u64,
    /// Bytes that this took in new packs.
    pub copied_bytes: u64,
    /// Packs that could not be compacted, since they are damaged.
    pub damaged_packs: u64,
    /// Dead ids whose small objects were removed.
    pub buried: u64,
    /// Packs that are needed, or may be by a session that is not decided.
    pub kept_packs: u64,
    /// Their bytes.
    pub kept_bytes: u64,
    /// Bytes in them that nothing needs, about.
    pub wasted_bytes: u64,
}

/// Collects garbage.
///
/// It can be stopped or killed at any moment: every step stands for itself, packs that were deleted or compacted stay
/// so, and the next collection goes on from there.
pub async fn collect(
    repo: &Repository,
    options: &CollectOptions,
    ctx: &Context,
) -> Result<CollectReport> {
    let mut report = CollectReport::default();
    if !options.dry_run {
        repo.ready_to_write(ctx).await?;
    }
    policy::purge(repo, options, &mut report, ctx).await?;
    let aborted = policy::abort_silent(repo, options, &mut report, ctx).await?;
    let (mut restarts, mut batches) = (0, 0);
    loop {
        if restarts == RESTARTS {
            return Err(Error::Request(
                "snapshots were purged faster than they could be walked; collect again when less is deleted"
                    .to_owned(),
            ));
        }
        // Packs may be listed at any time; now, since those that come later are not ours to judge.
        let mut inventory = Inventory::list(repo, ctx).await?;
        let Some(view) = View::read(repo, options, &aborted, ctx).await? else {
            restarts += 1;
            continue;
        };
        let walk = Walk::new(repo, &view, ctx)?;
        let Some(needed_moves) = walk.run(&mut inventory).await? else {
            restarts += 1;
            continue;
        };
        if !view.holds(repo).await? {
            restarts += 1;
            continue;
        }
        sweep::sweep(repo, &view, &inventory, options, &mut report, ctx).await?;
        if options.dry_run {
            return Ok(report);
        }
        bury::bury(repo, &view, &needed_moves, options, &mut report, ctx).await?;
        if batches == BATCHES
            || !compact::compact(repo, &view, &inventory, options, &mut report, ctx).await?
        {
            return Ok(report);
        }
        batches += 1;
    }
}
