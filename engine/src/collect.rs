//! Garbage collection (docs/protocol.md, "Collector"). Any number of collectors and writers at once: there is no lock.
//!
//! The order of the steps is the safety: sessions judged silent are aborted; then marks are read, *then* pins,
//! *then* decisions. A pack goes only when its session is decided and no root refers to it; since writers reuse
//! only chunks of snapshots that they pinned before, a pack without references stays so.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use futures::{StreamExt, stream};
use serde::Serialize;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::format::node::Child;
use crate::id::{PackId, SnapshotId};
use crate::key::{self, Key};
use crate::progress::Event;
use crate::publish::{Published, publish};
use crate::record::{Decision, MarkKind, Pin, PinOwner, SnapshotRecord, kind};
use crate::repository::{MarkState, READS, Repository, mark, seal, stamp, timestamp, unseal};
use crate::store::{Entry, list_all};
use crate::tree;

/// A walk that meets a snapshot purged under way starts over this often.
const ROUNDS: usize = 10;

/// Policies of a collection. None of them matters for safety.
#[derive(Clone, Copy, Debug)]
pub struct CollectOptions {
    /// Snapshots deleted longer ago lose their data.
    pub grace: Duration,
    /// Undecided sessions that have stored nothing for longer are aborted.
    pub silent: Duration,
    /// Only say what would be done.
    pub dry_run: bool,
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
    /// Packs that are needed, or may be by a session that is not decided.
    pub kept_packs: u64,
    /// Their bytes.
    pub kept_bytes: u64,
}

/// Collects garbage.
pub async fn collect(
    repo: &Repository,
    options: &CollectOptions,
    ctx: &Context,
) -> Result<CollectReport> {
    let mut report = CollectReport::default();
    purge(repo, options, &mut report, ctx).await?;
    let aborted = abort_silent(repo, options, &mut report, ctx).await?;
    for _ in 0..ROUNDS {
        if let Some(view) = View::read(repo, options, &aborted, ctx).await? {
            sweep(repo, &view, options, &mut report, ctx).await?;
            return Ok(report);
        }
    }
    Err(Error::Request(
        "snapshots were purged faster than they could be walked; collect again when less is deleted"
            .to_owned(),
    ))
}

/// Ends the grace time of deleted snapshots.
async fn purge(
    repo: &Repository,
    options: &CollectOptions,
    report: &mut CollectReport,
    ctx: &Context,
) -> Result<()> {
    let now = timestamp(ctx);
    for (id, state) in repo.marks().await? {
        ctx.check()?;
        if state.mark != MarkKind::Delete {
            continue;
        }
        if !is_over(now, state.at, options.grace) {
            report.in_grace += 1;
            continue;
        }
        // Undelete competes for the same key; whoever wins, the marks say what holds.
        let (key, body) = (Key::mark(id, state.k + 1), mark(MarkKind::Purge, ctx)?);
        if !options.dry_run && publish(repo.store(), &key, body).await? != Published::Ours {
            continue;
        }
        report.purged += 1;
    }
    Ok(())
}

fn is_over(now: jiff::Timestamp, at: jiff::Timestamp, grace: Duration) -> bool {
    let age_ms = now.as_millisecond().saturating_sub(at.as_millisecond());
    u128::try_from(age_ms).is_ok_and(|age| age >= grace.as_millis())
}

/// Aborts sessions that are undecided and have stored nothing for a while; says which.
async fn abort_silent(
    repo: &Repository,
    options: &CollectOptions,
    report: &mut CollectReport,
    ctx: &Context,
) -> Result<Vec<SnapshotId>> {
    let decided = decided(repo).await?;
    let mut last_seen: BTreeMap<SnapshotId, u64> = BTreeMap::new();
    let mut see = |session: SnapshotId, entry: &Entry| {
        let seen = last_seen.entry(session).or_insert_with(|| session.unix_ms());
        *seen = entry.modified_unix_ms.max(*seen);
    };
    for entry in list_all(repo.store(), key::PACKS).await? {
        if let Some(pack) = key::parse_numbered(&entry.key, key::PACKS) {
            see(pack.session, &entry);
        }
    }
    for entry in list_all(repo.store(), key::RUNS).await? {
        if let Some(session) = catalogued(&entry) {
            see(session, &entry);
        }
    }
    for entry in list_all(repo.store(), key::PINS).await? {
        let Some(id) = key::parse_numbered(&entry.key, key::PINS) else { continue };
        // A session that died right after its pin has nothing else. A clone must never be aborted.
        let pin = read_pin(repo, &Key::from_listing(entry.key.clone())).await?;
        if pin.is_some_and(|pin| pin.owner == PinOwner::Session) {
            see(id.session, &entry);
        }
    }
    let now = ctx.host.unix_ms();
    let mut aborted = Vec::new();
    for (session, seen) in last_seen {
        ctx.check()?;
        let silent = u128::from(now.saturating_sub(seen)) >= options.silent.as_millis();
        if decided.contains(&session) || !silent {
            continue;
        }
        let abort = seal(kind::DECISION, &Decision::Abort { stamp: stamp(ctx) })?;
        // The session's own commit may win.
        let key = Key::snap(session);
        if !options.dry_run && publish(repo.store(), &key, abort).await? != Published::Ours {
            continue;
        }
        aborted.push(session);
        report.aborted_sessions += 1;
    }
    Ok(aborted)
}

/// A pin; None when it is gone, which it is only after it became void.
async fn read_pin(repo: &Repository, key: &Key) -> Result<Option<Pin>> {
    match repo.store().get(key).await {
        Ok(body) => unseal(kind::PIN, key, &body).map(Some),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn decided(repo: &Repository) -> Result<HashSet<SnapshotId>> {
    let entries = list_all(repo.store(), key::SNAPS).await?;
    Ok(entries.iter().filter_map(|entry| key::parse_id(&entry.key, key::SNAPS)).collect())
}

/// The records of committed sessions, oldest first, and which sessions were aborted.
async fn read_decisions(
    repo: &Repository,
    decided: &HashSet<SnapshotId>,
) -> Result<(Vec<SnapshotRecord>, HashSet<SnapshotId>)> {
    let read = decided.iter().copied().map(|id| async move { (id, repo.decision(id).await) });
    let mut decisions = stream::iter(read).buffer_unordered(READS);
    let (mut records, mut aborted) = (Vec::new(), HashSet::new());
    while let Some((id, decision)) = decisions.next().await {
        match decision? {
            Some(Decision::Commit { snapshot, .. }) => records.push(*snapshot),
            Some(Decision::Abort { .. }) => {
                aborted.insert(id);
            }
            // Decisions are never removed: to take it for an abort would delete a snapshot's packs.
            None => {
                return Err(Error::Missing {
                    object: Key::snap(id).to_string(),
                    needed_by: "the listing that shows it".to_owned(),
                });
            }
        }
    }
    records.sort_by_key(|record: &SnapshotRecord| record.id);
    Ok((records, aborted))
}

fn catalogued(entry: &Entry) -> Option<SnapshotId> {
    entry.key.strip_prefix(key::RUNS)?.split('/').nth(2)?.parse().ok()
}

/// What a collector saw, in the order that makes it safe to act on.
struct View {
    marks: BTreeMap<SnapshotId, MarkState>,
    /// Pins, by owner.
    pins: Vec<(SnapshotId, Key)>,
    /// Clones that need their pins no longer.
    ended: HashSet<SnapshotId>,
    decided: HashSet<SnapshotId>,
    aborted: HashSet<SnapshotId>,
    live: HashSet<PackId>,
}

impl View {
    /// None when a root was purged while it was walked: start over.
    async fn read(
        repo: &Repository,
        options: &CollectOptions,
        would_abort: &[SnapshotId],
        ctx: &Context,
    ) -> Result<Option<Self>> {
        // 2: marks and ends.
        let marks = repo.marks().await?;
        let ended: HashSet<SnapshotId> = list_all(repo.store(), key::ENDS)
            .await?
            .iter()
            .filter_map(|entry| key::parse_id(&entry.key, key::ENDS))
            .collect();
        // 3: pins.
        let mut pins = Vec::new();
        let mut pinned: Vec<(SnapshotId, SnapshotId)> = Vec::new();
        for entry in list_all(repo.store(), key::PINS).await? {
            let Some(id) = key::parse_numbered(&entry.key, key::PINS) else { continue };
            let key = Key::from_listing(entry.key);
            let Some(pin) = read_pin(repo, &key).await? else { continue };
            pinned.extend(pin.snapshots.into_iter().map(|snapshot| (id.session, snapshot)));
            pins.push((id.session, key));
        }
        // 4: decisions.
        let mut decided = decided(repo).await?;
        let (records, aborted) = read_decisions(repo, &decided).await?;
        if options.dry_run {
            // As the aborts before it would have left the repository.
            decided.extend(would_abort);
        }
        // 5: roots.
        let purged =
            |id: &SnapshotId| marks.get(id).is_some_and(|state| state.mark == MarkKind::Purge);
        let held: HashSet<SnapshotId> = pinned
            .iter()
            .filter(|(owner, _)| !ended.contains(owner) && !decided.contains(owner))
            .map(|(_, snapshot)| *snapshot)
            .collect();
        // A dry run sees the repository as the purge before it would have left it.
        let now = timestamp(ctx);
        let would_purge = |id: &SnapshotId| {
            let state = marks.get(id).filter(|_| options.dry_run);
            state.is_some_and(|s| s.mark == MarkKind::Delete && is_over(now, s.at, options.grace))
        };
        let mut live = HashSet::new();
        let mut walked = HashSet::new();
        for record in &records {
            let is_purged = purged(&record.id) || would_purge(&record.id);
            if is_purged && !held.contains(&record.id) {
                continue;
            }
            match walk(repo, record, &mut walked, &mut live, ctx).await {
                Ok(()) => {}
                // 8: a purged root may lose its packs to another collector at any time.
                Err(Error::Missing { .. }) if is_purged => {}
                Err(Error::Missing { .. }) if repo.is_purged(record.id).await? => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(Self { marks, pins, ended, decided, aborted, live }))
    }
}

/// Adds all packs that a snapshot refers to.
async fn walk(
    repo: &Repository,
    record: &SnapshotRecord,
    walked: &mut HashSet<(PackId, u32)>,
    live: &mut HashSet<PackId>,
    ctx: &Context,
) -> Result<()> {
    for volume in &record.volumes {
        // The root's own pack counts even if it can't be read.
        live.extend(volume.root.iter().map(|root| root.pack));
        let segments = tree::segments(repo.store(), volume, ctx).await?;
        if let Some(unreadable) = segments.unreadable.into_iter().next() {
            return Err(unreadable.error);
        }
        live.extend(segments.nodes.iter().map(|node| node.pack));
        let fresh = segments.leaves.into_iter().enumerate().filter(|(_, child)| match child {
            Child::Zero => false,
            Child::Block(block) => {
                live.insert(block.pack);
                // By place, not by digest: two leaves of equal content may name different packs.
                !walked.contains(&(block.pack, block.offset))
            }
        });
        let fresh: Vec<_> = fresh.collect();
        for batch in fresh.chunks(tree::BATCH_SEGMENTS) {
            ctx.check()?;
            let leaves = tree::leaves(repo.store(), volume.len_bytes, batch.to_vec(), ctx).await?;
            for ((_, child), (_, leaf)) in batch.iter().zip(leaves) {
                live.extend(leaf?.iter().flat_map(|leaf| &leaf.frames).map(|frame| frame.pack));
                // Only now: where the walk ends early, other roots must still go through the rest.
                if let Child::Block(block) = child {
                    walked.insert((block.pack, block.offset));
                }
            }
        }
    }
    Ok(())
}

/// 7: removes packs that nothing needs, then the small objects that nothing reads any more.
async fn sweep(
    repo: &Repository,
    view: &View,
    options: &CollectOptions,
    report: &mut CollectReport,
    ctx: &Context,
) -> Result<()> {
    for entry in list_all(repo.store(), key::PACKS).await? {
        ctx.check()?;
        let Some(pack) = key::parse_numbered(&entry.key, key::PACKS) else { continue };
        if view.live.contains(&pack) || !view.decided.contains(&pack.session) {
            report.kept_packs += 1;
            report.kept_bytes += entry.len;
            continue;
        }
        if !options.dry_run {
            repo.store().delete(&Key::pack(pack)).await?;
            ctx.progress.event(Event::Freed { bytes: entry.len });
        }
        report.deleted_packs += 1;
        report.freed_bytes += entry.len;
    }
    if options.dry_run {
        return Ok(());
    }
    for (owner, key) in &view.pins {
        if view.decided.contains(owner) || view.ended.contains(owner) {
            repo.store().delete(key).await?;
        }
    }
    // The catalogue only helps to find snapshots, so entries of those that will never be found can go.
    let gone = |id: &SnapshotId| {
        view.aborted.contains(id)
            || view.marks.get(id).is_some_and(|state| state.mark == MarkKind::Purge)
    };
    for entry in list_all(repo.store(), key::RUNS).await? {
        if catalogued(&entry).is_some_and(|id| gone(&id)) {
            repo.store().delete(&Key::from_listing(entry.key)).await?;
        }
    }
    Ok(())
}
